"""Ratios, the table and the figure, from the document alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from many_adapters.workload import REQUESTS, Effort
from soma_vllm.tools.evaluate.statistics import interval


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


def ours_against_base(rounds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Ours over the base engine: the geometric mean of the rounds' own ratios, and its 95 % interval."""
    told = {}
    for name, values in rounds["ours"].items():
        base = rounds["base"]["throughput" if name.startswith("throughput") else name]
        logs = [math.log(a / b) for a, b in zip(values, base, strict=True)]
        bounds = interval(logs)
        told[name] = {
            "base": statistics.median(base),
            "ours": statistics.median(values),
            "ratio": math.exp(statistics.fmean(logs)),
            "interval": None if bounds is None else [math.exp(bound) for bound in bounds],
        }
    return told


def ours_table(told: dict[str, dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'':20} {'base':>9} {'ours':>9} {'ratio':>7}"]
    for name, found in told.items():
        bounds = found["interval"]
        spread = "" if bounds is None else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]"
        lines.append(f"{name:20} {found['base']:9.2f} {found['ours']:9.2f} {found['ratio']:7.2f}{spread}")
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
