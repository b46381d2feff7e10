"""Direct execution as the engine uses it: runs user code in a child and makes guest events of its exits.

An exit is acted on by what the guest's own tables and bytes say: a fault becomes a page to show or what the
simulator makes of the instruction at EIP, so error codes, priorities and privileged instructions are the
simulator's in every mode. What the host can't do as the guest's processor would (see `_ready`) runs
translated, for as long as it is so.

Differences that code can see, and why they stay: docs/direct-execution.md.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from time import thread_time_ns
from typing import TYPE_CHECKING, NamedTuple, assert_never

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.cpu import DR6_BS, ECX
from cpu_node.decode import Insn
from cpu_node.descriptor import CS, DS, ES, FS, GS, SS, Segment
from cpu_node.direct.clock import cpu_ns
from cpu_node.direct.exits import (
    FX_USED,
    USER_DATA,
    Breakpoint,
    DirectUnavailable,
    Exit,
    Fault,
    ForeignMode,
    Gone,
    GuestState,
    Kicked,
    MapRefused,
    PageFault,
    SingleStep,
    SoftwareTrap,
    SystemCall,
    TrapBackend,
)
from cpu_node.direct.policy import Auto
from cpu_node.direct.waiting import Waiting
from cpu_node.direct.window import MAX_PAGES, ChildWindow, Forbidden
from cpu_node.errors import GP, PF, UD, GuestFault
from cpu_node.flags import AC, DF, FIXED, ID, IF, IOPL, NT, OF, STATUS, TF, VIF, VIP, VM
from cpu_node.paging import FRAME, PS, US, A, P
from cpu_node.segments import load_segment

if TYPE_CHECKING:
    from cpu_node.engine import Engine
    from cpu_node.window import Space

MAX_CHILDREN = 24
SHOWN_MOST = 512  # pages that a child is shown because they have been accessed
STUCK_AFTER = 8  # page faults of one instruction in a row, more than it has pages: the simulator does it
LOADABLE = frozenset((0, 0x23, 0x33))  # selectors that mean the same to the host: null, or flat and readable
_NATIVE = STATUS | TF | DF | NT | AC | ID  # EFLAGS that CPL 3 changes
_REFUSED = TF | NT | AC | VM | IOPL | VIF | VIP
_INT80, _INT3, _INT_3, _INT_4, _INTO, _INT1 = b"\xcd\x80", 0xCC, b"\xcd\x03", b"\xcd\x04", 0xCE, 0xF1
_LONGEST = 15
_PRIVILEGED_OR_SIMULATED = frozenset(("sim", "stop", "cli", "sti"))


class Clocks(NamedTuple):
    """Processor time in ns: of this thread, and of the child with a process id."""

    own_ns: Callable[[], int]
    child_ns: Callable[[int], int]


class Direct:
    """Runs the current space's user code directly where `run` is asked to."""

    def __init__(self, engine: Engine, backend: TrapBackend, forbidden: Forbidden, lowest: int,
                 auto: Auto | None) -> None:
        self.engine = engine
        self.backend = backend
        self.auto = auto  # None: everything that can
        self.translated_ns = 0  # of user code
        self.direct_ns = 0
        self.exits: Counter[str] = Counter()
        self.refusals = 0  # times that `run` left it to the translator
        self.clocks = Clocks(thread_time_ns, cpu_ns)
        self._forbidden = forbidden
        self._lowest = lowest
        self._wait = Waiting(engine)
        self._state = GuestState()
        self._spaces: OrderedDict[Space, ChildWindow] = OrderedDict()  # by last use
        self._stuck = (0, 0, 0)  # EIP, ECX, page faults in a row with these
        self.broken: str | None = None  # why there is no direct execution any more

    # ---- what the engine calls

    def run(self) -> bool:
        """Run user code from cpu.eip until an event, and deal with it; False: it must be translated.

        Raises GuestFault as an instruction does, with cpu.eip at it.
        """
        space, auto = self.engine.contexts.space, self.auto
        if auto is not None and not space.pace.direct:
            return False
        if self.broken is not None or not self._ready():
            self.refusals += 1
            return False
        window = self._window(space)
        cpu = self.engine.cpu
        if window is None or cpu.eip >> 12 in window.unfit or cpu.eflags & ID != window.id_flag:
            self.refusals += 1
            return False
        if window.behind:
            self._catch_up(space, window)
        if window.missed is not None:
            self._show_missed(window)
        self._load()
        while True:
            begin = self.clocks.child_ns(window.child.pid)
            try:
                event = window.child.run(self._state, self._wait)
            except MapRefused as error:
                self._give_up(f"the host refused a mapping: {error}")
                return True  # what has run may have set TF or AC
            stretch = max(0, self.clocks.child_ns(window.child.pid) - begin)
            self.direct_ns += stretch
            if auto is not None and auto.direct(space.pace, stretch):
                self.engine.mode_changed()
            self.exits[type(event).__name__] += 1
            if isinstance(event, Gone):
                self._put_general()  # the state is what it was, but waiting used the record
                self._replace(window, event)
                if event.ran:
                    raise GuestFault(GP, 0)  # its registers are lost, and can't be had by running it again
                return True
            adopted = self._store(window)
            if not isinstance(event, PageFault):
                break
            if adopted:
                return True  # the address was made with a base that is another now
            if not self._page_fault(window, event):
                return True
            if self.engine.record.d[at.KICK // 4] or (auto is not None and not space.pace.direct):
                return True
        self._event(event)
        return True

    def wanted(self) -> bool:
        """Is the current space's user code to run directly, where it can?"""
        return self.broken is None and (self.auto is None or self.engine.contexts.space.pace.direct)

    def timed(self, enter: Callable[[], None]) -> Callable[[], None]:
        """`enter`, its time counted where it runs user code, alone or with what it asks of the kernel."""
        engine, contexts, auto, q = self.engine, self.engine.contexts, self.auto, self.engine.record.q
        entries, clocks = at.ENTERED_USER // 8, self.clocks

        def entered() -> None:
            space, before = contexts.space, q[entries] - (engine.mode & modes.USER)
            begin = clocks.own_ns()
            enter()
            traps = q[entries] - before
            if not traps:
                return
            stretch = clocks.own_ns() - begin
            self.translated_ns += stretch
            if auto is not None and auto.translated(space.pace, stretch, traps, space.pages_for_child()):
                if isinstance(space.direct, ChildWindow):
                    space.direct.behind = True
                engine.mode_changed()

        return entered

    def counters(self) -> dict[str, object]:
        """As plain data, for `launcher stats`."""
        out: dict[str, object] = {
            "backend": self.backend.name, "broken": self.broken, "exits": dict(self.exits),
            "refusals": self.refusals, "children": len(self._spaces),
            "user_translated_ms": self.translated_ns // 1_000_000,
            "user_direct_ms": self.direct_ns // 1_000_000,
        }
        if self.auto is not None:
            out.update(went_direct=self.auto.went_direct, came_back=self.auto.came_back)
        return out

    # ---- which code

    def _ready(self) -> bool:
        """Would the host run the code at cpu.eip as the guest's processor does?"""
        cpu = self.engine.cpu
        flags = cpu.eflags
        if flags & _REFUSED or not flags & IF or cpu.inhibit_interrupts:
            return False
        one_selector = cpu.seg[DS].selector == cpu.seg[ES].selector == cpu.seg[SS].selector
        return one_selector and _plain(cpu.seg[FS]) and _plain(cpu.seg[GS])

    def _window(self, space: Space) -> ChildWindow | None:
        window = space.direct
        if isinstance(window, ChildWindow):
            self._spaces.move_to_end(space)
            if len(window.small) > MAX_PAGES:
                window.clear()
            return window
        for old in [s for s, w in self._spaces.items() if w.closed]:
            del self._spaces[old]
        while len(self._spaces) >= MAX_CHILDREN:
            old, idle = self._spaces.popitem(last=False)
            idle.close()
            old.direct = None
        contexts = self.engine.contexts
        try:
            window = ChildWindow(self.backend, self._forbidden, self._lowest, contexts.memory, contexts.code)
        except DirectUnavailable as error:
            self._give_up(str(error))
            return None
        space.direct = self._spaces[space] = window
        return window

    def _catch_up(self, space: Space, window: ChildWindow) -> None:
        """Show a child what its code will want: what the user's window shows, and besides what the guest's
        tables say has been accessed. That is above all code, which no window shows while it is translated.
        """
        window.behind = False
        window.copy(space.user)
        walker, need, left = self.engine.walker, P | US | A, SHOWN_MOST
        if not walker.paging:
            return
        for index, pde in enumerate(walker.memory.table(walker.cr3)):
            if pde & need != need or pde & PS:
                continue
            for page, pte in enumerate(walker.memory.table(pde & FRAME), index << 10):
                if pte & need != need or page in window.small or page << 12 < self._lowest:
                    continue
                if not left:
                    return
                left -= 1
                self._fill(page << 12, False)

    def _give_up(self, why: str) -> None:
        """From now on everything is translated."""
        self.broken = why
        self.engine.report("direct-execution", f"user code is translated from now on: {why}")

    def _replace(self, window: ChildWindow, event: Gone) -> None:
        """A child has died under its code: by a signal from outside, or for lack of memory."""
        self.exits["replaced"] += 1
        try:
            window.replace()
        except DirectUnavailable as error:
            self._give_up(f"{event.reason}; {error}")

    # ---- registers

    def _load(self) -> None:
        cpu, record, state = self.engine.cpu, self.engine.record, self._state
        first = at.REGS // 8
        state.regs[:] = record.q[first : first + 8]
        state.eip = cpu.eip
        state.eflags = cpu.eflags
        state.ss = state.ds = state.es = USER_DATA
        fs, gs = cpu.seg[FS], cpu.seg[GS]
        state.fs, state.fs_base = (fs.selector, fs.base) if fs.usable else (0, 0)
        state.gs, state.gs_base = (gs.selector, gs.base) if gs.usable else (0, 0)
        state.fx[:FX_USED] = record.b[at.FX : at.FX + FX_USED]

    def _store(self, window: ChildWindow) -> bool:
        """Take the registers over; True when the guest had loaded a segment register natively."""
        engine, state = self.engine, self._state
        cpu, record = engine.cpu, engine.record
        self._put_general()
        window.id_flag = state.eflags & ID
        record.b[at.FX : at.FX + FX_USED] = state.fx[:FX_USED]
        fs, gs = cpu.seg[FS], cpu.seg[GS]
        adopted = self.exits["segment loaded"]
        if state.ds != USER_DATA or state.es != USER_DATA or state.ss != USER_DATA:
            self._adopt_flat()
        if state.fs != (fs.selector if fs.usable else 0) or state.fs_base != (fs.base if fs.usable else 0):
            self._adopt(FS, state.fs)
        if state.gs != (gs.selector if gs.usable else 0) or state.gs_base != (gs.base if gs.usable else 0):
            self._adopt(GS, state.gs)
        return self.exits["segment loaded"] != adopted

    def _put_general(self) -> None:
        cpu, state = self.engine.cpu, self._state
        regs = cpu.regs
        for index, value in enumerate(state.regs):
            regs[index] = value
        cpu.eip = state.eip
        cpu.eflags = state.eflags & _NATIVE | IF | FIXED

    def _adopt_flat(self) -> None:
        state = self._state
        for index, selector in ((SS, state.ss), (DS, state.ds), (ES, state.es)):
            if selector != USER_DATA:
                self._adopt(index, selector)

    def _adopt(self, index: int, selector: int) -> None:
        """The guest has loaded a segment register natively: do it again as its processor does.

        The host's own data selector can only come from DS, ES or SS, which all held it.
        """
        cpu = self.engine.cpu
        self.exits["segment loaded"] += 1
        load_segment(cpu, index, cpu.seg[DS].selector if selector == USER_DATA else selector & 0xFFFF)

    # ---- events

    def _page_fault(self, window: ChildWindow, event: PageFault) -> bool:
        """True: go on in the child. False: back to the engine. Raises GuestFault."""
        engine, va = self.engine, event.va
        cpu, page = engine.cpu, va >> 12
        eip, ecx, times = self._stuck
        self._stuck = (cpu.eip, cpu.regs[ECX], times + 1 if (eip, ecx) == (cpu.eip, cpu.regs[ECX]) else 0)
        if self._stuck[2] >= STUCK_AFTER or va < self._lowest:
            self._stuck = (0, 0, 0)
            self._simulate()
            return False
        shown = window.small.get(page)
        if shown is not None and page not in window.executable and self._fetched(va):
            return window.allow_execution(page)
        write = event.write
        window.missed = va  # if the guest's #PF comes of it
        if write is None:
            write = shown is not None
            if shown is None and not self._granted(va):
                self._simulate()  # the guest's #PF, which says whether it was a write
                return False
        filled = self._fill(va, write)
        window.missed = None
        if not filled:
            self._simulate()  # a device's registers
        return filled

    def _show_missed(self, window: ChildWindow) -> None:
        """Code that had a #PF is about to go on: show the page before it traps again, if there is one.

        Nothing is set in the guest's tables that isn't there: it may never make that access.
        """
        va, window.missed = window.missed, None
        if va is not None and va >> 12 not in window.small and self._granted(va, A):
            self._fill(va, False)

    def _fetched(self, va: int) -> bool:
        """Was the access at `va`, in a page that may be read, the fetch of the instruction at EIP?"""
        eip = self.engine.cpu.eip
        if va >> 12 == eip >> 12:
            return True
        return not va & 0xFFF and 0 < va - eip < _LONGEST

    def _granted(self, va: int, more: int = 0) -> bool:
        """Do the guest's tables let user code read at `va`, with `more` set too? Nothing is set or raised."""
        walker, need = self.engine.walker, P | US | more
        if not walker.paging:
            return True
        entry = walker.memory.entry
        pde = entry(walker.cr3 + (va >> 22 << 2))
        if pde & need != need:
            return False
        if pde & PS and walker.big_pages:
            return True
        return entry((pde & FRAME) + (va >> 10 & 0xFFC)) & need == need

    def _fill(self, va: int, write: bool) -> bool:
        """Show what an access at `va` needs. False: no memory there. Raises GuestFault."""
        contexts = self.engine.contexts
        walked = contexts.walker.walk(va, write, True)
        if write and contexts.code.protected(walked[0] >> 12):
            contexts.code_written(walked[0] >> 12)
        contexts.fills += 1
        return contexts.space.fill_direct(contexts.walker, va, write, walked)

    def _simulate(self) -> None:
        """The instruction at EIP in the simulator. Raises GuestFault."""
        self.exits["simulated"] += 1
        engine = self.engine
        if engine.cpu.eflags & (TF | AC):  # POPF has set it in the child: #DB follows, or this may be its #AC
            engine.interpreted()
            return
        engine.simulator.step()
        if engine.cpu.pending_debug:
            engine._debug_trap()

    def _event(self, event: Exit) -> None:
        cpu = self.engine.cpu
        match event:
            case SystemCall():
                if self._before(2) != _INT80:
                    raise GuestFault(UD)  # SYSCALL in a page that was written behind our back
                cpu.eip = cpu.eip - 2 & 0xFFFFFFFF
                self._simulate()
            case Fault(perhaps_overflow):
                if perhaps_overflow:
                    cpu.eip = cpu.eip - self._overflow_trap() & 0xFFFFFFFF
                self._simulate()
            case SoftwareTrap():
                cpu.eip = cpu.eip - self._trap_length() & 0xFFFFFFFF
                self._simulate()
            case SingleStep():
                cpu.pending_debug |= DR6_BS
                self.engine._debug_trap()
            case ForeignMode():
                raise GuestFault(GP, 0)
            case Breakpoint():
                self._simulate()
            case Kicked() | PageFault() | Gone():
                pass
            case _:
                assert_never(event)

    def _before(self, count: int) -> bytes:
        """Bytes before EIP; empty where the guest may not read them."""
        cpu = self.engine.cpu
        try:
            return self.engine.memory.read(cpu.eip - count & 0xFFFFFFFF, count, True)
        except GuestFault:
            return b""

    def _trap_length(self) -> int:
        """How far EIP is behind the start of INT3, INT 3, INTO or INT1."""
        before = self._before(2) or b"\0" + self._before(1)
        if before in (_INT_3, _INT_4):
            return 2
        return 1 if before[-1:] and before[-1] in (_INT3, _INTO, _INT1) else 0

    def _overflow_trap(self) -> int:
        """INTO and INT 4 look like #GP of the next instruction: how far to go back, 0 if it is that."""
        if not self.engine.cpu.eflags & OF and self._before(2) != _INT_4:
            return 0
        length = self._trap_length()
        if not length or self._before(1)[0] in (_INT3, _INT1) or self._before(2) == _INT_3:
            return 0
        try:
            insn = self.engine.simulator.fetch()
        except GuestFault as fault:
            return length if fault.vector == PF else 0
        return 0 if _may_fault(insn) else length


def _plain(segment: Segment) -> bool:
    """Null, or a base and 4 GiB, by a selector that the host takes."""
    if not segment.usable:
        return True
    return (segment.selector in LOADABLE and segment.writable and segment.lowest == 0
            and segment.highest == 0xFFFFFFFF)


def _may_fault(insn: Insn) -> bool:
    """Can the instruction raise #GP at CPL 3 where segments are flat, FS and GS perhaps null?"""
    row = insn.row
    if insn.segment in (CS, FS, GS) and (insn.is_memory or row.action in ("moffs", "xlat", "string")):
        return True
    return row.group not in ("int", "string") or row.action in _PRIVILEGED_OR_SIMULATED
