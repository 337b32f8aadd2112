"""Text families under every kind of plan equal one device, with the weights truly split."""

from __future__ import annotations

import itertools
from fnmatch import fnmatch
from functools import cache

import pytest

from meshwright.program.explain import collectives
from meshwright.program.layout import Shard
from meshwright.run.form import first_micros
from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.zoo_text import FAMILIES

PLANS = (
    "data=2",
    "tensor=2",
    "data=2,tensor=2",
    "context=2",
    "zero3,data=2",
    "zero3,data=2,tensor=2",
    "zero3,data=4,shard=2",
)
MICROBATCHES = (1, 3)
