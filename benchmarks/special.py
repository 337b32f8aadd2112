"""Lines that are not rounds of training steps: collectives, first step, loss curve, GPU."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import largest, loss_curve, reach, scheduling
from benchmarks.checkpoint import compare as checkpoint_times
from benchmarks.first_step import compare as first_step
from benchmarks.gspmd import compare as gspmd
from benchmarks.harness.lines import Line, judged
from benchmarks.harness.measure import Measured
from benchmarks.harness.result import Result, failed
from benchmarks.harness.statistics import HOLDS, MISSES, Estimate
from benchmarks.ladder import run as climb
from benchmarks.ladder.rungs import RUNGS
from benchmarks.memory import compare as memory
from benchmarks.offload import disk as tier

ROOT = Path(__file__).parents[1]
KB, MB = 1 << 10, 1 << 20
BIG, SMALL = 16 * MB, 4 * KB
COLLECTIVES_SECONDS = 600
CURVE_ERROR = 0.01  # of the mean loss of each ten steps

Say = Callable[[str], None]


def first(say: Say, rounds: int) -> Measured:
    """Time to the first step."""
    times = first_step.times(rounds, say)
    line = Line("first-step", "10M GPT, 1 sequence a rank", "ours", ("DDP",), 1.0, "at most")
    return Measured([timed(reach.FIRST, line, times, 1.0, "s")], {"seconds": times})


def checkpoint(say: Say, rounds: int, *, quick: bool) -> Measured:
    """Saving and loading against the disk, memory and torch's DCP."""
    size = (64 if quick else 1024) * MB
    times = checkpoint_times.seconds(size, rounds, say)
    lines = [
        Line("checkpoint-save", "save, over raw writing", "save", ("raw",), 0.8),
        Line("checkpoint-save-dcp", "save, over DCP", "save", ("DCP save",), 1.0),
        Line("checkpoint-stall", "stall, over a copy", "stage", ("copy",), 1.3, "at most"),
        Line("checkpoint-stall-dcp", "stall, over DCP's", "stage", ("DCP stage",), 1.0, "at most"),
        Line("checkpoint-load", "load, over the page cache", "load", ("read",), 0.9),
        Line("checkpoint-load-dcp", "load, over DCP", "load", ("DCP load",), 1.0),
    ]
    results = [timed(reach.CHECKPOINT, line, _as_ours(line, times), 1.0, "s") for line in lines]
    return Measured(results, {"seconds": times})


def _as_ours(line: Line, times: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The times of a line, ours also under that name."""
    return {**{name: times[name] for name in (line.ours, *line.others)}, "ours": times[line.ours]}


def offload(steps: Measured, say: Say, rounds: int, *, quick: bool) -> Measured:
    """Steps with offload, which were measured, and the disk tier's rates over the disk's."""
    (ROOT / ".bench").mkdir(exist_ok=True)
    times = tier.seconds((64 if quick else 512) * MB, rounds, say, ROOT / ".bench")
    lines = [
        Line("offload-put", "disk: written, digests and all", "put", ("raw write",), 0.8),
        Line("offload-fetch", "disk: read and compared", "fetch", ("raw read",), 0.8),
    ]
    rates = [timed(reach.OFFLOAD, line, _as_ours(line, times), 1.0, "s") for line in lines]
    return Measured([*steps.results, *rates], {**steps.raw, "disk": {"seconds": times}})


def ladder(
    say: Say, memory: int, reasons: Mapping[str, str], patience: float, *, quick: bool
) -> Measured:
    """The largest GPT that trains in so many bytes a rank, rung by rung, beside DeepSpeed."""
    told = climb.climbed(
        memory, ROOT / ".bench" / "ladder", say,
        reasons=reasons, patience=0.0 if quick else patience,
    )  # fmt: skip
    results = []
    for rung, ours, theirs in zip(RUNGS, told["ours"], told["deepspeed"], strict=True):
        key = f"ladder-{rung.what.strip('+ ').replace(' ', '-')}".lower()
        what = f"{rung.what}: parameters, over DeepSpeed's"
        if not ours.parameters or not theirs.parameters:
            why = ours.reason if not ours.parameters else f"DeepSpeed: {theirs.reason}"
            results.append(failed(reach.LADDER, key, what, 1.0, "at least", why))
            continue
        ratio = ours.parameters / theirs.parameters
        results.append(
            Result(
                reach.LADDER, key, what, f"{ours.parameters / 1e6:.0f} M",
                f"{theirs.parameters / 1e6:.0f} M", "", Estimate(ratio, ratio, ratio, 1), 1.0,
                "at least", HOLDS if ratio >= 1 else MISSES,
            )
        )  # fmt: skip
    return Measured(results, {"ladder": climb.as_raw(told, memory)})


def curve(say: Say, steps: int) -> Measured:
    """Whether bf16 loses as float32 does."""
    found = loss_curve.curves(steps, say)
    ratios = loss_curve.ratios(found["bf16"], found["float32"])
    # Not a sample but all there is: the interval is the whole range.
    range_ = Estimate(statistics.median(ratios), min(ratios), max(ratios), len(ratios))
    good = max(abs(r - 1) for r in ratios) <= CURVE_ERROR
    ends = {name: f"{losses[0]:.3f} to {losses[-1]:.3f}" for name, losses in found.items()}
    what = f"loss of {steps} steps, means of ten (range, not interval)"
    result = Result(
        reach.BF16, "bf16-loss", what, ends["bf16"], ends["float32"], "", range_, CURVE_ERROR,
        "within", HOLDS if good else MISSES,
    )  # fmt: skip
    return Measured([result], {"losses": found})


def bytes_moved(say: Say) -> Measured:
    """What our compiler and JAX's make of the same annotations, in bytes; nothing is run."""
    found = gspmd.rows()
    results = []
    for row in found:
        say(f"{row['plan']}: {row['ours']:,} bytes, JAX {row['jax']:,}")
        ratio = row["ours"] / row["jax"]
        shown = (f"{row[who] / MB:.2f} MiB" for who in ("ours", "jax", "closed form"))
        results.append(
            Result(
                reach.BYTES, f"bytes-{row['plan']}", row["plan"], *shown,
                Estimate(ratio, ratio, ratio, 1), 1.0, "at most", HOLDS if ratio <= 1 else MISSES,
            )
        )  # fmt: skip
    return Measured(results, {"rows": found})


def bill(say: Say) -> Measured:
    """Peak resident bytes of every rank against its bill; of each plan, the rank farthest off."""
    found = memory.sweep(say)
    results = []
    for plan, ranks in found.items():
        worst = max(ranks, key=lambda one: abs(one.difference))
        ratio = worst.peak / worst.bill
        results.append(
            Result(
                reach.BILL, f"bill-{plan}", plan, f"{worst.peak / MB:.0f} MiB",
                f"{worst.bill / MB:.0f} MiB", "", Estimate(ratio, ratio, ratio, len(ranks)),
                memory.WITHIN, "within",
                HOLDS if abs(worst.difference) <= memory.WITHIN else MISSES,
            )
        )  # fmt: skip
    return Measured(results, {"ranks": {p: [asdict(one) for one in r] for p, r in found.items()}})


def scheduled(say: Say, rounds: int) -> Measured:
    """Making and checking schedules, and interpreting what they become."""
    made = scheduling.seconds_of_schedules(rounds)
    for name, times in made.items():
        say(f"{name}: {statistics.median(times):.2f} s")
    slowest = max(made, key=lambda name: statistics.median(made[name]))
    what = f"{slowest}, the slowest: {scheduling.STAGES} stages x {scheduling.MICROBATCHES}"
    line = Line("schedule", f"{what} micro-batches, against 2 s", "ours", ("2 s",), 1.0, "at most")
    times = {"ours": made[slowest], "2 s": [2.0] * rounds}
    results = [timed(reach.SCHEDULING, line, times, 1.0, "s")]
    found = scheduling.overhead(10 * rounds)
    what = f"an instruction of {sum(found.kinds.values())}, against 30 us"
    line = Line("instruction", what, "ours", ("30 us",), 1.0, "at most")
    times = {"ours": found.seconds, "30 us": [30e-6] * len(found.seconds)}
    results.append(timed(reach.SCHEDULING, line, times, 1e6, "us"))
    return Measured(results, {"schedules": made, "overhead": found.seconds, "kinds": found.kinds})


def deepest(say: Say) -> Measured:
    """How many layers fit, by stages and by what is computed again, beside GPipe's Table 1."""
    found = {name: largest.largest(plan, say) for name, plan in largest.CASES.items()}
    alone, again, *staged = found.values()
    paper = [*largest.PAPER.values()]
    rows = [("1 stage: layers when computed again, over not", again, alone, paper[1] / paper[0])]
    rows += [
        (f"{n} stages: layers of a stage over those of 1", most, again, paper[2] / 8 / paper[1])
        for n, most in zip((2, 4), staged, strict=True)
    ]
    results = []
    for stages, (what, more, less, theirs) in zip((1, 2, 4), rows, strict=True):
        ratio = more.layers / less.layers / stages
        results.append(
            Result(
                reach.DEEPEST, f"deepest-{stages}", what, f"{more.layers} layers",
                f"paper: {theirs:.2f}", f"{more.needed / MB:.0f} MiB",
                Estimate(ratio, ratio, ratio, 1), round(0.9 * theirs, 2), "at least",
                HOLDS if ratio >= 0.9 * theirs else MISSES,
            )
        )  # fmt: skip
    return Measured(results, {"layers": {name: asdict(one) for name, one in found.items()}})


def collectives(say: Say, rounds: int, *, quick: bool) -> Measured:
    """The script of benchmarks/collectives, and the lines its times make."""
    command = [sys.executable, "-u", "benchmarks/collectives/compare.py", "--rounds", str(rounds)]
    if quick:
        command += ["--sizes", str(SMALL), str(BIG)]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        process = subprocess.Popen(
            [*command, "--json", file.name], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            for line in process.stdout:
                say(line.rstrip())
            status = process.wait(COLLECTIVES_SECONDS)
        finally:
            process.kill()
            process.wait()
        if status:
            raise RuntimeError(f"{' '.join(command[2:])} ended {status}")
        cells = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    return Measured([r for cell in cells for r in collective_lines(cell)], {"cells": cells})


def collective_lines(cell: Mapping[str, Any]) -> list[Result]:
    """What the reach table asks of one op, size and number of ranks.

    Args:
        cell: `ranks`, `op`, `bytes` and `seconds`: by contestant (`ours`, `gloo`, `copy`), per
            round, of a call.
    """
    size, times = cell["bytes"], cell["seconds"]
    what = f"{cell['op'].replace('_', '-')} {text(size)}"
    key = f"{cell['op']}-{text(size).replace(' ', '').lower()}-{cell['ranks']}"
    if cell["ranks"] > 2:
        line = Line(key, f"{what} against gloo", "ours", ("gloo",), 1.0)
        return [timed(reach.CROWDED, line, times, 1e6, "us")]
    if size >= BIG:
        line = Line(key, f"{what} against a copy", "ours", ("copy",), 1.2, "at most")
        return [timed(reach.COLLECTIVES, line, times, 1e6, "us")]
    if size > SMALL:
        return []
    against = Line(key, f"{what} against gloo", "ours", ("gloo",), 20.0)
    bound = {**times, "20 us": [20e-6] * len(times["ours"])}
    within = Line(f"{key}-time", f"{what} against 20 us", "ours", ("20 us",), 1.0, "at most")
    return [
        timed(reach.COLLECTIVES, within, bound, 1e6, "us"),
        timed(reach.COLLECTIVES, against, times, 1e6, "us"),
    ]


def timed(
    section: str, line: Line, times: Mapping[str, Sequence[float]], scale: float, unit: str
) -> Result:
    """A result whose two sides are times."""
    found, said = judged(line, times)
    shown = {name: _amount(statistics.median(times[name]) * scale, unit) for name in times}
    peer = " ".join(shown[name] for name in line.others)
    limit = shown.get("copy", "")
    return Result(
        section, line.key, line.what, shown["ours"], peer, limit, found, line.target, line.sense,
        said,
    )  # fmt: skip


def gpu() -> Measured:
    """The comparison on one GPU, where there is one."""
    if not torch.cuda.is_available():
        why = "no GPU was there: torch.cuda.is_available() is false"
        return Measured(
            [failed(reach.GPU, "gpu", "as traced, compiled, bf16", 1.0, "at least", why)]
        )
    why = "a GPU is there, but this torch-on-CPU comparison does not use it"
    return Measured([failed(reach.GPU, "gpu", "as traced, compiled, bf16", 1.0, "at least", why)])


def text(size: int) -> str:
    """Bytes for the reader."""
    return f"{size // MB} MB" if size >= MB else f"{size // KB} KB"


def _amount(value: float, unit: str) -> str:
    if unit == "us" and value >= 1000:
        return f"{value / 1000:.2f} ms"
    return f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"
