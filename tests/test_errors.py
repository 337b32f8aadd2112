"""The exception tree and its exit statuses."""

from __future__ import annotations

import pytest

from meshwright import errors


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("UsageError", 2),
        ("PlanError", 2),
        ("InternalError", 70),
        ("UserCodeError", 71),
        ("NotTraceable", 71),
        ("OutOfMemory", 72),
        ("Stalled", 73),
        ("StorageError", 74),
        ("PeerLost", 75),
        ("VerificationFailed", 76),
    ],
)
def test_each_error_carries_its_exit_status(name, status):
    assert vars(errors)[name].exit_status == status


def test_every_error_is_in_the_tree_and_the_docstring():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = [cls for cls in classes if issubclass(cls, Exception)]
    assert len(raised) == 11
    assert all(issubclass(cls, errors.MeshwrightError) for cls in raised)
    assert all(cls.__name__ in errors.__doc__ for cls in raised)


def test_nearest_names_a_close_name():
    assert errors.nearest("microbatchs", ("data", "microbatches")) == (
        "did you mean 'microbatches'?"
    )


def test_nearest_lists_the_known_names_when_none_is_close():
    assert errors.nearest("qqq", ("zero", "data")) == "known: data, zero"
