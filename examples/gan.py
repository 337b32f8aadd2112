"""A generative adversarial network: two losses in turn, each with its own optimizer.

    mw train examples/gan.py
    mw train examples/gan.py -n 2 --plan zero2

The critic learns to tell the 8 x 8 digits that come with scikit-learn from the generator's; the
generator learns to be taken for them. A step is one phase on the next batch: critic, generator,
critic, ... An average of the weights is kept beside them: the generator's makes the better images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import meshwright as mw

PIXELS = 64


class GAN(nn.Module):
    """Both networks; images are [B, 64] in -1..1."""

    def __init__(self, width: int = 128, latent: int = 16) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.Linear(latent, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, PIXELS),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            nn.Linear(PIXELS, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def made(self, count: int) -> Tensor:
        """[count, 64] images of the generator's.

        Noise comes from nowhere, so that ranks are told to share it: it has a row per sample.
        """
        noise = mw.annotate(torch.randn(count, self.latent), "data")
        return self.generator(noise)


def digits() -> TensorDataset:
    """Images [64] in -1..1, each in a tuple of its own."""
    images, _ = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(images).float() / 8 - 1)


def critic_loss(model: GAN, batch: tuple[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of real against made, and the share of real images taken for real."""
    (real,) = batch
    good, bad = model.critic(real), model.critic(model.made(len(real)).detach())
    loss = F.softplus(-good).mean() + F.softplus(bad).mean()
    return loss, {"real_seen": (good > 0).float().mean(), "made_seen": (bad < 0).float().mean()}


def generator_loss(model: GAN, batch: tuple[Tensor]) -> Tensor:
    """How far from real the critic takes the generator's images for (the non-saturating loss)."""
    return F.softplus(-model.critic(model.made(len(batch[0])))).mean()


def job(
    width: int = 128,
    latent: int = 16,
    batch: int = 64,
    lr: float = 1e-3,
    steps: int = 2000,
    seed: int = 0,
) -> mw.Job:
    """The job; every parameter is a `--set` key."""

    def adam(part: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.99))

    return mw.Job(
        model=lambda: GAN(width, latent),
        data=digits,
        batch_size=batch,
        phases={
            "critic": mw.Phase(
                critic_loss,
                parameters="critic.*",
                optimizer=lambda model: adam(model.critic),
            ),
            "generator": mw.Phase(
                generator_loss,
                parameters="generator.*",
                optimizer=lambda model: adam(model.generator),
            ),
        },
        ema=0.99,
        steps=steps,
        seed=seed,
    )


if __name__ == "__main__":
    mw.train(job())
