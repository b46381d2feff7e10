"""A device process is killed, or breaks, and another one goes on from its journal: real processes."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.frames import (
    Event,
    Intr,
    Line,
    Read,
    ReadReply,
    Refused,
    Save,
    SaveReply,
    Stats,
    StatsReply,
    Write,
    WriteReply,
)
from devices.host import PUT_OFF_MOST
from devices.journal import Journal
from tests.devices import parts
from tests.devices.test_host import HUB, Machine

BREAKS, LINE, SCRATCH = 6, 0, 8  # registers of the gadget


@pytest.fixture
def machine(short_path: Path) -> Iterator[Machine]:
    machine = Machine(short_path)
    try:
        yield machine
    finally:
        machine.close()


@pytest.fixture
def journal() -> Iterator[int]:
    fd = Journal.make("g")
    yield fd
    os.close(fd)


def go_on(machine: Machine, journal: int, **more: Any) -> None:
    """Another process of the gadget, once the last one has ended."""
    if "g" in machine.processes:
        machine.processes["g"].wait()
    machine.start("g", fds={"journal": journal}, log_level="critical", **more)


def kill(machine: Machine) -> None:
    machine.processes["g"].send_signal(signal.SIGKILL)


def hear_until_it_ends(machine: Machine) -> None:
    """The device's process breaks; before, the CPU's connection to it repeats what is unanswered."""
    while machine.processes["g"].poll() is None:
        machine.cpu.wait(10_000_000)
        machine.at_cpu_before += machine.cpu.receive()
    assert machine.exit_status("g") == 1


def test_the_state_is_that_of_the_last_step(machine: Machine, journal: int) -> None:
    rng, scratch = random.Random(1), [0, 0, 0, 0]
    for _ in range(4):
        go_on(machine, journal)
        for _ in range(rng.randrange(1, 40)):
            at, value = rng.randrange(4), rng.randrange(256)
            assert machine.ask("g", Write("regs", SCRATCH + at, 1, value)) == WriteReply()
            scratch[at] = value
        kill(machine)
    go_on(machine, journal)
    for at in range(4):
        assert machine.ask("g", Read("regs", SCRATCH + at, 1)) == ReadReply(scratch[at])


def test_a_frame_sent_while_there_is_no_process_is_answered_by_the_next(
    machine: Machine, journal: int
) -> None:
    go_on(machine, journal)
    machine.ask("g", Write("regs", SCRATCH, 1, 7))
    kill(machine)
    machine.processes["g"].wait()
    for value in range(20):
        machine.cpu.send("g", Write("regs", SCRATCH, 1, value))
    go_on(machine, journal)
    answers = [r.frame for r in machine.at_cpu(20)]
    assert answers == [WriteReply()] * 20
    assert machine.ask("g", Read("regs", SCRATCH, 1)) == ReadReply(19)


def test_a_line_is_said_once(machine: Machine, journal: int) -> None:
    more = {"irqs": {"line": 5}, "controllers": ["cpu0"]}
    go_on(machine, journal, **more)
    for n in range(6):
        machine.ask("g", Write("regs", LINE, 1, (n + 1) & 1))
        kill(machine)
        go_on(machine, journal, **more)
    lines = [r.frame for r in machine.at_cpu(6) if isinstance(r.frame, Line)]
    assert lines == [Line(5, not n & 1, "g.line") for n in range(6)]


def test_a_frame_in_which_three_processes_ended_is_set_aside(machine: Machine, journal: int) -> None:
    go_on(machine, journal)
    machine.ask("g", Write("regs", SCRATCH, 1, 99))
    machine.cpu.send("g", Read("regs", BREAKS, 1))
    machine.cpu.send("g", Read("regs", SCRATCH, 1))
    for _ in range(3):
        hear_until_it_ends(machine)
        assert machine.event("g", "device-error").text == "g: RuntimeError: broken gadget"
        go_on(machine, journal)
    assert [r.frame for r in machine.at_cpu(2)] == [ReadReply(0xFF), ReadReply(99)]  # as of a failed device
    text = machine.event("g", "set-aside").text
    assert text.startswith("Read(region='regs', offset=6, width=1")
    assert text.endswith("is set aside: 3 processes of g ended in it")
    assert isinstance(machine.ask("g", Stats()), StatsReply)


def hub(machine: Machine, journal: int, **more: Any) -> None:
    """Its INT is high from the first line on: of what its others do nothing is seen."""
    go_on(machine, journal, type_name=HUB, cpus=["cpu0"], **more)


def toggle(machine: Machine, lines: range) -> None:
    for n in lines:
        machine.cpu.send("g", Line(2, bool(n & 1), "a.x"))


def committed(machine: Machine, journal: int, before: int) -> int:
    """How many lines, once that isn't `before`."""
    while True:
        record = Journal(journal).latest()
        count = len(record.fields["seen"]) if record is not None else 0
        if count != before:
            return count
        machine.cpu.wait(1_000_000)


def test_what_was_put_off_comes_again(machine: Machine, journal: int) -> None:
    hub(machine, journal)
    machine.cpu.send("g", Line(1, True, "a.x"))
    assert committed(machine, journal, 0) == 1
    toggle(machine, range(1, PUT_OFF_MOST + 6))
    at_once = committed(machine, journal, 1)
    kill(machine)
    hub(machine, journal)
    assert machine.ask("g", Read("regs", 2, 1)) == ReadReply(1)
    assert (at_once, committed(machine, journal, at_once)) == (PUT_OFF_MOST + 2, PUT_OFF_MOST + 6)
    record = Journal(journal).latest()
    assert record is not None
    assert record.fields["seen"] == [[1, 1], *([2, n & 1] for n in range(1, PUT_OFF_MOST + 6))]
    assert [r.frame for r in machine.at_cpu(2)] == [Intr(False), Intr(True)]


def test_what_was_put_off_is_not_set_aside_with_what_comes_behind_it(machine: Machine, journal: int) -> None:
    hub(machine, journal)
    machine.cpu.send("g", Line(1, True, "a.x"))
    toggle(machine, range(1, 6))
    machine.cpu.send("g", Write("regs", 0, 1, 1))  # the hub breaks in it
    for _ in range(3):
        hear_until_it_ends(machine)
        hub(machine, journal)
    assert [type(r.frame) for r in machine.at_cpu(3)] == [Intr, Intr, WriteReply]
    assert machine.event("g", "set-aside").text.startswith("Write(")
    assert committed(machine, journal, 0) == 6


def test_how_many_processes_may_end_in_a_frame_is_configurable(machine: Machine, journal: int) -> None:
    go_on(machine, journal, set_aside_after=1)
    machine.cpu.send("g", Read("regs", BREAKS, 2))
    hear_until_it_ends(machine)
    go_on(machine, journal, set_aside_after=1)
    (answer,) = machine.at_cpu(1)
    assert answer.frame == ReadReply(0xFFFF)


def test_only_a_restored_state_that_does_not_fit_ends_the_machine(
    machine: Machine, journal: int, tmp_path: Path
) -> None:
    """Another process is tried later, and its file may have been mended by then."""
    newer = tmp_path / "newer.py"
    source = Path(parts.__file__).read_text().replace("import Literal", "import ClassVar, Literal")
    state = "class GadgetState(DeviceState):\n"
    newer.write_text(source.replace(state, f"{state}    VERSION: ClassVar[int] = 9\n"))
    go_on(machine, journal)
    machine.ask("g", Write("regs", SCRATCH, 1, 7))
    saved = machine.ask("g", Save())
    assert isinstance(saved, SaveReply)
    kill(machine)
    machine.processes["g"].wait()
    machine.begin("g", f"{newer}:Gadget", fds={"journal": journal}, log_level="critical")
    while machine.processes["g"].poll() is None:
        machine.launcher.wait(10_000_000)
        machine.seen += machine.launcher.receive()
    assert machine.exit_status("g") == 1
    machine.begin("h", f"{newer}:Gadget", state=saved.state, log_level="critical")
    assert "version 9" in machine.event("h", "refused").text
    assert machine.exit_status("h") == 1
    assert not [r.frame for r in machine.seen if isinstance(r.frame, Event) and r.frame.kind == "refused"]
    go_on(machine, journal)
    assert machine.ask("g", Read("regs", SCRATCH, 1)) == ReadReply(7)


def test_a_refusal_is_no_reason_to_end(machine: Machine, journal: int) -> None:
    go_on(machine, journal)
    machine.cpu.send("g", Write("nowhere", 0, 1, 1))
    (answer,) = machine.at_cpu(1)
    assert isinstance(answer.frame, Refused)
    kill(machine)
    go_on(machine, journal)
    assert machine.ask("g", Read("regs", SCRATCH, 1)) == ReadReply(0)
