"""Global values as ranks hold them, by a second definition of layouts; programs run on all ranks.

`held` splits index arrays with numpy instead of asking `layout.slab`, so that the tests compare two
independent readings of what a layout means.
"""

from __future__ import annotations

import itertools
from functools import lru_cache, reduce

import numpy as np
import torch
from hypothesis import strategies as st

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.compile.interpret import interpret
from meshwright.plan.mesh import Axis, Mesh, StageMesh
from meshwright.program.layout import REPLICATED, Layout, Partial, Shard
from meshwright.program.partition import partition
from meshwright.program.propagate import propagate

NAMES = ("data", "context", "tensor")
REDUCE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def axes_of(*sizes):
    """Axes named in mesh order."""
    return tuple(Axis(name, size) for name, size in zip(NAMES, sizes, strict=False))


def everywhere(axes):
    """Every rank's coordinates, in rank order."""
    stage = StageMesh(tuple(axes))
    return [stage.coordinates(rank) for rank in range(stage.size)]


def held(shape, layout, axes, coordinates):
    """Flat global indices of what the rank at `coordinates` holds, in the local shape."""
    return _held(tuple(shape), layout, tuple(axes), tuple(coordinates.items()))


@lru_cache(maxsize=10_000)
def _held(shape, layout, axes, place):
    coordinates = dict(place)
    picks = [np.arange(size) for size in shape]
    for shard in {p for _, p in layout.placements if isinstance(p, Shard)}:
        n = shape[shard.dim] // (shard.outer * shard.unit)
        mine = np.arange(n)
        for axis in axes:
            if layout.on(axis.name) == shard:
                mine = np.array_split(mine, axis.size)[coordinates[axis.name]]
        kept = picks[shard.dim]
        picks[shard.dim] = kept[np.isin(kept // shard.unit % n, mine)]
    whole = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    return np.asarray(whole[np.ix_(*picks)])


def part(tensor, layout, axes, coordinates):
    """What the rank at `coordinates` holds of `tensor`, owed reductions aside."""
    index = torch.from_numpy(held(tensor.shape, layout, axes, coordinates))
    return tensor.reshape(-1)[index]


def local_parts(tensor, layout, axes, seed=0):
    """What each rank holds: shards, and terms that reduce to the value where it is partial."""
    owing = [axis for axis in axes if isinstance(layout.on(axis.name), Partial)]
    terms = _terms(tensor, [axis.size for axis in owing], layout, seed)
    return [
        part(terms[tuple(here[axis.name] for axis in owing)], layout, axes, here)
        for here in everywhere(axes)
    ]


def _terms(tensor, sizes, layout, seed):
    places = list(itertools.product(*map(range, sizes)))
    if len(places) == 1:
        return dict.fromkeys(places, tensor)
    (how,) = {p.op for _, p in layout.placements if isinstance(p, Partial)}
    random = torch.Generator().manual_seed(seed)
    noise = [torch.randint(0, 9, tensor.shape, generator=random).to(tensor.dtype) for _ in places]
    if how == "sum":
        noise[0] = tensor - sum(noise[1:], torch.zeros_like(tensor))
        return dict(zip(places, noise, strict=True))
    sign = -1 if how == "max" else 1
    winner = torch.randint(0, len(places), tensor.shape, generator=random)
    return {
        place: torch.where(winner == k, tensor, tensor + sign * noise[k])
        for k, place in enumerate(places)
    }


def paid(parts, layout, axes):
    """Each rank's part with the owed reductions done, beside the index of what it is a part of."""
    owing = {axis.name: layout.on(axis.name).op for axis in axes if _partial(layout, axis)}
    ranks = everywhere(axes)
    for here in ranks:
        rest = {name: k for name, k in here.items() if name not in owing}
        group = [p for p, there in zip(parts, ranks, strict=True) if rest.items() <= there.items()]
        yield here, reduce(REDUCE[next(iter(owing.values()), "sum")], group)


def _partial(layout, axis):
    return isinstance(layout.on(axis.name), Partial)


def assert_holds(parts, tensor, layout, axes, tolerance=0.0):
    """The ranks' parts are those of `tensor` under `layout`."""
    for here, found in paid(parts, layout, axes):
        wanted = part(tensor, layout, axes, here)
        assert found.dtype == wanted.dtype, (found.dtype, wanted.dtype)
        assert found.shape == wanted.shape, (found.shape, wanted.shape, str(layout), here)
        torch.testing.assert_close(
            found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"{layout} {here}"
        )


def run_everywhere(program, axes, locals_, outputs=None, pinned=None, stored=None):
    """Complete, partition and interpret `program` on every rank.

    Returns the ranks' outputs, the layouts they have, and the ranks' programs.
    """
    completed = propagate(program, axes, pinned or {}, stored)
    mesh = Mesh((StageMesh(tuple(axes)),))
    cut = [partition(program, completed, axes, here, outputs or {}) for here in everywhere(axes)]
    exchanges = []
    for rank, (here, local) in enumerate(zip(everywhere(axes), cut, strict=True)):
        groups = {axis.name: Group(axis.name, mesh.group(rank, axis.name)) for axis in axes}
        given = locals_(completed.inputs, rank)
        for name, value in local.program.inputs:
            assert tuple(given[name].shape) == local.program.values[value].shape, name
        exchanges.append(interpret(local.program, given, here, groups, _checked(local.program)))
    layouts = {name: cut[0].origin[value][1] for name, value in cut[0].program.outputs}
    return run_local(exchanges), layouts, [local.program for local in cut]


def _checked(program):
    """Each value has the shape and dtype that the local program says."""

    def watch(number, op, values):
        for value in op.results:
            said, made = program.values[value], values[value]
            assert tuple(made.shape) == said.shape, (op, said.shape, made.shape)
            assert str(made.dtype) == f"torch.{said.dtype}", (op, said.dtype, made.dtype)

    return watch


def run_global(program, inputs):
    """The outputs of a global program on one device."""
    (found,) = run_local([interpret(program, inputs)])
    return found


def give(program, tensors, axes, seed=0):
    """A `locals_` for `run_everywhere`: the ranks' parts of global tensors."""

    def locals_(layouts, rank):
        return {
            name: local_parts(tensors[name], layout, axes, seed + k)[rank]
            for k, ((name, _), layout) in enumerate(zip(program.inputs, layouts, strict=True))
        }

    return locals_


# ── strategies ───────────────────────────────────────────────────────────────────────────────────


@st.composite
def meshes(draw, most=8):
    """One to three axes of two or three, at most `most` ranks."""
    sizes = draw(st.lists(st.integers(2, 3), min_size=1, max_size=3))
    while int(np.prod(sizes)) > most:
        sizes.pop()
    return axes_of(*sizes)


@st.composite
def factored(draw, rank=None, most=5):
    """(shape, shards that a layout may use): each dim a product of one to three factors."""
    shape, shards = [], []
    for dim in range(draw(st.integers(1, 3)) if rank is None else rank):
        factors = draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
        while int(np.prod(factors)) > 24:
            factors.pop()
        shape.append(int(np.prod(factors)))
        for k in range(len(factors)):
            outer, unit = int(np.prod(factors[:k])), int(np.prod(factors[k + 1 :]))
            shards.append(Shard(dim, outer, unit))
    return tuple(shape), tuple(dict.fromkeys(shards))


@st.composite
def layouts(draw, axes, shards, partial=None):
    """Any layout of these shards; partial (of one reduction) on any axis, if that is given."""
    choices = [None, *shards, *([Partial(partial)] if partial else [])]
    return Layout.of(axes, {axis.name: draw(st.sampled_from(choices)) for axis in axes})


__all__ = [
    "REPLICATED", "assert_holds", "axes_of", "everywhere", "factored", "give", "held", "layouts",
    "local_parts", "meshes", "paid", "part", "run_everywhere", "run_global",
]  # fmt: skip
