"""The judge: what agrees, what is masked, what has no verdict, and that everything else is a difference."""

from __future__ import annotations

from dataclasses import replace

from tests.insn.conform import FIRST_FAMILY, explain, shares
from tests.insn.exclusions import Reason
from tests.insn.executors import TRANSLATED
from tests.insn.generate import VARIATIONS, Generator
from tests.insn.judge import Verdict, judge, no_verdict
from tests.insn.report import Failure
from tests.insn.state import CF, OF, ZF, Blind, Case, CpuState, Page, Stop, fx_image

CODE, DATA = 0x20000000, 0x30000000
CASE = Case(
    CODE, (0,) * 8, 0, fx_image(), (Page(CODE, b"\xf4" * 4096, False), Page(DATA, bytes(4096), True)), 2
)  # fmt: skip
STATE = CpuState(Stop("hlt"), CODE + 2, CASE.regs, ZF, CASE.fx, {})


def verdict(case: Case, native: CpuState, other: CpuState) -> Verdict | Reason:
    return judge(case, native, other)[0]


def test_the_same_agrees() -> None:
    assert verdict(CASE, STATE, replace(STATE)) is Verdict.AGREED


def test_anything_else_differs_and_is_told() -> None:
    page = b"\1" + bytes(4095)
    for other in (
        replace(STATE, eip=CODE), replace(STATE, regs=(1, *CASE.regs[1:])), replace(STATE, eflags=ZF | CF),
        replace(STATE, changed={DATA: page}), replace(STATE, fx=fx_image(tags=1)),
        replace(STATE, stop=Stop("fault", 13)), replace(STATE, stop=Stop("hung")),
        replace(STATE, selectors=(0, *STATE.selectors[1:])),
    ):  # fmt: skip
        found, lines = judge(CASE, STATE, other)
        assert found is Verdict.DIFFERS
        assert len(lines) == 1


def test_undefined_flags_are_masked_and_others_are_not() -> None:
    case = replace(CASE, blind=Blind(eflags=OF))
    assert verdict(case, STATE, replace(STATE, eflags=ZF | OF)) is Verdict.MASKED
    assert verdict(case, STATE, replace(STATE, eflags=ZF | OF | CF)) is Verdict.DIFFERS
    assert verdict(case, STATE, STATE) is Verdict.AGREED


def test_what_does_not_end_on_the_host_has_no_verdict() -> None:
    assert no_verdict(STATE) is None
    assert no_verdict(replace(STATE, stop=Stop("fault", 6))) is None
    for kind, reason in (
        ("hung", Reason.NO_END), ("syscall", Reason.SYSTEM_CALL), ("crashed", Reason.ENDED_PROCESS)
    ):  # fmt: skip
        assert no_verdict(replace(STATE, stop=Stop(kind))) is reason


def test_an_enter_that_pushes_into_its_display_has_no_verdict_when_begun_again() -> None:
    changed = {DATA: b"\1" + bytes(4095)}
    regs = (0, 0, 0, 0, DATA + 0x104, DATA + 0xC8, 0, 0)
    code = bytes.fromhex("c800101f").ljust(4096, b"\xf4")
    case = replace(CASE, regs=regs, pages=(Page(CODE, code, False), CASE.pages[1]), rows=("C8 enter",))
    state = replace(STATE, regs=regs)
    assert verdict(case, state, replace(state, changed=changed, served=1)) is Reason.OWN_DISPLAY
    assert verdict(case, state, replace(state, changed=changed)) is Verdict.DIFFERS
    apart = replace(case, regs=(*regs[:5], DATA + 0x800, 0, 0))
    assert verdict(apart, state, replace(state, changed=changed, served=1)) is Verdict.DIFFERS


def test_an_operand_past_4_gib_has_no_verdict() -> None:
    limit = replace(STATE, stop=Stop("fault", 13))
    assert verdict(CASE, limit, replace(STATE, stop=Stop("fault", 14, 4, 0xFFFFFFF0))) is Reason.WRAPS
    assert verdict(CASE, limit, replace(STATE, stop=Stop("fault", 14, 4, DATA))) is Verdict.DIFFERS
    assert verdict(CASE, limit, replace(STATE, stop=Stop("fault", 14, 4, 8))) is Verdict.DIFFERS


def test_the_order_of_faults_counts_for_plain_operands() -> None:
    native = replace(STATE, stop=Stop("fault", 14, 4, DATA))
    other = replace(STATE, stop=Stop("fault", 14, 4, DATA + 4096))
    assert verdict(CASE, native, other) is Verdict.DIFFERS
    assert verdict(replace(CASE, rows=("A6 cmpsb",)), native, other) is Reason.CMPS_ORDER
    long = replace(CASE, blind=Blind(fault_page_only=True))
    assert verdict(long, native, other) is Reason.OPERAND_ORDER
    assert verdict(long, native, replace(other, eip=CODE)) is Verdict.DIFFERS


def test_every_family_is_dealt_out_once() -> None:
    dealt = [list(share) for share in shares(10_000, 3, 60)]
    assert all(dealt)
    everything = sorted(number for share in dealt for number in share)
    assert everything == list(range(FIRST_FAMILY, FIRST_FAMILY + 10_000 // VARIATIONS))
    assert [list(share) for share in shares(10_000, 3, -1)] == [[], [], []]


def test_a_difference_comes_with_the_command_that_repeats_it() -> None:
    index = FIRST_FAMILY * VARIATIONS
    case = Generator(1).case(index)
    text = explain([Failure(1, index, TRANSLATED, case, ("eip: expected 1, got 2",))])
    assert f"python -m tests.insn.repro 1:{index} --executor 'translated'" in text
    assert "they agree" in text  # shrunk by running it again, and it was made up
