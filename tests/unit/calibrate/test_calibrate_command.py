"""`soma calibrate` on what the code itself logs: a replay's log, a server's database, an evaluation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from support.services import SETTINGS, Services
from typer.testing import CliRunner

from soma_vllm.api.serializers import event_view
from soma_vllm.cli.main import app
from soma_vllm.config import Config, parse_config
from soma_vllm.errors import ConfigError
from soma_vllm.sessions.sql.records import SessionSnapshot
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.sessions.state.gate import judge
from soma_vllm.tools.calibrate.sources import merge, read_file, read_store
from soma_vllm.tools.calibrate.thresholds import Case, Missing, Outcome
from soma_vllm.tools.command_line import write_json
from soma_vllm.tools.evaluate.evaluation_report import report, settings
from soma_vllm.tools.evaluate.harness import Choice, Numbers, SessionResult
from soma_vllm.tools.evaluate.variants import choose
from soma_vllm.tools.replay.replay import write_log
from soma_vllm.tools.replay.replay_view import SessionRecord
from soma_vllm.types import Agreement, Candidate, Event, Evidence, SessionKey

SECRET = "a private question"
GATE = {
    "min_agreement": 0.4,  # so that the plain surrogate reads the answers too
    **SETTINGS["gate"],
    "audit_rate": 1.0,
    "drift_window": 9,
    "consecutive_to_rollback": 9,
}

Soma = Callable[..., Result]


@pytest.fixture
def soma() -> Soma:
    return lambda *words: CliRunner().invoke(app, ["calibrate", *map(str, words)], env={"COLUMNS": "100"})


def url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder}/s.db"


async def logged(folder: Path) -> Path:
    """A dispatcher's own events of five sessions, in its database and as `soma_log.json`.

    fine: plain serves, three audits agree. poor: plain serves, of two audits one is far off. adapted: plain
    fails, the adapter serves. refused: both fail. quiet: plain serves and answers nothing more.
    """
    store = SessionStore(url(folder))
    await store.open()
    services = Services(parse_config({**SETTINGS, "gate": GATE}, "test"), store)
    await services.registry.start()
    for name, answers, later in (
        ("fine", ["same"], 3),
        ("poor", ["same"], 2),
        ("adapted", ["far off", "same"], 1),
        ("refused", ["far off"], 1),
        ("quiet", ["same"], 0),
    ):
        services.surrogate.answers = ["unused"] * len(services.surrogate.calls) + answers
        history: list[dict[str, Any]] = []
        for number in (1, 2):
            await services.say(history, f"{SECRET} {number}", name)
        await services.settled()
        for number in range(later):
            last = name == "poor" and number == later - 1
            services.surrogate.answers = ["far off" if last else "same"]
            await services.say(history, f"{SECRET} {number + 3}", name)
            await services.settled()
    by_session: dict[str, list[Event]] = {}
    for key, event in services.events:
        by_session.setdefault(key.session, []).append(event)
    records = [
        SessionRecord(name, name, 5, events=tuple(json.loads(json.dumps(event_view(e))) for e in events))
        for name, events in by_session.items()
    ]
    path = folder / "soma_log.json"
    write_log(path, services.config, records)
    await services.background.stop()
    await services.registry.stop()
    await store.close()
    return path


def outcomes(cases: Sequence[Case]) -> Mapping[tuple[str, str], Outcome | Missing]:
    """By the session's bare name and the candidate."""
    return {(c.session.split(": ")[-1].split("/")[-1], c.candidate.value): c.outcome for c in cases}


EXPECTED = {
    ("fine", "plain"): Outcome(0.0, 3),
    ("poor", "plain"): Outcome(0.5, 2),
    ("adapted", "plain"): Missing.OTHER,
    ("adapted", "adapter"): Outcome(0.0, 1),
    ("refused", "plain"): Missing.REFUSED,
    ("refused", "adapter"): Missing.REFUSED,
    ("quiet", "plain"): Missing.UNAUDITED,
}


async def test_a_replays_log_and_the_servers_database_hold_the_same_cases(tmp_path: Path) -> None:
    path = await logged(tmp_path)
    from_log, from_store = read_file(path), await read_store(url(tmp_path))
    for found in (from_log, from_store):
        assert outcomes(found.cases) == EXPECTED
        evidence = {(case.judgement[0], case.candidate): case for case in found.cases}
        assert evidence["fine", Candidate.PLAIN].gap == 0.0
        assert evidence["refused", Candidate.PLAIN].gap == 1.0
        assert evidence["adapted", Candidate.ADAPTER].top1 == 0.8
        assert {case.accept_threshold for case in evidence.values()} == {0.1}
    assert from_log.drift_threshold == 0.3
    cases, repeated = merge([from_log, from_store])
    assert (len(cases), repeated) == (7, 7)


async def test_the_command_prints_the_curve_and_writes_json_and_figure(tmp_path: Path, soma: Soma) -> None:
    path = await logged(tmp_path)
    result = await in_thread(soma, path, "--target", "0.8", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "7 cases, 3 with an outcome, 1 of these bad (mean later gap above 0.3)" in text
    assert "2 left out: the original kept the session" in text
    assert "0.1 is the loosest threshold that logs of served sessions can speak for" in text
    assert "use gate.accept_threshold=0.1: false accepts 1 of 3" in text
    document = json.loads((tmp_path / "out" / "calibration.json").read_text())
    axis = document["accept_threshold"]
    assert (axis["recommended"], axis["supported"]) == (0.1, 0.1)
    last = axis["curve"][-1]
    assert (last["false_accepts"]["count"], last["false_accepts"]["total"]) == (1, 3)
    assert last["false_accepts"]["ci95"] == pytest.approx([0.0615, 0.7923], abs=1e-4)
    assert (last["moved"]["count"], last["moved"]["total"]) == (4, 5)
    assert {p["threshold"] for p in document["min_agreement"]["curve"]} == {0.8, 0.5, 0.4}
    assert sum(document["cases"]["left_out"].values()) == 4
    assert (tmp_path / "out" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert SECRET not in result.output + json.dumps(document)


async def test_too_few_cases_say_how_many_are_needed_and_exit_with_1(tmp_path: Path, soma: Soma) -> None:
    path = await logged(tmp_path)
    result = await in_thread(soma, path, "--bad-gap", "0.9")
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "0 of these bad" in text
    assert "At that rate 73 accepted cases are needed, found 3" in text
    assert "0.1000" in text


async def test_one_tenants_sessions_can_be_calibrated_alone(tmp_path: Path) -> None:
    await logged(tmp_path)
    store = SessionStore(url(tmp_path))
    (tenant,) = {key.tenant for key in await store.keys()}
    fine = next(key for key in await store.keys() if key.session == "fine")
    standing = SessionSnapshot("theirs", "SWITCHED", "c", 1, None)
    await store.append(SessionKey("other", "theirs"), 0, await store.events(fine), standing)
    await store.close()
    assert len((await read_store(url(tmp_path))).cases) == 8
    assert len((await read_store(url(tmp_path), tenant)).cases) == 7
    (one,) = (await read_store(url(tmp_path), "other")).cases
    assert one.session == "other/theirs"
    with pytest.raises(ConfigError, match="found no session of 'nobody'; 2 other tenants"):
        await read_store(url(tmp_path), "nobody")


async def test_turns_that_the_candidate_did_not_answer_are_not_its_outcome(tmp_path: Path) -> None:
    """Outside the locality the original answers; such a turn's audit says nothing of what users were given."""
    store = SessionStore(url(tmp_path))
    await store.open()
    near = {**GATE, "locality_threshold": 0.0}
    services = Services(parse_config({**SETTINGS, "gate": near}, "test"), store)
    await services.registry.start()
    history: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        await services.say(history, f"question {number}")
        await services.settled()
    await services.registry.stop()
    await store.close()
    assert "audited" in services.kinds()
    (one,) = (await read_store(url(tmp_path))).cases
    assert one.outcome is Missing.UNAUDITED


async def test_audits_by_score_measure_no_gap(tmp_path: Path) -> None:
    path = await logged(tmp_path)
    document = json.loads(path.read_text())
    for event in document["sessions"]["fine"]["events"]:
        if event["kind"] == "audited":
            event["data"] |= {"gap": None, "kind": "surprise", "surprise": 0.4}
    path.write_text(json.dumps(document))
    found = outcomes(read_file(path).cases)
    assert found["fine", "plain"] is Missing.SCORED


async def test_a_forced_session_speaks_beyond_the_threshold_in_force(tmp_path: Path) -> None:
    store = SessionStore(url(tmp_path))
    await store.open()
    services = Services(parse_config({**SETTINGS, "gate": GATE}, "test"), store)
    await services.registry.start()
    services.surrogate.answers = ["far off"]
    history: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        await services.say(history, f"question {number}", headers={"x-soma-force": "adapter"})
        await services.settled()
    await services.registry.stop()
    await store.close()
    cases = {case.candidate: case for case in (await read_store(url(tmp_path))).cases}
    forced = cases[Candidate.ADAPTER]
    assert (forced.free, forced.gap, forced.outcome) == (True, 1.0, Outcome(1.0, 1))
    assert cases[Candidate.PLAIN].outcome is Missing.OTHER


def evaluated(path: Path, gap: float | None = 0.25) -> Path:
    """An evaluation of two sessions: plain passes in one, both candidates fail in the other."""
    config = Config(original_model="large", surrogate_model="small")
    variants = choose(["kd@full"], config)
    results = {}
    for name, held_out in (("easy", 0.05), ("hard", 0.4)):
        evidence = [
            Evidence(candidate, (held_out,), (4,), Agreement(1.0, 0.9, 10))
            for candidate in (Candidate.PLAIN, Candidate.ADAPTER)
        ]
        verdict = judge(evidence, config.gate, 1)
        numbers = Numbers(1.0, 0.7, None, gap, None, 10.0, 20, 6)
        choice = Choice(verdict.candidate, None, verdict.reason, verdict.numbers, None)
        results[name] = SessionResult({variant.name: numbers for variant in variants}, choice)
    turns = {name: ["q"] * 10 for name in results}
    write_json(path, report(results, variants, settings(config, turns, [], "dialogues.json")))
    return path


def test_an_evaluation_has_an_outcome_for_every_candidate(tmp_path: Path) -> None:
    found = read_file(evaluated(tmp_path / "evaluation.json"))
    assert found.drift_threshold == 0.3
    assert outcomes(found.cases) == {
        (session, candidate): Outcome(0.25, 6, 0.7)
        for session in ("easy", "hard")
        for candidate in ("plain", "adapter")
    }
    assert all(case.free for case in found.cases)


def test_an_evaluation_without_free_running_answers_has_no_outcomes(tmp_path: Path, soma: Soma) -> None:
    path = evaluated(tmp_path / "evaluation.json", gap=None)
    result = soma(path)
    assert result.exit_code == 1
    assert "4 left out: its later turns were measured without free-running answers" in result.stdout
    assert "there is no curve" in result.stdout


async def test_sources_of_several_kinds_are_pooled(tmp_path: Path, soma: Soma) -> None:
    path = await logged(tmp_path)
    evaluation = evaluated(tmp_path / "evaluation.json")
    result = await in_thread(soma, path, evaluation, "--storage", url(tmp_path))
    assert "11 cases, 7 with an outcome" in result.stdout
    assert "7 found in two sources, counted once" in result.stdout


def test_everything_wrong_is_told_at_once_with_exit_code_2(tmp_path: Path, soma: Soma) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("no JSON")
    log = {"config": {"gate": {"drift_threshold": 0.3}}, "sessions": {"a": {"session": "a", "events": []}}}
    judged = {"kind": "judged", "at": 1.0, "data": {"candidate": "nobody", "numbers": {}, "reason": SECRET * 9}}
    log["sessions"]["a"]["events"] = [judged, {"kind": "audited", "at": 2.0, "data": {"turn": 5}}]
    (tmp_path / "log.json").write_text(json.dumps(log))
    files = [tmp_path / name for name in ("none.json", "list.json", "text.json", "log.json")]
    result = soma(*files, "--storage", url(tmp_path), "--target", "1.5", "--config", tmp_path)
    assert result.exit_code == 2
    for part in (
        "none.json: 1 mistake",
        "cannot be read: No such file",
        "expected a soma_log.json or an evaluation.json",
        "is not JSON",
        "events.0 (judged): candidate: found 'nobody'",
        "events.0 (judged): numbers.accept_threshold: found nothing",
        "events.1 (audited): served_by: found nothing",
        "found no file",
        "--target: found 1.5",
    ):
        assert part in result.stderr
    assert SECRET not in result.stderr
    assert not (tmp_path / "s.db").exists()


def test_without_sources_or_a_yardstick_the_command_says_what_it_expects(tmp_path: Path, soma: Soma) -> None:
    result = soma("--tenant", "t")
    assert result.exit_code == 2
    assert "found no source; expected a soma_log.json" in result.stderr
    assert "--tenant t: found no --storage" in result.stderr


async def test_a_database_alone_needs_a_yardstick(tmp_path: Path, soma: Soma) -> None:
    await logged(tmp_path)
    result = await in_thread(soma, "--storage", url(tmp_path))
    assert result.exit_code == 2
    assert "found no configuration in the sources; expected --bad-gap or --config" in result.stderr
    config = tmp_path / "c.yaml"
    config.write_text("gate: {drift_threshold: 0.6}")
    result = await in_thread(soma, "--storage", url(tmp_path), "--config", config)
    assert "mean later gap above 0.6" in result.stdout


async def test_logs_that_disagree_on_what_is_bad_are_not_pooled_silently(tmp_path: Path, soma: Soma) -> None:
    path = await logged(tmp_path)
    other = tmp_path / "other.json"
    document = json.loads(path.read_text())
    document["config"]["gate"]["drift_threshold"] = 0.5
    other.write_text(json.dumps(document))
    result = await in_thread(soma, path, other)
    assert result.exit_code == 2
    assert "found drift thresholds 0.3, 0.5 in the sources; expected one" in result.stderr
    assert (await in_thread(soma, path, other, "--bad-gap", "0.3")).exit_code == 1


async def in_thread(soma: Soma, *words: object) -> Result:
    """The command has an event loop of its own."""
    return await asyncio.to_thread(soma, *words)
