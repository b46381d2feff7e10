"""Devices killed, swapped and edited under a guest that prints numbered lines: it notices nothing."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import EXIT_INPUT
from tests.machine.drive import LEAVE, ROOT, Screen, command, environment
from tests.machine.files import asm_machine
from tests.machine.processes import descendants, titles
from tests.machine.test_kills import said, written

pytestmark = pytest.mark.machine
DEVICES = ("pic", "pit", "kbd", "pm")
CARD = """
[[device]]
name = "card"
type = "{file}:Tickets"
ports = {{ regs = 0x300 }}
"""
TICKETS = '''"""Gives out tickets, one for each read of register 0."""

from dataclasses import dataclass
from typing import ClassVar

from devices.base import Device, DeviceState, PortRange


@dataclass(slots=True)
class TicketsState(DeviceState):
    VERSION: ClassVar[int] = 1
    last: int = 0


class Tickets(Device[TicketsState]):
    NAME = "tickets"
    PORTS = (PortRange("regs", length=2),)
    STATE = TicketsState

    def reset(self) -> None:
        self.state = TicketsState()

    def read(self, region: str, offset: int, width: int) -> int:
        if offset == 0:
            self.state.last += 1
        return self.state.last & 0x7F if offset == 0 else 0xFF

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        pass

    def drive_lines(self) -> None:
        pass
'''


@pytest.fixture
def numbers(tmp_path: Path, runtime: Path) -> Iterator[Screen]:
    """A machine `m` that prints numbered lines; asserted in the end: all of them were shown, in order."""
    memory = tmp_path / "ram"
    machine = asm_machine(tmp_path, "numbers", "m", memory_file=memory)
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.wait_for("line 00000010\r\n")
        yield screen
        goes_on(screen)
        screen.type(LEAVE)
        screen.finish(0)
        assert said(screen) >= written(memory)


def goes_on(screen: Screen) -> None:
    """Thirty more lines, from now on."""
    lines = screen.text().count("\n") + 30
    while screen.text().count("\n") < lines:
        assert screen.alive, screen.failure("it has ended")
        screen.watch(0.05)


def refused(runtime: Path, *arguments: str) -> str:
    """The one line that a command says which can't be obeyed."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher.main", *arguments],
        env=environment(runtime), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_INPUT
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_devices_are_swapped_again_and_again(numbers: Screen, runtime: Path) -> None:
    rng = random.Random(4)
    for _ in range(12):
        device = rng.choice(DEVICES)
        old = titles("m")[device]
        line = command("swap", "m", device, runtime=runtime)
        new = titles("m")[device]
        assert f"m: {device} is " in line
        assert f"(pid {old} -> {new}), a pause of " in line
        assert old != new
        assert old not in titles("m").values()
    goes_on(numbers)


def test_a_swap_that_cannot_work_leaves_the_old_process(
    numbers: Screen, runtime: Path, tmp_path: Path
) -> None:
    before = titles("m")
    source = (ROOT / "devices" / "pic8259.py").read_text()
    files = {
        "syntax": source.replace("class Pic8259", "clas Pic8259"),
        "state": source.replace("VERSION: ClassVar[int] = 1", "VERSION: ClassVar[int] = 2"),
        "ports": source.replace('"elcr",\n            length=2', '"elcr",\n            length=4'),
        "raises": source.replace("class Pic8259", "raise RuntimeError('no luck today')\nclass Pic8259"),
    }
    said_why = {}
    for name, text in files.items():
        assert text != source, name
        (tmp_path / f"{name}.py").write_text(text)
        said_why[name] = refused(runtime, "swap", "m", "pic", "--with", f"{tmp_path / name}.py:Pic8259")
    assert "syntax" in said_why["syntax"].lower()
    assert "there is no upgrade" in said_why["state"]
    assert "PORTS" in said_why["ports"]
    assert "no luck today" in said_why["raises"]
    assert "'nobody' is no device of this machine" in refused(runtime, "swap", "m", "nobody")
    assert "no device of this machine" in refused(runtime, "kill", "m", "cpu0")
    assert "no setting 'colour'" in refused(runtime, "swap", "m", "pit", "--set", "colour=1")
    assert "no such file" in refused(runtime, "swap", "m", "pit", "--with", "nowhere.py:Pit8254")
    assert "not key=value" in refused(runtime, "swap", "m", "pit", "--set", "colour")
    assert titles("m") == before
    goes_on(numbers)


def test_nothing_waits_for_a_new_process_that_takes_its_time(
    numbers: Screen, runtime: Path, tmp_path: Path
) -> None:
    go_on = tmp_path / "go_on"
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from devices.pit8254 import Pit8254\n"
        f"while not os.path.exists({str(go_on)!r}):\n"
        "    time.sleep(0.01)\n"
    )
    old = titles("m")
    with subprocess.Popen(
        [sys.executable, "-m", "launcher.main", "swap", "m", "pit", "--with", f"{tmp_path}/slow.py:Pit8254"],
        env=environment(runtime), cwd=ROOT, stdout=subprocess.PIPE, text=True,
    ) as slow:  # fmt: skip
        while sum(title.startswith("backplane m: pit") for title in all_titles()) < 2:
            numbers.watch(0.01)
        assert "another swap of it is under way" in command("swap", "m", "pit", runtime=runtime, check=False)
        assert "a swap is under way" in command(
            "snapshot", "m", tmp_path / "snap", runtime=runtime, check=False
        )
        command("kill", "m", "pic", runtime=runtime)
        while titles("m").get("pic") in (None, old["pic"]):
            numbers.watch(0.01)
        assert "kbd is " in command("swap", "m", "kbd", runtime=runtime)
        goes_on(numbers)
        assert slow.poll() is None
        go_on.touch()
        assert slow.stdout is not None
        assert f"slow.py:Pit8254 in a new process (pid {old['pit']} -> " in slow.stdout.read()
    goes_on(numbers)


def all_titles() -> list[str]:
    """Of all processes below this one."""
    found = []
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0"))
    return found


def test_kill_by_command(numbers: Screen, runtime: Path) -> None:
    old = titles("m")["pit"]
    assert command("kill", "m", "pit", runtime=runtime) == f"m: pit (pid {old}) killed\n"
    goes_on(numbers)
    while titles("m").get("pit") in (None, old):
        numbers.watch(0.01)


def test_a_third_partys_device_is_edited_while_the_guest_polls_it(tmp_path: Path, runtime: Path) -> None:
    file = tmp_path / "tickets.py"
    file.write_text(TICKETS)
    fixed = TICKETS.replace("& 0x7F", "& 0xFF")
    grown = (
        fixed.replace("VERSION: ClassVar[int] = 1", "VERSION: ClassVar[int] = 2")
        .replace("    last: int = 0\n", "    last: int = 0\n    asked: int = 0\n")
        .replace("STATE = TicketsState\n",
                 "STATE = TicketsState\n    UPGRADES = {1: lambda fields: {**fields, 'asked': 64}}\n")
        .replace("if offset == 0:\n", "if offset == 1:\n            self.state.asked += 1\n        else:\n")
        .replace("else 0xFF", "else self.state.asked & 0x7F")
    )  # fmt: skip
    machine = asm_machine(tmp_path, "tickets", "m", devices=CARD.format(file=file))
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.wait_for("ticket 0000ff20\r\n")
        dev = subprocess.Popen(
            [sys.executable, "-m", "launcher.main", "dev", "m", "card", "--watch", str(file)],
            env=environment(runtime), cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert dev.stdout is not None
        try:
            assert "card follows" in dev.stdout.readline()
            assert "in a new process" in dev.stdout.readline()
            file.write_text(fixed)
            assert "in a new process" in dev.stdout.readline()
            screen.wait_for("ticket 0000ff90\r\n")
            file.write_text(grown)
            assert "in a new process" in dev.stdout.readline()
            screen.wait_for(re.compile(rb"ticket 00004[1-9a-f]..\r\n"))
            file.write_text(grown.replace("def write(", "def write)"))
            said_why = dev.stdout.readline()
            assert "tickets.py" in said_why
            assert "line 3" in said_why
            assert said_why.endswith("; the old one goes on\n")
            pid = titles("m")["card"]
            screen.watch(0.5)
            assert titles("m")["card"] == pid
        finally:
            dev.send_signal(signal.SIGINT)
            assert dev.wait(60) == 0
            dev.stdout.close()
        goes_on(screen)
        screen.type(LEAVE)
        screen.finish(0)
        tickets = [int(t, 16) for t in re.findall(r"^ticket ([0-9a-f]{8})$", screen.text(), re.MULTILINE)]
    numbers = [t & 0x7F for t in tickets]  # none is lost, none comes twice
    assert numbers == [(n + 1) & 0x7F for n in range(len(numbers))]
    asked = [t >> 8 for t in tickets if t >> 8 != 0xFF]
    assert asked == [(65 + n) & 0x7F for n in range(len(asked))]
