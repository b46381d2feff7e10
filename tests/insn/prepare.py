"""What each kind of instruction needs around it to do something: pointers, counts, stack contents, dividends.

Source: Intel SDM volume 2, instruction pages.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.insn.draft import CODE, DATA, HIGH, MASK, RW_PAGES
from tests.insn.instance import PREFIX_66, REP, REPNE, Instance
from tests.insn.segments import (
    ANY_SELECTORS,
    CODE_SELECTORS,
    CS,
    DS,
    ES,
    FS,
    GS,
    SS,
    WRITABLE_SELECTORS,
    base_of,
)  # fmt: skip
from tests.insn.state import DF, EAX, EBP, EBX, ECX, EDI, EDX, ESI, ESP, OF, PAGE_SIZE, TF
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
        instance.draft.poke(
            instance.draft.stack_va(esp),
            (value | instance.rng.choice((0, 0, 0, 0x200000)) & MASK).to_bytes(4, "little"),
        )


def _pusha(instance: Instance) -> None:
    for reg in range(8):
        instance.draft.settle(reg)
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
    draft, rng, row = instance.draft, instance.rng, instance.row
    name, size = row.mnemonic[:4], 1 if row.mnemonic.endswith("b") else instance.operand_size
    if chance(rng, 60):
        instance.rep = rng.choice((REP, REP, REPNE))
    count = rng.choice(
        (0, 1, 2, 3, rng.randint(0, 20), rng.randint(0, 300), rng.randint(0x400, 0x2000), integer(rng))
    )
    if instance.rep:
        draft.settle(ECX, count)
        instance.touched.append(ECX)
    span = min(count, 512) * size
    backwards = bool(draft.eflags & DF)
    pointers = []
    for _ in range(2):
        kind = rng.randrange(100)
        base = DATA + rng.randrange(0x2000) if kind < 60 else HIGH + rng.randrange(0x1000)
        if kind >= 85:
            edge = (
                rng.choice((DATA, HIGH, DATA + 0x1000))
                if backwards
                else rng.choice((DATA + 0x2000, HIGH + 0x1000))
            )
            base = edge + rng.randint(-span, span) if span else edge
        if chance(rng, 50):
            base &= -4
        pointers.append(base)
    source, destination = pointers
    if chance(rng, 20):
        destination = source + rng.randint(-8, 8)
    value = integer(rng)
    if chance(rng, 70):
        pattern = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little") * (min(count, 300) + 1)
        for va in pointers:
            draft.poke(va - len(pattern) + size if backwards else va, pattern)
    if name in ("movs", "cmps", "lods"):
        draft.settle(ESI, draft.offset(DS if instance.override is None else instance.override, source))
        instance.touched.append(ESI)
    if name in ("movs", "cmps", "stos", "scas"):
        draft.settle(EDI, draft.offset(ES, destination))
        instance.touched.append(EDI)
    if name in ("stos", "scas", "lods"):
        draft.settle(EAX, value)
        instance.touched.append(EAX)


def _division(instance: Instance) -> None:
    draft, rng = instance.draft, instance.rng
    if chance(rng, 70):
        high = rng.choice((0, 0, rng.getrandbits(3), MASK, integer(rng)))
        draft.settle(EDX, high)
        if instance.is_byte():
            draft.settle(EAX, integer(rng, 16))
    _accumulators(instance)


def _accumulators(instance: Instance) -> None:
    instance.draft.settle(EAX)
    instance.draft.settle(EDX)
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
        va = draft.target(1) - ((eax or 0) & 0xFF)
        draft.settle(EBX, draft.offset(DS if instance.override is None else instance.override, va))
    instance.touched.append(EAX)


def _mask_move(instance: Instance) -> None:
    draft = instance.draft
    va = draft.target(16 if instance.row.prefix == PREFIX_66 else 8)
    draft.settle(EDI, draft.offset(DS if instance.override is None else instance.override, va))


def _compare_strings(instance: Instance) -> None:
    for reg in (EAX, EDX):
        instance.draft.settle(
            reg, instance.rng.choice((instance.rng.randint(-20, 20), integer(instance.rng)))
        )
    instance.take_immediates()
    instance.touched.append(ECX)
    instance.draft.settle(ECX)


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
        draft.settle(ECX, rng.choice((0, 1, 2, rng.randrange(8), integer(rng))))
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
    instance.draft.settle(EAX)
    instance.touched.append(EAX)


def _accumulator(instance: Instance) -> None:
    instance.draft.settle(EAX)
    instance.draft.settle(EDX)
    instance.touched += [EAX, EDX] if instance.row.mnemonic == "cdq" else [EAX]


def _mov_immediate(instance: Instance) -> None:
    instance.take_registers()
    instance.take_immediates()


def _plain(instance: Instance) -> None:
    instance.take_immediates()
    if instance.memory and chance(instance.rng, 50):
        instance.choose_address()
    instance.take_registers()


SEGMENT_NUMBER = {"ES": ES, "SS": SS, "DS": DS, "FS": FS, "GS": GS}
POINTER_LOADS = {"les": ES, "lds": DS, "lss": SS, "lfs": FS, "lgs": GS}


def _selector(instance: Instance) -> int:
    return instance.rng.choice(WRITABLE_SELECTORS if chance(instance.rng, 60) else ANY_SELECTORS)


def _code_selector(instance: Instance) -> int:
    return instance.rng.choice(CODE_SELECTORS if chance(instance.rng, 85) else ANY_SELECTORS)


def _loads(instance: Instance, segment: int, selector: int | None) -> None:
    """Afterwards the segment register holds the selector (None: what it was made of isn't known)."""
    draft = instance.draft

    def change() -> None:
        draft.selectors[segment] = draft.selectors[segment] if selector is None else selector

    instance.after.append(change)


def _move_to_segment(instance: Instance) -> None:
    instance.reg_field = instance.rng.choice((ES, SS, DS, FS, GS)) if chance(instance.rng, 95) else CS
    selector: int | None = _selector(instance)
    instance.choose_address()
    if not instance.memory:
        selector = instance.draft.settle(instance.rm_field, selector)
    elif instance.va is not None:
        assert selector is not None
        instance.late.append((instance.va, selector.to_bytes(2, "little")))
    _loads(instance, instance.reg_field, None if selector is None else selector & 0xFFFF)


def _pop_segment(instance: Instance) -> None:
    draft, selector = instance.draft, _selector(instance)
    esp = draft.settle(ESP)
    if esp is not None:
        draft.poke(draft.stack_va(esp), selector.to_bytes(2, "little"))
    instance.after.append(lambda: draft.move(ESP, instance.operand_size))
    _loads(instance, SEGMENT_NUMBER[instance.row.operands[0]], selector if esp is not None else None)


def _load_pointer(instance: Instance) -> None:
    selector = _selector(instance)
    instance.choose_address()
    if instance.va is not None:
        instance.late.append((instance.va + instance.operand_size, selector.to_bytes(2, "little")))
    instance.take_registers()
    _loads(instance, POINTER_LOADS[instance.row.mnemonic], selector)


def _ask_about_selector(instance: Instance) -> None:
    """LAR, LSL, VERR, VERW."""
    selector = instance.rng.choice(ANY_SELECTORS)
    instance.choose_address()
    if instance.memory:
        if instance.va is not None:
            instance.late.append((instance.va, selector.to_bytes(2, "little")))
    else:
        instance.draft.settle(instance.rm_field, selector)
    instance.take_registers()


def _far_call_frame(instance: Instance) -> None:
    """The return address may be on the stack although the target is no good."""
    draft = instance.draft
    esp = draft.settle(ESP)
    if esp is not None:
        size = 2 * instance.operand_size
        draft.blind_on_fault.append((draft.stack_va(esp) - size, size))
    else:
        draft.blind_on_fault += [(page, PAGE_SIZE) for page in RW_PAGES]
    instance.after.append(lambda: draft.spoil(ESP))


def _far_direct(instance: Instance) -> None:
    """JMP and CALL ptr16:32."""
    draft, selector = instance.draft, _code_selector(instance)
    if instance.row.mnemonic == "call":
        _far_call_frame(instance)
    size = instance.operand_size
    instance.immediates = bytes(size) + selector.to_bytes(2, "little")
    number = len(draft.starts) + 1 + instance.rng.randrange(2)
    if size == 4:
        instance.after.append(lambda: draft.far.append((len(draft.code) - 6, number, base_of(selector))))
    _loads(instance, CS, selector)


def _far_indirect(instance: Instance) -> None:
    """JMP and CALL m16:32."""
    draft, selector = instance.draft, _code_selector(instance)
    if instance.row.mnemonic == "call":
        _far_call_frame(instance)
    instance.choose_address()
    if instance.va is not None:
        number = len(draft.starts) + 1 + instance.rng.randrange(2)
        draft.absolute.append((instance.va, number, base_of(selector)))
        instance.late.append((instance.va + instance.operand_size, selector.to_bytes(2, "little")))
    _loads(instance, CS, selector)


def _far_return(instance: Instance) -> None:
    """RETF and IRET: EIP, CS and for IRET the flags on the stack."""
    draft, selector, size = instance.draft, _code_selector(instance), instance.operand_size
    draft.fault_page_only = True
    esp = draft.settle(ESP)
    if esp is not None:
        va = draft.stack_va(esp)
        number = len(draft.starts) + 1 + instance.rng.randrange(2)
        draft.absolute.append((va, number, base_of(selector)))
        instance.late.append((va + size, selector.to_bytes(2, "little")))
        if instance.row.mnemonic == "iret":
            flags = instance.rng.getrandbits(12) & ~TF
            instance.late.append((va + 2 * size, flags.to_bytes(4, "little")[:size]))
    if instance.row.operands:
        instance.immediates = instance.rng.choice((0, 4, 8, 3, 0x100, 0xFFFF)).to_bytes(2, "little")
    draft.spoil(ESP)
    _loads(instance, CS, selector)


PREPARE_KEY: dict[str, Callable[[Instance], None]] = {
    "8E": _move_to_segment, "9A": _far_direct, "EA": _far_direct,
    "FF/3m": _far_indirect, "FF/5m": _far_indirect,
    **dict.fromkeys(("07", "17", "1F", "0FA1", "0FA9"), _pop_segment),
    **dict.fromkeys(("C4m", "C5m", "0FB2m", "0FB4m", "0FB5m"), _load_pointer),
    **dict.fromkeys(("0F02", "0F03", "0F00/4", "0F00/5"), _ask_about_selector),
    **dict.fromkeys(("CA", "CB", "CF"), _far_return),
}  # fmt: skip
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
