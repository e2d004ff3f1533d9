"""Say what is wrong with the lines of a rehearsal; the exit code is 1 where anything is.

Wrong is a step that failed or was left out, a part that recorded an error, a case out of tolerance, and a
server that lost a turn, served no adapter, did not replace its killed original or left processes behind.

    python benchmarks/gpu/rehearsal/judge.py RESULTS.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def wrong(lines: list[Line]) -> list[Line]:
    """The lines that must not be as they are, and one line for each figure that is missing."""
    bad = [line for line in lines if _is_wrong(line)]
    if any(line["step"] == "serve" for line in lines):
        dialogues = [line for line in lines if line["what"] == "dialogue"]
        if not any(line.get("with_adapter") for line in dialogues):
            bad.append({"step": "serve", "found": f"no adapter in {len(dialogues)} dialogues"})
        missing = {"ready", "original restarted", "stopped"} - {line["what"] for line in lines}
        bad += [{"step": "serve", "missing": what} for what in sorted(missing)]
    return bad or ([] if lines else [{"missing": "every line"}])


def _is_wrong(line: Line) -> bool:
    if line.get("error") or line.get("rc", 0) not in (0, None):
        return True
    match line["what"]:
        case "skipped" | "wrong":
            return True
        case "ready":
            return not line["good"]
        case "dialogue":
            return bool(line["failed"]) or line["phase"] != "SWITCHED"
        case "original restarted":
            return line["back_after_s"] is None
        case "stopped":
            return line["rc"] != 0 or bool(line["left"])
    return False


def main(file: Path) -> int:
    """Print the verdict; 1 where something is wrong."""
    texts = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    lines = [json.loads(text) for text in texts]
    bad = wrong(lines)
    ended = [line for line in lines if line["what"] == "ended"]
    seconds = sum(line["seconds"] for line in ended)
    for line in bad:
        print(f"[rehearsal] {json.dumps(line)[:300]}")
    print(f"[rehearsal] {len(ended)} steps, {seconds} s, {len(lines)} lines; wrong: {len(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
