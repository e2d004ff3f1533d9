"""Measure this machine, plan a replay for it, and say both before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from soma_vllm import machine
from soma_vllm.config import Config
from soma_vllm.engines.arithmetic import settle
from soma_vllm.engines.memory import GB, read_object, weights_bytes
from soma_vllm.models.hub import folder_here
from soma_vllm.tools.replay.dialogues import Script
from soma_vllm.tools.replay.plan import Machine, Plan, make_plan
from soma_vllm.tools.replay.replay_view import duration
from soma_vllm.tools.replay.speed import ARITHMETIC, Speed, measured

_BF16_BYTES = 2
"""Per weight."""


def fitted(
    script: Script, config: Config, first: Sequence[str], budget_s: float, say: Callable[[str], None]
) -> Plan | None:
    """A plan for this machine, told through `say`; None where there is nothing to base one on."""
    say(f"machine    {machine.describe()}; measuring it")
    speed = measured()
    here = None if speed is None else machine_of(config, speed)
    if speed is None or here is None:
        say("plan       none: nothing could be measured, or the models are elsewhere; all dialogues, in time")
        return None
    plan = make_plan(
        script.dialogues,
        config,
        here,
        budget_s=budget_s,
        first=first,
        forced=sorted(script.forced),
        lanes=script.concurrency,
        think_s=script.think_s,
    )
    for line in told(plan, config, speed, here):
        say(line)
    return plan


def planned(script: Script, plan: Plan) -> Script:
    """The script as it is planned; what there may be no time for comes last."""
    spare = {name: script.dialogues[name] for name in plan.left_out}
    return replace(
        script,
        dialogues={**plan.dialogues, **spare},
        spare=frozenset(spare),
        max_tokens=plan.max_tokens,
        concurrency=plan.lanes,
    )


def machine_of(config: Config, speed: Speed) -> Machine | None:
    """What an estimate needs to know, every `dtype: auto` decided as the server decides it; None where a model
    is not in a folder of this machine."""
    if config.original.url is not None or config.original_model is None or config.surrogate_model is None:
        return None
    if "cuda" in (config.original.device, config.surrogate.device, config.training.device):
        return None  # a core's products say nothing about a GPU's
    original, surrogate = folder_here(config.original_model), folder_here(config.surrogate_model)
    if original is None or surrogate is None:
        return None
    settled, _ = settle(config, original, surrogate)
    return Machine(
        product=speed.engines_product(settled.original.dtype),
        trainer=speed.products["float32" if settled.training.dtype == "float32" else "bfloat16"],
        import_s=speed.import_s,
        original=weights(original),
        surrogate=weights(surrogate),
        surrogate_layers=_layers(surrogate),
    )


def told(plan: Plan, config: Config, speed: Speed, here: Machine) -> list[str]:
    """The machine and the plan, in lines for people."""
    names = ARITHMETIC[here.product.arithmetic], ARITHMETIC[here.trainer.arithmetic]
    pair = f"{config.original_model} over {config.surrogate_model}, {names[0]}; trainers {names[1]}"
    played = f"{len(plan.dialogues)} dialogues, {plan.lanes} at once: {duration(plan.total_s)}"
    lines = [
        f"machine    one core: {speed.told()}",
        f"plan       {pair}",
        f"plan       {played}, the first switched turn after {duration(plan.first_switch_s)}",
    ]
    if plan.notes:
        lines.append(f"plan       made smaller for this machine: {'; '.join(plan.notes)}")
    return lines


def weights(folder: Path) -> float:
    """10^9 weights of a model's folder, by the size of its files."""
    return weights_bytes(folder, "bfloat16") / _BF16_BYTES / GB


def _layers(folder: Path) -> int:
    return int(read_object(folder / "config.json").get("num_hidden_layers") or 24)
