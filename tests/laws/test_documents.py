"""What the documents claim: code that parses, names, files and targets that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
import torch

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


def test_the_readmes_job_learns():
    (block,) = blocks(ROOT / "README.md", "python")
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    job = names["job"]
    model = job.model()
    optimizer = job.optimizer(model)
    batch = job.data()[: job.batch_size]
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = job.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < 0.9 * losses[0]


def verbs():
    """The verbs of the README's table of commands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `mw (\w+)", text, re.MULTILINE)


def test_the_readme_has_verbs():
    assert {"train", "verify", "demo"} <= set(verbs())


@pytest.mark.mp
@pytest.mark.parametrize("verb", verbs())
def test_every_verb_helps_with_an_example(verb):
    main = "import sys; from meshwright.cli import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", main, verb, "--help"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"mw {verb}" in ran.stdout


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
