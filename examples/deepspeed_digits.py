"""A DeepSpeed script of the usual shape: ZeRO-3 with offload, and only its import changed.

    mw launch -n 2 -- python examples/deepspeed_digits.py \
        --deepspeed_config examples/deepspeed_digits.json

With `import deepspeed` in place of the import below, DeepSpeed's own launcher runs the same file.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from meshwright.compat import deepspeed


class Net(nn.Module):
    """[B, 1, 8, 8] images in 0..1 -> [B, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images and labels to train on, and those held out."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    targets = torch.from_numpy(labels).long()
    held_out = torch.arange(len(targets)) % 5 == 0
    return (
        TensorDataset(pixels[~held_out], targets[~held_out]),
        TensorDataset(pixels[held_out], targets[held_out]),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="handwritten digits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by launchers")
    parser.add_argument("--checkpoints", default="")
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    training, held_out = digits()

    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=parameters, training_data=training
    )
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        total = 0.0
        for batch in loader:
            images, labels = batch[0].to(engine.device), batch[1].to(engine.device)
            outputs = engine(images)
            loss = criterion(outputs, labels)
            engine.backward(loss)
            engine.step()
            if engine.micro_steps % engine.gradient_accumulation_steps() == 0:
                total += loss.item()
        if engine.global_rank == 0:
            steps = len(loader) // engine.gradient_accumulation_steps()
            print(f"epoch {epoch}: loss {total / steps:.3f}", flush=True)
        if args.checkpoints:
            engine.save_checkpoint(args.checkpoints, client_state={"epoch": epoch})

    engine.eval()
    with torch.no_grad():
        images, labels = held_out.tensors
        right = (engine(images).argmax(1) == labels).float().mean().item()
    if engine.global_rank == 0:
        print(f"held out: {right:.1%} right", flush=True)


if __name__ == "__main__":
    main()
