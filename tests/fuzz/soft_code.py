"""What host code in mode.SOFT may touch, which finds its data by the software TLB: for host_code.py.

What registers hold is followed from each guest instruction's start on. Every memory operand must be one of

- an entry: [r13 + page*8], where SHRX has made `page` of 32 bits, in either of the two tables, to be read;
- the guest's: r8+r9-1 (or a register that a LEA has made of it), within the bytes that the probe before it
  looked up, first and last, in one table; to be written only where that was the table of writes;
- the state record: [r15 + constant], to be read; or the segment base that a pointer there leads to;
- the dispatch table: [r14 + r8*8], r8 32 bits wide;
- the host's stack, between a load of RSP from the record and its return.

A jump through the record leads to an exit, or to an assist of CPL 3 with what that asks for: a miss is about
the bytes that were looked up, and begins the template anew. A direct jump stays in its instruction, or goes
to one's start or to a stub behind the chunk. r13 to r15 never change.
Left out: whether RCX and the guest's registers are right in the end (the comparison of runs).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import capstone
from capstone import x86

from cpu_node import layout as at
from cpu_node import tlb_strings
from cpu_node.assist_stubs import ASSIST_NAMES, assist_slot
from cpu_node.decode import TooLong, Undefined, decode
from cpu_node.line import Line
from cpu_node.translate import Translation, check_source
from tests.fuzz.disassembly import instructions

PAGE = 4096
READS, WRITES = at.TLB_READ - at.TLB_BASE, at.TLB_WRITE - at.TLB_BASE
EXITS = (at.SIMULATE_SLOT, at.STALE_SLOT, at.CHAIN_SLOT)
ASSISTS = {assist_slot(name): name for name in ASSIST_NAMES}
PREFIXES = (0, 0xF2, 0xF3)  # r9d of an assist for strings
POINTERS = (at.FS_POINTER, at.GS_POINTER)
BIT_TESTS = frozenset(("bt", "bts", "btr", "btc"))
FORBIDDEN = ("syscall", "sysenter", "sysexit", "int", "call", "lcall", "ljmp", "hlt", "iret", "ret", "leave",
             "enter", "xlat", "maskmov", "in", "out", "ins", "outs", "cli", "sti")  # fmt: skip
HARMLESS = ("inc", "insert", "int3d")  # that begin like one of these
# With a memory operand in the first place: of all others that one is written.
FIRST_IS_READ = frozenset(("cmp", "test", "bt", "mul", "imul", "div", "idiv", "ldmxcsr", "clflush", "jmp"))
X87_STORES = frozenset(("fst", "fstp", "fist", "fistp", "fisttp", "fbstp", "fnstcw", "fnsave", "fnstenv",
                        "fnstsw", "fxsave"))  # fmt: skip
SIZES = {"fxsave": 512, "fxrstor": 512, "fnsave": 108, "frstor": 108, "fnstenv": 28, "fldenv": 28,
         "comisd": 8}  # fmt: skip
SIZES_16 = {"fnsave": 94, "frstor": 94, "fnstenv": 14, "fldenv": 14}
_NAMES = {"rcx": ("ecx", "cx", "cl", "ch"), "rsp": ("esp", "sp", "spl"),
          **{f"r{n}": (f"r{n}d", f"r{n}w", f"r{n}b") for n in range(8, 16)}}  # fmt: skip
FULL = {part: name for name, parts in _NAMES.items() for part in (name, *parts)}
NARROW = frozenset(parts[0] for parts in _NAMES.values())


@dataclass(frozen=True)
class Narrow:
    """32 bits. `of`: the number that is this less `plus`."""

    number: int
    of: int = -1
    plus: int = 0
    value: int | None = None
    below: int = 1 << 32


@dataclass(frozen=True)
class Page:
    """Of the address `number` + `plus`."""

    number: int
    plus: int


@dataclass(frozen=True)
class Entry:
    page: Page
    write: bool


@dataclass(frozen=True)
class Step:
    """On the way to a sum: ~`last`, ~last + `first`, or whether an entry is one ("valid")."""

    what: str
    last: Entry | None = None
    first: Entry | None = None


@dataclass(frozen=True)
class Hit:
    """Or miss: 0 only where the `size` bytes at address `number` are allowed."""

    number: int
    size: int
    write: bool


@dataclass(frozen=True)
class Place:
    """Host address of what a probe has found."""

    hit: Hit


@dataclass(frozen=True)
class Here:
    """An address in this code, as an offset in the cache."""

    offset: int


@dataclass(frozen=True)
class Named:
    """The guest's "ecx" or "rsp", or the "pointer" to a segment's base."""

    name: str


Value = Narrow | Page | Entry | Step | Hit | Place | Here | Named


def _at_start() -> dict[str, Value]:
    return {"rcx": Named("ecx")}


@dataclass
class State:
    """At one place of the host code."""

    values: dict[str, Value] = field(default_factory=_at_start)
    found: frozenset[Hit] = frozenset()
    missed: Hit | None = None
    on_host_stack: bool = False

    def copy(self) -> State:
        return State(dict(self.values), self.found, self.missed, self.on_host_stack)

    def joined(self, other: State | None) -> State:
        """What holds on both ways here."""
        if other is None:
            return self
        values = {name: v for name, v in self.values.items() if other.values.get(name) == v}
        missed = self.missed if self.missed == other.missed else None
        return State(values, self.found & other.found, missed, self.on_host_stack or other.on_host_stack)


class SoftCheck:
    """Of one translation."""

    def __init__(self, made: Translation, line: Line) -> None:
        self.made, self.line = made, line
        self.starts = {made.chunk.start + host: guest
                       for host, guest in zip(made.chunk.hosts, made.chunk.offsets, strict=True)}  # fmt: skip
        self.numbers = itertools.count()
        self.restarts: set[int] = set()  # where this guest instruction's template may be begun anew
        self.state = State()

    def stray(self) -> list[str]:
        """The host instructions that could reach what they shouldn't, or could go astray."""
        start, out = self.made.chunk.start, []
        pending: dict[int, State] = {}
        jumps: list[tuple[int, str]] = []
        seen: set[int] = set()
        state: State | None = State()
        ends = dict(itertools.pairwise([*sorted(self.starts), self.made.chunk.end]))
        end_of_guest = end = start
        for insn in instructions(self.made.code, at.CODE + start):
            offset = insn.address - at.CODE
            seen.add(offset)
            end = offset + insn.size
            text = f"{offset:#x}: {insn.bytes.hex(' ')}  {insn.mnemonic} {insn.op_str}"
            if offset in self.starts:
                if state is not None and state.on_host_stack:
                    out.append(f"{text}: the stack is the host's")
                pending.pop(offset, None)
                state, end_of_guest = State(), ends[offset]
                self._restarts(offset)
            elif offset in pending:
                state = pending.pop(offset).joined(state)
            self.state = state = State() if state is None else state
            if insn.group(x86.X86_GRP_JUMP) and insn.operands[0].type == x86.X86_OP_IMM:
                target = insn.operands[0].imm - at.CODE
                jumps.append((target, text))
                taken = state.copy() if target < end_of_guest else State()
                tested = state.values.get("rcx")
                if insn.mnemonic == "jrcxz" and isinstance(tested, Hit):
                    taken.found |= {tested}
                    taken.values["rcx"] = Narrow(next(self.numbers), value=0)
                    state.missed = tested
                if target <= offset and target not in self._known():
                    out.append(f"{text}: back into a template")
                pending[target] = taken.joined(pending.get(target))
                state = None if insn.mnemonic == "jmp" else state
                continue
            out += [f"{text}: {why}" for why in self._instruction(insn)]
            state = None if insn.mnemonic == "jmp" else state
        if end != self.made.chunk.end:
            out.append(f"{end:#x}: no host instruction in {self.made.code.hex(' ')}")
        return out + [f"{text}: into nowhere" for target, text in jumps if target not in seen | self._known()]

    def _known(self) -> set[int]:
        return {*self.starts, *self.line.host.values()}

    def _restarts(self, offset: int) -> None:
        self.restarts = {offset}
        if self.line.verify:
            line, guest = self.line, self.starts[offset]
            try:
                length = decode(line.code, guest).length
            except (Undefined, TooLong):
                length = 1
            self.restarts.add(offset + len(check_source(line, guest, min(length, line.size - guest))))

    # ---- one instruction

    def _instruction(self, insn: capstone.CsInsn) -> Iterator[str]:
        state, name = self.state, insn.mnemonic.split()[-1]
        if name in ("push", "pop", "pushfq", "popfq"):
            if not state.on_host_stack:
                yield "the guest's stack"
        elif name.startswith(FORBIDDEN) and not name.startswith(HARMLESS):
            yield "must not be here"
        elif name == "jmp":
            yield from self._jump(insn)
        elif name not in ("lea", "nop"):
            for op in insn.operands:
                if op.type == x86.X86_OP_MEM:
                    yield from self._operand(insn, name, op)
        value = self._result(insn, name)
        yield from self._written(insn, value)

    def _jump(self, insn: capstone.CsInsn) -> Iterator[str]:
        (op,), values = insn.operands, self.state.values
        target = values.get("r8")
        if op.type != x86.X86_OP_MEM or op.mem.segment:
            yield "not a jump through a table"
            return
        mem = op.mem
        place = (*(insn.reg_name(r) if r else "" for r in (mem.base, mem.index)), mem.scale, mem.disp)
        if place[:2] == ("r15", "") and mem.disp not in EXITS:
            yield from self._assist(ASSISTS.get(mem.disp, "?"), target, insn.address + insn.size - at.CODE)
        elif place[:2] != ("r15", "") and place != ("r14", "r8", 8, 0):
            yield "not a jump through a table"
        elif not isinstance(target, Narrow) or (place[0] == "r15" and target.value is None):
            yield "r8 may be anything"

    def _assist(self, name: str, target: Value | None, behind: int) -> Iterator[str]:
        values, missed = self.state.values, self.state.missed
        operand, back = values.get("r9"), values.get("r10")
        number = operand.value if isinstance(operand, Narrow) else None
        if name in ("tlb_read", "tlb_write"):
            address = target.number if isinstance(target, Narrow) else None
            if missed is None or (missed.number, missed.write) != (address, name == "tlb_write"):
                yield "not what the probe missed"
            elif number != missed.size - 1:
                yield f"{missed.size} bytes were looked up"
            if not (isinstance(back, Here) and back.offset in self.restarts):
                yield "does not begin the template anew"
            if values.get("r12") != Named("ecx"):
                yield "ECX is not in r12"
        elif name.startswith("tlb_"):
            whole = behind - tlb_strings.LENGTH in self.restarts
            if number not in PREFIXES or back != Here(behind) or not whole:
                yield "not as assists for strings take it"
        elif name not in ("int", "sysenter") or not isinstance(target, Narrow) or target.value is None:
            yield "no exit or assist of CPL 3"

    def _operand(self, insn: capstone.CsInsn, name: str, op: x86.X86Op) -> Iterator[str]:
        mem, values = op.mem, self.state.values
        base, index = (insn.reg_name(r) if r else "" for r in (mem.base, mem.index))
        write = name in X87_STORES or name in ("xchg", "xadd") or (
            op is insn.operands[0] and name not in FIRST_IS_READ and name[0] != "f"
            and not name.startswith("prefetch"))  # fmt: skip
        size = (SIZES_16 if b"\x66" in insn.bytes[:2] and name in SIZES_16 else SIZES).get(name, op.size)
        at_base = values.get(base)
        if mem.segment:
            yield "a segment"
        elif base == "r15" and not index:
            if write or not 0 <= mem.disp <= at.RECORD_SIZE - size:
                yield "not to be written" if write else "behind the record"
        elif base == "r13" and mem.scale == 8:
            if not isinstance(values.get(index), Page):
                yield "no page's number"
            if write or name != "mov" or size != 8 or mem.disp not in (READS, WRITES):
                yield "no entry"
        elif base == "r9" and not index and at_base == Named("pointer"):
            if write or name != "mov" or (size, mem.disp) != (4, 0):
                yield "no segment base"
        elif isinstance(at_base, Place) and not index:
            yield from self._found(at_base.hit, mem.disp, size, write)
        elif (base, index, mem.scale) == ("r8", "r9", 1):
            hit = self._hit()
            if hit is None:
                yield "no probe has found it"
            else:
                yield from self._found(hit, mem.disp + 1, size, write)
        else:
            yield "not through the TLB"
        if name in BIT_TESTS and insn.operands[1].type == x86.X86_OP_REG:
            bit = values.get(FULL.get(insn.reg_name(insn.operands[1].reg), ""))
            if not (isinstance(bit, Narrow) and bit.below <= 8 * size):
                yield "a bit that may lie elsewhere"

    def _hit(self) -> Hit | None:
        """What lies at r8+r9-1."""
        address, entry = self.state.values.get("r8"), self.state.values.get("r9")
        if not (isinstance(address, Narrow) and isinstance(entry, Entry)):
            return None
        page = Page(address.number, 0)
        same = [h for h in self.state.found if Entry(page, h.write) == entry and h.number == page.number]
        return max(same, key=lambda hit: hit.size, default=None)

    @staticmethod
    def _found(hit: Hit, first: int, size: int, write: bool) -> Iterator[str]:
        if not (first >= 0 < size and first + size <= hit.size <= PAGE):
            yield f"bytes {first} to {first + size} of {hit.size} that were looked up"
        if write and not hit.write:
            yield "a write behind a probe for reading"

    # ---- what registers hold then

    def _written(self, insn: capstone.CsInsn, value: Value | None) -> Iterator[str]:
        state, values = self.state, self.state.values
        names = {insn.reg_name(r) for r in insn.regs_access()[1]}
        first = insn.operands[0] if insn.operands else None
        if first is not None and first.type == x86.X86_OP_REG and insn.mnemonic not in FIRST_IS_READ:
            names.add(insn.reg_name(first.reg))
        for name in names & FULL.keys():
            full = FULL[name]
            if full in ("r13", "r14", "r15"):
                yield f"{full} changes"
            if name == "rsp":
                load = insn.mnemonic == "mov" and insn.op_str == "rsp, qword ptr [r15]"
                back = insn.op_str == "rsp, r10" and values.get("r10") == Named("rsp")
                if load or (insn.mnemonic == "mov" and back):
                    state.on_host_stack = load
                elif not state.on_host_stack:
                    yield "RSP changes"
            if value is not None and first is not None and name == insn.reg_name(first.reg):
                values[full] = value
            elif name in NARROW:
                values[full] = Narrow(next(self.numbers))
            else:
                values.pop(full, None)

    def _result(self, insn: capstone.CsInsn, name: str) -> Value | None:
        """Of the instructions that probes are made of."""
        ops = insn.operands
        if len(ops) < 1 or ops[0].type != x86.X86_OP_REG:
            return None
        to = insn.reg_name(ops[0].reg)
        sources = [insn.reg_name(op.reg) if op.type == x86.X86_OP_REG else "" for op in ops[1:]]
        held = [self.state.values.get(FULL.get(source, "")) for source in sources]
        if name == "mov":
            return self._moved(insn, to, sources[0], held[0])
        if name == "lea":
            return self._address(insn, to)
        if name == "not" and to in FULL:
            entry = self.state.values.get(to)
            return Step("not", entry) if isinstance(entry, Entry) else None
        if name == "movzx" and to in NARROW and sources[0] == "r9b" and isinstance(held[0], Entry):
            return Step("valid", first=held[0])
        if name == "shrx" and to in NARROW and isinstance(held[0], Narrow) and sources[0] in NARROW:
            if sources[1] == "r13d":
                number, plus = (held[0].of, held[0].plus) if held[0].of >= 0 else (held[0].number, 0)
                return Page(held[0].number, 0) if sources[0] == "r8d" else Page(number, plus)
            if isinstance(held[1], Narrow) and held[1].value is not None:
                return Narrow(next(self.numbers), below=1 << 32 - (held[1].value & 31))
        return None

    def _moved(self, insn: capstone.CsInsn, to: str, source: str, held: Value | None) -> Value | None:
        op = insn.operands[1]
        if op.type == x86.X86_OP_IMM:
            return Narrow(next(self.numbers), value=op.imm & 0xFFFFFFFF) if to in NARROW else None
        if op.type == x86.X86_OP_REG:
            if (to, source) == ("r10", "rsp") and not self.state.on_host_stack:
                return Named("rsp")
            return held if to in FULL.values() and source in FULL.values() else None
        mem = op.mem
        base, index = (insn.reg_name(r) if r else "" for r in (mem.base, mem.index))
        page = self.state.values.get(index)
        if base == "r13" and isinstance(page, Page) and mem.disp in (READS, WRITES) and to in FULL.values():
            return Entry(page, mem.disp == WRITES)
        if (to, base, index) == ("r9", "r15", "") and mem.disp in POINTERS:
            return Named("pointer")
        return None

    def _address(self, insn: capstone.CsInsn, to: str) -> Value | None:
        mem, values = insn.operands[1].mem, self.state.values
        base, index = (insn.reg_name(r) if r else "" for r in (mem.base, mem.index))
        a, b = values.get(base), values.get(index)
        if base == "rip" and to == "r10":
            return Here(insn.address + insn.size + mem.disp - at.CODE)
        if to in NARROW:
            derived = base == "r8" and not index and isinstance(a, Narrow) and mem.disp >= 0
            number = next(self.numbers)
            return Narrow(number, a.number, mem.disp) if derived and isinstance(a, Narrow) else Narrow(number)
        if to not in FULL.values():
            return None
        if (base, index, mem.scale, mem.disp) == ("r8", "r9", 1, -1):
            hit = self._hit()
            return Place(hit) if hit is not None else None
        if isinstance(a, Step) and a.what == "valid" and a.first is not None and not index and mem.disp == -1:
            return Hit(a.first.page.number, 1, a.first.write) if a.first.page.plus == 0 else None
        if mem.scale != 1 or mem.disp or not isinstance(a, Step):
            return None
        if a.what == "not" and isinstance(b, Entry):
            return Step("sum", a.last, b)
        first, last = a.first, a.last
        if a.what == "sum" and b == Step("valid", first=first) and first is not None and last is not None:
            same = first.write == last.write and first.page == Page(last.page.number, 0)
            return Hit(first.page.number, last.page.plus + 1, first.write) if same else None
        return None


def stray(made: Translation, line: Line) -> list[str]:
    """The host instructions that could reach memory or code they shouldn't; empty when all is well."""
    return SoftCheck(made, line).stray()
