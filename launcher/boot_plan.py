"""What must be in guest memory and in the CPU before the first instruction, for any kind of boot.

`prepare` turns a machine file into a BootPlan. It only reads files: it starts nothing, so a plan can be
made (and refused, with a ConfigError) before any process of the machine exists. On a machine reset the
same plan is loaded again.

Left out: firmware and boot sectors (kinds of boot which start at the reset vector).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

from launcher.config import AsmBoot, DeviceTable, LinuxBoot, MachineConfig
from memory_node.regions import E820_RESERVED, e820, pc_regions

E820Range = tuple[int, int, int]  # base, length, type

GDT_PA = 0x800
BOOT_CODE_SELECTOR, BOOT_DATA_SELECTOR = 0x10, 0x18
# null, null, flat 32-bit code, flat 32-bit data: the Linux boot protocol's selectors, accessed bits set
BOOT_GDT = struct.pack("<4Q", 0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

BDA_PA, EBDA_PA, EBDA_SIZE = 0x400, 0x9FC00, 0x400
BDA_COM_PORTS, BDA_EBDA_SEGMENT, BDA_MEMORY_KIB = 0x00, 0x0E, 0x13  # offsets in the BIOS data area
MAX_COM_PORTS = 4


class VirtioPlace(NamedTuple):
    """Where a virtio device's registers are, and the ISA IRQ of its line."""

    base: int
    length: int
    irq: int


@dataclass(frozen=True, slots=True)
class BootPlan:
    """Images (pa, bytes) in loading order, the CPU's start state, and the memory map the guest is told.

    `start` has eip, esp, esi and the other general registers, gdt_base, gdt_limit, cs and ds; the CPU starts
    in flat 32-bit protected mode, interrupts and paging off.
    """

    images: list[tuple[int, bytes]]
    start: dict[str, int]
    e820: list[E820Range]


def prepare(config: MachineConfig, virtio: Sequence[VirtioPlace] = ()) -> BootPlan:
    """Read the files the machine boots from; raises launcher.errors.ConfigError for what can't boot."""
    from launcher.asm_boot import prepare_asm  # here, because they import this module
    from launcher.linux_boot import prepare_linux

    match config.boot:
        case LinuxBoot():
            return prepare_linux(config, config.boot, virtio)
        case AsmBoot():
            return prepare_asm(config, config.boot)
        case _:
            assert_never(config.boot)


def start_state(eip: int, esp: int, esi: int = 0) -> dict[str, int]:
    """A BootPlan's `start` with the boot GDT and all other registers 0."""
    registers = dict.fromkeys(("eax", "ebx", "ecx", "edx", "edi", "ebp"), 0)
    segments = {"gdt_base": GDT_PA, "gdt_limit": len(BOOT_GDT) - 1}
    selectors = {"cs": BOOT_CODE_SELECTOR, "ds": BOOT_DATA_SELECTOR}
    return {"eip": eip, "esp": esp, "esi": esi, **registers, **segments, **selectors}


def memory_map(memory_size: int) -> list[E820Range]:
    """The E820 map: the memory node's regions, less the extended BIOS data area."""
    return e820(pc_regions(memory_size, 0), [(EBDA_PA, EBDA_SIZE, E820_RESERVED)])


def devices_of(config: MachineConfig, kind: str) -> list[DeviceTable]:
    """The machine's devices of one built-in type, in the machine file's order."""
    return [device for device in config.devices if device.type == kind]


def bios_data_area(config: MachineConfig) -> bytes:
    """The fields which operating systems read: COM ports, EBDA segment, base memory in KiB."""
    area = bytearray(0x100)
    bases = [min(device.ports.values()) for device in devices_of(config, "uart16550") if device.ports]
    ports = bases[:MAX_COM_PORTS]
    struct.pack_into(f"<{len(ports)}H", area, BDA_COM_PORTS, *ports)
    struct.pack_into("<H", area, BDA_EBDA_SEGMENT, EBDA_PA >> 4)
    struct.pack_into("<H", area, BDA_MEMORY_KIB, EBDA_PA >> 10)
    return bytes(area)
