"""Nothing in the source can run code that it reads: no pickle, no torch.load, no eval."""

from __future__ import annotations

import ast

import pytest

from tests.laws.source import FILES, dotted, imported, name_of, parsed

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
CALLS = {
    "eval",
    "exec",
    "numpy.load",
    "np.load",
    "os.system",
    "torch.load",
    "torch.save",
}
# torch.distributed's *_object_* collectives pickle what they carry.
OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")


def unsafe(tree):
    """What in `tree` could run code that it reads."""
    for name in imported(tree):
        if name.partition(".")[0] in PICKLES or name in CALLS:
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in CALLS or called.endswith(OBJECTS):
                yield f"line {node.lineno} calls {called}"
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield f"line {node.lineno} passes allow_pickle"
            if any(
                keyword.arg == "shell" and not _is_false(keyword.value) for keyword in node.keywords
            ):
                yield f"line {node.lineno} runs a shell"


def _is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_unsafe(path):
    assert list(unsafe(parsed(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "torch.distributed.all_gather_object(a, b)",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "eval('1')",
    ],
)
def test_the_law_sees(code):
    assert list(unsafe(ast.parse(code))) != []
