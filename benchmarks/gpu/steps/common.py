"""What every step shares: its arguments, its budget of seconds, its figures and how it takes times.

A figure is one JSON line in `results.jsonl`, written as soon as it is known, so that a step that is stopped
leaves what it found. A part that fails is recorded with its error, and the next part runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch


class Step:
    """One step of a call: `device` is cuda or cpu, `models` a folder, `tiny` means a rehearsal's sizes."""

    def __init__(self, name: str, **options: Any) -> None:
        """Read the command line; `options` are further arguments: a tuple lists choices, a bool is a flag."""
        self.name = name
        self._began = time.monotonic()
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU")
        parser.add_argument("--budget", type=float, default=60.0)
        parser.add_argument("--out", type=Path, default=os.environ.get("OUT", ".gpu/out"))
        parser.add_argument("--models", type=Path, default=os.environ.get("KIT_MODELS", ".gpu/models"))
        for option, default in options.items():
            flag = "--" + option.replace("_", "-")
            if isinstance(default, bool):
                parser.add_argument(flag, action="store_true")
            elif isinstance(default, tuple):
                parser.add_argument(flag, choices=default, default=default[0])
            else:
                parser.add_argument(flag, type=type(default), default=default)
        self.options = parser.parse_args()
        self.device: str = self.options.device
        self.tiny: bool = self.options.tiny
        self.models: Path = self.options.models
        if self.device == "cpu":
            torch.set_num_threads(1)

    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._began

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.options.budget - self.seconds()

    def record(self, what: str, **figures: Any) -> None:
        """Write one line: floats with four significant digits, what JSON does not know as text."""
        line = {"step": self.name, "what": what, "at_s": round(self.seconds(), 2), **_plain(figures)}
        text = json.dumps(line, allow_nan=True)
        print(text, flush=True)
        with (self.options.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A part whose failure ends it alone."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            self.record(what, error=f"{type(error).__name__}: {str(error)[:400]}", where=place)

    def synchronize(self) -> None:
        """Wait for what was launched on the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def microseconds(self, work: Callable[[], Any], repeats: int = 30, warmup: int = 5) -> float:
        """Median time of one call, nothing else queued on the device before and after."""
        if self.tiny:
            repeats, warmup = 3, 1
        for _ in range(warmup):
            work()
        times = []
        for _ in range(repeats):
            self.synchronize()
            began = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return median(times) * 1e6

    def graph_microseconds(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """Median time of one call replayed as a CUDA graph; of a plain call on a CPU."""
        if self.device != "cuda":
            return self.microseconds(work)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return median(times) * 1e3


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def percentiles(values: list[float]) -> dict[str, float]:
    """The median, the 95th and 99th percentiles and the maximum of a non-empty list, and its length."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": ordered[-1], "n": len(ordered)}
