"""`soma calibrate`: the thresholds to use for a target false-accept rate, from what was logged; and
`soma calibrate-router`: the threshold at which `routellm` gives the original a wanted share of the queries.

What a case, a bad outcome and each rate are, and what logs cannot say: `tools/calibrate/thresholds.py`.

Guarantees: everything wrong with the command line and the sources is reported at once and ends with exit code
2; without enough cases for a recommendation the curve is printed all the same and the exit code is 1; nothing
is recommended beyond what the sources can speak for. Routers score queries as `routellm.calibrate_threshold`
does; no query is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from soma_vllm.config import Config, load_config
from soma_vllm.errors import ConfigError, SomaError
from soma_vllm.sessions.state.transcript import text_of
from soma_vllm.tools.calibrate.calibration_report import count_missing, document, draw, limits, table, verdict
from soma_vllm.tools.calibrate.sources import Source, merge, read_file, read_store
from soma_vllm.tools.calibrate.thresholds import Axis, Calibration, Case, Missing, Outcome, calibrate_axis
from soma_vllm.tools.command_line import InputProblems, Overrides, fill_paths, make_out, say, write_json
from soma_vllm.tools.replay.dialogues import load_dialogues

BATCH = 32
"""Queries that a router scores per request: each has `baselines.timeout_s`."""


def calibrate(
    sources: Annotated[
        list[Path] | None, typer.Argument(help="soma_log.json and evaluation.json files, in any mix.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="A server's session database, an SQLAlchemy URL as in storage.url.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="With --storage: this tenant's sessions alone (digest of its API key).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration whose gate.drift_threshold says what is bad.")
    ] = None,
    target: Annotated[float, typer.Option(help="False-accept rate to stay within, between 0 and 1.")] = 0.05,
    bad_gap: Annotated[
        float | None,
        typer.Option(help="A later mean gap above this is bad. Default: the configuration's drift_threshold."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for calibration.json and calibration.png.")
    ] = None,
) -> None:
    """Replay logged decisions of the gate with other thresholds, and print the one to use for a target.

    Exits with 1 when the cases do not suffice for a threshold of the gap; with 2 on wrong input.
    """
    problems = InputProblems()
    if not sources and storage is None:
        problems.append("found no source; expected a soma_log.json, an evaluation.json, or --storage URL")
    if tenant is not None and storage is None:
        problems.append(f"--tenant {tenant}: found no --storage; expected both")
    if not 0 < target < 1:
        problems.append(f"--target: found {target:g}; expected a rate between 0 and 1, such as 0.05")
    if bad_gap is not None and not 0 <= bad_gap <= 2:
        problems.append(f"--bad-gap: found {bad_gap:g}; expected a gap between 0 and 2")
    read = [problems.attempt(partial(read_file, path)) for path in sources or []]
    if storage is not None:
        read.append(problems.attempt(partial(_read_storage, storage, tenant)))
    found = [source for source in read if source is not None]
    if bad_gap is None:
        bad_gap = _known_bad_gap(found, config, problems)
    if out is not None and not problems:
        problems.attempt(partial(make_out, out))
    if problems or bad_gap is None:
        problems.exit()
    every, repeated = merge(found)
    cases = [case for case in every if case.outcome is not Missing.VOID]
    axes = [calibrate_axis(cases, axis, bad_gap, target) for axis in Axis]
    _print(cases, bad_gap, axes, len(every) - len(cases), repeated)
    if out is not None:
        names = [str(path) for path in sources or []] + (["session store"] if storage else [])
        write_json(out / "calibration.json", document(cases, axes, bad_gap, names))
        if drawn := [one for one in axes if one.points]:
            draw(drawn, out / "calibration.png")
    if axes[0].best is None:
        raise typer.Exit(1)


def _read_storage(url: str, tenant: str | None) -> Source:
    return asyncio.run(read_store(fill_paths(url, "--storage", "the folder itself"), tenant))


def _known_bad_gap(sources: Sequence[Source], config: Path | None, problems: InputProblems) -> float | None:
    """The drift threshold of the configuration, or the one that all sources were made with."""
    if config is not None:
        loaded = problems.attempt(partial(load_config, config))
        return None if loaded is None else loaded.gate.drift_threshold
    known = {source.drift_threshold for source in sources if source.drift_threshold is not None}
    if len(known) > 1:
        values = ", ".join(f"{value:g}" for value in sorted(known))
        problems.append(
            f"found drift thresholds {values} in the sources; expected one, or --bad-gap or --config"
        )
    elif not known and not problems:
        problems.append("found no configuration in the sources; expected --bad-gap or --config")
    return next(iter(known), None)


def _print(
    cases: Sequence[Case], bad_gap: float, axes: Sequence[Calibration], void: int, repeated: int
) -> None:
    """What was counted, what was not and why; then each axis."""
    console = Console()
    outcomes = [case.outcome for case in cases if isinstance(case.outcome, Outcome)]
    bad = sum(outcome.is_bad(bad_gap) for outcome in outcomes)
    lines = [
        f"{len(cases)} cases, {len(outcomes)} with an outcome, {bad} of these bad "
        f"(mean later gap above {bad_gap:g})"
    ]
    lines += [f"  {count} left out: {why}" for why, count in count_missing(cases).items()]
    if void:
        lines.append(f"  {void} left out: {Missing.VOID}")
    if repeated:
        lines.append(f"  {repeated} found in two sources, counted once")
    say(console, "\n".join(lines))
    for one in axes:
        say(console, f"\ngate.{one.axis}", style="bold")
        if one.points:
            console.print(table(one))
            for line in limits(one):
                say(console, line)
        else:
            say(console, "no case has this evidence and an outcome: there is no curve")
        say(console, verdict(one), "bold yellow" if one.best is None else "bold green")


def calibrate_router(
    config: Annotated[Path, typer.Option(help="Configuration: baselines.routellm's router and checkpoint.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of queries for the original.")] = 0.5,
    dialogues: Annotated[
        Path | None, typer.Option(help='Queries: a dialogue file, {"id": ["user turn 1", ...]}.')
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Queries: those logged in this database (SQLAlchemy URL).")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Most queries to score, of the latest sessions.")] = 1000,
    overrides: Overrides = None,
) -> None:
    """Print a value for `baselines.routellm.threshold`.

    Exits with 1 when nothing can be scored, with 2 on wrong input.
    """
    problems = InputProblems()
    resolved = problems.attempt(lambda: load_config(config, overrides or []))
    script = None if dialogues is None else problems.attempt(lambda: load_dialogues(dialogues))
    if (dialogues is None) == (storage is None):
        found = "neither" if dialogues is None else "both"
        problems.append(f"found {found} of --dialogues and --storage; expected one")
    if problems or resolved is None:
        problems.exit()
    queries = None if script is None else [query for turns in script.values() for query in turns][:most]
    try:
        asyncio.run(_calibrate_router(resolved, share, queries, storage or "", most))
    except SomaError as error:
        typer.echo(f"soma calibrate-router: {error}", err=True)
        raise typer.Exit(1) from None


async def _calibrate_router(
    config: Config, share: float, queries: list[str] | None, storage: str, most: int
) -> None:
    # Imported late: wrong options are reported within milliseconds.
    from soma_vllm.baselines.policies.routellm import Router, threshold_for

    if queries is None:
        queries = await _logged_queries(fill_paths(storage, "--storage", "the folder itself"), most)
    if not queries:
        raise ConfigError("queries", ["found none whose text was kept; expected at least one"])
    router = Router(config)
    try:
        await router.start()
        scores: list[float] = []
        for start in range(0, len(queries), BATCH):
            scores += await router.scores(queries[start : start + BATCH])
    finally:
        await router.close()
    threshold = threshold_for(scores, share)
    reached = sum(score >= threshold for score in scores) / len(scores)
    typer.echo(f"scored     {len(scores)} queries: win rates {min(scores):.4f} to {max(scores):.4f}")
    typer.echo(f"share      {reached:.3f} of them for the original, {share:g} wanted")
    typer.echo(f"baselines.routellm.threshold: {threshold!r}")


async def _logged_queries(storage: str, most: int) -> list[str]:
    """Queries of the latest sessions in a store."""
    from soma_vllm.sessions.sql.store import reading

    queries: list[str] = []
    async with reading(storage) as store:
        for summary in await store.summaries(None, most):
            for event in await store.events(summary.key):
                messages = (event.text or {}).get("messages") if event.kind == "turn" else None
                if messages and messages[-1].get("role") == "user":
                    queries.append(text_of(messages[-1]))
            if len(queries) >= most:
                break
    return queries[:most]
