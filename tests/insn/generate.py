"""Seeded random cases from the instruction table: `Generator(seed).case(index)` is always the same case.

Cases come in families of VARIATIONS, which have their code in common: registers, flags, FPU state and the
contents of operands are each time others.  Of every eight families five are one instruction (the rows in
turn), two are sequences with branches in them, and one is something special: code that modifies itself, or
bytes that are no instruction.

Left out: 16-bit code (16-bit addresses and operands are here), what `exclusions` names.
"""

from __future__ import annotations

from random import Random

from cpu_node.decode import Undefined, decode
from cpu_node.table import Row, all_rows
from tests.insn.draft import CODE, DATA, HIGH, MASK, Draft
from tests.insn.exclusions import TESTED_ROWS, same_at_cpl0
from tests.insn.groups import ILLEGAL, SELF_MODIFYING, SEQUENCE, group_of
from tests.insn.instance import Instance
from tests.insn.prepare import prepare
from tests.insn.segments import (
    CODE_SELECTORS,
    CS,
    DATA_SELECTORS,
    DS,
    ES,
    FLAT,
    FS,
    SS,
    STACK_SELECTOR,
    WRITABLE_SELECTORS,
    base_of,
    ldt_selector,
)  # fmt: skip
from tests.insn.state import (
    AC,
    DF,
    EAX,
    ECX,
    EDI,
    HLT,
    PAGE_SIZE,
    STATUS_FLAGS,
    Blind,
    Case,
    Family,
    Variation,
    fx_image,
)
from tests.insn.values import FpuPool, chance, fpu_state, integer, page_pool

VARIATIONS = 8  # cases of a family
MAX_INSTRUCTIONS = 6
REACH = 16  # bytes of HLT after the code that branches may aim at
ONE_ACCESS = frozenset((0, 1, 2, 4, 6, 8, 10, 16))  # widths of operands that fault at one address
HLT_PAGE = bytes((HLT,)) * PAGE_SIZE
DEFAULT_FX = fx_image()
X87_POINTERS = {  # (offset, length) of FIP, FOP, FDP and selectors, by operand size [8.1.10, 10.5.1]
    "fnstenv": ((12, 16), (6, 8)),
    "fnsave": ((12, 16), (6, 8)),
    "fxsave": ((6, 18), (6, 18)),
}
FXSAVE_RESERVED = (288, 176)  # XMM8 to XMM15 in 64-bit mode
# A newer host than the guest has instructions here where the guest has none.
HOST_HAS_MORE = frozenset(((0, 0xC4), (0, 0xC5), (0, 0x62), (1, 0xC7), (1, 0x01), (1, 0xAE)))
NO_INSTRUCTION = (
    "0f0b", "0fff00", "0fb900", "f00f0b", "0f0a", "0f0c", "0f24c0", "ff38", "fff8", "d9d1", "dbe5",
    "8ec8", "f0c3", "f090", "f08d00", "f08900", "f0d9c0", "66660f0b", "0f38fe00", "0f3aff00", "0f04",
)  # fmt: skip
TOO_LONG = (
    "66" * 15 + "90",
    "2e" * 14 + "8b00",
    "66" * 11 + "c70500000030",
    "f3" * 15 + "a4",
    "67" * 14 + "b001",
)
STRING_ROWS = tuple(row for row in TESTED_ROWS if row.action == "string")
PLAIN = tuple(row for row in TESTED_ROWS if row.action == "copy" and row.group == "int")
SEQUENCE_ROWS = tuple(
    row for row in TESTED_ROWS if row.group in ("int", "string") or (row.group == "system" and row.undefined)
)
# data segments of the LDT whose pages lie at small offsets
SMALL_SELECTORS = tuple(ldt_selector(n) for n in (0, 0, 1, 2))
ADD_AL = next(row for row in all_rows() if row.key == "04")


def write(row: Row, draft: Draft) -> Instance:
    """Appends an instance of the row to the draft."""
    instance = Instance(row, draft)
    prepare(instance)
    instance.choose_address()
    offset = b""
    if any(operand[0] == "O" for operand in row.operands):  # MOV AL,moffs and so on
        instance.va = draft.target(1 if "AL" in row.operands else instance.operand_size)
        segment = DS if instance.override is None else instance.override
        if instance.addr16:
            instance.va = draft.base(segment) + draft.rng.randrange(0x2000) & MASK
        offset = draft.offset(segment, instance.va).to_bytes(4, "little")[: 2 if instance.addr16 else 4]
    # ModRM first: it settles registers that contents depend on
    tail = instance.modrm() + offset + instance.immediates
    code = instance.prefixes() + instance.opcode() + tail
    instance.fill_memory()
    if row.mnemonic in X87_POINTERS and instance.va is not None:
        start, length = X87_POINTERS[row.mnemonic][instance.size16]
        draft.blind_memory.append((instance.va + start, length))
        if row.mnemonic == "fxsave":
            draft.blind_memory.append((instance.va + FXSAVE_RESERVED[0], FXSAVE_RESERVED[1]))
    for va, data in instance.late:
        draft.keep(va, data)
    draft.fault_page_only |= instance.memory and instance.width not in ONE_ACCESS
    draft.emit(code)
    for reg in instance.touched:
        draft.spoil(reg)
    for change in instance.after:
        change()
    return instance


def _selectors(rng: Random, code_va: int, addr16: bool) -> tuple[int, ...]:
    """Mostly flat; FS and GS with a base; now and then anything.  For 16-bit addresses, segments that have
    their pages at offsets below 64 KiB."""
    if addr16:
        es, ds, fs, gs = (rng.choice(SMALL_SELECTORS) for _ in range(4))
        return (es, FLAT[CS], rng.choice((STACK_SELECTOR, FLAT[SS])), ds, fs, gs)
    kind = rng.randrange(100)
    if kind < 75:
        return FLAT
    selectors = [*FLAT[:FS], rng.choice(WRITABLE_SELECTORS), rng.choice(WRITABLE_SELECTORS)]
    if kind >= 92:
        selectors[ES] = rng.choice(DATA_SELECTORS)
        selectors[DS] = rng.choice(DATA_SELECTORS)
        selectors[SS] = rng.choice((STACK_SELECTOR, *WRITABLE_SELECTORS))
        if code_va & -PAGE_SIZE == CODE:
            selectors[CS] = rng.choice(CODE_SELECTORS)
    return tuple(selectors)


class Generator:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._pool = page_pool(seed)
        self._fpu = FpuPool(seed)
        self._last: tuple[int, list[Case]] = (-1, [])
        order = Random(seed)
        self._order = [*TESTED_ROWS, *STRING_ROWS * 3]
        order.shuffle(self._order)

    def case(self, index: int) -> Case:
        number = index // VARIATIONS
        if self._last[0] != number:
            self._last = number, self.family(number).cases()
        return self._last[1][index % VARIATIONS]

    def family(self, number: int) -> Family:
        """The cases number * VARIATIONS and on."""
        rng = Random(self.seed << 40 | number)
        kind = number % 8
        row = self._order[(number // 8 * 5 + kind) % len(self._order)] if kind < 5 else None
        draft = self._draft(rng, is_string=row in STRING_ROWS)
        case = self._one(draft, row) if row is not None else self._several(draft, special=kind == 7)
        uses_fpu = any(row.group in ("x87", "mmx", "sse") for row in draft.rows)
        mmx = any(row.group == "mmx" for row in draft.rows)
        variations = []
        for _ in range(VARIATIONS - 1):
            regs, pokes = draft.vary(rng)
            eflags = case.eflags & ~STATUS_FLAGS | rng.getrandbits(12) & STATUS_FLAGS
            fx = self._fpu.image(rng, mmx) if uses_fpu else case.fx
            variations.append(Variation(regs, eflags, fx, tuple(pokes)))
        return Family(case, tuple(variations))

    def _several(self, draft: Draft, special: bool) -> Case:
        if not special:
            return self._sequence(draft)
        draft.addr16 = False
        draft.use_segments(FLAT)
        if draft.rng.getrandbits(1):
            return self._self_modifying(draft)
        draft.eip = CODE + draft.rng.randrange(0x800)  # in one page: how far is an undefined one fetched?
        return self._illegal(draft)

    def _draft(self, rng: Random, is_string: bool) -> Draft:
        place = rng.randrange(100)
        if place < 80:
            eip = CODE + rng.randrange(0x800)
        elif place < 92:
            eip = CODE + PAGE_SIZE - rng.randint(1, 16)
        else:
            eip = rng.choice((DATA, DATA + 0x1000, HIGH)) + rng.randrange(0xE00)
        draft = Draft(rng, self._pool, chance(rng, 15), eip)
        draft.addr16 = chance(rng, 20 if is_string else 5)
        draft.use_segments(_selectors(rng, eip, draft.addr16))
        direction = DF if is_string or chance(rng, 40) else 0
        draft.eflags = rng.getrandbits(12) & (STATUS_FLAGS | direction)
        draft.eflags |= AC if chance(rng, 3) else 0
        return draft

    def _finish(self, draft: Draft, rows: list[Row], group: str, undefined: int) -> Case:
        rng = draft.rng
        crosses = (
            draft.eip & -PAGE_SIZE == CODE and draft.eip % PAGE_SIZE + len(draft.code) + REACH > PAGE_SIZE
        )
        if any(row.group in ("x87", "mmx", "sse") for row in rows):
            fx = fpu_state(rng, mmx=any(row.group == "mmx" for row in rows))
        else:
            fx = DEFAULT_FX if chance(rng, 80) else fpu_state(rng, mmx=False)
        for reg in range(8):
            draft.choose(reg)
        draft.rows = rows
        draft.finish(REACH)
        pages = draft.pages(HLT_PAGE, second_code_page=crosses and chance(rng, 80))
        return Case(
            eip=draft.eip - base_of(draft.first_selectors[CS]) & MASK,
            regs=tuple(value or 0 for value in draft.initial),
            eflags=draft.eflags,
            fx=fx,
            pages=pages,
            code_length=len(draft.code),
            selectors=draft.first_selectors,
            cpl=0
            if chance(rng, 30)
            and draft.first_selectors == FLAT
            and not draft.eflags & AC
            and not draft.wild
            and all(same_at_cpl0(row) for row in rows)
            else 3,
            rows=tuple(f"{row.key} {row.mnemonic}" for row in rows),
            group=group,
            blind=Blind(
                undefined,
                tuple(draft.blind_memory),
                tuple(draft.blind_on_fault),
                draft.blind_registers_on_fault,
                draft.fault_page_only,
            ),
        )

    def _one(self, draft: Draft, row: Row) -> Case:
        instance = write(row, draft)
        return self._finish(draft, [row], group_of(row), instance.undefined)

    def _sequence(self, draft: Draft) -> Case:
        rng = draft.rng
        rows: list[Row] = []
        undefined = 0
        source = TESTED_ROWS if chance(rng, 40) else SEQUENCE_ROWS
        for _ in range(rng.randint(2, MAX_INSTRUCTIONS)):
            row = rng.choice(source)
            instance = write(row, draft)
            rows.append(row)
            undefined |= instance.undefined
            if row.mnemonic in X87_POINTERS:
                break  # nothing may read what it has stored
            if instance.undefined and row.action != "copy":  # the next instruction might depend on them
                write(ADD_AL, draft)
                rows.append(ADD_AL)
        return self._finish(draft, rows, SEQUENCE, undefined)

    def _self_modifying(self, draft: Draft) -> Case:
        """A store to an instruction ahead, or to one that has already run and runs again."""
        rng = draft.rng
        draft.code_writable = chance(rng, 95)
        rows: list[Row] = []
        undefined = 0
        shape = rng.randrange(3)
        if shape == 0:  # ahead
            gap = bytes((0x42,)) * rng.randrange(4)  # inc edx
            lengths = {1: 7, 2: 9, 4: 10}
            width = rng.choice((1, 2, 4))
            victim = draft.here + lengths[width] + len(gap)
            draft.emit(_store(rng, victim, width))
            draft.emit(gap + b"\xb8" + rng.randbytes(4))
        elif shape == 1:  # behind, in a loop
            draft.settle(ECX, rng.randint(1, 4))
            victim = draft.here
            draft.emit(b"\xb8" + rng.randbytes(4))
            for _ in range(rng.randrange(2)):
                row = rng.choice(PLAIN)
                undefined |= write(row, draft).undefined
                rows.append(row)
            draft.emit(_store(rng, victim, rng.choice((1, 2, 4))))
            distance = victim - (draft.here + 2)
            if distance >= -128 and draft.known[ECX] is not None:
                draft.emit(b"\xe2" + distance.to_bytes(1, "little", signed=True))
        else:  # REP STOSB over what follows, then that
            draft.eflags &= ~DF
            count = rng.randint(1, 8)
            draft.settle(ECX, count)
            draft.settle(EAX, rng.choice((0x90, 0x40, 0x4B, HLT)))
            draft.settle(EDI, draft.here + 2 + rng.randrange(4))
            draft.emit(b"\xf3\xaa")
            draft.emit(bytes((0x42,)) * rng.randint(2, 14))
        return self._finish(draft, rows, SELF_MODIFYING, undefined)

    def _illegal(self, draft: Draft) -> Case:
        rng = draft.rng
        kind = rng.randrange(3)
        if kind == 0:
            draft.emit(bytes.fromhex(rng.choice(NO_INSTRUCTION)))
        elif kind == 1:
            draft.emit(bytes.fromhex(rng.choice(TOO_LONG)))
        else:
            draft.emit(_register_form(rng) or bytes.fromhex(NO_INSTRUCTION[0]))
        return self._finish(draft, [], ILLEGAL, 0)


def _store(rng: Random, victim: int, width: int) -> bytes:
    """A MOV to, or arithmetic on, the `mov eax,imm32` at victim; any result of it is an instruction again."""
    if width == 1 and rng.getrandbits(1):
        value = rng.choice(
            (0xB9, 0xBA, 0xBB, 0xBE, 0xA9, 0x3D, 0x05, HLT, 0xB8)
        )  # also takes imm32, or ends it
        return b"\xc6\x05" + victim.to_bytes(4, "little") + bytes((value,))
    operand = (victim + 1 + rng.randrange(5 - width)).to_bytes(4, "little")
    opcode = (
        rng.choice((b"\xc7\x05", b"\x81\x05", b"\x81\x35"))
        if width > 1
        else rng.choice((b"\xc6\x05", b"\x80\x05"))
    )
    return (
        (b"\x66" if width == 2 else b"")
        + opcode
        + operand
        + integer(rng, 8 * width).to_bytes(width, "little")
    )


def _register_form(rng: Random) -> bytes | None:
    """The register form of an instruction that has only a memory form, and the other way round."""
    row = rng.choice(all_rows())
    if not row.mod or (row.map, row.opcode) in HOST_HAS_MORE or row.rm is not None:
        return None
    modrm = (row.ext if row.ext is not None else rng.randrange(8)) << 3 | rng.choice((0, 1, 2, 3, 6, 7))
    if row.mod == "m":
        modrm |= 0xC0
    prefix = bytes((row.prefix,)) if row.prefix else b""
    code = prefix + (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map] + bytes((row.opcode, modrm))
    try:
        decode(code + bytes(16))
    except Undefined:
        return code + bytes(3)
    return None
