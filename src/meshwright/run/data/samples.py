"""The data of a job, by step and sample: whatever `data()` returned, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from meshwright.errors import UserCodeError
from meshwright.run.data import order
from meshwright.run.data.batch import Batch, cut, digest
from meshwright.run.data.fetch import Indexed, Loaded, Reader, Request, Samples, Workers
from meshwright.run.data.stream import Stream

__all__ = ["MapSource", "Source", "StreamSource", "open_source"]

Collate = Callable[[list[Any]], Any]


class Source(Protocol):
    """Global batches, of which a rank fetches its part.

    Attributes:
        whole: set it when ranks' digests differed: from then on each rank collates the whole
            micro-batch and cuts its samples out, so that shapes agree.
        length: samples per epoch, None for a stream.
    """

    whole: bool
    length: int | None

    @property
    def notes(self) -> list[str]:
        """What the user should be told; whoever tells it empties the list."""

    @property
    def reads_ahead(self) -> bool:
        """Whether processes of its own do; they are not to be started from a thread."""

    def fetch(self, step: int, start: int, stop: int, micro: tuple[int, int]) -> Batch:
        """Samples `[start, stop)` of the global batch of `step`, within micro-batch `micro`."""

    def size(self, step: int) -> int:
        """Samples in the batch of `step`: `batch_size`; in evaluation fewer, at last 0."""

    def steps(self, epochs: int) -> int:
        """How many steps `epochs` passes take."""

    def keep(self, ahead: int) -> None:
        """Where so many steps more are read ahead, the state of each stays known."""

    def state(self, step: int) -> dict[str, Any]:
        """JSON-able: how to go on with `step` as the next one."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""

    def close(self) -> None:
        """End worker processes."""

    def batches(self) -> Iterator[Batch]:
        """Whole global batches from step 0 on: endless in training, one pass in evaluation."""


class MapSource:
    """A map-style dataset: every sample once per epoch, in an order that depends on the seed only.

    Nothing but the step is state: any step can be fetched at any time.
    """

    def __init__(self, reader: Reader, *, training: bool, workers: Workers | None = None) -> None:
        self.whole = False
        self.notes: list[str] = []
        self.length: int | None = reader.length
        self._reader, self._training, self._workers = reader, training, workers
        self._drawing = False  # collate draws: it runs on the whole global batch
        self._batch: tuple[int, Any] = (-1, None)  # the last whole batch of such a collate

    @property
    def reads_ahead(self) -> bool:
        """Whether worker processes do."""
        return self._workers is not None

    def fetch(self, step: int, start: int, stop: int, micro: tuple[int, int]) -> Batch:
        """Samples `[start, stop)` of the global batch of `step`.

        Args:
            step: 0 or more.
            start: the first sample, within the batch.
            stop: one past the last; `start == stop` gives tensors of 0 rows.
            micro: the micro-batch's (start, stop), which holds the samples.

        Raises:
            UserCodeError: the dataset or collate raised, or the batch breaks the rules.
        """
        self._require_same_length(step)
        if not self._drawing:
            loaded = self._load(step, start, stop, micro)
            if not loaded.drew:
                return Batch(loaded.tree, digest(loaded.tree, stop - start))
            self._found_drawing()
        tree = cut(self._whole_batch(step), start, stop, self.size(step))
        # Marked, so that ranks see it if only some of them met samples whose collating draws.
        return Batch(tree, digest(tree, stop - start) ^ 1)

    def size(self, step: int) -> int:
        """Samples in the batch of `step`: `batch_size`; in evaluation fewer, at last 0."""
        full = self._reader.batch_size
        if self._training:
            return full
        return max(0, min(full, self._reader.length - step * full))

    def steps(self, epochs: int) -> int:
        """How many steps `epochs` passes take; the last may reach into the next epoch."""
        return order.steps_in(epochs, self._reader.length, self._reader.batch_size)

    def keep(self, ahead: int) -> None:
        """A step's samples depend on nothing else."""

    def state(self, step: int) -> dict[str, Any]:
        """JSON-able: how to go on with `step` as the next one."""
        return {"kind": "map", "step": step, "length": self._reader.length}

    def restore(self, state: dict[str, Any]) -> None:
        """Check that the order of samples is the one that `state` was saved under.

        Raises:
            UserCodeError: the data is of another kind or length.
        """
        _require_kind("map", state)
        if state["length"] != self._reader.length:
            raise UserCodeError(
                f"the dataset has {self._reader.length} samples, but had {state['length']} when "
                "the checkpoint was written, and the order of samples depends on it; give it the "
                "same samples, or start afresh"
            )

    def close(self) -> None:
        """End worker processes."""
        if self._workers is not None:
            self._workers.close()

    def batches(self) -> Iterator[Batch]:
        """Whole global batches from step 0 on: endless in training, one pass in evaluation."""
        return _batches(self)

    def _load(self, step: int, start: int, stop: int, micro: tuple[int, int]) -> Loaded:
        low, high = micro if self.whole else (start, stop)
        if low == high:  # collate cannot make nothing: make one sample, and cut it away
            low, high = (start - 1, stop) if start else (0, 1)
        request = Request(step, start, stop, low, high)
        return (self._workers or self._reader).load(request)

    def _found_drawing(self) -> None:
        self._drawing = True
        self.close()
        self.notes.append(
            "the collate function draws random numbers, so every rank collates the whole global "
            "batch and takes its samples from it; draw in the dataset to share the work"
        )

    def _whole_batch(self, step: int) -> Any:
        if self._batch[0] != step:
            size = self.size(step)
            loaded = self._load(step, 0, size, (0, size))
            self._batch = (step, loaded.tree)
        return self._batch[1]

    def _require_same_length(self, step: int) -> None:
        now = len(self._reader.data)
        if now != self._reader.length:
            raise UserCodeError(
                f"the dataset has {now} samples in step {step + 1}, but had {self._reader.length} "
                "when the run began, and the order of samples depends on it; keep its length"
            )


class StreamSource:
    """An iterable of global batches, read on every rank and cut on dim 0."""

    def __init__(self, stream: Stream) -> None:
        self.whole = False
        self.length: int | None = None
        self._stream = stream

    @property
    def notes(self) -> list[str]:
        """What the user should be told; whoever tells it empties the list."""
        return self._stream.notes

    @property
    def reads_ahead(self) -> bool:
        """Whether worker processes do."""
        return self._stream.has_workers

    def fetch(self, step: int, start: int, stop: int, micro: tuple[int, int]) -> Batch:
        """Samples `[start, stop)` of the global batch of `step`; `micro` makes no difference.

        Raises:
            UserCodeError: the stream raised, ended, or gave a batch that breaks the rules.
        """
        del micro
        tree, size = self._stream.batch(step)
        part = cut(tree, start, stop, size)
        return Batch(part, digest(part, stop - start))

    def size(self, step: int) -> int:
        """Samples in the batch of `step`; 0 where an evaluation pass is over."""
        return self._stream.batch(step)[1]

    def steps(self, epochs: int) -> int:
        """A stream does not know its length.

        Raises:
            UserCodeError: always.
        """
        raise UserCodeError(
            f"the job asks for epochs={epochs}, but its data is an iterable of batches, whose "
            "length is not known; give the job steps instead"
        )

    def keep(self, ahead: int) -> None:
        """Where so many steps more are read ahead, the state of each stays known."""
        self._stream.kept += ahead

    def state(self, step: int) -> dict[str, Any]:
        """JSON-able: how to go on with `step` as the next one."""
        return self._stream.state(step)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; without a `state_dict` the batches before it are read and dropped.

        Raises:
            UserCodeError: the data is of another kind, raised, or ended.
        """
        _require_kind("stream", state)
        self._stream.restore(state)

    def close(self) -> None:
        """Nothing to end."""

    def batches(self) -> Iterator[Batch]:
        """Whole global batches from step 0 on: endless in training, one pass in evaluation."""
        return _batches(self)


def open_source(
    data: Any,
    *,
    batch_size: int,
    seed: int,
    collate: Collate | None = None,
    training: bool = True,
) -> Source:
    """The source of batches for what the job's `data()` returned.

    Args:
        data: a map-style dataset; a `DataLoader` over one, whose dataset, collate function, worker
            settings and `shuffle` are taken over; or an iterable of global batches.
        batch_size: samples per step over all ranks.
        seed: of the order and of draws while samples are read.
        collate: makes a batch of a list of samples; the loader's, or torch's, when absent.
        training: shuffled and endless; without it one pass in the dataset's order.

    Raises:
        UserCodeError: the data is none of these, is empty, or holds fewer samples than a batch.
    """
    if isinstance(data, type):
        raise _no_data(f"the class {data.__name__}", data)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        if data.batch_size is not None or data.batch_sampler is not None:
            return _from_loader(data, batch_size, seed, collate, training=training)
    elif isinstance(data, Samples) and not isinstance(data, Mapping | str | bytes):
        reader = _reader(data, batch_size, seed, collate or default_collate, shuffled=training)
        return MapSource(_require_enough(reader, training=training), training=training)
    _require_stream(data)
    if collate is not None:
        raise UserCodeError(
            "the job has a collate function, but its data is an iterable of global batches, which "
            "are collated already; remove one of the two"
        )
    return StreamSource(Stream(data, batch_size, training=training))


def _from_loader(
    loader: DataLoader[Any], batch_size: int, seed: int, collate: Collate | None, *, training: bool
) -> MapSource:
    _require_known_sampler(loader)
    shuffled = training and isinstance(loader.sampler, RandomSampler)
    reader = _require_enough(
        _reader(loader.dataset, batch_size, seed, collate or loader.collate_fn, shuffled=shuffled),
        training=training,
    )
    workers = None
    if loader.num_workers:
        last = None if training else reader.length // batch_size - 1
        workers = Workers(reader, _worker_settings(loader), last)
    source = MapSource(reader, training=training, workers=workers)
    if loader.batch_size != batch_size:
        source.notes.append(
            f"the DataLoader's batch_size={loader.batch_size} is not used: a step is the job's "
            f"batch_size={batch_size} samples"
        )
    if training and not shuffled:
        source.notes.append(
            "the DataLoader has shuffle=False, so samples come in the dataset's order"
        )
    return source


def _worker_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    return {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }


def _reader(data: Any, batch_size: int, seed: int, collate: Collate, *, shuffled: bool) -> Reader:
    try:
        length = len(data)
    except TypeError as error:
        raise UserCodeError(
            f"the dataset ({type(data).__name__}) has no length, and the order of samples needs "
            "one; give it __len__, or make it an iterable of global batches"
        ) from error
    return Reader(data, collate, length, batch_size, seed, shuffled)


def _require_enough(reader: Reader, *, training: bool) -> Reader:
    name = type(reader.data).__name__
    if not reader.length:
        raise UserCodeError(f"the dataset ({name}) is empty; give it at least one sample")
    if training and reader.length < reader.batch_size:
        raise UserCodeError(
            f"the dataset ({name}) has {reader.length} samples, fewer than "
            f"batch_size={reader.batch_size}, so that one step would take a sample twice; use "
            f"batch_size={reader.length} or less"
        )
    return reader


def _require_known_sampler(loader: DataLoader[Any]) -> None:
    sampler = loader.sampler if loader.batch_size is not None else loader.batch_sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )
    if not plain:
        raise UserCodeError(
            f"the DataLoader has a sampler of its own ({type(sampler).__name__}), but the order of "
            "samples must not depend on the number of ranks; remove it (shuffle=True is enough, "
            "and each rank gets its own samples), or return an iterable of global batches"
        )


def _require_stream(data: Any) -> None:
    kind = type(data).__name__
    if isinstance(data, Dataset | Indexed) and not isinstance(data, Iterable):
        raise UserCodeError(
            f"the dataset ({kind}) has no length, and the order of samples needs one; give it "
            "__len__, or make it an iterable of global batches"
        )
    if isinstance(data, Iterable) and not isinstance(data, Mapping | str | bytes):
        return
    raise _no_data(str(data if data is None else kind), data)


def _no_data(what: str, data: Any) -> UserCodeError:
    hint = "; call it, so that its result is returned" if callable(data) else ""
    return UserCodeError(
        f"data() returned {what}, but must return a map-style dataset, a DataLoader over one, or "
        f"an iterable of global batches{hint}"
    )


def _require_kind(kind: str, state: dict[str, Any]) -> None:
    if state.get("kind") != kind:
        words = {"map": "a dataset with a length", "stream": "an iterable of batches"}
        was = words.get(str(state.get("kind")), repr(state.get("kind")))
        raise UserCodeError(
            f"the data is {words[kind]}, but was {was} when the checkpoint was written; give it "
            "the same data, or start afresh"
        )


def _batches(source: Source) -> Iterator[Batch]:
    step = 0
    while size := source.size(step):
        yield source.fetch(step, 0, size, (0, size))
        step += 1
