"""What documents say that commands print."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.laws.console import commands, files, missing, run
from tests.laws.source import ROOT

CASES = [
    pytest.param(path, block, id=f"{path.name}-{number}")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    for number, block in enumerate(commands(path.read_text(encoding="utf-8")))
]

PRINTED = {}


@pytest.mark.parametrize(("path", "block"), CASES)
def test_commands_print_what_the_document_says(path, block, tmp_path, monkeypatch, capfd):
    """The commands of one block are run one after another in one folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name, source in files(path.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(source, encoding="utf-8")
    words = tuple(command.words for command in block)
    if words not in PRINTED:  # what stands in several places is run once
        PRINTED[words] = [run(each, capfd) for each in words]
    for command, printed in zip(block, PRINTED[words], strict=True):
        assert missing(command.lines, printed) is None, "\n".join(printed)


def test_there_are_commands():
    assert len(CASES) >= 6


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("a b c d", None), ("a ... d", None), ("...", None), ("... c ...", None), ("a b ...", None),
        ("a b c", "d"), ("b ...", "b"), ("... x ...", "x"), ("a d", "d"), ("... b d", "d"),
    ],
)  # fmt: skip
def test_the_law_sees(wanted, first):
    assert missing(wanted.split(), ["a", "b", "c", "d"]) == first
