"""From a host address inside translated code to a guest instruction boundary.

A fault or a signal can stop the guest between any two host instructions. Templates are made so that it is
either as if the guest instruction had not begun (restart it), or done but for a jump. What a shape needs
beyond that is listed here and nowhere else.
"""

from __future__ import annotations

from bisect import bisect_right

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.cache import CodeCache
from cpu_node.decode import TooLong, Undefined, decode
from cpu_node.emit import CUT_EDI, CUT_ESI, sti_has_ecx_in_r9
from cpu_node.emit_soft import SoftCode, SoftFunction
from cpu_node.encode import EBP_FROM_R8, MOV_R8, POPPED, PUSHED
from cpu_node.line import Line
from cpu_node.rdtsc import SAVED_FROM
from cpu_node.record_unsafe import Record
from cpu_node.translate import CHECK_SAVED_FROM, check_source

EAX, ECX, EDX, ESP, EBP, ESI, EDI = 0, 1, 2, 4, 5, 6, 7
_JUMP_SLOT = b"\x41\xff\x67"  # jmp [r15+slot]: r8d is the guest address
_JUMP_TABLE = b"\x43\xff\x24\xc6"


def roll_back(record: Record, cache: CodeCache, rip: int) -> tuple[Line | None, int]:
    """(line, linear address) of the boundary; line None where the instruction is not known yet.

    Puts registers right that a half-done instruction holds elsewhere.
    """
    regs, q = record.regs, record.q
    q[at.REGS // 8 + ESI] &= 0xFFFFFFFF  # string templates add the window to them
    q[at.REGS // 8 + EDI] &= 0xFFFFFFFF
    code = cache.code
    offset = rip - at.CODE
    while True:
        chunk = cache.find(offset)
        line = chunk.line
        index = bisect_right(chunk.hosts, offset - chunk.start) - 1
        guest = chunk.offsets[index]
        va = line.va + guest & 0xFFFFFFFF
        delta = offset - chunk.start - chunk.hosts[index]
        if delta == 0:
            return line, va
        here = bytes(code[offset : offset + 10])
        if here[:4] in (PUSHED, POPPED):  # what ESP makes room for, or is past, is in place: go forward
            regs[ESP] = regs[ESP] + (4 if here[:4] == POPPED else -4) & 0xFFFFFFFF
            offset += 4
            continue
        if here[0] == 0xE9:  # the jump that ends an instruction or a chunk
            offset += 5 + int.from_bytes(here[1:5], "little", signed=True)
            continue
        if here[:4] == _JUMP_TABLE or here[:3] == _JUMP_SLOT:
            return None, record.scratch(8) & 0xFFFFFFFF
        if here[:2] == MOV_R8 and (here[6:10] == _JUMP_TABLE or here[6:9] == _JUMP_SLOT):
            return None, int.from_bytes(here[2:6], "little")
        break
    soft = bool(line.mode & modes.SOFT)
    saved_from, saved_in = (CHECK_SAVED_FROM, 12) if soft else (3, 9)  # in a check of the source
    try:
        insn = decode(line.code, guest)
    except (Undefined, TooLong):  # nothing but the verification of its bytes can fault
        if delta >= saved_from:
            regs[ECX] = record.scratch(saved_in) & 0xFFFFFFFF
        return line, va
    if line.verify:
        check = len(check_source(line, guest, min(insn.length, line.size - guest)))
        if saved_from <= delta < check:
            regs[ECX] = record.scratch(saved_in) & 0xFFFFFFFF
        delta -= check
        if delta <= 0:
            return line, va
    following = va + insn.length & 0xFFFFFFFF
    if soft:
        template = cache.function_of(line, guest)
        if isinstance(template, SoftCode | SoftFunction) and delta >= template.saved_from:
            regs[ECX] = record.scratch(12) & 0xFFFFFFFF
            if delta == template.done_at:
                return None, following
    if q[at.REGS // 8 + ESP] >= 1 << 32:  # PUSHF and POPF are on the host's stack
        regs[ESP] = record.scratch(10) & 0xFFFFFFFF
    match insn.row.action:
        case "rdtsc" if line.mode & modes.TSC_OFFSET and delta >= SAVED_FROM:
            regs[EAX], regs[EDX] = record.scratch(10) & 0xFFFFFFFF, record.scratch(11) & 0xFFFFFFFF
        case "sti" if sti_has_ecx_in_r9(delta):
            regs[ECX] = record.scratch(9) & 0xFFFFFFFF
        case "popf" if here[0] == 0xEB:
            regs[ESP] = regs[ESP] + 4 & 0xFFFFFFFF  # the flags are in place already
            return None, following
        case "leave" if here[:3] == EBP_FROM_R8:  # ESP has left the frame that holds EBP
            regs[EBP] = record.scratch(8) & 0xFFFFFFFF
            return None, following
        case "string" if here[:2] in (CUT_ESI, CUT_EDI):
            return None, following
        case "loop" if delta == 3:
            return None, following  # counted, not taken
    return line, va
