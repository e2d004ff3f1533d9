"""`soma calibrate`: the threshold to use for a target false-accept rate, from what was logged.

What a case, a bad outcome and each rate are, and what logs cannot say: `tools/calibrate/thresholds.py`.

Guarantees: everything wrong with the command line and the sources is reported at once and ends with exit code
2; without enough cases for a recommendation the curve is printed all the same and the exit code is 1; nothing
is recommended beyond what the sources can speak for.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from soma_vllm.config import load_config
from soma_vllm.errors import ConfigError
from soma_vllm.models.home import soma_home
from soma_vllm.tools.calibrate.calibration_report import Calibrated, document, left_out, limits, table, verdict
from soma_vllm.tools.calibrate.calibration_sources import Reading, merged, read_file, read_store
from soma_vllm.tools.calibrate.thresholds import Axis, Bad, Case, Outcome, curve, recommend, supported


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
    bad_top1: Annotated[
        float | None, typer.Option(help="A later top-1 below this is bad too, where it was measured.")
    ] = None,
    point: Annotated[
        bool, typer.Option("--point", help="Hold the rate itself to the target, not its upper 95 % bound.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for calibration.json and calibration.png.")
    ] = None,
) -> None:
    """Replay logged decisions of the gate with other thresholds, and print the one to use for a target.

    Exits with 1 when the cases do not suffice for a threshold of the gap; with 2 on wrong input.
    """
    readings, bad = _prepare(sources or [], storage, tenant, config, target, bad_gap, bad_top1)
    cases, repeated = merged(readings)
    found = [_calibrated(cases, axis, bad, target, point) for axis in Axis]
    console = Console()
    _tell(console, cases, bad, _asides(readings, repeated, cases, bad))
    for one in found:
        _tell_axis(console, one, point)
    if out is not None:
        names = [str(path) for path in sources or []] + (["session store"] if storage else [])
        _write(out, document(cases, found, bad, point, names))
        if any(one.points for one in found):
            from soma_vllm.tools.calibrate import calibration_figure  # matplotlib takes a second to load

            calibration_figure.draw([one for one in found if one.points], out / "calibration.png")
    if found[0].advice.point is None:
        raise typer.Exit(1)


def _prepare(
    sources: Sequence[Path],
    storage: str | None,
    tenant: str | None,
    config: Path | None,
    target: float,
    bad_gap: float | None,
    bad_top1: float | None,
) -> tuple[list[Reading], Bad]:
    """Read everything, or exit with 2 after printing all that is wrong."""
    problems: list[str] = []
    if not sources and storage is None:
        problems.append("found no source; expected a soma_log.json, an evaluation.json, or --storage URL")
    if tenant is not None and storage is None:
        problems.append(f"--tenant {tenant}: found no --storage; expected both")
    if not 0 < target < 1:
        problems.append(f"--target: found {target:g}; expected a rate between 0 and 1, such as 0.05")
    if bad_gap is not None and not 0 <= bad_gap <= 2:
        problems.append(f"--bad-gap: found {bad_gap:g}; expected a gap between 0 and 2")
    if bad_top1 is not None and not 0 <= bad_top1 <= 1:
        problems.append(f"--bad-top1: found {bad_top1:g}; expected a share between 0 and 1")

    def attempt(read: Callable[[], Reading]) -> list[Reading]:
        try:
            return [read()]
        except ConfigError as error:
            problems.append(str(error))
            return []

    readings = [reading for path in sources for reading in attempt(lambda path=path: read_file(path))]  # type: ignore[misc]
    if storage is not None:
        readings += attempt(lambda: asyncio.run(read_store(_filled(storage), tenant)))
    known = {reading.drift_threshold for reading in readings} - {None}
    if bad_gap is None and config is not None:
        try:
            known = {load_config(config).gate.drift_threshold}
        except ConfigError as error:
            problems.append(str(error))
    if bad_gap is None and len(known) > 1:
        values = ", ".join(f"{value:g}" for value in sorted(v for v in known if v is not None))
        problems.append(
            f"found drift thresholds {values} in the sources; expected one, or --bad-gap or --config"
        )
    if bad_gap is None and not known and not problems:
        problems.append("found no configuration in the sources; expected --bad-gap or --config")
    if problems:
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(2)
    gap = next(iter(known)) if bad_gap is None else bad_gap
    assert gap is not None, "told above"
    return readings, Bad(gap, bad_top1)


def _filled(url: str) -> str:
    """A URL as in the configuration.

    Raises:
        ConfigError: it names the folder of a run, which only that server knows.
    """
    if "{run_dir}" in url:
        raise ConfigError("--storage", ["found {run_dir}; expected the folder itself"])
    return url.replace("{soma_home}", str(soma_home()))


def _calibrated(cases: Sequence[Case], axis: Axis, bad: Bad, target: float, point: bool) -> Calibrated:
    points = curve(cases, axis, bad)
    in_force = {c.accept_threshold if axis is Axis.GAP else c.min_agreement for c in cases}
    free = sum(case.free and isinstance(case.outcome, Outcome) for case in cases)
    advice = recommend(points, axis, target, point)
    return Calibrated(axis, points, advice, supported(cases, axis), free, tuple(sorted(in_force)))


def _asides(readings: Sequence[Reading], repeated: int, cases: Sequence[Case], bad: Bad) -> list[str]:
    """What did not count, and why."""
    lines = [f"  {count} left out: {why}" for why, count in left_out(cases).items()]
    if void := sum(reading.void for reading in readings):
        lines.append(f"  {void} left out: judged on no gap that is a number")
    if repeated:
        lines.append(f"  {repeated} found in two sources, counted once")
    unmeasured = sum(isinstance(c.outcome, Outcome) and c.outcome.top1 is None for c in cases)
    if bad.top1 is not None and unmeasured:
        lines.append(f"  {unmeasured} have no later top-1 and are judged by their gap alone")
    return lines


def _tell(console: Console, cases: Sequence[Case], bad: Bad, asides: Sequence[str]) -> None:
    outcomes = [case.outcome for case in cases if isinstance(case.outcome, Outcome)]
    wrong = sum(bad(outcome) for outcome in outcomes)
    rule = f"mean later gap above {bad.gap:g}" + (
        f" or top-1 below {bad.top1:g}" if bad.top1 is not None else ""
    )
    _say(console, f"{len(cases)} cases, {len(outcomes)} with an outcome, {wrong} of these bad ({rule})")
    for line in asides:
        _say(console, line)


def _tell_axis(console: Console, found: Calibrated, point: bool) -> None:
    _say(console, f"\ngate.{found.axis}", style="bold")
    if not found.points:
        _say(console, "no case has this evidence and an outcome: there is no curve")
    else:
        console.print(table(found))
        for line in limits(found):
            _say(console, line)
    good = found.advice.point is not None
    _say(console, verdict(found, point), style="bold green" if good else "bold yellow")


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _write(out: Path, content: Mapping[str, Any]) -> None:
    """Write calibration.json whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "calibration.json"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
