"""DeepSpeed's universal layout, as its converter writes it after ZeRO-1 and after ZeRO-3."""

from __future__ import annotations

import pytest
import torch

from meshwright.errors import StorageError
from meshwright.run.foreign.sidecar import with_sidecar, write_sidecar
from meshwright.run.foreign.universal import LATEST, open_universal
from meshwright.run.foreign.universalwrite import write_universal
from tests.run.foreign.test_unpickled import Evil
from tests.run.foreign.things import (
    bits,
    damages,
    entries,
    held,
    only_storage_errors,
    source,
    wanted,
)

WEIGHTS = {"0.weight": torch.randn(4, 3), "0.bias": torch.randn(4)}
SLOTS = ("fp32", "exp_avg", "exp_avg_sq")
STATE = {
    (slot, name): value if slot == "fp32" else torch.randn(value.shape)
    for slot in SLOTS
    for name, value in WEIGHTS.items()
}
MEAN = torch.randn(4)


class LossScaler:
    """One of the classes of its own that DeepSpeed pickles along."""


def theirs(folder, stage):
    """What `ds_to_universal.py` leaves after training at a stage."""
    zero = folder / "step5_universal" / "zero"
    for name in WEIGHTS:
        (zero / name).mkdir(parents=True)
        for slot in SLOTS:
            value = STATE[slot, name]
            flat = value.flatten().clone()
            torch.save(
                flat if stage == 3 else {"cat_dim": 0, "param": value}, zero / name / f"{slot}.pt"
            )
        if stage < 3:
            torch.save(torch.tensor(5.0), zero / name / "step.pt")
    if stage < 3:
        (zero / "1.mean").mkdir()
        torch.save({"cat_dim": 0, "param": MEAN}, zero / "1.mean" / "fp32.pt")
    common = {"loss_scaler": LossScaler(), "zero_stage": stage}
    if stage == 3:
        common["optimizer_state_dict"] = {"state": {0: {"step": torch.tensor(5.0)}}}
    torch.save(common, zero / "optimizer_state.pt")
    shapes = {name: value.shape for name, value in WEIGHTS.items()}
    states = {
        "module": {**WEIGHTS, "1.mean": MEAN}, "buffer_names": ["1.mean"],
        "param_shapes": [shapes] if stage == 3 else shapes, "global_steps": 5,
        "scaler": LossScaler(),
    }  # fmt: skip
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save(states, zero.parent / f"{prefix}mp_rank_00_model_states.pt")
    (folder / LATEST).write_text("step5_universal")
    return zero


WANT = wanted(
    {
        **{f"model/{name}": STATE["fp32", name] for name in WEIGHTS},
        **{f"optimizer/{slot}/{n}": STATE[slot, n] for slot in SLOTS[1:] for n in WEIGHTS},
        **{f"optimizer/step/{name}": torch.tensor(5.0) for name in WEIGHTS},
        "buffer/1.mean": MEAN,
    }
)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("inner", [False, True])
def test_what_deepspeed_wrote(tmp_path, stage, inner):
    zero = theirs(tmp_path, stage)
    found = open_universal(zero.parent if inner else tmp_path)
    assert held(found) == WANT
    assert (found.step, found.check()) == (5, "crc32")


def test_a_step_that_is_a_number_is_read_as_adam_keeps_it(tmp_path):
    zero = theirs(tmp_path, 1)
    for name in WEIGHTS:
        torch.save(5, zero / name / "step.pt")
    assert held(open_universal(tmp_path)) == WANT


def test_all_there_and_back(tmp_path):
    write_universal(source(), tmp_path)
    found = open_universal(tmp_path)
    assert held(found) == wanted(entries())
    assert found.step == 20
    write_sidecar(source(), tmp_path, whole=True)
    again = with_sidecar(found)
    assert held(again) == wanted(entries())
    assert (again.meta, again.check()) == (source().meta, "sha256")


def test_files_are_what_deepspeed_reads(tmp_path):
    """What its engines look for, at stages 1 and 3; loaded as they load it."""
    write_universal(source(), tmp_path)
    tag = tmp_path / (tmp_path / LATEST).read_text()
    one = torch.load(tag / "zero" / "wte.weight" / "fp32.pt", weights_only=True)
    assert bits(one["param"]) == bits(entries()["model/wte.weight"])
    assert one["cat_dim"] == 0
    step = torch.load(tag / "zero" / "wte.weight" / "step.pt", weights_only=True)
    assert bits(step) == bits(torch.tensor(3.0))
    common = torch.load(tag / "zero" / "optimizer_state.pt", weights_only=False)
    assert common["param_groups"] == [{"lr": 0.1, "amsgrad": False, "params": []}]
    assert [int(n) for n in common["ds_version"].split(".")] >= [0, 3, 17]
    assert common["optimizer_state_dict"]["state"][0]["step"] == 20
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        states = torch.load(tag / name, weights_only=True)
        assert {"global_steps", "skipped_steps", "dp_world_size", "mp_world_size"} <= set(states)
        assert bits(states["module"]["bn.mean"]) == bits(entries()["buffer/bn.mean"])
        assert states["param_shapes"][0]["wte.weight"] == (12, 8)


def test_a_name_that_no_folder_can_have(tmp_path):
    with pytest.raises(StorageError, match=r"a/b is no name for a folder"):
        write_universal(source({"model/a/b": torch.ones(2)}), tmp_path)


def _replace(path, value):
    torch.save(value, path)


def _latest(zero):
    return zero.parent.parent / LATEST


def _linked(path):
    path.unlink()
    path.symlink_to("/x")


WRONG = {
    "no weights": (lambda z: (z / "0.bias" / "fp32.pt").unlink(), "0.bias holds no fp32.pt"),
    "another shape": (
        lambda z: _replace(z / "0.bias" / "exp_avg.pt", {"param": torch.ones(1, 4)}),
        r"exp_avg.pt has shape \[1, 4\], fp32.pt \[4\]",
    ),
    "an object": (
        lambda z: _replace(z / "0.bias" / "exp_avg.pt", LossScaler()), "LossScaler, expected a ten",
    ),
    "a hostile file": (
        lambda z: _replace(z / "0.bias" / "fp32.pt", Evil(z / "ran")), "system, expected a tensor",
    ),
    "another file": (lambda z: (z / "0.bias" / "x.bin").touch(), "'x.bin', which is no state's"),
    "an empty file": (lambda z: (z / "0.bias" / "fp32.pt").write_bytes(b""), "it is empty"),
    "no folders": (lambda z: z.rename(z.with_name("gone")), "holds no folder zero"),
    "a tag outside": (lambda z: _latest(z).write_text("../x"), "no folder beside"),
    "a tag elsewhere": (lambda z: _latest(z).write_text("/etc"), "no folder beside"),
    "no tag": (lambda z: _latest(z).unlink(), "cannot be opened"),
    "a linked folder": (lambda z: (z / "more").symlink_to("/etc"), "more is a symbolic link"),
    "a linked file": (
        lambda z: _linked(z / "0.bias" / "fp32.pt"),
        "symbolic link",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(tmp_path, wrong):
    zero = theirs(tmp_path, 1)
    change, word = WRONG[wrong]
    change(zero)
    with pytest.raises(StorageError, match=word):
        open_universal(tmp_path)
    assert not (zero / "ran").exists()


def test_a_flat_tensor_of_another_size(tmp_path):
    zero = theirs(tmp_path, 3)
    torch.save(torch.ones(7), zero / "0.weight" / "fp32.pt")
    with pytest.raises(StorageError, match=r"holds 7 elements, its shape is told as \[4, 3\]"):
        open_universal(tmp_path)


def test_damage_is_seen_or_harmless(tmp_path):
    zero = theirs(tmp_path, 1)
    file = zero / "0.weight" / "fp32.pt"
    data = file.read_bytes()
    refused = 0
    for damaged in damages(data, 100):
        file.write_bytes(damaged)
        found = only_storage_errors(lambda: held(open_universal(tmp_path)))
        checked = only_storage_errors(lambda: open_universal(tmp_path).check())
        refused += checked != "crc32"
        assert checked != "crc32" or found == WANT
    assert refused > 20
