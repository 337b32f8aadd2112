"""Peak resident bytes of every rank against its bill, plan by plan, in processes of their own.

Of some steps, since a pipeline that never flushes takes a few to fill.

python -m benchmarks.memory.compare [PLAN ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from meshwright.plan.plan import Plan
from meshwright.view.measured import Compared, compared

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
WITHIN = 0.1
SECONDS = 400
PLANS = (
    "data=1",
    "data=1,microbatches=4",
    "data=1,remat=full",
    "data=1,precision=bf16",
    "data=1,precision=bf16-pure",
    "data=1,offload=host",
    "data=1,offload=disk",
    "data=2",
    "zero1,data=2",
    "zero2,data=2,microbatches=3",
    "zero3,data=2",
    "zero3,data=2,remat=full",
    "zero3,data=2,microbatches=2,offload=host",
    "zero3,data=2,offload=disk",
    "zero1,data=2,offload=optimizer:disk+gradients+params",
    "tensor=2",
    "tensor=2,sequence=tensor",
    "context=2",
    "pipeline=2,schedule=1f1b,microbatches=4",
    "pipeline=2,schedule=zb-h1,microbatches=4",
    "pipeline=2,schedule=gpipe,microbatches=4,remat=full",
    "pipeline=2,schedule=interleaved,virtual=2,microbatches=4",
    "pipeline=2,schedule=pipedream",
    "zero3,data=2,tensor=2",
    "zero3,data=2,pipeline=2,schedule=1f1b,microbatches=2",
    "zero3,data=4,shard=2",
    # The rest of what tests/equal/test_processes.py runs.
    "data=3",
    "data=4",
    "zero1,data=3",
    "zero2,data=4",
    "zero3,data=2,microbatches=3",
    "zero3,data=4",
    "data=2,tensor=2",
    "tensor=2,microbatches=3",
    "context=2,tensor=2",
    "pipeline=2,schedule=zb-v,microbatches=3",
    "pipeline=3,schedule=dualpipe-v,microbatches=3",
    "pipeline=3,schedule=gpipe,microbatches=3",
    "pipeline=4,schedule=1f1b,microbatches=8",
    "pipeline=4,schedule=zb-h2,microbatches=8",
    "pipeline=4,schedule=zb-v,microbatches=8",
    "pipeline=2,schedule=1f1b,microbatches=3,remat=full",
    "pipeline=2,schedule=pipedream,replicas=2-1",
    "pipeline=2,schedule=pipedream-2bw,microbatches=3",
    "data=2,pipeline=2,schedule=1f1b,microbatches=3",
    "data=2,pipeline=2,schedule=interleaved,virtual=2",
    "zero1,data=2,pipeline=2,schedule=1f1b",
    "zero2,data=2,pipeline=2,schedule=zb-h1,microbatches=3",
    "zero3,data=2,pipeline=2,schedule=zb-h1,microbatches=3",
    "tensor=2,pipeline=2,schedule=gpipe,microbatches=3",
    "tensor=2,pipeline=2,schedule=dualpipe-v,microbatches=3",
    "expert=2",
    "expert=3",
    "zero2,data=2,expert=2",
    "expert=2,tensor=2",
)


def measured(plan: str, *settings: str) -> tuple[Compared, ...]:
    """What the ranks of a few steps held, beside their bills.

    Raises:
        RuntimeError: the training failed.
    """
    job = "experts" if "expert" in plan else "job"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "meshwright", "train", f"benchmarks/memory/{job}.py",
             "--plan", plan, "-n", str(Plan.parse(plan).ranks), "--run-dir", f"{folder}/run",
             *(word for setting in settings for word in ("--set", setting))],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{plan}: {done.stderr.strip()[-600:]}")
        run: dict[str, Any] = json.loads((Path(folder) / "run" / "run.json").read_text())
    return compared(run)


def sweep(
    say: Callable[[str], None], plans: Iterable[str] = PLANS
) -> dict[str, tuple[Compared, ...]]:
    """Of every plan its ranks, the neediest first."""
    found = {}
    for plan in plans:
        try:
            found[plan] = ranks = measured(plan)
        except RuntimeError as error:
            say(str(error))
            continue
        worst = max(ranks, key=lambda one: abs(one.difference))
        say(
            f"{plan:58} bill {worst.bill / MIB:7.1f}  measured {worst.peak / MIB:7.1f} MiB  "
            f"{worst.difference:+.1%} (rank {worst.rank} of {len(ranks)})"
        )
    return found


if __name__ == "__main__":
    sweep(lambda text: print(text, flush=True), sys.argv[1:] or PLANS)
