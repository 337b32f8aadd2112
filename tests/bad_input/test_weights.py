"""Weights to start from whose names or shapes are others, or whose files are damaged."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

GOOD = {
    "first.weight": (8, 4),
    "first.bias": (8,),
    "last.weight": (1, 8),
    "last.bias": (1,),
}


@pytest.fixture
def given(folder):
    """Write weights of these names and shapes."""

    def write(shapes):
        (folder / "given").mkdir(exist_ok=True)
        tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
        save_file(tensors, folder / "given" / "model.safetensors")

    return write


def test_weights_that_fit(train, given):
    given(GOOD)
    train(weights="'given'").works("step 3/3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"last.bias": None}, ("the weights lack last.bias",)),
        (dict.fromkeys(GOOD) | {"decoder.bias": (1,)}, ("lack first.weight", "last.bias")),
        (
            {"first.weight": (9, 4)},
            ("first.weight has shape (8, 4) in the model but (9, 4) in the weights",),
        ),
        (
            {"last.bias": None, "first.weight": (9, 4)},
            ("the weights lack last.bias", "first.weight has shape (8, 4)"),
        ),
    ],
    ids=["missing", "names", "shape", "both"],
)
def test_weights_of_another_model(train, given, change, words):
    given({name: shape for name, shape in (GOOD | change).items() if shape is not None})
    train(weights="'given'").fails(74, "given does not fit the model", *words, "other weights")


def test_weights_that_the_model_does_not_use_are_listed(train, given):
    given(GOOD | {"head.weight": (2, 2)})
    train(weights="'given'").works("given has head.weight, which the model does not use")


def test_layers_that_the_model_lacks(train, given):
    layers = {f"{k}.{kind}": shape for k in (0, 1, 2)
              for kind, shape in (("weight", (4, 4)), ("bias", (4,)))}  # fmt: skip
    given(layers)
    model = "lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))"
    train(weights="'given'", model=model).fails(74, "the model has no 2.bias", "2.weight")


TIED = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.first(x))).sum(1, keepdim=True)
"""


def test_tied_weights_are_read_once_and_listed_where_they_lack(train, given):
    given({"first.weight": (4, 4), "first.bias": (4,), "last.bias": (4,)})
    train(weights="'given'", extra=TIED).works("step 3/3")
    given({"first.bias": (4,), "last.bias": (4,)})
    train(weights="'given'", extra=TIED).fails(
        74, "lack first.weight", "last.weight is tied to first.weight"
    )


def test_weights_that_are_not_there(train):
    train(weights="'none'").fails(74, "weights none are not there", "a safetensors file or folder")


def test_a_folder_without_weights(train, folder):
    (folder / "empty").mkdir()
    train(weights="'empty'").fails(74, "empty", "safetensors")


def test_weights_cut_short(train, given, folder):
    given(GOOD)
    file = folder / "given" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    train(weights="'given'").fails(74, "model.safetensors")


def test_weights_as_a_pickle(train, folder):
    torch.save({"first.bias": torch.ones(8)}, folder / "model.pt")
    train(weights="'model.pt'").fails(74, "model.pt", "safetensors")
