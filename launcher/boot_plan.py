"""What must be in guest memory and in the CPU before the first instruction, for any kind of boot.

`prepare` turns a machine file into a BootPlan. It only reads files: it starts nothing, so a plan can be
made (and refused, with a ConfigError) before any process of the machine exists. On a machine reset the
same plan is loaded again.

Left out: firmware and boot sectors (kinds of boot which start at the reset vector).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

if TYPE_CHECKING:
    from launcher.config import MachineConfig

E820_RAM = 1
E820_RESERVED = 2


@dataclass(frozen=True, slots=True)
class BootPlan:
    """Images (pa, bytes) in loading order, the CPU's start state, and the memory map the guest is told."""

    images: list[tuple[int, bytes]]
    start: dict[str, int]  # eip, esp, esi, eax, ..., gdt_base, gdt_limit, cs, ds: 32-bit flat, IF=0, PG=0
    e820: list[tuple[int, int, int]] = field(default_factory=list)  # (base, length, type)


def prepare(config: MachineConfig) -> BootPlan:
    """Read the files the machine boots from; raises launcher.errors.ConfigError for what can't boot."""
    from launcher.asm_boot import prepare_asm
    from launcher.config import AsmBoot, LinuxBoot
    from launcher.linux_boot import prepare_linux

    match config.boot:
        case LinuxBoot():
            return prepare_linux(config, config.boot)
        case AsmBoot():
            return prepare_asm(config, config.boot)
        case _:
            assert_never(config.boot)
