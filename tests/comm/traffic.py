"""Seeded streams of collectives: what every member brings, so that any one can tell the answers."""

from __future__ import annotations

import random

import torch

from meshwright.comm.base import Group, Start

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
OPS = [
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
    "permute",
    "barrier",
]
# In elements; the large ones take several rounds, or more rounds than there are slots.
SIZES = [0, 1, 3, 17, 1000, 9_001, 70_001, 400_003, 1_500_001]
OFTEN = [8, 20, 20, 20, 20, 8, 4, 2, 1]


def numbers(shape, dtype, seed):
    """Values whose sums need rounding, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def starts(group: Group, seed: int, op: str | None = None) -> list[Start]:
    """One collective over `group`: the Start of each member, in group order."""
    dice = random.Random(seed)
    n = len(group.ranks)
    op = op or dice.choice(OPS)
    dtype, root = dice.choice(DTYPES), dice.randrange(n)
    reduce = "sum" if dtype.is_complex else dice.choice(["sum", "sum", "max", "min"])
    (size,) = dice.choices(SIZES, OFTEN)
    label = f"place {dice.randrange(5)}"

    def shape(members):
        return (1 + dice.randrange(max(size, 1)),) if members else (max(size, 1),)

    def tensor(shape, key):
        return numbers(shape, dtype, hash((seed, key)) % 2**31)

    if op == "barrier":
        return [Start(op, group, label=label)] * n
    if op in {"all_reduce", "broadcast"}:
        brought = [(tensor((size,), k),) for k in range(n)]
        return [Start(op, group, b, reduce, root=root, label=label) for b in brought]
    if op == "permute":
        shapes = tuple(shape(n) for _ in range(n))
        return [
            Start(op, group, (tensor(shapes[k], k),), shapes=shapes, root=root, label=label)
            for k in range(n)
        ]
    if op == "all_gather":
        shapes = tuple((dice.randrange(size // n + 1), 2) for _ in range(n))
        return [
            Start(op, group, (tensor(shapes[k], k),), shapes=shapes, label=label) for k in range(n)
        ]
    if op == "reduce_scatter":
        shapes = [(dice.randrange(size // n + 2),) for _ in range(n)]
        return [
            Start(
                op,
                group,
                tuple(tensor(shapes[j], (k, j)) for j in range(n)),
                reduce,
                label=label,
            )
            for k in range(n)
        ]
    table = [[(dice.randrange(size // n + 2), 1) for _ in range(n)] for _ in range(n)]
    return [
        Start(
            op,
            group,
            tuple(tensor(table[k][j], (k, j)) for j in range(n)),
            shapes=tuple(table[j][k] for j in range(n)),
            label=label,
        )
        for k in range(n)
    ]


BUCKETED = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


def bucket(group: Group, seed: int, op: str, sizes: list[int], dtype=torch.float32) -> list[Start]:
    """One collective on a bucket of tensors of about these sizes: the Start of each member."""
    dice, n = random.Random(seed), len(group.ranks)

    def shape(size):
        return (size,) if size % 2 else (2, size // 2)

    def tensors(shapes, *key):
        return tuple(numbers(s, dtype, hash((seed, key, j)) % 2**31) for j, s in enumerate(shapes))

    def uneven():
        return tuple(shape(dice.randrange(size + 1)) for size in sizes)

    if op == "all_reduce":
        shapes = [shape(size) for size in sizes]
        return [Start(op, group, tensors(shapes, k), label="bucket") for k in range(n)]
    if op == "all_gather":
        even = tuple(shape(size) for size in sizes)
        lists = [even] * n if seed % 2 else [uneven() for _ in range(n)]
        whole = tuple(s for shapes in lists for s in shapes)
        return [
            Start(op, group, tensors(lists[k], k), shapes=whole, label="bucket") for k in range(n)
        ]
    if op == "reduce_scatter":
        flat = [s for _ in range(n) for s in uneven()]
        return [Start(op, group, tensors(flat, k), label="bucket") for k in range(n)]
    table = [[uneven() for _ in range(n)] for _ in range(n)]
    return [
        Start(
            op,
            group,
            tensors([s for shapes in table[k] for s in shapes], k),
            shapes=tuple(s for sender in table for s in sender[k]),
            label="bucket",
        )
        for k in range(n)
    ]


def many_buckets(n: int) -> list[list[Start]]:
    """Mixed shapes, many small tensors, empty ones, and pieces that tensors straddle."""
    group, dice = Group.world(n), random.Random(n)
    lists = [
        [7],
        [0],
        [0, 0, 0],
        [3, 0, 5, 0],
        [0, 40_000, 1, 200_001, 0, 90_000, 0],
        [dice.randrange(1001) for _ in range(300)],
        [600_000, 17, 900_001],
    ]
    calls = [
        bucket(group, 100 * k + turn, op, sizes)
        for k, sizes in enumerate(lists)
        for op in BUCKETED
        for turn in range(2)
    ]
    for k, dtype in enumerate(DTYPES):
        calls += [bucket(group, k, op, [5, 1, 0, 3000], dtype) for op in BUCKETED]
    return calls


def same(got, want):
    """Whether answers are alike to the last bit, NaN and all."""
    return len(got) == len(want) and all(
        g.dtype == w.dtype
        and g.shape == w.shape
        and torch.equal(g.contiguous().view(-1).view(torch.uint8), w.view(-1).view(torch.uint8))
        for g, w in zip(got, want, strict=True)
    )
