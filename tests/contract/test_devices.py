"""Rules that every built-in device obeys, and the example in docs: one file, no copies per device.

A history is a list of steps: accesses of declared registers, input as far as there is room, lines and
acknowledgements for controllers, time that passes. After any history a device can be replaced by a new one
that loads its state, and nobody can tell: not by reads, lines, timers, the INT pin, messages, output.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bus.ranges import IoRange
from devices.base import Counter, Device, Latch, MirrorValue, StateMismatch, Step
from devices.fake import FakeWiring
from devices.registry import BUILT_IN, load_class, make_settings
from tests.contract.phrases import BYTES, PHRASES

START_NS = 1_700_000_000_000
MAX_ON_TIME = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "rtc_cmos": {"wall_offset_ns": 1_700_000_000_123_456_789},
    "virtio_blk": {"file": "disk.img"},
}
CONTENT = bytes(range(256)) * 16  # of each disk
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "watchdog.py"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, SETTINGS.get(name, {})) for name in BUILT_IN},
    "acpi_pm-24": ("acpi_pm", {"timer_bits": 24}),
    "virtio_blk-read-only": ("virtio_blk", {"file": "disk.img", "read_only": True}),
    "ioapic-pin0": ("ioapic", {"irq0_pin": 0}),
    "docs-example": (f"{EXAMPLE}:Watchdog", {}),
}
every_device = pytest.mark.parametrize("variant", VARIANTS)

Action = tuple[Any, ...]


@dataclass
class Rig:
    """A device and everything that it does to the outside."""

    variant: str
    device: Device[Any]
    wiring: FakeWiring

    @classmethod
    def of(cls, variant: str, clock_ns: int = START_NS) -> Rig:
        name, values = VARIANTS[variant]
        device_class = load_class(name)
        wiring = FakeWiring(clock_ns, {disk.name: CONTENT for disk in device_class.DISKS})
        device = device_class(wiring, make_settings(device_class, values))
        device.reset()
        return cls(variant, device, wiring)

    def successor(self) -> Rig:
        """A new process with this one's state, as it comes over the bus."""
        wire = msgpack.unpackb(msgpack.packb(self.device.save()))
        new = Rig.of(self.variant, self.wiring.clock_ns)
        new.wiring.inputs = dict(self.wiring.inputs)
        new.wiring.ram[:] = self.wiring.ram
        for disk, content in self.wiring.disks.contents.items():
            new.wiring.disks.contents[disk][:] = content
        new.device.load(wire)
        return new

    def do(self, step: Action) -> Any:
        """The step's answer, which a guest or a back end could see."""
        answer = self._do(step)
        self.wiring.settle(self.device)
        return answer

    def _do(self, step: Action) -> Any:
        match step:
            case ("read", region, offset, width, _):
                value = self.device.read(region, offset, width)
                assert 0 <= value < 1 << 8 * width
                return value
            case ("write", region, offset, width, value):
                return self.device.write(region, offset, width, value & (1 << 8 * width) - 1)
            case ("phrase", writes):
                for region, offset, value, *rest in writes:
                    if region == "memory":
                        self.wiring.memory.write(offset, value.to_bytes(4, "little"))
                        continue
                    width = min(r.widths[0] for r in ranges(type(self.device)) if r.name == region)
                    self.device.write(region, offset, rest[0] if rest else width, value)
                    self.wiring.settle(self.device)
                return None
            case ("input", channel, data):
                room = self.device.room(channel)
                if room:
                    self.device.receive(channel, data[:room])
                return room
            case ("pass", ns):
                return self._pass(ns)
            case ("line", irq, level):
                if self.wiring.inputs.get(irq, False) != level:
                    self.wiring.inputs[irq] = level
                    self.device.line_in(irq, level)
                return None
            case ("int_ack",):
                return self.device.int_ack() if self.wiring.int_pin else None
            case ("eoi", vector):
                return self.device.eoi(vector)
            case ("reset",):
                return self.device.reset()
        raise AssertionError(step)

    def _pass(self, ns: int) -> None:
        """Timers fire on time, but after MAX_ON_TIME of them late: a host can be slow, a device must cope."""
        end_ns = self.wiring.clock_ns + ns
        for _ in range(MAX_ON_TIME):
            first_ns = min(self.wiring.timers.values(), default=end_ns)
            if first_ns >= end_ns:
                break
            self.wiring.advance(self.device, max(0, first_ns - self.wiring.clock_ns))
        self.wiring.clock_ns = end_ns
        self.wiring.advance(self.device, 0)

    def levels(self) -> tuple[Any, ...]:
        irqs = {line: self.wiring.irq.get(line, False) for line in self.device.IRQS}
        return irqs, self.wiring.int_pin, self.wiring.timers

    def effects(self) -> tuple[list[Any], ...]:
        w = self.wiring
        return list(w.changes), list(w.sent), list(w.events), list(w.apic_messages), list(w.dma_done)

    def forget(self) -> None:
        for effects in (self.wiring.changes, self.wiring.sent, self.wiring.events, self.wiring.apic_messages,
                        self.wiring.dma_done):
            effects.clear()


def ranges(cls: type[Device[Any]]) -> tuple[IoRange, ...]:
    return (*cls.PORTS, *cls.MMIO)


def accesses(cls: type[Device[Any]]) -> list[tuple[str, int, int]]:
    """Every access the device declares, but no more than 64 offsets of a region beyond the first 64."""
    found = []
    for r in ranges(cls):
        offsets = [*range(min(r.length, 64)), *range(64, r.length, max(1, r.length // 64))]
        found += [(r.name, o, w) for o in offsets for w in r.widths if r.accepts(o, w)]
    return found


def steps(variant: str, fewest: int = 15) -> st.SearchStrategy[list[Action]]:
    name = VARIANTS[variant][0]
    cls = load_class(name)
    value = st.one_of(st.sampled_from(BYTES), st.integers(0, 0xFFFF_FFFF))
    access = st.builds(
        lambda op, where, value: (op, *where, value),
        st.sampled_from(["read", "write"]),
        st.sampled_from(accesses(cls)),
        value,
    )
    passing = st.one_of(st.integers(0, 3_000_000), st.sampled_from([1, 1_000_000_000, 7_000_000_000]))
    rare: st.SearchStrategy[Action] = st.sampled_from([("reset",), *[("pass", 0)] * 9])
    kinds: list[st.SearchStrategy[Action]] = [access, access, passing.map(lambda ns: ("pass", ns)), rare]
    for phrase in PHRASES.get(name, ()):
        choices = [st.sampled_from([(region, at, v, *width) for v in values])
                   for region, at, values, *width in phrase]  # fmt: skip
        kinds.append(st.tuples(*choices).map(lambda writes: ("phrase", writes)))
    inputs = [channel.receives for channel in cls.CHANNELS if channel.receives]
    if inputs:
        data = st.one_of(st.binary(min_size=1, max_size=20), st.sampled_from([b"p", b"\x1c\xf0\x1c", b"s"]))
        kinds.append(st.builds(lambda c, d: ("input", c, d), st.sampled_from(inputs), data))
    if cls.CONTROLLER:
        line = st.builds(lambda n, on: ("line", n, on), st.integers(0, 15), st.booleans())
        kinds += [line, line]
        if cls.int_ack is not Device.int_ack:
            kinds.append(st.just(("int_ack",)))
        if cls.eoi is not Device.eoi:
            kinds.append(st.sampled_from([("eoi", 0x31), ("eoi", 0x55)]))
    return st.lists(st.one_of(kinds), min_size=fewest, max_size=fewest + 20)


def histories(count: int) -> settings:
    """`count` examples for each class."""
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@every_device
@histories(80)
@given(data=st.data())
def test_a_swap_is_invisible(variant: str, data: st.DataObject) -> None:
    old = Rig.of(variant)
    for step in data.draw(steps(variant), "before"):
        old.do(step)
    new = old.successor()
    assert new.levels() == old.levels()
    assert new.device.mirror() == old.device.mirror()
    assert new.device.save() == old.device.save()
    old.forget()
    new.forget()
    for step in data.draw(steps(variant, 5), "after"):
        assert new.do(step) == old.do(step)
        assert new.levels() == old.levels()
        assert new.effects() == old.effects()
        assert new.device.mirror() == old.device.mirror()
    assert new.device.save() == old.device.save()


@every_device
@histories(20)
@given(data=st.data())
def test_a_load_disturbs_nobody(variant: str, data: st.DataObject) -> None:
    old = Rig.of(variant)
    for step in data.draw(steps(variant)):
        old.do(step)
    new = old.successor()
    assert (new.wiring.sent, new.wiring.events, new.wiring.apic_messages) == ([], [], [])


def shown(value: MirrorValue, now_ns: int) -> int:
    return value if isinstance(value, int) else value.at(now_ns)


@every_device
@histories(50)
@given(data=st.data())
def test_the_mirror_shows_what_a_read_returns(variant: str, data: st.DataObject) -> None:
    rig = Rig.of(variant)
    for step in data.draw(steps(variant)):
        rig.do(step)
    asked_ns = rig.wiring.clock_ns + data.draw(st.integers(0, 5_000_000), "later")
    first_timer_ns = min(rig.wiring.timers.values(), default=asked_ns + 1)  # it publishes the mirror anew
    at_ns = max(rig.wiring.clock_ns, min(asked_ns, first_timer_ns - 1))
    for (region, offset), value in rig.device.mirror().items():
        width = 1 if isinstance(value, int) else value.width
        read, untouched = rig.successor(), rig.successor()
        read.wiring.clock_ns = untouched.wiring.clock_ns = at_ns
        assert read.do(("read", region, offset, width, 0)) == shown(value, at_ns), (region, offset)
        if isinstance(value, Latch) and value.is_set:
            untouched.device.seen(region, offset, value.high)  # the one effect allowed
        assert _seen(read) == _seen(untouched), f"reading {region}+{offset} has a side effect"
        assert read.levels() == untouched.levels()


def _seen(rig: Rig) -> list[Any]:
    """What every register reads, each on a device of its own."""
    return [rig.successor().do(("read", *where, 0)) for where in accesses(type(rig.device))[:64]]


@every_device
@histories(60)
@given(data=st.data())
def test_a_posted_write_changes_no_relaxed_register(variant: str, data: st.DataObject) -> None:
    """Else the CPU node would read a value from before a write that is still on its way."""
    cls = load_class(VARIANTS[variant][0])
    relaxed = {(r.name, offset) for r in ranges(cls) for offset in r.relaxed}
    posted = [(r.name, o) for r in ranges(cls) for o in sorted(r.posted) if 1 in r.widths]
    rig = Rig.of(variant)
    for step in data.draw(steps(variant)):
        rig.do(step)
    before = {key: value for key, value in rig.device.mirror().items() if key in relaxed}
    if posted:
        for region, offset in data.draw(st.lists(st.sampled_from(posted), max_size=5)):
            rig.do(("write", region, offset, 1, data.draw(st.integers(0, 255))))
    after = rig.device.mirror()
    assert {key: after.get(key) for key in before} == before


@every_device
@histories(60)
@given(data=st.data())
def test_a_latch_is_set_by_its_register_alone_and_cleared_by_being_seen(variant: str, data: st.DataObject
                                                                       ) -> None:
    """What the CPU node predicts for posted operations that are still on their way."""
    cls = load_class(VARIANTS[variant][0])
    setters = {(r.name, offset): setter for r in ranges(cls) for offset, setter in r.latched}
    rig = Rig.of(variant)
    for step in data.draw(steps(variant)):
        rig.do(step)
    before = {key: value for key, value in rig.device.mirror().items() if isinstance(value, Latch)}
    for (region, offset), latch in before.items():
        for seen in data.draw(st.lists(st.booleans(), max_size=5)):
            if seen:
                rig.device.seen(region, offset, latch.high)
            else:
                rig.do(("write", region, setters[region, offset], 1, data.draw(st.integers(0, 255))))
            assert rig.device.mirror()[region, offset] == replace(latch, is_set=not seen)


@every_device
@histories(60)
@given(data=st.data())
def test_only_its_own_posted_writes_change_a_register_declared_own(variant: str, data: st.DataObject
                                                                    ) -> None:
    cls = load_class(VARIANTS[variant][0])
    own = [(r.name, offset) for r in ranges(cls) for offset in sorted(r.own)]
    rig = Rig.of(variant)
    for step in data.draw(steps(variant)):
        rig.do(step)
    for where in own:
        before = rig.device.mirror().get(where)
        others = [(r.name, o) for r in ranges(cls) for o in sorted(r.posted) if (r.name, o) != where]
        for region, offset in data.draw(st.lists(st.sampled_from(others), max_size=5)):
            rig.do(("write", region, offset, 1, data.draw(st.integers(0, 255))))
        assert rig.device.mirror().get(where) == before


@every_device
@pytest.mark.parametrize("value", [0x00, 0xFF, 0x5A, 0x0123_4567, 0xFFFF_FFFF])
def test_every_declared_access_is_taken(variant: str, value: int) -> None:
    rig = Rig.of(variant)
    for where in accesses(type(rig.device)):
        rig.do(("read", *where, 0))
        rig.do(("write", *where, value))
        rig.do(("read", *where, 0))


@every_device
def test_mirror_keys_are_declared(variant: str) -> None:
    cls = load_class(VARIANTS[variant][0])
    declared = {(r.name, offset) for r in ranges(cls) for offset in r.mirrored}
    latched = {(r.name, offset) for r in ranges(cls) for offset, _ in r.latched}
    for (region, offset), value in Rig.of(variant).device.mirror().items():
        assert isinstance(value, int | Counter | Step | Latch)
        width = 1 if isinstance(value, int) else value.width
        allowed = latched if isinstance(value, Latch) else declared | latched
        assert {(region, offset + i) for i in range(width)} <= allowed


@every_device
def test_reset_leaves_no_output_and_keeps_input_levels(variant: str) -> None:
    rig = Rig.of(variant)
    cls = type(rig.device)
    if cls.CONTROLLER:
        rig.do(("line", 5, True))
    rig.do(("reset",))
    rig.do(("reset",))
    assert rig.effects() == ([], [], [], [], [])
    if cls.CONTROLLER:
        assert "32" in str(rig.device.save()["fields"]), "the level of input line 5 is gone"


def spoiled(saved: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records that are not of this class's present version."""
    for key, value in (("version", 99), ("version", 0), ("kind", "OtherState")):
        yield f"{key} {value}", {**saved, key: value}
    yield "no fields", {"kind": saved["kind"], "version": saved["version"]}
    for name, value in saved["fields"].items():
        less = {key: each for key, each in saved["fields"].items() if key != name}
        yield f"without {name}", {**saved, "fields": less}
        wrong = {**saved["fields"], name: "text" if not isinstance(value, str) else 1}
        yield f"{name} of another type", {**saved, "fields": wrong}
    yield "a field too many", {**saved, "fields": {**saved["fields"], "stray": 1}}


@every_device
def test_a_foreign_state_is_refused_and_changes_nothing(variant: str) -> None:
    rig = Rig.of(variant)
    saved = rig.device.save()
    for what, record in spoiled(copy.deepcopy(saved)):
        try:
            rig.device.load(record)
        except StateMismatch:
            assert rig.device.save() == saved
        else:
            pytest.fail(f"loaded a record {what}")


@every_device
def test_the_docstring_names_its_source_and_its_omissions(variant: str) -> None:
    text = sys.modules[load_class(VARIANTS[variant][0]).__module__].__doc__ or ""
    assert "Reference:" in text
    assert "Left out:" in text
