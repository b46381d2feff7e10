"""Builds one scenario's arena: the usual tables, which a subject then changes, and its actions.

An action is code that starts at CPL 0 with flat segments, interrupts off, and ends with INT E0h or with
whatever happens to it. Source: Intel SDM vol. 3A 3.4.5, 5.8.3, 6.11, 7.2.
"""

from __future__ import annotations

import random
import struct

from cpu_node.descriptor import pack, pack_gate
from tests.system import common
from tests.system import places as p

P, RW, US, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
FLAT = 0xFFFFF
CR0_DEFAULT, CR0_PAGED = 0x0001_0031, 0x8001_0031  # PE, ET, NE, WP
CR4_DEFAULT = 0x0000_0610  # OSFXSR, OSXMMEXCPT, PSE
END = f"int {p.END_OF_ACTION}"
IRET, IRET16, RETF, RETF16 = ".byte 0xcf", ".byte 0x66, 0xcf", ".byte 0xcb", ".byte 0x66, 0xcb"
CODES = (p.CODE0, p.CODE1, p.CODE2, p.CODE3)
DATAS = (p.DATA0, p.DATA1, p.DATA2, p.DATA3)
STACKS = (p.STACK0, p.STACK1, p.STACK2, p.STACK3)
GENERAL = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")

FIXED = {
    p.CODE0: (0, FLAT, 0xC09B), p.DATA0: (0, FLAT, 0xC093), p.CODE3: (0, FLAT, 0xC0FB),
    p.DATA3: (0, FLAT, 0xC0F3), p.CODE1: (0, FLAT, 0xC0BB), p.DATA1: (0, FLAT, 0xC0B3),
    p.CODE2: (0, FLAT, 0xC0DB), p.DATA2: (0, FLAT, 0xC0D3), p.CONFORMING: (0, FLAT, 0xC09F),
    p.CODE16_0: (0x10000, 0xFFFF, 0x009B), p.CODE16_3: (0x10000, 0xFFFF, 0x00FB),
    p.DATA16_3: (0x10000, 0xFFFF, 0x00F3), p.DATA16_0: (0x10000, 0xFFFF, 0x0093),
    p.TSS_SEL: (p.TSS_MAIN, 0xFF, 0x0089), p.LDT_SEL: (p.LDT, p.LDT_LIMIT, 0x0082),
    p.TSS_B_SEL: (p.TSS_B, 0xFF, 0x0089), p.TSS_16_SEL: (p.TSS_16, 0x2B, 0x0081),
    p.TSS_D_SEL: (p.TSS_D, 0xFF, 0x0089), p.TSS_E_SEL: (p.TSS_E, 0xFF, 0x00E9),
    **{p.TSS_F_SEL + 8 * n: (p.TSS_F + 0x100 * n, 0xFF, 0x0089) for n in range(4)},
}  # fmt: skip


class Builder:
    """`r` is the scenario's source of randomness; `skip` are numbers of actions to leave out."""

    def __init__(self, r: random.Random, skip: frozenset[int] = frozenset()) -> None:
        self.r = r
        self.skip = skip
        self.texts: list[str] = []
        self.memory = bytearray(p.SIZE)
        self.cr0, self.cr4 = CR0_PAGED, CR4_DEFAULT
        self.gates_to_16 = False  # may task gates lead to the 16-bit task?
        self._tables()

    # ---- memory

    def put32(self, pa: int, *values: int) -> None:
        struct.pack_into(f"<{len(values)}I", self.memory, pa, *(value & 0xFFFFFFFF for value in values))

    def put16(self, pa: int, value: int) -> None:
        struct.pack_into("<H", self.memory, pa, value & 0xFFFF)

    def get32(self, pa: int) -> int:
        return int(struct.unpack_from("<I", self.memory, pa)[0])

    def describe(self, selector: int, raw: int) -> None:
        table = p.LDT if selector & 4 else p.GDT
        struct.pack_into("<Q", self.memory, table + (selector & 0xFFF8), raw)

    def gate(self, vector: int, raw: int) -> None:
        struct.pack_into("<Q", self.memory, p.IDT + 8 * vector, raw)

    def policy(self, vector: int, what: int) -> None:
        self.memory[p.POLICY + vector] = what

    def pte(self, va: int, entry: int) -> None:
        table = p.TABLE0 if va < 0x400000 else p.TABLE3
        self.put32(table + (va >> 12 & 0x3FF) * 4, entry)

    def _tables(self) -> None:
        memory, r = self.memory, self.r
        for page in range(p.DATA_PAGES):
            start = p.DATA + 0x1000 * page
            memory[start : start + 0x800] = r.randbytes(0x800)
            memory[start + 0x800 : start + 0x1000] = b"\xc3" * 0x800  # RET
        code = common.code()
        memory[p.CODE_COMMON : p.CODE_COMMON + len(code)] = code
        memory[p.TARGET : p.TARGET + 16] = b"\x90\x90\xcd\xe0" * 4
        clear = "".join(f"movzx {r32}, {r32[1:]}\n" for r32 in GENERAL)
        clear = common.asm(clear, p.TARGET_16) + b"\xcd\xe0"
        memory[p.TARGET_16 : p.TARGET_16 + len(clear)] = clear
        memory[p.CODE : p.CODE + p.ACTIONS * p.CODE_SLOT] = b"\xcd\xe0" * (p.ACTIONS * p.CODE_SLOT // 2)
        self.put32(p.LOG_NEXT, p.LOG)
        for pa, base, limit in ((p.GDTR_WORD, p.GDT, p.GDT_LIMIT), (p.IDTR_WORD, p.IDT, p.IDT_LIMIT)):
            self.put16(pa, limit)
            self.put32(pa + 2, base)
        for selector, (base, limit, rights) in FIXED.items():
            self.describe(selector, pack(base, limit, rights))
        for vector in range(256):
            user = vector in (3, 4, p.END_OF_ACTION, p.NEXT_ACTION)
            self.gate(vector, pack_gate(0xE, p.CODE0, common.stub(vector), dpl=3 if user else 0))
        for vector in (1, 2, 3, 4, *p.APIC_VECTORS):
            self.policy(vector, p.TO_IRET)
        for tss, top in ((p.TSS_MAIN, p.STACK0), (p.TSS_B, p.STACK_B), (p.TSS_D, p.STACK_D),
                         (p.TSS_E, p.STACK_E)):  # fmt: skip
            self.task(tss, esp0=top if tss != p.TSS_MAIN else p.STACK0)
        self.task16(p.TSS_16)
        for page in range(p.SIZE >> 12):
            supervisor = page in (1, 2, 3, 4, 7, 0xF)
            self.put32(p.TABLE0 + 4 * page, page << 12 | P | RW | (0 if supervisor else US))
        for page in range(p.WINDOW_PAGES):
            self.pte(p.WINDOW + (page << 12), p.DATA + (page % p.DATA_PAGES << 12) | P | RW | US)
            self.pte(p.FAR_WINDOW + (page << 12), p.DATA + (page % p.DATA_PAGES << 12) | P | RW | US)
        self.put32(p.DIRECTORY, p.TABLE0 | P | RW | US)
        self.put32(p.DIRECTORY + 4, P | RW | US | PS)
        self.put32(p.DIRECTORY + 12, p.TABLE3 | P | RW | US)
        self.put32(p.DIRECTORY + (p.APIC >> 22) * 4, 0xFEC00000 | P | RW | PS | 0x18)

    def task(self, tss: int, esp0: int = p.STACK0, **fields: int) -> None:
        """A 32-bit TSS [fig. 7-2] that would start TARGET at CPL 0; `fields` by name."""
        values = dict(  # noqa: C408
            back=0, esp0=esp0, ss0=p.DATA0, esp1=p.STACK1, ss1=p.DATA1, esp2=p.STACK2, ss2=p.DATA2,
            cr3=p.DIRECTORY, eip=p.TARGET, eflags=2, eax=0xA0, ecx=0xC0, edx=0xD0, ebx=0xB0, esp=esp0,
            ebp=0x50, esi=0x60, edi=0x70, es=p.DATA3, cs=p.CODE0, ss=p.DATA0, ds=p.DATA3, fs=p.DATA3,
            gs=p.DATA3, ldt=0, trap=0x680000,
        ) | fields  # fmt: skip
        self.put32(tss, *values.values())

    def task16(self, tss: int, **fields: int) -> None:
        """A 16-bit TSS [fig. 7-10]."""
        values = dict(  # noqa: C408
            back=0, sp0=p.STACK_16, ss0=p.DATA0, sp1=p.STACK1, ss1=p.DATA1, sp2=p.STACK2, ss2=p.DATA2,
            ip=p.TARGET_16, flags=2, ax=0xA1, cx=0xC1, dx=0xD1, bx=0xB1, sp=p.STACK_16, bp=0x51, si=0x61,
            di=0x71, es=p.DATA3, cs=p.CODE0, ss=p.DATA0, ds=p.DATA3, ldt=0,
        ) | fields  # fmt: skip
        for number, value in enumerate(values.values()):
            self.put16(tss + 2 * number, value)

    # ---- random things

    def chance(self, percent: int) -> bool:
        return self.r.randrange(100) < percent

    def cpl(self) -> int:
        return self.r.choice((0, 0, 1, 2, 3, 3, 3))

    def selector(self, cpl: int, low: int = 0, high: int = 0x200) -> int:
        """Any selector of the GDT (low to high) or LDT, its RPL often the CPL; at times null or beyond."""
        kind = self.r.randrange(20)
        rpl = self.r.choice((cpl, cpl, 0, 1, 2, 3))
        if kind == 0:
            return self.r.randrange(4)
        if kind == 1:
            return self.r.choice((0x200, 0x208, 0x84, 0x1FFF8, 0xFFFC)) & 0xFFF8 | rpl
        if kind < 6:
            return self.r.randrange(16) << 3 | 4 | rpl
        return (low + self.r.randrange((high - low) // 8) * 8) | rpl

    def conforming(self, selector: int) -> bool:
        """Is this conforming code?"""
        at = (p.LDT if selector & 4 else p.GDT) + (selector & 0xFFF8) + 5
        return at < p.IDT and self.memory[at] & 0x1C == 0x1C

    def random_descriptor(self) -> int:
        """Data and code are usable wherever they are put: no limit is in the way of the common code."""
        r = self.r
        dpl, present = r.randrange(4), 0x80 if r.randrange(12) else 0
        if r.randrange(6) == 0:
            kind = r.choice((0, 2, 8, 10, 13))  # system types that are nothing to jump to, and LDT
            return pack(p.LDT, p.LDT_LIMIT, dpl << 5 | present | kind)
        kind = r.choice((0, 1, 2, 2, 2, 3, 4, 6, 6, 7, 8, 9, 0xA, 0xA, 0xB, 0xC, 0xE, 0xF))
        rights = 0x10 | kind | dpl << 5 | present
        if kind >= 8:
            return pack(0, FLAT, 0xC000 | rights)
        if kind & 4:  # expand-down
            return pack(r.choice((0, 0x10000)), r.choice((0, 0xFFF)), 0x4000 | rights)
        return pack(r.choice((0, 0, 0x10000)), FLAT, 0xC000 | rights)

    def random_descriptors(self) -> None:
        for number in range(p.RANDOM_COUNT):
            self.describe(p.RANDOM + 8 * number, self.random_descriptor())
        for number in range(16):
            self.describe(number << 3 | 4, self.random_descriptor())

    def random_gates(self, kinds: tuple[int, ...] = (4, 0xC, 0xC, 0xC, 5)) -> None:
        """Call and task gates in the GDT, to TARGET."""
        for number in range(p.GATE_COUNT):
            self.describe(p.GATES + 8 * number, self.random_gate(kinds, self.r.choice((0, 1, 2, 3, 31))))

    def random_gate(self, kinds: tuple[int, ...], count: int = 0) -> int:
        r = self.r
        kind = r.choice(kinds)
        if kind == 5:
            sixteen = p.TSS_16_SEL if self.gates_to_16 else p.TSS_B_SEL
            selector = r.choice((p.TSS_B_SEL, p.TSS_D_SEL, p.TSS_E_SEL, sixteen, self.selector(0) & ~4))
            if selector & ~7 == p.TSS_16_SEL and not self.gates_to_16:
                selector = p.TSS_B_SEL
        else:
            selector = self.code_selector()
        return pack_gate(kind, selector, p.TARGET, dpl=r.choice((3, 3, 3, 0, 1, 2)), parameters=count,
                         present=bool(r.randrange(12)))  # fmt: skip

    def gate_to_absent(self, selector: int) -> bool:
        """Is it of a call gate to a code segment that isn't present?"""
        gate = self.descriptor(selector)
        target = self.descriptor(gate >> 16 & 0xFFFF)
        return gate >> 40 & 0x17 == 4 and target >> 40 & 0x98 == 0x18

    def descriptor(self, selector: int) -> int:
        at = (p.LDT if selector & 4 else p.GDT) + (selector & 0xFFF8)
        return int.from_bytes(self.memory[at : at + 8], "little")

    def code_selector(self) -> int:
        """Mostly of a code segment with base 0."""
        rpl = self.r.randrange(4)
        if self.chance(25):
            return self.selector(rpl, p.RANDOM)
        return self.r.choice((*CODES, p.CODE0, p.CODE0, p.CODE3, p.CONFORMING)) & ~3 | rpl

    def flags(self, cpl: int) -> int:
        """EFLAGS with random status flags; IOPL at random, IF clear."""
        return 2 | self.r.choice((0, 0x8D5, 0x41, 0x880)) | self.r.choice((0, 0, 1, 2, 3, 3)) << 12

    # ---- actions

    def enter(self, cpl: int, flags: int = 2, stack: int | None = None) -> str:
        """Code that goes to `cpl` with flat segments; behind it comes that code's body."""
        data, esp = DATAS[cpl], STACKS[cpl] if stack is None else stack
        text = f"mov ax, {data}\n" + "".join(f"mov {s}, ax\n" for s in ("ds", "es", "fs", "gs"))
        if cpl == 0:
            return f"{text}mov esp, {esp}\npush {flags}\npopfd\n"
        text += f"push {data}\npush {esp}\npush {flags}\npush {CODES[cpl]}\n"
        return text + f".byte 0x68\n.long body\n{IRET}\nbody:\n"

    def action(self, *lines: str) -> None:
        """32-bit code; END is put behind it."""
        number = len(self.texts)
        if number >= p.ACTIONS:
            return
        text = "\n".join((*lines, END))
        self.texts.append(text)
        va = p.CODE + number * p.CODE_SLOT
        code = common.asm(text, va) if number not in self.skip else bytes((0xCD, p.NEXT_ACTION))
        assert len(code) <= p.CODE_SLOT
        self.memory[va : va + len(code)] = code

    def action16(self, before: str, body: str) -> None:
        """32-bit code, then 16-bit code 400h behind its start (offset by segment 10000h)."""
        number = len(self.texts)
        if number >= p.ACTIONS:
            return
        self.texts.append(f"{before}\n; 16-bit:\n{body}")
        va = p.CODE + number * p.CODE_SLOT
        if number in self.skip:
            self.memory[va : va + 2] = bytes((0xCD, p.NEXT_ACTION))
            return
        code = common.asm(before, va)
        inner = common.asm(body, va + 0x400 & 0xFFFF, 16) + bytes((0xCD, p.END_OF_ACTION))
        assert len(code) <= 0x400
        assert len(inner) <= p.CODE_SLOT - 0x400
        self.memory[va : va + len(code)] = code
        self.memory[va + 0x400 : va + 0x400 + len(inner)] = inner

    def offset16(self) -> int:
        """Where the 16-bit code of the next action will be, in a segment with base 10000h."""
        return len(self.texts) * p.CODE_SLOT + 0x400

    def image(self) -> bytes:
        """The arena, done."""
        self.put32(p.CR0_WORD, self.cr0)
        self.put32(p.CR3_WORD, p.DIRECTORY)
        self.put32(p.CR4_WORD, self.cr4)
        self.put32(p.COUNT, len(self.texts))
        return bytes(self.memory)
