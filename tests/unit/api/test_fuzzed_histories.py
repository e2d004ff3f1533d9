"""Histories that nobody means: none is a 500, none reaches another tenant."""

from __future__ import annotations

import os

import pytest
from support.fuzzed_histories import CHAT, histories
from support.fuzzing import Fuzzing

HISTORIES = int(os.environ.get("SOMA_FUZZED_HISTORIES", "150"))

pytestmark = pytest.mark.slow


def test_no_history_is_a_500_or_tells_or_feels_anything_of_another_tenant(fuzzing: Fuzzing) -> None:
    before = fuzzing.services.sent[CHAT]
    histories(fuzzing, HISTORIES)()
    print(
        "requests",
        fuzzing.services.sent[CHAT] - before,
        fuzzing.services.sent.total(),
        fuzzing.services.sent.most_common(5),
    )
    # It was no test of adapters if there were none.
    assert len({key.tenant for key in fuzzing.services.services.adapter_store.owners.values()}) > 20
