"""Which trap back ends this host allows, how fast they are, and how its processor takes some instructions.

All of it is found by running a few instructions in a child of its own with memory of its own, before the
guest starts. Where nothing works the guest's user code is translated, and one line of the log says why.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpu_node.cpu import ESP
from cpu_node.direct.execution import Direct
from cpu_node.direct.exits import (
    Child,
    DirectUnavailable,
    Exit,
    Fault,
    GuestState,
    MapRefused,
    SystemCall,
    TrapBackend,
)
from cpu_node.direct.policy import Auto
from cpu_node.direct.ptrace_unsafe import PtraceBackend
from cpu_node.direct.seccomp_unsafe import SeccompBackend
from cpu_node.direct.window import CPUID, SYSCALL, SYSENTER, XGETBV, Forbidden
from cpu_node.host_unsafe import PROT_EXEC, PROT_READ

if TYPE_CHECKING:
    from cpu_node.engine import Engine

MAKERS: Mapping[str, Callable[[int], TrapBackend]] = {"ptrace": PtraceBackend, "seccomp": SeccompBackend}
_VA = 0x1000_0000
_INT80 = b"\xcd\x80"
_PAGE = 4096
_WALL = 0x4000_0000
CLEARLY = 1.5  # times as fast another must be to be taken instead of an earlier one, which has breakpoints
TRAPS = 30  # system calls that a measurement takes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Findings:
    """What a back end can do here."""

    ns_per_trap: int
    forbidden: tuple[bytes, ...]
    lowest: int  # linear addresses below can't be mapped


def start(engine: Engine, ram_fd: int, user_mode: str, trap_backend: str) -> Direct | None:
    """Direct execution by the back end asked for ("auto": ptrace, or what is clearly faster), if any works.

    `user_mode`: "direct", or "auto" for what gains by it.
    """
    names = list(MAKERS) if trap_backend == "auto" else [trap_backend]
    found: dict[str, Findings] = {}
    refusals = []
    for name in names:
        try:
            found[name] = examine(MAKERS[name])
        except DirectUnavailable as error:
            refusals.append(f"{name}: {error}")
    if not found:
        log.warning("user code is translated: no trap back end works here (%s)", "; ".join(refusals))
        return None
    best = next(iter(found))
    for name, findings in found.items():
        if CLEARLY * findings.ns_per_trap < found[best].ns_per_trap:
            best = name
    if refusals:
        log.warning("trap back end %s, as others do not work here (%s)", best, "; ".join(refusals))
    findings = found[best]
    forbidden = Forbidden(engine.physical, findings.forbidden)
    auto = Auto(findings.ns_per_trap) if user_mode == "auto" else None
    return Direct(engine, MAKERS[best](ram_fd), forbidden, findings.lowest, auto)


def examine(make: Callable[[int], TrapBackend]) -> Findings:
    """Try a back end in a child of its own. Raises DirectUnavailable."""
    fd = os.memfd_create("backplane-trial", os.MFD_CLOEXEC)
    os.ftruncate(fd, _PAGE)
    memory = mmap.mmap(fd, _PAGE)
    child = None
    try:
        child = make(fd).spawn()
        forbidden = [CPUID, XGETBV]
        forbidden += [code for code in (SYSCALL, SYSENTER) if not _refused(child, memory, code)]
        event, state = _run(child, memory, _INT80)
        if not isinstance(event, SystemCall | Fault) or state.eip not in (_VA, _VA + len(_INT80)):
            raise DirectUnavailable(f"INT 80h of 32-bit code ended as {event}")
        begin = time.perf_counter_ns()
        for _ in range(TRAPS):
            state.eip = _VA
            child.run(state, wait_plainly)
        ns_per_trap = (time.perf_counter_ns() - begin) // TRAPS
        return Findings(ns_per_trap, tuple(forbidden), _lowest(child))
    finally:
        if child is not None:
            child.close()
        memory.close()
        os.close(fd)


def _refused(child: Child, memory: mmap.mmap, code: bytes) -> bool:
    """Does the host's processor refuse an instruction, so that it is a fault with EIP at it?"""
    event, state = _run(child, memory, code)
    return isinstance(event, Fault) and state.eip == _VA


def _run(child: Child, memory: mmap.mmap, code: bytes) -> tuple[Exit, GuestState]:
    memory[: len(code)] = code
    child.map(_VA, _PAGE, PROT_READ | PROT_EXEC, 0, True)
    state = GuestState(eip=_VA)
    state.regs[ESP] = _VA + _PAGE // 2
    try:
        return child.run(state, wait_plainly), state
    except MapRefused as error:
        raise DirectUnavailable(f"mapping refused: {error}") from error


def wait_plainly(pid: int) -> int | None:
    """exits.Wait for one who can't be kicked."""
    return os.waitpid(pid, _WALL | os.WUNTRACED)[1]


def _lowest(child: Child) -> int:
    child.map(0, _PAGE, PROT_READ, 0, False)
    try:
        child.run(GuestState(eip=_VA), wait_plainly)
    except MapRefused:
        return max(_PAGE, int(Path("/proc/sys/vm/mmap_min_addr").read_text(encoding="ascii")))
    return 0


