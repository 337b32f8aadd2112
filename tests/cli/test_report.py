"""`mw report`: a page of a run that `mw train` made and `mw verify` checked."""

from __future__ import annotations

import json


def test_a_run_becomes_a_page(mw, folder):
    mw("train", "sums.py", "--run-dir", "out")
    mw("verify", "sums.py", "--plan", "data=2", "--run-dir", "out")
    done = mw("report", "out", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == {"report": "out/report.html"}
    page = (folder / "out" / "report.html").read_text()
    assert "sums.py" in page
    assert "float64" in page
    assert mw("report", "out").out == "out/report.html\n"


def test_a_damaged_run_is_a_storage_error(mw, folder):
    (folder / "out").mkdir()
    (folder / "out" / "run.json").write_text("{")
    done = mw("report", "out")
    assert done.status == 74
    assert "out/run.json is not JSON" in done.err
