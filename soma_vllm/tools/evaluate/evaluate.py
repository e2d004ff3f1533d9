"""`soma evaluate`: what each way to serve a dialogue would have come to, on turns after the warm start.

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
from soma_vllm.machine import training_dtype
from soma_vllm.tools.evaluate.dataset import split_short
from soma_vllm.tools.evaluate.evaluate_view import Steps, table
from soma_vllm.tools.evaluate.original_answers import played_for
from soma_vllm.tools.evaluate.trajectory import Trajectory
from soma_vllm.tools.evaluate.variants import Variant, choose
from soma_vllm.tools.replay.dialogues import load_dialogues
from soma_vllm.types import CONFIG

REPORT = "evaluation.json"


@dataclass(frozen=True)
class Plan:
    """What to evaluate."""

    config: Config
    dialogues: Mapping[str, Sequence[str]]
    """Those long enough."""
    skipped: tuple[str, ...]
    """A line about each of the others."""
    variants: tuple[Variant, ...]
    source: str
    """The dialogues' file name."""
    generates: bool
    at_once: int
    """Dialogues played to the original at the same time."""


@dataclass(frozen=True)
class Folders:
    """Where the measuring models lie."""

    surrogate: Path
    encoder: Path


def evaluate(
    config: Annotated[Path, typer.Option(help="Configuration: the pair, the prefix, the training.")],
    dialogues: Annotated[Path, typer.Option(help='JSON file {"id": ["user turn 1", ...]}.')],
    out: Annotated[Path, typer.Option(help="Directory for evaluation.json and the figures.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the configuration; repeatable.")
    ] = None,
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
    plan = _planned(
        config, dialogues, overrides or [], variant or [], init, only or [], no_generate, concurrency
    )
    for line in plan.skipped:
        console.print(f"skipped    {line}", style="yellow", markup=False, highlight=False)
    try:
        document = _run(plan, out, Steps(console))
    except SomaError as error:
        typer.echo(f"soma evaluate: {error}", err=True)
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(f"interrupted; sessions measured so far are in {out / REPORT}", err=True)
        raise typer.Exit(130) from None
    console.print(table(document))
    console.print(f"report     {out / REPORT}", markup=False, highlight=False)


def _planned(
    path: Path,
    dialogues: Path,
    overrides: Sequence[str],
    names: Sequence[str],
    init: Path | None,
    only: Sequence[str],
    no_generate: bool,
    concurrency: int | None,
) -> Plan:
    """Read everything, or exit with 2 after printing all that is wrong."""
    problems: list[str] = []
    config, found = None, None
    try:
        config = load_config(path, overrides).for_serving(str(path))
        if init is not None:
            config = config.model_copy(update={"lora": config.lora.model_copy(update={"init_from": str(init)})})
    except ConfigError as error:
        problems.append(str(error))
    try:
        found = load_dialogues(dialogues)
    except ConfigError as error:
        problems.append(str(error))
    start = None if config is None else config.lora.init_from
    if start is not None and not (Path(start) / CONFIG).is_file():
        problems.append(f"--init {start}: found no {CONFIG} there; expected an adapter's directory")
    variants: tuple[Variant, ...] = ()
    if config is not None:
        try:
            variants = choose(names, config)
        except ConfigError as error:
            problems.append(str(error))
    enough: Mapping[str, Sequence[str]] = {}
    skipped: list[str] = []
    if found is not None and config is not None:
        unknown = [name for name in only if name not in found]
        problems += [f"--only {name}: no such dialogue; expected one of {', '.join(found)}" for name in unknown]
        enough, skipped = split_short({n: t for n, t in found.items() if not only or n in only}, config)
        if not enough and not unknown:
            problems.append(str(ConfigError(str(dialogues), skipped)))
    if problems or config is None:
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(2)
    at_once = concurrency or config.original.max_num_seqs
    return Plan(config, enough, tuple(skipped), variants, dialogues.name, not no_generate, at_once)


def _run(plan: Plan, out: Path, steps: Steps) -> dict[str, Any]:
    """Play what has to be played, then measure session by session."""
    from soma_vllm.models.hub import local_path

    config = plan.config
    assert config.surrogate_model is not None, "for_serving has checked"
    folders = Folders(local_path(config.surrogate_model), local_path(config.encoder.model))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SomaError(f"--out {out}: cannot be made: {error.strerror}") from error
    played = asyncio.run(played_for(config, plan.dialogues, plan.at_once, steps.say))
    return _measured(plan, folders, played, out, steps)


def _measured(
    plan: Plan, folders: Folders, played: Mapping[str, Trajectory], out: Path, steps: Steps
) -> dict[str, Any]:
    """Measure every session; the report is on disk after each."""
    from soma_vllm.method.encoder import SentenceEncoder
    from soma_vllm.method.recipe import load_surrogate
    from soma_vllm.models.quiet import quiet
    from soma_vllm.tools.evaluate import evaluation_figures
    from soma_vllm.tools.evaluate.evaluation_report import report, settings, write
    from soma_vllm.tools.evaluate.harness import Bench, SessionResult

    config, training = plan.config, plan.config.training
    steps.say(f"loading the surrogate {config.surrogate_model} and the encoder {config.encoder.model}")
    dtype = training_dtype(training.dtype, training.device)
    with quiet():
        encoder = SentenceEncoder(folders.encoder, config.gate.encoder_max_tokens, config.encoder.threads)
        surrogate = load_surrogate(folders.surrogate, dtype, training.device, training.threads)
    bench = Bench(config, surrogate, encoder.encode, plan.generates)
    results: dict[str, SessionResult] = {}
    skipped = list(plan.skipped)

    def so_far() -> dict[str, Any]:
        facts = settings(config, {name: plan.dialogues[name] for name in results}, skipped, plan.source)
        return report(results, plan.variants, facts | {"generated": plan.generates})

    with steps.counting(len(played) * len(plan.variants)):
        for name, trajectory in played.items():
            try:
                results[name] = bench.measure(trajectory, plan.variants, partial(steps.step, name))
            except TrainingError as error:
                skipped.append(f"{name}: {error}")
                steps.say(f"skipped    {name}: {error}")
                continue
            write(out / REPORT, so_far())
    if not results:
        raise TrainingError("no session could be measured; expected at least one")
    document = so_far()
    write(out / REPORT, document)
    for path in evaluation_figures.draw(document, out):
        steps.say(f"figure     {path}")
    return document
