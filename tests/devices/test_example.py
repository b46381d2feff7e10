"""The third-party device of docs/device-model.md works as it is printed, loaded by path."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from devices.base import Device
from devices.registry import load_class, make_settings
from tests.devices.rig import Rig

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLE = DOCS / "examples" / "watchdog.py"
NS = 1_000_000_000


def make(action: str = "irq") -> Rig[Device[Any]]:
    return Rig(load_class(f"{EXAMPLE}:Watchdog"), "regs", action=action)


def test_it_has_the_promised_length() -> None:
    lines = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 40


def test_the_machine_file_of_the_text_fits_it() -> None:
    text = (DOCS / "device-model.md").read_text(encoding="utf-8")
    block = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    (device,) = tomllib.loads(block[1])["device"]
    path, _, name = device["type"].partition(":")
    assert (DOCS.parent / "machines" / path).resolve() == EXAMPLE
    cls = load_class(f"{EXAMPLE}:{name}")
    assert set(device["ports"]) == {r.name for r in cls.PORTS}
    assert set(device["irqs"]) == set(cls.IRQS)
    make_settings(cls, device["settings"])


def test_it_barks_when_nobody_writes() -> None:
    dog = make()
    dog.w(0, 2)
    dog.advance(1 * NS)
    dog.w(0, 2)
    dog.advance(2 * NS - 1)
    assert (dog.wiring.irq["bark"], dog.r(1)) == (False, 0)
    dog.advance(1)
    assert (dog.wiring.irq["bark"], dog.r(1)) == (True, 1)
    dog.w(0, 0)
    assert not dog.wiring.irq["bark"]
    dog.advance(10 * NS)
    assert not dog.wiring.irq["bark"]
    assert dog.wiring.events == []


def test_it_can_reset_the_machine() -> None:
    dog = make(action="reset")
    dog.w(0, 1)
    dog.advance(NS)
    assert dog.wiring.events == [("reset", "watchdog")]
