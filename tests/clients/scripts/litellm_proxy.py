"""LiteLLM's proxy in front, asked by OpenAI's client: one dialogue known by its transcript, one by a header."""

import json
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from openai import OpenAI
from play import BASE_URL, KEY, MAX_TOKENS, play

MASTER = f"sk-{secrets.token_hex(16)}"
CONFIG = {
    "model_list": [
        {
            "model_name": "soma",
            "litellm_params": {"model": "openai/soma", "api_base": BASE_URL, "api_key": KEY},
        }
    ],
    "general_settings": {"forward_client_headers_to_llm_api": True, "master_key": MASTER},
}
START_S = 300.0
NAMED = {"X-Session-ID": "named-room"}

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
Path("proxy.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML
client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=MASTER, max_retries=0)
dialogues = {"": [], "Ben asks: ": []}


def ready() -> bool:
    """Whether the proxy answers."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def ask(whose, question):
    messages = dialogues[whose]
    messages.append({"role": "user", "content": whose + question})
    raw = client.chat.completions.with_raw_response.create(
        model="soma",
        messages=messages,
        max_tokens=MAX_TOKENS,
        temperature=0,
        extra_headers=NAMED if whose else {},
    )
    session = raw.headers["llm_provider-x-soma-session"]
    assert not whose or session == NAMED["X-Session-ID"], f"the header has not arrived: {session}"
    messages.append({"role": "assistant", "content": raw.parse().choices[0].message.content})
    return messages[-1]["content"]


command = [str(Path(sys.executable).with_name("litellm")), "--config", "proxy.yaml"]
with subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)]) as proxy:
    try:
        deadline = time.monotonic() + START_S
        while not ready():
            if proxy.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the proxy has not come up")
            time.sleep(0.2)
        play(lambda question: {"text": "\n".join(ask(whose, question) for whose in dialogues)})
    finally:
        proxy.terminate()
