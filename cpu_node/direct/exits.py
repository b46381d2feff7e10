"""The interface of a trap back end: what a directly run address space is told, and every way it comes back.

A back end runs guest user code untouched on the host CPU, in a process of its own per guest address space
(a *child*), in compatibility mode with flat segments. It knows nothing of guest page tables, of the guest's
kernel or of time; it maps what it is told to and says why the code stopped. Everything a child can do to its
registers it can also lie about, so an exit is a claim of the guest's: acting on it must be safe for any
content, and is, because the node acts on guest page tables and guest bytes only.
Left out: 16-bit code, segments with a limit, virtual-8086 mode, single steps: those run in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

USER_CODE32 = 0x23  # the host's selectors of CPL 3 [Linux asm/segment.h]
USER_CODE64 = 0x33
USER_DATA = 0x2B
FX_SIZE = 512  # an FXSAVE image
FX_USED = 288  # of which 32-bit code can change this much (x87, MXCSR, XMM0 to XMM7)


class DirectUnavailable(Exception):
    """This host does not let the back end work; the text says what it refused."""


@dataclass(slots=True)
class GuestState:
    """User registers on their way into a child and back. `regs`: EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI."""

    regs: list[int] = field(default_factory=lambda: [0] * 8)
    eip: int = 0
    eflags: int = 0x202  # on the way in: status flags, DF; on the way out all that the host shows, RF cleared
    ss: int = USER_DATA
    ds: int = USER_DATA
    es: int = USER_DATA
    fs: int = 0
    gs: int = 0
    fs_base: int = 0
    gs_base: int = 0
    fx: bytearray = field(default_factory=lambda: bytearray(FX_SIZE))


@dataclass(frozen=True, slots=True)
class SystemCall:
    """INT 80h, SYSENTER or SYSCALL, not executed. EIP is where the host would go on (behind an INT 80h)."""


@dataclass(frozen=True, slots=True)
class PageFault:
    """An access at `va` that the child has no mapping for, or not the right; EIP is at the instruction.

    `write` None: the back end can't tell.
    """

    va: int
    write: bool | None


@dataclass(frozen=True, slots=True)
class Fault:
    """The instruction at EIP raised another fault (#DE, #UD, #SS, #GP, #MF, #AC, #XM): nothing changed.

    `perhaps_overflow`: or INTO or INT 4 has been executed, and EIP is behind it; the back end can't tell.
    """

    perhaps_overflow: bool = False


@dataclass(frozen=True, slots=True)
class SoftwareTrap:
    """INT3, INT 3, INT 4, INTO or INT1 has been executed; EIP is behind it."""


@dataclass(frozen=True, slots=True)
class SingleStep:
    """#DB after an instruction that ran with EFLAGS.TF set."""


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """At an address given to `Child.set_breakpoints`; its instruction has not run."""


@dataclass(frozen=True, slots=True)
class Kicked:
    """Stopped because the node was kicked, or for no reason of the guest's: between two instructions."""


@dataclass(frozen=True, slots=True)
class ForeignMode:
    """Stopped with another code segment than the one it was started with: 64-bit code, say."""

    selector: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The child has died; the state given to `run` is unchanged. `ran`: its code may have run since then."""

    reason: str
    ran: bool


Exit = SystemCall | PageFault | Fault | SoftwareTrap | SingleStep | Breakpoint | Kicked | ForeignMode | Gone

Wait = Callable[[int], int | None]
"""wait(pid): its next wait status, or None as soon as the node has been kicked. Called by one thread only."""


class Child(Protocol):
    """One address space. Mapping requests are queued and done, in order, before its code next runs."""

    pid: int
    breakpoints: int  # how many it can have, 0 to 4

    def map(self, va: int, length: int, prot: int, pa: int, populate: bool) -> None:
        """Show `length` bytes of the memory file from `pa` on at `va`, over whatever is there."""

    def protect(self, va: int, length: int, prot: int) -> None:
        """Change the rights of pages that are mapped."""

    def unmap(self, va: int, length: int) -> None:
        """Make the range fault."""

    def set_breakpoints(self, addresses: tuple[int, ...]) -> None:
        """Stop before an instruction that begins at one of these is executed."""

    def run(self, state: GuestState, wait: Wait) -> Exit:
        """Run from `state` until something happens; `state` is then where it happened.

        Raises MapRefused when the host refused a queued request (the queue is then empty, none of the guest's
        code has run). Only the thread that made the child may call this.
        """

    def close(self) -> None:
        """End the process. May be called again."""


class MapRefused(Exception):
    """The host refused a mapping: below vm.mmap_min_addr, or too many."""


class TrapBackend(Protocol):
    """A way to make children."""

    name: str

    def spawn(self) -> Child:
        """A child without a page. Raises DirectUnavailable."""
