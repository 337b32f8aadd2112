"""Where records go."""

from __future__ import annotations

import builtins
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import StorageError, UsageError
from meshwright.run.observe.loggers import JsonLines, TensorBoard, Wandb, flattened

RECORDS = [
    {"step": 1, "loss": 5.5, "time": {"data": 0.1}},
    {"step": 2, "loss": 5.0, "time": {"data": 0.2}},
    {"step": 2, "evaluation": {"loss": 4.5}},
    {"step": 3, "note": "the dataset is small"},
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records, **options):
    log = JsonLines(path, **options)
    for record in records:
        log(record)
    log.close()


def test_json_lines_are_the_records(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, RECORDS)
    assert lines(path) == RECORDS


def test_a_line_is_there_at_once(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log(RECORDS[0])
    assert lines(log.path) == RECORDS[:1]
    log.close()


def test_a_second_start_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, RECORDS[:1])
    write(path, RECORDS[1:])
    assert lines(path) == RECORDS


@given(st.integers(0, 4), st.integers(0, 30))
def test_resuming_drops_later_steps_and_a_torn_line(tmp_path_factory, step, torn):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, RECORDS)
    with path.open("a") as file:
        file.write('{"step":1,"loss":0.123456789}'[:torn])
    write(path, [{"step": step + 1}], resumed_at=step)
    assert lines(path) == [r for r in RECORDS if r["step"] <= step] + [{"step": step + 1}]


def test_numbers_that_json_lacks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 1, "loss": float("nan"), "t": torch.tensor(2.5), "l": [float("inf"), 1]}])
    assert lines(path) == [{"step": 1, "loss": None, "t": 2.5, "l": [None, 1]}]


def test_a_value_that_is_no_number(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match="a record cannot be written as JSON"):
        log({"step": 1, "what": object()})
    log.close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*metrics.jsonl"):
        JsonLines(tmp_path / "run" / "metrics.jsonl")


def test_a_full_disk():
    log = JsonLines("/dev/full")
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left on device"):
        log(RECORDS[0])
    with pytest.raises(OSError, match="No space"):  # what is pending cannot be written either
        log.close()


def test_flattened_records():
    record = {"step": 3, "loss": torch.tensor(2.0), "time": {"step": 1}, "note": "x", "none": None}
    assert flattened(record) == {"loss": 2.0, "time/step": 1.0}


def test_tensorboard_gets_scalars_and_notes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoard(tmp_path)
    for record in RECORDS:
        log(record)
    log.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 5.5), (2, 5.0)]
    assert [(e.step, e.value) for e in found.Scalars("evaluation/loss")] == [(2, 4.5)]
    assert found.Tags()["tensors"] == ["note/text_summary"]


def test_tensorboard_hides_what_is_run_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((None, (1, 2, 3)), (1, (2,))):
        log = TensorBoard(tmp_path, resumed_at=resumed)
        for step in steps:
            log({"step": step, "loss": float(step)})
        log.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in found.Scalars("loss")] == [1, 2]


def test_wandb_gets_numbers_by_step(monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )
    fake = SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = Wandb(project="p")
    for record in RECORDS:
        log(record)
    log.close()
    assert calls == [
        {"project": "p"},
        (1, {"loss": 5.5, "time/data": 0.1}),
        (2, {"loss": 5.0, "time/data": 0.2}),
        (2, {"evaluation/loss": 4.5}),
        "finish",
    ]


@pytest.mark.parametrize(
    ("make", "package"),
    [(lambda: TensorBoard("x"), "torch.utils.tensorboard"), (Wandb, "wandb")],
)
def test_a_package_that_is_not_installed(monkeypatch, make, package):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == package:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"logger needs .*; run `pip install "):
        make()
