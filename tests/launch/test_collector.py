"""The collector is put out of the way while a rank starts, and back afterwards."""

from __future__ import annotations

import gc

from meshwright.launch.collector import seldom


def test_it_is_put_back_once():
    before, frozen, usual = gc.get_threshold(), gc.get_freeze_count(), (700, 10, 10)
    try:
        gc.set_threshold(*usual)
        settled = seldom()
        assert gc.get_threshold()[0] > usual[0]
        settled()
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > frozen
        now = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        settled()
        assert gc.get_freeze_count() < now + len(kept), "what came later can be collected"
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_what_others_set_meanwhile_stays():
    usual = gc.get_threshold()
    try:
        settled = seldom()
        gc.set_threshold(123, 4, 5)
        settled()
        assert gc.get_threshold() == (123, 4, 5)
    finally:
        gc.set_threshold(*usual)
