"""Identifies the caller and enforces per-key quotas.

Guarantees: with `access.mode: keys` a request without a valid key has no caller; a check and the count that
follows it are one step, so that concurrent requests cannot exceed a limit on requests, nor all pass an almost
empty budget of tokens: each reserves what it may take; a refusal names a wait
that is long enough; without configured limits nothing is kept. One object serves the middleware and, as the
scheduler's `Meter`, the dispatcher.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import NoReturn

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.registry import REGISTRY

from soma_vllm.api.auth.key_cache import KeyCache, Keys
from soma_vllm.api.auth.sliding_window import UsageWindow
from soma_vllm.config import ANY_POLICY, Access, Config, Limits
from soma_vllm.errors import TooManyRequests, Unauthorized
from soma_vllm.private import secret
from soma_vllm.sessions.sql.api_keys import ApiKey
from soma_vllm.sessions.state.identity import bearer, tenant_of
from soma_vllm.types import Usage

IN_FLIGHT_RETRY_S = 1.0
"""Hint to a tenant whose requests in flight may take all of its tokens: when they end cannot be foreseen."""

SESSION_RETRY_S = 60.0
"""Hint to a tenant with too many live sessions: when one of them ends cannot be foreseen."""


class Refusal(StrEnum):
    """Why a request was refused; the label of the metric."""

    KEY = "key"
    """Status 401: no API key, or an unknown one."""
    ADMIN = "admin"
    """403: a known key on a route that needs the admin key."""
    MALFORMED = "malformed"
    """400: a malformed Authorization header."""
    BODY = "body"
    """413."""
    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    SESSIONS = "live_sessions"
    STORE = "store"
    """503: the database does not answer, and the key is not in the cache."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request; in its ASGI scope as `state["soma_caller"]`."""

    tenant: str
    admin: bool
    limits: Limits
    """The key's own values over the configured ones."""
    key: str | None = None
    """Id of the issued key; None for the admin key, and where any token is a tenant."""

    @property
    def told(self) -> str:
        """Who this is, for the audit trail."""
        issued = f"tenant {self.tenant}" if self.key is None else f"key {self.key}"
        return "admin" if self.admin else issued


class Quotas:
    """Identifies the caller and enforces per-key quotas."""

    def __init__(
        self,
        access: Access,
        limits: Limits,
        keys: KeyCache | None = None,
        admin_key: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """Without `keys` any bearer token is a tenant; without an `admin_key` no request has admin rights."""
        self.access = access
        self._default = limits
        self._tenant_limits: dict[str, Limits] = {}
        """Limits of the tenants whose keys are known so far."""
        self._keys = keys
        # Without an admin key, a random one: the comparison takes the same time.
        self._admin_digest = sha256(_as_set(admin_key or secrets.token_hex())).digest()
        self._clock = clock
        self._usage = UsageWindow()
        self._reserved: dict[str, int] = {}
        """Tokens that the requests in flight may take, by tenant."""
        self._refusals = Counter("soma_refusals", "Refused requests by reason.", ["reason"], registry=registry)
        for reason in Refusal:
            self._refusals.labels(reason)

    @classmethod
    def configured(
        cls,
        config: Config,
        keys: Keys,
        environment: Mapping[str, str] | None = None,
        registry: CollectorRegistry = REGISTRY,
    ) -> Quotas:
        """As the configuration says; `keys` is read only with `access.mode: keys`, and `environment` instead of
        this process's own."""
        access = config.access
        cache = KeyCache(keys, access.cache_s) if access.mode == "keys" else None
        name = access.admin_key_env
        admin_key = secret(name) if environment is None else environment.get(name)
        return cls(access, config.limits, cache, admin_key, registry=registry)

    @property
    def needs_keys(self) -> bool:
        """False where any bearer token is a tenant."""
        return self._keys is not None

    def is_admin(self, authorization: str | None) -> bool:
        """Whether this header holds the admin key. Takes the same time for every value."""
        token = bearer(authorization) or ""
        return hmac.compare_digest(sha256(_as_sent(token)).digest(), self._admin_digest)

    async def caller(self, authorization: str | None) -> Caller:
        """The caller that sends this header.

        Raises:
            Unauthorized: the header is no bearer token, or a required key is missing or unknown.
            StoreUnavailable: the key store did not answer within 5 s, and the key is not in the cache.
        """
        token = bearer(authorization)
        if token is None and (authorization or "").strip().lower() not in ("", "bearer"):
            # Clients with other credentials must not share the tenant of those without any.
            raise Unauthorized("Authorization: found another scheme; expected 'Bearer <key>'")
        tenant = tenant_of(authorization)
        admin = self.is_admin(authorization)
        if admin:
            self._tenant_limits[tenant] = self._default.model_copy(update={"policies": (ANY_POLICY,)})
        if self._keys is None or admin:
            return Caller(tenant, admin, self._limits(tenant))
        if token is None:
            raise Unauthorized("Authorization: found none; expected 'Bearer <key>'")
        key = await self._keys.verify(token)
        if key is None:
            raise Unauthorized("Authorization: this API key is unknown or was revoked")
        return Caller(tenant, False, self._limited(key), key.id)

    def learn(self, keys: Iterable[ApiKey]) -> None:
        """Know the limits of keys before their first request: adaptations go on after a restart."""
        for key in keys:
            if key.revoked_at is None:
                self._limited(key)

    def _limited(self, key: ApiKey) -> Limits:
        limits = self._default.model_copy(update=key.limits.model_dump(exclude_unset=True))
        self._tenant_limits[key.tenant] = limits
        return limits

    def admit(self, caller: Caller, needs_tokens: bool = True) -> None:
        """Count one request; one that `needs_tokens` is refused where none are left.

        Raises:
            TooManyRequests: the tenant's requests or tokens per minute are used up.
        """
        most_requests, most_tokens = caller.limits.requests_per_minute, caller.limits.tokens_per_minute
        if most_requests is None and most_tokens is None:
            return
        now = self._clock()
        used = self._usage.tenant(caller.tenant, now).requests
        requests = 0.0 if most_requests is None else used.wait(now, most_requests)
        tokens = self._token_wait(caller.tenant, most_tokens, now) if needs_tokens else 0.0
        if requests > 0.0 and requests >= tokens:
            self._refuse(Refusal.REQUESTS, most_requests, requests)
        if tokens > 0.0:
            self._refuse(Refusal.TOKENS, most_tokens, tokens)
        if most_requests is not None:
            used.add(now, 1)

    def refused(self, reason: Refusal) -> None:
        """Count a refusal."""
        self._refusals.labels(reason).inc()

    def _token_wait(self, tenant: str, most: int | None, now: float) -> float:
        """Seconds until a tenant has tokens again, if its requests in flight take what is reserved for them."""
        if most is None:
            return 0.0
        used = self._usage.tenant(tenant, now).tokens
        left = most - self._reserved.get(tenant, 0)
        return used.wait(now, left) if left > 0 else max(used.wait(now, most), IN_FLIGHT_RETRY_S)

    def _refuse(self, reason: Refusal, most: int | None, wait: float) -> NoReturn:
        self.refused(reason)
        raise TooManyRequests(f"{reason}: this key's {most} are used up; retry in {wait:.1f} s", wait)

    # -- the dispatcher's Meter -------------------------------------------------------------------------

    def limits_tokens(self, tenant: str) -> bool:
        """Whether a tenant's tokens need counting."""
        return self._limits(tenant).tokens_per_minute is not None

    def reserve(self, tenant: str, tokens: int) -> None:
        """Count tokens that a request may take, until `unreserve`. One request may reserve more than are left.

        Raises:
            TooManyRequests: none are left, or the requests in flight may take them.
        """
        most = self._limits(tenant).tokens_per_minute
        if (wait := self._token_wait(tenant, most, self._clock())) > 0.0:
            self._refuse(Refusal.TOKENS, most, wait)
        self._reserved[tenant] = self._reserved.get(tenant, 0) + tokens

    def unreserve(self, tenant: str, tokens: int) -> None:
        """Give reserved tokens back: what was used in fact is `spent`."""
        left = self._reserved.pop(tenant, 0) - tokens
        if left > 0:
            self._reserved[tenant] = left

    def spent(self, tenant: str, usage: Usage) -> None:
        """Count the tokens of a reply."""
        tokens = (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
        if tokens and self._limits(tenant).tokens_per_minute is not None:
            now = self._clock()
            self._usage.tenant(tenant, now).tokens.add(now, tokens)

    def limits_sessions(self, tenant: str) -> bool:
        """Whether a tenant's sessions need counting."""
        return self._limits(tenant).live_sessions is not None

    def check_new_session(self, tenant: str, live: int) -> None:
        """Check that a tenant with `live` sessions may begin another.

        Raises:
            TooManyRequests: its limit on live sessions is reached.
        """
        most = self._limits(tenant).live_sessions
        if most is not None and live >= most:
            self.refused(Refusal.SESSIONS)
            raise TooManyRequests(
                f"live_sessions: found {live}; expected fewer than {most} before a new one", SESSION_RETRY_S
            )

    def policies(self, tenant: str) -> tuple[str, ...]:
        """Policies that a tenant's requests may name although they cost the operator something."""
        return self._limits(tenant).policies

    def may_adapt(self, tenant: str, adapters: int) -> bool:
        """Whether a tenant with `adapters` adapters may have another."""
        most = self._limits(tenant).adapters
        return most is None or adapters < most

    def _limits(self, tenant: str) -> Limits:
        return self._tenant_limits.get(tenant, self._default)


def _as_set(key: str) -> bytes:
    """An environment variable's bytes."""
    return key.encode("utf-8", "surrogateescape")


def _as_sent(token: str) -> bytes:
    """A token's bytes: servers decode headers as Latin-1, clients send UTF-8."""
    try:
        return token.encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "surrogatepass")
