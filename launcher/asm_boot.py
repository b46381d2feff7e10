"""Guests written in assembly and kept as source: assembled with keystone when the machine starts.

The program lies at 1 MiB and starts at its first byte, in the same state as a Linux kernel by its 32-bit boot
protocol: flat segments, interrupts and paging off. Syntax is Intel, as keystone takes it.
Left out: include files, several sections, an entry other than the first byte.
"""

from __future__ import annotations

import re
from pathlib import Path

import keystone

from launcher.boot_plan import BDA_PA, BOOT_GDT, GDT_PA, BootPlan, bios_data_area, memory_map, start_state
from launcher.config import AsmBoot, MachineConfig
from launcher.errors import ConfigError

PROGRAM_PA = 0x100000
STACK_PA = 0x90000

DEFINES = re.compile(r"\s*(?:\.(?:set|equ)\s+([A-Za-z_]\w*)\s*,|([A-Za-z_]\w*)\s*(?::|=(?!=)))")


def prepare_asm(config: MachineConfig, boot: AsmBoot) -> BootPlan:
    """The plan for [boot] kind = "asm"; ConfigError with the line number for source keystone refuses."""
    try:
        source = boot.source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        problem = f"{boot.source} cannot be read ({e.strerror if isinstance(e, OSError) else e.reason})"
        raise config.error("boot.source", problem, "name an existing assembly source") from e
    program = assemble(source, boot.source)
    if PROGRAM_PA + len(program) > config.memory_bytes:
        raise ConfigError(boot.source, "", "does not fit into memory", "give the machine more memory")
    images = [(BDA_PA, bios_data_area(config)), (GDT_PA, BOOT_GDT), (PROGRAM_PA, program)]
    return BootPlan(images, start_state(PROGRAM_PA, STACK_PA), memory_map(config.memory_bytes))


def assemble(source: str, file: Path, origin: int = PROGRAM_PA) -> bytes:
    """The bytes of a 32-bit program which is loaded at `origin`."""
    lines = source.splitlines()
    error = _refusal(lines, len(lines), origin)
    if error is not None:
        number = _first_bad_line(lines, origin)
        error = _refusal(lines, number, origin) or error
        text = lines[number - 1].strip()
        raise ConfigError(f"{file}:{number}", "", f"keystone refuses {text!r} ({error})", "correct that line")
    program = _assemble(lines, origin)
    if not program:
        raise ConfigError(file, "", "assembles to nothing", "write at least one instruction")
    return program


def _assemble(lines: list[str], origin: int) -> bytes:
    assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_32)
    program, _count = assembler.asm("\n".join(lines) + "\n", origin, True)
    return program or b""


def _refusal(lines: list[str], count: int, origin: int) -> str | None:
    """What keystone says of the first `count` lines, given what the others define; None: nothing."""
    rest = [found[1] or found[2] for line in lines[count:] if (found := DEFINES.match(line))]
    try:
        _assemble(lines[:count] + [f"{name} = 0" for name in dict.fromkeys(rest)], origin)
    except keystone.KsError as e:
        return str(e.message if hasattr(e, "message") else e)
    return None


def _first_bad_line(lines: list[str], origin: int) -> int:
    """keystone names no line: search for the shortest beginning that it refuses."""
    good, bad = 0, len(lines)
    while bad - good > 1:
        middle = (good + bad) // 2
        if _refusal(lines, middle, origin) is None:
            good = middle
        else:
            bad = middle
    return bad
