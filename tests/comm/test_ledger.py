from __future__ import annotations

import json

import torch

from meshwright.comm.base import Group, Start
from meshwright.comm.ledger import Ledger, describe


def request(label="w"):
    return Start(
        "all_reduce", Group("data", (0, 1)), (torch.zeros(3, dtype=torch.float64),), label=label
    )


def test_it_remembers_the_last_entered_and_left():
    ledger = Ledger(rank=1)
    first = ledger.enter(request("a"))
    second = ledger.enter(request("b"))
    ledger.leave(first)
    assert (ledger.entered, ledger.left) == (2, 1)
    assert (ledger.last_entered, ledger.last_left) == (second, first)
    assert second.text() == "#2 all_reduce over data (b)"
    assert second.bytes == 24


def test_a_dump_is_json_by_rank(tmp_path):
    ledger = Ledger(rank=3)
    assert json.loads(ledger.dump(tmp_path).read_text())["last_entered"] is None
    ledger.leave(ledger.enter(request()))
    path = ledger.dump(tmp_path)
    assert path == tmp_path / "ledger" / "rank3.json"
    head = json.loads(path.read_text())
    assert head["entered"] == head["left"] == 1
    assert head["last_left"] == "#1 all_reduce over data (w)"


def test_an_unlabelled_collective_has_no_brackets():
    assert describe(request("")) == "all_reduce over data"
