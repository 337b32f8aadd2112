"""Parts of traces, by hand, for the tests of what people see."""

from __future__ import annotations

import json

START = {"kind": "Start", "name": "start", "op": "all_reduce", "axis": "data", "ranks": [0, 1],
         "pending": "~a", "bytes": 8, "serves": [], "why": "", "lines": []}  # fmt: skip
WAIT = START | {"kind": "Wait", "name": "wait"}
RUN = {"kind": "Run", "name": "forward", "phase": "forward", "segment": 0, "ops": 3, "lines": []}


def written(folder, rank, instructions, *steps, ahead=0.0, cut=0):
    """A part, by hand: (step, stamps) each."""
    head = {"rank": rank, "coordinates": {"data": rank}, "ahead": ahead, "error": 1e-4,
            "host": f"h{rank}", "pid": 7}  # fmt: skip
    entries = [head, {"list": 0, "instructions": instructions}]
    entries += [{"step": number, "list": 0, "stamps": stamps} for number, stamps in steps]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "trace").mkdir(exist_ok=True)
    (folder / f"trace/rank{rank}.jsonl").write_text(text[: len(text) - cut])
