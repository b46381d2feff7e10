"""The MP table, found and read as a kernel does it; it says what the MADT says."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

from launcher.acpi_tables import madt
from launcher.boot_plan import EBDA_PA, EBDA_SIZE, prepare
from launcher.config import read_config
from launcher.mp_table import extended_bios_data_area
from tests.launcher.test_acpi import PC

LENGTHS = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
MACHINES = Path(__file__).parents[2] / "machines"


def found() -> tuple[bytes, bytes]:
    """(floating pointer, table), searched for on 16-byte steps [4]."""
    assert PC.ioapic_pa is not None
    assert PC.ioapic_id is not None
    area = extended_bios_data_area(PC, PC.ioapic_pa, PC.ioapic_id)
    assert len(area) == EBDA_SIZE
    places = [at for at in range(0, EBDA_SIZE, 16) if area[at : at + 4] == b"_MP_"]
    (at,) = places
    pointer = area[at : at + 16]
    (pa,) = struct.unpack_from("<I", pointer, 4)
    start = pa - EBDA_PA
    (length,) = struct.unpack_from("<H", area, start + 4)
    return pointer, area[start : start + length]


def entries(table: bytes) -> list[bytes]:
    out, at = [], 44
    while at < len(table):
        out.append(table[at : at + LENGTHS[table[at]]])
        at += LENGTHS[table[at]]
    assert at == len(table)
    return out


def test_pointer_and_table_sum_to_zero() -> None:
    pointer, table = found()
    assert sum(pointer) & 0xFF == sum(table) & 0xFF == 0
    assert pointer[8] == 1
    assert pointer[9] == table[6] == 4
    assert table.startswith(b"PCMP")
    assert pointer[11:] == bytes(5)  # a table, no default configuration; virtual wire


def test_entries_are_counted_and_in_the_order_the_specification_wants() -> None:
    _, table = found()
    assert struct.unpack_from("<H", table, 34)[0] == len(entries(table))
    kinds = [entry[0] for entry in entries(table)]
    assert kinds == sorted(kinds)


def test_it_agrees_with_the_madt() -> None:
    _, table = found()
    apic = madt(PC, 0xFEC0_0000, 1)
    assert struct.unpack_from("<I", table, 36) == struct.unpack_from("<I", apic, 36)
    by_kind: dict[int, list[bytes]] = {}
    for entry in entries(table):
        by_kind.setdefault(entry[0], []).append(entry)
    (processor,), (ioapic,) = by_kind[0], by_kind[2]
    assert processor[1] == 0
    assert processor[3] == 3  # enabled, the bootstrap processor
    assert ioapic[1] == 1
    assert ioapic[3] == 1
    assert struct.unpack_from("<I", ioapic, 4) == (0xFEC0_0000,)
    interrupts = {}
    for entry in by_kind[3]:
        _, kind, flags, bus, irq, apic_id, pin = struct.unpack("<BBHBBBB", entry)
        assert (bus, apic_id) == (0, 1)
        interrupts[kind, irq] = (pin, flags)
    assert interrupts.pop((3, 0)) == (0, 0)  # the 8259's output
    assert interrupts.pop((0, 0)) == (2, 0)
    assert interrupts.pop((0, PC.sci_irq)) == (PC.sci_irq, 0xD)
    assert interrupts == {(0, irq): (irq, 0) for irq in range(16) if irq not in (0, 2, PC.sci_irq)}


def test_only_a_machine_with_apics_has_one(tmp_path: Path) -> None:
    text = (MACHINES / "linux.toml").read_text().replace("../", f"{MACHINES.parent}/")
    for apic, expected in (("true", True), ("false", False)):
        file = tmp_path / f"{apic}.toml"
        file.write_text(text.replace("apic = true", f"apic = {apic}"))
        plan = prepare(read_config(file))
        assert any(pa == EBDA_PA for pa, _ in plan.images) == expected


def test_another_sci_is_another_entry() -> None:
    area = extended_bios_data_area(replace(PC, sci_irq=11), 0xFEC0_0000, 1)
    assert struct.pack("<BBHBBBB", 3, 0, 0xD, 0, 11, 1, 11) in area
    assert struct.pack("<BBHBBBB", 3, 0, 0, 0, 9, 1, 9) in area
