"""What one session's adapter costs: the straightforward training against ours, trick by trick, in one run.

Every rung of the ladder trains on the same warm turns for the same number of passes over them, on the same
core, and is scored on the same later turns, so that a saving that costs fidelity shows. Seconds are processor
seconds of one thread, which other work on the machine does not change much. The straightforward
rung is what one writes first: float32, turn after turn, `labels` masked, logits at every position, LoRA in
every layer. Rungs take turns session by session (a slow moment hits all). From the third rung on they compute
in what `training.dtype: auto` means on this machine; the last one repeats the whole recipe in the other type.

The original's answers come from `soma evaluate`'s trajectories and are played to it where they are not on disk.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/adapter_cost.py --config configs/cpu_demo.yaml \
        --dialogues dialogues/demo.json --only house-style [--passes 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from soma_vllm.config import Config, Lora, Mining, load_config
from soma_vllm.machine import describe, training_dtype
from soma_vllm.method.finetune import attached, train
from soma_vllm.method.losses import token_nll
from soma_vllm.method.mining import mine
from soma_vllm.method.recipe import Surrogate, load_surrogate, rendered
from soma_vllm.method.rendering import Rendered
from soma_vllm.method.scoring import pooled, score_turns
from soma_vllm.models.hub import local_path
from soma_vllm.models.quiet import quiet
from soma_vllm.tools.evaluate.dataset import Material, material
from soma_vllm.tools.evaluate.statistics import interval
from soma_vllm.tools.evaluate.trajectory import load_trajectories
from soma_vllm.tools.replay.dialogues import load_dialogues


@dataclass(frozen=True)
class Rung:
    """One way to train, and what is new in it."""

    name: str
    dtype: str
    fit: Callable[[Surrogate, Sequence[Rendered], Lora], None]
    top_layers: int | None = None
    objective: str = "nll"


@dataclass(frozen=True)
class Result:
    """One rung on one session."""

    seconds: float
    later_nll: float
    later_top1: float


def straightforward(surrogate: Surrogate, learnt: Sequence[Rendered], lora: Lora) -> None:
    """Turn by turn, logits at every position, the loss by `labels`."""
    for_all_passes(
        surrogate,
        learnt,
        lora,
        lambda turn: (
            surrogate.model(
                input_ids=torch.tensor([turn.prompt + turn.answer]),
                labels=torch.tensor([[-100] * len(turn.prompt) + list(turn.answer)]),
                use_cache=False,
            ).loss
            * len(turn.answer)
        ),
    )


def answers_only(surrogate: Surrogate, learnt: Sequence[Rendered], lora: Lora) -> None:
    """Turn by turn, logits at the answer's positions alone."""

    def loss(turn: Rendered) -> torch.Tensor:
        decoder = surrogate.decoder
        final = decoder.run(decoder.embed(torch.tensor([turn.inputs])))[0, len(turn.prompt) - 1 :]
        return token_nll(decoder.logits(final), torch.tensor(turn.answer)).sum()

    for_all_passes(surrogate, learnt, lora, loss)


def for_all_passes(
    surrogate: Surrogate, learnt: Sequence[Rendered], lora: Lora, loss: Callable[[Rendered], Any]
) -> None:
    """One optimiser step a pass, gradients gathered turn by turn."""
    parameters = [parameter for parameter in surrogate.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lora.lr, weight_decay=lora.weight_decay)
    tokens = sum(len(turn.answer) for turn in learnt)
    for _ in range(lora.steps):
        optimizer.zero_grad(set_to_none=True)
        for turn in learnt:
            (loss(turn) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, lora.grad_clip)
        optimizer.step()


def ours(surrogate: Surrogate, learnt: Sequence[Rendered], lora: Lora) -> None:
    """The package's own training: packed, above a cached trunk."""
    train(surrogate.decoder, learnt, (), dict.fromkeys((turn.turn for turn in learnt), 1.0), lora, 0)


OWN = training_dtype("auto", "cpu")
OTHER = "bfloat16" if OWN == "float32" else "float32"
LADDER = (
    Rung("straightforward, float32", "float32", straightforward),
    Rung("+ logits at answers only", "float32", answers_only),
    Rung(f"+ this machine's type, {OWN}", OWN, answers_only),
    Rung("+ turns packed into one sequence", OWN, ours),
    Rung("+ upper 8 layers, trunk cached", OWN, ours, top_layers=8),
    Rung("+ distillation", OWN, ours, top_layers=8, objective="kd"),
)
SAME_IN_OTHER = Rung(f"the last, in {OTHER}", OTHER, ours, top_layers=8, objective="kd")


def climb(
    surrogates: dict[str, Surrogate], found: Material, config: Config, passes: int, ladder: Sequence[Rung]
) -> list[Result]:
    """Every rung on one session, and first of all the plain surrogate in its place 0."""
    results = []
    for rung in (*ladder, SAME_IN_OTHER):
        surrogate = surrogates[rung.dtype]
        learnt = rendered(surrogate, (*found.examples, *found.held_out))
        later = rendered(surrogates[OWN], found.later)
        lora = config.lora.model_copy(
            update={
                "top_layers": rung.top_layers,
                "objective": rung.objective,
                "steps": passes,
                "checkpoints": (),
                "batch_size": None,
                "dropout": 0.0,
            }
        )
        with attached(surrogate.decoder, lora, 0):
            began = time.process_time()
            rung.fit(surrogate, learnt, lora)
            seconds = time.process_time() - began
            scores = pooled(score_turns(surrogate.decoder, later))
        results.append(Result(seconds, scores.nll, scores.top1))
        print(
            f"    {rung.name:36} {seconds:8.1f} s   later NLL {scores.nll:.3f}   top-1 {scores.top1:.3f}",
            flush=True,
        )
    return results


def mining_seconds(surrogate: Surrogate, found: Material, mining: Mining) -> tuple[float, float]:
    """(turn by turn and candidate by candidate, all in one pass): seconds of stage 1 over the warm turns."""
    learnt = rendered(surrogate, found.examples)
    one = mining.model_copy(update={"n_candidates": 1})
    began = time.process_time()
    for candidate in range(mining.n_candidates):
        for turn in learnt:
            mine(surrogate.decoder, surrogate.tokenizer, [turn], one, candidate)
    apart = time.process_time() - began
    began = time.process_time()
    mine(surrogate.decoder, surrogate.tokenizer, learnt, mining, 0)
    return apart, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/cpu_demo.yaml"))
    parser.add_argument("--dialogues", type=Path, default=Path("dialogues/demo.json"))
    parser.add_argument("--only", action="append", help="this dialogue alone; repeatable")
    parser.add_argument("--passes", type=int, default=4, help="passes over the warm turns")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="key=value")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--last", type=int, default=len(LADDER), help="only so many rungs, from the top")
    options = parser.parse_args()
    ladder = LADDER[-max(1, options.last) :]

    config = load_config(options.config, options.overrides).for_serving(str(options.config))
    script = load_dialogues(options.dialogues)
    chosen = {name: turns for name, turns in script.items() if not options.only or name in options.only}
    played = asyncio.run(load_trajectories(config, chosen, config.original.max_num_seqs, print))
    assert config.surrogate_model is not None, "for_serving has checked"
    folder = local_path(config.surrogate_model)
    with quiet():
        surrogates = {
            dtype: load_surrogate(folder, dtype, "cpu", config.training.threads)
            for dtype in ("float32", "bfloat16")
        }
    sessions = {}
    for name, trajectory in played.items():
        found = material(trajectory, config)
        plain = pooled(score_turns(surrogates[OWN].decoder, rendered(surrogates[OWN], found.later)))
        print(
            f"{name}: {len(found.examples) + len(found.held_out)} warm turns, plain later NLL {plain.nll:.3f}"
        )
        sessions[name] = climb(surrogates, found, config, options.passes, ladder)
    whole = len(ladder) == len(LADDER)
    apart, packed = mining_seconds(surrogates[OWN], found, config.mining) if whole else (0.0, 0.0)

    *totals, in_other = (
        sum(results[rung].seconds for results in sessions.values()) for rung in range(len(ladder) + 1)
    )
    print(f"\n{describe()}")
    print(f"\n{'all sessions':40} {'seconds':>8}  {'step':>6}  {'total':>6}")
    for index, rung in enumerate(ladder):
        step = totals[index - 1] / totals[index] if index else 1.0
        print(f"{rung.name:40} {totals[index]:8.1f}  {step:5.2f}x  {totals[0] / totals[index]:5.2f}x")
    paired = [results[-1].seconds / results[-2].seconds for results in sessions.values()]
    bounds = interval([math.log(value) for value in paired])
    spread = "" if bounds is None else f" [{math.exp(bounds[0]):.2f}, {math.exp(bounds[1]):.2f}]"
    print(
        f"the whole recipe in {OTHER}: {in_other:.1f} s, {in_other / totals[-1]:.2f}x{spread} of {OWN}, this "
        "machine's type"
    )
    if whole:
        work = f"{config.mining.n_candidates} candidates x {config.mining.iters} iterations"
        print(
            f"mining, {work}, last session: apart {apart:.1f} s, in one pass {packed:.1f} s, "
            f"{apart / packed:.2f}x; with mining.enabled: auto 0 s"
        )
    if options.json:
        document = {
            "machine": describe(),
            "dtype": OWN,
            "passes": options.passes,
            "rungs": [rung.name for rung in ladder],
            "seconds": totals,
            "ratio": totals[0] / totals[-1],
            "in_other_type": {
                "dtype": OTHER,
                "seconds": in_other,
                "ratio": in_other / totals[-1],
                "log_interval": bounds,
            },
            "sessions": {name: [asdict(result) for result in results] for name, results in sessions.items()},
            "mining_s": {"apart": apart, "together": packed},
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
