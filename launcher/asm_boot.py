"""Guests written in assembly and kept as source: assembled with keystone when the machine starts.

The program lies at 1 MiB and starts at its first byte, in the same state as a Linux kernel by its 32-bit boot
protocol: flat segments, interrupts and paging off. Syntax is Intel, as keystone takes it.
Left out: include files, several sections, directives over several lines (.macro, .rept, .if), an entry other
than the first byte.
"""

from __future__ import annotations

import re
from pathlib import Path

import keystone

from cpu_node.literals import hexadecimal
from launcher.boot_plan import BDA_PA, BOOT_GDT, GDT_PA, BootPlan, bios_data_area, memory_map, start_state
from launcher.config import AsmBoot, MachineConfig
from launcher.errors import ConfigError

PROGRAM_PA = 0x100000
STACK_PA = 0x90000

LABEL = re.compile(r"\s*([A-Za-z_]\w*)\s*:")
CONSTANT = re.compile(r"\s*(?:\.(?:set|equ)\s+([A-Za-z_]\w*)\s*,|([A-Za-z_]\w*)\s*=)")


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
    """The bytes of a 32-bit program which is loaded at `origin`.

    keystone names no line in its errors, and drops a malformed statement which isn't the last one without a
    word. So first each line is assembled by itself, with every symbol of the program known.
    """
    lines = source.splitlines()
    # stand-ins: a label near enough for every jump, a constant small enough for every operand
    labels = dict.fromkeys((found[1] for line in lines if (found := LABEL.match(line))), origin)
    constants = dict.fromkeys((found[1] or found[2] for line in lines if (found := CONSTANT.match(line))), 0)
    known = [f"{name} = {value}" for name, value in (labels | constants).items()]
    for number, whole_line in enumerate(lines, 1):
        line = LABEL.sub("", whole_line)
        try:
            _assemble([*known, line], origin)
        except keystone.KsError as e:
            problem = f"keystone refuses {whole_line.strip()!r} ({e})"
            raise ConfigError(f"{file}:{number}", "", problem, "correct that line") from e
    try:
        program = _assemble(lines, origin)
    except keystone.KsError as e:
        remedy = "see that no symbol is defined twice and no short jump is too far"
        raise ConfigError(file, "", f"keystone refuses the whole ({e})", remedy) from e
    if not program:
        raise ConfigError(file, "", "assembles to nothing", "write at least one instruction")
    return program


def _assemble(lines: list[str], origin: int) -> bytes:
    assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_32)
    program, _count = assembler.asm(hexadecimal("\n".join(lines) + "\n"), origin, True)
    return program or b""
