"""Saved activations leave and come back: every list is followed, value by value."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.program import away
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.run.form import first_micros
from tests.equal.cells import MODELS
from tests.equal.harness import Case

CASE = Case(MODELS["gpt, dropout"](Path()))
PLANS = [
    "data=1",
    "zero3,data=2,microbatches=2",
    "data=1,tensor=2",
    "data=1,remat=selective,microbatches=2",
    *(
        f"zero1,data=2,pipeline=2,microbatches=4,schedule={name}"
        for name in ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
    ),
    "data=1,pipeline=2,virtual=2,microbatches=4,schedule=interleaved",
]


@pytest.fixture(autouse=True)
def all_go(monkeypatch):
    """Tiny models' values too."""
    monkeypatch.setattr(away, "LEAST", 0)


def lists_of(plan, rank=0):
    build = CASE.build(f"{plan},offload=activations")
    return build.lowered(rank, first_micros(build, CASE.data)).compiled.instructions


def follow(lists):
    """Go through a list: what is read is there, and comes back from the slot that it went to."""
    here: Counter[str] = Counter()
    slot: dict[str, int | None] = {}
    coming: dict[str, str] = {}
    moved = [0, 0]
    for each in lists.body:
        offloads = each.offloads and any(
            name.startswith(away.AWAY) or name in coming for name in (*each.inputs, *each.outputs)
        )
        if offloads and each.kind == "Stash":
            (name,), (place,) = each.inputs, each.outputs
            assert here[name], f"{name} goes, but is not there"
            assert place not in slot, f"{place} holds {slot.get(place)} still"
            slot[place] = each.microbatch
            moved[0] += 1
        elif offloads and each.kind == "Load":
            (place,), (name,) = each.inputs, each.outputs
            assert slot[place] == each.microbatch
            coming[name] = place
        elif offloads:
            (name,), (back,) = each.inputs, each.outputs
            assert slot.pop(coming.pop(name)) == each.microbatch
            assert not here[back], f"{back} comes, but is there"
            here[back] = 1
            moved[1] += 1
        else:
            if each.kind in ("Run", "Send", "Stash", "Start"):
                micro = [n for n in each.inputs if ":" in n and n[0] != "~"]
                assert all(here[n] for n in micro), each
            here.update(dict.fromkeys(each.outputs, 1))
            for name in each.inputs if each.kind == "Free" else ():
                here.pop(name, None)
    assert not slot
    assert not coming
    return tuple(moved)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_leaves_comes_back_before_it_is_read(plan, rank):
    if rank and plan.startswith("data=1") and "=2" not in plan.removeprefix("data=1"):
        rank = 0
    put, came = follow(lists_of(plan, rank if "microbatches=2" not in plan or rank == 0 else 0))
    assert put == came > 3


def test_slots_are_used_again_by_later_microbatches():
    one, many = (
        away.slots(lists_of(f"data=1,pipeline=2,microbatches={count},schedule=1f1b"))
        for count in (2, 8)
    )
    assert sum(v.bytes for v in many.values()) <= sum(v.bytes for v in one.values())


def loaded_early(body):
    """The first slot that is used twice is written a trip too early."""
    seen = set()
    for k, each in enumerate(body):
        if each.kind == "Stash" and each.offloads:
            if each.outputs[0] in seen:
                first = next(j for j, e in enumerate(body) if e.outputs == each.outputs)
                return [*body[: first + 1], each, *body[first + 1 : k], *body[k + 1 :]]
            seen.add(each.outputs[0])
    raise AssertionError


def left_out(body):
    k = next(k for k, e in enumerate(body) if e.kind == "Load" and e.offloads)
    return [*body[:k], *body[k + 1 :]]


def swapped(body):
    """Two micro-batches' values change slots on their way back."""
    loads = [k for k, e in enumerate(body) if e.kind == "Load" and e.offloads]
    one = loads[0]
    other = next(k for k in loads if body[k].microbatch != body[one].microbatch)
    found = list(body)
    found[one] = replace(found[one], inputs=body[other].inputs)
    found[other] = replace(found[other], inputs=body[one].inputs)
    return found


@pytest.mark.parametrize("slip", [loaded_early, left_out, swapped])
def test_a_slip_is_seen(slip):
    lists = lists_of("data=1,pipeline=2,microbatches=4,schedule=1f1b")
    with pytest.raises((AssertionError, KeyError)):
        follow(replace(lists, body=tuple(slip(lists.body))))


WIDE = Value("float32", (64, 64))


def sine(outputs=("o0",)):
    """One value in, its sine out, and a view of that."""
    op = Op("aten.sin.default", (Ref(0),), (), (1,))
    seen = Op("aten.view.default", (Ref(1), (64, 64)), (), (2,))
    return Program(
        (WIDE, WIDE, WIDE),
        (("i0", 0),),
        (op, seen),
        tuple((name, k + 1) for k, name in enumerate(outputs)),
    )


def chain(first, reads, far=6):
    """A Run of the first segment, `far` Runs of another, then a Run that reads."""
    body = [Instruction("Run", 0, 0, 0, ("model/w",), first)]
    body += [Instruction("Run", 1, 0, 0, ("model/w",), (f"0:x{k}",)) for k in range(far)]
    body += [Instruction("Run", 1, 0, 0, (name,), (f"0:y{name}",)) for name in reads]
    segments = (sine(tuple(f"o{k}" for k in range(len(first)))), sine())
    return InstructionList((), tuple(body), (), segments, ())


def gone(lists):
    return [e.inputs[0] for e in lists.body if e.kind == "Stash" and e.offloads]


def test_only_what_is_alone_in_its_storage_goes():
    assert gone(away.put_away(chain(("0:a",), ("0:a",)), "host")) == ["0:a"]
    assert gone(away.put_away(chain(("0:a", "0:b"), ("0:b",)), "host")) == ["0:b"]
    assert gone(away.put_away(chain(("0:a", "0:b"), ("0:a", "0:b")), "host")) == []


def test_small_and_near_values_stay():
    lists = chain(("0:a",), ("0:a",))
    assert gone(away.put_away(lists, "disk", least=WIDE.bytes)) == ["0:a"]
    assert gone(away.put_away(lists, "disk", least=WIDE.bytes + 1)) == []
    assert gone(away.put_away(chain(("0:a",), ("0:a",), far=2), "host")) == []


def test_it_is_loaded_two_runs_ahead():
    body = away.put_away(chain(("0:a",), ("0:a",)), "host").body
    kinds = [e.kind for e in body]
    assert kinds == ["Run", "Stash", "Free", *["Run"] * 4, "Load", *["Run"] * 2, "Wait", "Run"]
