"""Seconds for an adapter, by the project's own recipe (`soma_vllm.method.recipe.adapt`) without Ray around it.

Four recipes: configs/cpu_demo.yaml and configs/default.yaml, mining off and on. One session's warm start of
three turns and one held-out turn, the original's distribution known for each answer. Then one batched step
for k sessions' adapters against k steps one after another, and the share of the time that the GPU works.
`--loop` trains one adapter after another until the budget is over.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Step
from shapes import SHAPES, TARGETS, make_model
from torch import nn

RECIPES = ("configs/cpu_demo.yaml", "configs/default.yaml")


def session(tokenizer: Any, turns: int, answer_tokens: int, seed: int) -> tuple[Any, ...]:
    """Examples of one dialogue: users' turns of the demo, answers of random text of a given length."""
    from soma_vllm.method.rendering import end_of_turn
    from soma_vllm.types import Example, Teacher

    rng = np.random.default_rng(seed)
    dialogues = list(json.loads(Path("dialogues/demo.json").read_text(encoding="utf-8")).values())
    queries = [str(turn) for turn in dialogues[seed % len(dialogues)]]
    known = min(len(tokenizer), 8192)
    messages: list[dict[str, str]] = []
    examples = []
    for number in range(1, turns + 1):
        messages.append({"role": "user", "content": queries[(number - 1) % len(queries)]})
        said = tokenizer.decode(rng.integers(300, known, answer_tokens).tolist())
        said = said.encode("ascii", "ignore").decode().strip() or "Yes."
        ids = tokenizer(said, add_special_tokens=False)["input_ids"][:answer_tokens]
        said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        tokens = (*ids, end_of_turn(tokenizer))
        top = rng.integers(3, known, (len(tokens), 20), dtype=np.int32)
        top[:, 0] = tokens
        chances = np.sort(rng.dirichlet(np.full(20, 0.5), len(tokens)).astype(np.float32) + 1e-6, axis=1)[
            :, ::-1
        ]
        teacher = Teacher(tuple(tokens), top, np.log(chances).astype(np.float32))
        examples.append(Example(number, tuple(messages), said, teacher))
        messages = [*messages, {"role": "assistant", "content": said}]
    return tuple(examples)


def loaded(step: Step, which: str) -> Any:
    """The small model from its folder, as a trainer loads it; the large one is made on the device."""
    from soma_vllm.method.decoder import Decoder
    from soma_vllm.method.recipe import Surrogate, load_surrogate

    dtype = "float32" if step.device == "cpu" else "bfloat16"
    small = load_surrogate(step.models / "small", dtype, step.device, 1)
    if which == "small":
        return small
    model = make_model("tiny-large" if step.tiny else "7b", step.device)
    return Surrogate(Decoder(model.float() if step.device == "cpu" else model), small.tokenizer)


def recipes(step: Step, surrogate: Any, which: str) -> None:
    """A line for each recipe that the time allows."""
    from soma_vllm.config import load_config

    for path in RECIPES:
        for mines in (False, True):
            name = f"{Path(path).stem}, mining {'on' if mines else 'off'}"
            if step.left() < 8:
                step.record(name, left_out=True)
                continue
            with step.part(name):
                config = load_config(path)
                mining = config.mining.model_copy(update={"enabled": mines})
                if step.tiny:
                    mining = mining.model_copy(update={"n_candidates": 1, "iters": 1})
                examples = session(surrogate.tokenizer, 4, 16 if step.tiny else config.max_new_tokens, 1)
                figures = trained(step, surrogate, examples, mining, config.lora)
                step.record(name, model=which, **figures)


def trained(step: Step, surrogate: Any, examples: tuple[Any, ...], mining: Any, lora: Any) -> dict[str, Any]:
    """Train the same adapter up to four times, as the time allows: what the first took, and the others."""
    from soma_vllm.method.recipe import adapt

    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    learnt: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(1 if step.tiny else 4):
            if times and step.left() < 2 * times[-1] + 3:
                break
            step.synchronize()
            began = time.perf_counter()
            out = Path(folder) / str(repeat)
            learnt = adapt(surrogate, examples[:3], examples[3:], mining, lora, repeat, out)
            step.synchronize()
            times.append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in (Path(folder) / "0").glob("*.safetensors"))
    return {
        "first_s": times[0],
        "then_s": median(times[1:] or times),
        "mining_s": learnt.mining_s,
        "finetune_s": learnt.finetune_s,
        "scoring_s": learnt.scoring_s,
        "steps_taken": len(learnt.losses),
        "losses": [learnt.losses[0], learnt.losses[-1]],
        "tflop": learnt.flops / 1e12,
        "tokens": [len(turn.teacher.tokens) for turn in examples],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if step.device == "cuda" else None,
        "adapter_mb": size / 1e6,
    }


def unmined(step: Step, surrogate: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """(mining, switched off; LoRA; examples) of the first recipe."""
    from soma_vllm.config import load_config

    config = load_config(RECIPES[0])
    examples = session(surrogate.tokenizer, 4, 16 if step.tiny else config.max_new_tokens, 1)
    return config.mining.model_copy(update={"enabled": False}), config.lora, examples


def launch_gaps(step: Step, surrogate: Any) -> None:
    """The share of a training in which the GPU works; in the rest it waits for launches."""
    from soma_vllm.method.recipe import adapt

    mining, lora, examples = unmined(step, surrogate)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as folder, torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        learnt = adapt(surrogate, examples[:3], examples[3:], mining, lora, 0, Path(folder) / "a")
        step.synchronize()
        wall = time.perf_counter() - began
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in kernels) / 1e6
    step.record(
        "launch gaps",
        wall_s=wall,
        gpu_busy_s=busy,
        busy_share=busy / wall,
        kernels=len(kernels),
        steps=len(learnt.losses),
    )


class Batched(nn.Module):
    """A linear layer with one LoRA for each row of the batch: k sessions in one pass."""

    def __init__(self, base: nn.Linear, k: int, rank: int) -> None:
        super().__init__()
        self.base = base
        at = {"device": base.weight.device, "dtype": torch.float32}
        self.a = nn.Parameter(torch.randn(k, base.in_features, rank, **at) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(k, rank, base.out_features, **at))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + torch.bmm(torch.bmm(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def batched_step(step: Step, model: Any, k: int, tokens: int, answers: int) -> float:
    """Milliseconds of one training step of k sessions' adapters in all layers. The model is unchanged."""
    parents = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    places = [(parent, name, child) for parent, name, child in parents if name in TARGETS]
    for parent, name, child in places:
        setattr(parent, name, Batched(child, k, 8))
    try:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4)
        ids = torch.randint(300, model.config.vocab_size, (k, tokens), device=step.device)

        def once() -> None:
            optimizer.zero_grad(set_to_none=True)
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, -answers - 1 : -1]
            logits = model.lm_head(hidden).float()
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, -answers:].flatten(), reduction="sum"
            )
            loss.backward()
            optimizer.step()

        return step.microseconds(once, repeats=6, warmup=2) / 1e3
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def sessions_together(step: Step, surrogate: Any, which: str) -> None:
    """What k sessions gain in one pass, for k up to 8."""
    tokens, answers = (64, 16) if step.tiny else (512, 192)
    alone = 0.0
    for k in (1, 2) if step.tiny else (1, 2, 4, 8):
        if step.left() < 4:
            return
        milliseconds = batched_step(step, surrogate.model, k, tokens, answers)
        alone = alone or milliseconds
        step.record(
            "sessions together",
            model=which,
            k=k,
            tokens_each=tokens,
            step_ms=milliseconds,
            gain_over_one_by_one=k * alone / milliseconds,
            tokens_per_s=k * tokens / milliseconds * 1e3,
        )
        if step.device == "cuda":
            torch.cuda.empty_cache()


def train_until_stopped(step: Step, surrogate: Any) -> None:
    """One adapter after another, and a line on stdout after each."""
    from soma_vllm.method.recipe import adapt

    mining, lora, examples = unmined(step, surrogate)
    while step.left() > 0:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            adapt(surrogate, examples[:3], examples[3:], mining, lora, 0, Path(folder) / "a")
            print(f"adapter {time.perf_counter() - began:.3f}", flush=True)


def main() -> None:
    step = Step("training", which=("small", "large"), loop=False)
    which = step.options.which
    began = step.seconds()
    surrogate = loaded(step, which)
    shape = {"small": "tiny" if step.tiny else "0.5b", "large": "tiny-large" if step.tiny else "7b"}[which]
    step.record("loaded", model=which, shape=SHAPES[shape], seconds=step.seconds() - began)
    if step.options.loop:
        train_until_stopped(step, surrogate)
        return
    recipes(step, surrogate, which)
    with step.part("sessions together"):
        sessions_together(step, surrogate, which)
    if step.device == "cuda" and step.left() > 5:
        with step.part("launch gaps"):
            launch_gaps(step, surrogate)


if __name__ == "__main__":
    main()
