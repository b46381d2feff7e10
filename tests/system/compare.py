"""Two arenas after the same scenario: where they differ, in words."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.system import places as p

FIELDS = (
    "esp", "ss:cs", "fs:gs", "cr2", "dr6", "dr7", "tr", "es", "ds", "edi", "esi", "ebp", "esp_", "ebx",
    "edx", "ecx", "eax", "vector", *(f"frame{n}" for n in range(13)),
)  # fmt: skip
REGIONS = (
    (p.STACK_B - 0x400, "stack of task B"), (p.STACK_16 - 0x400, "stack of the 16-bit task"),
    (p.STACK_D - 0x400, "stack of task D"), (p.STACK_E - 0x400, "stack of task E"),
    (0, "page 0"), (p.FINAL, "final"), (p.CR0_WORD, "page 0"), (p.GDT, "GDT"), (p.LDT, "LDT"), (p.IDT, "IDT"),
    (p.TSS_MAIN, "TSS main"),
    (p.TSS_B, "TSS B"), (p.TSS_16, "TSS 16"), (p.TSS_D, "TSS D"), (p.TSS_E, "TSS E"),
    (p.TSS_F, "TSS F"), (p.STACK_F - 0x400, "stack of task F"), (p.STACK_F, "page B"),
    (p.DIRECTORY, "page directory"), (p.TABLE0, "page table 0"), (p.CODE_COMMON, "common code"),
    (p.STACK0 - 0x1000, "stack 0"), (p.STACK0, "stack 1"), (p.STACK1, "stack 2"), (p.STACK2, "stack 3"),
    (p.TARGET, "target"), (p.LOG, "log"), (p.TABLE3, "page table 3"), (p.CODE, "code"),
    (p.CODE + p.ACTIONS * p.CODE_SLOT, "V86 stack"), (p.DATA, "data"),
    (p.DATA + 0x1000 * p.DATA_PAGES, "rest"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """One log entry: an interrupt or exception as its handler saw it."""

    number: int
    words: tuple[int, ...]

    @property
    def vector(self) -> int:
        return self.words[17] & 0xFF

    def __str__(self) -> str:
        words = self.words
        frame = " ".join(f"{word:x}" for word in words[18:24])
        return (
            f"{self.number}: vector {self.vector:02x} frame {frame}  cs {words[1] & 0xFFFF:x} "
            f"ss {words[1] >> 16:x} esp {words[0]:x} cr2 {words[3]:x} dr6 {words[4]:x} tr {words[6]:x} "
            f"ds {words[8]:x} es {words[7]:x} fs {words[2] >> 16:x} gs {words[2] & 0xFFFF:x} "
            f"eax {words[16]:x} ecx {words[15]:x} edx {words[14]:x} ebx {words[13]:x} "
            f"esi {words[10]:x} edi {words[9]:x}"
        )


def finished(arena: bytes) -> bool:
    return bool(struct.unpack_from("<I", arena, p.FINISHED)[0] == p.MARK)


def events(arena: bytes) -> list[Event]:
    end = struct.unpack_from("<I", arena, p.LOG_NEXT)[0]
    count = max(0, min(end, p.LOG_END + p.ENTRY) - p.LOG) // p.ENTRY
    return [Event(n, struct.unpack_from("<31I", arena, p.LOG + n * p.ENTRY)) for n in range(count)]


def region(pa: int) -> str:
    found = max((start, name) for start, name in REGIONS if start <= pa)
    if found[1] == "log":
        number, offset = divmod(pa - p.LOG, p.ENTRY)
        field = FIELDS[offset // 4] if offset // 4 < len(FIELDS) else "?"
        return f"log[{number}].{field}"
    return f"{found[1]}+{pa - found[0]:x}"


def differences(ours: bytes, theirs: bytes) -> Iterator[tuple[int, str, int, int]]:
    """Each dword that differs: address, place in words, our value, their value."""
    if ours == theirs:
        return
    for page in range(0, p.SIZE, 0x400):
        if ours[page : page + 0x400] == theirs[page : page + 0x400]:
            continue
        for pa in range(page, page + 0x400, 4):
            a, b = ours[pa : pa + 4], theirs[pa : pa + 4]
            if a != b:
                yield pa, region(pa), int.from_bytes(a, "little"), int.from_bytes(b, "little")
