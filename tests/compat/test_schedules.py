"""Warm-up schedules: the rates that DeepSpeed 0.19.8 gives, step by step."""

from __future__ import annotations

import pytest
import torch

from meshwright.compat.deepspeed.schedules import schedule_of
from meshwright.errors import UsageError

# Printed by DeepSpeed's own classes over an SGD of lr=0.05, each rate before its step.
GOLDEN = [
    (
        "WarmupLR",
        {"warmup_min_lr": 0.001, "warmup_max_lr": 0.1, "warmup_num_steps": 4},
        [0.001, 0.001, 0.0505, 0.079455643786, 0.1, 0.1, 0.1, 0.1, 0.1],
    ),
    (
        "WarmupLR",
        {"warmup_num_steps": 3, "warmup_type": "linear"},
        [0.0, 0.0, 0.016666666667, 0.033333333333, 0.05, 0.05, 0.05, 0.05, 0.05],
    ),
    (
        "WarmupDecayLR",
        {"total_num_steps": 8, "warmup_max_lr": 0.1, "warmup_num_steps": 3},
        [0.0, 0.0, 0.063092975357, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02],
    ),
    (
        "WarmupCosineLR",
        {
            "total_num_steps": 8,
            "warmup_num_steps": 3,
            "warmup_min_ratio": 0.1,
            "cos_min_ratio": 0.01,
        },
        [0.0, 0.005, 0.033391838911, 0.05, 0.045273170611, 0.032898170611, 0.017601829389,
         0.005226829389, 0.0005],
    ),
]  # fmt: skip


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)


@pytest.mark.parametrize(("kind", "params", "rates"), GOLDEN)
def test_the_rates_are_deepspeeds(kind, params, rates):
    made = optimizer()
    schedule, seen = schedule_of(kind, params)(made), []
    for _ in rates:
        seen.append(made.param_groups[0]["lr"])
        schedule.step()
    assert seen == pytest.approx(rates, abs=1e-11)


def test_a_schedule_goes_on_where_it_was():
    kind, params, rates = GOLDEN[2]
    first = schedule_of(kind, params)(optimizer())
    for _ in range(4):
        first.step()
    made = optimizer()
    again = schedule_of(kind, params)(made)
    again.load_state_dict(first.state_dict())
    assert again.get_last_lr() == pytest.approx([rates[4]])


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("OneCycle", {}, "give initialize"),
        ("WarmupLr", {}, "did you mean 'WarmupLR'"),
        ("WarmupLR", {"warmup_steps": 3}, "did you mean 'warmup_num_steps'"),
        ("WarmupLR", {"total_num_steps": 3}, "total_num_steps of WarmupLR"),
        ("WarmupLR", {"warmup_num_steps": 0}, "whole number, 1 or more"),
        ("WarmupLR", {"warmup_max_lr": "1"}, "a number, 0 or more"),
        ("WarmupLR", {"warmup_type": "cubic"}, "use 'log' or 'linear'"),
        ("WarmupDecayLR", {}, "lacks total_num_steps"),
    ],
)
def test_what_is_not_known_is_refused(kind, params, words):
    with pytest.raises(UsageError, match=words):
        schedule_of(kind, params)
