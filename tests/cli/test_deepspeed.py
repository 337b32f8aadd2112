"""`mw deepspeed`: a configuration's plan, and what is left out."""

from __future__ import annotations

import json

import pytest

from meshwright.cli.app import main
from tests.laws.source import ROOT

CONFIG = str(ROOT / "examples/deepspeed_digits.json")


def test_it_shows_plan_and_what_is_left_out(capsys):
    assert main(["deepspeed", CONFIG, "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert "zero3,data=2,microbatches=2,offload=optimizer+gradients+params" in out
    assert "AdamW(lr=0.003" in out
    assert "zero_optimization.overlap_comm" in out


def test_machines_get_json(capsys):
    assert main(["deepspeed", CONFIG, "-n", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch_size"] == 64
    assert all(one["why"] for one in found["left_out"])


@pytest.mark.parametrize("text", ["{", '{"train_batch_size": 3}'])
def test_wrong_ones_end_with_status_2(tmp_path, capsys, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert main(["deepspeed", str(path), "-n", "2"]) == 2
    assert "mw" in capsys.readouterr().err
