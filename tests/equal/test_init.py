"""Any tensor of a model can be made alone, the same to the bit as in the factory's own run."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from torch import nn

from meshwright import Job
from meshwright.compile.init import blueprint, seeded
from meshwright.run.part import part_of
from meshwright.run.worker import initial_state
from tests.equal.cells import MODELS
from tests.equal.harness import Case
from tests.equal.live import Live
from tests.equal.odd import ODD, Mixed, Plain, adamw, classify

SEED = 3
PLANS = ["data=2", "zero1,data=3", "zero2,data=4", "zero3,data=2", "zero3,data=3"]


class Drawn(nn.Module):
    """A parameter by each of torch's initialisers."""

    def __init__(self):
        super().__init__()
        makers = {
            "uniform": nn.init.uniform_,
            "normal": nn.init.normal_,
            "cut": nn.init.trunc_normal_,
            "cut off centre": lambda t: nn.init.trunc_normal_(t, mean=1.0, std=2.0, a=0.0, b=1.5),
            "xavier": nn.init.xavier_normal_,
            "kaiming": nn.init.kaiming_uniform_,
            "orthogonal": nn.init.orthogonal_,
            "sparse": lambda t: nn.init.sparse_(t, 0.3),
            "eye": nn.init.eye_,
            "constant": lambda t: nn.init.constant_(t, 2.5),
        }
        self.made = nn.ParameterDict()
        for name, make in makers.items():
            self.made[name] = nn.Parameter(torch.empty(24, 16))
            make(self.made[name])
        self.short = nn.Parameter(torch.randn(8, 8).to(torch.bfloat16))
        nn.init.trunc_normal_(self.short, std=0.02)
        self.scaled = nn.Parameter(self.made["normal"].detach()[:4] * 3 + torch.rand(4, 16))
        self.register_buffer("order", torch.randperm(9))
        self.register_buffer("table", torch.arange(6).float().exp())
        self.picked = torch.multinomial(torch.ones(10), 4)


FACTORIES = {
    "initialisers": lambda _: Drawn(),
    **{name: lambda folder, make=make: make(folder).model() for name, make in MODELS.items()},
    **{name: lambda _, make=make: make().model() for name, make in ODD.items()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the tiny model of examples/finetune.py, which is saved as its library does."""
    made = tmp_path_factory.mktemp("init")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # safetensors reads a storage's old name
        MODELS["finetune"](made)
    return made


@pytest.mark.parametrize("name", FACTORIES)
def test_each_tensor_made_alone_is_the_factorys_own(name, folder):
    def factory():
        return FACTORIES[name](folder)

    plan = blueprint(factory, SEED)
    with seeded(SEED):
        module = factory()
    assert not plan.notes  # it was recorded, not built
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    wanted = {**plan.parameters, **plan.buffers}
    assert set(own) == set(wanted)
    for tensor_name, fake in reversed(wanted.items()):  # in another order than they were drawn
        made = plan.make(fake)
        assert made.dtype == own[tensor_name].dtype
        assert torch.equal(made, own[tensor_name]), tensor_name


def test_a_truncated_normal_is_one():
    with seeded(SEED):
        drawn = nn.init.trunc_normal_(torch.empty(200_000), mean=0.5, std=2.0, a=-1.0, b=3.0)
    centred = (drawn - 0.5) / 2
    inside = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([-0.75, 0.0, 0.5, 1.25]))
    low, middle, upper, high = inside.tolist()
    assert drawn.min() >= -1
    assert drawn.max() <= 3
    for bound, wanted in ((0.0, middle), (0.5, upper)):
        share = (centred < bound).float().mean().item()
        assert share == pytest.approx((wanted - low) / (high - low), abs=5e-3)


def test_different_seeds_and_tensors_differ():
    plain = blueprint(Plain, SEED)
    other = blueprint(Plain, SEED + 1)
    first, second = (b.make(b.parameters["up.weight"]) for b in (plain, other))
    assert not torch.equal(first, second)
    with seeded(SEED):
        one, two = torch.rand(50), torch.rand(50)
    assert not torch.equal(one, two)


def test_a_factory_that_reads_values_is_built_once_and_said_so():
    def factory():
        made = Plain()
        if made.up.weight.sum().item() > 1e9:
            raise AssertionError
        return made

    plan = blueprint(factory, SEED)
    with seeded(SEED):
        own = factory()
    assert "reads tensor values" in plan.notes[0]
    assert torch.equal(plan.make(plan.parameters["up.weight"]), own.up.weight)


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_hold_their_part_of_the_same_model_under_every_plan(plan):
    case = Case(Job(lambda: Plain(nn.Linear(32, 32)), classify("x"), adamw, Mixed, 12, seed=SEED))
    build = case.build(plan, None)
    with seeded(SEED):
        own = case.job.model()
    for rank in range(build.plan.ranks):
        state = initial_state(build, rank)
        for name, tensor in own.named_parameters():
            layout, where = build.states[name].weights, (build.axes, build.place(rank).coordinates)
            assert torch.equal(state.values[f"model/{name}"], part_of(tensor, layout, *where))


class Deep(nn.Module):
    """Many equal layers and one large one."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(4096, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(64))
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)


@cache
def deep():
    job = Job(Deep, classify("x"), adamw, Mixed, 12, seed=SEED)
    return Case(job)


@pytest.mark.parametrize("plan", ["data=2", "zero3,data=2", "zero3,data=8"])
def test_making_a_ranks_shards_peaks_at_them_and_the_largest_tensor(plan):
    build = deep().build(plan, None)
    with Live() as live:
        state = initial_state(build, 0)
    shards = sum(t.nbytes for t in state.values.values())
    largest = max(p.numel() * p.element_size() for p in build.model.parameters.values())
    assert live.now >= shards  # the counter sees them
    # 4 bytes a number: a block of those being drawn, and what the last tensor's freeing lags by.
    assert live.peak <= shards + largest + 2 * 4 * 2**16
