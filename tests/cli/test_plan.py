"""`mw plan`: everything a rank holds and sends, without a process."""

from __future__ import annotations

import json

import pytest


def explained(mw, *words):
    done = mw("plan", "sums.py", "--json", *words)
    assert done.status == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_explanation_says_what_each_rank_holds(mw, ranks):
    found = explained(mw, "--plan", "zero3", "-n", ranks, "--set", "width=64")
    assert found["mesh"]["axes"] == [["data", ranks]]
    assert (found["file"], found["name"]) == ("sums.py", "job")
    up = next(p for p in found["parameters"] if p["name"] == "up.weight")
    assert up["weights"] == "sharded(0) over data"
    assert up["local"]["0"] == [64 // ranks, 8]
    assert len(found["memory"]) == ranks
    assert all(
        {"weights", "gradients", "optimizer", "saved activations"} <= set(entry["parts"])
        for entry in found["memory"]
    )
    whole = 4 * (64 * 8 + 64 + 64 + 1)
    assert found["memory"][0]["parts"]["weights"] < whole
    assert found["fallbacks"] == []


def test_every_collective_is_on_the_page(mw):
    words = ("--plan", "zero3", "-n", 2, "--set", "width=64")
    found = explained(mw, *words)
    page = mw("plan", "sums.py", "--explain", *words).out.splitlines()
    assert {c["op"] for c in found["collectives"]} == {
        "all_gather",
        "all_reduce",
        "reduce_scatter",
    }
    for entry in found["collectives"]:
        keys = {"op", "axis", "bytes", "count", "exposed", "beside", "source", "module", "why"}
        assert keys <= set(entry)
        rows = [n for n, line in enumerate(page) if f"{entry['op']} over {entry['axis']}" in line]
        assert any(entry["source"] in page[n + 1] and entry["module"] in page[n + 1] for n in rows)
    assert found["traffic"]["calls"] == sum(c["count"] for c in found["collectives"])
    assert found["traffic"]["bytes"] == sum(c["bytes"] for c in found["collectives"])
    assert found["traffic"]["messages"] <= found["traffic"]["calls"]
    gathered = [c for c in found["collectives"] if c["op"] == "all_gather"]
    assert all(c["source"].startswith("sums.py:") for c in gathered)
    assert all(any(parameter["name"] in line for line in page) for parameter in found["parameters"])


def test_auto_says_what_it_took(mw):
    done = mw("plan", "sums.py", "-n", 2)
    assert done.status == 0
    assert "auto takes data=2" in done.err
    assert done.out.startswith("data=2\n")


TURNED = """
@torch.library.custom_op("odd::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


turned.register_fake(torch.empty_like)
turned.register_autograd(lambda ctx, gradient: torch.ops.odd.turned(gradient))
"""


def test_ops_without_a_rule_are_named(mw, folder):
    text = (folder / "sums.py").read_text()
    hidden = "F.gelu(self.up(x))"
    text = text.replace(hidden, f"torch.ops.odd.turned({hidden})")
    (folder / "odd.py").write_text(text.replace("class Model", f"{TURNED}\n\nclass Model"))
    done = mw("plan", "odd.py", "-n", 2, "--json")
    assert done.status == 0, done.err
    named = json.loads(done.out)["fallbacks"]
    assert any(op["op"] == "odd::turned" and op["source"].startswith("odd.py:") for op in named)
    assert "computed whole on every rank" in mw("plan", "odd.py", "-n", 2).out


def test_a_plan_for_ranks_that_are_not_there(mw):
    """No process is started, so a world larger than the machine can be explained."""
    found = explained(mw, "--plan", "zero1", "-n", 16)
    assert len(found["mesh"]["ranks"]) == 16


def test_without_explain_it_is_short_and_says_where_more_is(mw):
    short = mw("plan", "sums.py", "--plan", "zero3,data=2").out
    long = mw("plan", "sums.py", "--plan", "zero3,data=2", "--explain").out
    assert len(short.splitlines()) < len(long.splitlines())
    assert "--explain adds" in short
    for words in ("mesh  data 0", "the model\n", "parameter  ", "Every op has a rule."):
        assert words in long
        assert words not in short


def test_a_budget_that_is_kept_changes_nothing(mw):
    plain = mw("plan", "sums.py", "--plan", "data=2")
    kept = mw("plan", "sums.py", "--plan", "data=2", "--max-bytes", "1MiB", "--memory", "1GiB")
    assert (kept.status, still(kept.out), kept.err) == (0, still(plain.out), plain.err)


def still(text):
    """What of a plan's page does not depend on what this process holds."""
    lines = text[: text.index("\nprocess, as this one")].splitlines()
    return [*lines, *text[text.index("\n  per step") :].splitlines()]


def test_a_budget_that_is_not_kept_fails_with_the_list_and_what_to_change(mw):
    words = ("--plan", "zero2,data=2,microbatches=4", "--set", "width=1024")
    done = mw("plan", "sums.py", *words, "--max-bytes", "1KiB")
    assert (done.status, done.out) == (2, "")
    head, *rest = done.err.splitlines()
    assert head.startswith("mw: plan zero2,data=2,microbatches=4 moves ")
    assert head.endswith(" per rank and step, but the budget is 1.0 KiB:")
    sizes = [line.split()[0] for line in rest[: rest.index("to move less:")] if " × " in line]
    assert sizes
    assert any(line.startswith("  - zero1,data=2,microbatches=4 moves ") for line in rest)


def test_the_plan_that_a_budget_names_keeps_it(mw):
    """A remedy in an error message is tested by following it."""
    words = ("--set", "width=1024", "--max-bytes", "64KiB")
    done = mw("plan", "sums.py", "--plan", "zero2,data=2,microbatches=4", *words)
    assert done.status == 2
    fits = [
        line.split()[1] for line in done.err.splitlines()
        if line.startswith("  - ") and " moves " in line and "still too much" not in line
    ]  # fmt: skip
    assert fits
    assert mw("plan", "sums.py", "--plan", fits[0], *words).status == 0


def test_json_is_printed_even_where_a_budget_is_not_kept(mw):
    done = mw("plan", "sums.py", "--plan", "data=2", "--max-bytes", "0", "--json")
    assert done.status == 2
    assert json.loads(done.out)["traffic"]["bytes"] > 0


def test_memory_that_is_not_there_is_refused_and_the_plan_that_is_named_fits(mw):
    words = ("--set", "width=4096", "--memory", "600KiB")
    done = mw("plan", "sums.py", "--plan", "data=2", *words)
    assert (done.status, done.out) == (2, "")
    head, first, *_, last = done.err.splitlines()
    assert head.startswith("mw: plan data=2 needs ")
    assert head.endswith(", but there are 600.0 KiB:")
    assert first.split()[2] in ("optimizer", "saved", "weights", "gradients")
    (plan,) = [word.rstrip(":") for word in last.split() if word.endswith(":")]
    assert mw("plan", "sums.py", "--plan", plan, *words).status == 0


@pytest.mark.parametrize("flag", ["--max-bytes", "--memory"])
def test_what_is_no_size_is_refused(mw, flag):
    done = mw("plan", "sums.py", "--plan", "data=2", flag, "lots")
    assert done.status == 2
    assert done.err == f"mw: {flag} takes bytes, as in 512KiB, 2MiB or 1.5GiB, not 'lots'\n"


def test_every_part_of_the_explanation_is_in_the_json(mw):
    found = explained(mw, "--plan", "tensor=2", "--set", "width=64")
    assert {"traffic", "collectives", "fallbacks", "conflicts", "layouts", "block", "mesh"} <= set(
        found
    )
    assert [s["module"] for s in found["block"]["stations"]] == ["up", "", "down", ""]
    (up,) = [entry for entry in found["layouts"] if entry["name"] == "up.weight"]
    assert (up["count"], up["weights"]) == (1, "sharded(0) over tensor")


def test_measured_cuts_are_a_plan_file_that_is_read_back(mw, folder):
    words = ("--plan", "data=1,pipeline=2,microbatches=2", "--set", "width=64")
    found = explained(mw, *words, "--measure")
    assert len(found["measured"]["seconds"]) == 2
    (folder / "cut.toml").write_text(found["measured"]["toml"])
    again = explained(mw, "--plan", "cut.toml", "--set", "width=64")
    assert again["pipeline"]["stages"] == found["pipeline"]["stages"]
