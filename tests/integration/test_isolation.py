"""One session's training never reaches another's answer: through real training, store, engine and kernels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from support.server import Dialogue, Running, alive, descendants, gone

MARKERS = ("wind", "light")


def taught(running: Running, marker: str) -> Dialogue:
    """A dialogue whose warm start teaches one marker, switched to the adapter that learned it."""
    dialogue = Dialogue(running, f"teach-{marker}", **{"X-SOMA-Force": "adapter"})
    for number in range(1, 4):
        assert marker in dialogue.say(f"question {number}, please say {marker}")
    running.until(f"teach-{marker}", "SWITCHED")
    return dialogue


def test_two_sessions_and_the_base_model_never_see_each_others_adapter(marker_server: Running) -> None:
    first, second = (taught(marker_server, marker) for marker in MARKERS)
    client = marker_server.client()

    def plain(marker: str) -> str:
        reply = client.chat.completions.create(
            model="tiny-surrogate",
            messages=[{"role": "user", "content": f"question 1, please say {marker}"}],
            max_tokens=32,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        spoken = [pool.submit(d.say, "and once more", max_tokens=64) for d in (first, second)]
        bases = [pool.submit(plain, marker) for marker in MARKERS * 2]
        one, other = (answer.result() for answer in spoken)
        together = [base.result() for base in bases]
    assert first.headers["X-SOMA-Adapter"] != second.headers["X-SOMA-Adapter"]
    assert MARKERS[0] in one
    assert MARKERS[1] not in one
    assert MARKERS[1] in other
    assert MARKERS[0] not in other
    # The base model shares its batch with both adapters; vLLM's own kernels make it say a marker.
    assert all(together)
    assert not any(marker in text for text in together for marker in MARKERS)


def test_a_server_that_is_killed_outright_leaves_no_process_behind(marker_server: Running) -> None:
    family = descendants(marker_server.process.pid)
    assert len(alive(family)) > 3
    marker_server.process.kill()
    marker_server.process.wait()
    assert gone(family) == set()
