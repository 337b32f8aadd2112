"""Models and losses that cannot be traced, raise, or give no number."""

from __future__ import annotations

import json

import pytest

from tests.bad_input.conftest import step_losses

READS = """
class Model(Model):
    def forward(self, x):
        scale = 2.0 if {condition} else 1.0
        return super().forward(x) * scale
"""


@pytest.mark.parametrize("condition", ["x.sum().item() > 0", "x.sum() > 0", "float(x[0, 0]) > 0"])
def test_a_model_that_reads_values_is_told_its_line_and_trains_eagerly(train, folder, condition):
    extra = READS.format(condition=condition)
    said = train(extra=extra).fails(71, "NotTraceable", "reads a tensor's value", "--eager")
    assert f"in forward scale = 2.0 if {condition} else 1.0" in said
    train("--eager", "--run-dir", "run", extra=extra).works("step 3/3")
    losses = step_losses(folder / "run")
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_a_model_whose_shapes_depend_on_values(train):
    extra = """
    def loss(model, batch):
        error = model(batch["x"]) - batch["y"]
        return error[error != 0].square().sort()[0].sum()
    """
    said = train(extra=extra).fails(71, "a shape that depends on values", "--eager")
    assert "return error[error != 0].square().sort()[0].sum()" in said
    train("--eager", extra=extra).works("step 3/3")


def test_a_model_that_leaves_torch(train):
    extra = """
    class Model(Model):
        def forward(self, x):
            scale = float(x.numpy().max())
            return super().forward(x) * scale
    """
    said = train(extra=extra).fails(71, "NotTraceable", ".numpy()", "--eager")
    assert "scale = float(x.numpy().max())" in said
    train("--eager", extra=extra).works("step 3/3")


@pytest.mark.parametrize("op", ["unique(h)", "bincount(x[:, 0].long())"])
def test_ops_whose_results_are_of_any_size(train, op):
    extra = f"""
    class Model(Model):
        def forward(self, x):
            h = self.first(x)
            return self.last(h + torch.{op}.sum())
    """
    train(extra=extra).fails(71, "a shape that depends on values (torch.", f"torch.{op}.sum()")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("self.first.weight.mul_(0.99)", "writes to parameter first.weight"),
        ("w.data = w.data / 2", "sets .data of a tensor of shape [8, 4]; make a new tensor"),
        ("h.data = h.data.t().contiguous()", "sets .data of a tensor of shape [8, 8]"),
        ("w.grad = torch.ones(8, 4)", "sets .grad of a tensor of shape [8, 4]; put it into the"),
        ("h.mean().backward(retain_graph=True)", "runs a backward of its own; return a loss"),
        ("self.first.weight = nn.Parameter(w * 2)", "makes parameter weight of Linear"),
        ("self.extra = nn.Linear(8, 8)", "makes module extra of Model, with parameters"),
    ],
)
def test_writes_that_no_program_can_have_are_refused_with_their_line(train, line, words):
    """Eager code goes on with them; traced, they would be lost without a word."""
    grad = "torch.no_grad()" if "mul_" in line else "torch.enable_grad()"
    extra = f"""
    class Model(Model):
        def forward(self, x):
            h, w = torch.relu(self.first(x)), self.first.weight
            with {grad}:
                {line}
            return self.last(h)
    """
    train(extra=extra).fails(71, f"the forward {words}", "job.py:", "use --eager")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("torch.autograd.backward(h.mean(), retain_graph=True)", "first.weight a gradient"),
        ("self.first.bias.requires_grad_(False)", "sets requires_grad of parameter first.bias"),
    ],
)
def test_parameters_that_a_forward_leaves_changed(train, line, words):
    extra = f"""
    class Model(Model):
        def forward(self, x):
            h = torch.relu(self.first(x))
            {line}
            return self.last(h)
    """
    train(extra=extra).fails(71, words, "use --eager")


def test_modules_that_a_forward_uses_for_itself_are_its_own_business(train):
    extra = """
    class Model(Model):
        def forward(self, x):
            self.seen = nn.Identity()
            x = x.detach().requires_grad_()
            h = self.first(x)
            (gradient,) = torch.autograd.grad(h.sum(), x, create_graph=True)
            return self.last(nn.LayerNorm(8)(h) + gradient.square().sum())
    """
    train(extra=extra).works("step 3/3")


def test_a_forward_that_counts(train):
    extra = """
    class Model(Model):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls
    """
    train(extra=extra).fails(71, "changes calls from", "register_buffer", "--eager")


@pytest.mark.parametrize("how", [(), ("--eager",)], ids=["traced", "eager"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("(model(batch['x']) - batch['y']).square()", ("shape (8, 1)", "a scalar", "its mean")),
        ("None", ("the loss is NoneType", "return the loss")),
        ("3.0", ("the loss is float", "a scalar tensor")),
        ("model(batch['x']).sum().long()", ("the loss is torch.int64", "floating point")),
        ("batch['y'].mean()", ("does not depend on any parameter",)),
    ],
)
def test_a_loss_that_is_no_scalar_to_train_on(train, loss, words, how):
    train(*how, loss=f"lambda model, batch: {loss}").fails(71, *words)


@pytest.mark.parametrize("how", [(), ("--eager",)], ids=["traced", "eager"])
def test_a_loss_that_becomes_nan_keeps_the_last_checkpoint(train, mw, folder, how):
    extra = """
    def loss(model, batch):
        bad = (batch["x"][:, 0] == 13 / 64).any() & bool(int(os.environ.get("BAD", "1")))
        return torch.where(bad, float("nan"), (model(batch["x"]) - batch["y"]).square().mean())
    """
    words = ("--run-dir", "run", "--checkpoint-every", 1, *how)
    done = train(*words, extra=extra, steps="8")
    done.fails(71, "the loss is nan in step 4", "nothing of this step was applied", "nonfinite")
    assert len(step_losses(folder / "run")) == 3
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000002", "step-00000003"]
    good = extra.replace('float("nan")', "0.0")
    train(*words, extra=good, steps="8").works("resumed at step 3", "step 8/8")


def test_a_model_that_raises(train):
    said = train(model="lambda: Model(width=-1)").fails(71)
    assert "self.first, self.last = nn.Linear(4, width), nn.Linear(width, 1)" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("self.last(self.first(x)[:, :3])", ("must have same reduction dim", "[8, 3]")),
        ("self.lost(x)", ("no attribute 'lost'",)),
        ("self.last(self.first(x)).view(3, 3)", ("RuntimeError", "3, 3")),
    ],
)
def test_a_forward_that_raises(train, line, words):
    extra = f"""
    class Model(Model):
        def forward(self, x):
            return {line}
    """
    said = train(extra=extra).fails(71, "the model or loss raised", *words)
    assert f"in forward return {line}" in said


def test_a_loss_that_raises(train):
    said = train(loss="lambda model, batch: model(batch['z']).mean()").fails(71, "KeyError: 'z'")
    assert "in <lambda> loss=lambda model, batch: model(batch['z']).mean()" in said


def test_a_backward_that_cannot_be(train):
    extra = """
    class Model(Model):
        def forward(self, x):
            a = torch.sigmoid(self.first(x))
            b = self.last(a)
            a.add_(1)
            return b
    """
    train(extra=extra).fails(71, "backward of the loss raised", "modified by an inplace operation")


@pytest.mark.parametrize(
    ("ids", "labels", "at", "words"),
    [
        (9, 3, "self.last(self.table(x))", ("embedding in table", "index out of range")),
        (8, 4, "cross_entropy(", ("Target 3 is out of bounds",)),
    ],
)
def test_values_out_of_range_while_training(train, folder, ids, labels, at, words):
    extra = f"""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(8, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.table(x))

    class Data(Data):
        def __getitem__(self, index):
            return {{"x": torch.tensor(index % {ids}), "y": torch.tensor(index % {labels})}}

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])
    """
    train(extra=extra, steps="8").fails(71, "UserCodeError", "ids and labels", *words)
    (failing,) = [
        f"job.py:{number}:"
        for number, line in enumerate((folder / "job.py").read_text().splitlines(), 1)
        if at in line
    ]
    record = json.loads((folder / "runs/job-001/failures/rank0.json").read_text())
    assert failing in record["message"]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ({"model": "lambda: None"}, ("model() returned NoneType", "torch.nn.Module")),
        ({"model": "nn.ReLU"}, ("empty parameter list",)),
        ({"optimizer": "lambda model: None"}, ("optimizer(model) returned NoneType",)),
        ({"optimizer": "lambda model: model.none"}, ("no attribute 'none'", "job.py:")),
        (
            {"optimizer": "lambda model: torch.optim.SGD([torch.zeros(3)])"},
            ("holds a tensor of shape [3]", "no parameter of the model"),
        ),
        ({"optimizer": "lambda model: torch.optim.LBFGS(model.parameters())"}, ("LBFGS", "AdamW")),
        ({"schedule": "lambda optimizer: None"}, ("schedule", "NoneType")),
    ],
)
def test_factories_that_make_something_else(train, pieces, words):
    train(**pieces).fails(71, *words)


def test_more_memory_than_there_is(train):
    large = "lambda: nn.Sequential(nn.Linear(4, 10**13), nn.Linear(10**13, 1))"
    train(model=large).fails(72, "OutOfMemory: the model's state needs", "start more ranks")
    train("--plan", "data=1", model=large).fails(
        72, "OutOfMemory: plan data=1 needs", "TiB for weights and gradients", "split them"
    )
    loss = "lambda m, b: m(b['x']).mean() * torch.ones(10**13).sum()"
    said = train("--plan", "data=1", loss=loss).fails(72, "plan data=1 needs", "made by ones in")
    assert "job.py:" in said
