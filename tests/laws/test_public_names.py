"""The public door: which names there are, and what opening it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import meshwright


def test_names_are_sorted_and_few():
    assert meshwright.__all__ == sorted(meshwright.__all__)
    assert len(meshwright.__all__) <= 20


@pytest.mark.parametrize("name", meshwright.__all__)
def test_every_name_is_there_and_says_what_it_is(name):
    value = vars(meshwright).get(name) or meshwright.__getattr__(name)
    assert value.__doc__


def test_dir_has_every_name():
    assert set(meshwright.__all__) <= set(dir(meshwright))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'meshwright' has no attribute 'trian'"):
        meshwright.trian  # noqa: B018  # the access is the test


def loaded_after(code):
    """Modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=50
    )
    return set(ran.stdout.split())


def test_importing_meshwright_loads_no_torch():
    heavy = {"torch", "numpy", "rich", "typer", "jinja2"}
    assert not heavy & loaded_after("import meshwright")


def test_the_thinking_half_loads_no_torch():
    code = "import meshwright; meshwright.Job, meshwright.Plan, meshwright.Mesh"
    loaded = loaded_after(code)
    assert "meshwright.plan.plan" in loaded
    assert not {"torch", "numpy"} & loaded
