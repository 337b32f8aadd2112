"""Precision by module: which ops run in what, what comes in and goes out, what is kept in bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.comm.torchdist import TorchDist
from meshwright.compile.init import blueprint
from meshwright.compile.region import Precision, precisely, precision_of, shorten
from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from meshwright.plan.toml import from_toml
from meshwright.run.equality.verify import Trial, try_local
from meshwright.run.prepare import prepare
from meshwright.run.session import open_session
from tests.run.jobs import adamw, alone, fresh, job, losses

BF16, FP16, FLOAT = torch.bfloat16, torch.float16, torch.float32


class Tower(nn.Module):
    """An embedding that is the head too, two blocks with norms, and a scale of its own."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.token.weight
        self.temperature = nn.Parameter(torch.ones(8))

    def forward(self, ids):
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x) * self.temperature)


class Block(nn.Module):
    """A norm and two linears around a residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x, *, scale=1.0):
        return x + self.down(F.gelu(self.up(self.norm(x)))) * scale


def plan(base="float32", **modules):
    return Plan(data=1, precision=base, precisions=tuple(modules.items()))


def seen(base, modules, model=None):
    """The dtype of every module's output, by path, in a forward and backward."""
    model = model or Tower()
    made = precision_of(replace(plan(base), precisions=tuple(modules.items())), named(model))
    found, handles = {}, []
    for path, part in model.named_modules():
        take = lambda _m, _a, out, path=path: found.update({path: out.dtype})  # noqa: E731
        handles.append(part.register_forward_hook(take))
    with precisely(made, model):
        out = model(torch.arange(4)[None])
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")
    for handle in handles:
        handle.remove()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    return found


def named(model):
    return blueprint(lambda: model, 0)


def test_a_module_computes_in_its_own_precision():
    found = seen("bf16", {"*norm": "float32", "head": "float32"})
    assert found["blocks.0.norm"] == found["norm"] == found["head"] == FLOAT
    assert found["blocks.0.up"] == found["blocks.1.down"] == BF16


def test_what_is_within_a_module_is_meant_too_and_a_later_pattern_holds():
    found = seen("bf16", {"blocks.*": "float32", "blocks.1.up": "fp16"})
    assert found["blocks.0.up"] == found["blocks.1.down"] == FLOAT
    assert found["blocks.1.up"] == FP16
    assert found["head"] == BF16
    assert seen("bf16", {"blocks.1.up": "fp16", "blocks.*": "float32"})["blocks.1.up"] == FLOAT


def test_a_named_module_speaks_for_those_inside():
    found = seen("bf16", {"blocks.0": "float32"})
    assert found["blocks.0.up"] == found["blocks.0.down"] == FLOAT
    assert found["blocks.1.up"] == BF16


def test_in_float32_a_short_module_gives_float32_to_the_rest():
    found = seen("float32", {"blocks.0": "bf16", "head": "fp16"})
    assert found["blocks.0.up"] == BF16
    assert found["blocks.0"] == found["blocks.1.up"] == FLOAT
    assert found["head"] == FP16


def test_a_tied_weight_is_cast_to_what_each_reader_computes_in():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(torch.ones(2, 4))) + x.sum()

    found = seen("bf16", {"two": "fp16"}, Twice())
    assert (found["one"], found["two"]) == (BF16, FP16)


def test_a_forward_that_raises_leaves_no_region():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x)

    model = Raises()
    made = precision_of(plan("float32", inner="bf16"), named(model))
    with pytest.raises(RuntimeError), precisely(made, model):
        model(torch.ones(3, 5))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("blocks.*.nrom", "precision 'blocks.*.nrom' matches no module; did you mean"),
        ("head.weight", "'head.weight' is a parameter; name its module, 'head'"),
        ("", "precisions takes printable names"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, words):
    with pytest.raises(PlanError) as caught:
        precision_of(Plan(data=1, precisions=((pattern, "bf16"),)), named(Tower()))
    assert words in str(caught.value)


def test_a_model_without_modules_has_none_to_name():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

    with pytest.raises(PlanError, match="the model has no submodules"):
        precision_of(plan(w="bf16"), named(Bare()))


def stored(base="bf16-pure", model=Tower, **modules):
    return precision_of(plan(base, **modules), blueprint(model, 0)).stored


def test_pure_stores_all_but_what_is_named():
    everything = {n for n, _ in Tower().named_parameters()}
    assert stored() == everything
    assert stored(norm="float32") == everything - {"norm.weight", "norm.bias"}
    # Tied to what is named: one tensor is kept in one dtype.
    assert stored(head="float32") == everything - {"token.weight"}
    assert stored(**{"blocks.0": "bf16"}) == {n for n in everything if "blocks.0." not in n}
    assert stored("bf16") == frozenset()


def test_batch_norm_keeps_float32_as_torch_has_no_other():
    made = stored(model=lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LayerNorm(3)))
    assert made == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_stored_parameters_are_made_as_the_factory_makes_them_and_cast():
    model = blueprint(Tower, 0)
    real = fresh(job(model=Tower))
    shorten(
        model, frozenset({"head.weight", "token.weight", "norm.weight"} & set(model.parameters))
    )
    for name, parameter in real.named_parameters():
        kept = name in ("token.weight", "norm.weight")
        assert model.parameters[name].dtype == (BF16 if kept else FLOAT)
        assert torch.equal(model.make(model.parameters[name]), parameter.detach())
    assert model.module.head.weight is model.module.token.weight


def token_job(**changes):
    ids = torch.randint(0, 16, (48, 6), generator=torch.Generator().manual_seed(2))
    data = torch.utils.data.TensorDataset(ids)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    return job(**({"model": Tower, "loss": loss, "data": lambda: data, "batch_size": 16} | changes))


def dtypes(program, op):
    """Module -> dtype of what its forward ops of a kind make."""
    return {
        o.module: program.values[o.results[0]].dtype
        for o in program.ops
        if o.base == op and o.phase == "forward"
    }


def test_a_program_has_the_casts():
    asked = replace(plan("bf16"), precisions=(("*norm", "float32"), ("blocks.1", "fp16")))
    session = alone(token_job())
    build = prepare(session.job, asked, 1)
    program = build.unit(session.take().micros[0]).program
    norms = {"blocks.0.norm": "float32", "blocks.1.norm": "float32", "norm": "float32"}
    assert dtypes(program, "aten.native_layer_norm") == norms
    linear = dtypes(program, "aten.addmm")
    assert linear["blocks.0.up"] == "bfloat16"
    assert linear["blocks.1.up"] == linear["blocks.1.down"] == "float16"
    assert build.precision.scales


def eager_losses(made, asked, steps):
    session = alone(made)
    model = fresh(made)
    precision = precision_of(asked, named(fresh(made)))
    optimizer, found = made.optimizer(model), []
    for at in range(steps):
        batch = session.worker.source.fetch(at, 0, made.batch_size, (0, made.batch_size)).tree
        with precisely(precision, model):
            loss = made.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_both_doors_and_a_plain_loop_agree():
    made = token_job(optimizer=adamw)
    text = 'precision = "bf16"\ndata = 1\n[precisions]\n"*norm" = "float32"\nhead = "float32"\n'
    asked = from_toml(text)
    wanted = eager_losses(made, asked, 4)
    for eager in (False, True):
        assert losses(open_session(made, asked, TorchDist(), eager=eager), 4) == wanted
    assert losses(alone(made, "data=1,precision=bf16"), 4) != wanted


@pytest.mark.parametrize(
    "base", ["bf16-pure", *(pytest.param(b, marks=pytest.mark.matrix) for b in ("bf16", "fp16"))]
)
def test_a_plan_with_exceptions_is_one_device(base):
    asked = Plan(
        data=2, zero=3, precision=base, precisions=(("*norm", "float32"), ("head", "float32"))
    )
    for dtype in ("float64", "float32"):
        outcome = try_local(Trial.of(token_job(clip_norm=0.5), asked, 2, dtype), 2)
        assert outcome["passed"], outcome


def test_precisions_are_part_of_what_is_traced():
    session = alone(token_job())
    micro = session.take().micros[0]
    build = prepare(session.job, plan("bf16"), 1)
    build.units = units = {}
    build.unit(micro)
    other = prepare(session.job, plan("bf16", norm="float32"), 1, units=units)
    other.unit(micro)
    assert len(units) == 2


def test_the_default_computes_in_nothing_short():
    assert not Precision().short
    assert not Precision().scales
    assert Precision("float32", (("a", "fp16"),)).scales
    assert not Precision("bf16", (("a", "float32"),)).scales
