"""Instructions whose operand is a device's register: every row of the table that has a memory operand.

The same instruction with the same bytes in RAM says what must come out; a device sees each access once, in
the operand's width where the bus has it.
"""

from __future__ import annotations

import pytest

from cpu_node import layout as at
from cpu_node.contexts import DEVICE_AFTER
from cpu_node.cpu import EAX, ECX, EDI, ESI
from cpu_node.table import Row, all_rows
from tests.cpu_node.board import CODE, DATA, DATA0, HANDLERS, MMIO, RW, STACK, US, Board, P
from tests.cpu_node.child import isolated

TARGET = CODE + 0x800  # for jumps through memory
CONTENT = (TARGET.to_bytes(4, "little") + DATA0.to_bytes(4, "little") + bytes(range(0x30, 0x60))
           + b"\x00\x00\x80\x3f" * 4).ljust(512, b"\x11")
FX_CONTENT = b"\x7f\x03" + bytes(22) + b"\x80\x1f\x00\x00\xff\xff\x00\x00" + bytes(480)
STORES_POINTERS = ("fnstenv", "fnsave", "fxsave")
_IMMEDIATES = {"Ib": b"\x05", "Ibs": b"\x05", "Iw": b"\x05\x00", "Iz": b"\x05\x00\x00\x00", "Jb": b"\x00"}


def _memory_rows() -> list[Row]:
    """Rows with a ModRM operand that can be memory and is accessed."""
    return [row for row in all_rows()
            if row.has_modrm and row.mod != "r" and row.rm_operand and row.access != "-"]


def _encode(row: Row, va: int) -> bytes:
    """The row's instruction with the operand [va]; register operands are EBX, MM3, XMM3."""
    prefix = bytes((row.prefix,)) if row.prefix else b""
    opcode = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map] + bytes((row.opcode,))
    modrm = (3 if row.ext is None else row.ext) << 3 | 5
    immediates = b"".join(_IMMEDIATES.get(operand, b"") for operand in row.operands)
    return prefix + opcode + bytes((modrm,)) + va.to_bytes(4, "little") + immediates


def _outcome(board: Board, row: Row, va: int) -> tuple[object, ...]:
    content = FX_CONTENT if row.mnemonic in ("fxrstor", "ldmxcsr", "fldenv", "frstor") else CONTENT
    if row.mnemonic == "ldmxcsr":
        content = FX_CONTENT[24:].ljust(512, b"\0")
    board.ram[DATA : DATA + 512] = content
    for n, byte in enumerate(content):
        board.registers[MMIO + n] = byte
    board.mmio.clear()
    board.faults.clear()
    record = board.engine.record
    record.reset_fpu()
    record.b[at.FX + 32 : at.FX + 288] = bytes(range(256))
    for n in range(8):
        board.regs[n] = (0x01020304, 5, 0, 0x00000009, STACK, 0x11, 0x22, 0x33)[n]
    board.cpu.eflags = 2
    board.flat()
    board.ram[STACK - 64 : STACK] = bytes(64)
    board.load("hlt", TARGET)
    board.run(_encode(row, va) + b"\xf4")
    result = bytes(board.ram[DATA : DATA + 512])
    if va == MMIO:
        result = bytes(board.registers[MMIO + n] for n in range(512))
    fx = bytes(record.b[at.FX : at.FX + 8]) + bytes(record.b[at.FX + 24 : at.FX + 288])
    if row.mnemonic in STORES_POINTERS:
        result = result[:8]
    flags = board.cpu.eflags & ~row.undefined & 0xCD5
    faults = [(f.vector, f.error) for f in board.faults]
    stack = bytes(board.ram[STACK - 64 : STACK])
    return list(board.regs), board.cpu.eip, flags, fx, result, faults, stack


def _expected_accesses(row: Row) -> list[tuple[str, int]] | None:
    """(direction, width) of what the device sees; None where the operand isn't one bus access."""
    width = row.memory_width(False)
    if width not in (1, 2, 4) or row.action in ("sim", "stop"):
        return None
    if row.group == "x87" and row.access == "w":
        return None  # an exception may suppress the store: what is there is read first
    return {"r": [("r", width)], "w": [("w", width)], "m": [("r", width), ("w", width)]}[row.access]


@isolated
def test_every_memory_operand_may_be_a_device_s() -> None:
    board = Board()
    tried = 0
    for row in _memory_rows():
        if row.mnemonic in ("lgdt", "lidt", "lldt", "ltr", "lmsw"):
            continue  # they load what the rest needs
        memory = _outcome(board, row, DATA)
        device = _outcome(board, row, MMIO)
        seen = [(way, width) for way, _, width, _ in board.mmio]
        assert device == memory, f"{row.key} {row.mnemonic}: {device[:4]} instead of {memory[:4]}"
        expected = _expected_accesses(row)
        if expected is not None and not board.faults:
            assert seen == expected, f"{row.key} {row.mnemonic}: accesses {seen}"
        tried += 1
    assert tried > 400


STRINGS = {
    "movsb from": ("mov esi, {m}\nmov edi, {d}\nmov ecx, 5\nrep movsb", 5),
    "lodsd": ("mov esi, {m}\nlodsd", 1),
    "movsd to": ("mov esi, {d}\nmov edi, {m}\nmov ecx, 3\n.byte 0xf3, 0xa5", 3),
    "stosw": ("mov edi, {m}\nmov ecx, 4\nrep stosw", 4),
    "scasb": ("mov edi, {m}\nmov al, 0x30\nmov ecx, 20\nrepne scasb", 9),
    "cmpsb": ("mov esi, {m}\nmov edi, {d}\nmov ecx, 6\nrepe cmpsb", 6),
    "device to device": ("mov esi, {m}\nlea edi, [esi+0x40]\nmov ecx, 4\n.byte 0xf3, 0xa5", 8),
    "insd": ("mov edi, {m}\nmov dx, 0x10\nmov ecx, 2\nrep insd", 2),
    "outsb": ("mov esi, {m}\nmov dx, 0x10\noutsb", 1),
    "std": ("std\nmov edi, {m}+12\nmov ecx, 4\nrep stosd\ncld", 4),
    "xlat": ("mov ebx, {m}\nmov al, 9\nxlatb", 1),
    "moffs load": ("mov eax, [{m}]", 1), "moffs store": ("mov [{m}], al", 1),
    "push": ("mov ebp, esp\nmov esp, {m}+16\npush eax\npush 5\nmov esp, ebp", 2),
    "pop": ("mov ebp, esp\nmov esp, {m}\npop eax\npop ecx\nmov esp, ebp", 2),
    "pop to": ("push 0x12345678\npop dword ptr [{m}]", 1), "push from": ("push dword ptr [{m}]\npop eax", 1),
    "leave": ("mov edx, esp\nmov ebp, {m}\nleave\nmov esp, edx", 1),
    "maskmov": ("mov edi, {m}\npcmpeqb xmm1, xmm1\nmaskmovdqu xmm0, xmm1", None),
    "unaligned": ("mov eax, [{m}+3]\nmov [{m}+5], ax", 2), "bts far": ("mov ebx, 100\nbts [{m}], ebx", 2),
    "cmpxchg": ("mov eax, [{m}]\ncmpxchg [{m}], ebx", 3),
    "enter": ("mov edx, esp\nmov esp, {m}+8\nenter 0, 0\nmov esp, edx", 1),
    "fs": ("mov eax, fs:[{m}]\nadd fs:[{m}], eax", 3), "es": ("mov es:[{m}], ebx", 1),
    "call through": ("mov dword ptr [{m}], next\ncall dword ptr [{m}]\nnext: pop eax", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", STRINGS)
@isolated
def test_other_accesses_to_a_device(name: str) -> None:
    text, accesses = STRINGS[name]
    board = Board()
    results = []
    for base in (DATA + 0x400, MMIO):
        board.mmio.clear()
        board.ram[DATA : DATA + 0x800] = bytes(0x800)
        board.ram[DATA : DATA + 512] = board.ram[DATA + 0x400 : DATA + 0x600] = CONTENT
        for n, byte in enumerate(CONTENT):
            board.registers[MMIO + n] = byte
        board.engine.record.reset_fpu()
        board.regs[:] = [0] * 8
        board.flat()
        board.run(text.format(m=hex(base), d=hex(DATA)) + "\nhlt")
        assert not board.faults
        device = bytes(board.ram[DATA + 0x400 : DATA + 0x600])
        if base == MMIO:
            device = bytes(board.registers[MMIO + n] for n in range(512))
            assert accesses is None or len(board.mmio) == accesses
        regs = [r - base + 1 if base - 16 <= r < base + 0x1000 else r for r in board.regs]
        results.append((regs, board.cpu.eflags & 0xCD5, bytes(board.ram[DATA : DATA + 0x200]), device))
    assert results[0] == results[1]


@isolated
def test_device_behind_paging_and_at_cpl_3() -> None:
    board = Board()
    board.paging()
    board.map(0x4000_0000, MMIO, P | RW | US)
    board.registers[MMIO + 4] = 0x5A
    board.flat_segments(3)
    board.run("movzx eax, byte ptr [0x40000004]\nmov dword ptr [0x40000008], 0x1234\nud2")
    assert board.regs[EAX] == 0x5A
    assert board.mmio == [("r", MMIO + 4, 1, 0x5A), ("w", MMIO + 8, 4, 0x1234)]


@isolated
def test_operand_across_ram_and_a_device() -> None:
    """Two pages, one RAM, one a device's: each gets its bytes."""
    board = Board()
    board.paging()
    board.map(0x4000_0000, 0x300000)
    board.map(0x4000_1000, MMIO)
    board.ram[0x300FFE:0x301000] = b"\x11\x22"
    board.registers[MMIO], board.registers[MMIO + 1] = 0x33, 0x44
    board.run("mov eax, [0x40000ffe]\nmov dword ptr [0x40000ffe], 0x88776655\nhlt")
    assert board.regs[EAX] == 0x44332211
    assert board.ram[0x300FFE:0x301000] == b"\x55\x66"
    assert (board.registers[MMIO], board.registers[MMIO + 1]) == (0x77, 0x88)


@isolated
def test_instruction_that_always_meets_a_device_stops_faulting() -> None:
    """And is right when its operand is memory again, and when its page is written."""
    board = Board()
    program = f"""
        mov esi, {MMIO:#x}
        mov ecx, 200
    again:
        add dword ptr [esi], 3
        loop again
        mov esi, {DATA:#x}
        mov ecx, 200
    more:
        cmp ecx, 0
        jz end
        dec ecx
        jmp one
    end:
        hlt
    one:
        add dword ptr [esi], 5
        jmp more"""
    for n in range(4):
        board.registers[MMIO + n] = 0
    board.run(program)
    assert board.peek32(DATA) == 1000
    assert int.from_bytes(bytes(board.registers[MMIO + n] for n in range(4)), "little") == 600
    assert board.exits(at.EXIT_FAULT) < 4 * DEVICE_AFTER
    board.engine.contexts.code_written(CODE >> 12)
    board.poke32(DATA, 0)
    board.run(program)
    assert board.peek32(DATA) == 1000


@isolated
def test_same_instruction_for_device_and_memory_in_turns() -> None:
    board = Board()
    board.poke32(DATA, 0)
    for n in range(4):
        board.registers[MMIO + n] = 0
    board.run(f"""
        mov ecx, 100
        mov esi, {MMIO:#x}
        mov edi, {DATA:#x}
    again:
        inc dword ptr [esi]
        xchg esi, edi
        loop again
        hlt""")
    assert board.peek32(DATA) == 50
    assert board.registers[MMIO] == 50


@pytest.mark.parametrize("pa", [0x1000000, 0x40000000, 0xFFFFF000])
@isolated
def test_beyond_ram_is_the_bus(pa: int) -> None:
    board = Board()
    board.run(f"mov eax, [{pa:#x}]\nmov byte ptr [{pa:#x}], 7\nhlt")
    assert board.regs[EAX] == 0xFFFF_FFFF
    assert [(way, where, width) for way, where, width, _ in board.mmio] == [("r", pa, 4), ("w", pa, 1)]


@isolated
def test_execution_out_of_nowhere() -> None:
    board = Board()
    board.run("mov eax, 0x40000000\njmp eax")
    assert board.fault.vector == 6
    assert board.fault.eip == 0x4000_0000


# ---- repeated strings, faults and interrupts in the middle

LENGTH = 5000


@pytest.mark.parametrize("where", ["source", "destination", "both"])
@pytest.mark.parametrize("backwards", [False, True])
@isolated
def test_rep_with_faults_in_the_middle(where: str, backwards: bool) -> None:
    """Each page comes when it is touched; the handler maps it and the instruction goes on."""
    board = Board()
    board.paging()
    source, target = 0x4000_0123, 0x4800_0456
    entries = {}
    for n in range(4):
        for start, frame, there in ((source, 0x300000, "destination"), (target, 0x310000, "source")):
            rights = P | RW | US if where == there else 0
            entries[(start >> 12) + n] = board.map((start & ~0xFFF) + n * 0x1000, frame + n * 0x1000, rights)
    data = bytes(n * 13 & 0xFF for n in range(LENGTH))
    board.ram[0x300123 : 0x300123 + LENGTH] = data
    board.flush()
    last = LENGTH - 1 if backwards else 0
    board.regs[ESI], board.regs[EDI], board.regs[ECX] = source + last, target + last, LENGTH
    board.load(("std" if backwards else "cld") + "\nrep movsb\ncld\nhlt")
    board.cpu.eip = CODE
    board.cpu.halted = False
    progress = [LENGTH]
    while True:
        board.resume()
        if not board.faults:
            break
        fault = board.faults.pop()
        assert fault.vector == 14
        assert fault.eip == CODE + 1
        done = LENGTH - board.regs[ECX]
        sign = -1 if backwards else 1
        assert board.regs[ESI] == source + last + sign * done & 0xFFFFFFFF
        assert board.regs[EDI] == target + last + sign * done & 0xFFFFFFFF
        assert fault.cr2 in (board.regs[ESI], board.regs[EDI])
        progress.append(board.regs[ECX])
        board.poke32(entries[fault.cr2 >> 12], board.peek32(entries[fault.cr2 >> 12]) | P | RW | US)
    assert board.ram[0x310456 : 0x310456 + LENGTH] == data
    assert progress == sorted(progress, reverse=True)
    assert len(progress) >= 3
    assert board.regs[ECX] == 0
    assert board.cpu.halted


@isolated
def test_long_simulated_repeat_lets_interrupts_in() -> None:
    """To a device, 5000 elements: interrupts in between see a restartable state."""
    board = Board()
    board.gate(0x40, HANDLERS)
    board.load("inc ebp\nmov edx, ecx\n.byte 0xcf", HANDLERS)
    seen = []
    original = board.mmio_write

    def write(pa: int, width: int, value: int) -> None:
        original(pa, width, value)
        seen.append(pa)
        if len(seen) == 100:
            board.raise_interrupt(0x40)

    board.mmio_write = write  # type: ignore[method-assign]
    board.run(f"sti\nmov edi, {MMIO:#x}\nmov ecx, 5000\nmov al, 7\nrep stosb\ncli\nhlt")
    assert seen == [MMIO + n for n in range(5000)]
    assert board.regs[5] == 1
    assert 0 < board.regs[2] < 5000
    assert board.regs[ECX] == 0

