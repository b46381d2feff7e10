"""Pause and resume by command: what stands, and what the guest sees of it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.machine.drive import ROOT, Screen, command
from tests.machine.files import linux_machine

pytestmark = pytest.mark.machine
HELLO = ROOT / "machines" / "hello.toml"
STOOD_S = 3.0


def test_a_paused_machine_stands_and_goes_on(runtime: Path) -> None:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("tick 1")
        assert command("pause", "hello", runtime=runtime) == "hello: paused\n"
        rows = command("ps", "hello", runtime=runtime)
        assert len(re.findall(r"^(?:cpu0|uart0|pic|pit|pm) +\d+ +paused ", rows, re.MULTILINE)) == 5
        screen.drain()
        shown = len(screen.output)
        screen.type("typed while it stands\r")
        screen.watch(STOOD_S)
        assert len(screen.output) == shown
        assert command("pause", "hello", runtime=runtime) == "hello: paused\n"
        assert command("resume", "hello", runtime=runtime) == "hello: resumed\n"
        screen.wait_for("typed while it stands\r\n")
        screen.wait_for("tick 5")
        assert command("resume", "hello", runtime=runtime) == "hello: resumed\n"
        screen.type("q")
        screen.finish(0)


def test_a_paused_machine_can_be_ended(runtime: Path) -> None:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("tick 1")
        command("pause", runtime=runtime)
        command("down", runtime=runtime)
        screen.finish(0)
        screen.wait_gone()


@pytest.mark.usefixtures("guest_files")
@pytest.mark.parametrize("kind", ["linux.toml", "linux-pic.toml"])
def test_linux_does_not_see_the_time_that_it_stood(kind: str, runtime: Path, tmp_path: Path) -> None:
    """By its own clocks, and by its log: no clock is found unstable, nothing is found stuck."""
    with Screen("up", linux_machine(tmp_path, kind, "linux"), runtime=runtime) as screen:
        screen.prompt()
        for _ in range(2):
            before = _times(screen)
            begun = time.monotonic()
            command("pause", runtime=runtime)
            time.sleep(STOOD_S)
            command("resume", runtime=runtime)
            after = _times(screen)
            outside = time.monotonic() - begun
            for name, earlier in before.items():
                passed = after[name] - earlier
                assert 0 <= passed <= outside - STOOD_S + 1.01, f"{name}: {passed} s of {outside} s"
        screen.run("usleep 300000")
        log = screen.run("dmesg | grep -i -e unstable -e stall -e lockup -e skew | head")
        assert not log.strip(), log
        screen.type("poweroff -f\n")
        screen.finish(0)


def _times(screen: Screen) -> dict[str, float]:
    shown = screen.run("cat /proc/uptime; date +%s; hwclock -r 2>/dev/null | wc -l").split()
    return {"uptime": float(shown[0]), "date": float(shown[2])}
