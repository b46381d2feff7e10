"""One fuzzing input: decode and translate it, look at the host code, run it, compare with the simulator.

What must hold for any bytes:

- the decoder answers, with an instruction of at most 15 bytes or with one of its three exceptions, and takes
  no more bytes than it says;
- the translator answers, and its host code reaches nothing but guest memory (host_code.py);
- what is no instruction is #UD for the guest, what is too long #GP(0), with EIP at it;
- the engine comes back, with nothing written outside of guest memory (machine.py);
- translated and simulated runs end in the same state;
- the translator's two loops, in Python and in machine code, make the same.

Flat code of CPL 3 is translated and run in two ways, with a window and with the software TLB.

A broken promise is a Broken exception with everything that is needed to see why.
"""

from __future__ import annotations

from cpu_node import mode as modes
from cpu_node.decode import MAX_LENGTH, Insn, TooLong, Truncated, Undefined, decode
from cpu_node.emit_soft import templates_of
from cpu_node.errors import GP, SS, UD
from cpu_node.line import page_line
from cpu_node.translate import translate
from tests.cpu_node.board import CODE
from tests.cpu_node.test_fast import Pair
from tests.fuzz.case import PAGE, FuzzCase, pages, parse
from tests.fuzz.host_code import stray
from tests.fuzz.machine import TABLES, Machine, Outcome, without_marks

PAGE_START = 64
POSITION = 0x2000  # where in the code cache the translation would lie
# Which of several accesses of one instruction faults, and what it has done before, is up to the processor.
SEVERAL_ACCESSES = frozenset(
    ("pusha", "popa", "enter", "call", "retf", "iret", "maskmovq", "maskmovdqu", "fnsave", "frstor",
     "fnstenv", "fldenv", "fxsave", "fxrstor", "cmpsb", "cmpsv", "bound", "les", "lds", "lss", "lfs", "lgs",
     "jmp")
)  # fmt: skip
REPEATS = b"\xf2\xf3"
STORES_POINTERS = (0xD9, 0xDD, 0xAE)  # opcodes of FNSTENV, FNSAVE, FXSAVE: x87 pointers are the host's


class Broken(AssertionError):
    """A promise was broken by an input."""


def check(data: bytes, machine: Machine | None = None) -> None:
    """All of it; without a machine nothing is executed.  Raises Broken."""
    case = parse(data)
    first = check_decoder(case)
    for variant in case.variants:
        check_translator(variant, data)
        if machine is not None:
            check_inner_loop(machine, variant, data)
    if machine is not None:
        check_execution(machine, case, first, data)


def check_decoder(case: FuzzCase) -> Insn | type[Exception]:
    """What is at the start of the code."""
    page, following = pages(case)
    text = page[case.offset :] + following
    try:
        insn = decode(text, 0, case.code16)
    except (Undefined, TooLong) as exc:
        return type(exc)
    except Truncated as exc:
        raise Broken(f"truncated, of {len(text)} bytes: {text[:16].hex(' ')}") from exc
    if not 1 <= insn.length <= MAX_LENGTH or not 0 < insn.path <= insn.length:
        raise Broken(f"length {insn.length}, path {insn.path}: {text[:16].hex(' ')}")
    exact = text[: insn.length]
    if decode(exact, 0, case.code16) != insn:
        raise Broken(f"depends on more than its {insn.length} bytes: {text[:16].hex(' ')}")
    for shorter in range(insn.length):
        try:
            decode(exact[:shorter], 0, case.code16)
        except (Truncated, Undefined, TooLong):
            continue
        raise Broken(f"{shorter} of {insn.length} bytes are enough: {text[:16].hex(' ')}")
    return insn


def check_translator(case: FuzzCase, data: bytes) -> None:
    """Its answer, and what the host code reaches."""
    if case.mode & modes.INTERPRETED:
        return
    page, _ = pages(case)
    line = page_line(CODE >> 12, CODE >> 12, case.mode, page, case.verified)
    made = translate(line, case.offset, templates_of(case.mode), POSITION, ahead=True)
    wrong = stray(made, line)
    if wrong:
        raise Broken(f"host code of {data.hex()}: " + "; ".join(wrong))


def check_inner_loop(machine: Machine, case: FuzzCase, data: bytes) -> None:
    """The translator's loops, in machine code and in Python, make the same of a page full of the code."""
    if case.mode & modes.INTERPRETED or not case.code:
        return
    page = (bytes(case.offset % PAGE_START) + case.code * (PAGE // len(case.code) + 1))[:PAGE]
    cache = machine.board.engine.contexts.cache
    templates = cache.templates.setdefault(case.mode, templates_of(case.mode))
    pair = Pair(cache._fast, templates, page, case.mode, CODE)
    try:
        for offset in (case.offset, case.offset % PAGE_START, PAGE - 1):
            if offset not in pair.lines[0].host:
                pair.translate(offset)
    except AssertionError as exc:
        raise Broken(f"{data.hex()}: the inner loops differ: {exc}") from exc


def check_execution(machine: Machine, case: FuzzCase, first: Insn | type[Exception], data: bytes) -> None:
    """Run it translated, in each way, and simulated."""
    name = data.hex()
    simulated = machine.run(case, simulate=True)
    runs = [("simulated", simulated)]
    runs += [(modes.describe(v.mode), machine.run(v, simulate=False)) for v in case.variants]
    for how, outcome in runs:
        wrong = "" if outcome.end == "time" else _refusal(case, first, outcome)
        if wrong:
            raise Broken(f"{how}, {name}: {wrong}")
    for how, outcome in runs[1:]:
        if "time" in (outcome.end, simulated.end):
            continue
        if outcome.own_tables or simulated.own_tables:
            continue  # and what was cached of them may or may not be used
        wrong = "; ".join(differences(case, outcome, simulated))
        if wrong:
            raise Broken(f"{name}: translated ({how}) and simulated differ: {wrong}")


def _refusal(case: FuzzCase, first: Insn | type[Exception], outcome: Outcome) -> str:
    """What is no instruction at the start must have been refused."""
    if isinstance(first, Insn) or (case.next_absent and case.offset > PAGE - MAX_LENGTH):
        return ""
    vector, error = (UD, None) if first is Undefined else (GP, 0)
    fault = outcome.faults[0] if outcome.faults else None
    if fault is None or (fault.vector, fault.error, fault.eip) != (vector, error, CODE + case.offset):
        return f"vector {vector} expected, got {fault}"
    return ""


def differences(case: FuzzCase, a: Outcome, b: Outcome) -> list[str]:
    """What differs between two runs; empty where it is up to the processor."""
    out = [
        f"{name} {x!r} and {y!r}"
        for name, x, y in (
            ("end", a.end, b.end), ("eip", hex(a.eip), hex(b.eip)), ("eflags", hex(a.eflags), hex(b.eflags)),
            ("registers", [*map(hex, a.regs)], [*map(hex, b.regs)]), ("fault", _faults(a), _faults(b)),
        )
        if x != y
    ]  # fmt: skip
    if _fpu(a.fx) != _fpu(b.fx):
        out.append(f"FPU {_fpu(a.fx).hex()} and {_fpu(b.fx).hex()}")
    if a.ram != b.ram and not any(byte in case.code for byte in STORES_POINTERS):
        out += [_memory(first, _comparable(a, first), _comparable(b, first)) for first in a.ram]
        out = [line for line in out if line]
    up_to_the_processor = (
        _has_several_accesses(case, a, b) or _wraps(case, a) or _wraps(case, b)
        or _repeats_over_itself(case, a) or _repeats_over_itself(case, b)
    )  # fmt: skip
    return [] if out and up_to_the_processor else out


def _comparable(outcome: Outcome, first: int) -> bytes:
    """A region; accessed and dirty bits may be set for an access that then faults."""
    region = outcome.ram[first]
    if first:
        return region
    start, end = TABLES
    return region[:start] + without_marks(region[start:end]) + region[end:]


def _memory(first: int, x: bytes, y: bytes) -> str:
    if x == y:
        return ""
    place = next(i for i in range(len(x)) if x[i] != y[i])
    return f"RAM from {first + place:#x}: {x[place : place + 8].hex()} and {y[place : place + 8].hex()}"


def _fpu(fx: bytes) -> bytes:
    """Without the last instruction's opcode and pointers, and the mask of MXCSR, which FXRSTOR ignores."""
    return fx[:6] + fx[24:28] + fx[32:]


def _faults(outcome: Outcome) -> list[tuple[int, int | None, int | None, int]]:
    faults = outcome.faults
    return [(f.vector, f.error, f.cr2 & -PAGE if f.cr2 is not None else None, f.eip) for f in faults]


def _last(case: FuzzCase, outcome: Outcome) -> Insn | None:
    """The instruction that faulted."""
    start = outcome.eip - CODE
    if outcome.end != "fault" or not 0 <= start < len(outcome.ram[CODE]):
        return None
    try:
        return decode(outcome.ram[CODE][start : start + 2 * MAX_LENGTH], 0, case.code16)
    except (Undefined, TooLong, Truncated):
        return None


def _has_several_accesses(case: FuzzCase, a: Outcome, b: Outcome) -> bool:
    insn = _last(case, a) if a.end == b.end and a.eip == b.eip else None
    return insn is not None and insn.row.mnemonic in SEVERAL_ACCESSES


def _repeats_over_itself(case: FuzzCase, outcome: Outcome) -> bool:
    """Is a repeated string instruction that stores to its own bytes still itself in the next iteration?"""
    where = slice(case.offset, case.offset + len(case.code))
    if not any(byte in case.code for byte in REPEATS):
        return False
    return outcome.ram[CODE][where] != b"".join(pages(case))[where]


def _wraps(case: FuzzCase, outcome: Outcome) -> bool:
    """Did an operand past the last offset end the run?  Whether it may is up to the processor."""
    insn = _last(case, outcome)
    if insn is None or outcome.faults[-1].vector not in (SS, GP):
        return False
    width = insn.row.memory_width(insn.opsize16)
    if not insn.is_memory:
        return insn.row.action in ("string", "moffs")
    pieces = [0 if r is None else outcome.regs[r] for r in (insn.base, insn.index)]
    offset = pieces[0] + (pieces[1] << insn.scale) + insn.disp & (0xFFFF if insn.addr16 else 0xFFFFFFFF)
    return offset + width > 1 << 32
