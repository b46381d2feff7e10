"""User code that runs directly does what it does when translated: registers, memory, exceptions."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from cpu_node.descriptor import GS, parse
from cpu_node.direct.choose import MAKERS
from cpu_node.direct.exits import USER_DATA
from cpu_node.direct.window import ChildWindow
from cpu_node.errors import BP, DB, GP, PF, UD
from cpu_node.flags import DF, ID, IF, TF
from cpu_node.paging import A, D, P
from tests.cpu_node.board import (
    CODE,
    CODE3,
    COUNTER,
    DATA,
    DATA3,
    DIRECTORY,
    RW,
    TABLES,
    US,
    VECTOR,
    Board,
    pack,
)
from tests.cpu_node.child import isolated
from tests.cpu_node.direct.boards import direct_of, user_board
from tests.cpu_node.direct.rig import wait_dead

BACKENDS = sorted(MAKERS)
backends = pytest.mark.parametrize("backend", BACKENDS)
FAR = 0x0040_0000  # in the next page table
TLS = 0x33
WORK = f"""
    mov ecx, 1000
again:
    imul eax, eax, 1103515245
    add eax, 12345
    mov edx, eax
    and edx, 0xffc
    add [{DATA}+edx], eax
    loop again
"""

PROGRAMS = {
    "compute": WORK + "ud2",
    "call and return": "call f; ud2; f: mov ebx, [esp]; push 7; pop ecx; ret",
    "strings": f"mov edi, {DATA + 0xF80}; mov ecx, 400; mov eax, 0x41424344; rep stosd; ud2",
    "strings down": f"std;mov edi, {DATA + 0x1080}; mov esi, {CODE + 99}; mov cl, 24; .byte 0xf3, 0xa5; ud2",
    "x87 and sse": "fld1; fldpi; faddp; movd xmm0, eax; addsd xmm0, xmm0; ud2",
    "divide error": "xor ecx, ecx; xor edx, edx; mov eax, 7; div ecx",
    "privileged": "mov eax, 9; hlt",
    "port": "in al, 0x60",
    "cr": "mov eax, cr0",
    "cli": "cli",
    "bad selector": "mov eax, 0x1230; mov es, ax",
    "null segment": "mov eax, gs:[0]",
    "no page": f"inc eax; mov eax, [{0x7000_0000}]",
    "no page to write": f"inc eax; mov [{0x7000_0000}], eax",
    "no page to change": f"inc dword ptr [{0x7000_0000}]",
    "no page to run": f"mov eax, {0x7000_0000}; jmp eax",
    "kernel page": f"mov eax, [{DATA + 0x3000}]",
    "kernel page to write": f"push eax; mov [{DATA + 0x3000}], esp",
    "read-only page": f"mov ecx, [{DATA + 0x4000}]; mov [{DATA + 0x4000}], eax",
    "push to a read-only page": f"mov esp, {DATA + 0x4010}; push eax",
    "crossing into nothing": f"mov eax, [{DATA + 0x1FFE}]; mov eax, [{0x0100_0000 - 2}]",
    "software interrupt without gate": "int 0x80",
    "int3 without gate": "int3",
    "aligned": f"movaps xmm0, [{DATA}]; movaps xmm0, [{DATA + 4}]",
    "cpuid": "xor eax, eax; cpuid; ud2",
    "undefined": "mov ebx, 5; .byte 0x0f, 0x0b",
    "syscall": b"\x43\x0f\x05",
    "64-bit call gate": b"\x43\x9a\0\0\0\0\x33\x02",
    "flags": "stc; std; pushfd; pop eax; and eax, 0xcd5; cld; ud2",
    "leave": "push ebp; mov ebp, esp; sub esp, 64; mov [ebp-8], esp; leave; ud2",
    "own code changed": "mov byte ptr [y+1], 7; y: mov al, 1; ud2",
    "code changed in a loop": "mov ecx, 20; x: inc byte ptr [y+1]; y: mov al, 1; add ebx, eax; loop x; ud2",
    "code written, then run": f"mov word ptr [{DATA}], 0x0b0f; mov eax, {DATA}; jmp eax",
    "string over its own code": "lea edi, [y]; mov al, 0x43; mov ecx, 3; rep stosb; y: ud2; ud2; ud2",
    "segment registers by the stack": "push ds; pop es; push ss; pop ds; mov [esp-4], eax; ud2",
    "no write through cs": f"mov dh, 1; .byte 0xd0, 0xce; .byte 0x2e; mov [{DATA}], dh",  # looks like INTO
    "null segment behind what looks like into": "mov dh, 1; rol dh, 7; .byte 0xd0, 0xce; mov eax, gs:[0]",
    "cli behind what looks like into": "mov dh, 1; rol dh, 7; .byte 0xd0, 0xce; cli",
    "division behind what looks like into": "mov ecx, 0; mov dh, 1; rol dh, 7; .byte 0xd0, 0xce; div ecx",
    "too long behind what looks like into": "mov dh, 1; rol dh, 7; .byte 0xd0, 0xce"
                                            + "; .byte 0x3e" * 15 + "; nop",
    "division behind into": "mov ecx, 0; mov al, 0x7f; inc al; into; div ecx",
    "no page behind into": f"mov al, 0x7f; inc al; jmp {CODE + 0x2FFF}",
    "null es": f"xor eax, eax; mov es, ax; inc ebx; mov edi, {DATA}; stosd",
}  # fmt: skip


def _prepared(backend: str | None) -> Board:
    board = user_board(backend)
    board.map(DATA + 0x3000, DATA + 0x3000, P | RW)
    board.map(DATA + 0x4000, DATA + 0x4000, P | US)
    board.map(CODE + 0x3000, 0, 0)
    board.ram[CODE + 0x2FFF] = 0xCE  # INTO
    board.flush()
    return board


def _outcome(board: Board) -> tuple[object, ...]:
    fx = bytes(board.engine.record.b[0x200 + 32 : 0x200 + 288])
    flags = board.cpu.eflags & ~0x10
    segments = [segment.selector for segment in board.cpu.seg]
    data, code = bytes(board.ram[DATA : DATA + 0x4000]), bytes(board.ram[CODE : CODE + 0x1000])
    return board.faults, list(board.regs), board.cpu.eip, flags, segments, fx, data, code


@backends
@pytest.mark.parametrize("name", PROGRAMS)
@isolated
def test_the_same_as_translated(backend: str, name: str) -> None:
    outcomes = []
    for how in (None, backend):
        board = _prepared(how)
        board.run(PROGRAMS[name])
        outcomes.append(_outcome(board))
        if how is not None:
            assert sum(direct_of(board).exits.values()) > 0
        for space in board.engine.contexts.spaces.values():
            space.close()
    assert outcomes[0] == outcomes[1]


@backends
@isolated
def test_accessed_and_dirty_bits(backend: str) -> None:
    board = user_board(backend)
    read, written = board.map(DATA, DATA, P | RW | US), board.map(DATA + 0x1000, DATA + 0x1000, P | RW | US)
    board.flush()
    board.run(f"mov eax, [{DATA}]; mov [{DATA + 0x1000}], eax; ud2")
    assert board.peek32(read) & (A | D) == A
    assert board.peek32(written) & (A | D) == A | D


@backends
@isolated
def test_system_call_and_return(backend: str) -> None:
    board = user_board(backend)
    board.handler(f"inc dword ptr [{COUNTER}]; mov eax, 0x99", 0x80, dpl=3)
    board.handler("hlt", UD)
    board.run("mov ebx, 5; x: mov eax, 1; int 0x80; dec ebx; jnz x; ud2")
    assert board.peek32(COUNTER) == 5
    assert direct_of(board).exits["SystemCall"] == 5
    assert board.regs[0] == 0x99


@backends
@isolated
def test_breakpoint_instruction_and_step_reach_the_guest(backend: str) -> None:
    board = user_board(backend)
    board.handler(f"inc dword ptr [{COUNTER}]", BP, dpl=3)
    board.handler(f"inc dword ptr [{COUNTER + 4}]; and dword ptr [esp+8], ~0x100", DB)
    board.handler("hlt", UD)
    board.run("int3; pushfd; or dword ptr [esp], 0x100; popfd; inc eax; inc eax; ud2")
    assert (board.peek32(COUNTER), board.peek32(COUNTER + 4)) == (1, 1)
    assert not board.cpu.eflags & TF


@backends
@isolated
def test_page_fault_that_the_guest_repairs(backend: str) -> None:
    """The handler fills in the page-table entry; INVLPG isn't needed, as nothing was there."""
    board = user_board(backend)
    entry = board.map(DATA, DATA, 0)
    board.flush()
    board.handler(f"mov dword ptr [{entry}], {DATA | P | RW | US}; add esp, 4", PF)
    board.handler("hlt", UD)
    board.run(f"mov dword ptr [{DATA}], 0x1234; mov eax, [{DATA}]; ud2")
    assert board.regs[0] == 0x1234
    assert [(f.vector, f.error, f.cr2) for f in board.faults] == [(PF, 6, DATA), (UD, None, None)]


@backends
@isolated
@pytest.mark.parametrize(("rights", "again"), [(A | D, False), (0, True)])
def test_a_page_that_the_guest_gives_accessed_is_shown_without_another_trap(
    backend: str, rights: int, again: bool
) -> None:
    """Linux does. Where it isn't accessed nothing is set before the access."""
    board = user_board(backend)
    entry = board.map(DATA, DATA, 0)
    board.flush()
    board.handler(f"mov dword ptr [{entry}], {DATA | P | RW | US | rights}; add esp, 4", PF)
    board.handler("hlt", UD)
    board.run(f"nop; mov dword ptr [{DATA}], 0x1234; ud2")
    assert (direct_of(board).exits["PageFault"] > 2) == again  # code, and the #PF
    assert board.peek32(DATA) == 0x1234
    assert board.peek32(entry) & (A | D) == A | D


@backends
@isolated
def test_a_page_fault_that_the_guest_does_not_repair_grants_nothing(backend: str) -> None:
    """The handler goes on behind the access, which it has not allowed."""
    board = user_board(backend)
    entry = board.map(DATA, DATA, US | RW | A | D)
    board.flush()
    board.handler(f"inc dword ptr [{COUNTER}]; add dword ptr [esp+4], 5; add esp, 4", PF)
    board.handler("hlt", UD)
    board.run(f"mov eax, [{DATA}]; mov eax, [{DATA}]; ud2")
    assert board.peek32(COUNTER) == 2
    assert board.peek32(entry) == DATA | US | RW | A | D


@backends
@isolated
def test_a_page_that_the_guest_takes_away_is_gone(backend: str) -> None:
    board = user_board(backend)
    entry = board.map(DATA, DATA, P | RW | US)
    board.flush()
    board.handler(f"mov dword ptr [{entry}], 0; invlpg [{DATA}]", 0x80, dpl=3)
    board.handler("hlt", PF)
    board.run(f"mov eax, [{DATA}]; int 0x80; mov eax, [{DATA}]")
    assert [(f.vector, f.error, f.cr2) for f in board.faults] == [(PF, 4, DATA)]


@backends
@isolated
def test_a_page_that_becomes_another_is_seen_after_a_cr3_load(backend: str) -> None:
    board = user_board(backend)
    entry = board.map(DATA, DATA, P | RW | US)
    board.flush()
    board.poke32(DATA, 1)
    board.poke32(DATA + 0x5000, 2)
    change = f"mov dword ptr [{entry}], {DATA + 0x5000 | P | RW | US}"
    board.handler(f"{change}; mov eax, cr3; mov cr3, eax", 0x80, dpl=3)
    board.handler("hlt", UD)
    board.run(f"mov ebx, [{DATA}]; int 0x80; mov ecx, [{DATA}]; ud2")
    assert (board.regs[3], board.regs[1]) == (1, 2)


@backends
@isolated
def test_rights_taken_away_hold(backend: str) -> None:
    board = user_board(backend)
    entry = board.map(DATA, DATA, P | RW | US)
    board.flush()
    board.handler(f"and dword ptr [{entry}], ~2; invlpg [{DATA}]", 0x80, dpl=3)
    board.handler("hlt", PF)
    board.run(f"mov [{DATA}], eax; int 0x80; mov [{DATA}], eax")
    assert [(f.vector, f.error, f.cr2) for f in board.faults] == [(PF, 7, DATA)]


@backends
@isolated
def test_code_translated_once_and_changed_directly_is_translated_anew(backend: str) -> None:
    board = user_board(backend)
    direct, board.engine.direct = direct_of(board), None
    board.run("y: mov eax, 1; ud2")
    assert board.regs[0] == 1
    board.engine.direct = direct
    board.load(f"mov byte ptr [{CODE + 1}], 9; ud2", DATA)
    board.faults.clear()
    board.cpu.eip = DATA
    board.resume()
    assert direct.exits["PageFault"] > 0
    board.engine.direct = None
    board.cpu.eip = CODE
    board.resume()
    assert board.regs[0] == 9


@backends
@isolated
def test_interrupts_stop_a_loop_of_user_code(backend: str) -> None:
    board = user_board(backend)
    board.handler(f"inc dword ptr [{COUNTER}]; mov eax, [esp]; out 0x80, al", VECTOR)
    board.on_poll = lambda: board.vectors or _ask(board)
    board.on_port = lambda _port, _value: _stop_when_seen(board)
    cpu_thread = threading.get_ident()
    stop = threading.Event()

    def alarm() -> None:
        while not stop.wait(0.003):
            signal.pthread_kill(cpu_thread, signal.SIGALRM)

    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
    thread = threading.Thread(target=alarm)
    thread.start()
    board.run("again: inc ecx; jmp again")
    stop.set()
    thread.join()
    assert board.peek32(COUNTER) >= 5
    assert board.regs[0] in (CODE, CODE + 1)


def _stop_when_seen(board: Board) -> None:
    """End the run when five interrupts have come, one of them at least while the child ran."""
    board.engine.stopping = board.peek32(COUNTER) >= 5 and direct_of(board).exits["Kicked"] > 0


def _ask(board: Board) -> None:
    board.vectors.append(VECTOR)
    board.intr = True


@backends
@isolated
def test_tls_segment(backend: str) -> None:
    """GS with a base: its accesses work, its selector is the guest's, and a load of it is noticed."""
    board = user_board(backend)
    board.map(0, 0, 0)  # as in any system: a load of GS shows by its next access
    board.flush()
    board.describe(TLS, pack(DATA, 0xFFFFF, 0xC0F3))
    board.segment(GS, parse(TLS, board.peek64(0x1000 + (TLS & ~7))))
    board.poke32(DATA + 0x10, 0x1234)
    board.run("mov eax, gs:[0x10]; mov ecx, gs; mov gs, cx; mov ebx, gs:[0x10]; mov gs:[0x14], ecx; ud2")
    assert (board.regs[0], board.regs[1], board.regs[3]) == (0x1234, TLS, 0x1234)
    assert board.peek32(DATA + 0x14) == TLS
    assert board.faults[-1].vector == UD
    assert direct_of(board).exits["segment loaded"] >= 1


@backends
@isolated
def test_selectors_of_data_segments_are_the_hosts(backend: str) -> None:
    """What differs on purpose: docs/direct-execution.md."""
    board = user_board(backend)
    board.run("mov eax, ds; mov ecx, cs; ud2")
    assert (board.regs[0], board.regs[1]) == (USER_DATA, 0x23)
    assert [s.selector for s in board.cpu.seg[:4]] == [DATA3, CODE3, DATA3, DATA3]


@backends
@isolated
def test_a_data_segment_by_a_selector_of_its_own_reads_as_that(backend: str) -> None:
    """The host has one for DS, ES and SS: where the guest has two, its code is translated."""
    board = user_board(backend)
    board.describe(TLS + 8, pack(0, 0xFFFFF, 0xC0F3))
    board.run(f"mov eax, {TLS + 8}; mov ds, ax; push ds; pop ecx; push es; pop edx; ud2")
    assert (board.regs[1], board.regs[2]) == (TLS + 8, DATA3)
    assert direct_of(board).refusals > 0


@backends
@isolated
def test_code_that_the_host_would_run_otherwise_is_translated(backend: str) -> None:
    board = user_board(backend)
    board.cpu.eflags |= ID
    board.run("mov eax, 3; ud2")
    assert board.regs[0] == 3
    assert direct_of(board).refusals > 0
    assert not direct_of(board).exits
    assert board.cpu.eflags & (ID | IF | DF) == ID | IF


@backends
@isolated
def test_the_id_flag_is_each_childs_own(backend: str) -> None:
    board = user_board(backend)
    board.run(f"pushfd; or dword ptr [esp], {ID}; popfd; mov ebx, 1; ud2")
    direct, window = direct_of(board), board.engine.contexts.space.direct
    assert isinstance(window, ChildWindow)
    assert (window.id_flag, direct.refusals) == (ID, 0)
    window.replace()
    assert window.id_flag == 0
    direct.exits.clear()
    board.faults.clear()
    board.load("mov ebx, 2; ud2", CODE)
    board.cpu.eip = CODE
    board.cpu.eflags |= ID
    board.resume()
    assert board.regs[3] == 2
    assert direct.refusals > 0
    assert not direct.exits


@backends
@isolated
def test_cpuid_is_the_guests_processors(backend: str) -> None:
    """With as many breakpoints as there are, and with more places than that."""
    for count in (1, 4, 9):
        board = user_board(backend)
        board.run("xor ebx, ebx; xor eax, eax; cpuid;" * count + "push ebx; mov eax, 2; ud2")
        assert board.peek32(board.regs[4]) == int.from_bytes(b"Genu", "little")
        assert board.regs[0] == 2


@backends
@isolated
def test_a_child_that_dies_is_replaced(backend: str) -> None:
    board = user_board(backend)
    direct = direct_of(board)
    board.handler("hlt", UD)
    killed = []

    def kill(_port: int, _value: int) -> None:
        window = board.engine.contexts.space.direct
        assert isinstance(window, ChildWindow)
        killed.append(window.child.pid)
        os.kill(killed[-1], signal.SIGKILL)
        wait_dead(killed[-1])

    board.on_port = kill
    board.handler("out 0x80, al", 0x81, dpl=3)
    board.run("mov ecx, 3; x: int 0x81; inc ebx; loop x; ud2")
    assert board.regs[3] == 3
    assert len(set(killed)) == 3
    assert direct.exits["Gone"] == 3


@backends
@isolated
def test_code_whose_child_dies_while_it_runs_gets_a_fault(backend: str) -> None:
    """Its registers are lost; to run it again from where it began could do things twice."""
    board = user_board(backend)

    def kill() -> None:
        while not isinstance(window := board.engine.contexts.space.direct, ChildWindow):
            time.sleep(0.001)
        while board.peek32(DATA) < 1000:
            time.sleep(0.001)
        os.kill(window.child.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    board.run(f"again: inc dword ptr [{DATA}]; jmp again")
    thread.join()
    assert (board.fault.vector, board.fault.error) == (GP, 0)


@backends
@isolated
def test_spaces_have_children_of_their_own(backend: str) -> None:
    board = user_board(backend)
    other = DIRECTORY + 0x1_0000 if DIRECTORY + 0x1_0000 < TABLES else 0x8_0000
    board.new_directory(other)
    board.handler(f"mov eax, {other}; mov cr3, eax", 0x80, dpl=3)
    board.handler("hlt", UD)
    board.run("int 0x80; inc ebx; ud2")
    windows = [space.direct for space in board.engine.contexts.spaces.values()]
    assert len({w.child.pid for w in windows if isinstance(w, ChildWindow)}) == 2


@isolated
def test_without_a_back_end_user_code_is_translated() -> None:
    board = user_board(None)
    board.run("mov eax, 3; ud2")
    assert (board.regs[0], board.faults[-1].vector) == (3, UD)
