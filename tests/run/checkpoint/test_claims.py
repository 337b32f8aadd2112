"""What a checkpoint says beside its tensors is believed only where it is of its kind."""

from __future__ import annotations

import copy

import pytest

from meshwright.errors import StorageError
from meshwright.run.checkpoint.claims import check_claims, require_claims
from meshwright.run.checkpoint.save import open_checkpoint
from tests.run.foreign.things import meta
from tests.run.saving import save_all, two_ranks

GAINS = {"scale": 4, "means": [1.0], "variances": [2.0], "weight": 0.5, "iterations": 3.5}

WRONG = [
    ("adascale", 3, "meta.adascale must be null, or a scale above 0"),
    ("adascale", {**GAINS, "scale": 0}, "meta.adascale must be"),
    ("adascale", {**GAINS, "means": ["1"]}, "meta.adascale must be"),
    ("adascale", {**GAINS, "variances": 2.0}, "meta.adascale must be"),
    ("adascale", {**GAINS, "weight": None}, "meta.adascale must be"),
    ("adascale", {**GAINS, "iterations": -1.0}, "meta.adascale must be"),
    ("tied", "x", "meta.tied must be names by names"),
    ("tied", {"a": 1}, "meta.tied must be"),
    ("transient", 3, "meta.transient must be a list of names"),
    ("extra", [1], "meta.extra must be an object"),
    ("average", 5, "meta.average must be null, or a decay and the steps"),
    ("average", {"decay": 0.9, "steps": {"d": -1}}, "meta.average must be"),
    ("scaling", {"scale": 0, "steps": 1, "skipped": 0}, "meta.scaling must be"),
    ("scheduler", "x", "meta.scheduler must be null or an object"),
    ("data", {"kind": "map"}, "meta.data must be"),
    ("optimizer", {"groups": [{"parameters": []}]}, "meta.optimizer must be"),
    ("optimizer", {"groups": [{"parameters": [], "settings": {"lr": "1"}}]}, "meta.optimizer must"),
    ("optimizer", {"slots": {"exp_avg": "x"}}, "meta.optimizer must be"),
    ("phases", {"d": 3}, "meta.phases must be an object of objects"),
    ("phases", {"d": {"scheduler": 3}}, "meta.phases.d.scheduler must be"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_what_is_not_of_its_kind_is_refused_by_name(tmp_path, key, value, message):
    told = {**meta(), key: value}
    with pytest.raises(StorageError, match=message):
        check_claims(told)
    folder = save_all(tmp_path / "checkpoints", 10, two_ranks(), told)
    with pytest.raises(StorageError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("key", ["batch_size", "seed", "data", "extra", "optimizer", "scheduler"])
def test_a_run_cannot_go_on_from_what_says_too_little(key):
    told = copy.deepcopy(meta())
    require_claims(told)
    del told[key]
    check_claims(told)  # others say less, and can be read
    with pytest.raises(StorageError, match=f"meta does not say {key}"):
        require_claims(told)


def test_an_average_counts_the_steps_of_the_phases_that_there_are():
    told = {**meta(), "average": {"decay": 0.9, "steps": {"d": 3}}}
    with pytest.raises(StorageError, match="where there are none"):
        require_claims(told)
    require_claims({**told, "phases": {"d": meta()}})


def test_adascale_keeps_numbers_of_each_group_of_the_optimizer():
    require_claims({**meta(), "adascale": GAINS})
    with pytest.raises(StorageError, match=r"keeps 2 means and 1 variances, but .* has 1 groups"):
        require_claims({**meta(), "adascale": {**GAINS, "means": [1.0, 2.0]}})
