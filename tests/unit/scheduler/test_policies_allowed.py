"""Which policies a request may choose."""

from __future__ import annotations

import pytest
from support.services import Services

from soma_vllm.config import exposed, parse_config
from soma_vllm.errors import Forbidden


@pytest.mark.parametrize("way", [{"headers": {"x-soma-policy": "history_ft"}}, {"model": "soma:history_ft"}])
async def test_a_policy_that_trains_is_refused_where_the_operator_does_not_allow_it(
    services: Services, way: dict[str, object]
) -> None:
    services.meter.allowed = ("llmlingua2",)
    with pytest.raises(
        Forbidden, match=r"found 'history_ft', which this key may not use; expected soma, .*llmlingua2"
    ):
        await services.say([], "question", **way)
    assert services.original.calls == []
    for allowed in (("history_ft",), ("*",)):
        services.meter.allowed = allowed
        assert (await services.say([], "question", **way)).headers["X-SOMA-Engine"] == "original"


async def test_the_configured_policy_and_those_that_cost_nothing_need_no_leave(services: Services) -> None:
    services.meter.allowed = ()
    for name in ("soma", "original", "surrogate"):
        assert (await services.say([], "question", headers={"x-soma-policy": name})).reply.body is not None


@pytest.mark.parametrize(
    ("host", "mode", "warned"),
    [
        ("0.0.0.0", "open", True),
        ("::", "open", True),
        ("soma.example.org", "open", True),
        ("127.0.0.1", "open", False),
        ("::1", "open", False),
        ("localhost", "open", False),
        ("0.0.0.0", "keys", False),
    ],
)
def test_an_open_server_on_an_address_that_others_reach_says_so(host: str, mode: str, warned: bool) -> None:
    config = parse_config({"server": {"host": host}, "access": {"mode": mode}}, "test")
    assert [f"open on {host}" in line for line in exposed(config)] == [True] * warned


def test_limits_that_a_new_token_evades_are_told() -> None:
    assert "any new token" in exposed(parse_config({"limits": {"live_sessions": 2}}, "test"))[0]
    assert exposed(parse_config({"limits": {"policies": ["*"]}}, "test")) == []
