"""Legal patterns of messages: every rank's order of sends and receives, and what they carry."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from meshwright.comm.base import Group, Start, Wait
from tests.comm.traffic import DTYPES, numbers, same

MIXED = tuple(numbers(shape, dtype, 7) for dtype in DTYPES for shape in [(), (0, 3), (5, 2)])
SIZES = [0, 1, 17, 1000, 40_001]


@dataclass(frozen=True)
class Pattern:
    """`messages` (source, to) in an order in which they could all be sent one after the other."""

    size: int
    seed: int
    messages: tuple[tuple[int, int], ...]
    early: bool = False
    most: int = 3


@st.composite
def patterns(draw, early=False):
    size = draw(st.integers(2, 4))
    pair = st.tuples(st.integers(0, size - 1), st.integers(1, size - 1))
    ways = draw(st.lists(pair, min_size=1, max_size=25))
    messages = tuple((a, (a + by) % size) for a, by in ways)
    return Pattern(size, draw(st.integers(0, 999)), messages, early, 2)


def random_pattern(size: int, seed: int, count: int) -> Pattern:
    dice = random.Random(seed)
    messages = []
    for _ in range(count):
        source = dice.randrange(size)
        messages.append((source, (source + dice.randrange(1, size)) % size))
    return Pattern(size, seed, tuple(messages), most=len(SIZES))


def carried(pattern: Pattern, k: int) -> tuple[torch.Tensor, ...]:
    """The tensors of message `k`, which any rank can tell."""
    dice = random.Random(pattern.seed * 100_003 + k)
    return tuple(
        numbers((dice.choice(SIZES[: pattern.most]),), dice.choice(DTYPES), dice.randrange(2**31))
        for _ in range(dice.randrange(1, 4))
    )


def exchange(rank: int, pattern: Pattern):
    """This rank's part: it starts in the common order, and waits when it likes.

    Every message's half is started before any of a later message's, so if nobody waits for a later
    message before an earlier one has been started, all can go on. With `early` all receives are
    posted first.
    """
    mine = random.Random(pattern.seed * 1000 + rank)
    flying = []
    ordered = list(enumerate(pattern.messages))
    if pattern.early:
        ordered.sort(key=lambda each: each[1][1] != rank)
    for k, (source, to) in ordered:
        if rank not in (source, to):
            continue
        tensors, pair = carried(pattern, k), Group("pipeline", (source, to))
        if rank == source:
            flying.append(((yield Start("send", pair, tensors, label=f"m {k}")), ()))
        else:
            kinds = tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)
            start = Start("recv", pair, shapes=kinds[0], dtypes=kinds[1], label=f"m {k}")
            flying.append(((yield start), tensors))
        while flying and not pattern.early and mine.random() < 0.5:
            yield from _finish(flying, mine)
        if pattern.early and rank == source and mine.random() < 0.5:
            yield Wait(flying.pop()[0])
    while flying:
        yield from _finish(flying, mine)


def _finish(flying, mine):
    handle, want = flying.pop(mine.randrange(len(flying)))
    got = yield Wait(handle)
    assert same(got, want), handle.request.label
