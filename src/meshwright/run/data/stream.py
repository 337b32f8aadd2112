"""A stream: an iterable of global batches, read in step on every rank, resumed by its state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader

from meshwright.errors import UserCodeError
from meshwright.run.checkpoint.plain import from_plain, to_plain
from meshwright.run.data.batch import checked, rows

__all__ = ["Stateful", "Stream"]

_KEPT = 3  # the step being run, the one read ahead, and one to spare


@runtime_checkable
class Stateful(Protocol):
    """What torchdata's `StatefulDataLoader` offers, and any stream may."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""


class Stream:
    """Batches by step. Steps come in order; the last few stay readable.

    A stream that ends is read again from its start where `iter` gives a new iterator; otherwise
    its end is an error in training. `notes` collects what the user should be told.
    """

    def __init__(self, data: Iterable[Any], batch_size: int, *, training: bool) -> None:
        self.notes: list[str] = []
        self.kept = _KEPT  # steps that stay readable
        self._data, self._batch_size, self._training = data, batch_size, training
        self._iterator: Iterator[Any] | None = None
        self._next = 0  # the step whose batch is read next
        self._barren = 0  # iterators in a row that ended without a batch
        self._batches: dict[int, tuple[Any, int]] = {}
        self._states: dict[int, Any] = {}  # of the stream, before that step's batch was read

    @property
    def has_workers(self) -> bool:
        """Whether it is a DataLoader that reads in processes of its own."""
        return isinstance(self._data, DataLoader) and self._data.num_workers > 0

    def batch(self, step: int) -> tuple[Any, int]:
        """The checked global batch of `step` and its samples; 0 samples where evaluation ended.

        Raises:
            UserCodeError: the stream raised, ended, or gave a batch that breaks the rules.
        """
        if step < self._next and step not in self._batches:
            self._rewind()
        while self._next <= step:
            self._advance()
        return self._batches[step]

    def state(self, step: int) -> dict[str, Any]:
        """JSON-able: how to go on with `step` as the next one."""
        if not isinstance(self._data, Stateful):
            return {"kind": "stream", "step": step, "stream": None}
        if step == self._next:
            self._begin_if_new()
            self._remember()
        if step not in self._states:
            raise UserCodeError(
                f"the stream's state before step {step} is not kept; it has read up to step "
                f"{self._next}"
            )
        return {"kind": "stream", "step": step, "stream": self._states[step]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; without a `state_dict` the batches before it are read and dropped."""
        step, inner = state["step"], state["stream"]
        self._iterator, self._barren = None, 0
        self._batches.clear()
        self._states.clear()
        if inner is not None and isinstance(self._data, Stateful):
            self._call("load_state_dict", lambda data: data.load_state_dict(from_plain(inner)))
            self._next = step
            return
        self._next = 0
        if step:
            self.notes.append(
                f"the data has no state_dict, so its first {step} batches were read again and "
                "dropped; give it state_dict() and load_state_dict(state) to resume at once"
            )
        while self._next < step:
            self._advance()

    def _rewind(self) -> None:
        """Evaluation passes begin anew; training never goes back without `restore`."""
        assert not self._training, "a stream's steps come in order"
        self._iterator, self._next = None, 0
        self._batches.clear()

    def _advance(self) -> None:
        step = self._next
        iterator = self._begin_if_new()
        self._remember()
        batch = self._pull(iterator)
        if batch is None:
            self._batches[step] = (None, 0)
        else:
            size = self._samples(step, batch[0])
            self._batches[step] = (checked(batch[0], size), size)
        self._next = step + 1
        for kept in (self._batches, self._states):
            kept.pop(step - self.kept, None)

    def _samples(self, step: int, batch: Any) -> int:
        size = rows(batch)
        allowed = size == self._batch_size if self._training else 0 < size <= self._batch_size
        if not allowed:
            rule = "be" if self._training else "be at most"
            raise UserCodeError(
                f"the stream's batch of step {step + 1} holds {size} samples on dim 0, but must "
                f"{rule} the global batch of batch_size={self._batch_size}; yield whole global "
                f"batches (in a DataLoader: batch_size={self._batch_size}, drop_last=True), or set "
                "the job's batch_size"
            )
        return size

    def _pull(self, iterator: Iterator[Any]) -> tuple[Any] | None:
        """The next batch, or None where an evaluation pass is over."""
        batch = self._next_of(iterator)
        while batch is None and self._training:
            self._barren += 1
            again = self._begin()
            # A stream resumed at its very end is empty once; twice means that it has nothing.
            if again is iterator or self._barren > 1:
                raise UserCodeError(
                    f"the data ended after {self._next} batches and cannot be read again, but step "
                    f"{self._next + 1} needs one; yield more, return an object that can be "
                    "iterated anew, or train fewer steps"
                )
            self.notes.append(f"the data ended after {self._next} batches and starts again")
            self._iterator = iterator = again
            batch = self._next_of(iterator)
        self._barren = 0
        return batch

    def _begin_if_new(self) -> Iterator[Any]:
        if self._iterator is None:
            self._iterator = self._begin()
        return self._iterator

    def _begin(self) -> Iterator[Any]:
        return self._call("iter()", iter)  # type: ignore[no-any-return]

    def _next_of(self, iterator: Iterator[Any]) -> tuple[Any] | None:
        end = object()
        batch = self._call("next()", lambda _: next(iterator, end))
        return None if batch is end else (batch,)

    def _remember(self) -> None:
        """Keep the state of now; what is read ahead must not be skipped after a resume."""
        if not (self._training and isinstance(self._data, Stateful)):
            return
        state = self._call("state_dict", lambda data: data.state_dict())
        self._states[self._next] = to_plain(state, "state_dict()")

    def _call(self, what: str, do: Any) -> Any:
        try:
            return do(self._data)
        except Exception as error:  # the user's stream may raise anything
            raise UserCodeError(
                f"the data's {what} raised {type(error).__name__} in step {self._next + 1}: {error}"
            ) from error
