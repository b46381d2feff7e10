"""Assists: the same as the simulator, in all that they do and in what they leave to it.

Each program goes round a few times, so that what the first round teaches the assists the others use; it must
end as the simulator ends it, one instruction at a time (twice.py).
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

from cpu_node import layout as at
from cpu_node.cpu import EAX, EBX, EDI, ESI
from cpu_node.descriptor import CS, FS, GS, SS, pack, parse
from cpu_node.errors import GP, PF, TripleFault
from cpu_node.flags import AC, ID, NT
from cpu_node.layout import EXIT_ASSIST, EXIT_SIMULATE
from tests.cpu_node.board import (
    CODE,
    CODE0,
    CODE3,
    COUNTER,
    DATA,
    DATA0,
    DATA3,
    FIRST_FREE,
    FLAT,
    GDT,
    IDT,
    IRET,
    RW,
    STACK,
    STACK3,
    TSS,
    TSS_SEL,
    US,
    VECTOR,
    Board,
    P,
)
from tests.cpu_node.child import isolated
from tests.cpu_node.twice import same

ROUNDS = 50
TLS, LIMITED, GONE, LOCAL, SPARE = range(FIRST_FREE, FIRST_FREE + 40, 8)
INNER = CODE + 0x2000
MSRS = "mov ecx, {}\nmov eax, {}\nxor edx, edx\nwrmsr"


def _describe(board: Board) -> None:
    board.describe(TLS, pack(DATA + 0x400, FLAT, 0xC0F3))
    board.describe(LIMITED, pack(DATA, 0xFF, 0x40F3))
    board.describe(GONE, pack(0, FLAT, 0xC073))


def _rounds(body: str, count: int = ROUNDS) -> str:
    return f"mov ebp, {count}\nagain:\n{body}\ndec ebp\njnz again\nhlt"


LOADS = {
    "ds es": f"mov eax, {DATA3}\nmov ds, eax\nmov es, eax\n"
             f"mov eax, {DATA0}\nmov ds, eax\nmov es, eax\nmov ecx, es",
    "from memory": f"mov word ptr [{DATA:#x}], {DATA0}\nmov es, [{DATA:#x}]\nmov edx, es",
    "pops": ".byte 0x1e, 0x06, 0x0f, 0xa0, 0x0f, 0xa8\n.byte 0x0f, 0xa9, 0x0f, 0xa1, 0x07, 0x1f",
    "base": f"mov eax, {TLS}\nmov fs, eax\nmov gs, eax\nmov dword ptr fs:[4], ebp\nmov ebx, gs:[4]\n"
            "xor eax, eax\nmov fs, eax\nmov gs, eax",
    "null": "mov eax, 3\nmov gs, eax\nmov ecx, gs\nmov eax, 0\nmov fs, eax",
    "flags": f"stc\nmov eax, {DATA0}\nstd\nmov ds, eax\n.byte 0x1e, 0x1f\npushfd\npop ebx\ncld\n"
             f"mov ecx, 0x80000000\nneg ecx\nmov es, eax\npushfd\npop edx",
    "control registers": "mov eax, cr0\nmov ebx, cr3\nmov ecx, cr4\nmov edx, cr2\nmov esi, cr0",
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
@isolated
def test_loads(name: str) -> None:
    board = same(_rounds(LOADS[name]), _describe)
    exits = board.engine.exits
    assert exits[EXIT_SIMULATE] + exits[EXIT_ASSIST] < ROUNDS  # else they went to Python each time


REFUSED = {
    "limit": f"mov eax, {LIMITED}\nmov gs, eax",
    "not present": f"mov eax, {GONE}\nmov es, eax",
    "beyond the table": "mov eax, 0xfff8\nmov fs, eax",
    "code": f"mov eax, {CODE0}\nmov ds, eax\nmov ecx, ds\nmov eax, {DATA0}\nmov ds, eax",
    "null es": f"xor eax, eax\nmov es, eax\nmov ecx, es\nmov eax, {DATA0}\nmov es, eax",
    "rpl": f"mov eax, {DATA0 | 3}\nmov ds, eax",
    "local": f"mov eax, {LOCAL | 4}\nmov es, eax",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@isolated
def test_what_is_unusual_is_left_to_the_simulator(name: str) -> None:
    """Loads that work come first, so that everything is warm."""
    warm = f"mov ebp, {ROUNDS}\nmov eax, {DATA0}\nwarm: mov ds, eax\n" \
           "mov es, eax\nmov fs, eax\ndec ebp\njnz warm\n"
    same(f"{warm}{REFUSED[name]}\nhlt", _describe)


@isolated
def test_a_descriptor_that_changes() -> None:
    """The next load sees it, though nobody is told."""
    board = Board()
    board.paging()
    _describe(board)
    board.run(f"""
        mov eax, {TLS}
        mov ebp, 5
    again:
        mov gs, eax
        mov ebx, gs:[0]
        add word ptr [{GDT + TLS + 2:#x}], 0x10
        dec ebp
        jnz again
        mov gs, eax
        mov byte ptr [{GDT + TLS + 5:#x}], 0x73
        mov gs, eax
        hlt""")
    assert board.fault.vector == 11  # #NP
    assert board.cpu.seg[GS].base == DATA + 0x400 + 5 * 0x10


@isolated
def test_another_gdt() -> None:
    """LGDT: what was known of the old one counts no more."""
    board = Board()
    board.paging()
    _describe(board)
    other = DATA + 0x800
    board.ram[other : other + 0x100] = board.ram[GDT : GDT + 0x100]
    board.ram[other + TLS : other + TLS + 8] = pack(DATA + 0x500, FLAT, 0xC0F3).to_bytes(8, "little")
    board.ram[DATA : DATA + 6] = (0xFF).to_bytes(2, "little") + other.to_bytes(4, "little")
    loop = "mov ebp, 9\nagain: mov fs, eax\ndec ebp\njnz again"
    board.run(f"mov eax, {TLS}\n{loop}\nlgdt [{DATA:#x}]\nmov fs, eax\nhlt")
    assert board.cpu.seg[FS].base == DATA + 0x500
    assert board.engine.record.d[at.FS_BASE // 4] == DATA + 0x500


SYSCALLS = f"""
    {MSRS.format(0x174, CODE0)}
    {MSRS.format(0x175, STACK)}
    {MSRS.format(0x176, INNER)}
    mov edx, user
    mov ecx, {STACK3 - 0x100}
    mov ebp, {ROUNDS}
    mov esi, 0
    mov eax, {CODE3 & ~3}
    sysexit
user:
    add esi, 1
    cmc
    mov edx, user
    mov ecx, esp
    sysenter
"""
KERNEL_SIDE = f"""
    .byte 0x1e, 0x06, 0x0f, 0xa0
    mov ebx, {DATA0}
    mov ds, ebx
    mov es, ebx
    mov ebx, {TLS}
    mov fs, ebx
    add dword ptr fs:[8], esi
    .byte 0x0f, 0xa1, 0x07, 0x1f
    dec ebp
    jz out
    sti
    sysexit
out: hlt
"""


def _system_calls(board: Board) -> None:
    board.describe(CODE0, pack(0, FLAT, 0xC09B))
    for n, rights in enumerate((0xC09B, 0xC093, 0xC0FB, 0xC0F3)):  # as SYSENTER wants them
        board.describe(CODE0 + 8 * n, pack(0, FLAT, rights))
    board.describe(TLS, pack(DATA + 0x400, FLAT, 0xC093))
    board.load(KERNEL_SIDE, INNER)


@isolated
def test_sysenter_and_sysexit() -> None:
    board = same(SYSCALLS, _system_calls)
    assert board.regs[ESI] == ROUNDS
    assert board.peek32(DATA + 0x408) == ROUNDS * (ROUNDS + 1) // 2
    assert board.cpu.cpl == 0
    assert [board.cpu.seg[i].selector for i in (CS, SS)] == [CODE0, CODE0 + 8]
    assert board.engine.exits[EXIT_SIMULATE] < ROUNDS


@isolated
def test_where_sysenter_goes_may_change() -> None:
    """WRMSR counts at once; a CS of 0 is #GP."""
    board = Board()
    board.paging()
    _system_calls(board)
    other = INNER + 0x200
    end = board.load(f"mov edi, ebp\n{MSRS.format(0x174, 0)}\nmov edx, {CODE:#x}\nsysexit", other)
    switch = f"push ecx\npush edx\n{MSRS.format(0x176, other)}\npop edx\npop ecx\n"
    board.load(KERNEL_SIDE.replace("dec ebp", f"cmp esi, 20\njb go\n{switch}go: dec ebp"), INNER)
    board.run(SYSCALLS)
    assert board.fault.vector == GP
    assert board.fault.eip == end - 2
    assert board.regs[EDI] == ROUNDS - 20


RETURNS = {
    "same level": f"pushfd\n.byte 0x0e\nmov edi, next\npush edi\n{IRET}\nnext: add esi, 1\npushfd\npop ebx",
    "flags": f"push 0x8d7\n.byte 0x0e\nmov edi, next\npush edi\n{IRET}\nnext: pushfd\npop ebx\nadd esi, 1",
    "direction": f"push 0x402\n.byte 0x0e\nmov edi, next\npush edi\n{IRET}\nnext: lodsd\ncld",
    "if": f"push 0x202\n.byte 0x0e\nmov edi, next\npush edi\n{IRET}\nnext: pushfd\npop ebx\ncli",
    "id": f"push {ID | 2:#x}\n.byte 0x0e\nmov edi, next\npush edi\n{IRET}\nnext: pushfd\npop ebx",
    "rf": f"push 0x10002\n.byte 0x0e\nmov edi, next\npush edi\n{IRET}\nnext: pushfd\npop ebx",
}  # fmt: skip


@pytest.mark.parametrize("name", RETURNS)
@isolated
def test_iret_at_cpl_0(name: str) -> None:
    same(_rounds(RETURNS[name]), lambda board: board.regs.__setitem__(ESI, DATA))


USERS = f"mov eax, {DATA3}\nmov ds, eax\nmov es, eax"


def _outward(flags: int, extra: str = USERS) -> str:
    """CPL 0 -> 3 by IRET, back by INT 40h, ROUNDS times."""
    return f"""
        mov ebp, {ROUNDS}
    again:
        {extra}
        push {DATA3}
        push {STACK3 - 0x40}
        push {flags}
        push {CODE3}
        mov edi, user
        push edi
        {IRET}
    user:
        add esi, 1
        mov ecx, cs
        pushfd
        pop edx
        int 0x40
    """


HANDLED = (f"add esp, 20\nmov eax, {DATA0}\nmov ds, eax\nmov es, eax\n"
           "dec ebp\njz out\njmp {again:#x}\nout: hlt")


def _with_way_back(board: Board) -> None:
    again = CODE + 5
    board.load(HANDLED.format(again=again), INNER)
    board.gate(0x40, INNER, dpl=3)
    _describe(board)


OUTWARD = {
    "plain": _outward(0x202), "status flags": _outward(0xAD7),
    "kernel's ds and es are cleared": _outward(0x202, ""),
    "kernel's fs is cleared": _outward(0x202, f"{USERS}\nmov eax, {DATA0}\nmov fs, eax\nmov gs, eax"),
    "iopl": _outward(0x3202), "nt": _outward(0x202 | NT), "ac": _outward(0x202 | AC),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTWARD)
@isolated
def test_iret_outward(name: str) -> None:
    board = same(OUTWARD[name], _with_way_back)
    assert board.regs[ESI] == ROUNDS


GATE, SS0, ESP0 = IDT + 8 * VECTOR, TSS + 8, TSS + 4
CHANGES = {
    "offset": f"mov word ptr [{GATE:#x}], 0x2200",
    "dpl": f"mov byte ptr [{GATE + 5:#x}], 0x8e",
    "trap gate": f"mov byte ptr [{GATE + 5:#x}], 0xef",
    "absent": f"mov byte ptr [{GATE + 5:#x}], 0x6e",
    "esp0": f"sub dword ptr [{ESP0:#x}], 0x40",
    "ss0": f"mov word ptr [{SS0:#x}], {SPARE}",
    "ltr": f"mov word ptr [{ESP0:#x}], 0x8f00\nmov byte ptr [{GDT + TSS_SEL + 5:#x}], 0x89\n"
           f"mov eax, {TSS_SEL}\nltr ax",
    "if": "sti\npushfd\nand dword ptr [esp], 0xfffffdff\npopfd",
}  # fmt: skip
FATAL = {  # no exception can be delivered either
    "ss0 at cpl 3": f"mov word ptr [{SS0:#x}], {DATA3}",
    "stack not present": f"mov dword ptr [{ESP0:#x}], 0x70000010",
    "code": f"mov byte ptr [{GDT + CODE0 + 5:#x}], 0x1a",
}


def _changed_at_the_end(board: Board, change: str) -> None:
    _with_way_back(board)
    board.describe(SPARE, pack(0, FLAT, 0xC093))
    for vector in (8, 10, 11, 12, 13, 14):
        board.gate(vector, INNER + 0x400)
    board.load("mov esi, [esp]\nhlt", INNER + 0x400)
    board.load("mov ecx, [esp]\nmov edx, [esp+8]\nmov edi, esp\nhlt", INNER + 0x200)
    board.load(HANDLED.format(again=CODE + 5).replace("jz out", "jz change").replace(
        "out: hlt", f"change: {change}\nmov ebp, 1\nmov eax, {DATA0}\nsub esi, {ROUNDS}\njz over\n"
        f"hlt\nover: jmp {CODE + 5:#x}"), INNER)  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@isolated
def test_what_int_depends_on_changes(name: str) -> None:
    """After rounds that worked the kernel side changes something; the next INT must do as the simulator's."""
    same(OUTWARD["plain"], lambda board: _changed_at_the_end(board, CHANGES[name]))


@pytest.mark.parametrize("name", FATAL)
@isolated
def test_int_that_cannot_be_delivered(name: str) -> None:
    board = Board()
    board.paging()
    _changed_at_the_end(board, FATAL[name])
    with pytest.raises(TripleFault):
        board.run(OUTWARD["plain"])
    assert board.regs[ESI] == 1  # the round after the change


@isolated
def test_iret_to_a_null_selector() -> None:
    """#GP, also where user code has run whose segments are not in the GDT: no selector is known then."""
    board = Board()
    board.paging()
    board.flat(3)
    for index, raw in ((CS, pack(0, FLAT, 0xC0FB)), (SS, pack(0, FLAT, 0xC0F3))):
        board.segment(index, parse(0x0F, raw))  # of an LDT
    end = board.load(f"mov eax, [0]\npush 0\npush 0x9000\npush 0x202\npush 0\npush {CODE:#x}\n{IRET}", INNER)
    board.load("mov eax, [esp]\nmov ebx, [esp+4]\nhlt", INNER + 0x100)
    board.gate(0x40, INNER, dpl=3)
    board.gate(GP, INNER + 0x100)
    board.run("int 0x40")
    assert (board.regs[EAX], board.regs[EBX]) == (0, end - 1)
    assert board.cpu.cpl == 0


@isolated
def test_iret_to_a_stack_that_is_not_there() -> None:
    """The frame itself lies on a page that isn't present: #PF at the IRET, nothing changed."""
    board = Board()
    board.paging()
    board.map(0x7000_0000, DATA, 0)
    board.run(f"""
        mov ebp, {ROUNDS}
    again:
        pushfd
        .byte 0x0e
        mov edi, next
        push edi
        {IRET}
    next: dec ebp
        jnz again
        mov esp, 0x70000800
        stc
        {IRET}""")
    assert (board.fault.vector, board.fault.cr2) == (PF, 0x7000_0800)
    assert board.regs[4] == 0x7000_0800
    assert board.cpu.eflags & 1


@isolated
def test_invlpg_sees_every_kind_of_use() -> None:
    """A page is mapped elsewhere and INVLPG said; data, code and the simulator's reads must all follow."""
    board = Board()
    board.paging()
    where = 0x6000_0000
    pte = board.map(where, DATA)
    for n, page in enumerate((DATA, DATA + 0x1000)):
        board.poke32(page, 0x11111111 * (n + 1))
        board.load(f"mov eax, {n + 7}\nret", page + 0x100)
    board.run(f"""
        mov ebp, {ROUNDS}
        mov esi, {where:#x}
        mov edi, {where + 0x100:#x}
    again:
        mov ebx, [esi]
        call edi
        lgdt [{DATA + 0x800:#x}]
        xor dword ptr [{pte:#x}], 0x1000
        invlpg [esi]
        invlpg [{DATA + 0x700000:#x}]
        mov ecx, [esi]
        cmp ecx, ebx
        je wrong
        mov ecx, eax
        call edi
        cmp eax, ecx
        je wrong
        dec ebp
        jnz again
    wrong: hlt""".replace(f"lgdt [{DATA + 0x800:#x}]", "mov edx, cr0"))
    assert board.regs[5] == 0
    board.poke32(pte, DATA | P | RW | US)


@isolated
def test_pages_unmapped_in_a_row() -> None:
    """Mapped together, unmapped one by one: none may stay visible, all may be mapped anew."""
    board = Board()
    board.paging()
    where, count = 0x6000_0000, 16
    pte = board.map(where, DATA, P | RW | 0x60)
    for n in range(1, count):
        board.map(where + n * 0x1000, DATA + n * 0x1000, P | RW | 0x60)
    board.handler(f"add dword ptr [{COUNTER + 0x8000:#x}], 1\nadd esp, 4\nadd dword ptr [esp], 2", vector=PF)
    board.run(f"""
        mov eax, [{where:#x}]
        mov edi, {pte:#x}
        mov esi, {where:#x}
        mov ecx, {count}
    unmap:
        mov edx, [edi]
        mov dword ptr [edi], 0
        invlpg [esi]
        mov eax, [esi]
        mov [edi], edx
        invlpg [esi]
        mov eax, [esi]
        add esi, 0x1000
        add edi, 4
        dec ecx
        jnz unmap
        hlt""")
    assert board.peek32(COUNTER + 0x8000) == count


@isolated
def test_signals_at_any_moment() -> None:
    """SIGALRM again and again, in assists as well as elsewhere: nothing is lost, every one is noticed."""
    board = Board()
    board.paging()
    _system_calls(board)
    main, stop = threading.main_thread().ident, threading.Event()
    assert main is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])

    def disturb() -> None:
        while not stop.is_set():
            signal.pthread_kill(main, signal.SIGALRM)
            os.sched_yield()

    thread = threading.Thread(target=disturb)
    thread.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    rounds = 20000
    board.run(SYSCALLS.replace(f"mov ebp, {ROUNDS}", f"mov ebp, {rounds}"))
    stop.set()
    thread.join()
    assert board.regs[ESI] == rounds
    assert board.peek32(DATA + 0x408) == rounds * (rounds + 1) // 2 & 0xFFFFFFFF
    assert (board.regs[EAX], board.regs[EBX]) == (CODE3 & ~3, TLS)
    assert not board.faults
