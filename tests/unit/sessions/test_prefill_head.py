"""What the cache is filled with before a session moves is the head of what its next turn will ask."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from soma_vllm.config import Prefix
from soma_vllm.sessions.state.prefix import compress

TEXTS = st.sampled_from(["hello", "a list:\n- one\n- two\n- three", "word " * 60, "1 2 3 4 5 6 7", "", "…"])
MODES = st.sampled_from(get_args(Prefix.model_fields["mode"].annotation))


@settings(max_examples=300, deadline=None)
@given(
    mode=MODES,
    role=st.sampled_from(["user", "system"]),
    words=st.sampled_from([0, 12]),
    step=st.integers(1, 3),
    keep=st.integers(0, 3),
    system=st.booleans(),
    said=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12),
    query=TEXTS,
)
def test_all_but_the_query_itself_is_the_same_whatever_the_query_is(
    mode: Any,
    role: Any,
    words: int,
    step: int,
    keep: int,
    system: bool,
    said: list[tuple[str, str]],
    query: str,
) -> None:
    prefix = Prefix(mode=mode, anchor_role=role, summary_words=words, window_step=step)
    history = [{"role": "system", "content": "be brief"}] if system else []
    for asked, answered in said:
        history += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    filled = compress([*history, {"role": "user", "content": "…"}], prefix, keep)
    following = compress([*history, {"role": "user", "content": query}], prefix, keep)
    assert filled[:-1] == following[:-1]
