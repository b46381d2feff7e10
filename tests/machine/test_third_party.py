"""A third party's device: docs/examples/watchdog.py, named in a machine file and driven by a guest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.machine.drive import ROOT, Screen, command
from tests.machine.files import asm_machine
from tests.machine.processes import titles

pytestmark = pytest.mark.machine
WATCHDOG = """
[[device]]
name = "dog"
type = "{file}:Watchdog"
ports = {{ regs = 0x300 }}
irqs = {{ bark = 5 }}
settings = {{ action = "{action}" }}
"""


def watchdog(action: str) -> str:
    return WATCHDOG.format(file=ROOT / "docs" / "examples" / "watchdog.py", action=action)


def test_it_barks_on_its_line_and_is_silenced(tmp_path: Path, runtime: Path) -> None:
    machine = asm_machine(tmp_path, "watchdog", "kennel", devices=watchdog("irq"))
    assert re.search(r"port 0300-0301 +dog", command("check", machine, runtime=runtime))
    with Screen("up", machine, runtime=runtime) as screen:
        screen.wait_for("before ")
        assert "dog" in titles("kennel")  # a process like every other
        screen.finish(0)
        text = screen.text()
    told = dict(re.findall(r"^(before|interrupts|barking|silenced) ([0-9a-f]{8})$", text, re.MULTILINE))
    assert told == {
        "before": "00000000",
        "interrupts": "00000001",
        "barking": "00000001",
        "silenced": "00000000",
    }


def test_it_resets_the_machine(tmp_path: Path, runtime: Path) -> None:
    machine = asm_machine(tmp_path, "watchdog", "kennel", devices=watchdog("reset"))
    with Screen("up", "--on-reset", "stop", machine, runtime=runtime) as screen:
        screen.finish(3)
        assert "kennel: reset by dog: watchdog\n" in screen.text()
