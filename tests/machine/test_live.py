"""Devices killed, swapped and edited under a guest that prints numbered lines: it notices nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.drive import LEAVE, ROOT, Screen, command, environment
from tests.machine.files import asm_machine
from tests.machine.processes import titles
from tests.machine.test_kills import said, written

pytestmark = pytest.mark.machine
DEVICES = ("pic", "pit", "kbd", "pm")
POST = ROOT / "devices" / "postcode.py"


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
    now = len(screen.text().split("\n"))
    screen.wait_for(f"line {now + 30:08x}\r\n")


def refused(runtime: Path, *arguments: str) -> str:
    """The one line that a command says which can't be obeyed."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher.main", *arguments],
        env=environment(runtime), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
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
        "ports": source.replace('PortRange("elcr", length=2', 'PortRange("elcr", length=4'),
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


def test_kill_by_command(numbers: Screen, runtime: Path) -> None:
    old = titles("m")["pit"]
    assert command("kill", "m", "pit", runtime=runtime) == f"m: pit (pid {old}) killed\n"
    goes_on(numbers)
    while titles("m").get("pit") in (None, old):
        numbers.watch(0.01)
