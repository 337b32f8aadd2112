"""What the documents claim: code that parses, names, files and targets that exist."""

from __future__ import annotations

import ast
import re

import pytest

import meshwright
from tests.laws.source import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path, language):
    """Fenced blocks of one language in a document."""
    text = path.read_text(encoding="utf-8")
    return [body for found, body in FENCE.findall(text) if found == language]


def title(path):
    """A document's name in messages."""
    return path.relative_to(ROOT).as_posix()


def test_the_readme_has_code():
    assert blocks(ROOT / "README.md", "python")
    assert blocks(ROOT / "README.md", "bash")


@pytest.mark.parametrize("path", DOCUMENTS, ids=title)
def test_python_blocks_parse_and_use_public_names(path):
    for block in blocks(path, "python"):
        used = [
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("mw", "meshwright")
        ]
        assert set(used) <= set(meshwright.__all__)


@pytest.mark.parametrize("path", DOCUMENTS, ids=title)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=title)
def test_links_to_files_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert missing == []


def test_the_version_is_said_once():
    assert f'version = "{meshwright.__version__}"' in (ROOT / "pyproject.toml").read_text()
