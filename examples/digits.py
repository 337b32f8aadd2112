"""A small convolutional network with batch norm and dropout that reads handwritten digits.

    mw train examples/digits.py
    mw train examples/digits.py -n 2 --set normalize_over=16

The 1,797 images of 8 x 8 pixels come with scikit-learn; nothing is downloaded. Batch norm shares
its statistics over `normalize_over` samples (the whole batch unless told), however many devices
there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import meshwright as mw

HELD_OUT_EVERY = 5  # one image in five is never trained on


class Net(nn.Module):
    """[B, 1, 8, 8] images in 0..1 -> [B, 10] logits."""

    def __init__(self, width: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.head(self.dropout(x.flatten(1)))


def digits(*, held_out: bool) -> TensorDataset:
    """Pairs of an image [1, 8, 8] and its digit, int64."""
    images, labels = load_digits(return_X_y=True)
    keep = (torch.arange(len(labels)) % HELD_OUT_EVERY == 0) == held_out
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    return TensorDataset(pixels[keep], torch.from_numpy(labels).long()[keep])


def loss(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
    """Mean cross-entropy, and accuracy as (how many are right, how many there are)."""
    images, labels = batch
    logits = model(images)
    right = (logits.argmax(1) == labels).sum()
    return F.cross_entropy(logits, labels), {"accuracy": (right, len(labels))}


def job(
    width: int = 32,
    batch: int = 64,
    lr: float = 0.05,
    dropout: float = 0.25,
    epochs: int = 10,
    normalize_over: int | None = None,
    seed: int = 0,
) -> mw.Job:
    """The job; every parameter is a `--set` key."""
    return mw.Job(
        model=lambda: Net(width, dropout),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4
        ),
        data=lambda: digits(held_out=False),
        evaluation=lambda: digits(held_out=True),
        batch_size=batch,
        epochs=epochs,
        normalize_over=normalize_over,
        seed=seed,
    )


if __name__ == "__main__":
    mw.train(job())
