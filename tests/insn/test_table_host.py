"""Every opcode, prefix and ModRM.reg, memory and register form: the table has exactly what the host executes.

A form that our decoder calls undefined must be #UD on the host, and the other way round, but for what the
lists name: newer instructions, which the guest's CPU doesn't claim, and #UDs that the simulator raises.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from cpu_node.decode import Undefined, decode
from tests.insn.executors import NATIVE
from tests.insn.state import ESP, PAGE_SIZE, Case, Page, fx_image
from tests.insn.worker import Worker

CODE, DATA, STACK = 0x20000100, 0x30000000, 0x7F000000
ZERO_PAGE = bytes(PAGE_SIZE)
BATCH = 500
UNDEFINED_VECTOR = 6
Opcode = tuple[int, int]  # map 0 to 3, byte
ESCAPES = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")
PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
NOT_PROBED = {  # escapes, prefixes, far pointers that the host would follow, and what enters the host kernel
    *((0, byte) for byte in (*PREFIXES, 0x0F, 0xCD, 0x9A, 0xEA)),
    (1, 0x38), (1, 0x3A), (1, 0x05), (1, 0x34), (1, 0x35),
}  # fmt: skip

HOST_HAS_MORE: dict[Opcode, str] = {
    (0, 0x62): "EVEX", (0, 0xC4): "VEX", (0, 0xC5): "VEX", (0, 0x8F): "XOP",
    (1, 0x01): "XGETBV, MONITOR, RDTSCP, VMX, SVM and so on", (1, 0x07): "SYSRET", (1, 0x0E): "FEMMS",
    (1, 0x0F): "3DNow!", (1, 0x24): "SSE5", (1, 0x25): "SSE5", (1, 0x2B): "MOVNTSS, MOVNTSD",
    (1, 0x37): "GETSEC", (1, 0x78): "VMREAD, EXTRQ", (1, 0x79): "VMWRITE, EXTRQ", (1, 0xA6): "PadLock",
    (1, 0xA7): "PadLock", (1, 0xAE): "XSAVE, CLWB and so on", (1, 0xC7): "RDRAND, XSAVEC, VMPTRLD and so on",
    (1, 0xC6): "FRED", (1, 0xB8): "JMPE",
    **{(2, byte): "VMX, INVPCID" for byte in (0x80, 0x81, 0x82)},
    **{(2, byte): "SHA" for byte in range(0xC8, 0xCE)}, (2, 0xCF): "GFNI", (2, 0xD8): "Key Locker",
    **{(2, byte): "AES" for byte in range(0xDB, 0xE0)},
    **{(2, byte): "MOVBE" for byte in (0xF0, 0xF1)}, (2, 0xF5): "CET", (2, 0xF6): "ADX, CET",
    (2, 0xF8): "MOVDIR64B, ENQCMD", (2, 0xF9): "MOVDIRI", (2, 0xFA): "Key Locker", (2, 0xFB): "Key Locker",
    (2, 0xFC): "RAO-INT", (3, 0x44): "PCLMULQDQ", (3, 0xCC): "SHA", (3, 0xCE): "GFNI", (3, 0xCF): "GFNI",
    (3, 0xDF): "AES", (3, 0xF0): "HRESET",
}  # fmt: skip
UNDEFINED_LATER: dict[Opcode, str] = {
    (0, 0x8C): "segment registers 6 and 7", (0, 0x8E): "segment registers 6 and 7, and CS",
    (1, 0x0B): "UD2 has a row", (1, 0x0D): "NOP on Intel, #UD for registers on AMD",
    (1, 0x20): "control registers that don't exist", (1, 0x22): "control registers that don't exist",
    (1, 0x21): "debug registers 4 and 5 with CR4.DE", (1, 0x23): "debug registers 4 and 5 with CR4.DE",
}  # fmt: skip


def _probes() -> Iterator[tuple[Opcode, bytes]]:
    memory = DATA.to_bytes(4, "little")
    for number, escape in enumerate(ESCAPES):
        for byte in range(256):
            if (number, byte) in NOT_PROBED:
                continue
            every_rm = (number, byte) == (1, 0x01) or (number == 0 and 0xD8 <= byte <= 0xDF)
            for prefix in (b"", b"\x66", b"\xf2", b"\xf3"):
                opcode = prefix + escape + bytes((byte,))
                for reg in range(8):
                    yield (number, byte), opcode + bytes((reg << 3 | 5,)) + memory + bytes(4)
                    for rm in range(8) if every_rm else (1,):
                        yield (number, byte), opcode + bytes((0xC0 | reg << 3 | rm,)) + bytes(8)


def _case(code: bytes) -> Case:
    page = b"\xf4" * 0x100 + code
    code_page = Page(CODE & -PAGE_SIZE, page.ljust(PAGE_SIZE, b"\xf4"), False)
    pages = (code_page, *(Page(va, ZERO_PAGE, True) for va in (DATA, STACK)))
    regs = [DATA] * 8
    regs[ESP] = STACK + 0x800
    return Case(CODE, tuple(regs), 0, fx_image(), pages, len(code))


def test_the_table_has_what_the_host_executes() -> None:
    host_more: dict[Opcode, list[str]] = defaultdict(list)
    table_more: dict[Opcode, list[str]] = defaultdict(list)
    probes = list(_probes())
    with Worker(NATIVE) as native:
        for first in range(0, len(probes), BATCH):
            batch = probes[first : first + BATCH]
            native.send([_case(code) for _, code in batch])
            for (opcode, code), state in zip(batch, native.receive(), strict=True):
                assert state is not None
                on_host = not (state.stop.vector == UNDEFINED_VECTOR and state.eip == CODE)
                in_table = True
                try:
                    decode(code + bytes(16))
                except Undefined:
                    in_table = False
                if on_host and not in_table and opcode not in HOST_HAS_MORE:
                    host_more[opcode].append(code.hex(" "))
                elif in_table and not on_host and opcode not in UNDEFINED_LATER:
                    table_more[opcode].append(code.hex(" "))
    assert len(probes) > 60_000
    assert dict(host_more) == {}
    assert dict(table_more) == {}
