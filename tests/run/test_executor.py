"""The executor: what each instruction does, in order, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.comm.base import Group, Start, Wait, all_reduce
from meshwright.comm.local import LocalWorld
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.program import Op, Ref
from meshwright.run.executor import Committed, Place, execute
from meshwright.run.worker import advance

PLACE = Place({"data": 0}, {"data": Group("data", (0,))})


class Recording:
    """A step that writes down what it is asked."""

    def __init__(self, value: float = 1.0, ranks: tuple[int, ...] = (0,)) -> None:
        self.value, self.group = value, Group("data", ranks)
        self.asked: list[str] = []
        self.total = torch.zeros(())

    def load(self, microbatch: int) -> Mapping[str, Tensor]:
        self.asked.append(f"load {microbatch}")
        return {"batch/x": torch.tensor(self.value + microbatch)}

    def finish(self, values: dict[str, Tensor]) -> None:
        self.asked.append("finish")
        self.total = values["sum"]

    def agree(self) -> Generator[Any, Any, None]:
        self.asked.append("agree")
        self.total = yield from all_reduce(self.total, self.group)

    def update(self, values: dict[str, Tensor]) -> Generator[Any, Any, None]:
        self.asked.append("update")
        values["model/w"] = values["model/w"] + self.total
        yield from ()

    def commit(self, values: dict[str, Tensor]) -> float:
        self.asked.append("commit")
        return float(values.pop("sum"))


def doubled_sum() -> InstructionList:
    """Load two micro-batches, double each, add the second to the first, and step."""
    body = (
        Instruction("Load", None, 0, 0, (), ("0:batch/x",)),
        Instruction("Run", 0, 0, 0, ("0:batch/x",), ("0:y",)),
        Instruction("Stash", None, 0, 0, ("0:y",), ("sum",)),
        Instruction("Free", None, 0, 0, ("0:batch/x", "0:y", "never/was")),
        Instruction("Load", None, 1, 0, (), ("1:batch/x",)),
        Instruction("Run", 1, 1, 0, ("1:batch/x", "sum"), ("sum",)),
        Instruction("Free", None, 1, 0, ("1:batch/x",)),
        Instruction("Finish"),
        Instruction("Agree", axis="data"),
        Instruction("Update"),
        Instruction("Commit"),
    )
    return InstructionList((), body, (), (), ())


FUNCTIONS = (lambda x: (2 * x,), lambda x, total: (total + 2 * x,))


def test_instructions_run_in_order_step_after_step():
    values = {"model/w": torch.zeros(())}
    machine = execute(doubled_sum(), FUNCTIONS, values, PLACE)
    ready = next(machine)
    assert isinstance(ready, Committed)
    assert ready.result is None
    for value, want in ((1.0, 6.0), (3.0, 14.0)):
        step = Recording(value)
        done = machine.send(step)
        assert done.result == want  # 2v + 2(v + 1)
        assert step.asked == ["load 0", "load 1", "finish", "agree", "update", "commit"]
        assert set(values) == {"model/w"}
    assert values["model/w"] == 20
    with pytest.raises(StopIteration):
        machine.send(None)


def test_time_is_told_by_kind():
    machine = execute(doubled_sum(), FUNCTIONS, {"model/w": torch.zeros(())}, PLACE)
    next(machine)
    timing = machine.send(Recording()).timing
    parts = (timing.data, timing.compute, timing.communication, timing.update)
    assert all(0 < part < 1 for part in parts)


def test_collectives_are_requests():
    """What is not a step's business is yielded: Start, then Wait for its handle."""
    call = Op("comm.all_reduce", (Ref(0), "data", "sum"), (), (1,))
    body = (
        Instruction("Load", None, 0, 0, (), ("0:batch/x",)),
        Instruction("Start", 0, 0, 0, ("0:batch/x",), ("pending",), "data"),
        Instruction("Wait", 0, 0, 0, ("pending",), ("sum",), "data"),
        *(Instruction(kind) for kind in ("Finish", "Agree", "Update", "Commit")),
    )
    program = InstructionList((), body, (), (), ((call,),))
    values = [{"model/w": torch.zeros(())} for _ in range(2)]
    group = Group("data", (0, 1))
    machines = [
        execute(program, (), values[rank], Place({"data": rank}, {"data": group}))
        for rank in range(2)
    ]
    for machine in machines:
        next(machine)
    first = machines[0].send(Recording(ranks=(0, 1)))
    assert isinstance(first, Start)
    assert (first.op, first.group) == ("all_reduce", group)
    machines[0].close()
    machines[0] = execute(program, (), values[0], Place({"data": 0}, {"data": group}))
    next(machines[0])

    def stepped(machine, value):
        done = yield from advance(machine, Recording(value, (0, 1)))
        return done.result

    found = LocalWorld(2).perform(
        [stepped(m, v) for m, v in zip(machines, (1.0, 5.0), strict=True)]
    )
    assert found == [6.0, 6.0]
    assert [v["model/w"] for v in values] == [12, 12]


def test_an_error_of_a_request_is_thrown_in_where_it_was_made():
    class Waiting(Recording):
        def agree(self) -> Generator[Any, Any, None]:
            try:
                yield Wait(None)  # type: ignore[arg-type]
            except ConnectionError:
                self.asked.append("told")
                raise

    machine = execute(doubled_sum(), FUNCTIONS, {"model/w": torch.zeros(())}, PLACE)
    next(machine)
    step = Waiting()
    exchange = advance(machine, step)
    assert isinstance(next(exchange), Wait)
    with pytest.raises(ConnectionError):
        exchange.throw(ConnectionError())
    assert step.asked[-1] == "told"


def test_every_instruction_is_stamped_and_the_times_add_up():
    program = doubled_sum()
    machine = execute(program, FUNCTIONS, {"model/w": torch.zeros(())}, PLACE)
    next(machine)
    done = machine.send(Recording())
    assert len(done.stamps) == len(program.body) + 1
    assert list(done.stamps) == sorted(done.stamps)
    timing = done.timing
    total = timing.data + timing.compute + timing.communication + timing.update
    assert total == pytest.approx(done.stamps[-1] - done.stamps[0])
