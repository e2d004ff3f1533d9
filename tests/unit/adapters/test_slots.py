"""The rules for adapter slots: capacity, order, no starvation, nobody forgotten; in any sequence of calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from soma_vllm.adapters.slots import BACKGROUND_SLOTS, OVERTAKES, PATIENCE, AdapterSlots, SlotRequest, State


def asked(slots: AdapterSlots, name: str, background: bool = False) -> SlotRequest:
    ticket, others = slots.acquire(name, background)
    assert others == []
    return ticket


def test_never_more_distinct_adapters_are_in_use_than_there_are_slots() -> None:
    slots = AdapterSlots(2)
    states = [asked(slots, name).state for name in ("a", "b", "c", "a")]
    assert states == [State.GRANTED, State.GRANTED, State.FULL, State.GRANTED]
    assert (slots.distinct(), slots.count()) == (2, 3)


def test_users_wait_in_the_order_they_came_and_those_of_one_adapter_get_it_together() -> None:
    slots = AdapterSlots(1, queue_limit=10)
    holder = asked(slots, "a")
    first, second, third = asked(slots, "b"), asked(slots, "c"), asked(slots, "b")
    assert slots.release(holder) == [first, third]
    assert slots.release(first) == []
    assert slots.release(third) == [second]


def test_a_hot_adapter_overtakes_a_waiting_one_a_few_times_and_then_queues_behind_it() -> None:
    slots = AdapterSlots(1, queue_limit=100)
    hot = [asked(slots, "hot")]
    cold = asked(slots, "cold")
    later = [asked(slots, "hot") for _ in range(OVERTAKES + 3)]
    assert [ticket.state for ticket in later] == [State.GRANTED] * OVERTAKES + [State.WAITING] * 3
    for ticket in [*hot, *later[:OVERTAKES]]:
        slots.release(ticket)
    assert cold.state is State.GRANTED


def test_a_full_queue_refuses() -> None:
    slots = AdapterSlots(1, queue_limit=1)
    asked(slots, "a")
    assert [asked(slots, name).state for name in ("b", "c")] == [State.WAITING, State.FULL]


def test_who_gives_up_frees_the_place_and_lets_the_next_one_in() -> None:
    slots = AdapterSlots(2, queue_limit=10)
    asked(slots, "a")
    other = asked(slots, "b")
    first, second = asked(slots, "c"), asked(slots, "a2")
    assert slots.cancel(first) == []
    assert slots.release(other) == [second]
    assert first.state is State.OVER


def test_a_leaving_adapter_takes_nobody_and_those_who_wait_for_it_are_told() -> None:
    slots = AdapterSlots(1, queue_limit=10)
    asked(slots, "a")
    waiting = asked(slots, "b")
    assert slots.drain("b") == [waiting]
    assert waiting.state is asked(slots, "b").state is State.DRAINING
    slots.forget("b")
    assert asked(slots, "b").state is State.WAITING


def test_the_background_takes_one_slot_and_comes_after_users() -> None:
    slots = AdapterSlots(2, queue_limit=10)
    assert asked(slots, "judged", background=True).state is State.GRANTED
    assert asked(slots, "audited", background=True).state is State.WAITING
    user = asked(slots, "a")
    waiting = asked(slots, "b")
    assert user.state is State.GRANTED
    assert slots.release(user) == [waiting]


def test_the_background_is_not_starved_by_users_that_never_leave_a_slot_free() -> None:
    slots = AdapterSlots(1, queue_limit=10)
    ticket = asked(slots, "hot")
    shadow = asked(slots, "shadow", background=True)
    for count in range(PATIENCE * 3):
        following, _ = slots.acquire("hot" if count % 2 else "warm")
        slots.release(ticket)
        if shadow.state is State.GRANTED:
            break
        assert following.state is State.GRANTED
        ticket = following
    assert shadow.state is State.GRANTED
    assert count <= PATIENCE + OVERTAKES + 1


@dataclass(eq=False)
class Watched:
    """What a waiting user has seen go by."""

    ticket: SlotRequest
    ahead: set[str] = field(default_factory=set)
    overtaken: int = 0


NAMES = st.sampled_from("abcdef")


class AnySequence(RuleBasedStateMachine):
    """Every order of asking, giving back, giving up and leaving."""

    @initialize(slots=st.integers(1, 3), queue_limit=st.integers(0, 6))
    def begin(self, slots: int, queue_limit: int) -> None:
        self.capacity, self.queue_limit = slots, queue_limit
        self.slots = AdapterSlots(slots, queue_limit)
        self.granted: list[SlotRequest] = []
        self.waiting: dict[SlotRequest, Watched] = {}
        self.leaving: set[str] = set()

    @rule(name=NAMES, background=st.booleans())
    def acquire(self, name: str, background: bool) -> None:
        queued = [watched for watched in self.waiting.values() if not watched.ticket.background]
        ticket, others = self.slots.acquire(name, background)
        self._told(others)
        if name in self.leaving:
            assert ticket.state is State.DRAINING
        elif ticket.state is State.GRANTED:
            self.granted.append(ticket)
            if not background:
                for watched in queued:
                    watched.overtaken += 1
        elif ticket.state is State.WAITING:
            names = {watched.ticket.name for watched in queued} - {name}
            self.waiting[ticket] = Watched(ticket, ahead=names)
        else:
            assert ticket.state is State.FULL
            assert not background
            assert self.slots.waiting() >= self.queue_limit

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket = self.granted.pop(data.draw(st.integers(0, len(self.granted) - 1)))
        self._told(self.slots.release(ticket))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(list(self.waiting)))
        del self.waiting[ticket]
        self._told(self.slots.cancel(ticket))

    @rule(name=NAMES)
    def drain(self, name: str) -> None:
        self.leaving.add(name)
        decided = self.slots.drain(name)
        self._told([ticket for ticket in decided if ticket.state is State.GRANTED])
        for ticket in decided:
            if ticket.state is State.DRAINING:
                del self.waiting[ticket]

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        self.leaving.discard(name)
        self.slots.forget(name)

    def _told(self, decided: list[SlotRequest]) -> None:
        """Those let in were waiting; nobody who came after a waiting user of another adapter is among them,
        unless they share the place of one who came before."""
        for ticket in decided:
            assert ticket.state is State.GRANTED
            del self.waiting[ticket]
            self.granted.append(ticket)

    @invariant()
    def no_more_adapters_than_slots_are_in_use(self) -> None:
        names = {ticket.name for ticket in self.granted}
        assert self.slots.distinct() == len(names) <= self.capacity
        assert self.slots.count() == len(self.granted)

    @invariant()
    def nobody_is_overtaken_more_often_than_the_rules_allow(self) -> None:
        for watched in self.waiting.values():
            if not watched.ticket.background:
                assert watched.overtaken <= OVERTAKES

    @invariant()
    def nobody_waits_for_what_is_free(self) -> None:
        in_use = {ticket.name for ticket in self.granted}
        users = [ticket for ticket in self.waiting if not ticket.background]
        shadows = [ticket for ticket in self.waiting if ticket.background]
        if users:
            assert len(in_use) == self.capacity
        elif shadows:
            alone = in_use - {ticket.name for ticket in self.granted if not ticket.background}
            assert len(in_use) == self.capacity or len(alone) >= BACKGROUND_SLOTS

    @invariant()
    def the_queue_keeps_its_limit(self) -> None:
        assert self.slots.waiting() <= self.queue_limit

    def teardown(self) -> None:
        """Once everybody gives back, everybody who waits gets in: nobody was forgotten."""
        if not hasattr(self, "slots"):
            return
        for _ in range(10_000):
            if not self.granted:
                break
            self._told(self.slots.release(self.granted.pop(0)))
        assert not self.waiting
        assert self.slots.distinct() == self.slots.count() == 0


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
