"""Single steps, breakpoints and what holds them off.

Source: Intel SDM vol. 3B chapter 17 (17.2 debug registers, 17.3.1 #DB: faults before, traps behind the
instruction), vol. 3A 6.8.3 (MOV SS and POP SS), vol. 2 pages of INT n, IRET, POPF, REP.
"""

from __future__ import annotations

import pytest

from cpu_node.cpu import CR4_DE, DR6_BD, DR6_BS
from cpu_node.descriptor import TRAP_GATE32
from cpu_node.errors import UD
from cpu_node.flags import IF, RF, TF
from tests.cpu_node.board import CODE, DATA, DATA0, Board, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.debuglog import HANDLER, IRET, log_debug_exceptions, logged

END = "out 0xf4, al"  # HLT under TF goes on
SET_TF = "pushfd\nor dword ptr [esp], 0x100\npopfd"


def _board() -> Board:
    """#DB logs EIP and DR6, clears DR6 and returns with RF set, as debuggers do."""
    board = Board()
    log_debug_exceptions(board)
    board.on_port = lambda port, value: setattr(board.engine, "stopping", port == 0xF4)
    return board


def _log(board: Board) -> list[tuple[int, int]]:
    return [(eip, dr6 & 0xE00F) for eip, dr6 in logged(board)]


def _steps(board: Board, text: str) -> list[int]:
    """EIPs behind each traced instruction, from CODE."""
    board.run(text)
    log = _log(board)
    assert all(dr6 == DR6_BS for _, dr6 in log)
    return [eip - CODE for eip, _ in log]


@isolated
def test_every_instruction_is_trapped_behind() -> None:
    """POPF that sets TF is not trapped, the one that clears it is [17.3.1.4]."""
    board = _board()
    head = len(asm(SET_TF))
    steps = _steps(board, f"{SET_TF}\nnop\ninc eax\njmp on\nnop\non: push ebx\npop ecx\n"
                   "pushfd\nand dword ptr [esp], 0xfffffeff\npopfd\nnop\nhlt")
    assert [s - head for s in steps] == [1, 2, 5, 6, 7, 8, 15, 16]
    assert board.regs[0] == 1


@isolated
def test_flags_show_tf_and_the_handler_runs_without() -> None:
    board = _board()
    board.run(f"{SET_TF}\npushfd\npop eax\n{END}")
    assert board.regs[0] & TF


@isolated
def test_iret_that_sets_tf_traps_behind_the_next_instruction() -> None:
    board = _board()
    text = f"pushfd\nor dword ptr [esp], {TF:#x}\n.byte 0x0e\ncall next\nnext: add dword ptr [esp], 5\n{IRET}"
    head = asm(text)
    steps = _steps(board, f"{text}\nnop\ninc eax\n{END}")
    assert [s - len(head) for s in steps] == [1, 2]


@isolated
def test_taken_and_untaken_branches() -> None:
    board = _board()
    head = len(asm(SET_TF))
    steps = _steps(board, f"{SET_TF}\nxor eax, eax\njz on\nnop\non: jnz on\ncall sub1\n{END}\nsub1: ret")
    assert [s - head for s in steps] == [2, 5, 7, 14, 12]


@isolated
def test_software_interrupt_is_not_trapped_and_runs_its_handler_unstepped() -> None:
    """INT n clears TF; the trap comes behind the instruction after IRET... of the interrupted program."""
    board = _board()
    board.gate(0x40, HANDLER + 0x100)
    board.load(f"inc ebx\ninc ebx\n{IRET}", HANDLER + 0x100)
    head = len(asm(SET_TF))
    steps = _steps(board, f"{SET_TF}\nnop\nint 0x40\nnop\n{END}")
    assert [s - head for s in steps] == [1, 4]
    assert board.regs[3] == 2


@isolated
def test_load_of_ss_holds_the_trap_off() -> None:
    """One trap for the pair MOV SS; MOV ESP [6.8.3]."""
    board = _board()
    head = len(asm(f"mov eax, {DATA0}\n{SET_TF}"))
    steps = _steps(board, f"mov eax, {DATA0}\n{SET_TF}\nmov ss, ax\nmov esp, 0x8800\nnop\n{END}")
    first = len(asm("mov ss, ax\nmov esp, 0x8800"))
    assert [s - head for s in steps] == [first, first + 1]


@isolated
def test_sti_holds_no_trap_off() -> None:
    """STI's shadow is for external interrupts only."""
    board = _board()
    head = len(asm(SET_TF))
    steps = _steps(board, f"{SET_TF}\nsti\nnop\ncli\n{END}")
    assert [s - head for s in steps] == [1, 2, 3]


@isolated
def test_repeated_string_is_trapped_after_each_element() -> None:
    board = _board()
    text = f"mov esi, {DATA:#x}\nmov edi, {DATA + 0x100:#x}\nmov ecx, 3\n{SET_TF}\nrep movsb\nnop\n{END}"
    head = len(asm(text[: text.index("rep")].strip()))
    steps = _steps(board, text)
    assert [s - head for s in steps] == [0, 0, 2, 3]


@pytest.mark.parametrize("insn", ["mov eax, cr0", "cpuid", "in al, 0x80", "daa", "rdtsc", "xlatb", "fld1",
                                  "lock inc dword ptr [esi]", "enter 0, 0", "clts"])
@isolated
def test_simulated_and_plain_instructions_alike(insn: str) -> None:
    board = _board()
    prologue = f"mov esi, {DATA:#x}\nmov ebx, esi\n{SET_TF}"
    head, length = len(asm(prologue)), len(asm(insn))
    steps = _steps(board, f"{prologue}\n{insn}\nnop\n{END}")
    assert [s - head for s in steps] == [length, length + 1]


@isolated
def test_fault_under_tf_is_delivered_once_and_not_trapped() -> None:
    board = _board()
    board.gate(UD, HANDLER + 0x100, kind=TRAP_GATE32)
    board.load(f"add dword ptr [esp], 2\n{IRET}", HANDLER + 0x100)
    head = len(asm(SET_TF))
    steps = _steps(board, f"{SET_TF}\nnop\nud2\nnop\n{END}")
    assert [s - head for s in steps] == [1, 4]


@isolated
def test_interrupt_under_tf() -> None:
    """The trap comes first, then the interrupt; the handler is not stepped [6.9 table 6-2]."""
    board = _board()
    board.gate(0x40, HANDLER + 0x200)
    board.load(f"inc ebx\n{IRET}", HANDLER + 0x200)
    board.on_port = lambda port, value: setattr(board.engine, "stopping", True) if port == 0xF4 else (
        board.raise_interrupt(0x40))
    steps = _steps(board, f"{SET_TF}\nout 0x80, al\nsti\nnop\nnop\ncli\n{END}")
    head = len(asm(SET_TF))
    assert board.regs[3] == 1
    assert [s - head for s in steps] == [2, 3, 4, 5, 6]


@isolated
def test_user_code_is_stepped() -> None:
    board = _board()
    board.paging()
    board.gate(UD, HANDLER + 0x100)
    board.load("hlt", HANDLER + 0x100)
    board.flat_segments(3)
    board.cpu.eflags |= TF
    board.run("nop\ninc eax\npush eax\nud2")
    assert [eip - CODE for eip, _ in _log(board)] == [1, 2, 3]


@isolated
def test_halt_under_tf_goes_on() -> None:
    board = _board()
    head = len(asm(SET_TF))
    steps = _steps(board, f"{SET_TF}\nhlt\nnop\n{END}")
    assert [s - head for s in steps] == [1, 2]
    assert board.idles == 0


# ---- breakpoints


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("enable", [0, 1], ids=["local", "global"])
@isolated
def test_instruction_breakpoint(number: int, enable: int) -> None:
    """A fault before the instruction; RF lets it run [17.3.1.1]."""
    board = _board()
    text = f"""
        mov eax, target
        mov dr{number}, eax
        mov eax, {1 << 2 * number + enable:#x}
        mov dr7, eax
        nop
        nop
    target:
        inc ebx
        inc ebx
        xor eax, eax
        mov dr7, eax
        hlt"""
    board.run(text)
    target = board.ram.find(asm("inc ebx\ninc ebx"), CODE)
    assert _log(board) == [(target, 1 << number)]
    assert board.regs[3] == 2


@isolated
def test_instruction_breakpoint_in_a_loop() -> None:
    """RF lasts for one instruction."""
    board = _board()
    board.run("""
        mov eax, target
        mov dr0, eax
        mov eax, 2
        mov dr7, eax
        mov ecx, 5
    target:
        inc ebx
        loop target
        xor eax, eax
        mov dr7, eax
        hlt""")
    assert len(_log(board)) == 5
    assert board.regs[3] == 5


@isolated
def test_load_of_ss_holds_a_breakpoint_off() -> None:
    """At the instruction behind MOV SS there is none [6.8.3]."""
    board = _board()
    board.run(f"""
        mov ebx, ss
        mov eax, target
        mov dr0, eax
        mov eax, 2
        mov dr7, eax
        mov ss, bx
    target:
        nop
        nop
        {END}""")
    assert _log(board) == []


@isolated
def test_repeated_string_and_data_breakpoint() -> None:
    """Behind the element that hit, with the rest still to do [17.3.1.2]."""
    board = _board()
    board.run(f"""
        mov esi, {DATA:#x}
        mov edi, {DATA + 0x100:#x}
        mov ecx, 8
        mov eax, {DATA + 0x102:#x}
        mov dr2, eax
        mov eax, {1 << 4 | 1 << 24:#x}
        mov dr7, eax
        mov byte ptr [{DATA + 2:#x}], 9
        rep movsb
        {END}""")
    rep = board.ram.find(b"\xf3\xa4", CODE)
    assert _log(board) == [(rep, 4)]
    assert board.ram[DATA + 0x102] == 9


@isolated
def test_breakpoint_of_another_type_is_none() -> None:
    """LEN and R/W fields for data: no fault at the instruction."""
    board = _board()
    board.run(f"""
        mov eax, target
        mov dr0, eax
        mov eax, {2 | 1 << 16 | 3 << 18:#x}
        mov dr7, eax
    target:
        inc ebx
        hlt""")
    assert _log(board) == []


@isolated
def test_disabled_breakpoints_run_translated() -> None:
    board = _board()
    board.run("mov eax, target\nmov dr0, eax\ntarget: inc ebx\nhlt")
    assert board.translated
    assert _log(board) == []


ACCESSES = {
    "write byte": ("mov byte ptr [esi], 1", True, True), "write dword": ("mov [esi], eax", True, True),
    "write near": ("mov [esi+4], eax", False, False), "write over": ("mov [esi-2], eax", True, True),
    "read": ("mov eax, [esi]", False, True), "read byte": ("mov al, [esi+3]", False, True),
    "modify": ("inc dword ptr [esi]", True, True), "push": ("lea esp, [esi+4]\npush eax", True, True),
    "fld": ("fld qword ptr [esi-4]", False, True), "movsb": ("mov edi, esi\nmovsb", True, True),
    "lodsb": ("lodsb", False, True), "call": ("lea esp, [esi+4]\ncall next\nnext: nop", True, True),
    "sse": ("movdqu [esi-8], xmm0", True, True), "lea": ("lea eax, [esi]", False, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", [1, 3], ids=["write", "access"])
@pytest.mark.parametrize("name", ACCESSES)
@isolated
def test_data_breakpoint(name: str, kind: int) -> None:
    """A trap behind the instruction that writes (1) or accesses (3) the four bytes [17.2.4, 17.3.1.2]."""
    text, on_write, on_access = ACCESSES[name]
    board = _board()
    board.run(f"""
        mov esi, {DATA:#x}
        mov dr1, esi
        mov eax, {1 << 2 | kind << 20 | 3 << 22:#x}
        mov dr7, eax
        nop
        {text}
        mov esp, 0x8f00
        xor eax, eax
        mov dr7, eax
        hlt""")
    hits = [dr6 for _, dr6 in _log(board)]
    expected = on_write if kind == 1 else on_access
    assert hits == ([2] if expected else [])


PORTS = {
    "out imm": ("out 0x60, al", True), "in dx": ("mov dx, 0x60\nin al, dx", True),
    "dword over": ("in eax, 0x5e", True),
    "below": ("in ax, 0x5e", False), "above": ("out 0x62, al", False), "insb": ("mov dx, 0x61\ninsb", True),
    "rep of none": ("mov dx, 0x60\nxor ecx, ecx\nrep outsb", False), "memory": ("mov al, [0x60]", False),
}  # fmt: skip


@pytest.mark.parametrize("extensions", [True, False], ids=["de", "no-de"])
@pytest.mark.parametrize("name", PORTS)
@isolated
def test_port_breakpoint(name: str, extensions: bool) -> None:
    """R/W = 2 with CR4.DE: a trap behind an access to the two ports from 60h [17.2.4, 17.3.1.2]."""
    text, hit = PORTS[name]
    board = _board()
    board.run(f"""
        mov eax, {CR4_DE if extensions else 0}
        mov cr4, eax
        mov esi, {DATA:#x}
        mov edi, esi
        mov eax, 0x60
        mov dr2, eax
        mov eax, {1 << 4 | 2 << 24 | 1 << 26:#x}
        mov dr7, eax
        {text}
        xor eax, eax
        mov dr7, eax
        hlt""")
    assert [dr6 for _, dr6 in _log(board)] == ([4] if hit and extensions else [])


@isolated
def test_general_detect() -> None:
    """DR7.GD: any MOV of a debug register is #DB with BD, before it happens; GD is cleared [17.2.4]."""
    board = _board()
    board.run("mov eax, 0x2000\nmov dr7, eax\nmov ebx, dr0\nmov ecx, dr7\nhlt")
    log = _log(board)
    assert [dr6 for _, dr6 in log] == [DR6_BD]
    assert board.ram[log[0][0]] == 0x0F
    assert board.regs[1] & 0x2000 == 0


@isolated
def test_tf_in_an_interrupt_gate_s_handler_is_off() -> None:
    board = _board()
    board.gate(0x41, HANDLER + 0x300, kind=TRAP_GATE32)
    board.load(f"pushfd\npop edx\n{IRET}", HANDLER + 0x300)
    board.run(f"sti\n{SET_TF}\nint 0x41\ncli\n{END}")
    assert board.regs[2] & (TF | RF) == 0
    assert board.regs[2] & IF
