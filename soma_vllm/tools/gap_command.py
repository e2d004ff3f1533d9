"""`soma gap`: how far the two answers of each pair are apart, for people who calibrate the gate.

Guarantees: the gaps are those of a server under the same configuration; every mistake of a file is reported at
once and
ends with exit code 2, before a model is loaded; pairs keep their order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from soma_vllm.config import Config, load_config
from soma_vllm.errors import ConfigError
from soma_vllm.tools.command_line import InputProblems, Overrides, one_line_errors, write_json

if TYPE_CHECKING:
    from soma_vllm.method.gap.gap_judge import GapJudge

Pair = tuple[str, str]


def gap(
    pairs: Annotated[
        Path, typer.Argument(help='JSON lines with the answers "a" and "b"; other keys are ignored.')
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration. Default: the embedded encoder.")] = None,
    overrides: Overrides = None,
) -> None:
    """Tell for each pair of answers its gap, whether it passes the gate's threshold, and which facts differ.

    Exits with 2 on wrong input, with 0 otherwise, whatever passes.
    """
    problems = InputProblems()
    read = read_pairs(pairs, problems)
    settings = Config() if config is None else problems.attempt(lambda: load_config(config, overrides or []))
    if config is None and overrides:
        problems.append("--set: found no --config; expected the file that it overrules")
    if problems or settings is None:
        problems.exit()
    with one_line_errors("soma gap"):
        judge = open_gap_judge(settings)
    found = judged(judge, read, settings.gate.accept_threshold)
    console = Console()
    for number, one in enumerate(found, 1):
        verdict = "passes" if one["passes"] else "refused"
        why = f"  {'; '.join(one['why'])}" if one["why"] else ""
        console.print(
            f"{number:>4}  {one['gap']:.3f}  {verdict}{why}", markup=False, highlight=False, soft_wrap=True
        )
    passed = sum(one["passes"] for one in found)
    threshold = settings.gate.accept_threshold
    console.print(
        f"{passed} of {len(found)} pairs pass at {threshold:g} (gate.gap: {settings.gate.gap})", highlight=False
    )
    if json_file is not None:
        document = {
            "pairs": found,
            "threshold": threshold,
            "judge": settings.gate.gap,
            "encoder": settings.encoder.model,
        }
        write_json(json_file, document)


def open_gap_judge(config: Config) -> GapJudge:
    """The judge of a server under this configuration. Raises ModelError: its encoder is not on this machine."""
    # Imported late: wrong input is reported within milliseconds.
    from soma_vllm.method.encoder import SentenceEncoder
    from soma_vllm.method.gap.gap_judge import open_judge
    from soma_vllm.models.hub import local_path
    from soma_vllm.models.quiet import quiet

    with quiet():
        path = local_path(config.encoder.model)
        encoder = SentenceEncoder(path, config.gate.encoder_max_tokens, config.encoder.threads)
    return open_judge(config, encoder)


def judged(judge: GapJudge, pairs: list[Pair], threshold: float) -> list[dict[str, Any]]:
    """Each pair's gap, the threshold, whether it passes, and why it is apart."""
    return [
        {
            "gap": round(one.value, 4),
            "threshold": threshold,
            "passes": one.failure is None and one.value <= threshold,
            "why": [one.failure] if one.failure is not None else list(one.why),
        }
        for one in judge.gaps(pairs)
    ]


def read_pairs(path: Path, problems: InputProblems) -> list[Pair]:
    """The pairs of a file; what is wrong with it joins the problems, line by line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        problems.append(str(ConfigError(str(path), [f"cannot be read: {error.strerror}"])))
        return []
    except UnicodeDecodeError as error:
        problems.append(
            f"{path}: found bytes that are not UTF-8 at {error.start}; expected JSON lines in UTF-8"
        )
        return []
    pairs: list[Pair] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            problems.append(f"{path}, line {number}: found no JSON; expected an object with the texts a and b")
            continue
        if not isinstance(found, dict):
            kind = type(found).__name__
            problems.append(f"{path}, line {number}: found a {kind}; expected an object with the texts a and b")
            continue
        wrong = [name for name in ("a", "b") if not isinstance(found.get(name), str)]
        for name in wrong:
            told = type(found[name]).__name__ if name in found else "nothing"
            problems.append(f"{path}, line {number}: {name}: found {told}; expected a text")
        if not wrong:
            pairs.append((found["a"], found["b"]))
    if not lines or not (pairs or problems):
        problems.append(f"{path}: found no pair; expected at least one line")
    return pairs
