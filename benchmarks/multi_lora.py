"""What serving many adapters costs on a CPU: vLLM's stock LoRA path and ours, against an engine without LoRA.

Engines on the same model and the same cores answer the same seeded prompts in turns, round by round, so that a
slow moment hits all of them: `base` (LoRA off), `stock` (vLLM's own kernels and loading) and `ours` (the
plugin's kernels, adapters read aside, the scheduler's queue for slots). Only one of them works at any time. A
figure is the median of its rounds, a ratio is against `base` in the same round:

    throughput_N   tokens per second of 16 requests at once over N distinct adapters, all of which have a slot
    prefill_512    prompt tokens per second of one request of 512 tokens under an adapter
    ttft           seconds to the first token of a request of 32 tokens under an adapter that is in a slot
    decode_1       tokens per second of one request alone
    load_stall     the longest pause between two tokens of another request while an adapter is loaded that the
                   engine has never seen, its files dropped from the page cache, over the median pause without
                   loads (median over the loads; the worst one is printed too)
    overflow_wait  16 adapters over 4 slots: the longest wait for a first token, over the fair share of waiting,
                   which is what the last of 16 requests waits where each holds its slot as long as the others

Also printed: seconds to load an adapter (never seen; cached, but in no slot; in a slot) and memory per adapter.
Adapters are random, rank 8, on all projections of all layers: the worst case, since what an adapter leaves
alone costs nothing with our kernels.

    python benchmarks/multi_lora.py [--quick] [--json FILE] [--figure FILE] [--model NAME-OR-DIR] [--cores 0-1]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from soma_vllm.adapters.engine_hook import KERNELS_ENV
from soma_vllm.engines.command import WORKER_EXTENSION
from soma_vllm.models.hub import local_path
from soma_vllm.scheduler.holds import AdapterHolds
from soma_vllm.versions import installed_vllm

MODEL = "qwen2.5-coder-0.5b-instruct"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
REQUESTS = 16
PROMPT = 16
OVERFLOW_SLOTS = 4
ADAPTERS = 64
WAIT_S = 3600.0


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    tokens: int
    """Generated per request in a throughput round."""
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    """Distinct adapters among the requests of a throughput round."""
    loads: int
    """Adapters loaded while another request generates."""


QUICK = Effort(rounds=3, tokens=24, slots=(16,), counts=(1, 4, 16), loads=5)
FULL = Effort(rounds=5, tokens=48, slots=(4, 8, 16), counts=(1, 4, 16, 64), loads=10)


@dataclass
class Heard:
    """When a request was sent and when each of its tokens came, seconds."""

    sent: float
    came: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.came[0] - self.sent

    @property
    def took(self) -> float:
        return self.came[-1] - self.sent

    @property
    def pauses(self) -> list[tuple[float, float]]:
        """(when it ended, seconds) between neighbouring tokens."""
        return [(b, b - a) for a, b in zip(self.came, self.came[1:], strict=False)]


class Arm:
    """One engine."""

    def __init__(self, name: str, slots: int, adapters: Sequence[Path]) -> None:
        self.name = name
        self.slots = slots
        self._adapters = adapters
        self._holds = AdapterHolds(slots, queue_limit=1000, wait_s=WAIT_S) if name == "ours" else None
        self._engine: Any = None
        self._sent = 0
        self.pids: set[int] = set()

    @asynccontextmanager
    async def running(self, model: str, cores: str) -> AsyncIterator[Arm]:
        """The same, with its engine up."""
        from vllm import AsyncEngineArgs, AsyncLLMEngine

        lora: dict[str, Any] = {
            "enable_lora": True,
            "max_loras": self.slots,
            "max_cpu_loras": ADAPTERS,
            "max_lora_rank": RANK,
            "lora_target_modules": list(PROJECTIONS),
        }
        if self.name == "ours":
            lora["worker_extension_cls"] = WORKER_EXTENSION
        os.environ[KERNELS_ENV] = "stock" if self.name == "stock" else "ours"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
        before = _children()
        self._engine = AsyncLLMEngine.from_engine_args(
            AsyncEngineArgs(
                model=model,
                enforce_eager=True,
                max_model_len=2048,
                max_num_seqs=64,
                kv_cache_memory_bytes=1 << 29,
                enable_prefix_caching=False,
                **({} if self.name == "base" else lora),
            )
        )
        self.pids = _children() - before
        try:
            yield self
        finally:
            self._engine.shutdown()

    async def ask(self, prompt: Sequence[int], tokens: int, adapter: int | None = None) -> Heard:
        """One request, through the queue for slots where there is one. The base engine takes no adapter."""
        heard = Heard(time.perf_counter())
        if adapter is None or self._engine is None or self.name == "base":
            await self._generate(prompt, tokens, None, heard)
        elif self._holds is None:
            await self._generate(prompt, tokens, adapter, heard)
        else:
            ticket = await self._holds.hold(str(adapter))
            try:
                await self._generate(prompt, tokens, adapter, heard)
            finally:
                await self._holds.release(ticket)
        return heard

    async def _generate(self, prompt: Sequence[int], tokens: int, adapter: int | None, heard: Heard) -> None:
        from vllm import SamplingParams, TokensPrompt

        self._sent += 1
        outputs = self._engine.generate(
            TokensPrompt(prompt_token_ids=list(prompt)),
            SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0),
            f"{self.name}-{self._sent}",
            lora_request=None if adapter is None else self._lora(adapter),
        )
        async for _ in outputs:
            heard.came.append(time.perf_counter())

    async def load(self, adapter: int) -> float:
        """Seconds to make an adapter servable, as soma-serve (ours) or vLLM's own route (stock) does it."""
        from soma_vllm.engines.vllm_internals import add_adapter

        began = time.perf_counter()
        if self.name == "ours":
            await add_adapter(self._engine, self._lora(adapter))
        else:
            await self._engine.add_lora(self._lora(adapter))
        return time.perf_counter() - began

    async def forget(self, adapter: int) -> None:
        """Take an adapter out of the engine."""
        await self._engine.remove_lora(adapter + 1)

    def memory(self) -> int:
        """Bytes that the engine's processes have resident."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids if psutil.pid_exists(pid))

    def _lora(self, adapter: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{adapter}", adapter + 1, str(self._adapters[adapter]))


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


# -- workload ---------------------------------------------------------------------------------------------


def prompts(seed: int, count: int, tokens: int) -> list[list[int]]:
    """Random token ids: what is said does not matter, that no two prompts share a prefix does."""
    draw = random.Random(seed)
    return [[draw.randrange(1000, 100_000) for _ in range(tokens)] for _ in range(count)]


def write_adapters(folder: Path, model: str, count: int) -> list[Path]:
    """Random adapters on every projection, in PEFT's format."""
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
        "base_model_name_or_path": model,
    }
    made = []
    for number in range(count):
        random_numbers = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (into, out) in widths.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                a = torch.randn(RANK, into, generator=random_numbers) / into**0.5
                b = torch.randn(out, RANK, generator=random_numbers) / 100
                tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
        path = folder / f"adapter-{number}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(described))
        made.append(path)
    return made


def drop_from_page_cache(path: Path) -> None:
    """Make the next reader of an adapter go to the disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# -- measuring --------------------------------------------------------------------------------------------

Figures = dict[str, list[float]]
"""Name of a figure -> its rounds."""


async def one_round(arm: Arm, effort: Effort, seed: int, figures: Figures) -> None:
    """Throughput over each number of adapters, prefill, first token, decode."""
    for count in effort.counts:
        if count > REQUESTS or (count > arm.slots and arm.name != "base"):
            continue
        if arm.name == "base" and count != effort.counts[0]:
            continue
        asked = prompts(seed, REQUESTS, PROMPT)
        began = time.perf_counter()
        await asyncio.gather(*(arm.ask(p, effort.tokens, i % count) for i, p in enumerate(asked)))
        name = "throughput" if arm.name == "base" else f"throughput_{count}"
        figures[name].append(REQUESTS * effort.tokens / (time.perf_counter() - began))
    (long,) = prompts(seed + 1, 1, 512)
    figures["prefill_512"].append(512 / (await arm.ask(long, 1, 0)).ttft)
    firsts = [(await arm.ask(p, 1, 0)).ttft for p in prompts(seed + 2, 4, 32)]
    figures["ttft"].append(statistics.median(firsts))
    (short,) = prompts(seed + 3, 1, PROMPT)
    pauses = [pause for _, pause in (await arm.ask(short, effort.tokens, 0)).pauses]
    figures["decode_1"].append(1 / statistics.median(pauses))


async def overflow(arm: Arm, effort: Effort, seed: int) -> float:
    """Longest wait of 16 requests of 16 adapters over fewer slots, over the fair share of waiting."""
    asked = prompts(seed, REQUESTS, PROMPT)
    began = time.perf_counter()
    heard = await asyncio.gather(*(arm.ask(p, effort.tokens, i) for i, p in enumerate(asked)))
    whole = max(h.came[-1] for h in heard) - began
    fair = whole * (1 - arm.slots / REQUESTS)
    return max(h.ttft for h in heard) / fair


async def load_stalls(arm: Arm, effort: Effort, adapters: Sequence[Path], seed: int) -> dict[str, Any]:
    """What loads do to another request, and how long they take."""
    fresh = range(ADAPTERS - effort.loads, ADAPTERS)
    for number in fresh:
        await arm.forget(number)
        drop_from_page_cache(adapters[number])
    quiet, busy = prompts(seed, 2, PROMPT)
    calm = [pause for _, pause in (await arm.ask(quiet, 60, 0)).pauses]
    usual = statistics.median(calm)
    stream = asyncio.create_task(arm.ask(busy, 60 + 12 * effort.loads, 0))
    await asyncio.sleep(10 * usual)
    windows = []
    for number in fresh:
        began = time.perf_counter()
        seconds = await arm.load(number)
        windows.append((began, began + seconds + 1.5 * usual, seconds))
        await asyncio.sleep(8 * usual)
    heard = await stream
    longest = [
        max((pause for end, pause in heard.pauses if a < end < b + pause), default=usual) for a, b, _ in windows
    ]
    return {
        "load_stall": statistics.median(longest) / usual,
        "load_stall_worst": max(longest) / usual,
        "pause_worst_without_loads": max(calm) / usual,
        "load_cold_s": statistics.median(seconds for *_, seconds in windows),
        "load_in_slot_s": await arm.load(fresh[-1]),
    }


async def load_cached(arm: Arm) -> float:
    """Seconds to put an adapter that the engine has in memory into a slot: the least recently used one."""
    return statistics.median([await arm.load(number) for number in range(arm.slots)])


async def measure(model: str, cores: str, effort: Effort, adapters: Sequence[Path]) -> dict[str, Any]:
    """Everything, by arm."""
    found: dict[str, Any] = {}
    for slots in effort.slots:
        arms = [Arm(name, slots, adapters) for name in ("base", "stock", "ours")]
        async with AsyncExitStack() as stack:
            for arm in arms:
                say(f"starting {arm.name} with {slots} slots")
                await stack.enter_async_context(arm.running(model, cores))
            rounds: dict[str, Figures] = {arm.name: defaultdict(list) for arm in arms}
            for arm in arms:
                if arm.name != "base":
                    for number in range(slots):
                        await arm.load(number)
            for turn in range(effort.rounds + 1):
                for arm in arms[turn % 3 :] + arms[: turn % 3]:
                    if turn == 0:
                        await one_round(arm, replace(effort, tokens=4), 0, defaultdict(list))  # warms up
                    else:
                        await one_round(arm, effort, 100 * turn, rounds[arm.name])
                say(f"round {turn} of {effort.rounds}, {slots} slots")
            loads = {}
            if slots == effort.slots[-1]:
                for arm in arms[1:]:
                    loads[arm.name] = await with_loads(arm, effort, adapters)
        found[str(slots)] = {"rounds": rounds, "loads": loads}
    found["overflow"] = await measure_overflow(model, cores, effort, adapters)
    return found


async def with_loads(arm: Arm, effort: Effort, adapters: Sequence[Path]) -> dict[str, Any]:
    """Load latency, stalls and memory."""
    before = arm.memory()
    grown = range(arm.slots, ADAPTERS - effort.loads)
    for number in grown:
        await arm.load(number)
    per_adapter = (arm.memory() - before) / len(grown)
    cached = await load_cached(arm)
    return {
        **await load_stalls(arm, effort, adapters, 7000),
        "load_cached_s": cached,
        "bytes_per_adapter": per_adapter,
    }


async def measure_overflow(model: str, cores: str, effort: Effort, adapters: Sequence[Path]) -> dict[str, Any]:
    """The longest wait, by arm."""
    waits: dict[str, list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        arms = [Arm(name, OVERFLOW_SLOTS, adapters) for name in ("stock", "ours")]
        for arm in arms:
            say(f"starting {arm.name} with {OVERFLOW_SLOTS} slots")
            await stack.enter_async_context(arm.running(model, cores))
            for number in range(REQUESTS):
                await arm.load(number)
            await arm.ask(prompts(1, 1, PROMPT)[0], 4, 0)
        for turn in range(max(2, effort.rounds - 2)):
            for arm in arms:
                waits[arm.name].append(await overflow(arm, effort, 500 + turn))
    return dict(waits)


# -- telling ----------------------------------------------------------------------------------------------


def ratios(found: dict[str, Any], effort: Effort, arm: str) -> dict[str, float]:
    """One arm against the base engine, by the median of the rounds' own ratios."""
    most = found[str(effort.slots[-1])]
    base, mine = most["rounds"]["base"], most["rounds"][arm]

    def over(name: str, of_base: str) -> float:
        return statistics.median(a / b for a, b in zip(mine[name], base[of_base], strict=True))

    told = {f"throughput_{n}": over(f"throughput_{n}", "throughput") for n in effort.counts if n <= REQUESTS}
    told |= {name: over(name, name) for name in ("prefill_512", "ttft", "decode_1")}
    loads = most["loads"][arm]
    told |= {name: loads[name] for name in ("load_stall", "load_stall_worst", "pause_worst_without_loads")}
    told["overflow_wait"] = statistics.median(found["overflow"][arm])
    return {name: round(value, 3) for name, value in told.items()}


def table(document: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'against the base engine':32} {'stock':>8} {'ours':>8}"]
    for name, value in document["ratios"].items():
        lines.append(f"{name:32} {document['stock_ratios'][name]:8.2f} {value:8.2f}")
    most = document["measured"][str(max(map(int, (k for k in document["measured"] if k != "overflow"))))]
    base = most["rounds"]["base"]
    lines.append("")
    lines += [f"base {name:27} {statistics.median(values):8.2f}" for name, values in base.items()]
    for name in ("load_cold_s", "load_cached_s", "load_in_slot_s", "bytes_per_adapter"):
        stock, ours = (most["loads"][arm][name] for arm in ("stock", "ours"))
        lines.append(f"{name:32} {stock:8.3g} {ours:8.3g}")
    return "\n".join(lines)


def draw(document: dict[str, Any], path: Path) -> None:
    """Throughput by adapters and slots, and what a load does to others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = {"stock": "#c44e52", "ours": "#4c72b0"}
    for slots in document["slots"]:
        rounds = document["measured"][str(slots)]["rounds"]
        base = statistics.median(rounds["base"]["throughput"])
        for arm, colour in colours.items():
            counts = [n for n in document["counts"] if f"throughput_{n}" in rounds[arm]]
            shares = [statistics.median(rounds[arm][f"throughput_{n}"]) / base for n in counts]
            left.plot(counts, shares, "o-", color=colour, alpha=0.4 + 0.6 * slots / max(document["slots"]))
            left.annotate(
                f"{arm}, {slots} slots", (counts[-1], shares[-1]), fontsize=8, ha="right", va="bottom"
            )
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set(xlabel="distinct adapters among 16 requests", ylabel="throughput, share of base", ylim=(0, 1.1))
    left.set_xscale("log", base=2)
    names = ["prefill_512", "ttft", "load_stall", "overflow_wait"]
    for offset, (arm, key) in enumerate((("stock", "stock_ratios"), ("ours", "ratios"))):
        places = [i + 0.4 * offset for i in range(len(names))]
        right.bar(places, [document[key][n] for n in names], 0.38, color=colours[arm], label=arm)
    right.axhline(1.0, color="grey", linewidth=0.8)
    right.set_xticks([i + 0.2 for i in range(len(names))], names)
    right.set_ylabel("against base (log)")
    right.set_yscale("log")
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)


def say(line: str) -> None:
    print(f"[multi_lora] {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 slots only, fewer rounds: minutes")
    parser.add_argument("--model", default=MODEL, help="a local folder or an embedded model's name")
    parser.add_argument("--cores", default=f"0-{(os.cpu_count() or 1) - 1}", help="of every engine")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--figure", type=Path, help="draw them here")
    options = parser.parse_args(arguments)
    os.environ.update(
        VLLM_PLUGINS="soma_engine", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
    )
    effort = QUICK if options.quick else FULL
    model = str(local_path(options.model))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soma-multi-lora-") as folder:
        say(f"writing {ADAPTERS} adapters")
        adapters = write_adapters(Path(folder), model, ADAPTERS)
        found = asyncio.run(measure(model, options.cores, effort, adapters))
    document = {
        "ratios": ratios(found, effort, "ours"),
        "stock_ratios": ratios(found, effort, "stock"),
        "slots": effort.slots,
        "counts": effort.counts,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": options.cores,
            "vllm": installed_vllm(),
            "torch": torch.__version__,
            "model": Path(model).name,
            "rank": RANK,
            "minutes": round((time.monotonic() - began) / 60, 1),
        },
        "measured": found,
    }
    print(table(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw(document, options.figure)


if __name__ == "__main__":
    main(sys.argv[1:])
