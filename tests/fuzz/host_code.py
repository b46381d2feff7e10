"""What host code may touch: a check of a translation's bytes, without running them.

Every memory operand of translated code must be one of

- the guest's: GS and a 32-bit address (prefixes 65 67), which stays in the window whatever registers hold, or
  GS and r8 right behind the LEA that made it 32 bits wide;
- the state record: [r15 + constant], or the segment base that a pointer there leads to: [r9];
- the dispatch table: [r14 + r8*8], r8 the zero-extended target of a jump;
- RSI and RDI of a string instruction, behind the LEA that adds the window's address (r13) to 32 bits;
- the host's stack, between a load of RSP from the record and its return.

and every direct jump must lead to an instruction of this translation or to where one is patched in.
Code in mode.SOFT has rules of its own: soft_code.py.
Left out: what the host code computes (tests/insn), and code outside of translations (the stubs).
"""

from __future__ import annotations

from collections.abc import Iterator

import capstone
from capstone import x86

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.line import Line
from cpu_node.translate import Translation
from tests.fuzz import soft_code
from tests.fuzz.disassembly import instructions

STRINGS = frozenset(
    name + size for name in ("movs", "cmps", "stos", "lods", "scas") for size in "bwdq"
)  # fmt: skip
BIT_TESTS = frozenset(("bt", "bts", "btr", "btc"))
LOAD_RSP = "rsp, qword ptr [r15]"
assert at.HOST_RSP == 0
GS_PREFIX, ADDRESS_32 = 0x65, 0x67


def stray(made: Translation, line: Line) -> list[str]:
    """The host instructions that could reach memory or code they shouldn't; empty when all is well."""
    if line.mode & modes.SOFT:
        return soft_code.stray(made, line)
    start = made.chunk.start
    starts = set()
    jumps: list[tuple[int, int, str]] = []
    out = []
    added: set[str] = set()  # registers that a LEA has just made window addresses
    on_host_stack = False
    end, before = start, ""
    for insn in instructions(made.code, at.CODE + start):
        offset = insn.address - at.CODE
        starts.add(offset)
        end = offset + insn.size
        text = f"{offset:#x}: {insn.bytes.hex(' ')}  {insn.mnemonic} {insn.op_str}"
        name = insn.mnemonic.split()[-1]
        narrow, before = before.startswith("lea r8d, "), f"{insn.mnemonic} {insn.op_str}"
        if insn.mnemonic == "lea":
            if insn.op_str in ("rsi, [rsi + r13]", "rdi, [rdi + r13]"):
                added.add(insn.op_str[:3])
            continue
        if name == "mov" and insn.op_str == LOAD_RSP:
            on_host_stack = True
        elif name == "mov" and insn.op_str == "rsp, r10":
            on_host_stack = False
        elif name in ("push", "pop", "pushfq", "popfq"):
            if not on_host_stack:
                out.append(f"{text}: the guest's stack")
        elif name in STRINGS and insn.bytes[0] != GS_PREFIX and not _is_vector(insn):
            needed = {"rsi"} if "si" in insn.op_str else set()
            needed |= {"rdi"} if "di" in insn.op_str else set()
            if not needed <= added:
                out.append(f"{text}: not in the window")
            added.clear()
        elif name == "ret" or name.startswith(("syscall", "sysenter", "int", "call", "hlt", "iret", "retf")):
            out.append(f"{text}: must not be here")
        elif insn.group(x86.X86_GRP_JUMP) and insn.operands[0].type == x86.X86_OP_IMM:
            jumps.append((offset, insn.operands[0].imm - at.CODE, text))
        else:
            out += [f"{text}: {why}" for why in _operands(insn, narrow)]
    if end != made.chunk.end:
        out.append(f"{end:#x}: no host instruction in {made.code.hex(' ')}")
    known = {*starts, *line.host.values(), *(start + offset for offset in made.chunk.hosts)}
    out += [f"{text}: into nowhere" for _, target, text in jumps if target not in known]
    return out


def _is_vector(insn: capstone.CsInsn) -> bool:
    """MOVSD and CMPSD name an SSE instruction, too."""
    return any(op.type == x86.X86_OP_REG and insn.reg_name(op.reg).startswith("xmm") for op in insn.operands)


def _operands(insn: capstone.CsInsn, narrow: bool) -> Iterator[str]:
    """Why an operand is stray.  narrow: the instruction before has made r8 32 bits wide."""
    explicit = False
    for op in insn.operands:
        if op.type != x86.X86_OP_MEM:
            continue
        explicit = True
        mem = op.mem
        base, index = (insn.reg_name(r) if r else "" for r in (mem.base, mem.index))
        if mem.segment == x86.X86_REG_GS:
            exact = narrow and (base, index, mem.disp) == ("r8", "", 0) and not _is_bit_string(insn)
            if not (_has_address_32(insn) or exact):
                yield "a 64-bit address"
            continue
        in_record = (base, index) == ("r15", "") and 0 <= mem.disp < at.RECORD_SIZE
        in_table = (base, index, mem.scale, mem.disp) == ("r14", "r8", 8, 0) and insn.mnemonic == "jmp"
        segment_base = (base, index, mem.disp) == ("r9", "", 0) and insn.mnemonic == "mov"
        if not (in_record or in_table or segment_base):
            yield "not through the window"
    implicit = insn.mnemonic in ("xlatb", "maskmovq", "maskmovdqu")
    if implicit and not explicit and not (GS_PREFIX in insn.bytes[:4] and _has_address_32(insn)):
        yield "not through the window"


def _is_bit_string(insn: capstone.CsInsn) -> bool:
    """BT and relatives with the bit's number in a register: it is added to the address."""
    return insn.mnemonic.split()[-1] in BIT_TESTS and insn.operands[1].type == x86.X86_OP_REG


def _has_address_32(insn: capstone.CsInsn) -> bool:
    return ADDRESS_32 in insn.bytes[:4]
