"""`soma evaluate`: compares ways to serve a dialogue on the turns after its warm start.

Guarantees: every mistake in the command line, the configuration and the dialogues is reported before anything
starts; the report is written whole after every session, so that an interruption loses one session at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from soma_vllm.config import Config, load_config
from soma_vllm.errors import ConfigError, SomaError, TrainingError
from soma_vllm.tools.command_line import (
    DialogueFile,
    InputProblems,
    Overrides,
    PairConfig,
    make_out,
    say,
    write_json,
)
from soma_vllm.tools.evaluate.dataset import split_by_length
from soma_vllm.tools.evaluate.evaluate_view import Steps, table
from soma_vllm.tools.evaluate.trajectory import Trajectory, load_trajectories
from soma_vllm.tools.evaluate.variants import Variant, choose
from soma_vllm.tools.replay.dialogues import Dialogues, load_dialogues
from soma_vllm.types import CONFIG

REPORT = "evaluation.json"


@dataclass(frozen=True)
class Plan:
    """What to evaluate."""

    config: Config
    dialogues: Dialogues
    """Those that are long enough."""
    skipped: tuple[str, ...]
    """A line about each of the others."""
    variants: tuple[Variant, ...]


def evaluate(
    config: PairConfig,
    dialogues: DialogueFile,
    out: Annotated[Path, typer.Option(help="Directory for evaluation.json and the figures.")],
    overrides: Overrides = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="METHOD@PREFIX to measure, such as kd@anchored; repeatable. Without it: all."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="A pair's adapter, as `soma distill` writes it: adds kd-init.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Measure this dialogue alone; repeatable.")] = None,
    no_generate: Annotated[
        bool,
        typer.Option("--no-generate", help="Skip free-running answers on later turns: no gap, no ROUGE-L."),
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Dialogues played to the original at once. Default: its slots.")
    ] = None,
) -> None:
    """Compare plain and trained surrogates with the original on the turns after the warm start.

    The original is played once and remembered under $SOMA_HOME/trajectories. Exits with 1 when the original or
    a model fails, with 2 on wrong input.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    plan = _prepare(config, dialogues, overrides or [], variant or [], init, only or [], out)
    for line in plan.skipped:
        say(console, f"skipped    {line}", "yellow")
    steps = Steps(console)
    at_once = concurrency or plan.config.original.max_num_seqs
    try:
        _require_models(plan.config)
        played = asyncio.run(load_trajectories(plan.config, plan.dialogues, at_once, steps.say))
        document = _measure(plan, played, not no_generate, dialogues.name, out, steps)
    except SomaError as error:
        typer.echo(f"soma evaluate: {error}", err=True)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(f"interrupted; sessions measured so far are in {out / REPORT}", err=True)
        raise typer.Exit(130) from None
    console.print(table(document))
    say(console, f"report     {out / REPORT}")


def _prepare(
    path: Path,
    dialogues: Path,
    overrides: Sequence[str],
    names: Sequence[str],
    init: Path | None,
    only: Sequence[str],
    out: Path,
) -> Plan:
    """Read everything, or exit with 2 after printing all that is wrong."""
    problems = InputProblems()
    config = problems.attempt(lambda: load_config(path, overrides).for_serving(str(path)))
    found = problems.attempt(lambda: load_dialogues(dialogues))
    variants = None
    if config is not None:
        if init is not None:
            lora = config.lora.model_copy(update={"init_from": str(init)})
            config = config.model_copy(update={"lora": lora})
        start = config.lora.init_from
        if start is not None and not (Path(start) / CONFIG).is_file():
            there = f"found no {CONFIG} there; expected an adapter's directory"
            problems.append(f"--init {start}: {there}")
        variants = problems.attempt(partial(choose, names, config))
    if config is None or found is None:
        problems.exit()
    unknown = [name for name in only if name not in found]
    problems += [f"--only {name}: no such dialogue; expected one of {', '.join(found)}" for name in unknown]
    enough, skipped = split_by_length({n: t for n, t in found.items() if not only or n in only}, config)
    if not enough and not unknown:
        problems.append(str(ConfigError(str(dialogues), skipped)))
    if not problems:
        problems.attempt(partial(make_out, out))
    if problems or variants is None:
        problems.exit()
    return Plan(config, enough, tuple(skipped), variants)


def _require_models(config: Config) -> None:
    """Raises SomaError: a model is not on this machine."""
    from soma_vllm.models.hub import local_path

    for model in (config.surrogate_model, config.encoder.model):
        assert model is not None, "for_serving has checked"
        local_path(model)


def _measure(
    plan: Plan, played: Mapping[str, Trajectory], generates: bool, source: str, out: Path, steps: Steps
) -> dict[str, Any]:
    """Measure every session; the report is on disk after each."""
    from soma_vllm.tools.evaluate.evaluation_report import draw, report, settings
    from soma_vllm.tools.evaluate.harness import Bench, SessionResult

    config = plan.config
    steps.say(f"loading the surrogate {config.surrogate_model} and the encoder {config.encoder.model}")
    bench = Bench(config, generates)
    results: dict[str, SessionResult] = {}
    skipped = list(plan.skipped)

    def write_report() -> dict[str, Any]:
        facts = settings(config, {name: plan.dialogues[name] for name in results}, skipped, source)
        document = report(results, plan.variants, facts | {"generated": generates})
        write_json(out / REPORT, document, allow_nan=False)
        return document

    with steps.counting(len(played) * len(plan.variants)):
        for name, trajectory in played.items():
            try:
                results[name] = bench.measure(trajectory, plan.variants, partial(steps.step, name))
            except TrainingError as error:
                skipped.append(f"{name}: {error}")
                steps.say(f"skipped    {name}: {error}")
                continue
            write_report()
    if not results:
        raise TrainingError("no session could be measured; expected at least one")
    document = write_report()
    for path in draw(document, out):
        steps.say(f"figure     {path}")
    return document
