"""Callers, and what each tenant has left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from soma_vllm.api.auth.key_cache import KeyCache
from soma_vllm.api.auth.quotas import Quotas, Refusal
from soma_vllm.config import Access, Config, Limits, parse_config
from soma_vllm.errors import TooManyRequests, Unauthorized
from soma_vllm.sessions.ports import Meter
from soma_vllm.sessions.sql.api_keys import ApiKey
from soma_vllm.sessions.state.identity import bearer, tenant_of
from soma_vllm.types import Usage

KEY = "sk-soma-0123456789ab-" + "s" * 32
ADMIN = "the admin's own"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class OneKey:
    """A key store with one key."""

    def __init__(self, limits: Limits) -> None:
        self.record = ApiKey("0123456789ab", "Ana", "d", tenant_of(f"Bearer {KEY}"), limits, 0.0, None)

    async def verify(self, key: str) -> ApiKey | None:
        return self.record if key == KEY else None


def quotas(
    limits: Limits | None = None,
    own: Limits | None = None,
    clock: Clock | None = None,
    admin_key: str | None = ADMIN,
    registry: CollectorRegistry | None = None,
) -> Quotas:
    """In use with keys where `own` is given: the limits of the one key there is."""
    ring = None if own is None else KeyCache(OneKey(own), 5.0)
    return Quotas(
        Access(), limits or Limits(), ring, admin_key, clock or Clock(), registry or CollectorRegistry()
    )


def test_limits_of_a_key_hold_before_its_first_request() -> None:
    found = quotas(own=Limits())
    record = OneKey(Limits(adapters=0)).record
    assert found.may_adapt(record.tenant, 5)
    found.learn([record])
    assert not found.may_adapt(record.tenant, 0)


async def test_policies_are_a_keys_own_the_configurations_or_all_for_the_administrator() -> None:
    configured = Limits(policies=("history_ft",))
    for own, expected in ((Limits(), ("history_ft",)), (Limits(policies=("routellm",)), ("routellm",))):
        found = quotas(configured, own)
        caller = await found.caller(f"Bearer {KEY}")
        assert found.policies(caller.tenant) == expected
        admin = await found.caller(f"Bearer {ADMIN}")
        assert found.policies(admin.tenant) == ("*",)
    assert quotas().policies("public") == ()


async def test_without_keys_any_bearer_token_is_a_tenant_of_its_own() -> None:
    found = quotas()
    caller = await found.caller("Bearer anything")
    assert caller.tenant == tenant_of("Bearer anything")
    assert not caller.admin
    assert (await found.caller(None)).tenant == "public"
    assert (await found.caller("Bearer ")).tenant == "public"


@pytest.mark.parametrize("header", ["Basic YTpi", "sk-secret", "Token 7hunter", "Bearerx 7hunter"])
async def test_other_credentials_are_refused_rather_than_pooled_and_not_quoted(header: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        await quotas().caller(header)
    assert header.rsplit(" ", 1)[-1] not in str(caught.value)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  ", f"Bearer {KEY}x", f"Basic {KEY}", KEY])
async def test_with_keys_only_a_whole_known_key_is_a_caller(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        await quotas(own=Limits()).caller(header)


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer   {KEY} "])
async def test_with_keys_the_tenant_is_the_one_that_the_header_names_everywhere(header: str) -> None:
    caller = await quotas(own=Limits()).caller(header)
    assert caller.tenant == tenant_of(header) == tenant_of(f"Bearer {KEY}")


async def test_a_keys_own_limits_come_first_and_null_lifts_one() -> None:
    defaults = Limits(requests_per_minute=5, tokens_per_minute=100, adapters=1)
    found = quotas(defaults, own=Limits(requests_per_minute=50, tokens_per_minute=None))
    limits = (await found.caller(f"Bearer {KEY}")).limits
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.adapters) == (50, None, 1)


async def test_the_dispatcher_is_told_a_keys_own_limits_by_its_tenant() -> None:
    found = quotas(Limits(live_sessions=1), own=Limits(live_sessions=3, adapters=2))
    tenant = (await found.caller(f"Bearer {KEY}")).tenant
    assert found.limits_sessions(tenant)
    found.check_new_session(tenant, 2)
    assert found.may_adapt(tenant, 1)
    assert not found.may_adapt(tenant, 2)
    with pytest.raises(TooManyRequests):
        found.check_new_session("another", 1)


def test_it_is_the_schedulers_meter() -> None:
    meter: Meter = quotas()
    meter.spent("t", Usage(1, None, 1))
    meter.check_new_session("t", 10_000)
    assert not meter.limits_sessions("t")
    assert meter.may_adapt("t", 10_000)


# -- the admin ------------------------------------------------------------------------------------------


def test_the_admin_key_makes_an_admin_and_nothing_else_does() -> None:
    found = quotas()
    assert found.is_admin(f"Bearer {ADMIN}")
    for other in (None, "", "Bearer", f"Basic {ADMIN}", ADMIN, f"Bearer {ADMIN}x", f"Bearer {ADMIN[:-1]}"):
        assert not found.is_admin(other)


@pytest.mark.parametrize("unset", [None, ""])
def test_without_an_admin_key_nobody_is_an_admin(unset: str | None) -> None:
    found = quotas(admin_key=unset)
    for header in (None, "", "Bearer", "Bearer ", "Bearer None"):
        assert not found.is_admin(header)


def test_an_admin_key_beyond_ascii_is_recognised_as_clients_send_it() -> None:
    found = quotas(admin_key="schlüssel")
    assert found.is_admin("Bearer " + "schlüssel".encode().decode("latin-1"))


async def test_the_admin_is_a_caller_without_a_key_of_his_own() -> None:
    caller = await quotas(own=Limits()).caller(f"Bearer {ADMIN}")
    assert caller.admin
    assert caller.tenant == tenant_of(f"Bearer {ADMIN}")


def test_the_admin_key_comes_from_the_environment_variable_that_is_configured() -> None:
    config = parse_config({"access": {"admin_key_env": "OURS"}}, "it")
    found = configured(config, {"OURS": "o", "SOMA_ADMIN_KEY": "s"})
    assert found.is_admin("Bearer o")
    assert not found.is_admin("Bearer s")


@pytest.mark.parametrize(("mode", "needs"), [("open", False), ("keys", True)])
def test_keys_are_needed_where_the_configuration_says_so(mode: str, needs: bool) -> None:
    assert configured(parse_config({"access": {"mode": mode}}, "it"), {}).needs_keys is needs


def configured(config: Config, environment: dict[str, str]) -> Quotas:
    return Quotas.configured(config, OneKey(Limits()), environment, CollectorRegistry())


@given(st.text(max_size=60))
def test_a_bearer_token_is_read_as_the_tenant_is(header: str) -> None:
    token = bearer(header)
    assert tenant_of(header) == ("public" if token is None else tenant_of(f"Bearer {token}"))


# -- limits ---------------------------------------------------------------------------------------------


async def test_requests_above_the_limit_are_refused_until_the_first_is_a_minute_old() -> None:
    clock = Clock()
    found = quotas(Limits(requests_per_minute=2), clock=clock)
    caller = await found.caller("Bearer a")
    for clock.now in (1000.0, 1010.0):
        found.admit(caller)
    clock.now = 1015.0
    with pytest.raises(TooManyRequests, match=r"requests_per_minute: this key's 2 .* in 45\.0 s") as caught:
        found.admit(caller)
    assert caught.value.retry_after == 45.0
    clock.now = 1060.0
    found.admit(caller)
    with pytest.raises(TooManyRequests) as caught:
        found.admit(caller)
    assert caught.value.retry_after == 10.0


async def test_a_refused_request_is_not_counted() -> None:
    clock = Clock()
    found = quotas(Limits(requests_per_minute=1), clock=clock)
    caller = await found.caller("Bearer a")
    found.admit(caller)
    for clock.now in (1020.0, 1040.0, 1059.0):
        with pytest.raises(TooManyRequests):
            found.admit(caller)
    clock.now = 1060.0
    found.admit(caller)


async def test_the_reply_that_passes_the_token_limit_stops_the_next_request() -> None:
    clock = Clock()
    found = quotas(Limits(tokens_per_minute=100), clock=clock)
    caller = await found.caller("Bearer a")
    found.admit(caller)
    found.spent(caller.tenant, Usage(prompt_tokens=60, cached_tokens=50, completion_tokens=39))
    found.admit(caller)
    clock.now = 1030.0
    found.spent(caller.tenant, Usage(prompt_tokens=5000, completion_tokens=None))
    with pytest.raises(TooManyRequests, match="tokens_per_minute") as caught:
        found.admit(caller)
    assert caught.value.retry_after == 60.0
    clock.now = 1090.0
    found.admit(caller)


async def test_of_two_limits_the_longer_wait_is_named() -> None:
    clock = Clock()
    found = quotas(Limits(requests_per_minute=1, tokens_per_minute=10), clock=clock)
    caller = await found.caller("Bearer a")
    found.admit(caller)
    clock.now = 1020.0
    found.spent(caller.tenant, Usage(10, None, 10))
    with pytest.raises(TooManyRequests) as caught:
        found.admit(caller)
    assert caught.value.retry_after == 60.0


async def test_one_tenants_use_takes_nothing_from_another() -> None:
    found = quotas(Limits(requests_per_minute=1))
    for header in ("Bearer a", "Bearer b", None):
        found.admit(await found.caller(header))


async def test_without_limits_nothing_is_kept() -> None:
    found = quotas()
    for number in range(100):
        caller = await found.caller(f"Bearer {number}")
        found.admit(caller)
        found.spent(caller.tenant, Usage(5, None, 5))
    assert not len(found._usage)
    assert not found._tenant_limits


async def test_refusals_are_counted_by_reason_without_tenants() -> None:
    registry = CollectorRegistry()
    found = quotas(Limits(requests_per_minute=1, live_sessions=1), registry=registry)
    caller = await found.caller("Bearer a")
    found.admit(caller)
    for _ in range(3):
        with pytest.raises(TooManyRequests):
            found.admit(caller)
    with pytest.raises(TooManyRequests):
        found.check_new_session(caller.tenant, 1)

    def counted(reason: str) -> float | None:
        return registry.get_sample_value("soma_refusals_total", {"reason": reason})

    assert (counted("requests_per_minute"), counted("live_sessions"), counted("key")) == (3.0, 1.0, 0.0)
    samples = [s for family in registry.collect() for s in family.samples if s.name.endswith("_total")]
    assert {s.labels["reason"] for s in samples} == set(Refusal)


async def test_requests_in_flight_cannot_all_pass_an_almost_empty_budget() -> None:
    clock = Clock()
    found = quotas(Limits(tokens_per_minute=100), clock=clock)
    caller = await found.caller("Bearer a")
    found.reserve(caller.tenant, 90)
    found.reserve(caller.tenant, 500)  # one may be larger than what is left
    for refused in (lambda: found.reserve(caller.tenant, 1), lambda: found.admit(caller)):
        with pytest.raises(TooManyRequests, match="tokens_per_minute"):
            refused()
    found.reserve((await found.caller("Bearer b")).tenant, 1)
    found.unreserve(caller.tenant, 500)
    found.unreserve(caller.tenant, 90)
    found.spent(caller.tenant, Usage(60, None, 20))
    found.reserve(caller.tenant, 10)
    found.unreserve(caller.tenant, 10)
    found.spent(caller.tenant, Usage(None, None, 20))
    with pytest.raises(TooManyRequests) as error:
        found.reserve(caller.tenant, 1)
    assert error.value.retry_after == 60.0
    clock.now += 60.0
    found.reserve(caller.tenant, 1)
