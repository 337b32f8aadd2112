"""The reach table: which contestants run together, and which ratios are asked of them.

Contestants of one group are alive at the same time, at most some 18 GiB of them, and each group has
the control: our program on a mesh of one in two unconnected copies, twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.lines import CONTROL, Line
from benchmarks.harness.task import Task

COSTS = "What distribution costs"
PEERS = {n: f"Against peers, {n} sequence{'s' * (n > 1)} a rank" for n in (8, 1)}
ZERO3 = "ZeRO-3 against our data=2"
TENSOR = "Tensor parallel, 2 ranks"
PIPELINE = "Pipelines: share of the ideal speed-up"
PIPELINE_PEERS = "Pipelines against peers"
PIPELINE_ORDER = "Pipelines of 4 stages on 2 cores, for the order only"
DEEPEST = "The deepest GPT in 52 MiB a rank, after GPipe's Table 1"
BILL = "Memory of a rank against its bill"
SCHEDULING = "Schedules and their execution"
BYTES = "Bytes beside JAX's compiler, 8 ranks"
DEVICE = "One device, traced against eager"
BF16 = "bf16 against float32"
DROPOUT = "Dropout on against off"
SMALL = "A 100k-parameter model against DDP"
COLLECTIVES = "Collectives over shared memory, 2 ranks"
CROWDED = "Collectives, 4 ranks on 2 cores"
CHECKPOINT = "A checkpoint of 1 GB, 2 ranks"
LADDER = "The largest GPT in a given memory, 2 ranks"
OFFLOAD = "Offload"
FIRST = "Time to the first step"
GPU = "One GPU"
CONTROLS = "The control"
SECTIONS = (
    COSTS,
    *PEERS.values(),
    ZERO3,
    TENSOR,
    PIPELINE,
    PIPELINE_PEERS,
    PIPELINE_ORDER,
    DEEPEST,
    BILL,
    SCHEDULING,
    BYTES,
    DEVICE,
    BF16,
    DROPOUT,
    SMALL,
    COLLECTIVES,
    CROWDED,
    CHECKPOINT,
    LADDER,
    OFFLOAD,
    FIRST,
    GPU,
)


@dataclass(frozen=True, slots=True)
class Group:
    """Contestants that run side by side.

    Attributes:
        name: for `--only`.
        model, rows: of every contestant, unless its task says otherwise.
        tasks: the contestants beside the control.
        lines: with the section each belongs to.
        steps, warm: timed and untimed ones in a turn.
        most: rounds.
        seconds: after which no other round begins.
        ranks: of the control.
        plan: of the control's copies.
    """

    name: str
    model: str
    rows: int
    tasks: Mapping[str, Task]
    lines: tuple[tuple[str, Line], ...]
    steps: int = 1
    warm: int = 1
    most: int = 20
    seconds: float = 120.0
    ranks: int = 2
    plan: str = ""

    @property
    def contestants(self) -> dict[str, Task]:
        """All, the control's two first."""
        copies = Task(
            "ours", self.model, self.rows, ranks=self.ranks, connected=False, plan=self.plan
        )
        return {**dict.fromkeys(CONTROL, copies), **self.tasks}

    @property
    def control(self) -> Line:
        """Our program against itself."""
        return Line(f"control-{self.name}", self.name, CONTROL[0], (CONTROL[1],), 0.02, "within")


def group(
    name: str, model: str, rows: int, tasks: dict[str, dict], *lines: Any, **how: Any
) -> Group:
    """A group whose tasks are given by what differs."""
    made = {key: Task(**{"model": model, "rows": rows, **what}) for key, what in tasks.items()}
    return Group(name, model, rows, made, lines, **how)


def ours(plan: str, **more: Any) -> dict:
    """Meshwright under a plan."""
    return {"module": "ours", "plan": plan, **more}


DDP, FSDP2 = {"module": "ddp"}, {"module": "fsdp2"}
ACCELERATE, FAIRSCALE = {"module": "accelerate"}, {"module": "fairscale"}
DEEPSPEED = {n: {"module": "deepspeed", "stage": n} for n in (1, 2, 3)}


def cost(key: str, what: str, target: float) -> tuple[str, Line]:
    """`data=2` against unconnected copies."""
    return COSTS, Line(key, what, "data=2", CONTROL, target)


def ahead(rows: int, plan: str, peer: str, what: str = "") -> tuple[str, Line]:
    """A plan of ours is faster than a peer."""
    key = f"{peer.lower().replace(' ', '-')}-{rows}"
    return PEERS[rows], Line(key, f"{what or peer} (ours: {plan})", plan, (peer,), 1.0)


def peers_of_data(rows: int) -> tuple[dict[str, dict], tuple]:
    """Those that keep everything on every rank."""
    # One process of two threads on the batch of two ranks.
    threads = {"module": "eager", "ranks": 1, "threads": 2, "connected": False, "rows": 2 * rows}
    tasks = {
        "data=2": ours("data=2"),
        "DDP": DDP,
        "Accelerate": ACCELERATE,
        "2 threads": threads,
    }
    undistributed = "one process, 2 threads"
    lines = (
        ahead(rows, "data=2", "DDP"),
        ahead(rows, "data=2", "Accelerate"),
        ahead(rows, "data=2", "2 threads", undistributed),
    )
    return tasks, lines


def peers_of_zero12(rows: int) -> tuple[dict[str, dict], tuple]:
    """Those that shard the optimizer, or gradients too."""
    tasks = {
        "zero1": ours("zero1"),
        "DeepSpeed ZeRO-1": DEEPSPEED[1],
        "zero2": ours("zero2"),
        "DeepSpeed ZeRO-2": DEEPSPEED[2],
        "FairScale ShardedDDP": FAIRSCALE,
    }
    lines = (
        ahead(rows, "zero1", "DeepSpeed ZeRO-1"),
        ahead(rows, "zero2", "DeepSpeed ZeRO-2"),
        ahead(rows, "zero2", "FairScale ShardedDDP"),
    )
    return tasks, lines


def peers_of_zero3(rows: int) -> tuple[dict[str, dict], tuple]:
    """Those that shard parameters as well."""
    tasks = {
        "data=2": ours("data=2"),
        "zero3": ours("zero3"),
        "FSDP2": FSDP2,
        "DeepSpeed ZeRO-3": DEEPSPEED[3],
    }
    lines = (
        ahead(rows, "zero3", "FSDP2"),
        ahead(rows, "zero3", "DeepSpeed ZeRO-3"),
        (
            ZERO3,
            Line(f"zero3-{rows}", f"10M GPT, {rows} a rank", "zero3", ("data=2",), 0.95),
        ),
    )
    return tasks, lines


def _groups() -> list[Group]:
    data_8, data_8_lines = peers_of_data(8)
    zero12_8, zero12_8_lines = peers_of_zero12(8)
    zero3_8, zero3_8_lines = peers_of_zero3(8)
    data_1, data_1_lines = peers_of_data(1)
    zero12_1, zero12_1_lines = peers_of_zero12(1)
    zero3_1, zero3_1_lines = peers_of_zero3(1)
    cost_8 = cost("cost-8", "10M GPT, 8 sequences a rank", 0.97)
    cost_1 = cost("cost-1", "10M GPT, 1 sequence a rank", 0.9)
    cost_60m = cost("cost-60m", "60M GPT, 1 sequence a rank", 0.9)
    return [
        group("data-8", "gpt10m", 8, data_8, cost_8, *data_8_lines, seconds=240),
        group("zero12-8", "gpt10m", 8, zero12_8, *zero12_8_lines, seconds=220),
        group("zero3-8", "gpt10m", 8, zero3_8, *zero3_8_lines, seconds=180),
        group("data-1", "gpt10m", 1, data_1, cost_1, *data_1_lines, steps=4, seconds=70),
        group("zero12-1", "gpt10m", 1, zero12_1, *zero12_1_lines, steps=4, seconds=70),
        group("zero3-1", "gpt10m", 1, zero3_1, *zero3_1_lines, steps=4, seconds=70),
        group(
            "tensor",
            "gpt10m",
            8,
            {
                "tensor=2": ours("tensor=2"),
                "sequence": ours("tensor=2,sequence=tensor"),
                "DTensor": {"module": "dtensor"},
            },
            (TENSOR, Line("tensor-8", "10M GPT, 8 a rank", "tensor=2", CONTROL, 0.9)),
            (TENSOR, Line("sequence-8", "and sequence=tensor", "sequence", CONTROL, 0.9)),
            (TENSOR, Line("dtensor-8", "against DTensor", "tensor=2", ("DTensor",), 1.0)),
            seconds=120,
        ),
        group("gpt60m", "gpt60m", 1, {"data=2": ours("data=2")}, cost_60m, seconds=100),
        group(
            "device",
            "gpt10m",
            8,
            {"eager": {"module": "eager", "connected": False, "ranks": 1}},
            (DEVICE, Line("device", "10M GPT, float32", CONTROL[0], ("eager",), 0.98)),
            seconds=120,
            ranks=1,
        ),
        group(
            "precision",
            "gpt10m",
            8,
            {
                "float32": ours("data=2"),
                "bf16": ours("data=2,precision=bf16"),
                "dropout": ours("data=2", dropout=0.1),
            },
            (BF16, Line("bf16", "10M GPT, 8 a rank", "bf16", ("float32",), 1.6)),
            (DROPOUT, Line("dropout", "10M GPT, 8 a rank", "dropout", ("float32",), 0.97)),
            seconds=150,
        ),
        group(
            "gpt100k",
            "gpt100k",
            8,
            {"data=2": ours("data=2"), "DDP": DDP},
            (
                SMALL,
                Line("gpt100k", "step time, 8 a rank", "data=2", ("DDP",), 1.0, "at most"),
            ),
            steps=50,
            warm=5,
            most=30,
            seconds=45,
        ),
    ]


def offloads() -> Group:
    """Steps with their state in host memory or on disk, against steps without; the same numbers."""
    tasks = {
        "none": ours("data=2"),
        "host": ours("data=2,offload=host"),
        "zero3": ours("zero3"),
        "zero3, host": ours("zero3,offload=host"),
        "zero3, disk": ours("zero3,offload=disk"),
    }
    lines = [
        (OFFLOAD, Line(f"offload-{mine}".replace(", ", "-").replace(" ", "-"), what, mine, (other,),
                       1.15, "at most"))
        for mine, other, what in (
            ("host", "none", "all to host memory, data=2"),
            ("zero3, host", "zero3", "all to host memory, zero3"),
        )
    ]  # fmt: skip
    return group("offload", "gpt10m", 8, tasks, *lines, seconds=150)


MICROBATCHES = 8
CUT = {"gpipe": 1, "1f1b": 1, "zb-h1": 1, "interleaved": 2, "zb-v": 2}
"""Schedules, and how many stages each rank holds."""


def ideal(ranks: int, virtual: int) -> float:
    """The speed-up over one process of a schedule that flushes, stages alike (GPipe, section 2.3).

    For zb-v it is that of interleaved 1F1B, which it may pass.
    """
    return ranks * MICROBATCHES / (MICROBATCHES + (ranks - 1) / virtual)


def piped(schedule: str, ranks: int) -> dict:
    """Our plan of a pipeline."""
    virtual = ",virtual=2" if schedule == "interleaved" else ""
    return ours(
        f"pipeline={ranks},schedule={schedule}{virtual},microbatches={MICROBATCHES}", ranks=ranks
    )


def of_torch(schedule: str, ranks: int) -> dict:
    """torch's pipelining."""
    how = {"schedule": schedule, "microbatches": MICROBATCHES, "ranks": ranks}
    return {"module": "pipe_torch", **how}


def _two_stages() -> Group:
    alone = {"ranks": 1, "connected": False, "rows": 8}
    cut = {**alone, "microbatches": MICROBATCHES}
    tasks = {
        "solo": ours(f"microbatches={MICROBATCHES}", **alone),
        "eager solo": {"module": "eager", **cut},
        "stage 0": {"module": "pipe_stage", "stage": 0, **cut},
        "stage 1": {"module": "pipe_stage", "stage": 1, **cut},
        **{name: piped(name, 2) for name in CUT},
        **{f"torch {name}": of_torch(name, 2) for name in CUT if name != "zb-h1"},
        "DeepSpeed": {"module": "pipe_deepspeed", "microbatches": MICROBATCHES},
        "torchgpipe": {"module": "pipe_torchgpipe", "bound": False, **cut},
    }
    shares = [
        (PIPELINE, Line(f"pipe-{n}", n, n, ("solo",), 0.97, ideal=ideal(2, virtual)))
        for n, virtual in CUT.items()
    ]
    against = [
        (f"torch {name}", name, f"torch's {name}") for name in CUT if f"torch {name}" in tasks
    ]
    against += [("DeepSpeed", "1f1b", "DeepSpeed's engine"), ("torchgpipe", "gpipe", "torchgpipe")]
    peers = [
        (PIPELINE_PEERS, Line(f"pipe-{peer}".lower().replace(" ", "-"), what, mine, (peer,), 1.0))
        for peer, mine, what in against
    ]
    split = Line("pipe-split", "zb-h1 against 1f1b, both ours", "zb-h1", ("1f1b",), 1.0)
    how = {"seconds": 400, "most": 15, "plan": f"microbatches={MICROBATCHES // 2}"}
    return group("pipeline", "gpt10m", 4, tasks, *shares, (PIPELINE, split), *peers, **how)


def _asynchronous() -> Group:
    """PipeDream's step is a whole batch, so that many of them are under way."""
    tasks = {
        "solo": ours("", ranks=1, connected=False, rows=4),
        "pipedream": ours("pipeline=2,schedule=pipedream"),
        "pipedream-2bw": ours("pipeline=2,schedule=pipedream-2bw,microbatches=2"),
    }
    lines = [
        (PIPELINE, Line(f"pipe-{n}", f"{n}, no bubble", n, ("solo",), 0.97, ideal=2.0))
        for n in ("pipedream", "pipedream-2bw")
    ]
    # Many steps: ranks begin a window together, and the first ends it one backward later, which
    # among 8 steps was 8 % of the time.
    return group("pipedream", "gpt10m", 2, tasks, *lines, steps=32, warm=3, seconds=400)


def _four_stages() -> Group:
    names = ("gpipe", "1f1b", "interleaved", "zb-v")
    tasks = {
        **{name: piped(name, 4) for name in names},
        **{f"torch {name}": of_torch(name, 4) for name in ("gpipe", "1f1b")},
        "DeepSpeed": {"module": "pipe_deepspeed", "microbatches": MICROBATCHES, "ranks": 4},
    }
    lines = [
        (PIPELINE_ORDER, Line(f"pipe4-{peer}".lower().replace(" ", "-"), what, mine, (peer,), 1.0))
        for peer, mine, what in (
            ("torch gpipe", "gpipe", "torch's gpipe"),
            ("torch 1f1b", "1f1b", "torch's 1f1b"),
            ("DeepSpeed", "1f1b", "DeepSpeed's engine"),
        )
    ]
    # Cores that are shared have no bubbles: what one stage leaves idle another takes.
    lines += [
        (PIPELINE_ORDER, Line(f"pipe4-{n}", f"{n} against 1f1b, both ours", n, ("1f1b",), 1.0))
        for n in names
        if n != "1f1b"
    ]
    how = {"seconds": 200, "ranks": 4, "plan": f"microbatches={MICROBATCHES // 4}"}
    return group("pipeline-4", "gpt10m", 2, tasks, *lines, **how)


def pipelines() -> list[Group]:
    """Two stages on two cores, with and without flushes, and four on two."""
    return [_two_stages(), _asynchronous(), _four_stages()]


GROUPS = [*_groups(), *pipelines(), offloads()]
