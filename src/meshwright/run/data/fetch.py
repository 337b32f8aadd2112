"""Reading and collating samples: the same code in this process and in worker processes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from meshwright.errors import MeshwrightError, UserCodeError
from meshwright.run.data import order
from meshwright.run.data.batch import checked, cut
from meshwright.run.data.seeding import Generators, put_back, seed_generators

__all__ = ["Indexed", "Loaded", "Reader", "Request", "Samples", "Workers"]


@runtime_checkable
class Indexed(Protocol):
    """Gives a sample for an index."""

    def __getitem__(self, index: int, /) -> Any:
        """The sample at `index`."""


@runtime_checkable
class Samples(Indexed, Protocol):
    """A map-style dataset: it has a length too."""

    def __len__(self) -> int:
        """How many samples."""


class Request(NamedTuple):
    """Samples `[start, stop)` of a step's global batch, collated as part of `[low, high)`."""

    step: int
    start: int
    stop: int
    low: int
    high: int


class Loaded(NamedTuple):
    """A checked tree, and whether collating drew random numbers."""

    tree: Any
    drew: bool


class _Failed(NamedTuple):
    """An error as a worker process sends it: exceptions do not travel whole."""

    message: str
    details: str


@dataclass(slots=True, eq=False)
class Reader:
    """Reads samples by position and collates them.

    Seeding Python's and numpy's generators costs more than most datasets do. Where no sample of the
    first batch drew from them they are left alone, and a batch after which they are not as before
    is read again in full.

    Attributes:
        quiet: no sample was seen to draw from Python's or numpy's generators; None: none was read.
    """

    data: Samples
    collate: Callable[[list[Any]], Any]
    length: int
    batch_size: int
    seed: int
    shuffled: bool
    quiet: bool | None = None

    def load(self, request: Request) -> Loaded:
        """The samples of `request`; Python's, numpy's and torch's generators stay as they were.

        Raises:
            UserCodeError: the dataset or collate raised, or the batch breaks the rules.
        """
        base = request.step * self.batch_size
        first, last = base + request.low, base + request.high
        found = order.indices(
            first, last, length=self.length, seed=self.seed, shuffled=self.shuffled
        ).tolist()
        loaded = self._quietly(request, first, found) if self.quiet else None
        return self._seeded(request, first, found) if loaded is None else loaded

    def _quietly(self, request: Request, first: int, found: list[int]) -> Loaded | None:
        """Only torch's generator is seeded; None if another one was drawn from after all."""
        before = Generators.read()
        samples = []
        try:
            seeds = order.sample_seeds(self.seed, first, first + len(found))
            for position, (index, seed) in enumerate(zip(found, seeds, strict=True), first):
                torch.default_generator.manual_seed(seed)
                samples.append(self._sample(position, index))
            torch.default_generator.manual_seed(order.collate_seed(self.seed, request.step))
            fresh = torch.default_generator.get_state()
            tree = self._collated(samples, request.step)
            after = Generators.read()
        except BaseException:
            before.write()
            raise
        torch.default_generator.set_state(before.torch)
        if not before.same_python(after):
            before.write()
            self.quiet = False
            return None
        return Loaded(self._part(tree, request), drew=not torch.equal(fresh, after.torch))

    def _seeded(self, request: Request, first: int, found: list[int]) -> Loaded:
        with put_back():
            samples, quiet = [], True
            seeds = order.sample_seeds(self.seed, first, first + len(found))
            for position, (index, seed) in enumerate(zip(found, seeds, strict=True), first):
                seed_generators(seed)
                before = Generators.read() if self.quiet is None else None
                samples.append(self._sample(position, index))
                quiet = quiet and before is not None and before.same_python(Generators.read())
            if self.quiet is None:
                self.quiet = quiet
            seed_generators(order.collate_seed(self.seed, request.step))
            fresh = Generators.read()
            tree = self._collated(samples, request.step)
            drew = not fresh.same(Generators.read())
        return Loaded(self._part(tree, request), drew)

    def _part(self, tree: Any, request: Request) -> Any:
        size = request.high - request.low
        start, stop = request.start - request.low, request.stop - request.low
        return cut(checked(tree, size), start, stop, size)

    def _sample(self, position: int, index: int) -> Any:
        try:
            return self.data[index]
        except Exception as error:  # the user's dataset may raise anything
            raise UserCodeError(
                f"dataset[{index}] raised {_said(error)} (step {position // self.batch_size + 1}, "
                f"sample {position % self.batch_size} of its batch)"
            ) from error

    def _collated(self, samples: list[Any], step: int) -> Any:
        try:
            return self.collate(samples)
        except Exception as error:  # the user's collate may raise anything
            raise UserCodeError(
                f"collating {len(samples)} samples of step {step + 1} raised {_said(error)}; "
                f"{_types(samples)}; make them alike, or give the job a collate function"
            ) from error


def _types(samples: list[Any]) -> str:
    """Of which types samples are, and the first that is unlike sample 0."""
    first = type(samples[0]).__name__
    other = next((k for k, s in enumerate(samples) if type(s).__name__ != first), None)
    if other is None:
        return f"samples are of type {first}"
    return f"sample 0 is of type {first}, but sample {other} of {type(samples[other]).__name__}"


class Workers:
    """Worker processes that load ahead what the steps before show will be asked for.

    The first step is loaded in this process; its requests are the pattern of the next. A request
    that was not foreseen ends the reading ahead and begins a new pattern, and is always right.
    """

    def __init__(self, reader: Reader, settings: dict[str, Any], last_step: int | None) -> None:
        self._reader, self._settings, self._last_step = reader, settings, last_step
        self._ahead: Iterator[Any] | None = None
        self._foreseen: Iterator[Request] = iter(())
        self._expected: Request | None = None
        self._seen: list[Request] = []

    def load(self, request: Request) -> Loaded:
        """As `Reader.load`."""
        if request != self._expected:
            self.close()
            pattern = self._pattern_for(request)
            if pattern:
                self._start(request.step, pattern)
            else:
                self._seen.append(request)
                return self._reader.load(request)
        return self._take()

    def close(self) -> None:
        """End the worker processes."""
        self._ahead = self._expected = None

    def _pattern_for(self, request: Request) -> tuple[Request, ...]:
        """The requests of the step just before, if `request` begins a step as that one began."""
        seen = self._seen
        if seen and request.step == seen[0].step:
            return ()
        self._seen = []
        if seen and request.step == seen[0].step + 1 and request[1:] == seen[0][1:]:
            return tuple(seen)
        return ()

    def _start(self, step: int, pattern: tuple[Request, ...]) -> None:
        self._foreseen = _repeated(step, pattern, self._last_step)
        self._expected = next(self._foreseen)
        self._ahead = iter(
            DataLoader(
                # A dataset to the loader, which passes on what the sampler gives: requests.
                cast("Dataset[Any]", _Remote(self._reader)),
                batch_size=None,
                sampler=_repeated(step, pattern, self._last_step),
                collate_fn=_as_it_is,
                **self._settings,
            )
        )

    def _take(self) -> Loaded:
        assert self._ahead is not None
        try:
            answer = next(self._ahead)
        except RuntimeError as error:
            raise UserCodeError(
                f"a data worker process ended: {error}; run with num_workers=0 to see its error"
            ) from error
        self._expected = next(self._foreseen, None)
        if isinstance(answer, _Failed):
            failure = UserCodeError(answer.message)
            where, _, whole = answer.details.partition("\n")
            failure.add_note(where)
            failure.add_note(whole)
            raise failure
        return Loaded(*answer)


class _Remote:
    """The reader in a worker process."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, request: Request) -> Loaded | _Failed:
        try:
            return self._reader.load(request)
        except MeshwrightError as error:
            raised = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
            line = f"{raised.filename}:{raised.lineno} in {raised.name}: {raised.line}"
            return _Failed(
                str(error), f"in a data worker process, {line}\n" + traceback.format_exc()
            )


def _repeated(step: int, pattern: tuple[Request, ...], last: int | None) -> Iterator[Request]:
    for later in count(step):
        if last is not None and later > last:
            return
        yield from (request._replace(step=later) for request in pattern)


def _as_it_is(value: Any) -> Any:
    return value


def _said(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
