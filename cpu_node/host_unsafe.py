"""Host memory and signals by address: thin, typed wrappers of libc calls.

Everything here can destroy the process when called with a wrong address; callers pass only addresses from
layout.py. Errors of the kernel raise OSError with the call's name.
Left out: huge-page files, memory policies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_NORESERVE, MAP_POPULATE = 0x4000, 0x8000
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14
_SA_SIGINFO, _SA_RESTORER, _SA_ONSTACK, _SA_RESTART, _SA_NODEFER = (
    0x4, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x4000_0000,
)  # fmt: skip
_SYS_RT_SIGACTION = 13

_libc = ctypes.PyDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_mprotect = _libc.mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _check(ok: bool, what: str, ha: int) -> None:
    if not ok:
        number = ctypes.get_errno()
        raise OSError(number, f"{what} at {ha:#x}: {os.strerror(number)}")


def map_file(ha: int, length: int, prot: int, fd: int, offset: int, populate: bool) -> None:
    """Map a piece of a file, shared, over whatever is at `ha`."""
    flags = MAP_SHARED | MAP_FIXED | (MAP_POPULATE if populate else 0)
    _check(_mmap(ha, length, prot, flags, fd, offset) == ha, "mmap", ha)


def map_anonymous(ha: int, length: int, prot: int) -> None:
    """Map zeroed private memory, not reserved, over whatever is at `ha`."""
    flags = MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE
    _check(_mmap(ha, length, prot, flags, -1, 0) == ha, "mmap", ha)


def reserve(ha: int, length: int) -> None:
    """Make the range fault: address space without memory."""
    map_anonymous(ha, length, PROT_NONE)


def unmap(ha: int, length: int) -> None:
    """Give the range back to the kernel."""
    _check(_munmap(ha, length) == 0, "munmap", ha)


def protect(ha: int, length: int, prot: int) -> None:
    """mprotect."""
    _check(_mprotect(ha, length, prot) == 0, "mprotect", ha)


def advise(ha: int, length: int, advice: int) -> bool:
    """madvise; False where the kernel refuses (advice is a hint)."""
    return bool(_madvise(ha, length, advice) == 0)


def view8(ha: int, length: int) -> memoryview:
    """Bytes at `ha` as a writable view."""
    return memoryview((ctypes.c_ubyte * length).from_address(ha)).cast("B")


def view16(ha: int, count: int) -> memoryview:
    """`count` words at `ha`."""
    return memoryview((ctypes.c_uint16 * count).from_address(ha)).cast("B").cast("H")


def view32(ha: int, count: int) -> memoryview:
    """`count` dwords at `ha`."""
    return memoryview((ctypes.c_uint32 * count).from_address(ha)).cast("B").cast("I")


def view64(ha: int, count: int) -> memoryview:
    """`count` qwords at `ha`."""
    return memoryview((ctypes.c_uint64 * count).from_address(ha)).cast("B").cast("Q")


def function(ha: int) -> Callable[[], None]:
    """The machine code at `ha` as a call that releases the GIL."""
    return ctypes.CFUNCTYPE(None)(ha)


def function64(ha: int) -> Callable[[], int]:
    """The machine code at `ha` as a short call that returns RAX."""
    return ctypes.PYFUNCTYPE(ctypes.c_uint64)(ha)


class _SigAltStack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def set_signal_stack(ha: int, length: int) -> None:
    """sigaltstack for the calling thread."""
    stack = _SigAltStack(ha, 0, length)
    _check(_libc.sigaltstack(ctypes.byref(stack), None) == 0, "sigaltstack", ha)


def set_signal_handler(number: int, handler: int, restorer: int, restart: bool) -> None:
    """rt_sigaction with machine code as handler: on the alternate stack, SIGALRM blocked in it.

    The kernel's struct: handler, flags, restorer, mask; libc would put its own restorer in.
    """
    flags = _SA_SIGINFO | _SA_RESTORER | _SA_ONSTACK | _SA_NODEFER | (_SA_RESTART if restart else 0)
    action = struct.pack("<QQQQ", handler, flags, restorer, 1 << (signal.SIGALRM - 1))
    _check(_libc.syscall(_SYS_RT_SIGACTION, number, action, None, 8) == 0, "rt_sigaction", handler)
