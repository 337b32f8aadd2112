"""Equality tests: tiny models on as many ranks as fit a plan, all in one thread."""

from __future__ import annotations

import pytest
import torch

from tests.equal.record import PAGE, Record, tree


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models are too small for a second thread to help, and cores are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def record():
    """The matrix's results so far; its page is written when the last cell of a session is done."""
    kept = Record(tree())
    yield kept
    PAGE.write_text(kept.page())
