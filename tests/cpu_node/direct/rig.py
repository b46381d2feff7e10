"""A child with memory of its own, for tests of trap back ends: no engine, no guest page tables."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpu_node.direct.choose import MAKERS, wait_plainly
from cpu_node.direct.exits import Child, DirectUnavailable, Exit, GuestState, TrapBackend, Wait
from cpu_node.host_unsafe import PROT_EXEC, PROT_READ, PROT_WRITE
from tests.cpu_node.board import asm

CODE, DATA, STACK = 0x0804_8000, 0x0900_0000, 0xBFFF_E000
TOP = STACK + 0xFF0
PAGES = 64
CODE_PA, DATA_PA, STACK_PA = 0x0000, 0x8000, 0xF000
R, RW, RX = PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC


class Rig:
    """Code, data and stack pages of one child. `state` is what it runs from and ends in."""

    def __init__(self, backend: TrapBackend, memory: mmap.mmap) -> None:
        self.memory = memory
        self.child: Child = backend.spawn()
        self.child.map(CODE, 0x1000, RX, CODE_PA, True)
        self.child.map(DATA, 0x1000, RW, DATA_PA, True)
        self.child.map(STACK, 0x1000, RW, STACK_PA, True)
        self.state = GuestState(eip=CODE)
        self.state.regs[:] = [0x11, 0x22, 0x33, 0x44, TOP, 0x66, 0x77, 0x88]

    def load(self, text: str | bytes) -> None:
        code = text if isinstance(text, bytes) else asm(text, CODE)
        self.memory[CODE_PA : CODE_PA + len(code)] = code
        self.state.eip = CODE

    def run(self, text: str | bytes | None = None, wait: Wait = wait_plainly) -> Exit:
        if text is not None:
            self.load(text)
        return self.child.run(self.state, wait)

    @property
    def offset(self) -> int:
        """EIP in the code page."""
        return self.state.eip - CODE

    def mappings(self) -> list[tuple[int, int, str]]:
        """(first, end, rights) of all that the process has mapped."""
        out = []
        for line in Path(f"/proc/{self.child.pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            first, end = (int(part, 16) for part in span.split("-"))
            out.append((first, end, rights))
        return out


def wait_dead(pid: int) -> None:
    """Until nothing of the process runs any more; its parent need not have noticed."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.001)


@contextmanager
def backend_of(name: str) -> Iterator[tuple[TrapBackend, mmap.mmap]]:
    """The back end over a memory file of its own; the test is skipped where the host forbids it."""
    fd = os.memfd_create("rig")
    os.ftruncate(fd, PAGES << 12)
    memory = mmap.mmap(fd, PAGES << 12)
    try:
        yield MAKERS[name](fd), memory
    except DirectUnavailable as error:
        pytest.skip(f"this host forbids it: {error}")
    finally:
        memory.close()
        os.close(fd)


@contextmanager
def rig_of(name: str) -> Iterator[Rig]:
    with backend_of(name) as (backend, memory):
        rig = Rig(backend, memory)
        try:
            yield rig
        finally:
            rig.child.close()
