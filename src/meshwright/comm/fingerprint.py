"""Do all members mean the same collective? Compared when a place is first come to.

gloo adds up whatever has the right number of bytes: two collectives in another order give wrong
sums, different shapes abort the process. So the first time a rank starts a collective with some
label, all members compare what they are about to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from meshwright.comm.base import MESSAGES, Start
from meshwright.comm.roll import named
from meshwright.errors import UserCodeError

__all__ = ["BYTES", "decode", "differing", "encode", "require_same", "text"]

BYTES = 256
_UNEVEN = frozenset({"all_gather", "all_to_all", "permute"})


def text(request: Start) -> str:
    """What all members must have in common, as in `all_reduce sum float32[3, 5] (loss)`."""
    label = f" ({request.label})" if request.label else ""
    if request.op in MESSAGES:
        return _cut("message " + " ".join(_carried(request)), label)
    parts: list[str] = [request.op]
    if request.op in {"all_reduce", "reduce_scatter"}:
        parts.append(request.reduce)
    if request.op in {"broadcast", "permute"}:
        parts.append(f"root={request.root}")
    if request.tensors:
        dtype = str(request.tensors[0].dtype).removeprefix("torch.")
        if request.op in _UNEVEN:
            parts.append(dtype)
        else:
            parts += [f"{dtype}{list(tensor.shape)}" for tensor in request.tensors]
    if request.op == "all_gather":
        shapes = request.shapes or [tensor.shape for tensor in request.tensors]
        parts += [str(list(shape)) for shape in shapes]
    return _cut(" ".join(parts), label)


def _carried(request: Start) -> list[str]:
    """What goes with a message, alike on both sides."""
    if request.op == "send":
        return [_kind(tensor.dtype, tensor.shape) for tensor in request.tensors]
    return [_kind(d, shape) for d, shape in zip(request.dtypes, request.shapes, strict=True)]


def _kind(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{dtype}".removeprefix("torch.") + str(list(shape))


def _cut(what: str, label: str) -> str:
    """Cut to `BYTES`, so that a long list of shapes leaves the label to be read.

    A digest stands for what is cut: buckets may differ in their last shape only.
    """
    room, data = BYTES - len(label.encode(errors="replace")), what.encode(errors="replace")
    if len(data) > room:
        tail = f" .. #{blake2b(data, digest_size=4).hexdigest()}".encode()
        data = data[: max(room - len(tail), 0)] + tail
    return (
        (data.decode(errors="ignore") + label)
        .encode(errors="replace")[:BYTES]
        .decode(errors="ignore")
    )


def encode(words: str) -> Tensor:
    """`words` as `BYTES` bytes."""
    data = bytearray(words.encode(errors="replace")[:BYTES].ljust(BYTES, b"\0"))
    return torch.frombuffer(data, dtype=torch.uint8)


def decode(data: Tensor) -> str:
    """The words that `encode` was given."""
    return bytes(data.numpy().tobytes()).rstrip(b"\0").decode(errors="replace")


def differing(pair: Sequence[int], sent: str, wanted: str) -> str:
    """What to say when the sides of an ordered pair mean different messages."""
    return (
        f"ranks {pair[0]} and {pair[1]} disagree about the next message from rank {pair[0]} to "
        f"rank {pair[1]}: it sends {sent}; the other expects {wanted}. Both must run the same plan "
        "on the same model: look for an `if` on the rank, on data or on time in the model"
    )


def require_same(words: Sequence[str], ranks: Sequence[int], axis: str) -> None:
    """Raise unless all members, in the order of `ranks`, mean the same.

    Raises:
        UserCodeError: naming which ranks mean what.
    """
    meaning: dict[str, list[int]] = {}
    for rank, word in zip(ranks, words, strict=True):
        meaning.setdefault(word, []).append(rank)
    if len(meaning) > 1:
        told = "; ".join(f"{named(who)}: {word}" for word, who in meaning.items())
        raise UserCodeError(
            f"ranks disagree about the next collective over {axis}: {told}. All ranks must make "
            "the same calls in the same order: look for an `if` on the rank, on data or on time "
            "around step, evaluate, predict, save or your own collectives"
        )
