"""Launchers that leave, are killed and come again, while the guest of their machine prints numbered lines."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from memory_node import wire
from tests.machine.drive import LEAVE, RAW_NOTICE, Screen, command
from tests.machine.files import asm_machine
from tests.machine.processes import left_behind, titles

pytestmark = pytest.mark.machine

NAME = "orders"
SOME_LINE = re.compile(rb"line [0-9a-f]{8}\r\n")
NOBODY = "it has no launcher; `launcher up` with its machine file re-attaches\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return asm_machine(tmp_path, "orders", NAME)


def lines(screen: Screen) -> list[int]:
    """The numbers of the whole lines that were shown; asserts that they are consecutive."""
    numbers = [int(n, 16) for n in re.findall(r"^line ([0-9a-f]{8})$", screen.text(), re.MULTILINE)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return numbers


def more_lines(screen: Screen, count: int = 300) -> None:
    """Until that many more than were shown so far."""
    screen.drain()
    shown = re.findall(rb"line ([0-9a-f]{8})\r\n", screen.output)
    screen.wait_for(f"line {int(shown[-1], 16) + count if shown else count:08x}\r\n")


def told(screen: Screen, text: str) -> None:
    """Until it is on standard error."""
    while text not in screen.errors():
        assert screen.alive, screen.failure(f"it has ended before {text!r}")
        screen.watch(0.05)


def killed(screen: Screen) -> None:
    """kill -9 of the launcher, which its machine outlives."""
    os.kill(screen.pid, signal.SIGKILL)
    screen.finish(-signal.SIGKILL)


def end_process(node: str) -> None:
    os.kill(titles(NAME)[node], signal.SIGKILL)


def test_another_launcher_takes_over_and_does_all_that_one_does(
    machine: Path, tmp_path: Path, runtime: Path
) -> None:
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err1") as first:
        first.wait_for("line 00000080\r\n")
        nodes = titles(NAME)
        with Screen("up", machine, runtime=runtime, errors=tmp_path / "err2") as second:
            first.finish(0)
            assert first.errors().endswith(f"{NAME}: another launcher (pid {second.pid}) has taken over\n")
            assert first.attributes() == first.attributes_before
            more_lines(second)
            told(second, f"{NAME}: re-attached to the running machine, which had launcher {first.pid}\n")
            left = set(nodes) - {"launcher", "console"}
            assert {node: titles(NAME)[node] for node in left} == {node: nodes[node] for node in left}
            for device in ("uart0", "pic", "consoles"):
                assert f"{device} " in command("swap", NAME, device, runtime=runtime)
                more_lines(second)
            for device in ("uart0", "pit", "consoles"):
                command("kill", NAME, device, runtime=runtime)
                more_lines(second)
            assert lines(second)[0] <= lines(first)[-1] + 1
            second.type("x")
            second.wait_for("key 00000078\r\n")
            command("pause", NAME, runtime=runtime)
            command("resume", NAME, runtime=runtime)
            second.type("r")
            second.wait_for("line 00000001\r\n")
            second.type("p")
            second.finish(0)
            assert "powered off" in second.errors()
            second.wait_gone()
            assert second.attributes() == second.attributes_before
        first.wait_gone()
    assert not list(runtime.glob("*"))


def test_a_machine_goes_on_when_its_launcher_is_killed_if_it_is_to(
    machine: Path, tmp_path: Path, runtime: Path
) -> None:
    with contextlib.ExitStack() as screens:  # the end of each kills what has come since its beginning
        first = screens.enter_context(Screen("up", "--outlive", machine, runtime=runtime))
        first.wait_for("line 00000080\r\n")
        killed(first)
        assert first.attributes() == first.attributes_before
        assert NOBODY in command("ps", runtime=runtime)
        assert NOBODY in command("swap", NAME, "pic", runtime=runtime, check=False)
        end_process("uart0")  # nobody starts it again but the next launcher

        second = screens.enter_context(Screen("up", machine, runtime=runtime, errors=tmp_path / "err2"))
        told(second, "which had no launcher")
        told(second, "was killed by SIGKILL; it is restarted at once")
        more_lines(second)
        assert lines(second)[0] <= lines(first)[-1] + 1
        assert "uart0 is " in command("swap", NAME, "uart0", runtime=runtime)
        more_lines(second)
        command("pause", NAME, runtime=runtime)
        command("ps", runtime=runtime)  # so it has come round to leaving word of the pause
        killed(second)

        third = command("up", "--detach", machine, runtime=runtime)
        assert third.startswith(f"{NAME}: running")
        while "paused" not in command("ps", runtime=runtime):
            pass  # on a busy host none of them answers in time
        command("resume", NAME, runtime=runtime)
        row = next(r for r in command("ps", runtime=runtime).splitlines() if r.startswith("uart0"))
        assert row.split()[-2:] == ["1", "1"]  # restarts, swaps

        fourth = screens.enter_context(Screen("up", machine, runtime=runtime, errors=tmp_path / "err4"))
        more_lines(fourth)
        fourth.type("r")
        fourth.wait_for("line 00000001\r\n")
        fourth.type(LEAVE)
        fourth.finish(0)
        second.wait_gone()  # its console process has shown what was still to come, for a while
        first.wait_gone()
    assert left_behind(runtime) == [f"{NAME}.log"]


def test_a_guest_that_powers_off_alone_ends_with_the_next_launcher(machine: Path, runtime: Path) -> None:
    with Screen("up", "--outlive", machine, runtime=runtime) as first:
        first.wait_for("line 00000080\r\n")
        killed(first)
        with Screen("console", "uart0", runtime=runtime) as console:
            console.wait_for(RAW_NOTICE)
            console.type("p")
            console.wait_for("good night")
            console.type(LEAVE)
            console.finish(0)
        with Screen("up", machine, runtime=runtime) as second:
            second.finish(0)
            assert "powered off" in second.text()
        first.wait_gone()
    assert not list(runtime.glob("*"))


@pytest.mark.parametrize("how", ["down", "kill -9"])
def test_the_end_of_a_machine_without_a_launcher(how: str, machine: Path, runtime: Path) -> None:
    with Screen("up", "--outlive", machine, runtime=runtime) as first:
        first.wait_for("line 00000080\r\n")
        killed(first)
        if how == "down":
            assert command("down", runtime=runtime) == f"{NAME}: ended\n"
            assert not list(runtime.glob("*"))
        else:
            end_process("fork server")
        first.wait_gone()
    assert command("ps", runtime=runtime) == "no machine is running\n"


def test_a_machine_ends_with_the_launcher_that_took_it_over(machine: Path, runtime: Path) -> None:
    with Screen("up", machine, runtime=runtime) as first:
        first.wait_for("line 00000080\r\n")
        with Screen("up", machine, runtime=runtime) as second:
            more_lines(second)
            first.finish(0)
            killed(second)
        first.wait_gone()
    assert command("ps", runtime=runtime) == "no machine is running\n"


def test_the_machine_file_says_that_it_outlives_its_launcher(machine: Path, runtime: Path) -> None:
    machine.write_text(machine.read_text().replace("[cpu]", 'on_launcher_death = "run"\n[cpu]'))
    with Screen("up", machine, runtime=runtime) as first:
        first.wait_for("line 00000080\r\n")
        killed(first)
        with Screen("up", "--until", "line 00001000", machine, runtime=runtime) as second:
            second.finish(0)
        first.wait_gone()


def test_a_restored_machine_may_outlive_its_launcher(machine: Path, tmp_path: Path, runtime: Path) -> None:
    file = tmp_path / "orders.snap"
    with Screen("up", machine, runtime=runtime) as origin:
        origin.wait_for("line 00000080\r\n")
        command("snapshot", NAME, file, runtime=runtime)
        origin.type(LEAVE)
        origin.finish(0)
        origin.wait_gone()
    with contextlib.ExitStack() as screens:
        first = screens.enter_context(Screen("restore", "--outlive", file, runtime=runtime))
        first.wait_for(SOME_LINE)
        more_lines(first)
        killed(first)
        assert NOBODY in command("ps", runtime=runtime)
        second = screens.enter_context(Screen("up", machine, runtime=runtime))
        second.wait_for(SOME_LINE)
        more_lines(second)
        assert lines(second)[0] <= lines(first)[-1] + 1
        second.type("r")  # what a reset loads was in the snapshot
        second.wait_for("line 00000001\r\n")
        second.type("p")
        second.finish(0)
        first.wait_gone()


def test_what_is_refused_leaves_the_machine_as_it_is(machine: Path, tmp_path: Path, runtime: Path) -> None:
    (tmp_path / "other").mkdir()
    other = asm_machine(tmp_path / "other", "numbers", NAME)
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err1") as first:
        first.wait_for("line 00000080\r\n")
        refused = command("up", other, runtime=runtime, check=False)
        running = f"a machine named '{NAME}' is running (launcher {first.pid})"
        assert refused.startswith(f"launcher: {other}: {running}")
        assert refused.count("\n") == 1
        with contextlib.closing(wire.connect(runtime / NAME / "keeper.sock", 60)) as sock:
            wire.send_record(sock, {"op": "attach", "version": 0, "protocol": 0})
            answer = wire.receive_record(sock)
        assert answer is not None
        assert "another version of Backplane" in answer[0]["error"]
        with contextlib.closing(wire.connect(runtime / NAME / "keeper.sock", 60)) as sock:
            wire.send_record(sock, {"op": "end"})
            answer = wire.receive_record(sock)
        assert answer is not None
        assert answer[0]["op"] == "refused"
        more_lines(first)
        machine.write_text(machine.read_text() + "# changed\n")
        with Screen("up", machine, runtime=runtime, errors=tmp_path / "err2") as second:
            more_lines(second)
            told(second, "has changed since; the machine goes on as it was started")
            second.type(LEAVE)
            second.finish(0)
        first.finish(0)
        first.wait_gone()
    assert not list(runtime.glob("*"))


def test_many_launchers_one_after_the_other_lose_no_line(
    machine: Path, tmp_path: Path, runtime: Path
) -> None:
    with contextlib.ExitStack() as screens:
        last = screens.enter_context(Screen("up", machine, runtime=runtime, errors=tmp_path / "err"))
        last.wait_for("line 00000080\r\n")
        for number in range(4):
            following = Screen("up", machine, runtime=runtime, errors=tmp_path / f"err{number}")
            screens.enter_context(following)
            more_lines(following)
            last.finish(0)
            last = following
        last.type(LEAVE)
        last.finish(0)
    assert not list(runtime.glob("*"))
