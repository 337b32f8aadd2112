"""What is computed again, how much that saves, and which values each policy keeps."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from meshwright import Job
from meshwright.predict.memory import live_bytes
from meshwright.program.keep import borders, full, selective
from meshwright.program.placing import forward_end
from meshwright.program.remat import Forward, rematerialised
from meshwright.run.form import first_micros
from tests.equal.cells import example
from tests.equal.harness import Case
from tests.program.chains import chain

WIDTH, TOKENS, BATCH, FLOAT = 16, 64, 4, 4
STREAM = WIDTH * TOKENS * BATCH * FLOAT
"""Bytes of what goes from block to block."""


class Scores(nn.Module):
    """Attention written out, as Korthikanti et al. count it: no bias of scores, no mask."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        weights = F.dropout(torch.softmax(q @ k.transpose(1, 2) / 4.0, -1), 0.1, self.training)
        x = x + self.out(weights @ v)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Stack(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Scores() for _ in range(depth))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x).square().mean()


@cache
def traced(depth):
    job = Job(
        lambda: Stack(depth),
        lambda model, batch: model(batch[0]),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda: TensorDataset(torch.zeros(BATCH, TOKENS, WIDTH)),
        BATCH,
    )
    case = Case(job)
    build = case.build("data=1", None)
    return build.unit(first_micros(build, case.data)[0]).program


def saved(program, policy=None):
    kept = None if policy is None else policy(program)
    return live_bytes(program if kept is None else rematerialised(program, kept).program)


def test_full_saves_what_goes_from_block_to_block():
    """Each more layer costs a boundary; at the peak one of them is there whole."""
    three, five, nine = (saved(traced(depth), full) for depth in (3, 5, 9))
    assert five[0] - three[0] == 2 * STREAM
    assert nine[0] - five[0] == 4 * STREAM
    assert nine[1] - five[1] == 4 * STREAM
    layer = (saved(traced(5))[0] - saved(traced(3))[0]) // 2
    assert five[1] < 6 * STREAM + 1.6 * layer


def test_selective_saves_the_closed_form():
    """10 sbh of a block: 1 in, 3 queries, keys, values, 1 attention, 1 residual, 4 hidden.

    Without it 5 of scores beside (softmax, dropout) and what norms and GELU make.
    """
    three, five = (saved(traced(depth), selective)[0] for depth in (3, 5))
    assert five - three == 2 * 10 * STREAM
    plain = (saved(traced(5))[0] - saved(traced(3))[0]) // 2
    scores = TOKENS * TOKENS * BATCH * FLOAT
    stats = 2 * 2 * TOKENS * BATCH * FLOAT
    assert plain - 10 * STREAM >= 2 * scores + (1 + 1 + 4) * STREAM + stats


def test_selective_repeats_no_product_with_weights():
    program = traced(3)
    forward = Forward.of(program)
    again = [program.ops[n] for n in forward.repeats(selective(program))]
    assert {op.base for op in again} >= {"aten.gelu", "aten._softmax", "aten.native_layer_norm"}
    assert not [op for op in again if op.base in ("aten.addmm", "aten.mm")]
    assert len([op for op in again if op.base == "aten.bmm"]) == 3


def test_repeats_stand_right_before_their_readers():
    """Of each block's own, nothing is there while another block's backward runs."""
    program = rematerialised(traced(5), full(traced(5))).program
    end = forward_end(program)
    modules = [
        op.module.split(".")[1] for op in program.ops[end:] if op.module.startswith("blocks")
    ]
    turns = [name for k, name in enumerate(modules) if not k or modules[k - 1] != name]
    assert turns == ["4", "3", "2", "1", "0"]


def test_nothing_is_repeated_twice_and_draws_keep_their_numbers():
    program = traced(3)
    repeats = rematerialised(program, full(program))
    again = [n for n, op in zip(repeats.numbers, repeats.program.ops, strict=True)
             if op.phase == "backward" and n < forward_end(program)]  # fmt: skip
    assert len(again) == len(set(again))
    drawn = [op.args[2] for op in repeats.program.ops if op.base == "meshwright.draw"]
    assert sorted(drawn) == [0, 0, 1, 1, 2, 2]


def test_values_that_are_kept_are_read_and_others_made_again():
    program = chain(0, 1, 2, 3)
    forward = Forward.of(program)
    for kept in ((), *[(value,) for value in forward.direct]):
        repeats = rematerialised(program, frozenset(kept))
        again = forward.repeats(kept)
        count = len(program.ops) + len(again)
        assert len(repeats.program.ops) == count
        originals = {v for op in repeats.program.ops[forward.end :] for v in op.inputs
                     if v in forward.makers and op.phase == "backward"}  # fmt: skip
        assert originals == set(kept) & set(forward.direct)


def test_what_no_backward_reads_is_done_once():
    """Running statistics, metrics."""
    case = Case(example("digits").job(width=8, batch=8))
    build = case.build("data=1", None)
    program = build.unit(first_micros(build, case.data)[0]).program
    repeats = rematerialised(program, frozenset())
    updates = {value for name, value in program.outputs if name.startswith("next/")}
    assert updates
    assert not updates & set(repeats.copies.values())
    assert repeats.program.outputs == program.outputs


@pytest.mark.parametrize("depth", [3, 5])
def test_blocks_begin_where_layers_do(depth):
    program = traced(depth)
    found = borders(Forward.of(program))
    begun = {program.ops[number].module.split(".")[1] for number in found[:-1]}
    assert program.ops[found[-1]].module == "last"
    assert begun == {str(layer) for layer in range(depth)}


def test_without_layers_segments_are_cut_where_little_crosses():
    program = chain(*range(16))
    forward = Forward.of(program)
    found = borders(forward)
    assert 2 <= len(found) <= 6
    plain, again = (
        live_bytes(p) for p in (program, rematerialised(program, full(program)).program)
    )
    assert again[0] < plain[0] / 2
    assert again[1] <= plain[1]  # weights and their gradients are as large
