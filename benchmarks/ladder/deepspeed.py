"""The ladder's GPT under DeepSpeed: its ZeRO-3, offload and activation checkpointing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed as ds
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import models
from benchmarks.contestants.torch_loop import Step
from benchmarks.ladder.rungs import RANKS, ROWS, RUNGS, Rung, Trial, shape_of, tokens


class Again(nn.Module):
    """A layer whose activations are computed again in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        return checkpoint(self.layer, x_BTD, use_reentrant=False)


def told(rung: Rung, folder: str) -> dict[str, Any]:
    """Its JSON."""
    zero = json.loads(json.dumps(dict(rung.zero)).replace("FOLDER", folder))
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if "offload_optimizer" in zero:  # its own AdamW steps on the host
        found["optimizer"] = {"type": "AdamW", "params": {"lr": models.LR}}
    return found


@contextmanager
def opened(trial: Trial) -> Iterator[Step]:
    """Its engine over gloo; under ZeRO-3 the model is sharded as it is built."""
    torch.set_num_threads(1)
    ds.init_distributed("gloo")
    rung = RUNGS[trial.rung]
    config = told(rung, trial.folder)
    with ds.zero.Init(config_dict_or_path=config, enabled=rung.zero["stage"] == 3):
        model = models.of(shape_of(trial.width))
    if rung.again:
        first, *blocks, last = model
        model = nn.Sequential(first, *map(Again, blocks), last)
    theirs = None if "optimizer" in config else models.optimizer(model.parameters())
    engine, *_ = ds.initialize(model=model, optimizer=theirs, config=config)
    mine = [tuple(t.chunk(RANKS)[trial.rank].contiguous() for t in both) for both in tokens()]
    feed = itertools.cycle(mine)

    def step() -> float:
        ids, targets = next(feed)
        loss = models.loss(engine(ids), targets)
        engine.backward(loss)
        engine.step()
        return loss.item()

    yield step
