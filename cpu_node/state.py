"""The CPU's architectural state as a record of plain data, and back: for snapshots.

`save` is taken between two instructions, after Engine.run has returned; `load` puts it into an Engine over
the same memory, which then runs as the first would have. Windows, translations and all else that is derived
is made anew.
Left out: what no guest can rely on, bytes 288 to 511 of the FXSAVE image. Kept as they are, and so those of
another process: the x87 instruction pointers (docs/how-it-works.md, Quirks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cpu_node import descriptor
from cpu_node import layout as at
from cpu_node.cpu import REGISTER_NAMES, STATE_WORDS
from cpu_node.descriptor import SEGMENT_NAMES, Segment
from cpu_node.lapic_state import LapicStateMismatch

if TYPE_CHECKING:
    from cpu_node.engine import Engine

KIND, VERSION = "Cpu", 1
FX_GUEST = 288  # bytes of the FXSAVE image: x87, MMX, XMM0 to XMM7
FX_SIZE = 512
_RAW = (*SEGMENT_NAMES, "ldtr", "tr")


class CpuStateMismatch(ValueError):
    """A saved state doesn't fit this CPU."""


class Outer(msgspec.Struct, frozen=True):
    """What of a CPU the engine does not hold: its clocks, where they stood, and the INTR pin."""

    clock_ns: int  # the machine's
    tsc: int  # at clock_ns, before IA32_TSC_ADJUST is added
    intr: bool


def save(engine: Engine, outer: Outer) -> dict[str, Any]:
    """The whole state, msgpack's types only."""
    cpu, record = engine.cpu, engine.record
    model = cpu.model
    named = [*zip(SEGMENT_NAMES, cpu.seg, strict=True), ("ldtr", cpu.ldtr), ("tr", cpu.tr)]
    return {
        "kind": KIND,
        "version": VERSION,
        "cpu": cpu.dump(),
        "descriptors": {name: segment.raw for name, segment in named},
        "fx": bytes(record.b[at.FX : at.FX + FX_GUEST]),
        "after_ss": engine.after_ss,
        "apic": None if engine.apic is None else engine.apic.save(),
        "clock_ns": outer.clock_ns,
        "tsc": outer.tsc,
        "intr": outer.intr,
        "model": {"signature": model.signature, "tsc_hz": model.tsc_hz, "features": model.features},
    }


def check(saved: dict[str, Any], tsc_hz: int, features: list[str], apic: bool) -> None:
    """Raise CpuStateMismatch with one line unless a CPU with these features can go on with it."""
    try:
        kind, version, model = saved["kind"], saved["version"], saved["model"]
        has, needs, hz = set(features), set(model["features"]), model["tsc_hz"]
        had_apic = saved["apic"] is not None
    except (KeyError, TypeError) as error:
        raise CpuStateMismatch("not a saved CPU") from error
    if (kind, version) != (KIND, VERSION):
        raise CpuStateMismatch(f"a saved {kind} of version {version}, this is {KIND} version {VERSION}")
    if missing := sorted(needs - has):
        raise CpuStateMismatch(f"its guest uses {', '.join(missing)}, which this host's processor lacks")
    if had_apic != apic:
        raise CpuStateMismatch(f"it has {'a' if had_apic else 'no'} local APIC, unlike this machine")
    if hz != tsc_hz:
        raise CpuStateMismatch(f"its time-stamp counter runs at {hz} Hz, not at {tsc_hz} Hz")


def load(engine: Engine, saved: dict[str, Any]) -> Outer:
    """The inverse of save, in an engine that has not run or is at an instruction boundary.

    The caller sets the time-stamp counter when the clock goes on. Raises CpuStateMismatch; the engine is then
    not to be run.
    """
    cpu, record, model = engine.cpu, engine.record, engine.cpu.model
    check(saved, model.tsc_hz, model.features, engine.apic is not None)
    try:
        cpu.reset()
        engine.contexts.forget_all()
        engine.memory.forget()
        _load_cpu(engine, saved["cpu"], saved["descriptors"])
        fx = bytes(saved["fx"])
        if len(fx) != FX_GUEST:
            raise ValueError(f"an FXSAVE image of {len(fx)} bytes")
        record.b[at.FX : at.FX + FX_SIZE] = fx + bytes(FX_SIZE - FX_GUEST)
        engine.after_ss = bool(saved["after_ss"])
        if engine.apic is not None:
            engine.apic.load(saved["apic"])
        outer = Outer(int(saved["clock_ns"]), int(saved["tsc"]), bool(saved["intr"]))
    except (KeyError, TypeError, ValueError, LapicStateMismatch) as error:
        raise CpuStateMismatch(f"a damaged record: {error!r}") from error
    engine.flush_tlb(True)
    for index in range(6):
        engine.segments_changed(index)
    engine.mode_changed()
    record.d[at.PENDING // 4] = 0
    record.d[at.KICK // 4] = 1
    return outer


def _load_cpu(engine: Engine, saved: dict[str, Any], raw: dict[str, int]) -> None:
    cpu = engine.cpu
    for index, name in enumerate(REGISTER_NAMES):
        cpu.regs[index] = saved[name]
    cpu.eip, cpu.cpl = saved["eip"], saved["cpl"]
    segments = {name: _segment(saved[name], raw[name]) for name in _RAW}
    cpu.seg = [segments[name] for name in SEGMENT_NAMES]
    cpu.ldtr, cpu.tr = segments["ldtr"], segments["tr"]
    (cpu.gdt_base, cpu.gdt_limit), (cpu.idt_base, cpu.idt_limit) = saved["gdt"], saved["idt"]
    cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4 = (saved[name] for name in ("cr0", "cr2", "cr3", "cr4"))
    cpu.dr = list(saved["dr"])
    if len(cpu.dr) != 8:
        raise ValueError(f"{len(cpu.dr)} debug registers")
    for name in STATE_WORDS:
        setattr(cpu, name, saved[name])
    cpu.eflags = saved["eflags"]


def _segment(dumped: tuple[int, int, int, int, bool], raw: int) -> Segment:
    """The interned Segment where its descriptor says the same, as it mostly does."""
    selector, base, limit, rights, usable = dumped
    if raw and usable:
        parsed = descriptor.parse(selector, raw)
        if (parsed.base, parsed.limit, parsed.rights) == (base, limit, rights):
            return parsed
    return descriptor.build(selector, base, limit, rights, usable, raw)
