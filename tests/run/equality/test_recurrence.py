"""The recurrences beside a handwritten one: a chain of matrices, its versions by explicit index."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from meshwright.compile.init import blueprint
from meshwright.job import Job
from meshwright.run.data.samples import open_source
from meshwright.run.equality.recurrence import Recurrence
from meshwright.schedule.pipedream import asynchronous_of

STEPS, BATCH, WIDTH, RATE = 20, 6, 4, 0.05
NAMES = ("pipedream", "pipedream-vertical", "pipedream-2bw")

Seen = Callable[[int, int], int]
"""(stage, minibatch) -> the minibatches that the weights it meets have taken in."""


class Chain(nn.Module):
    def __init__(self, stages: int) -> None:
        super().__init__()
        self.links = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(stages))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for link in self.links:
            x = torch.sin(link(x))
        return x


def samples() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(3)
    made = (torch.randn(48, WIDTH, generator=generator) for _ in range(2))
    return torch.utils.data.TensorDataset(*made)


def chain(stages: int) -> Job:
    return Job(
        model=lambda: Chain(stages),
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=RATE),
        data=samples,
        batch_size=BATCH,
    )


def recurrence(
    name: str, replicas: tuple[int, ...], microbatches: int = 1, drains: tuple[int, ...] = ()
) -> Recurrence:
    job = chain(len(replicas))
    return Recurrence(
        job,
        blueprint(job.model, job.seed),
        open_source(job.data(), batch_size=BATCH, seed=job.seed),
        microbatches,
        lambda _, __: (),
        torch.float64,
        pipe=asynchronous_of(name, replicas, microbatches),
        stages={f"links.{k}.weight": k for k in range(len(replicas))},
        drains=drains,
    )


def weights(found: Recurrence, step: int) -> list[np.ndarray]:
    tensors = found.after(step).weights
    return [tensors[f"model/links.{k}.weight"].numpy() for k in range(found.pipe.stages)]


def batches(found: Recurrence) -> list[tuple[np.ndarray, np.ndarray]]:
    source = open_source(samples(), batch_size=BATCH, seed=found.job.seed)
    trees = (source.fetch(t, 0, BATCH, (0, BATCH)).tree for t in range(STEPS))
    return [(x.double().numpy(), y.double().numpy()) for x, y in trees]


def gradient(
    forward: list[np.ndarray],
    backward: list[np.ndarray],
    batch: tuple[np.ndarray, np.ndarray],
) -> list[np.ndarray]:
    """Of mean squared error; stages may go back with other weights than forward."""
    x, y = batch
    inputs, sums = [x], []
    for matrix in forward:
        sums.append(inputs[-1] @ matrix.T)
        inputs.append(np.sin(sums[-1]))
    flow = 2 * (inputs[-1] - y) / y.size
    found = []
    for k in reversed(range(len(forward))):
        flow = flow * np.cos(sums[k])
        found.append(flow.T @ inputs[k])
        flow = flow @ backward[k]
    return found[::-1]


def by_hand(first: list[np.ndarray], data: list, seen: Seen, back: Seen) -> list[list[np.ndarray]]:
    """Every version of every stage's weights."""
    versions = [[matrix] for matrix in first]
    stages = range(len(first))
    for t in range(STEPS):
        forward = [versions[s][seen(s, t)] for s in stages]
        backward = [versions[s][back(s, t)] for s in stages]
        for s, found in enumerate(gradient(forward, backward, data[t])):
            versions[s].append(versions[s][t] - RATE * found)
    return versions


def indices(name: str, stages: int, base: Callable[[int], int] = lambda _: 0) -> Seen:
    """As the papers write them, stages counted from 0."""
    if name == "pipedream":
        return lambda s, t: max(base(t), t - (stages - 1 - s))
    delay = stages - 1 if name == "pipedream-vertical" else 1
    return lambda s, t: max(base(t), t - delay)


def first_of(found: Recurrence) -> list[np.ndarray]:
    return [p.detach().double().numpy().copy() for p in found.model.parameters()]


def furthest(found: Recurrence, versions: list[list[np.ndarray]]) -> float:
    worst = 0.0
    for t in range(STEPS):
        for s, matrix in enumerate(weights(found, t)):
            worst = max(worst, float(np.abs(matrix - versions[s][t + 1]).max()))
    return worst


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_written_by_hand_with_explicit_versions(name: str, stages: int):
    parts = max(2, stages - 1) if name == "pipedream-2bw" else 1
    found = recurrence(name, (1,) * stages, parts)
    seen = indices(name, stages)
    versions = by_hand(first_of(found), batches(found), seen, seen)
    assert furthest(found, versions) < 1e-13


# With two stages of one matrix each, the backward of the first needs no weights of its own.
@pytest.mark.parametrize(
    ("name", "stages"),
    [("pipedream", 3), ("pipedream", 4), *(("pipedream-vertical", n) for n in (2, 3, 4))],
)
def test_going_back_with_the_newest_weights_is_something_else(name: str, stages: int):
    found = recurrence(name, (1,) * stages)
    versions = by_hand(first_of(found), batches(found), indices(name, stages), lambda _, t: t)
    assert furthest(found, versions) > 1e-5


@pytest.mark.parametrize(("name", "delay"), [("pipedream-vertical", 3), ("pipedream-2bw", 1)])
def test_one_version_everywhere_is_serial_descent_with_a_delay(name: str, delay: int):
    found = recurrence(name, (1, 1, 1, 1), 3 if delay == 1 else 1)
    data, history = batches(found), [first_of(found)]
    for t in range(STEPS):
        old = history[max(0, t - delay)]
        steps = gradient(old, old, data[t])
        history.append([w - RATE * g for w, g in zip(history[t], steps, strict=True)])
    versions = [[each[s] for each in history] for s in range(4)]
    assert furthest(found, versions) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_after_a_drain_counting_begins_anew(name: str):
    found = recurrence(name, (1, 1, 1), 2 if name == "pipedream-2bw" else 1, drains=(5, 6, 13))
    seen = indices(name, 3, lambda t: max(d for d in (0, 5, 6, 13) if d <= t))
    versions = by_hand(first_of(found), batches(found), seen, seen)
    assert furthest(found, versions) < 1e-13


@pytest.mark.parametrize("drain", [None, 7])
def test_two_replicas_update_with_their_mean(drain: int | None):
    """Stage 0 on two ranks: pairs of minibatches meet weights of one pair before the last."""
    found = recurrence("pipedream", (2, 1), drains=() if drain is None else (drain,))
    data, first = batches(found), first_of(found)
    newest, last, base = first[0], [first[1]], 0
    pairs, owed = [newest], []  # versions of stage 0 by pair since the base, gradients that wait
    for t in range(STEPS):
        if t == drain:
            newest = newest - RATE * sum(owed) / len(owed)  # one of the pair has come
            pairs, owed, base = [newest], [], t
        old = [pairs[max(0, (t - base) // 2 - 1)], last[t]]
        steps = gradient(old, old, data[t])
        last.append(last[t] - RATE * steps[1])
        owed.append(steps[0])
        if len(owed) == 2:
            newest = newest - RATE * (owed[0] + owed[1]) / 2
            pairs.append(newest)
            owed = []
        got = weights(found, t)
        assert np.abs(got[0] - newest).max() < 1e-13
        assert np.abs(got[1] - last[t + 1]).max() < 1e-13
