"""Machines from start to end, with fake CPU nodes: the commands, the exit statuses, what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import EXIT_OUTPUT
from launcher.report import COLUMNS
from tests.launcher.conftest import ROOT, Command, assert_nothing_left, machine_text, wait_running, wait_until

Start = Callable[..., Command]


def test_power_off(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("poweroff", "up", machine_file)
    assert command.finish() == 0
    assert command.output == b"hello from a fake\r\n"
    assert b"fake: powered off after" in command.errors
    assert_nothing_left(runtime)


def test_all_that_was_said_before_the_power_off_is_shown(
    machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("burst", "up", machine_file)
    assert command.finish() == 0
    assert command.output.decode() == "".join(f"burst {n} {'x' * 50}\r\n" for n in range(200))


def test_piped_input_is_fed_and_its_end_ends_nothing(
    machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("echo", "up", machine_file)
    command.type("ab\x1dq"[:2])
    command.read_until("[a][b]")
    command.type("\x03\x1d")  # no terminal: nothing is special
    command.read_until("[\x03][\x1d]")
    command.close_input()
    os.kill(command.pid, signal.SIGTERM)
    assert command.finish() == 128 + signal.SIGTERM
    assert b"fake: ended by SIGTERM\n" in command.errors
    assert_nothing_left(runtime)


def test_long_piped_input_arrives_whole(machine_file: Path, launcher: Start) -> None:
    command = launcher("echo", "up", machine_file)
    text = "".join(chr(ord("A") + n % 26) for n in range(3000))
    command.type(text + "q")
    assert command.finish() == 0
    assert command.output.decode() == "echo\r\n" + "".join(f"[{c}]" for c in text + "q")


def test_until(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("chatter", "up", "--until", "line 20\r", machine_file)
    assert command.finish() == 0
    assert b"line 20\r\n" in command.output
    assert b"the text of --until has appeared" in command.errors
    assert_nothing_left(runtime)


def test_until_without_a_console(tmp_path: Path, runtime: Path, launcher: Start) -> None:
    (tmp_path / "m.toml").write_text(machine_text().replace('backend = "console"', 'backend = "null"'))
    command = launcher("idle", "up", "--until", "x", tmp_path / "m.toml")
    assert command.finish() == 2
    assert b"--until needs a console" in command.errors
    assert_nothing_left(runtime)


def test_timeout(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("idle", "up", "--timeout", "0.5", machine_file)
    assert command.finish() == 4
    assert b"still running when --timeout had passed" in command.errors
    assert_nothing_left(runtime)


def test_timeout_of_a_start_that_hangs(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("silent", "up", "--timeout", "0.5", machine_file)
    assert command.finish() == 4
    assert_nothing_left(runtime)


def test_reset_restarts(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("reset_once", "up", machine_file)
    assert command.finish() == 0
    assert command.output == b"first\r\nheld {} eip 100000 images True\r\n"
    assert_nothing_left(runtime)


@pytest.mark.parametrize("entry", ["triple_fault", "reset_once"])
def test_reset_stops_with_the_cpu_state(
    entry: str, machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher(entry, "up", "--on-reset", "stop", machine_file)
    assert command.finish() == 3
    assert b"fake: reset by cpu0: " in command.errors
    assert b"fake: eip=00100000\n" in command.errors
    assert b"fake: eax=0000dead\n" in command.errors
    assert_nothing_left(runtime)


def test_on_reset_of_the_machine_file(tmp_path: Path, launcher: Start) -> None:
    (tmp_path / "m.toml").write_text(machine_text('name = "fake"\nmemory = "16M"\non_reset = "stop"'))
    assert launcher("triple_fault", "up", tmp_path / "m.toml").finish() == 3


@pytest.mark.parametrize(
    ("level", "open_bus", "bad_opcode", "end"),
    [("info", 1, 1, False), ("warning", 0, 1, True), ("error", 0, 0, True)],
)
def test_reports_of_the_guest_are_told_once_by_level(
    level: str, open_bus: int, bad_opcode: int, end: bool, machine_file: Path, launcher: Start
) -> None:
    command = launcher("noisy", "up", "--log-level", level, machine_file)
    assert command.finish() == 0
    lines = command.errors.decode().splitlines()
    assert sum("cpu0: open-bus: read of port 02e9" in line for line in lines) == open_bus
    assert sum("cpu0: bad-opcode: at 0010:00100004: 0f 0b ud2" in line for line in lines) == bad_opcode
    assert any("not shown at log level" in line and "30 open-bus" in line for line in lines) == end


def test_a_process_that_fails_is_named(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("raises", "up", machine_file)
    assert command.finish() == 5
    (line,) = command.errors.decode().splitlines()
    assert line.startswith("fake: cpu0 (pid ")
    assert "exited with status 1" in line
    assert "No such file or directory: '/nonexistent/file'" in line
    assert_nothing_left(runtime)


def test_a_process_that_does_not_start_is_named(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("broken", "up", machine_file)
    assert command.finish() == 5
    assert b"fake: cpu0 (pid " in command.errors
    assert b"is broken" in command.errors
    assert_nothing_left(runtime)


def test_the_whole_log_of_a_process_that_fails(machine_file: Path, launcher: Start) -> None:
    command = launcher("broken", "up", "--log-level", "info", machine_file)
    assert command.finish() == 5
    assert b"fake: cpu0: Traceback (most recent call last):\n" in command.errors


@pytest.mark.parametrize("step", range(8))
def test_kill_9_of_the_launcher_at_any_moment_of_the_start(
    step: int, machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("idle", "up", machine_file)
    parts = ["forkserver", "console", "memory", "uart0", "pic", "cpu0"]
    if step >= 2:
        wait_for_part(command, parts[step - 2])
    spin(step * 40_000)
    os.kill(command.pid, signal.SIGKILL)
    assert command.finish() == -signal.SIGKILL
    assert launcher("idle", "ps").finish() == 0  # cleans up the directory
    assert_nothing_left(runtime)


def test_an_entry_point_that_does_not_import(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("nonsense", "up", machine_file)
    assert command.finish() == 5
    assert b"no attribute 'nonsense'" in command.errors
    assert_nothing_left(runtime)


PARTS = ["cpu0", "forkserver", "console"]


@pytest.mark.parametrize("part", PARTS)
def test_kill_9_of_a_part_ends_all(part: str, machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("idle", "up", machine_file)
    command.read_until("hello from a fake\r\n")
    wait_running(runtime / "fake")
    pid = command.part(part)
    os.kill(pid, signal.SIGKILL)
    assert command.finish() == 5
    name = {"forkserver": "the fork server", "console": "the console process"}.get(part, part)
    (line,) = command.errors.decode().splitlines()
    assert f"{name} (pid {pid})" in line
    if part not in ("forkserver", "console"):
        assert "was killed by SIGKILL; its last frame to the launcher was " in line
    assert command.output == b"hello from a fake\r\n"
    assert_nothing_left(runtime)


def test_kill_9_of_the_launcher_ends_all_and_its_directory_is_cleaned_up(
    machine_file: Path, runtime: Path, launcher: Start
) -> None:
    command = launcher("chatter", "up", machine_file)
    command.read_until("line 50\r\n")
    os.kill(command.pid, signal.SIGKILL)
    assert command.finish() == -signal.SIGKILL
    lines = command.output.decode().split("\r\n")
    assert lines[:-1] == [f"line {n}" for n in range(len(lines) - 1)]
    assert f"line {len(lines) - 1}".startswith(lines[-1])  # the UART may have been killed in mid-line
    ps = launcher("idle", "ps")
    assert ps.finish() == 0
    assert ps.output == b"no machine is running\n"
    assert_nothing_left(runtime)


def test_a_dead_machines_directory_is_reused(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("idle", "up", machine_file)
    command.read_until("hello")
    os.kill(command.pid, signal.SIGKILL)
    command.finish()
    assert (runtime / "fake" / "lock").exists()
    assert launcher("poweroff", "up", machine_file).finish() == 0
    assert_nothing_left(runtime)


@pytest.mark.parametrize("step", range(12))
def test_ctrl_c_at_any_moment_of_the_start(
    step: int, machine_file: Path, runtime: Path, launcher: Start
) -> None:
    """Not timed: the moments are spread over what a start takes, and each must end well."""
    command = launcher("idle", "up", machine_file)
    parts = ["forkserver", "console", "memory", "uart0", "pic", "cpu0"]
    if step >= 6:  # the first six: before any of them is there, most likely
        wait_for_part(command, parts[step - 6])
    spin(step * 40_000)
    os.killpg(command.pid, signal.SIGINT)
    status = command.finish()
    if b"File" in command.errors and step < 6:
        assert status in (1, -signal.SIGINT)  # the interpreter had not come to main() yet
    else:
        assert status in (-signal.SIGINT, 130)
        assert b"Traceback" not in command.errors
    assert_nothing_left(runtime)


def wait_for_part(command: Command, name: str) -> None:
    def there() -> bool:
        try:
            command.part(name)
        except AssertionError:
            return False
        return True

    wait_until(there, name)


def spin(turns: int) -> None:
    for _ in range(turns):
        pass


def test_closed_output_ends_the_machine(machine_file: Path, runtime: Path, launcher: Start) -> None:
    command = launcher("chatter", "up", machine_file)
    command.read_until("line 5")
    assert command.process.stdout is not None
    command.process.stdout.close()
    assert command.finish() == 141
    assert b"standard output was closed" in command.errors
    assert_nothing_left(runtime)


# ---- ps, down, console, --detach ----------------------------------------------------------------


def test_detached_machine_ps_console_down(machine_file: Path, runtime: Path, launcher: Start) -> None:
    up = launcher("echo", "up", "--detach", machine_file)
    assert up.finish() == 0
    assert b"fake: running; see `launcher ps`" in up.output
    assert up.errors == b""

    silent = True
    while silent:  # a busy host: some answer later than `ps` waits
        ps = launcher("echo", "ps")
        assert ps.finish() == 0
        lines = ps.output.decode().splitlines()
        assert lines[0] == "machine fake"
        assert lines[1].split() == " ".join(COLUMNS).split()
        silent = any("silent" in line for line in lines)
    rows = {line.split()[0]: line.split() for line in lines[2:]}
    assert list(rows) == ["launcher", "forkserver", "memory", "consoles", "uart0", "pic", "cpu0"]
    for node, row in rows.items():
        assert Path(f"/proc/{row[1]}").exists(), node
        assert row[-2:] == ["0", "0"], "restarts, swaps"
        assert row[-3] == "s", "CPU time"
        if node != "forkserver":
            assert int(row[3]) > 0, f"frames into {node}: {row}"
    title = Path(f"/proc/{rows['uart0'][1]}/cmdline").read_text().rstrip("\0")
    assert title == "backplane fake: uart0"

    console = launcher("echo", "console", "uart0")
    console.read_until("echo\r\n")  # said before we came
    console.type("x")
    console.read_until("[x]")
    second = launcher("echo", "console", "uart0", "--machine", "fake")
    second.read_until("[x]")
    console.close_input()

    down = launcher("echo", "down")
    assert down.finish() == 0
    assert down.output == b"fake: ended\n"
    assert console.finish() == 0
    assert b"fake: uart0 has ended" in console.errors
    assert second.finish() == 0
    assert_nothing_left(runtime, ("fake.log",))
    assert (runtime / "fake.log").read_text() == "fake: ended by `launcher down`\n"


def test_ps_of_a_foreground_machine_has_its_console(
    machine_file: Path, runtime: Path, launcher: Start
) -> None:
    up = launcher("idle", "up", machine_file)
    up.read_until("hello")
    ps = launcher("idle", "ps", "fake")
    assert ps.finish() == 0
    pids = {line.split()[0]: line.split()[1] for line in ps.output.decode().splitlines()[1:]}
    assert pids["console"] == str(up.part("console"))
    assert pids["launcher"] == str(up.pid)
    assert launcher("idle", "down", "fake").finish() == 0
    assert up.finish() == 0
    assert b"fake: ended by `launcher down`" in up.errors


def test_ps_shows_a_process_that_does_not_answer(machine_file: Path, runtime: Path, launcher: Start) -> None:
    up = launcher("idle", "up", machine_file)
    up.read_until("hello")
    wait_running(runtime / "fake")
    os.kill(up.part("pic"), signal.SIGSTOP)
    ps = launcher("idle", "ps")
    assert ps.finish() == 0
    (line,) = [line for line in ps.output.decode().splitlines() if line.startswith("pic")]
    assert "stopped, silent" in line
    os.kill(up.part("pic"), signal.SIGCONT)
    assert launcher("idle", "down").finish() == 0
    assert up.finish() == 0


def test_detached_until_and_errors(machine_file: Path, runtime: Path, launcher: Start) -> None:
    up = launcher("broken", "up", "--detach", machine_file)
    assert up.finish() == 5
    assert b"is broken" in up.errors
    assert_nothing_left(runtime)
    up = launcher("chatter", "up", "--detach", "--until", "line 30\r", machine_file)
    assert up.finish() == 0
    assert_nothing_left(runtime, ("fake.log",))  # once it has come to line 30
    assert (runtime / "fake.log").read_text() == "fake: the text of --until has appeared\n"


def test_ctrl_c_at_a_detaching_command_ends_both(machine_file: Path, runtime: Path, launcher: Start) -> None:
    up = launcher("silent", "up", "--detach", machine_file)
    wait_until(lambda: (runtime / "fake" / "control.sock").exists(), "start")
    os.killpg(up.pid, signal.SIGINT)
    assert up.finish() == -signal.SIGINT
    assert_nothing_left(runtime)


def test_commands_without_their_machine(machine_file: Path, runtime: Path, launcher: Start) -> None:
    for arguments, problem in (
        (["down"], "no machine is running"),
        (["down", "x"], "x: no machine of this name is running; running: none"),
        (["console", "uart0"], "no machine is running"),
        (["ps", "x"], "no machine of this name"),
        (["stats", "x"], "no machine of this name"),
        (["stats"], "no machine is running"),
    ):
        command = launcher("idle", *arguments)
        assert command.finish() == 2
        assert command.errors.decode().startswith("launcher: ")
        assert problem in command.errors.decode()
    one = launcher("idle", "up", "--detach", machine_file)
    two = launcher("idle", "up", "--detach", "--name", "two", machine_file)
    assert one.finish() == two.finish() == 0
    command = launcher("idle", "down")
    assert command.finish() == 2
    assert b"several machines are running; name one of fake, two" in command.errors
    command = launcher("idle", "console", "--machine", "two", "pic")
    assert command.finish() == 2
    assert b"two: pic: no such device with a console; these have: uart0" in command.errors
    assert launcher("idle", "down", "fake").finish() == 0
    assert launcher("idle", "down").finish() == 0
    assert_nothing_left(runtime, ("fake.log", "two.log"))


def test_check_and_version(machine_file: Path, runtime: Path, launcher: Start) -> None:
    check = launcher("idle", "check", machine_file)
    assert check.finish() == 0
    text = check.output.decode()
    assert "machine   fake\nmemory    16 MiB in an anonymous file\n" in text
    assert "memory 00100000-00ffffff  RAM" in text
    assert "port 03f8-03ff  uart0" in text
    assert "IRQ 4" in text
    version = launcher("idle", "version")
    assert version.finish() == 0
    assert version.output.startswith(b"backplane ")
    assert_nothing_left(runtime)


@pytest.mark.parametrize("command", ["", "up", "down", "ps", "stats", "console", "check"])
def test_help_says_how(command: str, launcher: Start) -> None:
    run = launcher("idle", *[command][: bool(command)], "--help")
    assert run.finish() == 0
    text = run.output.decode()
    assert text.startswith("usage: launcher")
    if not command:
        for words in ("Ctrl-] then q leaves", "exit status:", "BACKPLANE_RUNTIME_DIR", "--timeout passed"):
            assert words in text


def test_a_reader_that_goes_ends_a_command_quietly(machine_file: Path) -> None:
    """`launcher check ... | head -0`, the text leaving line by line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "launcher.main", "check", str(machine_file)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False, timeout=240)
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_OUTPUT, b"")
