"""One run of the study: servers started, blocks played, measured and kept, the document made.

Guarantees: a server started here is stopped here, whatever happens; a server is started only for what is not
kept already; nothing is reported unless everything that was planned happened.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from soma_vllm.config import Config, load_config
from soma_vllm.errors import EngineUnavailable
from study import arms, kept
from study.capacity import next_rate
from study.checks import graded
from study.client import Played
from study.cost import Counting
from study.kept import Kept
from study.meter import machine
from study.overhead import overhead, plain_server
from study.plan import Block, quicker
from study.planned import Stage, Study
from study.report import OURS, Also, IncompleteRun, Measured, check, report
from study.server import Say, Server, served

if TYPE_CHECKING:
    from soma_vllm.method.gap.gap_judge import GapJudge

SECONDS = {
    "busy": "of engines core-seconds with a request running, counting all cores of the engine",
    "cpu": "of engines processor seconds",
}


async def run(study: Study, say: Say) -> dict[str, Any]:
    """Play everything that is not kept, and the document.

    Raises:
        EngineUnavailable: a server did not start, or died.
        IncompleteRun: what was planned did not all happen.
    """
    options = study.options
    facts = settings(study)
    player = Player(study, Kept(options.keep), say)
    for stage in study.stages:
        await player.stage(stage)
    check(player.measured, study.blocks)
    found = await player.overheads() if options.overhead_rounds else None
    also = Also(3600.0 / options.arrival, player.rungs, player.drift, study.changes)
    gaps = judge(study.config).gaps
    return report(player.measured, study.config, study.tariffs, study.targets, gaps, found, facts, also)


class Player:
    """Plays stages, block by block, and keeps each."""

    def __init__(self, study: Study, store: Kept, say: Say) -> None:
        self.measured: list[Measured] = []
        self.rungs: dict[str, list[tuple[float, Measured]]] = {}
        self.drift: dict[str, list[Measured]] = {}
        self._study = study
        self._kept = store
        self._say = say
        self._done = 0

    async def stage(self, stage: Stage) -> None:
        """Play what one server is for."""
        async with AsyncExitStack() as stack:
            server = Server(self._study, stage, stack, self._say, self._told)
            for planned in stage.blocks:
                block = self._drawn(planned)
                self.measured.append(await self._play(block, server))
            for block in stage.ladders:
                await self._ladder(block, server)
            for block in stage.drift:
                self.drift.setdefault(block.arm, []).append(await self._play(self._drawn(block), server))

    async def overheads(self) -> dict[str, Any]:
        """What dispatch adds, on a server of its own."""
        study = self._study
        path = study.options.overhead_config
        config = load_config(path).for_serving(str(path))
        rounds = study.options.overhead_rounds, study.options.seed
        key = kept.inputs(
            Block(0, "overhead", ()), {"config": config.model_dump(mode="json"), "rounds": rounds}
        )
        found = self._kept.read(key)
        if found is None:
            async with AsyncExitStack() as stack:
                same = study.options.url and path.resolve() == study.options.config.resolve()
                if same:
                    root = study.options.url.rstrip("/").removesuffix("/v1")
                else:
                    root, _ = await served(stack, path, (), self._say, told_tokens=False)
                found = await overheads(study, root, config, self._say)
            self._kept.write(key, found)
        return found

    def _drawn(self, block: Block) -> Block:
        """A block with who is asked for each turn; the random arm switches as many as `soma` did."""
        warm = self._study.config.warm_window
        switched = [True] * len(block.visits)
        if block.arm == "random":
            repeat = [one for one in self.measured if one.block.repeat == block.repeat]
            ours = next((one for one in repeat if one.block.arm == OURS), None)
            if ours is None:
                raise IncompleteRun(f"random: found no block of {OURS} before it; expected {OURS} among --arms")
            later = [turn for turn in ours.turns if turn.turn > warm]
            share = sum(turn.engine == "surrogate" for turn in later) / max(len(later), 1)
            seed = f"{self._study.options.seed}/random/{block.repeat}"
            switched = arms.drawn(len(block.visits), share, seed)
        visits = tuple(
            replace(visit, policies=arms.policies(block.arm, len(visit.turns), warm, here))
            for visit, here in zip(block.visits, switched, strict=True)
        )
        return replace(block, visits=visits)

    async def _ladder(self, block: Block, server: Server) -> None:
        """Play `--capacity` rungs: raise the arrival rate, or lower it, to enclose the target."""
        targets, base = self._study.targets, 3600.0 / self._study.options.arrival
        own = [t for one in self.measured if one.block.arm == block.arm for t in one.turns]
        strains = {base: targets.strain(own)}
        rungs: list[tuple[float, Measured]] = []
        for number in range(self._study.options.capacity):
            rate = next_rate(strains)
            rung = await self._play(self._drawn(quicker(block, rate / base, f"rung{number}")), server)
            strains[rate] = targets.strain(rung.turns)
            rungs.append((rate, rung))
            self._say(f"{block.arm} at {rate:.0f} sessions an hour: strain {strains[rate]:.2f}")
        self.rungs[block.arm] = rungs

    async def _play(self, block: Block, server: Server) -> Measured:
        study = self._study
        cores = arms.hardware(block.arm, study.config) if not study.options.url else server.cores
        key = kept.inputs(
            block,
            {
                "config": study.config.model_dump(mode="json"),
                "overrides": server.stage.overrides,
                "url": study.options.url,
                "max_tokens": study.options.max_tokens,
                "cores": cores,
                "machine": machine()["processor"],
            },
        )
        document = self._kept.read(key)
        if document is None:
            document = await server.play(block)
            self._kept.write(key, document)
        else:
            self._say(f"block kept: {block.arm}, repeat {block.repeat}")
        sessions, wall_s, reading, idling = kept.played(document, block)
        sessions = await asyncio.to_thread(self._graded, sessions)
        counting = Counting(study.options.seconds == "busy", study.config.training.device == "cuda", cores)
        return Measured.of(block, sessions, wall_s, reading, idling, counting)

    def _graded(self, sessions: Sequence[Played]) -> list[Played]:
        found = []
        for one in sessions:
            checks = self._study.checks.get(one.visit.dialogue, ())
            grades = graded([turn.answer for turn in one.turns], checks) if checks else []
            grades += [None] * (len(one.turns) - len(grades))
            turns = (replace(turn, correct=grade) for turn, grade in zip(one.turns, grades, strict=True))
            found.append(replace(one, turns=tuple(turns)))
        return found

    def _told(self, one: Played) -> None:
        self._done += 1
        last = one.turns[-1]
        who = f"{last.engine} with an adapter" if last.adapter else last.engine
        where = f"{one.visit.session} {one.visit.dialogue} turn {last.turn}"
        self._say(f"{self._done}  {where}: {who}, {last.latency_s:.2f} s")


async def overheads(study: Study, root: str, config: Config, say: Say) -> dict[str, Any]:
    """What dispatch adds, measured at a running soma-serve of `config`."""
    assert config.surrogate_model is not None, "for_serving has checked"
    name = config.surrogate.name or config.surrogate_model.rstrip("/").rsplit("/", 1)[-1].lower()
    say(f"dispatch overhead: starting a vLLM server of {name} without the plugin")
    said: deque[str] = deque(maxlen=30)
    try:
        async with plain_server(config, said.append) as plain:
            found = await overhead(root, plain, name, study.options.overhead_rounds, study.options.seed)
    except EngineUnavailable:
        for line in said:
            say(f"vLLM | {line}")
        raise
    return {"surrogate": name, **found}


def judge(config: Config) -> GapJudge:
    """The gate's own judge of gaps."""
    from soma_vllm.method.encoder import SentenceEncoder
    from soma_vllm.method.gap.gap_judge import open_judge
    from soma_vllm.models.hub import local_path
    from soma_vllm.models.quiet import quiet

    with quiet():
        folder = local_path(config.encoder.model)
        encoder = SentenceEncoder(folder, config.gate.encoder_max_tokens, config.encoder.threads)
    return open_judge(config, encoder)


def settings(study: Study) -> dict[str, Any]:
    """What the numbers rest on; asked before anything starts."""
    options, config = study.options, study.config
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "original": config.original_model or config.original.name,
        "surrogate": config.surrogate_model,
        "config": config.model_dump(mode="json"),
        "dialogues": {
            "source": options.synthetic or options.source,
            "part": options.part if options.workloads else None,
            "turns": {visit.dialogue: len(visit.turns) for block in study.blocks for visit in block.visits},
        },
        "frozen": None if study.frozen is None else study.frozen["test_part"],
        "order": [
            [block.arm for block in study.blocks if block.repeat == repeat]
            for repeat in sorted({block.repeat for block in study.blocks})
        ],
        "hardware": {
            arm: arms.hardware(arm, config) if not options.url else "as the server was started"
            for arm in options.arms
        },
        "tariffs": list(study.tariffs),
        "prices": {name: prices.model_dump() for name, prices in study.tariffs.items()},
        "seconds_are": f"{SECONDS[options.seconds]}, of trainers and server processor seconds",
        **{
            name: getattr(options, name)
            for name in ("arms", "repeats", "sessions", "arrival", "think", "seed", "quick", "overhead_rounds")
        },
        "max_tokens": options.max_tokens,
    }
