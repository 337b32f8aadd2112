"""Reading a run folder."""

from pathlib import Path

import pytest

from meshwright.errors import StorageError, UsageError
from meshwright.view.folder import parse_verification, read_folder
from tests.view.runs import metric_lines, run_record, verify_record, write_run


def test_a_whole_folder(tmp_path: Path) -> None:
    folder = read_folder(write_run(tmp_path, run_record(4, 3), metric_lines(60), verify_record()))
    assert folder.setup.axes == (("data", 4),)
    assert [rank.coordinates for rank in folder.setup.ranks][3] == (("data", 3),)
    assert len(folder.history.steps) == 60
    assert folder.verification is not None
    assert folder.verification.law("weights") == 1e-10


def test_only_run_json_is_needed(tmp_path: Path) -> None:
    folder = read_folder(write_run(tmp_path, {}))
    assert folder.verification is None
    assert folder.history.steps == ()
    assert len(folder.setup.ranks) == 1


def test_no_run_folder_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no run\.json"):
        read_folder(tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(("text", "told"), [("{", "is not JSON"), ("[]", "must hold an object")])
def test_a_damaged_file_is_named(tmp_path: Path, text: str, told: str) -> None:
    write_run(tmp_path)
    (tmp_path / "verify.json").write_text(text)
    with pytest.raises(StorageError, match=rf"verify\.json.*{told}"):
        read_folder(tmp_path)


def test_a_text_line_separator_inside_a_note_does_not_split_the_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "note": "a\u2028b"}\n', encoding="utf-8")
    history = read_folder(tmp_path).history
    assert history.unread == 0
    assert history.notes[0].text == "a\u2028b"


def test_laws_may_differ_by_kind_and_an_error_that_is_no_number_is_the_worst() -> None:
    verify = verify_record() | {
        "law": {"loss": 1e-5, "gradients": 2e-5},
        "worst_relative_error": {"loss": float("nan"), "gradients": 1e-6, "weights": None},
    }
    result = parse_verification(verify)
    assert result.errors == (("loss", float("inf")), ("gradients", 1e-6))
    assert (result.law("loss"), result.law("gradients"), result.law("weights")) == (
        1e-5,
        2e-5,
        None,
    )
