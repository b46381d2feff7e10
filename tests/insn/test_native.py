"""The native runner itself: outcomes that the manuals give, so that the oracle can be believed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.insn.exclusions import Reason
from tests.insn.executors import NATIVE
from tests.insn.generate import Generator
from tests.insn.judge import judge
from tests.insn.state import (
    AF,
    CF,
    DF,
    ECX,
    EDI,
    ESI,
    ESP,
    FX_ST,
    FX_XMM,
    OF,
    PAGE_SIZE,
    PF,
    REG_NAMES,
    SF,
    STATUS_FLAGS,
    ZF,
    Case,
    CpuState,
    Page,
    Stop,
    differences,
    fx_image,
)  # fmt: skip
from tests.insn.worker import Worker

CODE, DATA = 0x20000000, 0x30000000
READ_ONLY, ABSENT = DATA + PAGE_SIZE, DATA + 2 * PAGE_SIZE
DEFAULT_FX = fx_image()
ONE, TWO = struct.pack("<QH", 1 << 63, 0x3FFF), struct.pack("<QH", 1 << 63, 0x4000)


@pytest.fixture(scope="module")
def native() -> Iterator[Worker]:
    with Worker(NATIVE) as worker:
        yield worker


def make(code: str, eflags: int = 0, fx: bytes = DEFAULT_FX, **regs: int) -> Case:
    """A code page, a writable page of zeros, a read-only page of 55h, nothing after it."""
    raw = bytes.fromhex(code)
    return Case(
        eip=CODE,
        regs=tuple(regs.get(name, 0) for name in REG_NAMES),
        eflags=eflags,
        fx=fx,
        pages=(
            Page(CODE, raw.ljust(PAGE_SIZE, b"\xf4"), False),
            Page(DATA, bytes(PAGE_SIZE), True),
            Page(READ_ONLY, b"\x55" * PAGE_SIZE, False),
        ),
        code_length=len(raw),
    )


def test_add_sets_registers_and_flags(native: Worker) -> None:
    state = native.run(make("01 d8", eax=0xFFFFFFFF, ebx=1))  # add eax, ebx
    assert state.stop == Stop("hlt")
    assert state.eip == CODE + 2
    assert state.regs == (0, 0, 0, 1, 0, 0, 0, 0)
    assert state.eflags & STATUS_FLAGS == CF | PF | AF | ZF


def test_initial_flags_and_all_registers_arrive(native: Worker) -> None:
    flags = CF | PF | SF | OF | DF
    values = tuple(0x11111111 * (i + 1) for i in range(8))
    state = native.run(replace(make("", eflags=flags), regs=values))
    assert state.regs == values
    assert state.eflags & (STATUS_FLAGS | DF) == flags


def test_memory_is_written_and_only_changed_pages_come_back(native: Worker) -> None:
    state = native.run(make("c7 05 02 00 00 30 78 56 34 12"))  # mov dword [DATA+2], 12345678h
    assert list(state.changed) == [DATA]
    assert state.changed[DATA][:8] == bytes.fromhex("0000 78563412 0000")


@pytest.mark.parametrize(
    ("code", "stop"),
    [
        ("f7 f3", Stop("fault", 0)),  # div ebx
        ("cc", Stop("fault", 3)),
        ("bc 40 00 00 30 9c 81 0c 24 00 01 00 00 9d 90", Stop("fault", 1)),  # POPF sets TF
        ("0f 0b", Stop("fault", 6)),
        ("a1 00 20 00 30", Stop("fault", 14, 4, ABSENT)),  # read of an absent page
        ("a3 00 20 00 30", Stop("fault", 14, 6, ABSENT)),
        ("a3 00 10 00 30", Stop("fault", 14, 7, READ_ONLY)),  # write to a read-only page
        ("a1 fe 1f 00 30", Stop("fault", 14, 4, ABSENT)),  # dword across into the absent page
        ("a3 fe 0f 00 30", Stop("fault", 14, 7, READ_ONLY)),
        ("fa", Stop("fault", 13, 0)),  # cli at CPL 3
        ("0f 28 05 08 00 00 30", Stop("fault", 13, 0)),  # movaps, not aligned
        ("0f ae 15 00 00 00 30 0f 5e c1", Stop("fault", 19)),  # ldmxcsr 0; divps 0/0
        ("cd 80", Stop("syscall")),
        ("eb fe", Stop("hung")),
    ],
)
def test_stops(native: Worker, code: str, stop: Stop) -> None:
    assert native.run(make(code)).stop == stop


def test_a_fault_leaves_eip_at_the_instruction_and_a_trap_behind_it(native: Worker) -> None:
    assert native.run(make("90 0f 0b")).eip == CODE + 1
    assert native.run(make("90 cc")).eip == CODE + 2
    assert native.run(make("f7 f3", edx=5)).regs[2] == 5


def test_fetch_from_an_absent_page(native: Worker) -> None:
    state = native.run(make("e9 fb 1f 00 10"))  # jmp ABSENT
    assert (state.stop.vector, state.stop.va, state.eip) == (14, ABSENT, ABSENT)
    assert state.stop.error & 7 == 4


def test_a_string_instruction_stops_in_the_middle(native: Worker) -> None:
    state = native.run(make("f3 a4", ecx=0x900, esi=DATA, edi=DATA + 0x800))  # rep movsb
    assert state.stop == Stop("fault", 14, 7, READ_ONLY)
    assert (state.eip, state.regs[ECX]) == (CODE, 0x100)
    assert (state.regs[ESI], state.regs[EDI]) == (DATA + 0x800, READ_ONLY)


def test_direction_flag(native: Worker) -> None:
    state = native.run(make("f3 aa", eflags=DF, eax=0x77, ecx=3, edi=DATA + 9))  # rep stosb downwards
    assert state.changed[DATA][6:11] == b"\0\x77\x77\x77\0"
    assert state.regs[EDI] == DATA + 6


def test_x87_state_in_and_out(native: Worker) -> None:
    fx = fx_image(status=6 << 11, tags=0xC0, st=(ONE, TWO))  # TOP = 6
    state = native.run(make("de c1", fx=fx))  # faddp: 1 + 2
    assert state.fx[FX_ST : FX_ST + 10] == struct.pack("<QH", 3 << 62, 0x4000)
    assert state.fx[4] == 0x80
    assert struct.unpack_from("<H", state.fx, 2)[0] >> 11 & 7 == 7


def test_sse_state_in_and_out(native: Worker) -> None:
    fx = fx_image(xmm=(bytes(16), bytes(range(16))), mxcsr=0x1F81)
    state = native.run(make("0f 28 c1", fx=fx))  # movaps xmm0, xmm1
    assert state.fx[FX_XMM : FX_XMM + 16] == bytes(range(16))
    assert struct.unpack_from("<I", state.fx, 24)[0] == 0x1F81


def test_a_pending_x87_exception_is_raised_by_the_next_waiting_instruction(native: Worker) -> None:
    fx = fx_image(control=0x37E, status=0x8081)  # invalid operation: unmasked and flagged
    state = native.run(make("90 9b", fx=fx))
    assert (state.stop.vector, state.eip) == (16, CODE + 1)


def test_self_modified_code_runs_as_modified(native: Worker) -> None:
    case = make("c6 05 08 00 00 20 2a b8 00 00 00 00")  # mov byte [CODE+8], 42; mov eax, 0
    case = replace(case, pages=(case.pages[0]._replace(writable=True), *case.pages[1:]))
    assert native.run(case).regs[0] == 42


def test_selectors_are_the_flat_ones_and_can_be_damaged_without_harm(native: Worker) -> None:
    state = native.run(make("8c c8 8c d1 8c da 8c c3 8c e6 8c ef"))  # mov from cs, ss, ds, es, fs, gs
    assert state.regs[:4] == (0x23, 0x2B, 0x2B, 0x2B)
    assert state.regs[6:] == (0, 0)
    state = native.run(make("8e e0 8e e8 31 c0 8e d8", eax=0x2B))  # fs and gs = 2Bh, ds = 0
    assert state.stop == Stop("hlt")
    assert native.run(make("a1 00 10 00 30")).regs[0] == 0x55555555


def test_pages_come_and_go_between_cases(native: Worker) -> None:
    read = make("a1 00 00 00 30")
    assert native.run(read).stop == Stop("hlt")
    gone = replace(read, pages=(read.pages[0], read.pages[2]))
    assert native.run(gone).stop == Stop("fault", 14, 4, DATA)
    write = make("a3 00 00 00 30")
    locked = replace(write, pages=tuple(page._replace(writable=False) for page in write.pages))
    assert native.run(locked).stop == Stop("fault", 14, 7, DATA)
    assert native.run(write).stop == Stop("hlt")


def test_a_case_that_ends_the_process_is_reported_and_the_next_one_runs(native: Worker) -> None:
    escape = make("ea 00 00 00 20 33 00")  # jmp 33:CODE: 64-bit mode
    native.send([make("40"), escape, make("40 40")])
    states = native.receive()
    assert [s and s.stop.kind for s in states] == ["hlt", "crashed", "hlt"]
    assert [s and s.regs[0] for s in states] == [1, 0, 2]


def test_the_same_case_twice_gives_the_same_outcome(native: Worker) -> None:
    generator = Generator(11)
    cases = [generator.case(index) for index in range(400)]
    native.send(cases)
    first = native.receive()
    native.send(cases)
    for case, a, b in zip(cases, first, native.receive(), strict=True):
        assert a is not None
        assert b is not None
        assert differences(case, a, b) == []


def test_a_nested_enter_that_faults_at_its_end_begins_again_with_what_it_has_pushed(native: Worker) -> None:
    """So says the host, and so does the executor that serves the fault: Reason.OWN_DISPLAY."""
    stack = bytes(range(256)) * 16
    whole = make("c8 00 10 1f", esp=DATA + 0x1104, ebp=DATA + 0x10C8)
    pages = whole.pages[0], Page(DATA, bytes(PAGE_SIZE), True), Page(DATA + PAGE_SIZE, stack, True)
    whole = replace(whole, pages=pages, rows=("C8 enter",))
    absent = replace(whole, pages=tuple(page for page in whole.pages if page.va != DATA))
    faulted = native.run(absent)
    assert str(faulted.stop) == f"#PF(0x6) at va {DATA + 0x84:#010x}"
    left = tuple(page._replace(data=faulted.changed.get(page.va, page.data)) for page in whole.pages)
    again, never = native.run(replace(whole, pages=left)), native.run(whole)
    with Worker("restarted") as executor:
        restarted = executor.run(whole)
    assert restarted.served == 3  # the code, both pages of the stack
    after = {p.va: again.changed.get(p.va, p.data) for p in left}
    assert restarted.changed == {va: after[va] for va in restarted.changed}
    assert (again.regs, again.eip) == (restarted.regs, restarted.eip)
    assert restarted.changed != never.changed
    assert judge(whole, never, restarted) == (Reason.OWN_DISPLAY, [])


def test_differences_say_what_differs() -> None:
    case = make("90", esp=DATA + 8)
    a = CpuState(Stop("hlt"), CODE + 1, case.regs, 0, case.fx, {})
    page = b"\x07".rjust(17, b"\0").ljust(PAGE_SIZE, b"\0")
    b = CpuState(
        Stop("fault", 14, 4, 0x1234),
        CODE,
        (*case.regs[:ESP], 9, *case.regs[ESP + 1 :]),
        ZF,
        fx_image(tags=1, xmm=(b"\x01" * 16,)),
        {DATA: page},
    )
    assert differences(case, a, a) == []
    text = "\n".join(differences(case, a, b))
    for part in (
        "stop: expected hlt, got #PF(0x4) at va 0x00001234", "eip: expected 0x20000001, got 0x20000000",
        "esp: expected 0x30000008, got 0x00000009", "flags ZF", "FTW", "xmm0",
        "memory 0x30000010: expected 00, got 07",
    ):  # fmt: skip
        assert part in text
