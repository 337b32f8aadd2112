"""Tiny jobs for the tests of sessions: quick to trace, with a plain torch loop to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from meshwright.comm.torchdist import TorchDist
from meshwright.compile.init import seeded
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.run.data.samples import open_source
from meshwright.run.session import Record, Session, open_session
from tests.run.crew import crew

IN, HIDDEN, OUT = 8, 40, 3


class Net(nn.Module):
    """Two linears: [B, IN] -> [B, OUT]; the first weight is large enough to be sharded."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN)
        self.middle = middle or nn.Identity()
        self.down = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(torch.tanh(self.up(x))))


class Points(Dataset[dict[str, Tensor]]):
    """Vectors `x`, labels `y`, and `w`: whether a sample counts."""

    def __init__(self, count: int = 50, seed: int = 5) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, IN, generator=g)
        self.y = torch.randint(0, OUT, (count,), generator=g)
        self.w = (torch.rand(count, generator=g) < 0.7).float()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index], "w": self.w[index]}


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def weighted_loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """(sum, weight, metrics) over the samples that count."""
    logits = model(batch["x"])
    each = F.cross_entropy(logits, batch["y"], reduction="none")
    right = ((logits.argmax(-1) == batch["y"]) * batch["w"]).sum()
    total = batch["w"].sum()
    return (each * batch["w"]).sum(), total, {"accuracy": (right, total), "spread": logits.std()}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def job(**changes: Any) -> Job:
    """A job on `Points`."""
    settings: dict[str, Any] = {
        "model": Net, "loss": mean_loss, "optimizer": adamw, "data": Points, "batch_size": 12,
    } | changes  # fmt: skip
    return Job(**settings)


_TRACED: dict[int, tuple[Job, dict[Any, Any]]] = {}


def opened(made: Job, plan: str, comm: Any, **how: Any) -> Session:
    """A session; what is traced for one serves all sessions of the job."""
    session = open_session(made, Plan.parse(plan), comm, **how)
    _, session.build.units = _TRACED.setdefault(id(made), (made, session.build.units))
    return session


def alone(made: Job, plan: str = "data=1", **how: Any) -> Session:
    """A session of a world of one."""
    return opened(made, plan, TorchDist(), **how)


def on_ranks(made: Job, plan: str, body: Callable[[Session], Any], **how: Any) -> list[Any]:
    """`body(session)` on every rank of the plan; their results."""

    def rank(comm: Any) -> Any:
        session = opened(made, plan, comm, **how)
        try:
            return body(session)
        finally:
            session.close()

    return crew(Plan.parse(plan).ranks, rank)


def fresh(made: Job) -> nn.Module:
    """The model as a run begins with it."""
    with seeded(made.seed):
        model: nn.Module = made.model()
        return model


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], to: float = 1e-5) -> None:
    """The same names, and values to rounding."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=to, atol=to)


def step(
    session: Session, batch: Any = None, *, local: bool = False, until: int | None = None
) -> Record:
    """One step; its record."""
    return session.run_step(batch, local=local, until=until)


def losses(session: Session, steps: int) -> list[float]:
    """The losses of the next `steps` steps."""
    return [step(session).metrics.loss for _ in range(steps)]


def weights(session: Session) -> dict[str, Tensor]:
    """Every parameter and buffer whole; on rank 0 only."""
    model = session.module()
    return {} if model is None else {n: t.detach().clone() for n, t in model.state_dict().items()}


def torch_loop(
    made: Job, model: nn.Module, steps: int, *, clip: float | None = None
) -> Iterator[float]:
    """What a user would write for one device: the losses of its steps."""
    source = open_source(made.data(), batch_size=made.batch_size, seed=made.seed)
    optimizer = made.optimizer(model)
    schedule = made.schedule(optimizer) if made.schedule is not None else None
    for step in range(steps):
        found = made.loss(model, source.fetch(step, 0, made.batch_size, (0, made.batch_size)).tree)
        loss = found[0] / found[1] if isinstance(found, tuple) else found
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if schedule is not None:
            schedule.step()
        yield float(loss.detach())
