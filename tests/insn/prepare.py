"""What each kind of instruction needs around it to do something: pointers, counts, stack contents, dividends.

Source: Intel SDM volume 2, instruction pages.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

from tests.insn.draft import CODE, DATA, HIGH, MASK
from tests.insn.instance import PREFIX_66, REP, REPNE, Instance
from tests.insn.prepare_far import PREPARE_KEY
from tests.insn.segments import CS, DS, ES
from tests.insn.state import DF, EAX, EBP, EBX, ECX, EDI, EDX, ESI, ESP, OF
from tests.insn.values import chance, integer


def _stack_target(instance: Instance) -> None:
    """RET: a return address on the stack, most of the time."""
    draft = instance.draft
    esp = draft.settle(ESP)
    if esp is not None and chance(instance.rng, 90) and draft.peek(draft.stack_va(esp), 4) is not None:
        number = len(draft.starts) + 1 + instance.rng.randrange(2)
        draft.absolute.append((draft.stack_va(esp), number, draft.base(CS)))
    if instance.row.operands:
        instance.immediates = instance.rng.choice((0, 4, 8, 3, 0x100, 0xFFFF)).to_bytes(2, "little")
    draft.spoil(ESP)


def _push(instance: Instance) -> None:
    draft = instance.draft
    draft.settle(ESP)
    instance.take_registers()
    instance.take_immediates()
    instance.touched.clear()
    draft_move = -instance.operand_size
    instance.after.append(lambda: draft.move(ESP, draft_move))


def _pop(instance: Instance) -> None:
    draft = instance.draft
    draft.settle(ESP)
    instance.take_registers()
    if instance.row.action == "popm":
        instance.esp_offset = instance.operand_size  # the address is computed with ESP already raised [POP]
    if instance.row.action == "popf":
        _flags_on_stack(instance)
    instance.after.append(lambda: draft.move(ESP, instance.operand_size))


def _flags_on_stack(instance: Instance) -> None:
    esp = instance.draft.settle(ESP)
    if esp is not None and chance(instance.rng, 90):
        value = instance.rng.getrandbits(16) & (0xFFFF if chance(instance.rng, 20) else ~0x4100)
        instance.draft.keep(
            instance.draft.stack_va(esp),
            (value | instance.rng.choice((0, 0, 0, 0x200000)) & MASK).to_bytes(4, "little"),
        )


def _pusha(instance: Instance) -> None:
    for reg in range(8):
        instance.draft.choose(reg)
    if instance.row.action == "popa":
        instance.touched = [r for r in range(8) if r != ESP]
        instance.draft.blind_registers_on_fault = tuple(instance.touched)
        instance.draft.fault_page_only = True
    else:
        esp = instance.draft.known[ESP]
        if esp is not None:
            va = instance.draft.stack_va(esp)
            instance.draft.blind_on_fault.append((va - 8 * instance.operand_size, 8 * instance.operand_size))
    distance = 8 * instance.operand_size * (1 if instance.row.action == "popa" else -1)
    instance.after.append(lambda: instance.draft.move(ESP, distance))


def _leave(instance: Instance) -> None:
    draft, rng = instance.draft, instance.rng
    if draft.is_free(EBP) and chance(rng, 85):
        draft.settle(EBP, draft.stack_pointer())
    draft.settle(ESP)
    instance.touched = [EBP, ESP]


def _enter(instance: Instance) -> None:
    _leave(instance)
    size = instance.rng.choice((0, 4, 8, 16, 0x20, 0x1000, integer(instance.rng, 16)))
    level = instance.rng.choice((0, 0, 0, 1, 2, 3, 31, 32, integer(instance.rng, 8)))
    esp = instance.draft.known[ESP]
    if esp is not None:
        va = instance.draft.stack_va(esp)
        instance.draft.blind_on_fault.append((va - 4 * MAX_LEVEL, 4 * MAX_LEVEL))
    instance.immediates = struct.pack("<HB", size, level)


MAX_LEVEL = 32  # frame pointers that ENTER pushes, its own included


def _string(instance: Instance) -> None:
    """MOVS, CMPS, STOS, LODS, SCAS: pointers near each other, near page ends, long and short counts."""
    draft, row = instance.draft, instance.row
    name, size = row.mnemonic[:4], 1 if row.mnemonic.endswith("b") else instance.operand_size
    if chance(instance.rng, 60):
        instance.rep = instance.rng.choice((REP, REP, REPNE))
    used = [ECX] if instance.rep else []
    used += [ESI] if name in ("movs", "cmps", "lods") else []
    used += [EDI] if name in ("movs", "cmps", "stos", "scas") else []
    used += [EAX] if name in ("stos", "scas", "lods") else []
    free = [reg for reg in used if draft.is_free(reg)]
    backwards, addr16 = bool(draft.eflags & DF), instance.addr16
    source_base = draft.base(DS if instance.override is None else instance.override)
    target_base = draft.base(ES)

    def values(rng: Random) -> tuple[dict[int, int], list[tuple[int, bytes]]]:
        count = _count(rng)
        source, target = _pointers(rng, count, size, backwards, only_data=draft.addr16)
        value, pokes = integer(rng), []
        if chance(rng, 70):
            pattern = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little") * (min(count, 300) + 1)
            pokes = [(va - len(pattern) + size if backwards else va, pattern) for va in (source, target)]
        if chance(rng, 50):  # a difference ends CMPS and SCAS
            pokes.append((rng.choice((source, target)) + rng.randint(-40, 40), bytes((rng.getrandbits(8),))))
        values = {ECX: count, ESI: source - source_base & MASK, EDI: target - target_base & MASK, EAX: value}
        if addr16:
            for reg in (ECX, ESI, EDI):
                values[reg] = rng.getrandbits(16) << 16 | values[reg] & 0xFFFF
        return values, pokes

    first, pokes = values(instance.rng)
    for va, data in pokes:
        draft.poke(va, data)
    for reg in used:
        draft.settle(reg, first[reg])

    def again(rng: Random) -> list[tuple[int, bytes]]:
        chosen, pokes = values(rng)
        draft.varied.update((reg, chosen[reg]) for reg in free)
        return pokes

    draft.contents.append(again)
    instance.touched += used


def _count(rng: Random) -> int:
    """Seldom above 1024, after which the simulator looks for interrupts: such long ones are slow there."""
    kind = rng.randrange(32)
    if kind < 16:
        return kind // 4
    if kind == 31:
        return rng.randint(0x400, 0x1000)
    return integer(rng) if kind >= 27 else rng.randint(0, 20 if kind < 24 else 300)


def _pointers(rng: Random, count: int, size: int, backwards: bool, only_data: bool) -> tuple[int, int]:
    span = min(count, 512) * size
    pointers = []
    for _ in range(2):
        kind = rng.randrange(100)
        base = DATA + rng.randrange(0x2000) if kind < 60 or only_data else HIGH + rng.randrange(0x1000)
        if kind >= 85:
            if only_data:
                edge = DATA if backwards else DATA + 0x2000
            elif backwards:
                edge = rng.choice((DATA, HIGH, DATA + 0x1000))
            else:
                edge = rng.choice((DATA + 0x2000, HIGH + 0x1000))
            base = edge + rng.randint(-span, span) if span else edge
        pointers.append(base & -4 if chance(rng, 50) else base)
    source, target = pointers
    return source, source + rng.randint(-8, 8) if chance(rng, 20) else target


def _division(instance: Instance) -> None:
    draft, rng = instance.draft, instance.rng
    if chance(rng, 70):
        draft.choose(EDX, lambda r: r.choice((0, 0, r.getrandbits(3), MASK, integer(r))))
        if instance.is_byte():
            draft.choose(EAX, lambda r: integer(r, 16))
    _accumulators(instance)


def _accumulators(instance: Instance) -> None:
    instance.draft.choose(EAX)
    instance.draft.choose(EDX)
    instance.take_registers()
    instance.touched += [EAX, EDX]


def _compare_exchange(instance: Instance) -> None:
    """CMPXCHG, CMPXCHG8B: equal half of the time."""
    draft, rng = instance.draft, instance.rng
    instance.choose_address()
    registers = (EAX, EDX, ECX, EBX) if instance.row.mnemonic == "cmpxchg8b" else (EAX,)
    for reg in registers:
        draft.settle(reg)
    if instance.va is not None and rng.getrandbits(1):
        known = [draft.known[r] for r in registers[:2]]
        draft.poke(instance.va, b"".join((v or 0).to_bytes(4, "little") for v in known))
    instance.take_registers()
    instance.touched += [EAX, EDX]


def _bit_string(instance: Instance) -> None:
    """BT with a bit number in a register reaches beyond the operand."""
    draft, rng = instance.draft, instance.rng
    number = rng.choice((rng.getrandbits(5), rng.randint(-300, 300), integer(rng)))
    value = draft.settle(instance.reg_field, number)
    if instance.memory and not instance.addr16 and value is not None:
        bits = 8 * instance.operand_size
        signed = value - (value >> 31 << 32)
        if instance.size16:
            signed = (value & 0xFFFF) - (value >> 15 << 16 & 0x10000)
        instance.va = draft.target(instance.operand_size) - (signed // bits) * instance.operand_size & MASK
    instance.take_registers()


def _translate(instance: Instance) -> None:
    draft = instance.draft
    eax = draft.settle(EAX)
    if draft.is_free(EBX):
        segment = DS if instance.override is None else instance.override
        offset = draft.offset(segment, draft.target(1)) - ((eax or 0) & 0xFF)
        if instance.addr16:
            offset = instance.rng.getrandbits(16) << 16 | instance.rng.randrange(0x2000)
        draft.settle(EBX, offset)
    instance.touched.append(EAX)


def _mask_move(instance: Instance) -> None:
    draft = instance.draft
    va = draft.target(16 if instance.row.prefix == PREFIX_66 else 8)
    draft.settle(EDI, draft.offset(DS if instance.override is None else instance.override, va))


def _compare_strings(instance: Instance) -> None:
    for reg in (EAX, EDX):
        instance.draft.choose(reg, lambda r: r.choice((r.randint(-20, 20), integer(r))))
    instance.take_immediates()
    instance.touched.append(ECX)
    instance.draft.choose(ECX)


def _shift(instance: Instance) -> None:
    """Counts, and with the count known which flags are really undefined [SAL and RCL pages]."""
    rng, operands = instance.rng, instance.row.operands
    count = 1
    if "CL" in operands:
        value = instance.draft.settle(ECX, rng.choice((rng.randrange(34), integer(rng))))
        count = (value or 0) & 31 if value is not None else 2
    elif "Ib" in operands:
        immediate = rng.choice((rng.randrange(34), integer(rng, 8)))
        instance.immediates = bytes((immediate,))
        count = immediate & 31
    if count == 0:
        instance.undefined = 0
    elif count == 1:
        instance.undefined &= ~OF
    instance.take_registers()


def _branch(instance: Instance) -> None:
    """Forward to a later instruction or the HLTs; rarely somewhere else; LOOP at times backward."""
    draft, rng, row = instance.draft, instance.rng, instance.row
    if row.action == "loop":
        draft.choose(ECX, lambda r: r.choice((0, 1, 2, 0x10000, 0x20001, r.randrange(8), integer(r))))
        instance.touched.append(ECX)
    if row.action == "call":
        draft.settle(ESP)
        instance.after.append(lambda: draft.spoil(ESP))
    size = 1 if row.operands[0] == "Jb" else instance.operand_size
    instance.immediates = bytes(size)
    if chance(rng, 94):
        number = len(draft.starts) + 1 + rng.randrange(3)
        instance.after.append(lambda: draft.relative.append((len(draft.code) - size, size, number)))
    else:
        draft.wild = True
        if size == 1:
            distance = rng.choice((rng.randrange(0x50, 0x80), -rng.randrange(0x68, 0x80)))
        else:
            distance = integer(rng, 8 * size)
            distance += 0x1000 if abs(distance) < 0x80 or 256**size - distance < 0x80 else 0
        instance.immediates = (distance & 256**size - 1).to_bytes(size, "little")


def _indirect_branch(instance: Instance) -> None:
    draft, rng = instance.draft, instance.rng
    if instance.row.action == "icall":
        draft.settle(ESP)
        instance.after.append(lambda: draft.spoil(ESP))
    number = len(draft.starts) + 1 + rng.randrange(2)
    instance.choose_address()
    if instance.va is not None and chance(rng, 95):
        draft.absolute.append((instance.va, number, draft.base(CS)))
    elif not instance.memory:
        # a register: the HLT filling far enough behind the code, or anywhere
        behind = draft.here + 0x80 + rng.randrange(64) if draft.eip < DATA else CODE + 0x800
        draft.settle(instance.rm_field, draft.offset(CS, behind) if chance(rng, 85) else integer(rng))


def _ascii_adjust(instance: Instance) -> None:
    instance.immediates = bytes((instance.rng.choice((10, 10, 0, 16, integer(instance.rng, 8))),))
    instance.draft.choose(EAX)
    instance.touched.append(EAX)


def _accumulator(instance: Instance) -> None:
    instance.draft.choose(EAX)
    instance.draft.choose(EDX)
    instance.touched += [EAX, EDX] if instance.row.mnemonic == "cdq" else [EAX]


def _mov_immediate(instance: Instance) -> None:
    instance.take_registers()
    instance.take_immediates()


def _plain(instance: Instance) -> None:
    instance.take_immediates()
    if instance.memory and chance(instance.rng, 50):
        instance.choose_address()
    instance.take_registers()


PREPARE_ACTION: dict[str, Callable[[Instance], None]] = {
    "ret": _stack_target, "push": _push, "pushimm": _push, "pushm": _push, "pushf": _push, "pushseg": _push,
    "pop": _pop, "popm": _pop, "popf": _pop, "pusha": _pusha, "popa": _pusha, "leave": _leave,
    "string": _string,
    "bitstring": _bit_string, "xlat": _translate, "maskmov": _mask_move, "jcc": _branch, "jmp": _branch,
    "call": _branch, "loop": _branch, "icall": _indirect_branch, "ijmp": _indirect_branch,
}  # fmt: skip
PREPARE_MNEMONIC: dict[str, Callable[[Instance], None]] = {
    "enter": _enter, "div": _division, "idiv": _division, "mul": _accumulators, "cmpxchg": _compare_exchange,
    "cmpxchg8b": _compare_exchange, "pcmpestri": _compare_strings, "pcmpestrm": _compare_strings,
    "pcmpistri": _compare_strings, "pcmpistrm": _compare_strings, "aam": _ascii_adjust, "aad": _ascii_adjust,
    **dict.fromkeys(("rol", "ror", "rcl", "rcr", "shl", "shr", "sar", "shld", "shrd"), _shift),
    **dict.fromkeys(("daa", "das", "aaa", "aas", "salc", "sahf", "lahf", "cwde", "cdq"), _accumulator),
}  # fmt: skip


def prepare(instance: Instance) -> None:
    row = instance.row
    function = (
        PREPARE_KEY.get(row.key) or PREPARE_ACTION.get(row.action) or PREPARE_MNEMONIC.get(row.mnemonic)
    )
    if function is None and row.mnemonic == "imul" and row.ext is not None:
        function = _accumulators
    (function or _plain)(instance)
