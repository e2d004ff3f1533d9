"""The tree of errors. Every error a user can meet is one of these; anything else is a bug.

    SomaError
    ├── ConfigError            (ValueError)  the configuration is wrong; lists every mistake at once
    ├── DocumentError          (ValueError)  JSON or YAML that cannot be read within bounds
    ├── BadRequest             (ValueError)  the client's request is wrong                     -> 400
    │   ├── BodyTooLarge                     longer than this server reads                     -> 413
    │   ├── NoSuchModel                      no engine here serves a model of that name        -> 404
    │   └── Unprocessable                    well-formed, but no engine here can do it         -> 422
    ├── Unauthorized                         no API key, or none that is known                 -> 401
    ├── Forbidden                            a known API key, but not for this                 -> 403
    ├── NotFound               (LookupError) no such session, adapter or model                 -> 404
    ├── TooManyRequests                      the API key has used up a limit of its own        -> 429
    ├── PreflightError                       this machine cannot start the server as configured
    │   └── InUse                            another server lives on its record, root or run directory
    ├── ModelError                           a model cannot be fetched, verified or converted
    │   └── ChecksumMismatch                 bytes arrived, but not the promised ones
    ├── AdapterError                         an adapter is not fit to be published or loaded
    │   └── AdapterRejected                  `verify` found what is wrong with its files
    ├── PolicyUnavailable                    a policy cannot decide now; the original answers
    ├── IllegalMove                          a bug: an adapter may not go from its state to that one
    ├── StoreUnavailable                     the session store did not answer within 3 s       -> 503
    │   └── StoreRefused                     it answered, and refused a statement
    ├── EngineError                          an engine did not answer
    │   ├── EngineUnavailable                it is not running, or not yet                     -> 503
    │   │   ├── EngineNotReady               it was not even asked
    │   │   ├── NoAdapterSlot                all slots serve other adapters
    │   │   ├── MalformedCall                it called a tool as the request does not allow
    │   │   └── ConnectionLost               no byte of an answer came: it may be asked again
    │   └── EngineRefused                    it answered with an OpenAI error of its own       -> as told
    └── TrainingError                        a training ended without an adapter

Messages quote what was found and what was expected. A message never holds conversation text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class SomaError(Exception):
    """Base of every error raised on purpose by soma_vllm."""


class ConfigError(SomaError, ValueError):
    """A configuration has mistakes. `problems` holds one line for each of them."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = "1 mistake" if len(self.problems) == 1 else f"{len(self.problems)} mistakes"
        super().__init__(f"{source}: {count}\n{lines}")


class DocumentError(SomaError, ValueError):
    """JSON or YAML from outside cannot be read within bounds; one line says why."""


class BadRequest(SomaError, ValueError):
    """The client's request is wrong. `param` names the offending field, as OpenAI's errors do."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class BodyTooLarge(BadRequest):
    """The request's body is longer than this server reads."""


class NoSuchModel(BadRequest):
    """The client asks for a model that is not served here."""


class Unprocessable(BadRequest):
    """The client's request is well-formed, but asks for something that no engine here can do."""


class Unauthorized(SomaError):
    """No API key, or none that is known. The message never says which part of a key was wrong."""


class Forbidden(SomaError):
    """A known API key, but one that may not do this."""


class NotFound(SomaError, LookupError):
    """No such session, adapter or model, or none that this API key may see."""


class TooManyRequests(SomaError):
    """The API key has used up a limit of its own. `retry_after` is in seconds: an earlier request is refused
    too."""

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class PreflightError(SomaError):
    """This machine cannot start the server as configured; nothing heavy was started."""


class InUse(PreflightError):
    """Another server lives on the record, on its part of the adapter root, or in the run directory."""


class ModelError(SomaError):
    """A model cannot be fetched, verified or converted; nothing half-made was left behind."""


class ChecksumMismatch(ModelError):
    """Bytes arrived, but not the promised ones."""

    def __init__(self, what: str, expected: str, found: str) -> None:
        self.expected = expected
        self.found = found
        super().__init__(f"{what}: expected SHA-256 {expected}, found {found}")


class AdapterError(SomaError):
    """An adapter is not fit to be published, loaded or removed."""


class AdapterRejected(AdapterError):
    """`verify` found what is wrong with an adapter's files. `problems` lists all of it."""

    def __init__(self, name: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"adapter {name} rejected: {'; '.join(self.problems)}")


class PolicyUnavailable(SomaError):
    """A policy cannot decide now; the original answers, and the message is logged."""


class IllegalMove(SomaError):
    """An adapter may not go from its state to that one."""


class StoreUnavailable(SomaError):
    """The session store did not answer within 3 s; the original can still answer a turn, unrecorded."""


class StoreRefused(StoreUnavailable):
    """The session store refused a statement: it contradicts what is stored, and trying again does not help.

    `duplicate` says that a row of that key is stored already.
    """

    def __init__(self, message: str, *, duplicate: bool = False) -> None:
        self.duplicate = duplicate
        super().__init__(message)


class EngineError(SomaError):
    """An engine did not answer."""


class EngineUnavailable(EngineError):
    """The engine is not running, or not yet. `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: float = 5.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class EngineNotReady(EngineUnavailable):
    """The engine was not asked: it is known to be starting, stopped, or down."""


class NoAdapterSlot(EngineUnavailable):
    """All adapter slots are in use, or the adapter is leaving."""


class MalformedCall(EngineUnavailable):
    """The engine called a function that the request does not declare, or with arguments that are not valid."""


class ConnectionLost(EngineUnavailable):
    """The connection failed before a byte of an answer came; asking again repeats nothing that was seen."""


class EngineDenied(EngineUnavailable):
    """The engine answered that it takes no such request of ours (401, 402, 403, 407); it may take others."""


class EngineRefused(EngineError):
    """The engine answered with an error of its own; `status` and `body` go to the client unchanged, and so does
    `retry_after`, the seconds that it asks to wait, where it names any. `cause` is a code for what was wrong:
    the engine's own sentence may quote the request."""

    def __init__(
        self,
        status: int,
        body: Mapping[str, Any],
        retry_after: float | None = None,
        cause: str = "request_refused",
    ) -> None:
        self.status = status
        self.body = dict(body)
        self.retry_after = retry_after
        self.cause = cause
        super().__init__(f"the engine refused the request with status {status}")


class TrainingError(SomaError):
    """A training ended without an adapter."""
