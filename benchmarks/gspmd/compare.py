"""Bytes that a rank receives per step for one annotated GPT: ours, JAX's compiler's, closed form.

    python benchmarks/gspmd/compare.py

Both compile the same model (examples/gpt.py and its like in jax_side.py), forward and backward,
under the same annotations on the same mesh of 8, and the bytes are counted in what was compiled;
nothing is run. JAX lives in the peers' environment (.venv-peers). Closed forms: data 2 (n-1)/n P;
ZeRO-3 two gathers of the weights and one reduce-scatter; tensor 4 all-reduces a layer of the
activations (Shoeybi et al. 2019), one for the head, and three numbers per token for the loss.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from meshwright.plan.plan import Plan
from meshwright.run.describe import explain

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"depth": 4, "width": 256, "context": 128, "batch": 16}
PLANS = ("data=8", "tensor=8", "data=2,tensor=4", "zero3,data=8", "zero3,data=2,tensor=4")


def ours(plan: str) -> dict[str, int]:
    """Bytes by collective of one step under a plan."""
    spec = importlib.util.spec_from_file_location("gpt", ROOT / "examples/gpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = explain(module.job(dropout=0.0, **MODEL), Plan.parse(plan), 8)
    found: dict[str, int] = {}
    for row in record["collectives"]:
        found[row["op"]] = found.get(row["op"], 0) + row["bytes"]
    return found


def theirs(plans: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """The same of JAX's compiled programs."""
    asked = {"model": MODEL, "plans": [{"name": text, **_axes(text)} for text in plans]}
    script = ROOT / "benchmarks/gspmd/jax_side.py"
    python = ROOT / ".venv-peers/bin/python"
    told = subprocess.run(
        [python, script, json.dumps(asked)], capture_output=True, text=True, timeout=600, check=True
    )
    found: dict[str, dict[str, int]] = json.loads(told.stdout.splitlines()[-1])
    return found


def _axes(text: str) -> dict[str, int]:
    plan = Plan.parse(text)
    return {"data": plan.data or 1, "tensor": plan.tensor, "zero": plan.zero}


def closed_form(text: str) -> int:
    """Bytes a rank receives, to first order."""
    plan = Plan.parse(text)
    width, layers = MODEL["width"], MODEL["depth"]
    split = 4 * (12 * width * width + 7 * width) * layers + 4 * 256 * width
    rest = 4 * ((256 + MODEL["context"]) * width + (layers * 6 + 2) * width)
    data, tensor = plan.data or 1, plan.tensor
    weights = split / tensor + rest
    share = (data - 1) / data
    total = (3 if plan.zero == 3 else 2) * share * weights
    if tensor > 1:
        tokens = MODEL["batch"] // data * MODEL["context"]
        reduced = 4 * tokens * width * (4 * layers + 1)
        scalars = 3 * 4 * tokens
        total += 2 * (tensor - 1) / tensor * (reduced + scalars)
    return int(total)


def rows() -> list[dict[str, Any]]:
    """One line a plan."""
    jax = theirs(PLANS)
    found = []
    for plan in PLANS:
        mine = ours(plan)
        found.append(
            {
                "plan": plan,
                "ours": sum(mine.values()),
                "jax": sum(jax[plan].values()),
                "closed form": closed_form(plan),
                "ours by collective": mine,
                "jax by collective": jax[plan],
            }
        )
    return found


def main() -> None:
    """Print the table."""
    table = Table(title="bytes a rank receives per step, 8 ranks")
    for name in ("plan", "ours", "JAX", "closed form", "ours / JAX", "ours / closed form"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for name in ("ours by collective", "JAX by collective"):
        table.add_column(name)
    for row in rows():
        table.add_row(
            row["plan"], f"{row['ours']:,}", f"{row['jax']:,}", f"{row['closed form']:,}",
            f"{row['ours'] / row['jax']:.3f}", f"{row['ours'] / row['closed form']:.3f}",
            json.dumps(row["ours by collective"]), json.dumps(row["jax by collective"]),
        )  # fmt: skip
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
