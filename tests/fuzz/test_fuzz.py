"""The kept inputs and some hundred random ones, executed for real; and that a broken promise would be seen.

BACKPLANE_FUZZ_INPUTS sets how many random inputs there are (default 600), BACKPLANE_FUZZ_SEED their seed.
"""

from __future__ import annotations

import itertools
import os

import pytest

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node.cpu import EAX
from cpu_node.decode import Undefined
from cpu_node.emit_soft import templates_of
from cpu_node.line import page_line
from cpu_node.translate import Translation, translate
from tests.cpu_node.board import CODE, DATA
from tests.cpu_node.child import isolated
from tests.fuzz.case import AT_PAGE_END, HEAD, NEXT_ABSENT, PAGE, USER, VERIFIED, FuzzCase, pages, parse
from tests.fuzz.host_code import stray
from tests.fuzz.inputs import inputs, read_corpus
from tests.fuzz.machine import BORDER, GUARD, LOW, RAM, Machine, used_below
from tests.fuzz.target import POSITION, Broken, check, check_decoder, differences

INPUTS = int(os.environ.get("BACKPLANE_FUZZ_INPUTS", "600"))
SHARDS = 4
SEED = int(os.environ.get("BACKPLANE_FUZZ_SEED", "1"))
WRAPPING = (
    "a3 ff ff ff ff", "c7 80 00 00 00 80 01 00 00 00", "fd bf 01 00 00 00 b9 09 00 00 00 f3 aa",
    "bf fd ff ff ff b9 09 00 00 00 f3 ab", "0f ae 05 f0 ff ff ff", "0f ab 05 00 00 00 00",
)  # fmt: skip
REFUSED = (
    ("0f 0b", 6, None), ("c5 f8 77", 6, None), ("f0 90", 6, None), ("d6 0f ff", 6, None),
    ("66" * 15 + "90", 13, 0), ("0f 01 f9", 6, None),
)  # fmt: skip


@isolated
def test_kept_inputs() -> None:
    machine = Machine()
    corpus = read_corpus()
    assert corpus
    for data in corpus:
        check(data, machine)
    assert machine.damage() == []


@pytest.mark.parametrize("shard", range(SHARDS))
@isolated
def test_random_inputs(shard: int) -> None:
    machine = Machine()
    for data in itertools.islice(inputs(SEED + shard, read_corpus()), INPUTS // SHARDS):
        check(data, machine)
    assert machine.damage() == []


@isolated
def test_a_write_outside_of_the_window_is_seen() -> None:
    machine = Machine()
    machine.run(parse(bytes(HEAD)), simulate=False)
    assert machine.damage() == []
    window = machine.board.engine.contexts.space.kernel.ha
    for ha in (window - BORDER - 8, window + GUARD + BORDER, window + 2 * GUARD - 2 * BORDER):
        host.view8(ha, 1)[0] = 1
        assert len(machine.damage()) == 1
        host.advise(ha & -PAGE, PAGE, host.MADV_DONTNEED)
        assert machine.damage() == []
    host.view8(at.CODE, 1)[0] ^= 1
    assert machine.damage() == ["the stubs were overwritten"]


@isolated
def test_a_write_that_a_wrong_entry_would_lead_to_is_seen() -> None:
    """Where the software TLB's arithmetic goes without an entry, or past one; and where nothing is mapped."""
    machine = Machine()
    case = parse(bytes((USER, 0, 0)) + bytes.fromhex("c6 05 00 00 20 00 07 f4")).variants[-1]
    assert case.soft
    low = [] if used_below(GUARD) else [LOW]  # an interpreter that isn't position-independent lies there
    for ha in (*low, at.RAM - 1, at.RAM + RAM, at.TLB_READ - BORDER - 1):
        assert machine.run(case, simulate=False).ram[DATA][0] == 7
        assert machine.damage() == []
        host.view8(ha, 1)[0] = 1
        assert len(machine.damage()) == 1
        host.advise(ha & -PAGE, PAGE, host.MADV_DONTNEED)
    machine.board.ram[CODE - 1] ^= 1
    machine.run(case, simulate=False)
    assert machine.damage() == ["pages of RAM that are mapped nowhere were written"]


@isolated
def test_cases_of_an_absent_page_and_of_exchanged_pages_are_compared() -> None:
    machine = Machine()
    for registers in (0, 1):
        case = parse(bytes((USER | NEXT_ABSENT, registers, 0)) + bytes.fromhex("c6 05 00 70 20 00 07 f4"))
        for variant in case.variants:
            outcome = machine.run(variant, simulate=False)
            assert not outcome.own_tables
            assert outcome.ram[DATA][0xA000 if registers else 0x7000] == 7


@isolated
def test_an_operand_next_to_the_window_does_not_leave_it() -> None:
    """A store that begins at the last byte, an address that wraps, a string that runs over the end."""
    machine = Machine()
    for how in (0, USER, VERIFIED):
        for code in WRAPPING:
            check(bytes((how, 0, 0)) + bytes.fromhex(code), machine)
    assert machine.damage() == []


@isolated
def test_what_is_no_instruction_is_refused_where_it_stands() -> None:
    machine = Machine()
    for code, vector, error in REFUSED:
        for how in (0, USER, USER | VERIFIED, AT_PAGE_END):
            case = parse(bytes((how, 0, 31)) + bytes.fromhex(code))
            for simulate in (False, True):
                (fault,) = machine.run(case, simulate).faults
                assert (fault.vector, fault.error) == (vector, error), code
                assert fault.eip == CODE + case.offset + (code[:2] == "d6")


@isolated
def test_an_instruction_that_runs_into_an_absent_page() -> None:
    machine = Machine()
    data = bytes((USER | AT_PAGE_END | NEXT_ABSENT, 0, 2)) + bytes.fromhex("b8 01 02 03 04")
    check(data, machine)
    (fault,) = machine.run(parse(data), simulate=False).faults
    assert (fault.vector, fault.cr2, fault.eip) == (14, CODE + PAGE, CODE + PAGE - 3)


@isolated
def test_a_guest_that_runs_on_is_stopped() -> None:
    machine = Machine()
    for code in ("eb fe", "f3 90 eb fc", "e2 fe"):
        case = parse(bytes((0, 0, 0)) + bytes.fromhex(code))
        for simulate in (False, True):
            assert machine.run(case, simulate).end in ("time", "halt")
    assert machine.run(parse(bytes.fromhex("000000 ebfe")), simulate=False).end == "time"


@isolated
def test_runs_are_alike_and_differences_are_told() -> None:
    machine = Machine()
    case = parse(bytes((USER, 7, 3)) + bytes.fromhex("40 a3 00 00 20 00 f4"))
    a, b = machine.run(case, simulate=False), machine.run(case, simulate=False)
    assert differences(case, a, b) == []
    assert a.ram[DATA][:4] == a.regs[EAX].to_bytes(4, "little")
    b.regs = (b.regs[0] ^ 1, *b.regs[1:])
    b.fx = b.fx[:40] + b"\x55" + b.fx[41:]
    b.ram[DATA] = b"\x99" + b.ram[DATA][1:]
    told = "; ".join(differences(case, a, b))
    assert "registers" in told
    assert "FPU" in told
    assert f"RAM from {DATA:#x}" in told


def test_any_bytes_are_an_input() -> None:
    for data in (b"", b"\xff", bytes(HEAD), b"\xff" * 200, *itertools.islice(inputs(3), 300)):
        case = parse(data)
        page, following = pages(case)
        assert len(page) == len(following) == PAGE
        assert 0 <= case.offset < PAGE
        check(data)
    assert list(itertools.islice(inputs(3), 50)) == list(itertools.islice(inputs(3), 50))


def test_the_decoder_says_undefined() -> None:
    assert check_decoder(parse(bytes(HEAD) + b"\x0f\x0b")).row.mnemonic == "ud2"  # type: ignore[union-attr]
    assert check_decoder(parse(bytes(HEAD) + b"\x0f\xff")) is Undefined


def _translated(case: FuzzCase) -> tuple[Translation, object]:
    line = page_line(CODE >> 12, CODE >> 12, case.mode, pages(case)[0], case.verified)
    return translate(line, case.offset, templates_of(case.mode), POSITION), line


@pytest.mark.parametrize(
    ("host_code", "why"),
    [
        ("89 03", "not through the window"),  # mov [rbx], eax
        ("65 89 03", "a 64-bit address"),  # mov gs:[rbx], eax
        ("65 41 89 00", "a 64-bit address"),  # mov gs:[r8], eax, and r8 may be anything
        ("44 8d 00 65 41 0f bb 18", "a 64-bit address"),  # lea r8d, [rax]; btc gs:[r8], ebx
        ("aa", "not in the window"),  # stosb, RDI as it is
        ("50", "the guest's stack"),  # push rax
        ("c3", "must not be here"),
        ("0f 05", "must not be here"),
        ("e9 00 00 10 00", "into nowhere"),
        ("d7", "not through the window"),  # xlatb
        ("0f f7 c1", "not through the window"),  # maskmovq
        ("41 89 87 00 00 10 00", "not through the window"),  # behind the record
        ("06", "no host instruction"),
    ],
)
def test_stray_host_code_is_seen(host_code: str, why: str) -> None:
    made, line = _translated(parse(bytes(HEAD) + b"\x90\xeb\xfd"))
    assert stray(made, line) == []  # type: ignore[arg-type]
    added = bytes.fromhex(host_code)
    made.code += added
    made.chunk.end += len(added)
    assert any(why in line_ for line_ in stray(made, line))  # type: ignore[arg-type]


def test_a_broken_promise_names_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.target.stray", lambda made, line: ["stray"])
    with pytest.raises(Broken, match="000000b8"):
        check(bytes.fromhex("000000b8"))
