"""What to try next, and the headings."""

from pathlib import Path
from typing import Any

from meshwright.plan.plan import Plan
from meshwright.view.advice import Advice, advise
from meshwright.view.findings import loss_finding, memory_finding, mesh_finding
from meshwright.view.folder import read_folder
from meshwright.view.measures import measure
from meshwright.view.runfile import parse_setup
from tests.view.runs import metric_lines, run_record, verify_record, write_run


def advice(path: Path, *parts: Any) -> dict[str, Advice]:
    folder = read_folder(write_run(path, *parts))
    return {entry.title: entry for entry in advise(folder, measure(folder))}


def timed(**parts: float) -> list[dict[str, Any]]:
    lines = metric_lines(40, 10)
    for line in lines:
        if "time" in line:
            line["time"] = {"data": 0, "compute": 1, "communication": 0, "update": 0} | parts
            line["seconds"] = sum(line["time"].values())
    return lines


def test_an_unverified_run_is_told_to_verify(tmp_path: Path) -> None:
    found = advice(tmp_path, run_record(2, 0), timed())
    assert next(iter(found.values())).command == "mw verify gpt.py -n 2 --plan data=2"


def test_commands_make_the_same_job_again(tmp_path: Path) -> None:
    command = "mw train gpt.py -n 2 --steps 9 --set depth=1 --set 'name=a b' --seed 3 --eager"
    found = advice(tmp_path, run_record(2, 0) | {"command": command}, timed())
    assert next(iter(found.values())).command == (
        "mw verify gpt.py -n 2 --plan data=2 --set depth=1 --set 'name=a b' --seed 3"
    )


def test_a_healthy_run_is_left_alone(tmp_path: Path) -> None:
    assert advice(tmp_path, run_record(1), timed(), verify_record()) == {}


def test_replicated_optimizer_state_is_sharded_by_a_plan_that_parses(tmp_path: Path) -> None:
    found = advice(tmp_path, run_record(4, 0), timed(), verify_record())
    command = found["Shard the optimizer's state: zero1"].command
    assert Plan.parse(command.split()[-1]) == Plan(data=4, zero=1)
    assert not [
        t for t in advice(tmp_path, run_record(4, 1), timed(), verify_record()) if "Shard" in t
    ]


def test_gathering_that_costs_much_is_given_up_for_memory_it_names(tmp_path: Path) -> None:
    slow, title = timed(communication=0.4), "Keep the weights whole: zero2"
    found = advice(tmp_path, run_record(4, 3), slow, verify_record())[title]
    assert "Communication is 29 % of a step" in found.why
    assert "10.5 MiB more on each rank" in found.why
    assert found.command == "mw train gpt.py -n 4 --plan zero2,data=4"
    assert title not in advice(tmp_path, run_record(4, 2), slow, verify_record())


def test_waiting_for_data_and_talking_too_much_are_named(tmp_path: Path) -> None:
    slow = timed(data=1.0, communication=2.0)
    found = advice(tmp_path, run_record(2, 0), slow, verify_record())
    assert (
        "A step waits 1.00 s for its samples, 25 % of its time"
        in found["Load data in worker processes"].why
    )
    assert "batch_size than 64" in found["Give each rank more to compute"].why


def test_a_held_out_loss_that_rises_again(tmp_path: Path) -> None:
    metrics = [line for line in timed() if "evaluation" not in line]
    metrics += [{"step": s, "evaluation": {"loss": v}} for s, v in ((10, 3), (20, 2), (40, 2.5))]
    found = advice(tmp_path, run_record(1), metrics, verify_record())
    assert (
        "lowest there, 2.000, and has risen to 2.500" in found["Stop at step 20, or regularise"].why
    )


def test_activations_are_halved_only_where_the_batch_can_be_split(tmp_path: Path) -> None:
    run = run_record(4, 3)
    assert "Halve the saved activations: microbatches=2" in advice(
        tmp_path, run, timed(), verify_record()
    )
    run["batch"]["batch_size"] = 7
    assert not advice(tmp_path, run, timed(), verify_record())


def test_advice_never_names_a_plan_that_was_not_understood(tmp_path: Path) -> None:
    run = run_record(4, 0) | {"plan": "tomorrow=1"}
    assert not [e for e in advice(tmp_path, run, timed(), verify_record()).values() if e.command]


def test_headings_say_what_was_found(tmp_path: Path) -> None:
    setup = parse_setup(run_record(3, 3))
    assert mesh_finding(setup) == (
        "3 ranks: each takes 21 or 22 of a batch’s 64 samples and holds 33 % of the weights"
    )
    assert memory_finding(setup) == "Rank 0 needs most, 42.7 MiB, 56 % of it saved activations"
    folder = read_folder(write_run(tmp_path, None, metric_lines(1, 0)))
    assert loss_finding(folder.history, measure(folder)).startswith("The loss was ")
    rising = [{"step": s, "loss": float(s)} for s in range(1, 5)]
    folder = read_folder(write_run(tmp_path, None, rising))
    assert loss_finding(folder.history, measure(folder)) == (
        "The loss rose from 1.000 to 4.000 by step 4"
    )
