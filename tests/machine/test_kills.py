"""Kills at any moment: nothing of the machine stays alive, the terminal is as before, what was said is shown.

The guest prints numbered lines for ever and notes in its memory, a file here, which was the last one.
"""

from __future__ import annotations

import os
import random
import re
import signal
import struct
import time
from pathlib import Path

import pytest

from tests.machine.drive import LEAVE, RAW_NOTICE, Screen, command
from tests.machine.files import GUEST, asm_machine, linux_machine
from tests.machine.processes import left_behind, titles

pytestmark = pytest.mark.machine

COUNT_PA = 0x200000  # as in guests/numbers.S
DEVICES = ("uart0", "pic", "pit", "kbd", "pm")  # each goes on in a new process
PARTS = ("launcher", "fork server", "console", "cpu0")
INTERRUPTED_EARLY = (1, -signal.SIGINT)  # Python's own answers to Ctrl-C, before and while main is imported
MOMENTS = 8
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
LINUX_START_S = 4.0  # far into the kernel on any host


def said(screen: Screen) -> int:
    """How many whole lines were shown; asserts that they are the first ones in order."""
    lines = screen.text().split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("line "))
    numbers = lines[first:]
    while len(numbers) > 1 and numbers[-1] == "":
        numbers.pop()
    whole = [line for line in numbers if re.fullmatch(r"line [0-9a-f]{8}", line)]
    assert whole == [f"line {n:08x}" for n in range(1, len(whole) + 1)]
    rest = numbers[len(whole) :]
    assert len(rest) <= 1, rest
    if rest:  # the UART may have been killed in the middle of a line
        assert f"line {len(whole) + 1:08x}".startswith(rest[0])
    return len(whole)


def written(memory: Path) -> int:
    """The last line of which the guest had written every byte."""
    with memory.open("rb") as f:
        f.seek(COUNT_PA)
        return int(struct.unpack("<I", f.read(4))[0])


@pytest.mark.parametrize("victim", PARTS)
def test_kill_9_of_a_part(victim: str, tmp_path: Path, runtime: Path) -> None:
    memory = tmp_path / "ram"
    machine = asm_machine(tmp_path, "numbers", "victim", memory_file=memory)
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.wait_for(f"line {random.Random(victim).randrange(50, 500):08x}\r\n")
        pid = screen.pid if victim == "launcher" else titles("victim")[victim]
        os.kill(pid, signal.SIGKILL)
        screen.finish(-signal.SIGKILL if victim == "launcher" else 5)
        screen.wait_gone()
        assert screen.attributes() == screen.attributes_before
        said(screen)
        if victim != "launcher":
            assert f"(pid {pid})" in screen.errors()
    if victim == "launcher":
        assert command("ps", runtime=runtime) == "no machine is running\n"  # and cleans up
    assert not left_behind(runtime)


@pytest.mark.parametrize("victim", DEVICES)
def test_a_device_that_is_killed_goes_on_in_a_new_process(
    victim: str, tmp_path: Path, runtime: Path
) -> None:
    memory = tmp_path / "ram"
    machine = asm_machine(tmp_path, "numbers", "victim", memory_file=memory)
    rng, killed, line = random.Random(victim), [], 0
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        for _ in range(4):
            line += rng.randrange(20, 200)
            screen.wait_for(f"line {line:08x}\r\n")
            while (pid := titles("victim").get(victim)) in (None, *killed):
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        screen.wait_for(f"line {line + 300:08x}\r\n")
        row = next(r for r in command("ps", runtime=runtime).splitlines() if r.startswith(victim))
        assert row.split()[-2:] == ["4", "0"]  # restarts, swaps
        screen.type(LEAVE)
        screen.finish(0)
        assert said(screen) >= written(memory)
        for pid in killed:
            assert f"victim: {victim} (pid {pid}) was killed by SIGKILL" in screen.errors()
    assert len(set(killed)) == 4
    assert not left_behind(runtime)


def test_without_checkpoints_the_end_of_a_device_is_the_machines(tmp_path: Path, runtime: Path) -> None:
    machine = asm_machine(tmp_path, "numbers", "victim")
    machine.write_text(machine.read_text().replace("[machine]\n", "[machine]\ncheckpoints = false\n"))
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.wait_for("line 00000080\r\n")
        refused = command("swap", "victim", "pit", runtime=runtime, check=False)
        assert refused.endswith("pit: there is nothing to go on from: machine.checkpoints is false\n")
        screen.wait_for("line 00000100\r\n")
        pid = titles("victim")["pit"]
        os.kill(pid, signal.SIGKILL)
        screen.finish(5)
        screen.wait_gone()
        said(screen)
        assert f"pit (pid {pid})" in screen.errors()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_it_in_order(number: signal.Signals, tmp_path: Path, runtime: Path) -> None:
    memory = tmp_path / "ram"
    machine = asm_machine(tmp_path, "numbers", "ended", memory_file=memory)
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.wait_for("line 00000080\r\n")
        os.kill(screen.pid, number)
        screen.finish(128 + number)
        screen.wait_gone()
        assert screen.attributes() == screen.attributes_before
        assert said(screen) >= written(memory)
        assert f"ended: ended by {number.name}\n" in screen.errors()
    assert not left_behind(runtime)


@pytest.fixture(scope="module")
def start_s(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a start takes here and now, from the command to the guest's first line."""
    folder = tmp_path_factory.mktemp("s")
    with Screen("up", asm_machine(folder, "numbers", "first"), runtime=folder / "run") as screen:
        screen.wait_for("line 00000001")
        return time.monotonic() - screen.started


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_random_moment_of_the_start(
    number: int, how: str, start_s: float, tmp_path: Path, runtime: Path
) -> None:
    """The moments are seeded; what stands there when they come is not, and must not matter."""
    delay_s = random.Random(f"{how} {number}").uniform(0, 1.2 * start_s)
    machine = asm_machine(tmp_path, "numbers", "start")
    end_after(delay_s, how, machine, runtime)


@pytest.mark.usefixtures("guest_files")
@pytest.mark.parametrize("how", SIGNALS)
def test_a_random_moment_of_linux(how: str, tmp_path: Path, runtime: Path) -> None:
    assert GUEST.exists()
    delay_s = random.Random(f"linux {how}").uniform(0, LINUX_START_S)
    end_after(delay_s, how, linux_machine(tmp_path, "linux.toml", "start"), runtime)


def end_after(delay_s: float, how: str, machine: Path, runtime: Path) -> None:
    """Start a machine, let it end by `how` after a while, and see that nothing is left."""
    with Screen("up", machine, runtime=runtime) as screen:
        screen.watch(delay_s)
        if how == "Ctrl-C":
            screen.type("\x03")
            leave(screen)
        else:
            os.kill(screen.pid, SIGNALS[how])
        status = screen.finish(None)
        screen.wait_gone()
        assert screen.attributes() == screen.attributes_before
        text = screen.text()
    number = SIGNALS[how]
    if how == "Ctrl-C" and status in INTERRUPTED_EARLY and "Traceback" in text:
        assert "KeyboardInterrupt" in text
        assert not re.search(r'launcher/main\.py", line \d+, in main\n', text)
    elif how == "Ctrl-C" and status == 0:
        assert "left with Ctrl-] q" in text  # the console was open: Ctrl-C is a key of the guest's
    else:
        assert status in (-number, 128 + number), text
        assert "Traceback" not in text
    if how == "SIGKILL":
        command("ps", runtime=runtime)  # cleans up
    assert not left_behind(runtime)


def leave(screen: Screen) -> None:
    """If the console has come to be open, leave it as a user would."""
    while screen.alive:
        if RAW_NOTICE in screen.text():
            screen.type(LEAVE)
            return
        screen.watch(0.05)
