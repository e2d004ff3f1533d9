"""Who hears of which events."""

from __future__ import annotations

from support.services import Services

from soma_vllm.sessions.event_bus import EventBus
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")


class Listener:
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __call__(self, key: SessionKey, event: Event) -> None:
        self.heard.append(event.kind)


class Chooser(Listener):
    """Says which kinds it hears."""

    kinds = frozenset({EventKind.SWITCHED})


def test_an_observer_hears_the_kinds_it_names_and_one_that_names_none_hears_all() -> None:
    all_kinds, chooser, later = Listener(), Chooser(), Chooser()
    bus = EventBus([all_kinds, chooser])
    bus.subscribe(later)
    for kind in ("turn", "switched", "unknown"):
        bus.publish(KEY, Event(kind, 0.0, {}))
    assert all_kinds.heard == ["turn", "switched", "unknown"]
    assert chooser.heard == ["switched"]
    assert later.heard == ["switched"]
    assert bus.subscribers(EventKind.SWITCHED) == [all_kinds, chooser, later]
    assert bus.subscribers(EventKind.TURN) == [all_kinds]


def test_what_happens_at_a_switch_is_one_list(services: Services) -> None:
    listed = services.registry.bus.subscribers(EventKind.SWITCHED)
    assert listed[1:] == [services.teacher_logprobs, services.shadow_traffic]
