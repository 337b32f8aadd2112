"""Map-style data: the same global batch however it is fetched, and clear words for the rest."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from meshwright.errors import UserCodeError
from meshwright.run.data.samples import MapSource, open_source
from meshwright.run.data.seeding import Generators

B = 6
LATE = 0  # a seed whose first step, which this process reads itself, lacks sample 13


class Augmented(Dataset):
    """Samples that draw from all three generators while they are read."""

    def __init__(self, length=20):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        drawn = np.random.random()  # noqa: NPY002 - what users call
        noise = torch.tensor([random.random(), drawn, torch.rand(()).item()])
        return {"index": index, "noise": noise, "text": f"sample {index}"}


def opened(data=None, **options):
    return open_source(data or Augmented(), **{"batch_size": B, "seed": 3, **options})


def whole(source, step):
    return source.fetch(step, 0, source.size(step), (0, source.size(step))).tree


def joined(parts):
    return {
        "index": torch.cat([part["index"] for part in parts]),
        "noise": torch.cat([part["noise"] for part in parts]),
        "text": [text for part in parts for text in part["text"]],
    }


def same(one, other):
    return (
        torch.equal(one["index"], other["index"])
        and torch.equal(one["noise"], other["noise"])
        and one["text"] == other["text"]
    )


# ── any cut of a step is the same global batch ───────────────────────────────────────────────────


@given(st.integers(0, 9), st.sets(st.integers(1, B - 1)), st.sets(st.integers(1, B - 1)))
def test_any_ranks_and_micro_batches_read_the_same_global_batch(step, micro_cuts, rank_cuts):
    source = opened()
    micros = list(zip([0, *sorted(micro_cuts)], [*sorted(micro_cuts), B], strict=True))
    bounds = sorted({0, B, *micro_cuts, *rank_cuts})
    parts = []
    for start, stop in pairwise(bounds):
        micro = next(m for m in micros if m[0] <= start and stop <= m[1])
        parts.append(source.fetch(step, start, stop, micro).tree)
    assert same(joined(parts), whole(opened(), step))


def test_an_epoch_has_every_sample_once_and_batches_straddle():
    source = opened()
    seen = torch.cat([whole(source, step)["index"] for step in range(10)])  # three epochs of 20
    for epoch in range(3):
        assert sorted(seen[epoch * 20 : (epoch + 1) * 20].tolist()) == list(range(20))
    assert seen[:20].tolist() != list(range(20))


def test_a_sample_is_drawn_anew_each_epoch_but_the_same_each_time_it_is_fetched():
    data = [whole(opened(), step) for step in range(4)]
    first = {int(i): n for d in data for i, n in zip(d["index"], d["noise"], strict=True)}
    assert same(whole(opened(), 2), data[2])
    later = whole(opened(), 5)
    index = int(later["index"][0])
    assert not torch.equal(first[index], later["noise"][0])


def test_steps_can_be_fetched_in_any_order():
    source = opened()
    assert same(whole(source, 7), whole(opened(), 7))
    assert same(whole(source, 2), whole(opened(), 2))


def test_the_seed_changes_order_and_draws():
    one, other = whole(opened(), 0), whole(opened(seed=4), 0)
    assert one["index"].tolist() != other["index"].tolist()
    assert not set(one["noise"].flatten().tolist()) & set(other["noise"].flatten().tolist())


def test_the_callers_generators_are_left_alone():
    before = Generators.read()
    whole(opened(), 0)
    assert before.same(Generators.read())


class Quiet(Augmented):
    """Draws from torch's generator only, but for one sample; counts what is read."""

    def __init__(self, late):
        super().__init__(600)
        self.late, self.read = late, []

    def __getitem__(self, index):
        self.read.append(index)
        noise = torch.rand(()) + (random.random() if index == self.late else 0)
        return {"index": index, "noise": noise, "text": f"sample {index}"}


def test_generators_that_no_sample_draws_from_are_not_seeded(monkeypatch):
    """Seeding them is most of what a small batch costs."""
    source, seeded = opened(Quiet(late=None)), []
    whole(source, 0)
    monkeypatch.setattr(random, "seed", seeded.append)
    monkeypatch.setattr(np.random, "seed", seeded.append)
    for step in range(1, 5):
        whole(source, step)
    assert seeded == []
    assert len(source._reader.data.read) == 5 * B, "each sample is read once"


@pytest.mark.parametrize("step", range(1, 6))
def test_a_sample_that_draws_late_is_drawn_as_ever(step):
    late = int(whole(opened(Quiet(late=None)), step)["index"][2])
    expected = whole(opened(Quiet(late)), step)  # the first that it reads: seeded in full
    source = opened(Quiet(late))
    before = Generators.read()
    for earlier in range(step):
        whole(source, earlier)
    assert same(whole(source, step), expected)
    assert len(source._reader.data.read) == (step + 2) * B, "the batch is read again, once"
    assert before.same(Generators.read())
    whole(source, step + 1)
    assert len(source._reader.data.read) == (step + 3) * B, "and never again"


def test_an_error_leaves_the_generators_alone_too():
    class Raising(Quiet):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            if len(self.read) == B + 3:
                raise IndexError(random.random())
            return found

    source = opened(Raising(late=None))
    whole(source, 0)
    before = Generators.read()
    with pytest.raises(UserCodeError, match="IndexError"):
        whole(source, 1)
    assert before.same(Generators.read())


def test_no_samples_keep_shapes_and_digest():
    source = opened()
    for at in (0, 3, B):
        none = source.fetch(0, at, at, (0, B))
        assert none.tree["noise"].shape == (0, 3)
        assert none.tree["text"] == []
        assert none.digest == source.fetch(0, 0, B, (0, B)).digest


# ── collating ────────────────────────────────────────────────────────────────────────────────────


def padded(samples):
    """Pads to the longest of the samples at hand, so ranks' shapes differ."""
    longest = max(sample["index"] for sample in samples) + 1
    rows = [torch.arange(longest) * (torch.arange(longest) <= s["index"]) for s in samples]
    return {"x": torch.stack(rows)}


def test_ranks_with_other_shapes_have_other_digests_and_whole_makes_them_agree():
    source = opened(collate=padded)
    micro = (0, B)
    expected = source.fetch(0, 0, B, micro).tree["x"]
    parts = [source.fetch(0, a, a + 1, micro) for a in range(B)]
    assert len({part.digest for part in parts}) > 1
    source.whole = True
    parts = [source.fetch(0, a, a + 1, micro) for a in range(B)]
    assert len({part.digest for part in parts}) == 1
    assert torch.equal(torch.cat([part.tree["x"] for part in parts]), expected)
    none = source.fetch(0, 2, 2, micro)
    assert none.tree["x"].shape == (0, expected.shape[1])
    assert none.digest == parts[0].digest


def masked(samples):
    """As masked language models do: the collate function draws, once per batch."""
    noise = torch.rand(len(samples), 4)
    return {"index": torch.tensor([s["index"] for s in samples]), "mask": noise < 0.5,
            "draw": noise}  # fmt: skip


@pytest.mark.parametrize("cuts", [[0, 6], [0, 2, 4, 6], [0, 1, 5, 6]])
def test_a_collate_that_draws_sees_the_whole_global_batch(cuts):
    reference = opened(collate=masked)
    for step in range(3):
        expected = reference.fetch(step, 0, B, (0, B)).tree
        ranks = [opened(collate=masked) for _ in cuts[1:]]
        parts = [
            rank.fetch(step, a, b, (a, b)).tree
            for rank, a, b in zip(ranks, cuts[:-1], cuts[1:], strict=True)
        ]
        assert torch.equal(torch.cat([part["draw"] for part in parts]), expected["draw"])
        assert torch.equal(torch.cat([part["index"] for part in parts]), expected["index"])
        assert all("draws random numbers" in rank.notes[0] for rank in ranks)
    draws = [reference.fetch(step, 0, B, (0, B)).tree["draw"] for step in range(2)]
    assert not torch.equal(*draws)


def test_ranks_see_it_if_only_some_collates_drew():
    def sometimes(samples):
        batch = {"index": torch.tensor([s["index"] for s in samples])}
        return {**batch, "draw": torch.rand(len(samples)) if 0 in batch["index"] else
                torch.zeros(len(samples))}  # fmt: skip

    source, other = opened(collate=sometimes), opened(collate=sometimes)
    order = whole(opened(), 0)["index"].tolist() + whole(opened(), 1)["index"].tolist()
    order += whole(opened(), 2)["index"].tolist() + whole(opened(), 3)["index"].tolist()
    step, at = divmod(order.index(0), B)
    rest = (at + 1) % B
    drew = source.fetch(step, at, at + 1, (at, at + 1))
    not_drawn = other.fetch(step, rest, rest + 1, (rest, rest + 1))
    assert drew.digest != not_drawn.digest


# ── torch's DataLoader ───────────────────────────────────────────────────────────────────────────


def loader(data=None, **options):
    return DataLoader(data or Augmented(), **{"batch_size": B, "shuffle": True, **options})


def test_a_loaders_dataset_and_collate_are_taken_over():
    source = opened(loader(collate_fn=lambda samples: default_collate(samples[::-1])))
    assert whole(source, 0)["index"].tolist() == whole(opened(), 0)["index"].tolist()[::-1]
    assert source.notes == []


def test_the_jobs_collate_wins():
    source = opened(loader(collate_fn=lambda samples: None), collate=default_collate)
    assert same(whole(source, 0), whole(opened(), 0))


def test_a_loader_without_shuffle_keeps_the_datasets_order_and_says_so():
    source = opened(loader(shuffle=False))
    assert whole(source, 3)["index"].tolist() == [18, 19, 0, 1, 2, 3]
    assert "shuffle=False" in source.notes[0]


def test_a_loaders_batch_size_is_not_used_and_this_is_said():
    source = opened(loader(batch_size=2))
    assert same(whole(source, 0), whole(opened(), 0))
    assert "batch_size=2 is not used" in source.notes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": WeightedRandomSampler([1.0] * 20, 20)},
        {"sampler": RandomSampler(Augmented(), replacement=True)},
        {"sampler": RandomSampler(Augmented(), num_samples=5)},
        {"sampler": DistributedSampler(Augmented(), num_replicas=2, rank=0)},
    ],
    ids=["weighted", "replacement", "some", "distributed"],
)
def test_a_loader_with_a_sampler_of_its_own_is_refused(options):
    with pytest.raises(UserCodeError, match=r"sampler of its own \(\w+Sampler\).*remove it"):
        opened(loader(shuffle=None, **options))


def test_a_loader_with_a_batch_sampler_of_its_own_is_refused():
    data = DataLoader(Augmented(), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(UserCodeError, match=r"sampler of its own \(list\)"):
        opened(data)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data", [Augmented(), loader()], ids=["dataset", "loader"])
def test_evaluation_is_one_pass_in_order_with_a_short_end(data):
    source = opened(data, training=False)
    assert [len(batch.tree["index"]) for batch in source.batches()] == [6, 6, 6, 2]
    seen = torch.cat([batch.tree["index"] for batch in source.batches()])
    assert seen.tolist() == list(range(20))
    assert [source.size(step) for step in range(5)] == [6, 6, 6, 2, 0]


def test_evaluation_on_fewer_samples_than_a_batch():
    source = opened(Augmented(2), training=False)
    assert [len(batch.tree["index"]) for batch in source.batches()] == [2]


def test_training_is_endless():
    batches = opened().batches()
    assert [len(next(batches).tree["index"]) for _ in range(8)] == [B] * 8


# ── state ────────────────────────────────────────────────────────────────────────────────────────


def test_the_state_is_the_step_and_the_length():
    source = opened()
    source.restore(opened().state(4))
    assert opened().state(4) == {"kind": "map", "step": 4, "length": 20}


def test_a_dataset_of_another_length_cannot_go_on():
    with pytest.raises(UserCodeError, match="has 20 samples, but had 19 when the checkpoint"):
        opened().restore(opened(Augmented(19)).state(4))


def test_data_of_another_kind_cannot_go_on():
    with pytest.raises(UserCodeError, match="was an iterable of batches when the checkpoint"):
        opened().restore({"kind": "stream", "step": 3, "stream": None})


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (3, 10)])
def test_steps_of_epochs(epochs, steps):
    assert opened().steps(epochs) == steps


# ── what data() may return ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "data",
    [list(torch.arange(20)), torch.arange(20), TensorDataset(torch.arange(20)), range(20),
     np.arange(20)],
    ids=["list", "tensor", "TensorDataset", "range", "array"],
)  # fmt: skip
def test_anything_with_a_length_and_indices_is_a_dataset(data):
    source = open_source(data, batch_size=B, seed=0)
    assert isinstance(source, MapSource)
    tree = whole(source, 0)
    values = tree[0] if isinstance(tree, list | tuple) else tree
    assert sorted(values.tolist()) == sorted(set(values.tolist()))


class Unsized(Dataset):
    def __getitem__(self, index):
        return index


class OnlyIndexed:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, r"data\(\) returned None, but must return a map-style dataset"),
        ({"train": [1]}, r"data\(\) returned dict"),
        ("corpus/", r"data\(\) returned str"),
        (3, r"data\(\) returned int"),
        (lambda: [1], "returned function.*call it"),
        (Unsized(), r"\(Unsized\) has no length.*__len__"),
        (OnlyIndexed(), r"\(OnlyIndexed\) has no length.*__len__"),
        ([], r"\(list\) is empty"),
        (Augmented(5), r"has 5 samples, fewer than batch_size=6.*use batch_size=5 or less"),
    ],
)
def test_what_data_must_not_return(data, words):
    with pytest.raises(UserCodeError, match=words):
        open_source(data, batch_size=B, seed=0)


def test_an_unsized_dataset_in_a_loader():
    data = DataLoader(Unsized(), batch_size=B)
    with pytest.raises(UserCodeError, match=r"\(Unsized\) has no length"):
        open_source(data, batch_size=B, seed=0)


# ── the dataset's own errors ─────────────────────────────────────────────────────────────────────


class Failing(Augmented):
    def __getitem__(self, index):
        if index == 13:
            raise ValueError("corrupt JPEG")
        return super().__getitem__(index)


def fetch_13(source):
    for step in range(4):
        whole(source, step)


def test_an_exception_in_the_dataset_names_index_step_and_sample():
    words = r"dataset\[13\] raised ValueError: corrupt JPEG \(step \d, sample \d of its batch\)"
    with pytest.raises(UserCodeError, match=words) as caught:
        fetch_13(opened(Failing()))
    assert isinstance(caught.value.__cause__, ValueError)


def test_samples_that_do_not_fit_together():
    data = [torch.zeros(n) for n in range(1, 8)]
    with pytest.raises(UserCodeError, match="collating 6 samples of step 1 raised RuntimeError"):
        whole(open_source(data, batch_size=B, seed=0), 0)


def test_a_collate_that_drops_samples():
    source = opened(collate=lambda samples: default_collate(samples[1:]))
    with pytest.raises(UserCodeError, match=r"batch\['index'\] has shape \(5,\).* the 6 samples"):
        whole(source, 0)


def test_a_dataset_whose_length_changes():
    data = Augmented()
    source = opened(data)
    whole(source, 0)
    data.length = 19
    with pytest.raises(UserCodeError, match="has 19 samples in step 2, but had 20"):
        whole(source, 1)


# ── worker processes ─────────────────────────────────────────────────────────────────────────────


class WithProcess(Augmented):
    """Says which process read the sample."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "process": os.getpid()}


def with_workers(data, **options):
    return opened(loader(data, num_workers=2), **options)


@pytest.fixture
def closing():
    sources = []
    yield lambda source: sources.append(source) or source
    for source in sources:
        source.close()


@pytest.mark.mp
def test_workers_read_the_same_batches(closing):
    source, reference = closing(with_workers(WithProcess())), opened()
    pids = set()
    for step in range(6):
        for start, stop, micro in ((0, 2, (0, 3)), (3, 5, (3, 6))):
            got = source.fetch(step, start, stop, micro)
            assert same(got.tree, reference.fetch(step, start, stop, micro).tree)
            pids |= set(got.tree["process"].tolist())
    assert len(pids - {os.getpid()}) == 2


@pytest.mark.mp
def test_a_jump_is_right_and_workers_begin_again(closing):
    source, reference = closing(with_workers(WithProcess())), opened()
    for step in (0, 1, 2, 7, 8, 9, 3):
        assert same(whole(source, step), whole(reference, step))
    assert os.getpid() not in whole(closing(source), 4)["process"].tolist()


@pytest.mark.mp
def test_workers_evaluate_to_the_short_end(closing):
    source = closing(with_workers(WithProcess(), training=False))
    for _ in range(2):
        seen = torch.cat([batch.tree["index"] for batch in source.batches()])
        assert seen.tolist() == list(range(20))


@pytest.mark.mp
def test_an_exception_in_a_worker_keeps_its_words_and_its_frames(closing):
    source = closing(with_workers(Failing(), seed=LATE))
    with pytest.raises(UserCodeError, match=r"dataset\[13\] raised ValueError: corrupt") as caught:
        fetch_13(source)
    assert "in __getitem__" in caught.value.__notes__[0]


class Dying(Augmented):
    def __getitem__(self, index):
        if index == 13:
            os._exit(3)
        return super().__getitem__(index)


@pytest.mark.mp
def test_a_worker_that_dies_is_an_error(closing):
    source = closing(with_workers(Dying(), seed=LATE))
    with pytest.raises(UserCodeError, match=r"a data worker process ended.*num_workers=0"):
        fetch_13(source)


@pytest.mark.mp
def test_a_drawing_collate_with_workers(closing):
    source = closing(opened(loader(num_workers=2, collate_fn=masked)))
    reference = opened(collate=masked)
    for step in range(4):
        got, expected = (s.fetch(step, 2, 4, (0, 6)).tree["draw"] for s in (source, reference))
        assert torch.equal(got, expected)
