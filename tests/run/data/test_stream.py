"""Streams of global batches: in order, resumed at the right batch, ended in clear words."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from meshwright.errors import UserCodeError
from meshwright.run.data.samples import StreamSource, open_source

B = 4


def numbered(step, size=B):
    return {"x": torch.arange(size) + 100 * step}


class Counting:
    """An endless stream that knows where it is."""

    def __init__(self):
        self.at = 0
        self.read = 0

    def __iter__(self):
        while True:
            self.at += 1
            self.read += 1
            yield numbered(self.at - 1)

    def state_dict(self):
        return {"at": self.at, "generator": torch.tensor([self.at])}

    def load_state_dict(self, state):
        assert state["generator"].item() == state["at"]
        self.at = state["at"]


class Finite:
    """Can be iterated anew."""

    def __init__(self, batches, last=B):
        self.batches, self.last = batches, last

    def __iter__(self):
        for step in range(self.batches):
            yield numbered(step, self.last if step == self.batches - 1 else B)


def opened(data, **options):
    return open_source(data, **{"batch_size": B, "seed": 0, **options})


def first(source, step):
    return source.fetch(step, 0, B, (0, B)).tree["x"][0].item()


def test_ranks_cut_their_rows_of_one_batch():
    source = opened(Counting())
    whole = source.fetch(0, 0, B, (0, B)).tree["x"]
    parts = [source.fetch(0, a, b, (0, B)).tree["x"] for a, b in ((0, 1), (1, 4), (4, 4))]
    assert torch.equal(torch.cat(parts), whole)


def test_steps_read_ahead_stay_readable():
    source = opened(Counting())
    assert first(source, 0) == 0
    assert first(source, 1) == 100
    assert first(source, 0) == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_resuming_by_state_skips_nothing_and_repeats_nothing(ahead):
    source = opened(Counting())
    for step in range(5 + ahead):
        first(source, step)
    state = source.state(5)
    again = Counting()
    resumed = opened(again)
    resumed.restore(state)
    assert first(resumed, 5) == first(source, 5) == 500
    assert again.read == 1
    assert resumed.notes == []


def test_the_state_at_the_very_start_and_after_a_restore():
    source = opened(Counting())
    resumed = opened(Counting())
    resumed.restore(source.state(0))
    assert first(resumed, 0) == 0
    again = opened(Counting())
    again.restore(resumed.state(1))
    third = opened(Counting())
    third.restore(again.state(1))
    assert first(third, 1) == 100


def test_without_state_dict_batches_are_read_again_and_dropped_with_a_note():
    source = opened(Finite(10))
    for step in range(4):
        first(source, step)
    resumed = opened(Finite(10))
    resumed.restore(source.state(3))
    assert first(resumed, 3) == 300
    assert ["first 3 batches were read again" in note for note in resumed.notes] == [True]


def test_a_finite_stream_starts_again_with_a_note():
    source = opened(Finite(3))
    assert [first(source, step) for step in range(7)] == [0, 100, 200, 0, 100, 200, 0]
    assert source.notes[0] == "the data ended after 3 batches and starts again"


class Saved(Finite):
    """A finite stream with a state, which may be that of its end."""

    def __init__(self, batches):
        super().__init__(batches)
        self.at = 0

    def __iter__(self):
        while self.at < self.batches:
            self.at += 1
            yield numbered(self.at - 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("at", range(1, 7))
def test_resuming_at_the_end_of_an_epoch(at):
    source = opened(Saved(3))
    seen = [first(source, step) for step in range(at)]
    resumed = opened(Saved(3))
    resumed.restore(source.state(at))
    seen += [first(resumed, step) for step in range(at, 8)]
    assert seen == [0, 100, 200, 0, 100, 200, 0, 100]


def test_a_generator_ends_in_clear_words():
    source = opened(numbered(step) for step in range(2))
    first(source, 1)
    with pytest.raises(UserCodeError, match="ended after 2 batches and cannot be read again"):
        first(source, 2)


def test_an_empty_stream():
    with pytest.raises(UserCodeError, match="ended after 0 batches"):
        first(opened(Finite(0)), 0)


@pytest.mark.parametrize("size", [3, 5])
def test_a_batch_of_another_size(size):
    with pytest.raises(UserCodeError, match=rf"step 2 holds {size} samples.*batch_size=4.*drop_l"):
        first(opened(Finite(2, last=size)), 1)


def failing():
    yield numbered(0)
    raise KeyError("gone")


def test_an_exception_names_the_step():
    source = opened(failing())
    first(source, 0)
    with pytest.raises(UserCodeError, match=r"next\(\) raised KeyError in step 2: 'gone'"):
        first(source, 1)


def test_a_state_that_json_cannot_hold():
    class Odd(Counting):
        def state_dict(self):
            return {"at": {1, 2}}

    with pytest.raises(UserCodeError, match=r"state_dict\(\)\['at'\] is of type set"):
        first(opened(Odd()), 0)


def test_evaluation_is_one_pass_with_a_short_end_that_can_be_repeated():
    source = opened(Finite(3, last=2), training=False)
    for _ in range(2):
        assert [len(batch.tree["x"]) for batch in source.batches()] == [4, 4, 2]
    assert [source.size(step) for step in range(4)] == [4, 4, 2, 0]


def test_epochs_need_a_length():
    with pytest.raises(UserCodeError, match="epochs=3, but its data is an iterable of batches"):
        opened(Counting()).steps(3)


def test_a_state_of_another_kind_of_data():
    source = opened(Counting())
    with pytest.raises(UserCodeError, match="was a dataset with a length when the checkpoint"):
        source.restore({"kind": "map", "step": 1, "length": 4})


def test_a_collate_function_has_nothing_to_do():
    with pytest.raises(UserCodeError, match="are collated already"):
        opened(Counting(), collate=list)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(10_000))


def test_a_loader_over_an_iterable_dataset_is_a_stream():
    source = opened(DataLoader(Endless(), batch_size=B))
    assert isinstance(source, StreamSource)
    assert source.fetch(1, 2, 4, (0, 4)).tree.tolist() == [6, 7]


def test_an_iterable_dataset_of_samples_is_told_to_batch():
    with pytest.raises(UserCodeError, match="holds no tensor with a sample on dim 0"):
        opened(Endless()).fetch(0, 0, B, (0, B))
