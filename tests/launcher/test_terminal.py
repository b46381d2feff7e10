"""The user's terminal: raw while a console is shown, and as before afterwards, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.console import KeyFilter, TextWatch
from tests.launcher.conftest import Command, assert_nothing_left, wait_running, wait_until

Start = Callable[..., Command]
LFLAG = 3


def is_raw(command: Command) -> bool:
    lflag = command.terminal_attributes()[LFLAG]
    assert isinstance(lflag, int)
    return not lflag & (termios.ECHO | termios.ICANON | termios.ISIG)


def test_keys_go_to_the_guest_and_ctrl_bracket_q_leaves(
    machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("echo", "up", machine_file, terminal=True)
    command.read_until("Ctrl-] then q leaves")
    command.read_until("echo\r\n")
    wait_until(lambda: is_raw(command), "raw mode")
    command.type("a\x03\x1a\x1c\r")  # Ctrl-C, Ctrl-Z, Ctrl-\ and Enter are keys as well
    command.read_until("[a][\x03][\x1a][\x1c][\r]")
    command.type("\x1d\x1dx\x1dy")  # Ctrl-] twice is one; before y it is itself
    command.read_until("[\x1d][x][\x1d][y]")
    command.type("\x1dq")
    assert command.finish() == 0
    assert "left with Ctrl-] q" in command.output.decode()
    assert command.terminal_attributes() == command.before
    assert_nothing_left(runtime)


def test_the_power_off_restores_it_after_all_output(
    machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("burst", "up", machine_file, terminal=True)
    assert command.finish() == 0
    assert command.terminal_attributes() == command.before
    text = command.output.decode()
    assert "".join(f"burst {n} {'x' * 50}\r\n" for n in range(200)) in text
    assert text.endswith(" s\r\n")
    assert text.index("fake: powered off") > text.index("burst 199")
    assert_nothing_left(runtime)


@pytest.mark.parametrize("part", ["launcher", "console", "cpu0", "forkserver"])
def test_kill_9_restores_it_and_shows_what_was_said(
    part: str, machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("chatter", "up", machine_file, terminal=True)
    command.read_until("line 30\r\n")
    wait_until(lambda: is_raw(command), "raw mode")
    wait_running(runtime / "fake")
    os.kill(command.pid if part == "launcher" else command.part(part), signal.SIGKILL)
    assert command.finish() == (-signal.SIGKILL if part == "launcher" else 5)
    wait_until(lambda: command.terminal_attributes() == command.before, "the terminal is restored")
    command.finish()
    text = command.output.decode().replace("\x1b[0m\x1b[?25h", "")
    said = [line for line in text.replace("\r", "").split("\n") if line.startswith("line ")]
    assert said[:-1] == [f"line {n}" for n in range(len(said) - 1)]
    assert f"line {len(said) - 1}".startswith(said[-1])  # the UART may have been killed in mid-line
    if part == "launcher":
        assert launcher("idle", "ps").finish() == 0  # cleans up the directory
    assert_nothing_left(runtime)


def part_or_none(command: Command, name: str) -> int | None:
    with contextlib.suppress(AssertionError):
        return command.part(name)
    return None


def test_a_killed_uart_is_not_noticed(machine_file: Path, runtime: Path, launcher: Start) -> None:
    """The console stays connected, no byte is lost or doubled, and what is typed arrives."""
    command = launcher("chatter", "up", machine_file)
    killed: list[int] = []
    for n in range(20, 100, 20):
        command.read_until(f"line {n}\r\n")
        wait_until(lambda: (pid := part_or_none(command, "uart0")) is not None and pid not in killed, "uart0")
        wait_running(runtime / "fake")
        killed.append(command.part("uart0"))
        os.kill(killed[-1], signal.SIGKILL)
    command.read_until("line 200\r\n")
    os.kill(command.pid, signal.SIGTERM)
    assert command.finish() == 128 + signal.SIGTERM
    assert len(set(killed)) == 4
    said = command.output.decode().split("\r\n")
    assert said == [f"line {n}" for n in range(len(said) - 1)] + [""]
    assert_nothing_left(runtime)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_restore_it(
    number: signal.Signals, machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("idle", "up", machine_file, terminal=True)
    command.read_until("hello")
    os.kill(command.pid, number)
    assert command.finish() == 128 + number
    assert command.terminal_attributes() == command.before
    assert_nothing_left(runtime)


def test_ctrl_c_typed_during_the_start(machine_file: Path, runtime: Path, launcher: Start) -> None:
    """Before the console is open the terminal is not raw, so Ctrl-C ends the start."""
    command = launcher("silent", "up", machine_file, terminal=True)
    wait_until(lambda: (runtime / "fake" / "control.sock").exists(), "start")
    os.killpg(command.pid, signal.SIGINT)
    assert command.finish() == 130
    assert command.terminal_attributes() == command.before
    assert_nothing_left(runtime)


@pytest.mark.parametrize("killed", ["", "command", "console", "machine"])
def test_an_attached_console_restores_it(
    killed: str, machine_file: Path, runtime: Path, launcher: Start
) -> None:
    machine = launcher("echo", "up", machine_file)
    machine.read_until("echo")
    command = launcher("echo", "console", "uart0", terminal=True)
    command.read_until("echo\r\n")
    wait_until(lambda: is_raw(command), "raw mode")
    command.type("k")
    command.read_until("[k]")
    match killed:
        case "":
            command.type("\x1dq")
            assert command.finish() == 0
        case "command":
            os.kill(command.pid, signal.SIGKILL)
            assert command.finish() == -signal.SIGKILL
        case "console":
            os.kill(command.part("console"), signal.SIGKILL)
            assert command.finish() == 5
        case "machine":
            os.kill(machine.pid, signal.SIGKILL)
            assert command.finish() == 0
            assert "fake: uart0 has ended" in command.output.decode()
    wait_until(lambda: command.terminal_attributes() == command.before, "the terminal is restored")
    if killed != "machine":
        assert machine.process.poll() is None, "the machine goes on"
        assert launcher("echo", "down").finish() == 0
        assert machine.finish() == 0
        assert_nothing_left(runtime)


def test_key_filter() -> None:
    keys = KeyFilter()
    assert keys.feed(b"ab\x1d") == (b"ab", False)
    assert keys.feed(b"\x1d\x1dc") == (b"\x1d\x1dc", False)
    assert keys.feed(b"x\x1dqrest") == (b"x", True)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_text_watch_finds_a_text_in_pieces(size: int) -> None:
    stream = b"ababa abac login: "
    for text, there in (
        (b"abac", True),
        (b"login: ", True),
        (b"x", False),
        (b"n: ", True),
        (b"abab ", False),
    ):
        watch = TextWatch(text)
        seen = [watch.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
        assert any(seen) == there
