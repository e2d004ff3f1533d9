"""What a replay plays on this machine, so that it ends in the time it is given.

From how fast a core is, how large the models are and what the dialogues say, a `Plan`: in which order, how many
at once, how long answers may be, which dialogues are left out unless there is time after all, and how the
server is configured to do with less. Guarantees: the dialogues that a replay is asked to begin with are always
played, and come first; on a machine that is fast enough nothing is left out and nothing is made smaller; a note
says what is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from soma_vllm import machine
from soma_vllm.config import Config
from soma_vllm.tools.replay.dialogues import Dialogues, Script
from soma_vllm.tools.replay.pace import SURROGATES_SHARE, Expected, makespan
from soma_vllm.tools.replay.probe import ARITHMETIC, Machine, Product, machine_of, measure_speed
from soma_vllm.tools.replay.replay_view import duration

# What a dialogue is made of, for estimates; as seen in the shipped dialogues with the embedded pair.
_CHARACTERS = 4.0
"""In a token of text."""
_TEMPLATE = 12
"""Tokens of a chat template around each message."""
_SYSTEM = 20
"""Tokens of the system message that templates put first."""
_SHORT_ANSWER = 12
"""Tokens of most answers."""
_LONG_ANSWERS = 0.15
"""Share of the answers that are as long as they may be."""

_STEP_COST = 1.15
"""A step of an engine over its products: attention, sampling, Python."""
_TURN_S = 0.25
"""What a turn costs beside both: HTTP, tokenizing, scheduling."""
_CROWD = 1.3
"""The surrogate's core also answers shadow traffic and shares its memory with a trainer."""
_BACKWARD = 2
"""A training step reads its text forwards and as much backwards, per weight."""
_TRAINER_COST = 2.0
"""A training over its products: it yields to the surrogate, judges, writes, loads."""
_IMPORTS = 14.0
"""Starting everything over importing torch: several processes import far more, on two cores."""
_LEAST_START_S = 35.0

ANSWERS = (64, 48, 32, 24)
"""Lengths of answers that a plan may come down to, tokens."""
SHARING_PAYS = 0.7
"""Where a row of a step of four costs less than this share of a step alone, dialogues gain by sharing steps."""
TRAINING_SHARE = 0.25
"""Share of the time that the forced dialogue's training may take before it is made smaller."""
LEAST_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """What is played, and what is expected of it."""

    dialogues: Dialogues
    """In the order in which they begin."""
    left_out: tuple[str, ...]
    """Dialogues for which there will be no time, if all goes as expected."""
    lanes: int
    max_tokens: int
    """Longest answer."""
    overrides: tuple[str, ...]
    """Of the server's configuration, as `--set` takes them."""
    expected: Expected
    start_s: float
    """Until the server answers."""
    first_switch_s: float
    """From the start until a turn was answered by the surrogate."""
    total_s: float
    notes: tuple[str, ...] = ()
    """What is made smaller than configured, for people."""

    def script(self, script: Script) -> Script:
        """The script as planned; dialogues that there may be no time for come last."""
        spare = {name: script.dialogues[name] for name in self.left_out}
        return replace(
            script,
            dialogues={**self.dialogues, **spare},
            spare=frozenset(spare),
            max_tokens=self.max_tokens,
            concurrency=self.lanes,
        )


def fit_to_machine(
    script: Script, config: Config, first: Sequence[str], budget_s: float, say: Callable[[str], None]
) -> Plan | None:
    """Measure this machine, plan for it and report both; None where there is nothing to base a plan on."""
    say(f"machine    {machine.describe()}; measuring it")
    speed = measure_speed()
    here = None if speed is None else machine_of(config, speed)
    if speed is None or here is None:
        say("plan       none: nothing could be measured, or the models are elsewhere; all dialogues, in time")
        return None
    plan = make_plan(script, config, here, budget_s, first)
    names = ARITHMETIC[here.product.arithmetic], ARITHMETIC[here.trainer.arithmetic]
    pair = f"{config.original_model} over {config.surrogate_model}, {names[0]}; trainers {names[1]}"
    played = f"{len(plan.dialogues)} dialogues, {plan.lanes} at once: {duration(plan.total_s)}"
    say(f"machine    one core: {speed.describe()}")
    say(f"plan       {pair}")
    say(f"plan       {played}, the first switched turn after {duration(plan.first_switch_s)}")
    if plan.notes:
        say(f"plan       made smaller for this machine: {'; '.join(plan.notes)}")
    return plan


def make_plan(
    script: Script, config: Config, machine: Machine, budget_s: float, first: Sequence[str] = ()
) -> Plan:
    """Fit a script into `budget_s` seconds, counted from the start of the server.

    Args:
        first: what to begin with, in this order, whatever it costs. Forced dialogues are always played too.
    """
    forced = tuple(sorted(script.forced))
    kept = tuple(dict.fromkeys((*first, *forced)))
    ordered = {name: script.dialogues[name] for name in (*kept, *script.dialogues)}
    at_once = _worthwhile_lanes(script.concurrency, machine.product)
    return _Draft(ordered, config, machine, kept, forced, at_once, script.think_s).fit(budget_s)


def _worthwhile_lanes(lanes: int, product: Product) -> int:
    """Dialogues at once: as many as asked for where steps are shared well, else two, beside a training."""
    shares = product.shared_step_s / 4 < SHARING_PAYS * product.step_s
    return lanes if shares else min(lanes, 2)


@dataclass(frozen=True)
class _Draft:
    """One way to play, which may take too long."""

    dialogues: Dialogues
    config: Config
    machine: Machine
    kept: tuple[str, ...]
    forced: tuple[str, ...]
    lanes: int
    think_s: float
    max_tokens: int = 0
    steps: int = 0
    only_forced_train: bool = False
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def fit(self, budget_s: float) -> Plan:
        """The first draft that is over in time, each a little smaller than the last."""
        draft = replace(self, max_tokens=self.config.max_new_tokens, steps=self.config.lora.steps)
        draft = draft._fit_training(budget_s)
        for length in (length for length in ANSWERS if length < draft.max_tokens):
            if draft.total_s() <= budget_s:
                break
            draft = replace(draft, max_tokens=length)
        if draft.max_tokens < self.config.max_new_tokens:
            draft = draft._note(f"answers of at most {draft.max_tokens} tokens")
        while draft.total_s() > budget_s and len(draft.dialogues) > len(self.kept or (1,)):
            *staying, last = draft.dialogues
            fewer = {name: draft.dialogues[name] for name in staying}
            draft = replace(draft, dialogues=fewer, left_out=(last, *draft.left_out))
        if draft.left_out:
            draft = draft._note(f"{', '.join(draft.left_out)} only if there is time left")
        return draft._plan()

    def _fit_training(self, budget_s: float) -> _Draft:
        """The forced dialogue's training within its share of the time; no other beside it if they are dear."""
        draft, allowed_s = self, TRAINING_SHARE * budget_s
        while draft.training_s() > allowed_s and draft.steps > LEAST_STEPS:
            draft = replace(draft, steps=max(LEAST_STEPS, draft.steps // 2))
        if draft.steps < self.config.lora.steps:
            draft = draft._note(f"adapters of {draft.steps} training steps instead of {self.config.lora.steps}")
        if self.forced and draft.training_s() > allowed_s / 2 and self.config.adaptation.payback != "never":
            only = ", ".join(self.forced)
            draft = replace(draft, only_forced_train=True)._note(f"only {only} trains an adapter")
        return draft

    def _note(self, note: str) -> _Draft:
        return replace(self, notes=(*self.notes, note))

    # -- seconds ----------------------------------------------------------------------------------------

    def start_s(self) -> float:
        """Until the server answers."""
        return max(_LEAST_START_S, _IMPORTS * self.machine.import_s)

    def original_s(self) -> float:
        """A turn of the original's, with the other lanes beside it."""
        return self._turn_s(self.machine.original)

    def surrogate_s(self) -> float:
        """A turn of the surrogate's."""
        return _CROWD * self._turn_s(self.machine.surrogate)

    def training_s(self) -> float:
        """An adapter of one warm start."""
        lora, window = self.config.lora, self.config.warm_window
        upper = 1.0 if lora.top_layers is None else min(1.0, lora.top_layers / self.machine.surrogate_layers)
        names = self.forced or tuple(self.dialogues)
        tokens = max(
            min(lora.max_seq_length, window * self._answer() + sum(map(_tokens, self.dialogues[name][:window])))
            for name in names
        )
        looks = 2 + len([count for count in lora.checkpoints if count <= self.steps])
        passes = (1 - upper) + upper * (looks + (1 + _BACKWARD) * self.steps)
        return _TRAINER_COST * tokens * passes * self.machine.surrogate * self.machine.trainer.token_s

    def total_s(self) -> float:
        """Until the last dialogue is over."""
        return self.start_s() + makespan(map(self._dialogue_s, self.dialogues), self.lanes)

    def first_switch_s(self) -> float:
        """Until the surrogate has answered a turn of the dialogue that gets there first."""
        warm = self.config.warm_window
        soonest = min(
            (self._opening_s(turns) for turns in self.dialogues.values() if len(turns) > warm), default=0.0
        )
        return self.start_s() + soonest + warm * (self.original_s() + self.think_s) + self.surrogate_s()

    def _turn_s(self, weights: float) -> float:
        """A turn after the first: a short query, the answer before it, half a block of the cache again."""
        product = self.machine.product
        asked = [_tokens(turn) for turns in self.dialogues.values() for turn in turns[1:]]
        query = sum(asked) / len(asked) if asked else _TEMPLATE
        prompt = query + self.machine.original_cache_block / 2
        seconds = self.lanes * prompt * product.token_s * weights
        return seconds + self._answer() * _STEP_COST * product.step_of(self.lanes) * weights + _TURN_S

    def _answer(self) -> float:
        """Tokens of an answer, on average."""
        return min(self.max_tokens, _SHORT_ANSWER + _LONG_ANSWERS * self.max_tokens)

    def _opening_s(self, turns: Sequence[str]) -> float:
        """What the first turn takes beyond a later one: its prompt is long, and nothing of it is cached."""
        return self.lanes * (_tokens(turns[0]) + _SYSTEM) * self.machine.product.token_s * self.machine.original

    def _dialogue_s(self, name: str) -> float:
        turns = self.dialogues[name]
        warm = min(len(turns), self.config.warm_window)
        share = 1.0 if name in self.forced else SURROGATES_SHARE
        later = share * self.surrogate_s() + (1 - share) * self.original_s()
        seconds = self._opening_s(turns) + warm * self.original_s() + (len(turns) - warm) * later
        return seconds + self.think_s * len(turns) + (self.training_s() if name in self.forced else 0.0)

    # -- the plan ---------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        original = self.original_s()
        openings = [original + self._opening_s(turns) for turns in self.dialogues.values()]
        opening_s = sum(openings) / len(openings)
        expected = Expected(original, self.surrogate_s(), self.training_s(), opening_s)
        return Plan(
            dialogues=self.dialogues,
            left_out=self.left_out,
            lanes=self.lanes,
            max_tokens=self.max_tokens,
            overrides=self._overrides(),
            expected=expected,
            start_s=self.start_s(),
            first_switch_s=self.first_switch_s(),
            total_s=self.total_s(),
            notes=self.notes,
        )

    def _overrides(self) -> tuple[str, ...]:
        """What the server's configuration is changed by."""
        found = []
        lora, limit = self.config.lora, self.config.adaptation.train_timeout_s
        if self.max_tokens < self.config.max_new_tokens:
            found.append(f"max_new_tokens={self.max_tokens}")
        if self.steps < lora.steps:
            found.append(f"lora.steps={self.steps}")
            if lora.checkpoints:
                within = [count for count in lora.checkpoints if count <= self.steps] or [self.steps]
                found.append(f"lora.checkpoints={within}")
        if self.only_forced_train:
            found.append("adaptation.payback=never")
        if 10 * self.training_s() > limit:
            found.append(f"adaptation.train_timeout_s={10 * self.training_s():.0f}")
        return tuple(found)


def _tokens(text: str) -> float:
    """About how many tokens a message is."""
    return len(text) / _CHARACTERS + _TEMPLATE
