"""The ACPI tables, walked as an operating system walks them; and by iasl where it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from devices.acpi_pm import SLP_TYP_S5
from launcher import aml
from launcher.acpi_tables import TABLES_PA, AcpiMachine, build, describe
from launcher.boot_plan import VirtioPlace
from launcher.config import read_config

MACHINES = Path(__file__).parents[2] / "machines"
PC = AcpiMachine(
    pm_base=0x600,
    sci_irq=9,
    reset_port=0x60C,
    reset_value=1,
    uarts=((0x3F8, 4),),
    keyboard_irq=1,
    rtc=(0x70, 8),
    virtio=(VirtioPlace(0xD000_0000, 0x200, 10), VirtioPlace(0xD000_1000, 0x200, 11)),
    ioapic_pa=0xFEC0_0000,
    ioapic_id=1,
)


def tables_of(machine: AcpiMachine) -> dict[str, bytes]:
    """Every table that can be reached from the RSDP, by signature; checks all checksums on the way."""
    base, image = build(machine)
    assert base == TABLES_PA
    assert TABLES_PA + len(image) <= 0x100000

    def table_at(pa: int) -> bytes:
        (length,) = struct.unpack_from("<I", image, pa - base + 4)
        table = image[pa - base : pa - base + length]
        assert len(table) == length
        return table

    assert image.startswith(b"RSD PTR ")
    assert sum(image[:20]) & 0xFF == 0
    rsdt = table_at(struct.unpack_from("<I", image, 16)[0])
    found = {"RSDT": rsdt}
    for (pa,) in struct.iter_unpack("<I", rsdt[36:]):
        table = table_at(pa)
        found[table[:4].decode()] = table
    facs_pa, dsdt_pa = struct.unpack_from("<II", found["FACP"], 36)
    assert facs_pa % 64 == 0
    found["DSDT"] = table_at(dsdt_pa)
    for signature, table in found.items():
        assert sum(table) & 0xFF == 0, signature
    found["FACS"] = table_at(facs_pa)
    return found


def test_every_table_is_reached_and_sums_to_zero() -> None:
    assert set(tables_of(PC)) == {"RSDT", "FACP", "APIC", "DSDT", "FACS"}
    assert set(tables_of(replace(PC, ioapic_pa=None))) == {"RSDT", "FACP", "DSDT", "FACS"}


def test_the_fadt_names_the_power_management_ports() -> None:
    fadt = tables_of(PC)["FACP"]
    assert len(fadt) == 244
    assert struct.unpack_from("<H", fadt, 46) == (9,)  # SCI_INT
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # SMI_CMD: always in ACPI mode
    assert struct.unpack_from("<8I", fadt, 56) == (0x600, 0, 0x604, 0, 0, 0x608, 0, 0)
    assert tuple(fadt[88:92]) == (4, 2, 0, 4)
    (boot_flags,) = struct.unpack_from("<H", fadt, 109)
    assert boot_flags == 0x000F  # legacy devices, 8042, no VGA, no MSI
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags == 1 << 0 | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10  # fixed buttons, 32-bit timer, reset register
    (flags,) = struct.unpack_from("<I", tables_of(replace(PC, timer_bits=24))["FACP"], 112)
    assert not flags & 1 << 8
    assert fadt[116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, 0x60C)
    assert fadt[128] == 1


def test_absent_devices_are_absent_from_the_tables() -> None:
    bare = tables_of(replace(PC, uarts=(), keyboard_irq=None, rtc=None, virtio=(), ioapic_pa=None))
    (boot_flags,) = struct.unpack_from("<H", bare["FACP"], 109)
    assert boot_flags == 0x002D  # no 8042, no CMOS RTC
    for hid in ("PNP0501", "PNP0303", "PNP0B00"):
        assert aml.eisa_id(hid) in tables_of(PC)["DSDT"]
        assert aml.eisa_id(hid) not in bare["DSDT"]
    assert tables_of(PC)["DSDT"].count(b"LNRO0005\0") == 2
    assert b"LNRO0005" not in bare["DSDT"]


def test_a_virtio_device_is_described_with_its_registers_and_its_line() -> None:
    assert aml.resources(aml.memory(0xD000_1000, 0x200), aml.irq(11)) in tables_of(PC)["DSDT"]
    assert aml.memory(0xD000_1000, 0x200) == bytes.fromhex("860900010010 00d000020000".replace(" ", ""))
    assert aml.string("LNRO0005") == b"\x0dLNRO0005\0"


def test_the_madt_has_one_processor_one_ioapic_and_the_overrides() -> None:
    madt = tables_of(PC)["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert entries == [
        bytes([0, 8, 0, 0, 1, 0, 0, 0]),
        bytes([1, 12, 1, 0]) + struct.pack("<II", 0xFEC0_0000, 0),
        bytes([2, 10, 0, 0]) + struct.pack("<IH", 2, 0),  # the 8254 is at pin 2
        bytes([2, 10, 0, 9]) + struct.pack("<IH", 9, 0xD),  # SCI: level, active high
        bytes([4, 6, 0xFF, 0, 0, 1]),
    ]


def test_the_machine_files_describe_what_they_have() -> None:
    linux, pic = (describe(read_config(MACHINES / f"{name}.toml")) for name in ("linux", "linux-pic"))
    assert linux is not None
    assert pic is not None
    assert (linux.ioapic_pa, linux.ioapic_id) == (0xFEC0_0000, 1)
    assert (linux.pm_base, linux.sci_irq) == (0x600, 9)
    assert (linux.uarts, linux.keyboard_irq, linux.rtc) == (((0x3F8, 4),), 1, (0x70, 8))
    assert pic == replace(linux, ioapic_pa=None, ioapic_id=None)


def test_power_off_is_described_as_the_hello_guest_does_it() -> None:
    s5 = (
        bytes([aml.NAME_OP])
        + b"_S5_"
        + aml.package(*[aml.integer(v) for v in (SLP_TYP_S5, SLP_TYP_S5, 0, 0)])
    )
    assert s5 in tables_of(PC)["DSDT"]
    assert f"SLP_TYP_S5  = {SLP_TYP_S5}" in (MACHINES / "hello" / "hello.S").read_text()


def test_aml_lengths_and_integers() -> None:
    assert aml.pkg(bytes(62)) == bytes([63]) + bytes(62)
    assert aml.pkg(bytes(63)) == bytes([0x41, 0x04]) + bytes(63)  # 65 = 0x041
    assert aml.pkg(bytes(5000))[:3] == bytes([0x8B, 0x38, 0x01])  # 5003 = 0x0138B
    assert [aml.integer(v) for v in (0, 1, 5, 0x1234, 0x12345678)] == [
        b"\x00",
        b"\x01",
        b"\x0a\x05",
        b"\x0b\x34\x12",
        b"\x0c\x78\x56\x34\x12",
    ]
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")
    for bad in ("", "abcd", "1ABC", "TOOLONG"):
        with pytest.raises(ValueError, match="no AML name"):
            aml.name_seg(bad)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (acpica-tools) is not installed")
def test_iasl_takes_every_table_and_compiles_the_dsdt_back(tmp_path: Path) -> None:
    tables = tables_of(PC)
    for signature, table in tables.items():
        (tmp_path / f"{signature}.dat").write_bytes(table)
        done = subprocess.run(
            ["iasl", "-d", f"{signature}.dat"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Incorrect checksum" not in done.stdout + done.stderr
    done = subprocess.run(["iasl", "-we", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "DSDT.aml").read_bytes()[36:] == tables["DSDT"][36:]
