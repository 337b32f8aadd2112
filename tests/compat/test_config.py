"""DeepSpeed configurations: what of them becomes a plan, what is left out, what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.compat.deepspeed.config import load, read, settings
from meshwright.compat.deepspeed.keys import LEFT, READ
from meshwright.errors import UsageError
from meshwright.plan.plan import Plan

SIZE = {"train_micro_batch_size_per_gpu": 2}


def zero(**keys):
    return {**SIZE, "zero_optimization": keys}


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (SIZE, "data=4"),
        (zero(stage=3), "zero3,data=4"),
        (
            zero(stage=2, offload_optimizer={"device": "cpu"}),
            "zero2,data=4,offload=optimizer+gradients",
        ),
        (zero(stage=1, cpu_offload=True), "zero1,data=4,offload=optimizer+gradients"),
        (
            zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/x"}),
            "zero3,data=4,offload=params:disk",
        ),
        (zero(stage=3, mics_shard_size=2), "zero3,data=4,shard=2"),
        (zero(stage=3, mics_shard_size=-1), "zero3,data=4"),
        ({**SIZE, "bf16": {"enabled": True}}, "data=4,precision=bf16"),
        ({**SIZE, "fp16": {"enabled": True}}, "data=4,precision=fp16"),
        (
            {**SIZE, "torch_autocast": {"enabled": True, "dtype": "float16"}},
            "data=4,precision=fp16",
        ),
        ({**SIZE, "tensor_parallel": {"autotp_size": 2}}, "data=2,tensor=2"),
        ({**SIZE, "activation_checkpointing": {}}, "data=4,remat=marks"),
        ({**SIZE, "gradient_accumulation_steps": 3}, "data=4,microbatches=3"),
    ],
)
def test_what_a_configuration_means(config, plan):
    assert read(config, 4).plan == Plan.parse(plan)


@given(
    micro=st.integers(1, 8),
    parts=st.integers(1, 5),
    world=st.integers(1, 6),
    said=st.sampled_from(["mpb", "mp", "mb", "pb", "m", "b"]),
)
def test_any_sizes_that_suffice_say_the_rest(micro, parts, world, said):
    names = {
        "m": "train_micro_batch_size_per_gpu",
        "p": "gradient_accumulation_steps",
        "b": "train_batch_size",
    }
    values = {"m": micro, "p": parts, "b": micro * parts * world}
    found = read({names[c]: values[c] for c in said}, world)
    assert found.batch_size == found.micro * found.plan.microbatches * world
    for c, got in (("m", found.micro), ("p", found.plan.microbatches), ("b", found.batch_size)):
        assert c not in said or got == values[c]


def test_the_rest_of_a_job():
    found = read(
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": 1.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "scheduler": {"type": "WarmupLR"},
            "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 50},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/fast"},
            },
        },
        2,
    )
    assert (found.micro, found.clip_norm, str(found.folder)) == (4, 1.5, "/fast")
    assert (found.loss_scale.initial, found.loss_scale.interval) == (256.0, 50)
    assert (found.optimizer, found.schedule) == (("AdamW", {"lr": 0.1}), ("WarmupLR", {}))


def test_what_is_left_out_is_listed_with_the_reason():
    found = read(
        {**zero(stage=3, overlap_comm=True, stage3_prefetch_bucket_size="auto"), "_note": "mine",
         "wall_clock_breakdown": False, "flops_profiler": {"enabled": True, "top": 3}},
        2,
    )  # fmt: skip
    assert {left.key for left in found.left} == {
        "zero_optimization.overlap_comm",
        "zero_optimization.stage3_prefetch_bucket_size",
        "_note",
        "wall_clock_breakdown",
        "flops_profiler",
    }
    assert all(left.why for left in found.left)


def test_no_key_is_both_read_and_left_out():
    assert not READ & LEFT.keys()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "neither train_batch_size nor train_micro_batch_size_per_gpu"),
        ({"train_batch_size": 7}, r"train_batch_size=7, but .* = 6; use train_batch_size=6"),
        ({**SIZE, "train_batch_size": 9}, "use train_batch_size="),
        ({**SIZE, "zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        (zero(stag=3), "did you mean 'zero_optimization.stage'"),
        (zero(stage=4), "stages are 0 to 3"),
        (zero(stage="3"), "stage is '3', but must be a whole number"),
        (zero(stage=True), "stage is True"),
        (zero(stage="auto"), "only Hugging Face's Trainer fills in"),
        ({**SIZE, "zero_optimization": 3}, "must be an object"),
        (zero(offload_param={"device": "gpu"}), "did you mean|known: cpu, none, nvme"),
        (zero(offload_param={"device": "nvme"}), "nvme_path must name a folder"),
        (
            zero(
                offload_param={"device": "nvme", "nvme_path": "a"},
                offload_optimizer={"device": "nvme", "nvme_path": "b"},
            ),
            "give both the same",
        ),
        ({**SIZE, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "disable one of them"),
        ({**SIZE, "bf16": {"enabled": 1}}, "true or false"),
        (
            {**SIZE, "fp16": {"enabled": True, "initial_scale_power": 200}},
            r"scales end at 2\*\*126",
        ),
        ({**SIZE, "gradient_clipping": -1}, "0 or more"),
        ({**SIZE, "gradient_clipping": float("nan")}, "0 or more"),
        ({**SIZE, "optimizer": {"params": {}}}, "name the type"),
        ({**SIZE, "optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, "put the value there"),
        ({**SIZE, "tensor_parallel": {"autotp_size": 3}}, "does not divide the 2 ranks"),
        ({**SIZE, 3: 4}, "keys are text"),
        ({"train_micro_batch_size_per_gpu": 0}, "1 or more"),
        ({"train_micro_batch_size_per_gpu": 2.5}, "1 or more"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_remedy(config, words):
    with pytest.raises(UsageError, match=words):
        read(config, 2)


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(UsageError) as refusal:
        settings({"train_batch_size": 8, "zzz": 1, "zero_optimisation": {"stage": 3}}, 2)
    first, *each = str(refusal.value).splitlines()
    assert first == "2 keys are unknown:"
    assert ["'zzz'" in each[0], "'zero_optimisation'" in each[1]] == [True, True]
    assert "zero_optimization" in each[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "this is no JSON"),
        ("[1]", "must hold an object"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ("[" * 100_000, "nested too deep"),
        ("\x00", "this is no JSON"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load(path)


def test_files_and_dicts_mean_the_same(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(zero(stage=2)))
    assert settings(str(path), 2) == settings(zero(stage=2), 2)
    with pytest.raises(UsageError, match="cannot be read"):
        settings(tmp_path / "none.json", 2)
    with pytest.raises(UsageError, match="is a int"):
        settings(3, 2)
