"""Checkpoints as terminal tables; rich renderables, to be printed by the caller."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.view.tables import plain_table
from meshwright.view.units import bytes_text

__all__ = ["checked_table", "contents_table", "names_table", "written_table"]

_TITLES = {
    "meshwright": "Meshwright checkpoint",
    "safetensors": "Hugging Face safetensors",
    "dcp": "torch distributed checkpoint (DCP)",
    "universal": "DeepSpeed universal checkpoint",
    "torch": "torch.save file",
}
_ROWS = 40
_LISTED = 8
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def contents_table(told: Mapping[str, Any], *, pattern: str | None, every: bool) -> RenderableType:
    """What a checkpoint holds.

    Args:
        told: as `mw checkpoint inspect --json` has it.
        pattern: of the names to be listed; without it weights and buffers are.
        every: list each layer, rather than like ones in a line.
    """
    rows = list(_rows(told["tensors"], pattern, every=every))
    shown = rows if every or pattern else rows[:_ROWS]
    parts: list[RenderableType] = [
        Text(told["path"], "bold", overflow="fold"), Text(_headline(told)), Text(), _parts(told),
    ]  # fmt: skip
    if rows:
        parts += [Text(), names_table(shown)]
    elif pattern:
        parts += [Text(), Text(f"no name is like {pattern}")]
    if len(shown) < len(rows):
        parts.append(Text(f"and {len(rows) - len(shown)} more lines: --all", "dim"))
    return Group(*parts, *_notes(told))


def _headline(told: Mapping[str, Any]) -> str:
    words = [_TITLES[told["format"]]]
    if told["step"] is not None:
        words[0] += f" of step {told['step']:,}"
    for key, text in (
        ("plan", "plan {}"), ("batch_size", "batch {}"), ("seed", "seed {}"), ("optimizer", "{}"),
    ):  # fmt: skip
        if told[key] is not None:
            words.append(text.format(told[key]))
    return ", ".join(words)


def _parts(told: Mapping[str, Any]) -> RenderableType:
    table = plain_table("part", ">tensors", ">size", "dtypes", wrapped=frozenset({"dtypes"}))
    for part in told["parts"]:
        table.add_row(
            Text(part["part"]), f"{part['tensors']:,}", bytes_text(part["bytes"]),
            Text(_dtypes(part["dtypes"])),
        )  # fmt: skip
    count = sum(part["tensors"] for part in told["parts"])
    files = told["files"]
    what = f"in {len(files):,} file{'s' * (len(files) != 1)}"
    table.add_row(
        Text("all", "bold"), Text(f"{count:,}", "bold"), Text(bytes_text(told["bytes"]), "bold"),
        Text(what, "dim"),
    )  # fmt: skip
    return table


def _dtypes(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count:,} {dtype}" for dtype, count in counts.items())


def _rows(
    tensors: Sequence[Mapping[str, Any]], pattern: str | None, *, every: bool
) -> Iterator[tuple[str, str, list[int], int, int]]:
    """Name, dtype, shape, bytes, how many such; numbered layers that are alike in one row."""
    found: dict[tuple[str, str, tuple[int, ...]], list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        name = tensor["name"]
        if pattern is None and name.startswith("optimizer/"):
            continue
        own = name.split("/", 1)[1]
        if pattern is not None and not (
            fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(own, pattern)
        ):
            continue
        alike = name if every else _NUMBER.sub("*", name)
        key = (alike, tensor["dtype"], tuple(tensor["shape"]))
        found.setdefault(key, []).append(tensor)
    for (alike, dtype, shape), those in found.items():
        name = those[0]["name"] if len(those) == 1 else alike
        shown = name if pattern else name.split("/", 1)[1]
        yield shown, dtype, list(shape), sum(t["bytes"] for t in those), len(those)


def names_table(rows: Sequence[tuple[str, str, list[int], int, int]]) -> RenderableType:
    """One line per name, or per layers that are alike."""
    several = any(count > 1 for *_, count in rows)
    columns = ["name", *([">like"] if several else []), "dtype", "shape", ">size"]
    table = plain_table(*columns, wrapped=frozenset({"name", "shape"}))
    for name, dtype, shape, size, count in rows:
        like = [f"× {count}" if count > 1 else ""] if several else []
        extent = " × ".join(map(str, shape)) if shape else "scalar"
        table.add_row(Text(name), *like, Text(dtype), Text(extent), bytes_text(size))
    return table


def checked_table(checked: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Each checkpoint that was compared with its digests, and what was found."""
    lines: list[RenderableType] = []
    for one in checked:
        good = one["whole"]
        mark = Text("PASS  " if good else "FAIL  ", "bold green" if good else "bold red")
        lines.append(Text.assemble(mark, Text(one["path"])))
        lines.append(Text(f"      {_how(one) if good else one['problem']}"))
    return Group(*lines)


def _how(one: Mapping[str, Any]) -> str:
    size = f"{one['tensors']:,} tensors, {bytes_text(one['bytes'])}"
    if one["checked"] == "nothing":
        return f"{size}: lengths and tables fit; there are no digests to compare with"
    what = {"crc32": "the CRC-32 of every storage", "sha256": "the sha256 of every file"}
    return f"{size}: {what.get(one['checked'], 'every digest')} matches"


def written_table(written: Mapping[str, Any]) -> RenderableType:
    """What was written, and what was not."""
    table = plain_table("", "", wrapped=frozenset({""}))
    table.show_header = False
    size = f"{written['tensors']:,} tensors, {bytes_text(written['bytes'])}"
    table.add_row(Text("written", "dim"), Text(f"{written['to']}", "bold"))
    table.add_row(Text(""), Text(f"{_TITLES[written['format']]}, {size}"))
    how = {"nothing": "no: it has no digests"}.get(written["checked"], written["checked"])
    table.add_row(Text("checked", "dim"), Text(how))
    for title, names in (
        ("renamed", [f"{old} → {new}" for old, new in written["renamed"].items()]),
        ("left out", [*written["dropped"], *written["unexpected"], *_kinds(written["left_out"])]),
        ("missing", [_missing(*pair) for pair in written["missing"].items()]),
        ("dtype", [f"{n}: {a}, wanted {b}" for n, (a, b) in written["dtypes"].items()]),
    ):
        for number, line in enumerate(_some(_folded(names))):
            table.add_row(Text(title if not number else "", "dim"), Text(line))
    return Group(table, *_notes(written))


def _kinds(names: Sequence[str]) -> list[str]:
    """What a format has no room for, counted by kind."""
    kinds: dict[str, int] = {}
    for name in names:
        kinds[name.split("/")[0]] = kinds.get(name.split("/")[0], 0) + 1
    return [f"{kind} state: {count:,} tensors" for kind, count in kinds.items()]


def _missing(name: str, close: str | None) -> str:
    return f"{name}; there is {close}" if close else name


def _folded(lines: Sequence[str]) -> list[str]:
    """Lines that differ in the number of a layer only, as one."""
    counts: dict[str, list[str]] = {}
    for line in lines:
        counts.setdefault(_NUMBER.sub("*", line), []).append(line)
    return [
        those[0] if len(those) == 1 else f"{alike}  × {len(those)}"
        for alike, those in counts.items()
    ]


def _some(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], *([f"... and {more} more"] if more > 0 else [])]


def _notes(told: Mapping[str, Any]) -> list[RenderableType]:
    return [Text(f"note: {note}", "dim") for note in told["notes"]]
