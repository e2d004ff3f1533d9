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
alone costs nothing with our kernels. A processor with AVX-512 is measured once more with AVX2 only, in a
process of its own: that takes as long again.

`--ours-only` compares ours with the base engine alone, over 1 and 16 adapters, in minutes: on a processor
without bf16 products vLLM's own LoRA path is too slow for a quick look.

    python benchmarks/multi_lora.py [--quick] [--ours-only] [--json FILE] [--figure FILE] [--model MODEL]
                                    [--cores 0-1]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lowered import once_more
from many_adapters.measuring import measure, measure_ours, say
from many_adapters.telling import draw, ours_against_base, ours_table, ratios, table
from many_adapters.workload import ADAPTERS, FULL, QUICK, RANK, REQUESTS, Effort, write_adapters

from soma_vllm import machine
from soma_vllm.models.hub import local_path
from soma_vllm.tools.evaluate.statistics import LEAST_PAIRS
from soma_vllm.versions import installed_vllm

MODEL = "qwen2.5-coder-0.5b-instruct"


def report_ours(model: str, options: argparse.Namespace, effort: Effort, adapters: Sequence[Path]) -> None:
    """Ours against the base engine alone: rates (of `ttft` seconds), and ratios with their intervals."""
    effort = replace(effort, rounds=max(effort.rounds, LEAST_PAIRS), counts=(1, REQUESTS))
    told = ours_against_base(asyncio.run(measure_ours(model, options.cores, effort, adapters)))
    print(f"{machine.describe()}\n{ours_table(told)}")
    if options.json:
        document = {"machine": machine.describe(), "cores": options.cores, "ours": told}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 slots only, fewer rounds: minutes")
    parser.add_argument("--ours-only", action="store_true", help="leave stock, loads and overflow out")
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
        if options.ours_only:
            report_ours(model, options, effort, adapters)
            return
        found = asyncio.run(measure(model, options.cores, effort, adapters))
    document = {
        "ratios": ratios(found, effort, "ours"),
        "stock_ratios": ratios(found, effort, "stock"),
        "slots": effort.slots,
        "counts": effort.counts,
        "machine": {
            "described": machine.describe(),
            "cores": options.cores,
            "vllm": installed_vllm(),
            "torch": torch.__version__,
            "model": Path(model).name,
            "rank": RANK,
            "minutes": round((time.monotonic() - began) / 60, 1),
        },
        "measured": found,
    }
    print(machine.describe())
    print(table(document))
    same = ["--model", model, "--cores", options.cores, *(["--quick"] if options.quick else [])]
    document["lowered"] = once_more(__file__, same)
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw(document, options.figure)


if __name__ == "__main__":
    main(sys.argv[1:])
