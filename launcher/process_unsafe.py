"""The calls of prctl(2) and getauxval(3) that Python does not wrap.

Sources: prctl(2), getauxval(3), Linux Documentation/arch/x86/elf_hwcaps.rst.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
AT_HWCAP2 = 26

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.getauxval.argtypes = (ctypes.c_ulong,)
_libc.getauxval.restype = ctypes.c_ulong


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent (whose pid is given) ends.

    The signal follows the parent *thread*: only a parent's main thread may fork such children.
    """
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the call above
        os.kill(os.getpid(), number)


def outlive_parent() -> None:
    """Undo die_with_parent."""
    _prctl(PR_SET_PDEATHSIG, 0)


def set_thread_name(name: str) -> None:
    """The name `top` and /proc/<pid>/comm show; the kernel keeps 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(PR_SET_NAME, ctypes.addressof(buffer))


def hwcap2() -> int:
    """The kernel's second word of CPU capabilities (bit 1: user mode may use FSGSBASE)."""
    return int(_libc.getauxval(AT_HWCAP2))


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
