"""Self-modifying code in all its forms: the next instruction executed is the one that memory holds.

Each program runs translated and, for comparison, one instruction at a time in the simulator, which reads
memory anew each time. Source: Intel SDM vol. 3A 12.6 (a processor since the P6 sees its own writes).
"""

from __future__ import annotations

import pytest

from cpu_node import layout as at
from cpu_node.contexts import MIXED_AFTER
from cpu_node.cpu import EAX, EBX, ECX
from tests.cpu_node.board import CODE, DATA, US, Board, P, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.twice import aliased_board, same

MOV_EAX = 0xB8

STORES = {
    "same address": "mov dword ptr [victim+1], 7",
    "alias": "mov dword ptr [victim+0x3ff00001], 7",
    "big alias": "mov dword ptr [victim+0x50000001], 7",
    "byte": "mov byte ptr [victim+1], 7",
    "crossing": "mov dword ptr [victim-1], 0x0007b890",
    "add": "add dword ptr [victim+1], 6",
    "lock xadd": "mov ebx, 6\nlock xadd [victim+1], ebx",
    "xchg": "mov ebx, 7\nxchg [victim+1], ebx",
    "push": "mov ebp, esp\nmov esp, victim+5\npush 7\nmov esp, ebp",
    "pushal": "mov ebp, esp\nmov edi, 0xb8909090\nmov eax, 7\nmov esp, victim+29+4\npushal\nmov esp, ebp",
    "pop": "push 7\npop dword ptr [victim+1]",
    "stosd": "mov edi, victim+1\nmov eax, 7\nstosd",
    "rep stosb": "mov edi, victim\nmov al, 0x40\nmov ecx, 5\nrep stosb",
    "rep movsb": "mov edi, victim\nmov esi, source\nmov ecx, 5\nrep movsb",
    "std": "std\nmov edi, victim+4\nmov esi, source+4\nmov ecx, 5\nrep movsb\ncld",
    "x87": "fldpi\nfistp dword ptr [victim+1]",
    "sse": "movdqu xmm0, [source]\nmovdqu [victim], xmm0",
    "cmpxchg8b": "mov eax, [victim]\nmov edx, [victim+4]\n"
                 "mov ebx, [source]\nmov ecx, edx\nmov cl, 0\ncmpxchg8b [victim]",
    "simulated store": "mov cx, ds\nsgdt [victim+9]\nsmsw [victim+1]",
    "string in": "mov edi, victim+1\nmov dx, 0x10\ninsd",
    "fs": "mov dword ptr fs:[victim+1], 7",
    "call": "mov ebp, esp\nmov esp, victim+5\ncall next\nnext: mov esp, ebp",
    "enter": "mov ebp, 7\nmov edx, esp\nmov esp, victim+5\nenter 0, 0\nmov esp, edx",
    "maskmov": "pcmpeqb xmm1, xmm1\nmovdqu xmm0, [source]\nmov edi, victim\nmaskmovdqu xmm0, xmm1",
    "fnstcw": "fnstcw [victim+1]",
    "bts": "bts dword ptr [victim+1], 5",
    "movnti": "mov ebx, 9\nmovnti [victim+1], ebx",
}  # fmt: skip
SOURCE = "jmp start\nsource: mov eax, 0x1234\n.rept 16\nnop\n.endr\nstart:"


def _program(store: str) -> str:
    """The victim is executed, then changed just ahead of its execution, then executed once more."""
    return f"""
        {SOURCE}
        mov edi, {DATA:#x}
        xor esi, esi
    again:
        cmp esi, 2
        jz end
        inc esi
        cmp esi, 2
        jnz over
        push esi
        {store}
        pop esi
    over:
        jmp on
        .align 16
        nop
    on:
        nop
    victim:
        mov eax, 1
        nop
        nop
        nop
        jmp again
        .rept 64
        nop
        .endr
    end:
        hlt"""


UNCHANGED = asm("mov eax, 1\nnop\nnop\nnop")


@pytest.mark.parametrize("name", STORES)
@isolated
def test_store_to_an_instruction_ahead(name: str) -> None:
    board = same(_program(STORES[name]))
    assert UNCHANGED not in board.ram[CODE : CODE + 0x200]
    if name in ("same address", "alias", "big alias", "byte", "crossing", "add", "xchg", "push", "pop"):
        assert board.regs[EAX] == 7


@pytest.mark.parametrize("name", STORES)
@isolated
def test_store_to_an_instruction_ahead_on_a_mixed_page(name: str) -> None:
    """The same where translations verify themselves."""

    def mix(board: Board) -> None:
        board.engine.contexts.code.mixed.add(CODE >> 12)

    same(_program(STORES[name]), mix)


@isolated
def test_loop_that_changes_itself() -> None:
    """Each round another immediate; soon the page verifies instead of faulting."""
    board = same("""
        mov ecx, 300
        xor ebx, ebx
    again:
        mov [victim+1], ecx
    victim:
        mov eax, 0
        add ebx, eax
        loop again
        hlt""")
    assert board.regs[EBX] == 300 * 301 // 2
    assert CODE >> 12 in board.engine.contexts.code.mixed
    assert board.exits(at.EXIT_FAULT) < 100


@isolated
def test_data_beside_code_stops_faulting() -> None:
    """A counter on the page of the loop that counts: not a fault, nor a translation, for each round."""
    board = same("""
        mov ecx, 20000
    again:
        inc dword ptr [counter]
        loop again
        mov eax, [counter]
        hlt
        .align 64
    counter:
        .long 0""")
    assert board.regs[EAX] == 20000
    assert board.exits(at.EXIT_FAULT) < 50
    assert board.engine.contexts.cache.translations < 200


@isolated
def test_data_on_a_code_page_written_by_other_code() -> None:
    board = aliased_board()
    board.load("inc dword ptr [eax]\nret", CODE + 0x1000)
    board.run(f"""
        mov eax, {CODE + 0x1800:#x}
        mov ecx, 20000
        mov ebx, {CODE + 0x1000:#x}
    again:
        call ebx
        loop again
        hlt""")
    assert board.peek32(CODE + 0x1800) == 20000
    assert board.exits(at.EXIT_FAULT) < 50


@isolated
def test_compiler_writes_and_calls() -> None:
    """What a just-in-time compiler does: another function at the same place, many times, by a string move."""
    board = same(f"""
        mov ebp, 200
        xor ebx, ebx
    again:
        mov [source+1], ebp
        mov esi, source
        mov edi, {CODE + 0x2000:#x}
        mov ecx, 6
        rep movsb
        mov edx, {CODE + 0x2000:#x}
        call edx
        add ebx, eax
        dec ebp
        jnz again
        hlt
        .align 4096
    source:
        mov eax, 0
        ret""")
    assert board.regs[EBX] == 200 * 201 // 2


@isolated
def test_loop_body_replaced_by_a_callee() -> None:
    """A call into another page rewrites the caller behind its back; the return goes to new code."""
    callee = asm(f"mov dword ptr [{CODE + 8:#x}], 5\nmov dword ptr [{CODE + 13:#x}], 6\nret", CODE + 0x1000)
    board = same(f"""
        mov edx, {CODE + 0x1000:#x}
        call edx
        mov eax, 1
        mov ebx, 2
        hlt""", lambda board: _load(board, callee))
    assert board.regs[EAX] == 5
    assert board.regs[EBX] == 6


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("page", [0, 1])
@isolated
def test_crossing_instruction_changed(page: int, mixed: bool) -> None:
    """An instruction over a page border, changed on either page."""

    def prepare(board: Board) -> None:
        code = asm("mov eax, 0x44332211\nret", CODE + 0x1FFD)
        board.load(code, CODE + 0x1FFD)
        if mixed:
            board.engine.contexts.code.mixed |= {(CODE >> 12) + 1 + page}

    board = same(f"""
        mov esi, {CODE + 0x1FFD:#x}
        call esi
        mov edi, eax
        mov byte ptr [esi+{2 + 2 * page}], 0x99
        call esi
        mov ebp, eax
        mov byte ptr [esi+{2 + 2 * page}], 0x77
        call esi
        hlt""", prepare)
    shift = 8 * (1 + 2 * page)
    assert board.regs[7] == 0x44332211
    assert board.regs[5] == 0x44332211 & ~(0xFF << shift) | 0x99 << shift
    assert board.regs[0] == 0x44332211 & ~(0xFF << shift) | 0x77 << shift


@isolated
def test_store_across_a_data_and_a_code_page() -> None:
    """An unaligned store that ends on a page of code."""
    board = same(f"""
        mov esi, {CODE + 0x2000:#x}
        mov dword ptr [esi], 0xb8
        mov dword ptr [esi+4], 0xc300
        call esi
        mov ebx, eax
        mov dword ptr [{CODE + 0x1FFF:#x}], 0x0005b800
        call esi
        hlt""")
    assert board.regs[EBX] == 0
    assert board.regs[EAX] == 5


@isolated
def test_jump_into_the_middle_of_an_instruction() -> None:
    """The same bytes as two instruction streams, in turns, and changed while both are known."""
    code = asm("mov eax, 0x90c3f889", CODE + 0x1000) + b"\xc3"  # inside it: mov eax, edi; ret; nop
    board = same("""
        mov edi, 0x77
        mov esi, 0x101000
        mov ecx, 3
    again:
        call esi
        add ebx, eax
        lea edx, [esi+1]
        call edx
        add ebp, eax
        loop again
        mov word ptr [esi+1], 0xf089
        call edx
        call esi
        hlt""", lambda board: _load(board, code))
    assert board.regs[EBX] == 3 * 0x90C3F889 & 0xFFFFFFFF
    assert board.regs[5] == 3 * 0x77
    assert board.regs[EAX] == 0x90C3F089


def _load(board: Board, code: bytes) -> None:
    board.load(code, CODE + 0x1000)


@isolated
def test_overlapping_streams_in_one_loop() -> None:
    """A prefix that is jumped over in every second round."""
    same("""
        mov ecx, 20
        mov esi, 0x200000
    again:
        test ecx, 1
        jz skip
        .byte 0x66
    skip:
        add dword ptr [esi], 0x90909090
        nop
        nop
        nop
        loop again
        hlt""")


@isolated
def test_user_code_changed_by_the_kernel() -> None:
    """What a debugger's breakpoint is: the kernel writes INT3 into a page that CPL 3 executed."""
    board = aliased_board()
    board.load("mov eax, 1\nint 0x80\nmov eax, 2\nint 0x80\nud2", CODE + 0x1000)
    board.gate(0x80, CODE + 0x100, dpl=3)
    board.gate(3, CODE + 0x200, dpl=3)
    board.load(f"add ebx, eax\nmov byte ptr [{CODE + 0x1007:#x}], 0xcc\n.byte 0xcf", CODE + 0x100)
    board.load(f"mov ecx, [esp]\nmov byte ptr [{CODE + 0x1007:#x}], 0xb8\ndec dword ptr [esp]\n"
               "or esi, 0x10\n.byte 0xcf", CODE + 0x200)
    board.gate(6, CODE + 0x300)
    board.load("hlt", CODE + 0x300)
    board.flat_segments(3)
    board.run(b"", CODE + 0x1000)
    assert board.regs[EBX] == 3
    assert board.regs[ECX] == CODE + 0x1008
    assert board.regs[6] == 0x10


@isolated
def test_page_of_code_filled_by_the_kernel_for_the_user() -> None:
    """Demand loading: the page comes as data, is executed, is thrown away, comes with other code."""
    board = aliased_board()
    va = 0x0804_8000
    pte_pa = board.map(va, 0x300000, 0)
    results = []
    for n in range(6):
        frame = 0x300000 + (n % 2) * 0x1000
        board.flat_segments(0)
        board.run(f"mov dword ptr [{frame:#x}], {MOV_EAX | n << 8:#x}\n"
                  f"mov dword ptr [{frame + 4:#x}], 0x0b0f00\n"
                  f"mov dword ptr [{pte_pa:#x}], {frame | P | US:#x}\ninvlpg [{va:#x}]\nhlt")
        board.flat_segments(3)
        board.faults.clear()
        board.run(b"", va)
        results.append(board.regs[EAX])
    assert results == list(range(6))


@isolated
def test_code_that_the_device_wrote() -> None:
    """INS into code: the simulator's writes are writes too."""
    board = aliased_board()
    board.port_values[0x10] = 0xC3
    board.load("mov eax, 1\nnop\nret", CODE + 0x1000)
    board.run("""
        mov esi, 0x101000
        call esi
        mov ebx, eax
        xor eax, eax
        mov edi, esi
        mov dx, 0x10
        insb
        call esi
        hlt""")
    assert board.regs[EBX] == 1
    assert board.regs[EAX] == 0


@isolated
def test_stack_on_the_page_of_code() -> None:
    """Every CALL writes to the page it is on."""
    board = same(f"""
        mov esp, {CODE + 0x800:#x}
        mov ecx, 500
    again:
        push ecx
        call work
        pop ecx
        loop again
        hlt
    work:
        add ebx, [esp+4]
        ret""")
    assert board.regs[EBX] == 500 * 501 // 2
    assert board.exits(at.EXIT_FAULT) < 100


@isolated
def test_writes_are_forgotten_with_the_cache() -> None:
    """After a flush of the cache a page that was mixed is code again, and still right."""
    board = same("""
        mov ecx, 20
    again:
        mov [victim+1], ecx
    victim:
        mov eax, 0
        add ebx, eax
        loop again
        hlt""")
    assert CODE >> 12 in board.engine.contexts.code.mixed
    board.engine.contexts.flush_cache()
    assert not board.engine.contexts.code.mixed
    board.regs[EBX] = 0
    board.run(None)
    assert board.regs[EBX] == 210


@isolated
def test_mixed_begins_after_a_few_writes() -> None:
    board = aliased_board()
    board.run(f"mov ecx, {MIXED_AFTER - 2}\nagain: mov byte ptr [data], cl\nloop again\nhlt\ndata: nop")
    assert CODE >> 12 not in board.engine.contexts.code.mixed
    board.run(f"mov ecx, {MIXED_AFTER + 1}\nagain: mov byte ptr [data], cl\nloop again\nhlt\ndata: nop")
    assert CODE >> 12 in board.engine.contexts.code.mixed


@isolated
def test_patched_immediate_is_renewed_in_place() -> None:
    """A constant that is changed before each use costs no translation each time."""
    board = aliased_board()
    board.load("nop\nmov eax, 1\nadd eax, 5\nret", CODE + 0x1000)
    board.run(f"""
        mov esi, {CODE + 0x1000:#x}
        mov ecx, 1000
    again:
        mov [esi+2], ecx
        mov byte ptr [esi+8], cl
        and byte ptr [esi+8], 0x7f
        call esi
        add ebx, eax
        loop again
        hlt""")
    assert board.regs[EBX] == sum(n + (n & 0x7F) for n in range(1, 1001))
    assert board.exits(at.EXIT_STALE) > 1900
    assert board.engine.contexts.cache.translations < 60


@isolated
def test_patched_opcodes_and_immediates_in_turns() -> None:
    """What may be renewed and what must be translated anew, mixed at random."""
    same(f"""
        mov esi, {CODE + 0x1000:#x}
        mov word ptr [esi+5], 0xc390
        mov ecx, 400
        mov edx, 12345
    again:
        imul edx, edx, 0x41c64e6d
        add edx, 12345
        mov edi, edx
        shr edi, 20
        and edi, 7
        mov al, [choices+edi]
        mov [esi], al
        mov [esi+1], edx
        mov eax, edi
        call esi
        add ebx, eax
        loop again
        hlt
    choices:
        .byte 0xb8, 0xb8, 0xb8, 0x05, 0x05, 0x2d, 0x35, 0x25""")
