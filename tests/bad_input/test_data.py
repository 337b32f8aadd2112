"""Data that is too short, of a wrong form, raises or ends."""

from __future__ import annotations

import pytest

RAISES = """
class Data(Data):
    def __getitem__(self, index):
        if index == 13:
            raise ValueError("corrupt row")
        return super().__getitem__(index)
"""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("lambda: Data(5)", ("5 samples, fewer than batch_size=8", "use batch_size=5 or less")),
        ("lambda: Data(0)", ("the dataset (Data) is empty",)),
        ("lambda: []", ("is empty",)),
        ("lambda: None", ("data() returned None", "a map-style dataset")),
        ("lambda: Data", ("data() returned the class Data", "call it")),
        ("lambda: open('none/text')", ("FileNotFoundError", "none/text", "job.py:")),
        ("lambda: iter(())", ("the data ended after 0 batches",)),
    ],
)
def test_data_that_holds_no_batch(train, data, words):
    train(data=data).fails(71, *words)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ("torch.stack([s['x'] for s in samples], 1)", ("shape (4, 8)", "dim 0 must be the 8")),
        ("torch.stack([s['x'] for s in samples])[:7]", ("shape (7, 4)", "dim 0 must be the 8")),
        ("torch.tensor(1.0)", ("without dims", "one value per sample")),
        ("torch.stack([s['x'] for s in samples]).numpy()", ("ndarray", "torch.as_tensor")),
    ],
)
def test_a_leaf_whose_dim_0_is_not_the_batch(train, x, words):
    collate = f"lambda samples: {{'y': torch.stack([s['y'] for s in samples]), 'x': {x}}}"
    train(collate=collate).fails(71, "batch['x']", *words)


def test_a_batch_without_tensors(train):
    train(collate="lambda samples: {'n': len(samples)}").fails(71, "holds no tensor")


def test_a_sample_that_raises(train):
    done = train(extra=RAISES, steps="8")
    said = done.fails(71, "dataset[13] raised ValueError: corrupt row", "of its batch")
    assert 'in __getitem__ raise ValueError("corrupt row")' in said


def test_a_sample_that_raises_in_a_worker_process(train):
    loader = "lambda: torch.utils.data.DataLoader(Data(), shuffle=True, num_workers=1)"
    said = train(extra=RAISES, data=loader, steps="8").fails(71, "dataset[13] raised ValueError")
    assert "in a data worker process, " in said
    assert 'in __getitem__: raise ValueError("corrupt row")' in said


def test_samples_that_do_not_collate(train):
    extra = """
    class Data(Data):
        def __getitem__(self, index):
            return {"x": torch.ones(4 + index % 2), "y": torch.ones(1)}
    """
    train(extra=extra).fails(71, "collating 8 samples of step 1 raised", "a collate function")


def test_a_stream_of_other_batches(train):
    stream = "lambda: [{'x': torch.ones(7, 4), 'y': torch.ones(7, 1)}].__iter__()"
    train(data=stream).fails(71, "step 1 holds 7 samples", "batch_size=8", "drop_last=True")


def test_a_stream_that_ends(train):
    stream = "lambda: ({'x': torch.ones(8, 4), 'y': torch.ones(8, 1)} for _ in range(2))"
    train(data=stream).fails(71, "ended after 2 batches", "step 3 needs one", "train fewer steps")


def test_a_stream_that_raises(train):
    extra = """
    def stream():
        yield {"x": torch.ones(8, 4), "y": torch.ones(8, 1)}
        raise ConnectionError("the bucket is gone")
    """
    train(extra=extra, data="stream").fails(71, "ConnectionError in step 2", "the bucket is gone")


def test_a_sampler_of_the_loaders_own(train):
    loader = (
        "lambda: torch.utils.data.DataLoader(Data(), sampler=torch.utils.data."
        "WeightedRandomSampler([1.0] * 64, 64))"
    )
    train(data=loader).fails(71, "WeightedRandomSampler", "must not depend on the number of ranks")


def test_epochs_of_a_stream(train):
    stream = "lambda: ({'x': torch.ones(8, 4), 'y': torch.ones(8, 1)} for _ in range(2))"
    train(data=stream, steps="None", epochs="2").fails(71, "epochs=2", "give the job steps instead")


@pytest.mark.parametrize("evaluation", ["lambda: Data(0)", "lambda: None"])
def test_a_held_out_set_that_is_none(train, evaluation):
    train(evaluation=evaluation).fails(71, "data")
