"""Jobs whose accounts are known: a GPT, an op without a rule, operands that lie differently."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import meshwright as mw
from meshwright import Job
from meshwright.plan.plan import Plan
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare
from tests.equal.cells import example

BATCH, ROWS, WIDTH = 8, 4, 32


@torch.library.custom_op("accounted::scan", mutates_args=())
def scan(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Running sums of rows, scaled."""
    return torch.cumsum(x, 1) * d


@scan.register_fake
def _(x, d):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    x, d = ctx.saved_tensors
    back = torch.flip(torch.cumsum(torch.flip(gradient * d, (1,)), 1), (1,))
    return back, (gradient * torch.cumsum(x, 1)).sum((0, 1))


scan.register_autograd(_backward, setup_context=_save)


class Layer(nn.Module):
    """Two linears around a scan."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x + self.down(torch.ops.accounted.scan(F.gelu(self.up(x)), self.decay))


class Scans(nn.Module):
    """Two layers with an op that no rule knows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum(-1)


class Torn(nn.Module):
    """A product of values that are annotated differently, or alike."""

    def __init__(self, alike):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.other = (None, "tensor", None) if alike else (None, None, "tensor")

    def forward(self, x):
        large = mw.annotate(torch.cat([x * 2, x], 1), None, "tensor", None)
        small = mw.annotate(torch.cat([x, x * 3], 1), *self.other)
        return (large * small * self.scale).sum(-1)


def regression(model):
    data = torch.randn(40, ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
    return Job(
        model=model,
        loss=lambda m, batch: m(batch[0]).square().mean(),
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        data=lambda: TensorDataset(data),
        batch_size=BATCH,
    )


scans = cache(lambda: regression(Scans))
torn = cache(lambda alike=False: regression(lambda: Torn(alike)))


@cache
def gpt(depth=3):
    return example("gpt").job(depth=depth, width=64, context=16, batch=8)


@cache
def laid(job, text):
    """(rank 0's compiled list, the axes) of a job under a plan."""
    plan = Plan.parse(text)
    build = prepare(job, plan, plan.ranks)
    return build.lowered(0, first_micros(build)).compiled, build.axes
