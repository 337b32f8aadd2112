"""What import-linter cannot see: the thinking half has no dependency and touches no outside."""

from __future__ import annotations

import ast
import sys
import tomllib

import pytest

from tests.laws.source import FILES, ROOT, SOURCE, dotted, imported, name_of, parsed

THINKING = ("errors.py", "job.py", "plan", "program", "schedule")
EFFECTS = {"datetime", "io", "os", "pathlib", "random", "socket", "subprocess", "threading", "time"}
ENVIRONMENT = ("comm", "launch", "view", "cli")


def room(path):
    """The room a file is in, such as `plan` or `job.py`."""
    return path.relative_to(SOURCE).parts[0]


def effects(tree):
    """What in `tree` reaches outside pure functions over values."""
    for name in imported(tree):
        top = name.partition(".")[0]
        if top != "meshwright" and top not in sys.stdlib_module_names:
            yield f"imports {name}"
        if top in EFFECTS and name != "os.PathLike":
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in ("open", "print", "input"):
            yield f"line {node.lineno} calls {dotted(node.func)}"


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in THINKING], ids=name_of)
def test_the_thinking_half_is_pure(path):
    assert list(effects(parsed(path))) == []


@pytest.mark.parametrize("code", ["import torch", "import time", "open('x')", "from os import sep"])
def test_the_law_of_purity_sees(code):
    assert list(effects(ast.parse(code))) != []


@pytest.mark.parametrize("path", [f for f in FILES if room(f) not in ENVIRONMENT], ids=name_of)
def test_the_environment_is_read_at_the_edges_only(path):
    read = {"os.environ", "os.getenv", "os.putenv"}
    tree = parsed(path)
    found = [dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert read.isdisjoint([*found, *imported(tree)])


def test_every_thinking_room_is_under_the_import_contract():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [
        one for one in config["tool"]["importlinter"]["contracts"] if one["type"] == "forbidden"
    ]
    rooms = {room(path) for path in FILES} & {*THINKING, "predict"}
    assert {f"meshwright.{name.removesuffix('.py')}" for name in rooms} == set(
        contract["source_modules"]
    )
