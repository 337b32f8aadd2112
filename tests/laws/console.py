"""Commands in documents, run as they stand there, beside what they print."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from meshwright.cli import main

ELLIPSIS = "..."
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a document, and the lines that the document says it prints."""

    words: tuple[str, ...]
    lines: tuple[str, ...]


def commands(text):
    """The `mw` commands of each of a document's console blocks, each with what it prints."""
    for language, body in _FENCE.findall(text):
        if language == "console":
            block = []
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, *lines = part.splitlines()
                program, *words = shlex.split(command)
                assert program == "mw", command
                block.append(Command(tuple(words), tuple(lines)))
            yield tuple(block)


def files(text):
    """(name, source) of the blocks of Python and TOML that begin with their file's name."""
    for language, body in _FENCE.findall(text):
        named = re.match(r"# (\w+\.(?:py|toml))\n", body)
        if language in ("python", "toml") and named:
            yield named[1], body


def run(words, capfd):
    """What a command prints, errors last; ends of lines that are blank are left out."""
    capfd.readouterr()
    main(list(words))
    out, err = capfd.readouterr()
    return [line.rstrip() for line in (out + err).splitlines()]


def missing(wanted, printed):
    """The first line of `wanted` that is not printed where it should be; None if all are.

    `...` stands for any lines, and at the end of a line for any words.
    """
    place, free = 0, False
    for line in wanted:
        if line == ELLIPSIS:
            free = True
            continue
        until = len(printed) if free else place + 1
        found = next(
            (k for k in range(place, until) if k < len(printed) and _is(line, printed[k])), None
        )
        if found is None:
            return line
        place, free = found + 1, False
    return None if free or place == len(printed) else printed[place]


def _is(wanted, line):
    """Words count, not how far apart columns are: that depends on the widest number of a table."""
    wanted, line = (" ".join(text.split()) for text in (wanted, line))
    if wanted.endswith(ELLIPSIS):
        return line.startswith(wanted.removesuffix(ELLIPSIS).rstrip())
    return line == wanted
