"""Which adapters have to go: decided from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.adapters.eviction_policy import Reason, StoredAdapter, to_evict
from soma_vllm.config import Adapters

NOW = 1000.0


def kept(name: str, used: float, tenant: str = "t", size: int = 10, spared: bool = False) -> StoredAdapter:
    return StoredAdapter(name, tenant, size, used, spared)


def going(adapters: list[StoredAdapter], **budgets: float) -> dict[str, Reason]:
    found = to_evict(adapters, Adapters.model_validate(budgets), NOW)
    return {one.name: one.reason for one in found}


def test_without_budgets_everything_stays() -> None:
    assert going([kept("a", 0), kept("b", 0)]) == {}


def test_the_least_recently_used_go_first_until_the_count_is_kept() -> None:
    assert going([kept("new", 3), kept("old", 1), kept("older", 0)], max_count=1) == {
        "older": Reason.COUNT,
        "old": Reason.COUNT,
    }


def test_bytes_are_counted_as_well() -> None:
    adapter_store = [kept("a", 1, size=60), kept("b", 2, size=30), kept("c", 3, size=30)]
    assert going(adapter_store, max_bytes=60) == {"a": Reason.BYTES}
    assert going(adapter_store, max_bytes=59) == {"a": Reason.BYTES, "b": Reason.BYTES}


def test_a_tenant_pays_for_its_own_adapters_before_others_do() -> None:
    adapter_store = [kept("a", 1), kept("b1", 2, "b"), kept("b2", 3, "b"), kept("b3", 4, "b")]
    assert going(adapter_store, tenant_max_count=2, max_count=3) == {"b1": Reason.TENANT_COUNT}
    assert going(adapter_store, tenant_max_bytes=10) == {"b1": Reason.TENANT_BYTES, "b2": Reason.TENANT_BYTES}


def test_an_adapter_unused_for_too_long_goes_whatever_there_is_room_for() -> None:
    assert going([kept("a", 899), kept("b", 901)], ttl_s=100.0) == {"a": Reason.TTL}


def test_a_spared_adapter_stays_even_where_the_budget_is_exceeded() -> None:
    adapter_store = [kept("pinned", 0, spared=True), kept("a", 1), kept("b", 2)]
    assert going(adapter_store, max_count=1, ttl_s=1.0) == {"a": Reason.TTL, "b": Reason.TTL}
    assert going(adapter_store, max_count=2) == {"a": Reason.COUNT}
    assert going([kept("p", 0, spared=True), kept("q", 1, spared=True)], max_count=1, max_bytes=1) == {}


@dataclass(frozen=True)
class Limits:
    max_count: int | None
    max_bytes: int | None
    tenant_max_count: int | None
    tenant_max_bytes: int | None
    ttl_s: float | None


OPTIONAL = st.none() | st.integers(1, 60)
SHELF = st.lists(
    st.builds(
        StoredAdapter,
        name=st.uuids().map(str),
        tenant=st.sampled_from("abc"),
        size_bytes=st.integers(1, 20),
        last_used=st.floats(0, 1000),
        spared=st.booleans(),
    ),
    max_size=30,
    unique_by=lambda one: one.name,
)


@given(SHELF, st.builds(Limits, OPTIONAL, OPTIONAL, OPTIONAL, OPTIONAL, st.none() | st.floats(1, 2000)))
def test_afterwards_every_budget_is_kept_as_far_as_spared_adapters_let_it(
    adapter_store: list[StoredAdapter], budgets: Limits
) -> None:
    found = to_evict(adapter_store, budgets, NOW)
    names = [one.name for one in found]
    left = [one for one in adapter_store if one.name not in names]
    assert len(set(names)) == len(names)
    assert all(one in left for one in adapter_store if one.spared)
    groups = [(left, budgets.max_count, budgets.max_bytes)]
    for tenant in "abc":
        mine = [one for one in left if one.tenant == tenant]
        groups.append((mine, budgets.tenant_max_count, budgets.tenant_max_bytes))
    for group, count, size in groups:
        stuck = all(one.spared for one in group)
        assert count is None or len(group) <= count or stuck
        assert size is None or sum(one.size_bytes for one in group) <= size or stuck
    if budgets.ttl_s is not None:
        assert all(one.spared or one.last_used >= NOW - budgets.ttl_s for one in left)
    if names:
        last = found[-1]
        assert to_evict([*left, *(one for one in adapter_store if one.name == last.name)], budgets, NOW), (
            "needed"
        )
