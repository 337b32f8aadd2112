"""`mw checkpoint`: what it prints, what it writes, how it ends."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import meshwright
from meshwright.launch.userfile import load_job
from meshwright.run.checkpoint.manifest import record_of, seal
from meshwright.run.foreign.convert import FORMATS
from meshwright.view.checkpoints import contents_table, written_table
from tests.run.foreign.test_unpickled import Evil


@pytest.fixture
def trained(mw, folder):
    """A run of three steps with two checkpoints, in `folder/run`."""
    done = mw("train", "sums.py", "--checkpoint-every", 2, "--run-dir", "run", "--json")
    assert done.status == 0, done.err
    return folder / "run"


def inspected(mw, path, *words):
    """What inspect says as JSON."""
    done = mw("checkpoint", "inspect", path, "--json", *words)
    assert done.status == 0, done.err
    return json.loads(done.out)


def test_inspect_a_run_and_a_step_of_it(mw, trained):
    found = inspected(mw, "run")
    assert found["path"] == "run/checkpoints/step-00000003"
    assert (found["format"], found["step"], found["plan"]) == ("meshwright", 3, "data=1")
    assert (found["batch_size"], found["seed"], found["optimizer"]) == (32, 0, "AdamW")
    parts = {part["part"]: (part["tensors"], part["bytes"]) for part in found["parts"]}
    assert parts == {
        "weights": (4, 4 * (8 * 16 + 16 + 16 + 1)),
        "optimizer exp_avg": (4, 644),
        "optimizer exp_avg_sq": (4, 644),
        "optimizer step": (4, 16),
    }
    assert found["bytes"] == 3 * 644 + 16
    up = next(one for one in found["tensors"] if one["name"] == "model/up.weight")
    assert (up["dtype"], up["shape"], up["bytes"], up["boxes"]) == ("float32", [16, 8], 512, 1)
    assert inspected(mw, "run", "--step", 2)["step"] == 2


def test_for_people_there_is_a_table(mw, trained):
    out = mw("checkpoint", "inspect", "run").out
    assert "Meshwright checkpoint of step 3, plan data=1, batch 32, seed 0, AdamW" in out
    assert "up.weight" in out
    assert "exp_avg/" not in out
    out = mw("checkpoint", "inspect", "run", "--names", "optimizer/*/up.*").out
    assert "optimizer/exp_avg_sq/up.bias" in out
    assert "down.weight" not in out


def test_verify_all_of_a_run(mw, trained):
    done = mw("checkpoint", "verify", "run", "--json")
    found = json.loads(done.out)
    assert (done.status, found["whole"]) == (0, True)
    assert [one["step"] for one in found["checkpoints"]] == [3, 2]
    damaged = trained / "checkpoints" / "step-00000002" / "rank0.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(bytes(data))
    done = mw("checkpoint", "verify", "run", "--json")
    found = json.loads(done.out)
    assert (done.status, found["whole"]) == (74, False)
    assert [one["whole"] for one in found["checkpoints"]] == [True, False]
    assert "rank0.safetensors" in found["checkpoints"][1]["problem"]
    assert mw("checkpoint", "verify", "run", "--step", 3).status == 0
    out = mw("checkpoint", "verify", "run").out
    assert "PASS  run/checkpoints/step-00000003" in out
    assert "FAIL  run/checkpoints/step-00000002" in out
    assert mw("checkpoint", "export", "run", "out", "--step", 2).status == 74
    assert not (trained.parent / "out").exists()


SOME = ("universal", "safetensors")


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=[] if f in SOME else [pytest.mark.matrix]) for f in FORMATS]
)
def test_export_and_back(mw, trained, form):
    done = mw("checkpoint", "export", "run", "out", "--to", form, "--json")
    assert done.status == 0, done.err
    said = json.loads(done.out)
    assert (said["format"], said["checked"], said["step"]) == (form, "digests", 3)
    found = inspected(mw, "out")
    assert (found["format"], found["step"], found["plan"]) == (form, 3, "data=1")
    assert mw("checkpoint", "verify", "out").status == 0
    assert mw("checkpoint", "convert", "out", "back", "--to", "meshwright").status == 0
    names = {one["name"]: (one["dtype"], one["shape"]) for one in inspected(mw, "run")["tensors"]}
    back = {one["name"]: (one["dtype"], one["shape"]) for one in inspected(mw, "back")["tensors"]}
    kept = {n: what for n, what in names.items() if n.split("/")[0] in FORMATS[form]}
    assert back == kept
    assert len(said["left_out"]) == len(names) - len(kept)


def test_export_writes_what_the_run_exports(mw, trained):
    """The model is not built, and yet: the same tensors, to the bit."""
    assert mw("checkpoint", "export", "run", "out").status == 0
    job = load_job("sums.py", ())
    with meshwright.Run(job, run_dir=trained, quiet=True) as run:
        run.export(trained.parent / "theirs")
    ours, theirs = (load_file(trained.parent / f / "model.safetensors") for f in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pickle_is_refused_with_the_command_that_then_works(mw, folder):
    """`weights=` names the command; the command makes what `weights=` takes."""
    first = {"model.up.weight": torch.ones(16, 8), "model.up.bias": torch.ones(16),
             "model.down.weight": torch.ones(1, 16), "model.down.bias": torch.ones(1)}  # fmt: skip
    torch.save({"state_dict": first, "epoch": 3}, folder / "model.pt")
    text = (folder / "sums.py").read_text().replace("steps=3,", "steps=3, weights='model.pt',")
    (folder / "first.py").write_text(text)
    done = mw("train", "first.py")
    assert done.status == 74
    assert "`mw checkpoint convert model.pt FOLDER`" in " ".join(done.err.split())
    done = mw("checkpoint", "convert", "model.pt", "out", "--map", "state_dict.model.*=*", "--like",
              "sums.py", "--json")  # fmt: skip
    assert done.status == 0, done.err
    said = json.loads(done.out)
    assert (said["format"], said["checked"], said["missing"]) == ("safetensors", "crc32", {})
    assert said["renamed"]["model/state_dict.model.up.bias"] == "model/up.bias"
    assert torch.equal(load_file(folder / "out" / "model.safetensors")["up.bias"], torch.ones(16))
    (folder / "second.py").write_text(text.replace("'model.pt'", "'out'"))
    assert mw("train", "second.py", "--steps", 1).status == 0


def test_a_hostile_file_runs_nothing(mw, folder):
    torch.save({"w": torch.ones(2), "e": Evil(folder / "ran")}, folder / "model.pt")
    for words in (["inspect", "model.pt"], ["verify", "model.pt"], ["convert", "model.pt", "out"]):
        done = mw("checkpoint", *words)
        assert done.status == 74
        assert "system would make" in done.err + done.out
    assert not (folder / "out").exists()
    done = mw("checkpoint", "convert", "model.pt", "out", "--skip-objects")
    assert done.status == 0, done.err
    assert "1 objects are left out (e, ...)" in done.out
    assert list(load_file(folder / "out" / "model.safetensors")) == ["w"]
    assert not (folder / "ran").exists()


def test_what_does_not_fit_is_listed(mw, folder):
    torch.save({"up.weight": torch.ones(16, 8), "up.bais": torch.ones(16)}, folder / "m.pt")
    done = mw("checkpoint", "convert", "m.pt", "out", "--like", "sums.py")
    assert done.status == 74
    assert "up.bias is missing; there is up.bais" in done.err
    assert "down.weight is missing" in done.err
    done = mw("checkpoint", "convert", "m.pt", "out", "--like", "sums.py", "--partial", "--json")
    assert done.status == 0, done.err
    said = json.loads(done.out)
    assert said["missing"] == {"up.bias": "up.bais", "down.weight": None, "down.bias": None}
    assert said["unexpected"] == ["up.bais"]
    assert set(load_file(folder / "out" / "model.safetensors")) == {"up.weight"}
    done = mw("checkpoint", "convert", "m.pt", "o2", "--like", "sums.py:job", "--set", "width=9")
    assert "up.weight has shape [16, 8], wanted [9, 8]" in done.err


BAD = [
    (["inspect", "nowhere"], 74, "mw: there is nothing at nowhere"),
    (["inspect", "sums.py"], 74, "neither a zip archive nor a pickle"),
    (["inspect", "run", "--step", "7"], 74, "it has 2, 3"),
    (["inspect", "run/checkpoints/step-00000002", "--step", "2"], 2, "is no run"),
    (["convert", "run", "run"], 2, "there already and not empty"),
    (["convert", "run", "out", "--to", "gguf"], 2, "gguf"),
    (["convert", "run", "out", "--map", "up"], 2, "must be OLD=NEW"),
    (["convert", "run", "out", "--map", "upp.bias=x"], 2, "did you mean 'up.bias'"),
    (["convert", "run", "out", "--map", "*.bias=x"], 2, "has 1 * on the left and 0"),
    (["convert", "run", "out", "--shard-size", "x"], 2, "--shard-size"),
    (["convert", "run", "out", "--shard-size", "0"], 2, "--shard-size 0 leaves no room"),
    (["convert", "run", "out", "--map", "*="], 2, "--map leaves out all of run"),
    (["convert", "run", "out", "--partial"], 2, "--partial takes what fits, but"),
    (["convert", "run", "out", "--set", "width=9"], 2, "add --like"),
    (["export", "run", "out", "--config", "nowhere"], 2, "--config nowhere: there is nothing"),
    (["convert", "run", "sums.py/out"], 74, "cannot be written"),
    (["convert", "run"], 2, "TO"),
    (["verify", "nowhere"], 74, ""),
    (["explode"], 2, "explode"),
]


def test_bad_words_and_their_status(mw, trained):
    for words, status, said in BAD:
        done = mw("checkpoint", *words)
        assert (done.status, said in done.err) == (status, True), (words, done.err)
        assert "Traceback" not in done.err
        assert not (trained.parent / "out").exists()


def test_help_has_an_example(mw):
    for verb in ("inspect", "verify", "convert", "export"):
        assert f"Example:  mw checkpoint {verb} " in mw("checkpoint", verb, "--help").out


def test_tables_fit_the_terminal(mw, trained):
    told = inspected(mw, "run")
    done = mw("checkpoint", "export", "run", "out", "--map", "up.*=upper.*", "--json")
    for width in (80, 120):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(contents_table(told, pattern=None, every=False))
        console.print(written_table(json.loads(done.out)))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        for word in ("up.weight", "float32", "16 × 8", "512 B", "AdamW", "upper.bias", "left out"):
            assert word in text


def test_layers_that_are_alike_stand_in_one_line():
    tensor = {"dtype": "float32", "shape": [2], "bytes": 8, "file": "f", "boxes": 1}
    names = [f"model/h.{k}.w" for k in range(12)] + ["model/h.0.b", "model/2x.w"]
    told = {
        "path": "p", "format": "torch", "step": None, "plan": None, "batch_size": None,
        "seed": None, "optimizer": None, "parts": [], "bytes": 0, "files": [], "notes": [],
        "tensors": [{**tensor, "name": name} for name in names],
    }  # fmt: skip

    def lines(*, every):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(contents_table(told, pattern=None, every=every))
        return console.export_text().splitlines()

    (row,) = (line for line in lines(every=False) if "h.*.w" in line)
    assert "× 12" in row
    assert "96 B" in row
    assert any(line.startswith("h.0.b ") for line in lines(every=False))
    assert any(line.startswith("2x.w ") for line in lines(every=False))
    assert sum(line.startswith("h.") for line in lines(every=True)) == 13


def test_a_run_does_not_go_on_from_what_says_too_little(mw, trained):
    folder = trained / "checkpoints" / "step-00000003"
    tree = json.loads((folder / "manifest.json").read_bytes())
    tree = {key: value for key, value in tree.items() if key != "sha256"} | {"meta": {}}
    (folder / "manifest.json").write_bytes(seal(tree))
    (folder / "commit.json").write_bytes(record_of(seal(tree)))
    done = mw("train", "sums.py", "--run-dir", "run", "--steps", 5)
    assert done.status == 74, done.err
    assert "meta does not say batch_size" in " ".join(done.err.split())
