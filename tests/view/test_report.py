"""The report: whole, self-contained, safe with hostile names, complete whatever is missing."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import UsageError
from meshwright.view.folder import Folder
from meshwright.view.history import parse_history
from meshwright.view.report import render_report, write_report
from meshwright.view.runfile import parse_setup
from tests.view.runs import accounts_record, metric_lines, run_record, verify_record, write_run
from tests.view.traces import RUN, START, WAIT, written

VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}${1}"


class Page(HTMLParser):
    """Checks that tags are balanced and keeps elements and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(path: Path, *parts: Any) -> Page:
    written = write_report(write_run(path, *parts))
    assert written == path / "report.html"
    return Page(written.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gpt-001")
    write_run(path, run_record(4, 3), metric_lines(10_000, 500), verify_record())
    return write_report(path).read_text(encoding="utf-8")


def test_every_section_is_there_and_says_what_it_found(whole: str) -> None:
    page = Page(whole)
    ids = [attributes["id"] for attributes in page.of("section")]
    assert ids == [
        "mesh", "loss", "time", "collectives", "memory", "verification", "next", "environment"
    ]  # fmt: skip
    for words in (
        "4 ranks: each takes 16 of a batch’s 64 samples and holds 25 % of the weights",
        "on held-out data it is 2.25",
        "25 % communication",
        "Each rank moves 31.5 MiB a step, in 208 collectives",
        "The numbers of one device: worst relative error 3.1e-15",
        "blocks.0–7.mlp.up",
        "gpt.py:58",
        "mw train gpt.py -n 4 --plan zero3,data=4",
        "AMD EPYC 9R14",
    ):
        assert words in page.text


def test_a_block_conflicts_and_fallbacks_are_shown_where_there_are_some(tmp_path: Path) -> None:
    page = report(tmp_path / "with", run_record(2, 0) | accounts_record(), None, None)
    assert "block" in [attributes["id"] for attributes in page.of("section")]
    for words in (
        "Each of 3 blocks.* moves 64.0 KiB of what it computes, in 2 collectives, 1 exposed",
        "Computed whole on every rank, for want of a rule",
        'mw.rule("my::scan", "n a -> n a")',
        "operand 0 sharded(1) over tensor won; operand 1 sharded(2) over tensor was brought to",
    ):
        assert words in page.text
    page = report(tmp_path / "without", run_record(2, 0), None, None)
    assert "block" not in [attributes["id"] for attributes in page.of("section")]
    assert "for want of a rule" not in page.text
    assert "different splits" not in page.text


def test_each_collective_says_whether_it_is_exposed(tmp_path: Path) -> None:
    run = run_record(2, 0, depth=1)
    for entry in run["collectives"]:
        entry["exposed"] = int(entry["phase"] == "finish")
    page = report(tmp_path, run)
    told = [a.get("class") for a in page.of("span") if "exposure" in (a.get("class") or "")]
    assert told.count("exposure") == 1
    assert told.count("exposure beside") >= 5


def test_nothing_is_loaded_and_the_policy_allows_only_our_script(whole: str) -> None:
    page = Page(whole)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", whole)
    assert not re.search(r"@import|url\(", whole)
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data", "background"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    (script,) = re.findall(r"<script>(.*?)</script>", whole, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def test_it_can_be_attached_to_an_issue(whole: str) -> None:
    assert len(whole.encode()) < 500_000


def test_pictures_are_xml_and_each_has_a_name(whole: str) -> None:
    drawings = re.findall(r"<svg xmlns.*?</svg>", whole, re.DOTALL)
    assert len(drawings) > 20
    assert all(ET.fromstring(drawing).get("aria-label") for drawing in drawings)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 25])
@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1), (3, 3), (40, 2)])
def test_any_size_of_run(tmp_path: Path, steps: int, ranks: int, zero: int) -> None:
    page = report(tmp_path, run_record(ranks, zero, depth=2), metric_lines(steps, 0, ranks))
    assert ("No step was logged" in page.text) == (steps == 0)
    assert ("a rank alone needs no collective" in page.text) == (ranks == 1)
    assert "Not compared with one device yet" in page.text
    assert "mw verify gpt.py" in page.text


def test_an_empty_run_file_still_makes_a_page(tmp_path: Path) -> None:
    page = report(tmp_path, {})
    assert "Memory was not accounted for" in page.text
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize("missing", sorted(run_record(2, 0)))
def test_each_part_may_be_missing_or_of_another_type(tmp_path: Path, missing: str) -> None:
    for value in (None, 7, "text", [1], {"a": 1}, [{"rank": "x"}], [None]):
        report(tmp_path, run_record(2, 0, depth=1) | {missing: value}, metric_lines(3))
    run = run_record(2, 0, depth=1)
    del run[missing]
    report(tmp_path, run, metric_lines(3))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(run_record(2, 0))), JSON), st.lists(JSON, max_size=5))
def test_a_damaged_folder_never_stops_the_page(run: dict[str, Any], lines: list[Any]) -> None:
    history = parse_history(json.dumps(line) for line in lines)
    Page(render_report(Folder(Path("runs/x"), parse_setup(run), history, None)))


def hostile_run() -> dict[str, Any]:
    run = run_record(2, 3, depth=2)
    run |= {
        "file": HOSTILE,
        "name": HOSTILE,
        "plan": HOSTILE,
        "status": HOSTILE,
        "started": HOSTILE,
    }
    run["versions"] = {HOSTILE: HOSTILE}
    run["host"] = {"cpu": HOSTILE, HOSTILE: 1}
    run["mesh"]["axes"] = [[HOSTILE, 2]]
    for rank in run["mesh"]["ranks"]:
        rank["coordinates"] = {HOSTILE: 0}
    for parameter in run["parameters"]:
        parameter |= {"name": HOSTILE + parameter["name"], "weights": HOSTILE, "dtype": HOSTILE}
    for entry in run["collectives"]:
        entry.update(dict.fromkeys(("op", "axis", "source", "module", "why", "phase"), HOSTILE))
    for entry in run["memory"]:
        entry["parts"] = {HOSTILE: 5, "weights": 3}
    run |= json.loads(json.dumps(accounts_record()).replace("blocks", json.dumps(HOSTILE)[1:-1]))
    return run


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    metrics = metric_lines(30)
    for line in metrics:
        line["note" if "note" in line else HOSTILE] = HOSTILE if "note" in line else 1.5
    verify = verify_record() | {"plan": HOSTILE, "worst_tensor": HOSTILE, "dtype": HOSTILE}
    verify["worst_relative_error"] = {HOSTILE: 1e-15}
    page = report(tmp_path, hostile_run(), metrics, verify)
    assert len(page.of("script")) == 1
    assert not page.of("img")
    assert "alert(2)>{{7*7}}${1}" in page.text
    assert not [name for _, attributes in page.elements for name in attributes if "alert" in name]


def test_statuses_and_verdicts_are_told_apart(tmp_path: Path) -> None:
    failed = report(
        tmp_path, run_record() | {"status": "failed"}, None, verify_record(passed=False)
    )
    assert "✗ verification failed" in failed.text
    assert "Not the numbers of one device: worst relative error 2.4e-03" in failed.text
    assert "Find out why blocks.3.attn.qkv.weight differs" in failed.text
    passed = report(tmp_path, run_record(), None, verify_record())
    assert "✓ verified" in passed.text


def test_unread_lines_and_losses_that_are_not_finite_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, run_record(), [*metric_lines(30), {"step": 31, "loss": float("nan")}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "lo')
    page = Page(write_report(tmp_path).read_text())
    assert "1 line of metrics.jsonl could not be read and is left out" in page.text
    assert "1 step has no finite loss and is left out" in page.text
    assert "Stop the loss from overflowing" in page.text


def test_the_command_that_was_given_is_the_one_to_repeat(tmp_path: Path) -> None:
    run = run_record() | {"command": ["mw", "train", "my gpt.py", "--set", "depth=8"]}
    assert "mw train 'my gpt.py' --set depth=8" in report(tmp_path, run).text


def test_a_second_report_replaces_the_first_and_leaves_nothing_else(tmp_path: Path) -> None:
    report(tmp_path, run_record(2, 0), metric_lines(5))
    report(tmp_path, run_record(2, 0), metric_lines(6))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path)


def test_reporting_needs_no_torch() -> None:
    code = (
        "import sys, meshwright.view.report, meshwright.view.console; print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_a_traced_step_is_drawn_and_a_trace_that_was_not_merged_is(tmp_path):
    path = write_run(tmp_path / "r", run_record(2, 1), metric_lines(5), None)
    page = Page((write_report(path)).read_text())
    assert "Timeline" not in page.text
    body = [RUN | {"phase": "forward"}, START, WAIT]
    for rank in range(2):  # as ranks leave it that were killed
        written(path, rank, body, (3, [0.0, 0.6, 0.7, 1.0]), (4, [1.0, 1.6, 1.7, 2.0]))
    page = Page((write_report(path)).read_text())
    assert "Ranks spend 40 % of a step on waiting" in page.text
    assert "the typical one of steps 3 to 4" in page.text
    assert "compared to within 100 µs" in page.text
    assert (path / "trace.json").exists()
