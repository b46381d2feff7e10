"""Properties of every template: what it may touch, and that it is as long as it says.

All rows of the table, in register and memory forms, all addressing forms, with FS and GS, in every mode.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import capstone
import pytest
from capstone import x86

from cpu_node import mode as modes
from cpu_node.decode import TooLong, Undefined, decode
from cpu_node.emit import Templates
from cpu_node.emit_soft import templates_of
from cpu_node.encode import SIMULATE, STOP
from cpu_node.line import PAGE, page_line
from cpu_node.table import Row, all_rows
from cpu_node.translate import translate

VA = 0x8000_0000
POSITION = 0x2000
SOFT = modes.USER | modes.SOFT
MODES = (0, modes.USER, modes.NO_FPU, modes.NO_SSE | modes.USER, modes.TSC_SIMULATED, SOFT)
FORMS = (  # ModRM (without reg), what follows
    (0xC3, b""), (0x03, b""), (0x43, b"\x11"), (0x83, b"\x44\x33\x22\x11"), (0x05, b"\x44\x33\x22\x11"),
    (0x04, b"\x24"), (0x44, b"\x24\xf8"), (0x04, b"\x8b"), (0x84, b"\x4d\x00\x01\x00\x00"),
    (0x04, b"\x25\x44\x33\x22\x11"), (0x45, b"\x08"),
)  # fmt: skip
IMMEDIATES = b"\x05\x00\x00\x00\x07\x00"
PREFIXES = (b"", b"\x64", b"\x66", b"\x65", b"\x2e", b"\x67", b"\xf3", b"\xf2")
STACK_USERS = ("pushfq", "pop", "push", "popfq")  # of the host's stack, in PUSHF and POPF
_DETAIL = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
_DETAIL.detail = True


def _instructions(row: Row, prefixes: tuple[bytes, ...] = PREFIXES) -> Iterator[bytes]:
    """Encodings of a row, padded."""
    prefix = bytes((row.prefix,)) if row.prefix else b""
    opcode = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map] + bytes((row.opcode,))
    for extra in prefixes:
        if not row.has_modrm:
            yield extra + prefix + opcode + IMMEDIATES
            continue
        for modrm, rest in FORMS:
            if (row.mod == "r") != (modrm >= 0xC0) and row.mod:
                continue
            rm = modrm if row.rm is None else modrm & 0xF8 | row.rm
            registers = (3, 5) if extra in PREFIXES[:2] else (5,)
            for reg in (row.ext,) if row.ext is not None else registers:
                yield extra + prefix + opcode + bytes((rm | reg << 3,)) + rest + IMMEDIATES


@functools.cache
def _templates(mode: int) -> Templates:
    return templates_of(mode)


def _host_code(code: bytes, mode: int) -> tuple[bytes, int] | None:
    """(host code of one instruction, kind); None when there is no such instruction."""
    try:
        insn = decode(code + bytes(16))
    except (Undefined, TooLong):
        return None
    line = page_line(VA >> 12, 1, mode, code[: insn.length].ljust(PAGE, b"\x90"), False)
    templates = _templates(mode)
    made = translate(line, 0, templates, POSITION, limit=1)
    kind = templates.lookup(line.code, 0)[0]
    return made.code, kind


FOUND = {("r8", "r9"), ("r9", None), ("r11", None), ("rcx", None)}  # by a probe
TABLES = {("r13", "r9"), ("r13", "rcx"), ("r14", "r8"), ("r15", None), ("rsp", None)}


def _check_soft_operand(insn: capstone.CsInsn, operand: x86.X86Op, what: str) -> None:
    """SOFT: nothing but entries, the record, the dispatch table and what a probe found."""
    memory = operand.mem
    where = f"{what}: {insn.mnemonic} {insn.op_str}"
    if insn.mnemonic in ("lea", "nop"):
        return
    assert not memory.segment, where
    place = insn.reg_name(memory.base), insn.reg_name(memory.index) if memory.index else None
    assert place in FOUND | TABLES, where


def _check_operand(insn: capstone.CsInsn, operand: x86.X86Op, what: str) -> None:
    memory = operand.mem
    base, segment = insn.reg_name(memory.base), insn.reg_name(memory.segment)
    where = f"{what}: {insn.mnemonic} {insn.op_str}"
    if insn.mnemonic in ("lea", "nop"):
        return
    if segment == "gs":
        narrow = insn.addr_size == 4 or (base == "r8" and not memory.index and memory.disp == 0)
        assert narrow, f"{where}: the address may leave the window"
        return
    if base in ("rsi", "rdi", "esi", "edi"):  # strings: the window was added, a guard lies behind it
        assert insn.id in STRINGS, where
        return
    assert base in ("r15", "r14", "r9", "rsp"), where


_NAMES = ("MOVS", "CMPS", "STOS", "LODS", "SCAS")
STRINGS = {getattr(x86, f"X86_INS_{name}{size}") for name in _NAMES for size in "BWD"}


def _unknown_to_capstone(code: bytes) -> bool:
    """Register forms that processors take and capstone doesn't: aliases of x87 instructions, LFENCE's."""
    first = code.lstrip(b"\x66")[0]
    return first in (0x0F, 0xDC, 0xDD, 0xDE, 0xDF, 0xF2, 0xF3) and not list(_DETAIL.disasm(code, 0, 1))


@pytest.mark.parametrize("mode", MODES, ids=modes.describe)
def test_no_template_leaves_the_window_or_uses_the_guest_s_stack(mode: int) -> None:
    seen: set[bytes] = set()
    tried = 0
    for row in all_rows():
        for code in _instructions(row, PREFIXES if mode in (0, SOFT) else PREFIXES[:1]):
            made = _host_code(code, mode)
            if made is None or made[0] in seen or _unknown_to_capstone(made[0]):
                continue
            seen.add(made[0])
            tried += 1
            what = f"{row.key} {code.hex()}"
            length = 0
            for insn in _DETAIL.disasm(made[0], POSITION):
                length += insn.size
                for operand in insn.operands:
                    if operand.type == x86.X86_OP_MEM:
                        (_check_soft_operand if mode & modes.SOFT else _check_operand)(insn, operand, what)
                assert insn.mnemonic not in ("call", "ret", "leave", "enter", "int3", "syscall"), what
                if insn.mnemonic in STACK_USERS:
                    assert row.action in ("pushf", "popf"), what
            assert length == len(made[0]), f"{what}: capstone stops in {made[0].hex()}"
    assert tried > 500


def test_simulated_rows_are_exits_and_nothing_else() -> None:
    for row in all_rows():
        for code in _instructions(row, PREFIXES[:3]):
            made = _host_code(code, 0)
            if made is not None and made[1] in (SIMULATE, STOP):
                first = next(iter(_DETAIL.disasm(made[0], POSITION)))
                assert first.mnemonic == "mov", f"{row.key}: {made[0].hex()}"
                assert made[0][6:9] == b"\x41\xff\x67"


@pytest.mark.parametrize(("mode", "group"), [(modes.NO_FPU, ("x87", "mmx", "sse")), (modes.NO_SSE, ("sse",))])
def test_without_an_fpu_its_instructions_are_left_to_the_simulator(mode: int, group: tuple[str, ...]) -> None:
    for row in all_rows():
        for code in _instructions(row, PREFIXES[:2]):
            made = _host_code(code, mode)
            try:
                row_of_code = decode(code + bytes(16)).row
            except (Undefined, TooLong):
                continue
            assert made is not None
            assert (row_of_code.group not in group) or made[1] == STOP


def test_templates_are_shared_between_displacements_and_immediates() -> None:
    """The trie is entered once for prefixes, opcode, ModRM and SIB."""
    templates = Templates(0)
    first = templates.lookup(bytes.fromhex("81441d11223344558866") + bytes(16), 0)
    again = templates.root[0x81][0x44][0x1D]
    assert again == first


QUIET = (
    "push", "pop", "pushimm", "pushm", "popm", "pushseg", "movfromseg", "pusha", "popa", "pushf", "leave",
    "moffs", "xlat", "call", "ret", "ijmp", "icall", "lea", "cli", "sti", "hintnop", "jmp", "jcc", "loop",
)  # fmt: skip
_TESTED = sum(getattr(x86, name) for name in dir(x86) if name.startswith("X86_EFLAGS_TEST_"))


@pytest.mark.parametrize("mode", [0, SOFT], ids=modes.describe)
def test_flags_are_left_alone_by_glue(mode: int) -> None:
    """Of instructions that don't write flags themselves, no host instruction does."""
    for row in all_rows():
        if row.action not in QUIET:
            continue
        for code in _instructions(row, PREFIXES[:3]):
            made = _host_code(code, mode)
            for insn in _DETAIL.disasm(made[0], POSITION) if made is not None else ():
                written = insn.eflags & ~_TESTED
                assert not written or insn.mnemonic == "popfq", f"{row.key}: {insn.mnemonic} {insn.op_str}"

