"""Make the document that the project keeps of the lines that came back, and a table of it.

The document goes to stdout, the table, in Markdown, to stderr. A line that was cut where a call was stopped is
left out. Calls are numbered in the order of the files.

    python benchmarks/gpu/collect.py RESULTS.jsonl... > docs/results/gpu/DATE-CARD.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def collected(files: list[Path]) -> dict[str, Any]:
    """The card, versions, exit codes by `CALL.STEP` and every other line, with its call."""
    lines: list[dict[str, Any]] = []
    for call, file in enumerate(files, start=1):
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append({"call": call, **json.loads(text)})
            except ValueError:
                continue
    machine = next((line for line in lines if line["what"] == "machine"), {})
    return {
        "card": machine.get("gpu"),
        "packages": machine.get("packages"),
        "ended": {f"{line['call']}.{line['step']}": line["rc"] for line in lines if line["what"] == "ended"},
        "lines": [line for line in lines if line["what"] not in ("machine", "ended")],
    }


def table(document: dict[str, Any]) -> str:
    """A Markdown table of its lines, each cut to a readable length."""
    rows = [("step", "what", "figures"), ("---", "---", "---")]
    for line in document["lines"]:
        figures = {key: value for key, value in line.items() if key not in ("call", "step", "what", "at_s")}
        told = ", ".join(f"{key} {json.dumps(value)}" for key, value in figures.items())
        rows.append((line["step"], line["what"], told[:240]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(files: list[Path]) -> None:
    document = collected(files)
    json.dump(document, sys.stdout, indent=1)
    print(f"\n{document['card']}, torch {(document['packages'] or {}).get('torch')}\n", file=sys.stderr)
    print(table(document), file=sys.stderr)


if __name__ == "__main__":
    main([Path(file) for file in sys.argv[1:]])
