"""The MP configuration table, as a PC's firmware leaves it beside the ACPI tables.

Source: MultiProcessor Specification 1.4; [n] is a section of it. A kernel that has ACPI takes the MADT
instead, but looks for this table first: Debian's i386 kernel maps and unmaps 35,000 pages while it searches
the BIOS area for one that isn't there. In the extended BIOS data area it is found at once. With `acpi=off`
it is what a kernel goes by.
Left out: buses other than ISA, extended entries.
"""

from __future__ import annotations

import struct

from cpu_node.cpuid import SIGNATURE
from cpu_node.lapic_state import VERSION_REGISTER
from devices.ioapic import PART
from launcher.acpi_tables import LOCAL_APIC_PA, PIT_GSI, AcpiMachine, checksum
from launcher.boot_plan import EBDA_PA, EBDA_SIZE

OEM_ID, PRODUCT_ID = b"BCKPLN  ", b"BACKPLANE   "
SPECIFICATION = 4  # 1.4
POINTER_OFFSET = 16  # in the EBDA, whose first byte is its size in KiB; on a 16-byte boundary [4.1]
TABLE_OFFSET = 32
PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)  # entry types [4.3]
INT, NMI, _, EXT_INT = range(4)  # interrupt types [table 4-11]
ENABLED, BOOTSTRAP = 1, 2
FPU, APIC = 1 << 0, 1 << 9  # of the feature flags, the only ones that must be right [4.3.1]
ISA_BUS, LOCAL_APIC_ID, EVERY_APIC = 0, 0, 0xFF
ACTIVE_HIGH, LEVEL = 0x1, 0xC
CASCADE = 2  # the second 8259's output


def entries(machine: AcpiMachine, ioapic_pa: int, ioapic_id: int) -> list[bytes]:
    """One processor, ISA, one I/O APIC, and the interrupts as the MADT has them."""
    out = [
        struct.pack("<BBBBII8x", PROCESSOR, LOCAL_APIC_ID, VERSION_REGISTER & 0xFF, ENABLED | BOOTSTRAP,
                    SIGNATURE & 0xFFF, FPU | APIC),
        struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "),
        struct.pack("<BBBBI", IO_APIC, ioapic_id, PART, ENABLED, ioapic_pa),
        struct.pack("<BBHBBBB", IO_INTERRUPT, EXT_INT, 0, ISA_BUS, 0, ioapic_id, 0),
    ]  # fmt: skip
    for irq in range(16):
        if irq != CASCADE:
            flags = ACTIVE_HIGH | LEVEL if irq == machine.sci_irq else 0  # 0: as ISA does
            pin = PIT_GSI if irq == 0 else irq
            out.append(struct.pack("<BBHBBBB", IO_INTERRUPT, INT, flags, ISA_BUS, irq, ioapic_id, pin))
    out.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, EXT_INT, 0, ISA_BUS, 0, LOCAL_APIC_ID, 0))
    out.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, 0, ISA_BUS, 0, EVERY_APIC, 1))
    return out


def extended_bios_data_area(machine: AcpiMachine, ioapic_pa: int, ioapic_id: int) -> bytes:
    """The EBDA with floating pointer [4.1] and configuration table [4.2], to be loaded at EBDA_PA."""
    body = entries(machine, ioapic_pa, ioapic_id)
    length = 44 + sum(map(len, body))
    head = struct.pack("<4sHBB8s12sIHHIHBB", b"PCMP", length, SPECIFICATION, 0, OEM_ID, PRODUCT_ID, 0, 0,
                       len(body), LOCAL_APIC_PA, 0, 0, 0)  # fmt: skip
    table = bytearray(head + b"".join(body))
    table[7] = checksum(table)
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", EBDA_PA + TABLE_OFFSET, 1, SPECIFICATION, 0))
    pointer[10] = checksum(pointer)
    area = bytearray(EBDA_SIZE)
    area[0] = EBDA_SIZE >> 10
    area[POINTER_OFFSET : POINTER_OFFSET + len(pointer)] = pointer
    area[TABLE_OFFSET : TABLE_OFFSET + len(table)] = table
    assert len(area) == EBDA_SIZE
    return bytes(area)
