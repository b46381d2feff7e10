"""What the host must have for a machine: CPU features, memory, a place for the memory file.

Facts about the host come in as arguments (HostFacts), so that every refusal has a test.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from launcher.config import MachineConfig
from launcher.errors import ConfigError
from launcher.process_unsafe import hwcap2

HWCAP2_FSGSBASE = 1 << 1  # arch/x86/include/uapi/asm/hwcap2.h
KERNEL_FSGSBASE = "5.9"  # the first that lets user mode use it
HEADROOM = 64 << 20  # for the machine's processes themselves


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What is checked about this host."""

    architecture: str
    hwcap2: int
    memory_available: int  # bytes

    @classmethod
    def of_this_host(cls) -> HostFacts:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        return cls(os.uname().machine, hwcap2(), available_bytes(meminfo))


def available_bytes(meminfo: str) -> int:
    """MemAvailable out of /proc/meminfo [proc(5)]."""
    for line in meminfo.splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable")


def check_host(facts: HostFacts) -> None:
    """The CPU and kernel can run translated code."""
    if facts.architecture != "x86_64":
        problem = f"its CPU is {facts.architecture}, and translated code is x86-64 code"
        raise ConfigError("this host", "", problem, "use an x86-64 host")
    if not facts.hwcap2 & HWCAP2_FSGSBASE:
        problem = "no FSGSBASE (AT_HWCAP2 bit 1), so a program can't set its GS base"
        remedy = f"use a CPU from 2013 or later with Linux {KERNEL_FSGSBASE} or later, without `nofsgsbase`"
        raise ConfigError("this host", "", problem, remedy)


def check_memory(config: MachineConfig, facts: HostFacts) -> None:
    """The host has the memory, or the disk has the room for the file that the user named."""
    size, file = config.memory_bytes, config.memory.file
    if file is not None:
        _check_memory_file(config, file, size)
    elif size + HEADROOM > facts.memory_available:
        problem = f"{_mib(size)} is beyond what the host has available, {_mib(facts.memory_available)}"
        raise config.error("machine.memory", problem, "write less, or end other programs")


def _check_memory_file(config: MachineConfig, file: Path, size: int) -> None:
    key, remedy = "memory.file", "name a new file, or one that was a machine's memory of this size"
    try:
        room = os.statvfs(file.parent)
        info = file.stat() if file.exists() else None
        if not os.access(file if info else file.parent, os.W_OK):
            raise config.error(key, f"{file} can't be written", remedy)
    except OSError as e:
        raise config.error(key, f"{file.parent}: {e.strerror}", "name a file in an existing folder") from e
    if info is not None and not stat.S_ISREG(info.st_mode):
        raise config.error(key, f"{file} is no regular file", remedy)
    if info is not None and info.st_size not in (0, size):
        raise config.error(key, f"{file} has {info.st_size} bytes, it is something else", remedy)
    if info is not None and _is_locked(file):
        raise config.error(key, f"{file} is another machine's memory", "name another file")
    held = info.st_blocks * 512 if info else 0
    if size > room.f_bavail * room.f_frsize + held:
        problem = f"{_mib(size)} is beyond the free space around {file}"
        raise config.error("machine.memory", problem, "write less, or name a file on another disk")


def _is_locked(file: Path) -> bool:
    with file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
