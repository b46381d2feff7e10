"""ACPI tables for the machine: RSDP, RSDT, FADT, FACS, DSDT and, with APICs, MADT.

Source: ACPI specification 6.4, chapter 5 (tables); [n] is a section of it. The machine is in ACPI mode from
the start (SMI_CMD is 0), there is no firmware to switch it. The tables describe ISA devices and
virtio devices on memory-mapped registers (LNRO0005, as Linux's virtio_mmio driver knows them).
Left out: XSDT (a 32-bit kernel needs none), PCI, processors' power states, SMBIOS, HPET.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from devices.acpi_pm import CONTROL, RESET, RESET_VALUE, SLP_TYP_S5, TIMER, AcpiPmSettings
from devices.ioapic import IoApicSettings
from launcher import aml
from launcher.boot_plan import VirtioPlace, devices_of
from launcher.config import MachineConfig

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"BCKPLN", b"BACKPLAN", b"BKPL"
TABLES_PA, TABLES_END = 0xE0000, 0x100000  # the BIOS area, searched for the RSDP on 16-byte steps [5.2.5.1]
LOCAL_APIC_PA = 0xFEE00000

FADT_REVISION, FADT_LENGTH = 3, 244  # ACPI 2.0 layout: the first one with a reset register
FADT_WBINVD, FADT_PROC_C1 = 1 << 0, 1 << 2
FADT_FIX_RTC_ABSENT, FADT_TMR_VAL_EXT, FADT_RESET_REG_SUP = 1 << 6, 1 << 8, 1 << 10
BOOT_LEGACY_DEVICES, BOOT_8042, BOOT_NO_VGA, BOOT_NO_MSI = 1 << 0, 1 << 1, 1 << 2, 1 << 3
BOOT_NO_CMOS_RTC = 1 << 5
PM1_EVT_LENGTH, PM1_CNT_LENGTH, PM_TMR_LENGTH = 4, 2, 4
LATENCY_C2_ABSENT, LATENCY_C3_ABSENT = 101, 1001  # microseconds; above 100 and 1000 the state is absent
CENTURY_CMOS_INDEX = 0x32
SYSTEM_IO = 1  # address space of a Generic Address Structure [5.2.3.2]

MADT_PCAT_COMPAT = 1
MADT_LOCAL_APIC, MADT_IO_APIC, MADT_OVERRIDE, MADT_LOCAL_NMI = 0, 1, 2, 4
INTI_ACTIVE_HIGH, INTI_LEVEL = 0x1, 0xC  # MPS INTI flags [table 5.26]
PIT_GSI = 2  # on a PC the 8254 is wired to I/O APIC pin 2, pin 0 carries the 8259's output


@dataclass(frozen=True, slots=True)
class AcpiMachine:
    """What the tables say about a machine; None means that the part is absent."""

    pm_base: int
    sci_irq: int
    reset_port: int
    reset_value: int
    timer_bits: int = 32
    uarts: tuple[tuple[int, int], ...] = ()  # (port, irq)
    keyboard_irq: int | None = None  # of the 8042
    rtc: tuple[int, int] | None = None  # (port, irq)
    virtio: tuple[VirtioPlace, ...] = ()
    ioapic_pa: int | None = None  # given: the machine has APICs, and a MADT
    ioapic_id: int | None = None


def describe(config: MachineConfig, virtio: Sequence[VirtioPlace] = ()) -> AcpiMachine | None:
    """What the machine file says; None without a wired acpi_pm device: then there are no tables."""
    managers = [device for device in devices_of(config, "acpi_pm") if device.ports and device.irqs]
    if not managers:
        return None
    pm_base = min(managers[0].ports.values())

    def isa(kind: str) -> list[tuple[int, int]]:
        found = [device for device in devices_of(config, kind) if device.ports and device.irqs]
        return [(min(device.ports.values()), min(device.irqs.values())) for device in found]

    keyboards, clocks = isa("i8042"), isa("rtc_cmos")
    ioapics = [device for device in devices_of(config, "ioapic") if device.mmio]
    with_apic = config.cpu.apic and ioapics
    return AcpiMachine(
        pm_base=pm_base,
        sci_irq=min(managers[0].irqs.values()),
        reset_port=pm_base + RESET,
        reset_value=RESET_VALUE,
        timer_bits=managers[0].settings.get("timer_bits", AcpiPmSettings().timer_bits),
        uarts=tuple(isa("uart16550")),
        keyboard_irq=keyboards[0][1] if keyboards else None,
        rtc=clocks[0] if clocks else None,
        virtio=tuple(virtio),
        ioapic_pa=min(ioapics[0].mmio.values()) if with_apic else None,
        ioapic_id=ioapics[0].settings.get("id", IoApicSettings().id) if with_apic else None,
    )


def checksum(data: bytes | bytearray) -> int:
    """The byte which makes the sum of all bytes 0 modulo 256."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: the common header, with its checksum, and the body [5.2.6]."""
    head = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    whole = bytearray(head + body)
    whole[9] = checksum(whole)
    return bytes(whole)


def dsdt(machine: AcpiMachine) -> bytes:
    """Devices with their resources, and the S5 sleep package which power-off needs."""
    devices = []
    for number, (port, irq) in enumerate(machine.uarts, 1):
        devices.append(
            aml.device(
                f"COM{number}",
                aml.name("_HID", aml.eisa_id("PNP0501")),
                aml.name("_UID", aml.integer(number)),
                aml.name("_CRS", aml.resources(aml.io_port(port, 8), aml.irq(irq))),
            )
        )
    if machine.keyboard_irq is not None:
        crs = aml.resources(aml.io_port(0x60, 1), aml.io_port(0x64, 1), aml.irq(machine.keyboard_irq))
        devices.append(aml.device("KBD", aml.name("_HID", aml.eisa_id("PNP0303")), aml.name("_CRS", crs)))
    if machine.rtc is not None:
        crs = aml.resources(aml.io_port(machine.rtc[0], 2), aml.irq(machine.rtc[1]))
        devices.append(aml.device("RTC", aml.name("_HID", aml.eisa_id("PNP0B00")), aml.name("_CRS", crs)))
    for number, (base, length, irq) in enumerate(machine.virtio):
        devices.append(
            aml.device(
                f"VR{number:02X}",
                aml.name("_HID", aml.string("LNRO0005")),
                aml.name("_UID", aml.integer(number)),
                aml.name("_CRS", aml.resources(aml.memory(base, length), aml.irq(irq))),
            )
        )
    slp_typ = aml.integer(SLP_TYP_S5)
    s5 = aml.name("_S5", aml.package(slp_typ, slp_typ, aml.integer(0), aml.integer(0)))
    return table(b"DSDT", 1, aml.scope("_SB", *devices) + s5)


def facs() -> bytes:
    """Firmware ACPI Control Structure: has no checksum [5.2.10]."""
    return struct.pack("<4sI", b"FACS", 64).ljust(64, b"\0")


def generic_address(port: int, length: int, access: int) -> bytes:
    """Generic Address Structure of `length` bytes of ports, `access` at a time [5.2.3.2]."""
    return struct.pack("<BBBBQ", SYSTEM_IO, length * 8, 0, access.bit_length(), port)


def fadt(machine: AcpiMachine, facs_pa: int, dsdt_pa: int) -> bytes:
    """Fixed ACPI Description Table [5.2.9]; fields which stay 0 name hardware the machine has not."""
    pm = machine.pm_base
    boot_flags = BOOT_LEGACY_DEVICES | BOOT_NO_VGA | BOOT_NO_MSI
    if machine.keyboard_irq is not None:
        boot_flags |= BOOT_8042
    if machine.rtc is None:
        boot_flags |= BOOT_NO_CMOS_RTC
    flags = FADT_WBINVD | FADT_PROC_C1 | FADT_FIX_RTC_ABSENT | FADT_RESET_REG_SUP
    if machine.timer_bits == 32:
        flags |= FADT_TMR_VAL_EXT
    body = struct.pack("<IIBBHI4B", facs_pa, dsdt_pa, 0, 0, machine.sci_irq, 0, 0, 0, 0, 0)
    body += struct.pack("<8I", pm, 0, pm + CONTROL, 0, 0, pm + TIMER, 0, 0)
    body += struct.pack("<8B", PM1_EVT_LENGTH, PM1_CNT_LENGTH, 0, PM_TMR_LENGTH, 0, 0, 0, 0)
    body += struct.pack("<4H", LATENCY_C2_ABSENT, LATENCY_C3_ABSENT, 0, 0)
    body += struct.pack("<5BHBI", 0, 0, 0, 0, CENTURY_CMOS_INDEX, boot_flags, 0, flags)
    body += generic_address(machine.reset_port, 1, 1)
    body += struct.pack("<BHB", machine.reset_value, 0, 0)
    body += struct.pack("<QQ", 0, dsdt_pa)  # X_FIRMWARE_CTRL only where FIRMWARE_CTRL is 0
    body += generic_address(pm, PM1_EVT_LENGTH, 2) + bytes(12)
    body += generic_address(pm + CONTROL, PM1_CNT_LENGTH, 2) + bytes(12)
    body += bytes(12)
    body += generic_address(pm + TIMER, PM_TMR_LENGTH, 4)
    body += bytes(24)
    assert len(body) == FADT_LENGTH - 36
    return table(b"FACP", FADT_REVISION, body)


def madt(machine: AcpiMachine, ioapic_pa: int, ioapic_id: int) -> bytes:
    """Multiple APIC Description Table: one processor, one I/O APIC, the ISA overrides [5.2.12]."""
    sci_flags = INTI_ACTIVE_HIGH | INTI_LEVEL
    body = struct.pack("<II", LOCAL_APIC_PA, MADT_PCAT_COMPAT)
    body += struct.pack("<BBBBI", MADT_LOCAL_APIC, 8, 0, 0, 1)
    body += struct.pack("<BBBBII", MADT_IO_APIC, 12, ioapic_id, 0, ioapic_pa, 0)
    body += struct.pack("<BBBBIH", MADT_OVERRIDE, 10, 0, 0, PIT_GSI, 0)
    body += struct.pack("<BBBBIH", MADT_OVERRIDE, 10, 0, machine.sci_irq, machine.sci_irq, sci_flags)
    body += struct.pack("<BBBHB", MADT_LOCAL_NMI, 6, 0xFF, 0, 1)  # every processor's LINT1
    return table(b"APIC", 1, body)


def rsdt(table_pas: list[int]) -> bytes:
    return table(b"RSDT", 1, struct.pack(f"<{len(table_pas)}I", *table_pas))


def rsdp(rsdt_pa: int) -> bytes:
    """Root System Description Pointer, ACPI 1.0 form of 20 bytes [5.2.5.3]."""
    whole = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 0, rsdt_pa))
    whole[8] = checksum(whole)
    return bytes(whole)


def build(machine: AcpiMachine) -> tuple[int, bytes]:
    """All tables as one image for the BIOS area: (pa of the RSDP = pa of the image, image)."""
    image = bytearray(64)  # the RSDP's place; the FACS needs 64-byte alignment, and so all get it

    def place(data: bytes) -> int:
        pa = TABLES_PA + len(image)
        image.extend(data.ljust(-len(data) % 64 + len(data), b"\0"))
        return pa

    facs_pa = place(facs())
    dsdt_pa = place(dsdt(machine))
    tables = [place(fadt(machine, facs_pa, dsdt_pa))]
    if machine.ioapic_pa is not None and machine.ioapic_id is not None:
        tables.append(place(madt(machine, machine.ioapic_pa, machine.ioapic_id)))
    pointer = rsdp(place(rsdt(tables)))
    image[: len(pointer)] = pointer
    return TABLES_PA, bytes(image)
