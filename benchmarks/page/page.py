"""docs/benchmarks.md, from the raw numbers and notes.toml."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import reach
from benchmarks.harness.result import Result, from_json
from benchmarks.page import ladder, pipelines, tables

NOTES = Path(__file__).parents[1] / "notes.toml"


def page(raw: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The whole page.

    Args:
        raw: what `__main__` writes beside it.
        pictures: names of those that were drawn, in docs/benchmarks/.
    """
    results = [from_json(r) for group in raw["groups"].values() for r in group["results"]]
    notes = tomllib.loads(NOTES.read_text())
    parts = [_head(raw, results, pictures)]
    for section in reach.SECTIONS:
        mine = [r for r in results if r.section == section]
        if mine:
            parts.append(_section(section, mine, notes, pictures, raw["groups"]))
    if "pipeline" in raw["groups"]:
        parts.append(pipelines.table(raw["groups"]["pipeline"]["raw"]))
    controls = [r for r in results if r.section == reach.CONTROLS]
    parts += [_control(controls, notes), _everyone(raw["groups"])]
    parts.append(_how(raw))
    return "\n\n".join(parts) + "\n"


def renewed(raw: Mapping[str, Any], docs: Path) -> dict[str, Any]:
    """The page's raw numbers with those of some parts in place of what they were."""
    kept: dict[str, Any] = json.loads((docs / "benchmarks" / "raw.json").read_text())
    return {**kept, "groups": {**kept["groups"], **raw["groups"]}}


def _head(raw: Mapping[str, Any], results: Sequence[Result], pictures: Sequence[str]) -> str:
    asked = [r for r in results if r.section != reach.CONTROLS]
    said = """Written by `make bench`; edit `benchmarks/notes.toml`, not this page. Two ranks of one
thread each unless said. *Limit* is our own program on a mesh of one, in as many unconnected copies
as there are ranks (for collectives, all ranks copying as many bytes at once). Believe ratios: they
are taken within a round; the absolute numbers are medians of the day."""
    lines = [
        "# Benchmarks",
        said,
        f"**{tables.tally(asked)}**, of {len(asked)} lines. {_where(raw)}",
    ]
    broken = [f"- {name} did not run: {why}" for name, why in raw["broken"].items()]
    lines += ["\n".join(broken)] if broken else []
    lines += _picture(
        "training.svg", "Ratios of speeds with intervals, against their targets", pictures
    )
    return "\n\n".join(lines)


def _where(raw: Mapping[str, Any]) -> str:
    m = raw["machine"]
    return (
        f"{m['cores']} cores of {m['processor']}, {m['memory_bytes'] / 2**30:.0f} GiB,"
        f" {m['system']}; begun {m['began']} at load {m['load']:.1f}, ended at load"
        f" {raw['load_at_end']:.1f} after {raw['minutes']:.0f} minutes; commit {m['commit']}."
    )


def _section(
    section: str,
    results: Sequence[Result],
    notes: Mapping[str, str],
    pictures: Sequence[str],
    groups: Mapping[str, Any],
) -> str:
    parts = [f"## {section}", _explained(section), tables.in_markdown(results, notes)]
    if section == reach.COLLECTIVES:
        parts += _picture("collectives.svg", "Time of collectives by size", pictures)
    if section == reach.BF16:
        parts += _picture("loss.svg", "Loss in bf16 and in float32", pictures)
    if section == reach.LADDER and "ladder" in groups:
        parts.append(ladder.table(groups["ladder"]["raw"]["ladder"]))
        return "\n\n".join(parts)
    parts.append(f"{tables.rounds(results).capitalize()}.")
    return "\n\n".join(part for part in parts if part)


def _explained(section: str) -> str:
    return {
        reach.COSTS: "Ours under `data=2` over its unconnected copies; 1 would be free.",
        reach.PEERS[8]: "Our speed over theirs, each peer against our plan that shards alike;"
        " same AdamW kernel, weights and batches for all. One process with 2 threads takes"
        " the batches of both ranks.",
        reach.BF16: "Speed with `precision=bf16` over speed in float32, both `data=2`.",
        reach.SMALL: "Our time over theirs.",
        reach.COLLECTIVES: "At 16 MB and more our time over that of a copy; at 4 KB over 20 us, and"
        " gloo's time over ours.",
        reach.CROWDED: "gloo's time over ours, at every size.",
        reach.TENSOR: "Ours under `tensor=2`, each rank on the batches of both; DTensor is torch's"
        " `parallelize_module` with Megatron's layouts, over gloo.",
        reach.PIPELINE: "Speed-up over one process on the same micro-batches, as a share of the"
        " ideal: `p m / (m + (p - 1) / v)` for p ranks of v stages each and m = 8 micro-batches of"
        " one sequence, all stages alike; 2 without bubbles. Torch's are in the table below.",
        reach.PIPELINE_PEERS: "Our speed over theirs under the same schedule, or the nearest.",
        reach.PIPELINE_ORDER: "Speeds over each other. Two ranks share each core, so that bubbles"
        " cost nothing, and waiting does.",
        reach.SCHEDULING: "Times, over what the reach table allows.",
        reach.DEEPEST: "By the memory bill of what is compiled, neediest rank; the target is 0.9 of"
        " the paper's ratio (its Transformer: 3, 13 and, in 8 stages, 103 layers in 16 GB each).",
        reach.BILL: "The most bytes that were resident on the rank farthest off its bill, over the"
        " bill; a GPT of 74 MiB of weights, each plan in processes of its own.",
        reach.BYTES: "Bytes that a rank receives in a step of a 4-layer GPT, ours over those of"
        " JAX's compiled program for the same annotations; *limit* is the closed form. Nothing is"
        " run.",
        reach.CHECKPOINT: "Speed of a save over raw writing with a sync and over torch's DCP; time"
        " that steps wait for a save in the background, over one copy of the state and over DCP's;"
        " speed of a load, all digests compared, over reading what the page cache has, and over"
        " DCP's.",
        reach.OFFLOAD: "Time of a step of the 10M GPT, 8 sequences a rank, over that without"
        " (docs/offload.md says when a step has compute enough to hide it); rates of the disk tier"
        " over those of the same disk, past the page cache, as many bytes and threads.",
        reach.LADDER: "Of 8 layers, its width searched for; 2 sequences of 128 tokens a rank. Each"
        " trial is a run of 3 steps by two processes whose private memory is limited"
        " (`RLIMIT_DATA`, from before torch is imported; what is mapped counts, touched or not)."
        " Host offload takes memory beside it, shared anonymous, up to twice as much. DeepSpeed's"
        " host tier on a processor is the process's own memory.",
        reach.FIRST: "From starting `mw train` to its first step's line, over torchrun and DDP.",
    }.get(section, "")


def _control(controls: Sequence[Result], notes: Mapping[str, str]) -> str:
    said = """In every group our program runs on a mesh of one, in unconnected copies, as two
contestants that are the same. Their ratio is what the method reads where nothing differs: it has to
be 1.00 ± 0.02, with its whole interval, for the group's other lines to be believed to 0.03."""
    return f"## {reach.CONTROLS}\n\n{said}\n\n{tables.in_markdown(controls, notes)}"


def _everyone(groups: Mapping[str, Any]) -> str:
    """What each contestant took: what a ratio is explained by first."""
    rows = [
        "| group | contestant | ms a step | CPU ms a step, all ranks | peak MiB, largest rank |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, group in groups.items():
        found = group["raw"]
        for who, seconds in found.get("peak_bytes", {}) and found["seconds"].items():
            cpu = statistics.median(found["cpu_seconds"][who])
            rows.append(
                f"| {name} | {who} | {statistics.median(seconds) * 1e3:.1f} | {cpu * 1e3:.1f} |"
                f" {found['peak_bytes'][who] / 2**20:.0f} |"
            )
    return "\n".join(["## Everyone", "", *rows])


def _how(raw: Mapping[str, Any]) -> str:
    m = raw["machine"]
    ours = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    theirs = ", ".join(f"{name} {version}" for name, version in m["peers"].items())
    counted = [
        f"| {name} | {group['raw']['steps']} after {group['raw']['warm']} |"
        f" {max(len(s) for s in group['raw']['seconds'].values())} |"
        f" {group['raw']['load']:.1f} | {group['raw'].get('began', m['began'])} |"
        f" {group['raw'].get('commit', m['commit'])} |"
        for name, group in raw["groups"].items()
        if group["raw"].get("tasks") and group["raw"]["seconds"]
    ]
    table = "\n".join(
        [
            "| group | steps timed in a turn | rounds | load at its start | begun | commit |",
            "| --- | ---: | ---: | ---: | --- | --- |",
            *counted,
        ]
    )
    return f"""## How it is measured

- A contestant is a group of processes that builds its job once and then waits, in a blocking read,
  for its turn. All load the same initial weights and train on the same batches, in float32 unless
  said, with `AdamW(fused=True)`; the losses of their first three steps are compared, and who does
  other work is left out.
- Rank k of every contestant is bound to core k, but for the process of two threads, which has both:
  unbound, two ranks now and then share a core for a while. Bound to different cores, our
  collectives spin a little before they sleep. Collectives and the first step are measured unbound.
- In a round each contestant has one turn. The order rotates every second round and runs backwards
  in between, so that everyone runs as often before as after everyone else. A turn is an untimed
  step, a meeting of its ranks, and the timed steps; it takes from the first rank's start to the
  last rank's end.
- A ratio is taken within a round. Shown are the median over the rounds and its 95 % interval by
  order statistics, which assume nothing of the distribution; below 6 rounds there is none.
- *Holds*: the whole interval meets the target. *Misses*: none of it does. Else *not resolved*.
  Rounds end when all lines of a group are decided, looked at after 6, 9, 12, 15, 17, 20 … rounds,
  or when the group's time is over; deciding as one looks makes the 95 % a little less.
- Environment: Python {m["python"]}; ours and torch's: {ours}; the other peers in an environment of
  their own: {theirs}.

{table}

Raw numbers: [raw.json](benchmarks/raw.json). `make bench` runs it all; `make bench ARGS="--help"`
tells of parts."""


def _picture(name: str, title: str, pictures: Sequence[str]) -> list[str]:
    return [f"![{title}](benchmarks/{name})"] if name in pictures else []
