"""A DeepSpeed script as a rank runs it: reads its configuration, writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from meshwright.compat import deepspeed

SAMPLES, WIDTH, CLASSES = 48, 12, 3


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, CLASSES)
    ).double()


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (SAMPLES,), generator=generator))


def main(config: str, folder: str, epochs: int) -> None:
    model = network()
    if deepspeed.comm.get_rank():
        with torch.no_grad():  # the first rank's weights are everybody's
            for parameter in model.parameters():
                parameter.add_(1)
    engine, _, loader, _ = deepspeed.initialize(
        model=model, config=config, training_data=samples(), model_parameters=model.parameters()
    )
    criterion, losses, early, right = nn.CrossEntropyLoss(), [], [], []
    for _ in range(epochs):
        for x, y in loader:
            outputs = engine(x)
            loss = criterion(outputs, y)
            engine.backward(loss)
            if engine.global_rank == 0 and engine.micro_steps % 3 == 0:
                early.append((engine.micro_steps, loss.item()))
            engine.step()
            if engine.micro_steps % engine.gradient_accumulation_steps() == 0:
                losses.append(loss.item())
                if engine.global_rank == 0:
                    right.append(int((outputs.argmax(1) == y).sum()))
    engine.save_checkpoint(folder, tag="end", client_state={"epochs": epochs})
    module = engine.eval().module
    with torch.no_grad():
        seen = criterion(engine(samples().tensors[0]), samples().tensors[1]).item()
    if engine.global_rank == 0:
        out = Path(folder)
        save_file(dict(module.state_dict()), out / "weights.safetensors")
        (out / "found.json").write_text(
            json.dumps({"losses": losses, "early": early, "right": right, "seen": seen})
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
