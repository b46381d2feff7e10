"""Device types and settings: what is right loads, what is wrong is one line."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from bus.ranges import PortRange
from devices.base import Channel, Device
from devices.registry import BUILT_IN, BadDeviceType, BadSettings, load_class, make_settings
from tests.devices import parts
from tests.devices.parts import Gadget

GOOD = """
from dataclasses import dataclass
from devices.base import *

@dataclass(slots=True)
class ThingState(DeviceState):
    value: int = 0

class Thing(Device[ThingState]):
    NAME = "thing"
    PORTS = (PortRange("regs", 4),)
    STATE = ThingState
    def reset(self): self.state = ThingState()
    def read(self, region, offset, width): return 0
    def write(self, region, offset, width, value): pass
    def drive_lines(self): pass
"""


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_loads(name: str) -> None:
    cls = load_class(name)
    assert issubclass(cls, Device)
    files = {disk.setting: "disk.img" for disk in cls.DISKS}  # all else has a default
    assert isinstance(make_settings(cls, files), cls.SETTINGS)


def test_a_built_in_may_be_written_with_hyphens() -> None:
    assert load_class("virtio-blk") is load_class("virtio_blk")


def test_a_file_by_path(tmp_path: Path) -> None:
    file = tmp_path / "thing.py"
    file.write_text(GOOD)
    cls = load_class(f"{file}:Thing")
    assert cls.NAME == "thing"
    assert load_class(f"{parts.__file__}:Gadget").NAME == "gadget"


def test_two_files_of_the_same_name_are_two(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thing.py").write_text(GOOD.replace('"thing"', f'"{folder}"'))
    names = [load_class(f"{tmp_path / folder / 'thing.py'}:Thing").NAME for folder in ("a", "b")]
    assert names == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("class Thing(", "class Other("), "has no class Thing"),
        (("class Thing(Device[ThingState])", "class Thing"), "not a subclass"),
        (("    STATE = ThingState\n", ""), "does not declare STATE"),
        (('    NAME = "thing"\n', ""), "does not declare NAME"),
        (("STATE = ThingState", "STATE = int"), "STATE is"),
        (("    def reset(self): self.state = ThingState()\n", ""), "does not define reset"),
        (("    def drive_lines(self): pass\n", ""), "does not define drive_lines"),
        (("read(self, region, offset, width)", "read(self, offset)"), "read does not take"),
        (("offset, width, value)", "offset)"), "write does not take"),
        (('PORTS = (PortRange("regs", 4),)', 'PORTS = PortRange("regs", 4)'), "PORTS is"),
        (('PORTS = (PortRange("regs", 4),)', 'PORTS = (MmioRange("regs", 4),)'), "PORTS is"),
        (('(PortRange("regs", 4),)', '(PortRange("regs", 4), PortRange("regs", 4))'), "same name"),
        (('PortRange("regs", 4)', 'PortRange("regs", 0)'), "length 0"),
        (('PortRange("regs", 4)', 'PortRange("regs", 4, posted=frozenset({4}))'), "lie outside"),
        (("    STATE = ThingState", '    STATE = ThingState\n    IRQS = ("a", "a")'), "names a line twice"),
        (("    STATE = ThingState", '    STATE = ThingState\n    IRQS = "intr"'), "IRQS is"),
        (
            ("    STATE = ThingState", '    STATE = ThingState\n    CHANNELS = (Channel("tx"),)'),
            "no 'backend'",
        ),
        (("    STATE = ThingState", "    STATE = ThingState\n    SETTINGS = dict"), "SETTINGS is"),
        (
            ("from devices.base import *", "import nowhere_to_be_found"),
            "does not import: ModuleNotFoundError",
        ),
        (
            ("from devices.base import *", "raise SystemExit('bye\\nbye')"),
            "does not import: SystemExit: bye bye",
        ),
        (("def reset(self):", "def reset(self)"), "does not import: SyntaxError"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in GOOD
    file = tmp_path / "thing.py"
    file.write_text(GOOD.replace(*change))
    with pytest.raises(BadDeviceType) as caught:
        load_class(f"{file}:Thing")
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uart16551", "unknown device type"),
        ("", "unknown device type"),
        ("/nonexistent/thing.py:Thing", "no such file"),
        ("/etc/passwd:Thing", ".py file"),
    ],
)
def test_types_that_are_wrong(name: str, words: str) -> None:
    with pytest.raises(BadDeviceType, match=words) as caught:
        load_class(name)
    assert "\n" not in str(caught.value)


def test_settings() -> None:
    settings = make_settings(Gadget, {"backend": "console"})
    assert (settings.backend, settings.depth) == ("console", 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bakend": "console"}, "no setting 'bakend': it has backend, depth"),
        ({"backend": "tape"}, "Invalid enum value 'tape'"),
        ({"depth": "deep"}, "Expected `int`, got `str`"),
        ({"depth": True}, "Expected `int`, got `bool`"),
    ],
)
def test_settings_that_are_wrong(values: dict[str, object], words: str) -> None:
    with pytest.raises(BadSettings) as caught:
        make_settings(Gadget, values)
    assert words in str(caught.value)
    assert "gadget" in str(caught.value)


def test_a_device_without_settings(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="it has none"):
        make_settings(parts.Hub, {"backend": "null"})


def test_a_setting_of_a_channel_may_have_any_name(tmp_path: Path) -> None:
    @dataclass(frozen=True, slots=True)
    class Settings:
        side: Literal["console", "null"] = "null"

    class Sideways(Gadget):
        CHANNELS = (Channel("out", "in", setting="side"),)
        SETTINGS = Settings  # type: ignore[assignment]
        PORTS = (PortRange("regs", 4),)

    assert make_settings(Sideways, {"side": "console"}).side == "console"


def test_a_file_edited_within_a_second_is_loaded_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "edited.py"
    text = "from devices.rtc_cmos import RtcCmos\n\n\nclass Mine(RtcCmos):\n    MARK = {}\n"
    for mark in (1, 2):
        file.write_text(text.format(mark))
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert vars(load_class(f"{file}:Mine"))["MARK"] == mark


@pytest.mark.parametrize("name", BUILT_IN)
def test_registers_of_our_devices_have_names(name: str) -> None:
    """Those that are posted, mirrored or latched at least."""
    cls = load_class(name)
    for r in (*cls.PORTS, *cls.MMIO):
        for offset in {*r.posted, *r.mirrored, *(offset for offset, _ in r.latched)}:
            for write in (False, True):
                assert not r.register(offset, write).startswith(f"{r.name}+"), (r.name, offset)
