"""A sample of the matrix with real processes over a real transport."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from meshwright.run.equality.measure import KINDS, LAW
from tests.laws.source import ROOT

pytestmark = [pytest.mark.mp, pytest.mark.slow, pytest.mark.timeout(240)]

GPT = ("examples/gpt.py", "depth=1", "width=32", "context=16", "batch=12", "dropout=0.1")
PIPED = ("tests/equal/pipelines.py:for_processes",)
DEEP = (GPT[0], "depth=2", *GPT[2:])
FAMILIES = "tests/equal/families.py"
MIXTURES = "tests/equal/mixtures.py"
SAMPLE = {
    "gpt zero3,data=2,microbatches=3": GPT,
    "digits zero1,data=2": ("examples/digits.py", "width=8"),
    "gpt tensor=2": GPT,
    "piped pipeline=2,schedule=zb-v,microbatches=3": (*PIPED, "model=unet"),
}
MORE = {
    "mixtral expert=2": (f"{MIXTURES}:mixtral",),
    "gpt data=3": GPT,
    "gpt zero2,data=4": GPT,
    "digits data=4": ("examples/digits.py", "width=8"),
    "finetune zero2,data=2,microbatches=3": ("examples/finetune.py",),
    "gpt2 zero3,data=4": (f"{FAMILIES}:gpt2",),
    "llama data=2": (f"{FAMILIES}:llama",),
    "bert zero1,data=3": (f"{FAMILIES}:bert",),
    "vit zero3,data=2,microbatches=3": (f"{FAMILIES}:vit",),
    "llama tensor=2,microbatches=3": (f"{FAMILIES}:llama",),
    "llama context=2": (f"{FAMILIES}:llama",),
    "llama zero3,data=4,shard=2": (f"{FAMILIES}:llama",),
    "llama zero3,data=2,tensor=2": (f"{FAMILIES}:llama",),
    "llama context=2,tensor=2": (f"{FAMILIES}:llama",),
    "gpt tensor=2,data=2": GPT,
    "mixtral zero2,data=2,expert=2": (f"{MIXTURES}:mixtral",),
    "mixtral expert=3": (f"{MIXTURES}:mixtral",),
    "mixtral expert=2,tensor=2": (f"{MIXTURES}:mixtral",),
    "gpt pipeline=2,schedule=pipedream": DEEP,
    "gpt pipeline=2,schedule=pipedream,replicas=2-1": DEEP,
    "gpt pipeline=2,schedule=pipedream-2bw,microbatches=3": DEEP,
    "digits tensor=2": ("examples/digits.py", "width=8"),
    "digits zero3,data=2,tensor=2": ("examples/digits.py", "width=8"),
    "vit tensor=2": (f"{FAMILIES}:vit",),
    "vit zero3,data=4,shard=2": (f"{FAMILIES}:vit",),
    **{
        f"{model} {plan},microbatches={micro}": (*PIPED, f"model={model}", f"microbatches={micro}")
        for model, plan, micro in (
            ("gpt", "pipeline=4,schedule=1f1b", 8),
            ("gpt", "pipeline=2,schedule=zb-v", 3),
            ("resnet", "pipeline=2,schedule=1f1b", 3),
            ("unet", "data=2,pipeline=2,schedule=1f1b", 3),
            ("gpt", "pipeline=3,schedule=gpipe", 3),
            ("gpt", "zero3,data=2,pipeline=2,schedule=zb-h1", 3),
            ("gpt", "tensor=2,pipeline=2,schedule=dualpipe-v", 3),
            ("t5", "pipeline=2,schedule=interleaved,virtual=2", 3),
            ("t5", "zero1,data=2,pipeline=2,schedule=1f1b", 1),
            ("t5", "pipeline=4,schedule=zb-h2", 8),
            ("unet", "pipeline=4,schedule=zb-v", 8),
            ("unet", "tensor=2,pipeline=2,schedule=gpipe", 3),
            ("resnet", "pipeline=3,schedule=dualpipe-v", 3),
            ("resnet", "zero2,data=2,pipeline=2,schedule=zb-h1", 3),
            ("mixtral", "remat=full,pipeline=2,schedule=1f1b", 3),
            ("mixtral", "data=2,pipeline=2,schedule=interleaved,virtual=2", 1),
        )
    },
    "waves zero3,data=2,tensor=2": ("tests/equal/strange.py:waves",),
    "complex_weights zero3,data=2,tensor=2": ("tests/equal/strange.py:complex_weights",),
}


def verified(cell, words):
    """What `mw verify --ranks processes` prints."""
    file, *settings = words
    given = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", "verify", file, *given, "--json",
         "--plan", cell.split(" ")[1], "--ranks", "processes"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=220,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("cell", SAMPLE)
def test_processes_equal_one_device(cell):
    found = verified(cell, SAMPLE[cell])
    assert found["passed"]
    assert found["law"] == dict.fromkeys(KINDS, LAW)


def test_processes_equal_one_device_over_gloo(monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_COMM", "gloo")  # they share memory by themselves
    assert verified("digits zero1,data=2", SAMPLE["digits zero1,data=2"])["passed"]


@pytest.mark.matrix
@pytest.mark.parametrize("cell", MORE)
def test_more_processes_equal_one_device(cell):
    assert verified(cell, MORE[cell])["passed"]
