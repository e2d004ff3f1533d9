"""The arithmetic of limits per minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.api.auth.sliding_window import PERIOD_S, SlidingWindow, UsageWindow


def spent(entries: list[tuple[float, int]]) -> SlidingWindow:
    window = SlidingWindow()
    for at, amount in entries:
        window.add(at, amount)
    return window


def test_an_amount_is_forgotten_exactly_a_period_after_it_was_spent() -> None:
    window = spent([(10.0, 3)])
    assert window.wait(69.0, 3) == 1.0
    assert window.wait(70.0, 3) == 0.0
    assert window.wait(70.0, 1) == 0.0


def test_below_the_limit_there_is_no_wait() -> None:
    assert spent([(0.0, 9)]).wait(0.0, 10) == 0.0


def test_an_amount_far_above_the_limit_is_counted_in_full() -> None:
    window = spent([(0.0, 9), (30.0, 1000)])
    assert window.wait(59.0, 10) == 31.0
    assert window.wait(60.0, 10) == 30.0


def test_the_wait_passes_over_as_many_amounts_as_it_takes() -> None:
    window = spent([(0.0, 4), (1.0, 4), (2.0, 4)])
    assert window.wait(5.0, 5) == 1.0 + PERIOD_S - 5.0


times = st.lists(st.tuples(st.floats(0, 20), st.integers(0, 50)), max_size=30)


@given(times, st.integers(1, 100))
def test_the_wait_is_enough_and_no_longer(steps: list[tuple[float, int]], limit: int) -> None:
    now, window, entries = 0.0, SlidingWindow(), []
    for pause, amount in steps:
        now += pause
        window.add(now, amount)
        entries.append((now, amount))
    wait = window.wait(now, limit)

    def in_window(at: float) -> int:
        return sum(amount for when, amount in entries if when + PERIOD_S > at)

    assert in_window(now + wait + 1e-6) < limit
    assert wait == 0.0 or in_window(now + wait - 1e-6) >= limit


def test_a_tenant_idle_for_a_period_takes_no_memory() -> None:
    usage = UsageWindow()
    for number in range(1000):
        usage.tenant(f"t{number}", number / 1000)
    usage.tenant("late", PERIOD_S + 0.5)
    assert len(usage) == 500
    usage.tenant("later", 2 * PERIOD_S + 1)
    assert len(usage) == 1


def test_a_tenant_is_remembered_from_its_last_use() -> None:
    usage = UsageWindow()
    usage.tenant("t", 0.0).tokens.add(0.0, 5)
    usage.tenant("t", 50.0).tokens.add(50.0, 5)
    usage.tenant("other", 100.0)
    assert usage.tenant("t", 100.0).tokens.wait(100.0, 5) == 10.0


def test_more_tenants_than_fit_push_out_the_longest_idle() -> None:
    usage = UsageWindow(most_tenants=3)
    for tenant in ("a", "b", "c", "a", "d"):
        usage.tenant(tenant, 1.0).requests.add(1.0, 1)
    assert len(usage) == 3
    assert usage.tenant("a", 1.0).requests.wait(1.0, 1) > 0.0
    assert usage.tenant("b", 1.0).requests.wait(1.0, 1) == 0.0
