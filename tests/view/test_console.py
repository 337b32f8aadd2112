"""The run on a terminal and in a log file."""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from meshwright.view.console import Console


def clock(step: float) -> Callable[[], float]:
    return map(float, itertools.count(0, step)).__next__


def record(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 1 / step, "samples": 64, "seconds": 0.5, **more}


def plain(stream: io.StringIO, step: float = 1.0) -> Console:
    return Console(stream, every=10, live=False, clock=clock(step))


def test_plain_lines_are_the_first_the_last_and_one_every_so_often() -> None:
    stream = io.StringIO()
    with plain(stream) as console:
        console.start(25)
        for step in range(1, 26):
            console.step(record(step))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training, 25 steps to take"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "step 1/25", "step 11/25", "step 21/25", "step 25/25"
    ]  # fmt: skip
    assert lines[2] == "step 11/25  loss 0.09091  128 samples/s  7 s left"


def test_a_run_that_ends_early_still_shows_its_last_step_once() -> None:
    stream = io.StringIO()
    console = plain(stream, step=0.01)
    console.start(None, resume_from=6)
    for step in (7, 8, 9):
        console.step(record(step))
    console.close()
    console.close()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "resuming after step 6", "step 7", "step 9"
    ]  # fmt: skip


def test_the_held_out_loss_is_printed_and_stays_in_view() -> None:
    stream = io.StringIO()
    console = plain(stream)
    console.start(100)
    console.evaluation({"step": 3, "evaluation": {"loss": 2.5, "accuracy": 0.5}})
    console.step(record(4, lr=3e-4))
    assert stream.getvalue().splitlines()[1:] == [
        "step 3  held-out loss 2.500  accuracy 0.5000",
        "step 4/100  loss 0.2500  held-out 2.500  lr 3.0e-04",
    ]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_loss_that_is_not_finite_is_said(loss: float | None) -> None:
    stream = io.StringIO()
    console = plain(stream)
    console.step(record(1, loss=loss))
    assert "loss not finite" in stream.getvalue()


@dataclass
class Lazy:
    """A metric that counts how often it is read, as one on a device would be waited for."""

    reads: list[int] = field(default_factory=list)

    def __float__(self) -> float:
        self.reads.append(1)
        return 2.0


def test_metrics_that_are_not_shown_are_not_read() -> None:
    losses = [Lazy() for _ in range(20)]
    console = plain(io.StringIO())
    console.start(100)
    for step, loss in enumerate(losses, 1):
        console.step(record(step, loss=loss))
    assert [index for index, loss in enumerate(losses) if loss.reads] == [0, 10]


def test_control_characters_cannot_move_the_cursor() -> None:
    stream = io.StringIO()
    plain(stream).note("a\x1b[2Jb\rc\u202ed")
    assert stream.getvalue() == "a\ufffd[2Jb\ufffdc\ufffdd\n"


def test_a_stream_that_is_no_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Console(stream) as console:
        console.start(2)
        console.step(record(1))
    assert "\x1b" not in stream.getvalue()
    assert "step 1/2" in stream.getvalue()


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("live", [False, True])
def test_a_reader_that_has_gone_does_not_end_the_training(live: bool) -> None:
    with Console(Gone(), live=live, clock=clock(1)) as console:
        console.start(3)
        for step in (1, 2, 3):
            console.step(record(step))
        console.note("saved")


def test_the_live_display_shows_steps_and_keeps_lines_above(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    with Console(stream, live=True, clock=clock(1)) as console:
        console.start(1000)
        console.step(record(1))
        console.note("saved [bold]step[/bold] 1")
        console.step(record(2))
    shown = stream.getvalue()
    assert "saved [bold]step[/bold] 1" in shown
    assert "2 / 1,000" in shown
    assert "loss 0.5000 · 128 samples/s · 8 min 19 s left" in shown
    assert shown.index("saved") < shown.index("2 / 1,000")


def test_a_narrow_terminal_loses_the_least_important_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    stream = io.StringIO()
    with Console(stream, live=True, clock=clock(1)) as console:
        console.start(1000)
        console.step(record(1, lr=0.1))
        console.step(record(2, lr=0.1))
    last = stream.getvalue().splitlines()[-1]
    assert "2 / 1,000" in last
    assert "loss 0.5000" in last
    assert "lr" not in last
