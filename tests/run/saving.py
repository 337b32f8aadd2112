"""Saves and resumes over simulated ranks, for the tests of checkpoints."""

from __future__ import annotations

import torch

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.run.checkpoint.save import Piece, resume, save

HEAD = torch.arange(32.0).reshape(4, 8)


def save_all(root, step, ranks, meta=None, keep=3):
    """Save `ranks`, the pieces of each rank; the folder, on which all ranks agree."""
    group = Group.world(len(ranks))
    folders = run_local(
        [save(root, step, pieces, meta or {}, group, r, keep) for r, pieces in enumerate(ranks)]
    )
    assert len(set(folders)) == 1
    return folders[0]


def resume_all(root, size=2, at=None):
    group = Group.world(size)
    found = run_local([resume(root, group, rank, at) for rank in range(size)])
    assert all(one == found[0] for one in found)
    return found[0]


def rows(name, tensor, counts):
    """One piece a rank: `counts` rows of a tensor each."""
    starts = [sum(counts[:r]) for r in range(len(counts))]
    return [
        Piece(name, tuple(tensor.shape), (a, *[0] * (tensor.dim() - 1)), tensor[a : a + n])
        for a, n in zip(starts, counts, strict=True)
    ]


def two_ranks():
    """A matrix by rows; a vector and a scalar that both ranks hold, the first one writes."""
    return [
        [
            head,
            Piece("model/bias", (8,), (0,), torch.ones(8), primary=rank == 0),
            Piece("optimizer/step/head", (), (), torch.tensor(7), primary=rank == 0),
        ]
        for rank, head in enumerate(rows("model/head", HEAD, [2, 2]))
    ]
