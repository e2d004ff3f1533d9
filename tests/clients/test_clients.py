"""Clients of others, unmodified and in their own ways, against both engines under dispatch.

Each dialogue has to be one session and to reach the switch, by whatever the client keeps and sends of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from support.client_scripts import running_script
from support.server import Running

WARM_START = 3
QUESTIONS = (
    "When does the ferry to the island sail?",
    "And on Sundays?",
    "How long does the crossing take in a storm?",
    "May I take a bicycle?",
    "What does that cost for two of us?",
    "Where do we buy the tickets?",
    "Thank you. Say all of it again, in one sentence.",
)


@dataclass(frozen=True)
class Client:
    """One client: what plays its dialogues, and where."""

    script: str
    environment: str | None = None
    """Below `$SOMA_HOME/clients`; none: the environment of the tests, which has OpenAI's client."""
    dialogues: int = 1
    asks_beside: bool = False
    """It asks for titles and the like under the dialogue's own id: branches, beside the line."""


CLIENTS = {
    "openai-chat": Client("openai_chat.py"),
    "openai-async": Client("openai_async.py", dialogues=3),
    "openai-responses": Client("openai_responses.py"),
    "openai-conversations": Client("openai_conversations.py"),
    "pydantic-ai": Client("pydantic_ai_agent.py", "agents"),
    "langchain": Client("langchain_agent.py", "agents"),
    "instructor": Client("instructor_json.py", "instructor"),
    "openai-agents": Client("openai_agents_run.py", "agents"),
    "llama-index": Client("llama_index_chat.py", "llama-index"),
    "litellm": Client("litellm_sdk.py", "litellm"),
    "litellm-proxy": Client("litellm_proxy.py", "litellm", dialogues=2),
    "aider": Client("aider_coder.py", "aider"),
    "open-webui": Client("open_webui.py", asks_beside=True),
    "openai-node": Client("openai_node.mjs", "node"),
    "ai-sdk": Client("ai_sdk.mjs", "node"),
}


def sessions(running: Running, key: str, branches: bool) -> set[str]:
    """Names of the sessions of a key."""
    answer = running.get("/soma/sessions", key)
    answer.raise_for_status()
    found = {one["session"] for one in answer.json()["data"]}
    return found if branches else {name for name in found if "~" not in name}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_dialogue_is_one_session_and_reaches_the_switch(
    name: str, tiny_server: Running, tmp_path: Path
) -> None:
    client, key = CLIENTS[name], f"client-{name}"
    with running_script(client.script, client.environment, tiny_server.root, key, tmp_path) as say:
        answers = [say(question) for question in QUESTIONS[:WARM_START]]
        begun = sessions(tiny_server, key, not client.asks_beside)
        assert len(begun) == client.dialogues
        phases = {tiny_server.until(one, "SWITCHED", "ORIGINAL_ONLY", key=key)["phase"] for one in begun}
        assert phases == {"SWITCHED"}
        answers += [say(question) for question in QUESTIONS[WARM_START:]]

    assert all(answer["text"] for answer in answers)
    assert sessions(tiny_server, key, not client.asks_beside) == begun
    later = len(QUESTIONS) - WARM_START
    for one in begun:
        turns = tiny_server.until(one, "SWITCHED", key=key)["turns"]
        assert [turn["engine"] for turn in turns] == ["original"] * WARM_START + ["surrogate"] * later
    shown = [answer for answer in answers if "session" in answer]
    assert {answer["session"] for answer in shown} <= begun
    assert not shown or shown[-1]["engine"] == "surrogate"
