"""Reading metrics.jsonl."""

import json

from meshwright.view.history import Evaluation, Note, parse_history


def lines(*records: object) -> list[str]:
    return [json.dumps(record) for record in records]


def test_steps_evaluations_and_notes_are_told_apart() -> None:
    history = parse_history(
        lines(
            {
                "step": 1,
                "loss": 5.5,
                "lr": 0.1,
                "samples": 64,
                "seconds": 0.2,
                "time": {"data": 0.1},
            },
            {"step": 1, "evaluation": {"loss": 2.0, "accuracy": 0.5}},
            {"step": 2, "note": "resumed"},
        )
    )
    (step,) = history.steps
    assert (step.loss, step.samples, step.seconds, step.time) == (5.5, 64, 0.2, (("data", 0.1),))
    assert step.metrics == (("lr", 0.1),)
    assert history.evaluations == (Evaluation(1, (("loss", 2.0), ("accuracy", 0.5))),)
    assert history.notes == (Note(2, "resumed"),)


def test_a_step_done_again_after_a_resume_counts_once_and_the_later_line_wins() -> None:
    history = parse_history(
        lines({"step": 2, "loss": 9}, {"step": 3, "loss": 8}, {"step": 2, "loss": 1})
    )
    assert [(step.step, step.loss) for step in history.steps] == [(2, 1.0), (3, 8.0)]


def test_a_torn_line_is_counted_and_left_out() -> None:
    history = parse_history([*lines({"step": 1, "loss": 1}), '{"step": 2, "lo', "[1]", "", "  "])
    assert len(history.steps) == 1
    assert history.unread == 2


def test_losses_that_are_not_finite_are_gaps() -> None:
    text = ['{"step": 1, "loss": NaN}', '{"step": 2, "loss": Infinity}', '{"step": 3, "loss": "x"}']
    assert [step.loss for step in parse_history(text).steps] == [None, None, None]
