"""A case being written: which registers are settled, which pages there are, and the code so far.

A register is free (its initial value may still be chosen), known (its value at this point of the code), or
unknown (some instruction has changed it).  Memory operands are built backwards: first the address that the
operand shall have, then a form, then the values of the registers in it, as far as those are free.

Source of the encodings: Intel SDM volume 2, 2.1.3 and 2.1.5 (ModRM and SIB).
Left out: addresses below 64 KiB (a host maps none there for an ordinary user) except as faults.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cpu_node.table import Row
from tests.insn.segments import DS, FLAT, SS, base_of, inside
from tests.insn.state import EBP, ESP, PAGE_SIZE, Page
from tests.insn.values import chance, integer, integer_pool

Choice = Callable[[Random], int]
Pokes = list[tuple[int, bytes]]  # (va, bytes)
Contents = Callable[[Random], Pokes]

# Where the pages are.  Around each run of pages nothing is mapped.
CODE, DATA, STACK, HIGH = 0x20000000, 0x30000000, 0x7F000000, 0xE0001000
RW_PAGES, READ_ONLY_PAGES = (DATA, DATA + 0x1000, STACK, STACK + 0x1000, HIGH), (DATA + 0x2000,)
ABSENT = (DATA + 0x3000, DATA - 0x1000, STACK - 0x1000, HIGH + 0x1000)
STACK_END = STACK + 0x2000
MASK = 0xFFFFFFFF
TOP = 0xFFFFF000  # the last page: exists in the cases that ask for it
HLTS_BEHIND = 32  # after code in a data page
BYTE_REGISTERS = 4  # AL CL DL BL, then AH CH DH BH
NO_BASE, SIB_FOLLOWS = 5, 4
BX, BP, SI, DI = 3, 5, 6, 7
FORMS16 = ((BX, SI), (BX, DI), (BP, SI), (BP, DI), (None, SI), (None, DI), (BP, None), (BX, None))


class Draft:
    def __init__(self, rng: Random, pool: tuple[bytes, ...], code_writable: bool, eip: int) -> None:
        self.rng = rng
        self.initial: list[int | None] = [None] * 8
        self.known: list[int | None] = [None] * 8
        self.choices: dict[int, Choice] = {}  # registers whose initial value nothing depends on
        self.contents: list[Contents] = []  # operands whose initial contents nothing depends on
        self.varied: dict[int, int] = {}  # registers that a Contents has just chosen, too
        self.fixed: list[tuple[int, int]] = []  # (va, length) of contents that all variations keep
        self.rows: list[Row] = []  # of the finished case
        self.addr16 = False  # prefer 16-bit addresses: the segments are made for them
        self.eip = eip  # linear
        self.selectors = list(FLAT)  # at this point of the code
        self.first_selectors: tuple[int, ...] = FLAT
        self.code = bytearray()
        self.starts: list[int] = []  # offset of each instruction in code
        self.relative: list[
            tuple[int, int, int]
        ] = []  # (offset, size, instruction) of branches not yet resolved
        # (va of a dword in data, instruction, base of its code segment) not yet resolved
        self.absolute: list[tuple[int, int, int]] = []
        self.far: list[tuple[int, int, int]] = []  # likewise, offset in code
        self.eflags = 0
        self.blind_memory: list[tuple[int, int]] = []
        self.blind_on_fault: list[tuple[int, int]] = []
        self.blind_registers_on_fault: tuple[int, ...] = ()
        self.fault_page_only = False
        self.wild = False  # a branch goes anywhere, perhaps into the middle of an instruction
        self._pool = pool
        self._pages: dict[int, tuple[bytes | bytearray, bool]] = {}
        for va in RW_PAGES:
            self._pages[va] = (rng.choice(pool), True)
        for va in READ_ONLY_PAGES:
            self._pages[va] = (rng.choice(pool), False)
        self.code_writable = code_writable

    # Registers

    def is_free(self, reg: int) -> bool:
        return self.initial[reg] is None

    def settle(self, reg: int, value: int | None = None) -> int | None:
        """Give a free register its initial value (else an interesting one); its value now, if known.

        All variations of the case start with that value: something depends on it.
        """
        self.choices.pop(reg, None)
        if self.initial[reg] is None:
            if value is None:
                value = self.stack_pointer() if reg == ESP else integer(self.rng)
            self.initial[reg] = self.known[reg] = value & MASK
        return self.known[reg]

    def choose(self, reg: int, choice: Choice = integer) -> None:
        """Give a free register an initial value that nothing depends on: each variation chooses again."""
        if reg == ESP:
            self.settle(ESP)
        elif self.initial[reg] is None:
            self.initial[reg] = self.known[reg] = choice(self.rng) & MASK
            self.choices[reg] = choice

    def spoil(self, reg: int) -> None:
        """The register is about to change to a value that nobody here computes."""
        self.choose(reg)
        self.known[reg] = None

    def move(self, reg: int, by: int) -> None:
        """The register is about to change by so much."""
        value = self.settle(reg)
        self.known[reg] = None if value is None else value + by & MASK

    def stack_pointer(self) -> int:
        """An offset in the stack segment: mostly in the middle of the stack's pages."""
        return self.offset(SS, self._stack_place())

    def _stack_place(self) -> int:
        rng = self.rng
        kind = rng.randrange(100)
        if kind < 82:
            return STACK + 0x1000 + 4 * rng.randint(-0x100, 0x100)
        if kind < 89:
            return STACK + 0x1000 + rng.randint(-0x100, 0x100)
        if kind < 93:
            return STACK + rng.randint(0, 16)
        if kind < 97:
            return STACK_END - rng.randint(0, 16)
        return DATA + 0x2000 + rng.randint(-8, 0x400)

    # Segments

    def use_segments(self, selectors: tuple[int, ...]) -> None:
        """Before anything else: what the segment registers hold."""
        self.first_selectors, self.selectors = selectors, list(selectors)

    def base(self, segment: int) -> int:
        return base_of(self.selectors[segment])

    def offset(self, segment: int, va: int) -> int:
        return va - self.base(segment) & MASK

    def stack_va(self, esp: int) -> int:
        return self.base(SS) + esp & MASK

    # Memory

    def poke(self, va: int, data: bytes) -> None:
        """Put initial contents where pages exist."""
        for i, byte in enumerate(data):
            at = va + i & MASK
            base = at & -PAGE_SIZE
            entry = self._pages.get(base)
            if entry is None:
                continue
            page, writable = entry
            if isinstance(page, bytes):
                page = bytearray(page)
                self._pages[base] = (page, writable)
            page[at % PAGE_SIZE] = byte

    def keep(self, va: int, data: bytes) -> None:
        """Put contents in place that an instruction depends on."""
        self.poke(va, data)
        self.fixed.append((va, len(data)))

    def is_kept(self, va: int, length: int) -> bool:
        return any(va < start + n and start < va + length for start, n in self.fixed)

    def vary(self, rng: Random) -> tuple[tuple[int, ...], Pokes]:
        """(initial registers, pokes) of a variation of the finished case."""
        pokes = []
        self.varied.clear()
        for contents in self.contents:
            for va, data in contents(rng):
                if data and not self.is_kept(va, len(data)):
                    pokes.append((va, data))
        regs = [value or 0 for value in self.initial]
        values = rng.choices(integer_pool(), k=8)
        for reg, choice in self.choices.items():
            regs[reg] = values[reg] if choice is integer else choice(rng) & MASK
        for reg, value in self.varied.items():
            regs[reg] = value & MASK
        return tuple(regs), pokes

    def peek(self, va: int, length: int) -> bytes | None:
        """Initial contents, None where a page is absent."""
        out = bytearray()
        for i in range(length):
            entry = self._pages.get(va + i & -PAGE_SIZE & MASK)
            if entry is None:
                return None
            out.append(entry[0][(va + i) % PAGE_SIZE])
        return bytes(out)

    def target(self, width: int, aligned: int = 1) -> int:
        """The address of an operand: mostly in a writable page, else across pages, read-only or absent."""
        rng = self.rng
        width = max(width, 1)
        kind = rng.randrange(100)
        if kind < 74:
            va = rng.choice((DATA, DATA, DATA + 0x1000, HIGH)) + rng.randrange(PAGE_SIZE - width)
            if chance(rng, 50):
                va &= -min(width & -width, 16)
        elif kind < 82:
            va = DATA + 0x1000 - rng.randint(1, max(width - 1, 1))
        elif kind < 87:
            va = DATA + 0x2000 + rng.randrange(PAGE_SIZE - width)
        elif kind < 91:
            va = DATA + 0x2000 - rng.randint(1, max(width - 1, 1))
        elif kind < 95:
            va = rng.choice((DATA + 0x3000, HIGH + 0x1000, STACK_END)) - rng.randint(0, max(width - 1, 1))
        elif kind < 97:
            va = rng.choice((DATA, HIGH)) - rng.randint(1, max(width, 1))
        elif kind < 98:
            va = rng.choice(ABSENT) + rng.randrange(PAGE_SIZE)
        elif kind < 99:
            self._pages.setdefault(TOP, (rng.choice(self._pool), True))
            va = TOP + rng.choice((PAGE_SIZE - width, rng.randrange(PAGE_SIZE - width + 1), PAGE_SIZE - 1))
        else:
            va = self.eip & -PAGE_SIZE | rng.randrange(0x800)
        if aligned > 1 and chance(rng, 85):
            va &= -aligned
        return va

    # Addressing

    def modrm_memory(
        self, reg_field: int, target: int, esp_offset: int = 0, override: int | None = None
    ) -> bytes:
        """ModRM, SIB, displacement of an operand at `target`; as base, ESP has moved by esp_offset."""
        rng = self.rng
        for _ in range(4 if rng.randrange(25) else 0):
            form = self._form(reg_field, target, esp_offset, override)
            if form is not None:
                return form
        target = self.offset(DS if override is None else override, target)
        if rng.getrandbits(1):  # SIB with neither base nor index
            scale = rng.getrandbits(2) << 6
            return bytes((reg_field << 3 | SIB_FOLLOWS, scale | 4 << 3 | NO_BASE)) + target.to_bytes(
                4, "little"
            )
        return bytes((reg_field << 3 | NO_BASE,)) + target.to_bytes(4, "little")

    def form16(self, width: int, override: int | None) -> tuple[int, int, bytes, int]:
        """(mod, rm, displacement, va) of a 16-bit form, mostly inside a small segment [table 2-1]."""
        rng = self.rng
        mod, rm = rng.getrandbits(2) % 3, rng.randrange(8)
        base, index = FORMS16[rm] if (mod, rm) != (0, 6) else (None, None)
        if any(r is not None and not self.is_free(r) and self.known[r] is None for r in (base, index)):
            mod, rm, base, index = 0, 6, None, None
        segment = override if override is not None else SS if base == BP else DS
        wanted = inside(self.selectors[segment], rng, width)
        offset = rng.getrandbits(16) if wanted is None else wanted & 0xFFFF
        if wanted is None and self.addr16:
            offset &= 0x1FFF
        size = 2 if mod == 2 or (base, index) == (None, None) else mod
        disp = rng.getrandbits(16) if size == 2 else rng.randint(-128, 127) if size else 0
        total = disp
        if index is not None:
            self.settle(index, rng.getrandbits(32))
            total += self._value(index)
        if base is not None and self.is_free(base):
            self.settle(base, rng.getrandbits(16) << 16 | offset - total & 0xFFFF)
        total += self._value(base) if base is not None else 0
        if size == 2:
            disp += offset - total
            total = offset
        va = self.base(segment) + total % 0x10000 & MASK
        return mod, rm, (disp & 0xFFFF).to_bytes(2, "little")[:size], va

    def _form(self, reg_field: int, va: int, esp_offset: int, override: int | None) -> bytes | None:
        rng = self.rng
        use_sib = chance(rng, 50)
        base: int | None = rng.randrange(8)
        index: int | None = None
        scale = 0
        if base == ESP:
            use_sib = True
        if use_sib:
            scale = rng.getrandbits(2)
            index = rng.choice((0, 1, 2, 3, 5, 6, 7, None))
            if base == NO_BASE and rng.getrandbits(1):
                base = None
        mod = 2 if base is None else rng.getrandbits(2) % 3
        if mod == 0 and base == NO_BASE:
            mod = 1
        for reg in (base, index):
            if reg is not None and self.initial[reg] is not None and self.known[reg] is None:
                return None
        segment = SS if base in (ESP, EBP) else DS
        if override is None and segment == SS and self.selectors[SS] != self.selectors[DS]:
            return None  # the address was chosen for DS
        target = self.offset(segment if override is None else override, va)
        disp = self._solve(target, base, index, scale, mod, esp_offset)
        if disp is None:
            return None
        size = 4 if base is None else (0, 1, 4)[mod]
        field = 0 if base is None else mod << 6
        disp_bytes = (disp & MASK).to_bytes(4, "little")[:size]
        if not use_sib:
            assert base is not None
            return bytes((field | reg_field << 3 | base,)) + disp_bytes
        sib = scale << 6 | (4 if index is None else index) << 3 | (NO_BASE if base is None else base)
        return bytes((field | reg_field << 3 | SIB_FOLLOWS, sib)) + disp_bytes

    def _solve(
        self, target: int, base: int | None, index: int | None, scale: int, mod: int, esp_offset: int
    ) -> int | None:
        """Settles the registers of a form and returns its displacement, None if it can't reach the target."""
        rng = self.rng
        disp = 0 if mod == 0 else rng.randint(-128, 127)
        if mod == 2 and chance(rng, 70):
            disp = rng.getrandbits(32)
        if index is not None and index != base:
            self.settle(index, integer(rng))
        multiplier = 1 << scale
        if base is not None and self.is_free(base) and index != base:
            offset = 0 if index is None else self._value(index) * multiplier
            if base == ESP:
                offset += esp_offset
            self.settle(base, target - offset - disp)
            return disp
        total = esp_offset if base == ESP else 0
        if base is not None:
            self.settle(base)
            total += self._value(base)
        if index is not None:
            total += self._value(index) * multiplier
        disp = target - total & MASK
        if mod == 2:
            return disp
        signed = disp - (disp >> 31 << 32)
        if mod == 1 and -128 <= signed <= 127:
            return signed
        return 0 if disp == 0 else None

    def _value(self, reg: int) -> int:
        value = self.known[reg]
        assert value is not None
        return value

    # Code

    @property
    def here(self) -> int:
        return self.eip + len(self.code)

    def emit(self, code: bytes) -> None:
        self.starts.append(len(self.code))
        self.code += code

    def finish(self, reach: int) -> None:
        """Resolve branches; numbers past the last instruction mean the HLTs after it, `reach` of them."""
        for offset, size, number in self.relative:
            distance = self._address(number, reach) - (self.eip + offset + size)
            self.code[offset : offset + size] = (distance & MASK).to_bytes(4, "little")[:size]
        for va, number, base in self.absolute:
            self.keep(va, (self._address(number, reach) - base & MASK).to_bytes(4, "little"))
        for offset, number, base in self.far:
            self.code[offset : offset + 4] = (self._address(number, reach) - base & MASK).to_bytes(
                4, "little"
            )

    def _address(self, number: int, reach: int) -> int:
        if number < len(self.starts):
            return self.eip + self.starts[number]
        return self.eip + len(self.code) + min(number - len(self.starts), reach - 1)

    def pages(self, hlt_filled: bytes, second_code_page: bool) -> tuple[Page, ...]:
        """All pages; the code is in its own (filled with HLT) or in a data page, followed by HLTs."""
        code = bytes(self.code)
        if self.eip & -PAGE_SIZE == CODE:
            self._pages[CODE] = (hlt_filled, self.code_writable)
            if second_code_page:
                self._pages[CODE + PAGE_SIZE] = (hlt_filled, self.code_writable)
        else:
            code += hlt_filled[:HLTS_BEHIND]
        self.keep(self.eip, code)
        return tuple(Page(va, bytes(data), writable) for va, (data, writable) in sorted(self._pages.items()))
