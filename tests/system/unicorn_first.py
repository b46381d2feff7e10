"""Unicorn, as far as it goes: from a scenario's start to its first interrupt or exception.

Unicorn hands those to a hook instead of delivering them, and has no local APIC. So what is compared is the
state there: vector, general registers, EIP, EFLAGS, segment selectors, CR2. It is QEMU's code of version 5.
Skipped: the subjects in NOT_HERE, for the reasons given there.
"""

from __future__ import annotations

from typing import Any

from tests.system import common, compare
from tests.system import places as p
from tests.system.backplane import SystemBoard
from tests.system.subjects import scenario

try:
    import unicorn as uc
    from unicorn import x86_const as x86
except ImportError:  # pragma: no cover
    uc = None

NOT_HERE = {
    "interrupts": "no local APIC",
    "task switches": "a switch ends the run in Unicorn",
    "debugging": "no debug exceptions",
    "read-modify-write paging": "an instruction that faults has changed the flags",
    "gates": "nothing is delivered",
    "privileged instructions": "ports answer at any privilege",
    "virtual-8086 mode": "ports answer at any privilege",
    "SYSENTER": "Unicorn gives SYSENTER to a hook of its own",
}
GENERAL = ("eax", "ecx", "edx", "ebx", "ebp", "esi", "edi")
SELECTORS = ("es", "ds", "fs", "gs")
WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17))
IGNORED_FLAGS = 0x11_0000 | 0x08_0000  # RF, VIP, VIF: see exclusions.py
LIMIT = 20_000  # instructions


def available() -> str:
    """ "" where Unicorn can be had, else why not."""
    return "" if uc is not None else "unicorn is not installed (pip install unicorn)"


def compare_first(board: SystemBoard, seed: int, subject: str, index: int) -> tuple[bool, str]:
    """(compared?, difference) of the scenario's first action alone."""
    if subject in NOT_HERE:
        return False, ""
    builder = scenario(seed, subject, index, frozenset(range(1, p.ACTIONS)))
    image = builder.image()
    ours = board.execute(image)
    events = compare.events(ours) if ours is not None else []
    if not events or events[0].vector not in (*WITH_ERROR, 0, 3, 4, 5, 6, 7, p.END_OF_ACTION):
        return False, ""
    if events[0].words[6] != p.TSS_SEL:
        return False, ""  # a far transfer that switched tasks
    theirs = first_event(image)
    if theirs is None:
        return False, ""
    if 0x20 <= theirs["vector"] != events[0].vector:
        return False, ""  # INT n: our log has what came after its delivery
    mine = state_of(events[0])
    if subject == "far transfers" and mine["cs"] & ~3 == theirs["cs"] & ~3:
        mine["cs"] = theirs["cs"]  # exclusions.py: RPL of a conforming CS
    wrong = [f"{name} {mine[name]:x}, theirs {theirs[name]:x}" for name in mine if mine[name] != theirs[name]]
    return True, f"Unicorn: {', '.join(wrong)}" if wrong else ""


def state_of(event: compare.Event) -> dict[str, int]:
    """What the log says of the moment before the exception."""
    words = event.words
    named = dict(zip(compare.FIELDS, words, strict=True))
    frame = list(words[18:])
    if event.vector in WITH_ERROR:
        frame.pop(0)
    state = {name: named[name] for name in GENERAL}
    state |= {"vector": event.vector, "eip": frame[0], "cs": frame[1] & 0xFFFF}
    state["eflags"] = frame[2] & ~IGNORED_FLAGS
    if event.vector == 14:
        state["cr2"] = named["cr2"]
    return state


def first_event(image: bytes) -> dict[str, int] | None:
    """Unicorn's state at the first interrupt or exception; None where it stops for another reason."""
    machine = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_32)
    machine.mem_map(0, 0x400000)
    machine.mem_write(0, image)
    found: dict[str, int] = {}

    def interrupt(engine: Any, vector: int, _: Any) -> None:
        for name in (*GENERAL, "eip", "cs", "eflags", "cr2"):
            found[name] = engine.reg_read(getattr(x86, f"UC_X86_REG_{name.upper()}"))
        found["vector"] = vector
        engine.emu_stop()

    machine.hook_add(uc.UC_HOOK_INTR, interrupt)
    try:
        machine.emu_start(common.START, 0xFFFFFFFF, count=LIMIT)
    except uc.UcError:
        return None if not found else _cleaned(found)
    return _cleaned(found) if found else None


def _cleaned(found: dict[str, int]) -> dict[str, int]:
    return found | {"eflags": found["eflags"] & ~IGNORED_FLAGS}
