"""Cases and outcomes of the instruction tests, and how two outcomes are compared.

A case is the whole input of one run: registers, flags, the FXSAVE image, and the pages that exist.
An outcome (CpuState) is all that is left afterwards.  Both are plain data, so that they can be
pickled to the process that runs them and printed for a person.

Every run ends at a HLT (privileged at CPL 3, so the host faults there and so does the guest) or at a fault.

Source for the layouts: Intel SDM volume 1, 10.5.1 (FXSAVE) and 8.1 (x87); volume 3, 6.15 (vectors).
Left out of every comparison: IF, IOPL, VM, RF, VIF, VIP (the kernel's or the fault frame's business), the x87
FIP/FDP/FOP and their selectors (a translation runs elsewhere, and CPUs differ), reserved bytes of the image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import capstone

from tests.insn.segments import CS, FLAT, SEGMENT_NAMES, base_of

PAGE_SIZE = 4096
REG_NAMES = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)

CF, PF, AF, ZF, SF, TF, IF, DF, OF = 0x1, 0x4, 0x10, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
NT, RF, AC, ID = 0x4000, 0x10000, 0x40000, 0x200000
STATUS_FLAGS = CF | PF | AF | ZF | SF | OF
COMPARED_FLAGS = STATUS_FLAGS | TF | DF | NT | AC | ID
FLAG_NAMES = {
    CF: "CF", PF: "PF", AF: "AF", ZF: "ZF", SF: "SF", TF: "TF", DF: "DF", OF: "OF", NT: "NT", AC: "AC",
    ID: "ID",
}  # fmt: skip

VECTOR_NAMES = {
    0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 19: "#XM",
}  # fmt: skip
DEBUG, BREAKPOINT, OVERFLOW, GENERAL_PROTECTION, PAGE_FAULT = 1, 3, 4, 13, 14
PF_USER, PF_FETCH = 0x04, 0x10  # error code of a #PF [6.15]
VECTORS_WITH_ERROR = frozenset({8, 10, 11, 12, 13, 14, 17})

FX_SIZE = 512
FX_CONTROL, FX_STATUS, FX_TAGS, FX_MXCSR, FX_ST, FX_XMM = 0, 2, 4, 24, 32, 160
FX_ST_COUNT = FX_XMM_COUNT = 8
X87_DEFAULT_CONTROL, MXCSR_DEFAULT = 0x37F, 0x1F80

HLT = 0xF4
TRANSLATED_INSTEAD = "translated"  # a Stop's kind


class Page(NamedTuple):
    """One guest page that exists; every page can be executed (no NX without PAE)."""

    va: int
    data: bytes
    writable: bool


@dataclass(frozen=True, slots=True)
class Blind:
    """What a comparison leaves out because the architecture leaves it undefined."""

    eflags: int = 0
    memory: tuple[tuple[int, int], ...] = ()
    memory_on_fault: tuple[tuple[int, int], ...] = ()  # stores of an instruction that then faults
    registers_on_fault: tuple[int, ...] = ()  # loaded by an instruction that then faults
    fault_page_only: bool = False  # which byte of a long operand faults first is up to the processor


@dataclass(frozen=True, slots=True)
class Case:
    """The input of one run.  `rows` names the table rows it exercises, `group` the line of the report.

    The host always runs it at CPL 3; with `cpl` 0 the guest runs it as kernel code, which must be the same
    for what isn't privileged.
    """

    eip: int
    regs: tuple[int, ...]
    eflags: int
    fx: bytes
    pages: tuple[Page, ...]
    code_length: int
    rows: tuple[str, ...] = ()
    group: str = ""
    blind: Blind = Blind()
    cpl: int = 3
    selectors: tuple[int, ...] = FLAT  # ES, CS, SS, DS, FS, GS

    @property
    def code_va(self) -> int:
        return base_of(self.selectors[CS]) + self.eip & 0xFFFFFFFF

    def code(self) -> bytes:
        """The bytes from eip on that were generated, as far as their page goes and the next one exists."""
        by_va = {page.va: page.data for page in self.pages}
        out = b""
        va = self.code_va
        while len(out) < self.code_length and va & -PAGE_SIZE in by_va:
            chunk = by_va[va & -PAGE_SIZE][va % PAGE_SIZE :]
            out += chunk[: self.code_length - len(out)]
            va += len(chunk)
        return out


class Variation(NamedTuple):
    """What else a case's code can start with."""

    regs: tuple[int, ...]
    eflags: int
    fx: bytes
    pokes: tuple[tuple[int, bytes], ...]  # (va, contents)


@dataclass(frozen=True, slots=True)
class Family:
    """A case and its variations: the same code, each time with other registers, flags and contents."""

    case: Case
    variations: tuple[Variation, ...]

    def cases(self) -> list[Case]:
        """All of them, the case itself first."""
        return [self.case, *(_varied(self.case, variation) for variation in self.variations)]


def _varied(case: Case, variation: Variation) -> Case:
    pages = case.pages
    if variation.pokes:
        touched: dict[int, bytearray] = {}
        by_va = {page.va: page.data for page in pages}
        for start, data in variation.pokes:
            for va, piece in _by_page(start & 0xFFFFFFFF, data):
                base = va & -PAGE_SIZE
                if base not in touched and base in by_va:
                    touched[base] = bytearray(by_va[base])
                if base in touched:
                    touched[base][va - base : va - base + len(piece)] = piece
        pages = tuple(
            Page(page.va, bytes(touched[page.va]), page.writable) if page.va in touched else page
            for page in pages
        )
    return Case(  # a third of what dataclasses.replace takes
        case.eip, variation.regs, variation.eflags, variation.fx, pages, case.code_length, case.rows,
        case.group, case.blind, case.cpl, case.selectors,
    )  # fmt: skip


def _by_page(va: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        room = PAGE_SIZE - va % PAGE_SIZE
        yield va, data[:room]
        va, data = va + room & 0xFFFFFFFF, data[room:]


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run ended: "hlt", "fault", "syscall", "hung", "crashed" (its process died), "translated" (an
    executor left it to the translator), or a Python error.

    error is 0 for vectors without an error code, va 0 but for #PF.
    """

    kind: str
    vector: int = -1
    error: int = 0
    va: int = 0

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as a call: the way dataclasses have is five times slower."""
        return Stop, (self.kind, self.vector, self.error, self.va)

    def comparable(self, case: Case) -> Stop:
        """Of a #PF's error code: a host with NX sets the fetch bit; kernel code lacks the user bit."""
        if self.vector != PAGE_FAULT:
            return self
        va = self.va & -PAGE_SIZE if case.blind.fault_page_only else self.va
        hidden = PF_FETCH | (PF_USER if case.cpl == 0 else 0)
        return replace(self, error=self.error & ~hidden, va=va)

    def __str__(self) -> str:
        if self.kind != "fault":
            return self.kind
        text = VECTOR_NAMES.get(self.vector, f"vector {self.vector}")
        if self.vector in VECTORS_WITH_ERROR:
            text += f"({self.error:#x})"
        if self.vector == PAGE_FAULT:
            text += f" at va {self.va:#010x}"
        return text


@dataclass(frozen=True, slots=True)
class CpuState:
    """What a run left: `changed` holds the pages whose contents differ from the case's. `served`: page faults
    after which an instruction was begun again."""

    stop: Stop
    eip: int = 0
    regs: tuple[int, ...] = (0,) * 8
    eflags: int = 0
    fx: bytes = bytes(FX_SIZE)
    changed: dict[int, bytes] = field(default_factory=dict)
    selectors: tuple[int, ...] = FLAT
    served: int = 0

    def __reduce__(self) -> tuple[object, ...]:
        """As Stop."""
        rest = self.changed, self.selectors, self.served
        return CpuState, (self.stop, self.eip, self.regs, self.eflags, self.fx, *rest)


def fx_image(
    control: int = X87_DEFAULT_CONTROL,
    status: int = 0,
    tags: int = 0,
    st: tuple[bytes, ...] = (),
    mxcsr: int = MXCSR_DEFAULT,
    xmm: tuple[bytes, ...] = (),
) -> bytes:
    """An FXSAVE image; st[i] are ten bytes of ST(i), tags has a bit per *physical* register (1 = in use)."""
    image = bytearray(FX_SIZE)
    struct.pack_into("<HHB", image, 0, control, status, tags)
    struct.pack_into("<II", image, FX_MXCSR, mxcsr, 0xFFFF)
    for i, value in enumerate(st):
        image[FX_ST + 16 * i : FX_ST + 16 * i + 10] = value
    for i, value in enumerate(xmm):
        image[FX_XMM + 16 * i : FX_XMM + 16 * i + 16] = value
    return bytes(image)


def _flag_names(bits: int) -> str:
    return " ".join(name for bit, name in FLAG_NAMES.items() if bits & bit) or "none"


def _compare_fx(case: Case, a: bytes, b: bytes) -> list[str]:
    out = []
    for name, offset, size, mask in (
        ("FCW", FX_CONTROL, 2, 0xFFFF),
        ("FSW", FX_STATUS, 2, 0xFFFF),
        ("FTW", FX_TAGS, 1, 0xFF),
        ("MXCSR", FX_MXCSR, 4, 0xFFFFFFFF),
    ):
        x = int.from_bytes(a[offset : offset + size], "little")
        y = int.from_bytes(b[offset : offset + size], "little")
        if (x ^ y) & mask:
            out.append(f"{name}: expected {x:#06x}, got {y:#06x}")
    for name, base, count, size in (("st", FX_ST, FX_ST_COUNT, 10), ("xmm", FX_XMM, FX_XMM_COUNT, 16)):
        for i in range(count):
            x_bytes = a[base + 16 * i : base + 16 * i + size]
            y_bytes = b[base + 16 * i : base + 16 * i + size]
            if x_bytes != y_bytes:
                out.append(f"{name}{i}: expected {x_bytes[::-1].hex()}, got {y_bytes[::-1].hex()}")
    return out


def _compare_memory(
    case: Case, a: dict[int, bytes], b: dict[int, bytes], blind: tuple[tuple[int, int], ...]
) -> list[str]:
    out = []
    initial = {page.va: page.data for page in case.pages}
    for va in sorted(a.keys() | b.keys()):
        x, y = a.get(va, initial.get(va)), b.get(va, initial.get(va))
        if x is None or y is None:
            out.append(f"page {va:#010x}: not a page of the case")
            continue
        if x == y:
            continue
        different = [i for i in range(PAGE_SIZE) if x[i] != y[i] and not _is_blind(blind, va + i)]
        if different:
            first, last = different[0], different[-1] + 1
            last = min(last, first + 32)
            out.append(
                f"memory {va + first:#010x}: expected {x[first:last].hex(' ')}, got {y[first:last].hex(' ')}"
                f" ({len(different)} bytes differ)"
            )
    return out


def _is_blind(ranges: tuple[tuple[int, int], ...], va: int) -> bool:
    return any(start <= va < start + length for start, length in ranges)


def differences(case: Case, expected: CpuState, got: CpuState) -> list[str]:
    """One line per difference; empty when the outcomes agree under the case's masks."""
    out = []
    a, b = expected, got
    if a.stop != b.stop and a.stop.comparable(case) != b.stop.comparable(case):
        out.append(f"stop: expected {a.stop}, got {b.stop}")
    if a.eip != b.eip:
        out.append(f"eip: expected {a.eip:#010x}, got {b.eip:#010x}")
    if a.regs != b.regs:
        blind_registers = case.blind.registers_on_fault if a.stop.kind == "fault" else ()
        for number, (name, x, y) in enumerate(zip(REG_NAMES, a.regs, b.regs, strict=True)):
            if x != y and number not in blind_registers:
                out.append(f"{name}: expected {x:#010x}, got {y:#010x}")
    for name, x, y in zip(SEGMENT_NAMES, a.selectors, b.selectors, strict=True):
        same_null = x <= 3 and y <= 3  # the host's IRETs clear the RPL of null selectors
        if x != y and not same_null and case.cpl == 3:
            out.append(f"{name}: expected {x:#06x}, got {y:#06x}")
    wrong = (a.eflags ^ b.eflags) & COMPARED_FLAGS & ~case.blind.eflags
    if wrong:
        out.append(
            f"flags {_flag_names(wrong)}: expected {_flag_names(a.eflags)}, got {_flag_names(b.eflags)}"
        )
    if a.fx != b.fx:
        out += _compare_fx(case, a.fx, b.fx)
    if a.changed != b.changed:
        blind = case.blind.memory + (case.blind.memory_on_fault if a.stop.kind == "fault" else ())
        out += _compare_memory(case, a.changed, b.changed, blind)
    return out


def disassemble(case: Case) -> list[str]:
    """Lines of `va  bytes  text` for the case's code; bytes that capstone can't decode become `.byte`."""
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    engine.skipdata = True
    code = case.code()
    lines = []
    for va, size, mnemonic, operands in engine.disasm_lite(code, case.eip):
        raw = code[va - case.eip : va - case.eip + size].hex(" ")
        lines.append(f"{va:#010x}  {raw:<32} {mnemonic} {operands}".rstrip())
    return lines


def describe(case: Case) -> str:
    """The case for a person: code, registers, what is unusual about its FPU state, pages."""
    control, status, tags = struct.unpack_from("<HHB", case.fx)
    (mxcsr,) = struct.unpack_from("<I", case.fx, FX_MXCSR)
    lines = [f"rows: {', '.join(case.rows)}; guest CPL {case.cpl}", *disassemble(case)]
    lines.append(" ".join(f"{n}={v:08x}" for n, v in zip(REG_NAMES, case.regs, strict=True)))
    if case.selectors != FLAT:
        lines.append(" ".join(f"{n}={v:04x}" for n, v in zip(SEGMENT_NAMES, case.selectors, strict=True)))
    lines.append(f"eflags={case.eflags:#x} ({_flag_names(case.eflags)})")
    lines.append(f"FCW={control:#06x} FSW={status:#06x} FTW={tags:#04x} MXCSR={mxcsr:#06x}")
    for i in range(FX_ST_COUNT):
        st = case.fx[FX_ST + 16 * i : FX_ST + 16 * i + 10]
        xmm = case.fx[FX_XMM + 16 * i : FX_XMM + 16 * i + 16]
        if any(st) or any(xmm):
            lines.append(f"st{i}={st[::-1].hex()} xmm{i}={xmm[::-1].hex()}")
    for page in case.pages:
        filled = "filled" if any(page.data) else "zero"
        lines.append(f"page {page.va:#010x} {'rw' if page.writable else 'ro'} {filled}")
    return "\n".join(lines)
