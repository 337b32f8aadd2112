"""DeepSpeed scripts on real ranks, against the same loop in plain PyTorch on one device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from meshwright.launch.local import launch
from meshwright.run.checkpoint.save import open_checkpoint
from tests.compat.script import network, samples

RANKS, EPOCHS = 2, 2
ADAMW = {"type": "AdamW", "params": {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}}
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "nvme"}
TUTORIAL = {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}


def eager(config):
    """The loop over the same global batches: losses, every rank 0's alone, weights, optimizer."""
    micro, parts = 4, config["gradient_accumulation_steps"]
    model, data = network(), samples()
    optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"]["params"])
    orders = [list(DistributedSampler(data, RANKS, rank)) for rank in range(RANKS)]
    steps = len(data) // RANKS // micro // parts
    losses, alone = [], []
    for _ in range(EPOCHS):
        for step in range(steps):
            total = 0.0
            for part in range(parts):
                at = (step * parts + part) * micro
                rows = [row for order in orders for row in order[at : at + micro]]
                x, y = (tensor[rows] for tensor in data.tensors)
                with torch.no_grad():
                    own = nn.functional.cross_entropy(model(x[:micro]), y[:micro])
                alone.append(own.item())
                loss = nn.functional.cross_entropy(model(x), y) / parts
                loss.backward()
                total += loss.item()
            if "gradient_clipping" in config:
                nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses, alone, model, optimizer


def run(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = [sys.executable, str(Path(__file__).with_name("script.py")), "ds.json", "ck"]
    status = launch(RANKS, [*command, str(EPOCHS)], run_dir=tmp_path / "run", timeout=60)
    assert status == 0
    return json.loads((tmp_path / "ck/found.json").read_text())


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def config_of(zero, parts=2, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": parts,
        "optimizer": ADAMW,
        "zero_optimization": zero,
        **more,
    }


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config_of(TUTORIAL, gradient_clipping=0.5), id="tutorial"),
        *(
            pytest.param(config, id=name, marks=pytest.mark.matrix)
            for name, config in {
                "stage 0": config_of({"stage": 0}, parts=1),
                "stage 1": config_of({"stage": 1, "offload_optimizer": CPU}),
                "stage 2": config_of({"stage": 2, "offload_optimizer": NVME}, parts=3),
                "stage 3": config_of({"stage": 3}, parts=1, gradient_clipping=0.1),
                "nvme": config_of({"stage": 3, "offload_optimizer": NVME, "offload_param": NVME}),
            }.items()
        ),
    ],
)
def test_a_script_equals_its_loop_on_one_device(tmp_path, monkeypatch, config):
    found = run(tmp_path, monkeypatch, config)
    losses, alone, model, optimizer = eager(config)
    assert found["losses"] == pytest.approx(losses, rel=1e-10)
    assert len(found["early"]) == -(-len(alone) // 3)
    for micro, loss in found["early"]:  # read by one rank, before the step
        assert loss == pytest.approx(alone[micro], rel=1e-10)
    assert len(found["right"]) == len(losses)
    weights = load_file(tmp_path / "ck/weights.safetensors")
    for name, parameter in model.named_parameters():
        close(weights[name], parameter.detach())
    (saved,) = (tmp_path / "ck/end").iterdir()
    with open_checkpoint(saved) as checkpoint:
        for name, parameter in model.named_parameters():
            for slot in ("exp_avg", "exp_avg_sq"):
                found_slot = checkpoint.read(f"optimizer/{slot}/{name}")
                close(found_slot, optimizer.state[parameter][slot])
    x, y = samples().tensors
    with torch.no_grad():
        assert found["seen"] == pytest.approx(
            nn.functional.cross_entropy(model(x), y).item(), 1e-10
        )
