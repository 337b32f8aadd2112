"""Run folders as a run writes them, for the tests of what people see."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

LAYOUTS = {  # zero -> (weights, gradients, optimizer)
    0: ("replicated", "replicated", "replicated"),
    1: ("replicated", "replicated", "sharded(0) over data"),
    2: ("replicated", "sharded(0) over data", "sharded(0) over data"),
    3: ("sharded(0) over data",) * 3,
}


def gpt_shapes(depth: int, dim: int) -> dict[str, tuple[int, ...]]:
    """A small GPT's parameters in the order of its module tree."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (256, dim), "position.weight": (128, dim)}
    for layer in range(depth):
        block = f"blocks.{layer}"
        shapes |= {
            f"{block}.norm1.weight": (dim,),
            f"{block}.norm1.bias": (dim,),
            f"{block}.attn.qkv.weight": (3 * dim, dim),
            f"{block}.attn.out.weight": (dim, dim),
            f"{block}.norm2.weight": (dim,),
            f"{block}.norm2.bias": (dim,),
            f"{block}.mlp.up.weight": (4 * dim, dim),
            f"{block}.mlp.down.weight": (dim, 4 * dim),
        }
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (256, dim)}


def run_record(ranks: int = 4, zero: int = 3, depth: int = 8, dim: int = 192) -> dict[str, Any]:
    """What `run.json` holds for a small GPT under `zero<Z>,data=<ranks>`."""
    shapes = gpt_shapes(depth, dim)
    weights, gradients, optimizer = LAYOUTS[zero] if ranks > 1 else LAYOUTS[0]
    whole = sum(4 * math.prod(shape) for shape in shapes.values())

    def local(shape: tuple[int, ...], rank: int) -> list[int]:
        if "sharded" not in weights:
            return list(shape)
        first = shape[0] // ranks + (rank < shape[0] % ranks)
        return [first, *shape[1:]]

    def part(layout: str) -> int:
        return whole // ranks if "sharded" in layout else whole

    return {
        "file": "gpt.py",
        "name": "job",
        "started": "2026-11-22T11:15:03+00:00",
        "status": "finished",
        "versions": {"meshwright": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},
        "host": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory": 24 * 2**30},
        "plan": f"zero{zero},data={ranks}" if zero else f"data={ranks}",
        "mesh": {
            "axes": [["data", ranks]],
            "ranks": [{"rank": rank, "coordinates": {"data": rank}} for rank in range(ranks)],
        },
        "batch": {"batch_size": 64, "microbatches": 1},
        "parameters": [
            {
                "name": name,
                "shape": list(shape),
                "dtype": "float32",
                "bytes": 4 * math.prod(shape),
                "weights": weights,
                "gradients": gradients,
                "optimizer": optimizer,
                "local": {str(rank): local(shape, rank) for rank in range(ranks)},
            }
            for name, shape in shapes.items()
        ],
        "collectives": collectives(shapes, ranks, zero),
        "memory": [
            {
                "rank": rank,
                "parts": {
                    "weights": part(weights),
                    "gradients": part(gradients),
                    "optimizer": 2 * part(optimizer),
                    "saved activations": 21 * 2**20 + (3 * 2**20 if rank == 0 else 0),
                    "buffers": 4096,
                },
            }
            for rank in range(ranks)
        ],
    }


SOURCES = {"qkv": 41, "out": 47, "up": 58, "down": 60, "embed": 80, "position": 81, "head": 90}


def collectives(shapes: dict[str, tuple[int, ...]], ranks: int, zero: int) -> list[dict[str, Any]]:
    """The collectives of a step of the GPT."""
    if ranks == 1:
        return []

    def one(op: str, name: str, phase: str, why: str) -> dict[str, Any]:
        module = name.rpartition(".")[0]
        line = SOURCES.get(module.rpartition(".")[2], 33)
        size = 4 * math.prod(shapes[name]) * (ranks - 1) // ranks
        return {
            "op": op,
            "axis": "data",
            "bytes": size * (2 if op == "all_reduce" else 1),
            "count": 1,
            "source": f"gpt.py:{line}",
            "module": module,
            "why": why,
            "phase": phase,
        }

    found = []
    for name in shapes:
        if zero == 3:
            found.append(one("all_gather", name, "forward", "sharded -> replicated"))
            found.append(one("all_gather", name, "backward", "sharded -> replicated"))
        scatter = zero >= 2
        op, why = (
            ("reduce_scatter", "partial -> sharded")
            if scatter
            else ("all_reduce", "partial -> replicated")
        )
        found.append(one(op, name, "backward", why))
        if zero in (1, 2):
            found.append(one("all_gather", name, "finish", "updated shards -> replicated"))
    found.append(
        {"op": "all_reduce", "axis": "data", "bytes": 24, "count": 1, "source": "", "module": "",
         "why": "loss and weight of the step", "phase": "finish"}
    )  # fmt: skip
    return found


def metric_lines(steps: int, evaluate_every: int = 50, ranks: int = 4) -> list[dict[str, Any]]:
    """What `metrics.jsonl` holds after `steps` steps, with a slow first one and a few spikes."""
    draw = random.Random(7)
    lines: list[dict[str, Any]] = [{"step": 0, "note": "batches of 64 samples, 16 on each rank"}]
    for step in range(1, steps + 1):
        course = 2.1 + 3.45 * math.exp(-4 * step / max(steps, 30))
        loss = course + draw.gauss(0, 0.12) + (1.5 if draw.random() < 0.001 else 0)
        time = {
            "data": 0.004 * draw.uniform(0.8, 1.4),
            "compute": 0.118 * draw.uniform(0.95, 1.1) + (2.4 if step == 1 else 0),
            "communication": 0.0 if ranks == 1 else 0.041 * draw.uniform(0.8, 1.5),
            "update": 0.012 * draw.uniform(0.9, 1.1),
        }
        rate = (
            3e-4 * min(1.0, step / (0.1 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        lines.append(
            {"step": step, "loss": loss, "lr": rate, "samples": 64, "accuracy": 1 / loss,
             "seconds": sum(time.values()) + 0.003, "time": time}
        )  # fmt: skip
        if evaluate_every and step % evaluate_every == 0:
            lines.append({"step": step, "evaluation": {"loss": course + 0.09}})
    return lines


def verify_record(passed: bool = True, ranks: int = 4) -> dict[str, Any]:
    """What `verify.json` holds."""
    worst = 3.1e-15 if passed else 2.4e-3
    return {
        "passed": passed,
        "plan": f"zero3,data={ranks}",
        "ranks": ranks,
        "steps": 5,
        "dtype": "float64",
        "worst_relative_error": {
            "loss": 0.0,
            "gradients": worst,
            "weights": worst / 4,
            "optimizer": worst / 7,
        },
        "worst_tensor": "blocks.3.attn.qkv.weight",
        "law": 1e-10,
    }


def write_run(
    path: Path,
    run: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    verify: dict[str, Any] | None = None,
) -> Path:
    """A run folder with these files; None leaves a file out (run.json is always there)."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps(run_record() if run is None else run))
    if metrics is not None:
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        (path / "metrics.jsonl").write_text(lines)
    if verify is not None:
        (path / "verify.json").write_text(json.dumps(verify))
    return path


def accounts_record(layers: int = 3) -> dict[str, Any]:
    """What `run.json` holds beside, of a model under `tensor=2` with an op that has no rule."""
    reduce = {
        "op": "all_reduce", "axis": "tensor", "bytes": 32768, "count": 1, "exposed": 1,
        "beside": 0, "value": "", "source": "gpt.py:76", "module": "blocks.1.norm",
        "why": "partial(sum) over tensor -> replicated", "phase": "forward",
    }  # fmt: skip
    back = reduce | {"phase": "backward", "exposed": 0, "beside": 9}
    gather = back | {"op": "all_gather", "value": "model/blocks.1.up.weight", "axis": "data"}
    lost = {"op": "my::scan", "source": "gpt.py:70", "phase": "forward", "count": 1, "bytes": 512}
    norm = {
        "module": "norm", "ops": 1, "source": "gpt.py:76", "weights": [["weight", ["64"]]],
        "dims": ["8", "16", "64"], "owes": [], "before": [reduce], "backward": [back], "update": [],
    }  # fmt: skip
    up = {
        "module": "up", "ops": 2, "source": "gpt.py:77", "dims": ["8", "16", "256/tensor"],
        "weights": [["weight", ["256/tensor", "64"]]], "owes": ["tensor"], "before": [],
        "backward": [gather], "update": [],
    }  # fmt: skip
    return {
        "traffic": {"bytes": 1, "exposed_bytes": 1, "calls": 9, "messages": 5},
        "fallbacks": [
            lost | {"module": f"blocks.{k}.scan", "remedy": 'mw.rule("my::scan", "n a -> n a")'}
            for k in range(layers)
        ],
        "conflicts": [
            lost
            | {
                "module": f"blocks.{k}.scan", "axis": "tensor", "loser_bytes": 1024,
                "winner": "operand 0 sharded(1) over tensor", "wanted": "sharded(1) over tensor",
                "loser": "operand 1 sharded(2) over tensor",
            }
            for k in range(layers)
        ],
        "block": {"name": "blocks.*", "count": layers, "stations": [norm, up]},
    }  # fmt: skip
