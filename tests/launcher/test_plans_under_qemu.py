"""The boot plans under QEMU: the guests and tables are right, whatever our own machine does with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from launcher import acpi_tables
from launcher.asm_boot import PROGRAM_PA, assemble
from launcher.boot_plan import prepare
from launcher.config import LinuxBoot, read_config
from tests.launcher import qemu_plan

MACHINES = Path(__file__).parents[2] / "machines"
QEMU_S5_SLP_TYP = 0  # the PIIX4's; ours is in the DSDT

pytestmark = pytest.mark.skipif(qemu_plan.QEMU is None, reason="qemu-system-i386 is not installed")


def test_the_hello_guest_ticks_echoes_and_powers_off(tmp_path: Path) -> None:
    config = read_config(MACHINES / "hello.toml")
    plan = prepare(config)
    file = MACHINES / "hello" / "hello.S"
    constant = f"SLP_TYP_S5  = {acpi_tables.SLP_TYP_S5}"
    program = assemble(file.read_text().replace(constant, f"SLP_TYP_S5 = {QEMU_S5_SLP_TYP}"), file)
    images = [(pa, program if pa == PROGRAM_PA else image) for pa, image in plan.images]
    said = qemu_plan.run(
        dataclasses.replace(plan, images=images), tmp_path, 16, answer=(b"powers off.\r\n", b"ab\rq")
    )
    assert "Hello from a PC made of processes.\r\n" in said
    for number in range(1, 6):
        assert f"tick {number}\r\n" in said
    assert said.endswith("q powers off.\r\nab\r\nq\r\nGoodbye.\r\n")


@pytest.mark.machine
@pytest.mark.parametrize(
    ("name", "memory_mib", "cpu"), [("linux", 64, "qemu32"), ("linux-pic", 256, "pentium3,-apic")]
)
def test_linux_boots_and_powers_off(
    name: str, memory_mib: int, cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acpi_tables, "SLP_TYP_S5", QEMU_S5_SLP_TYP)
    config = read_config(MACHINES / f"{name}.toml")
    assert isinstance(config.boot, LinuxBoot)
    boot = msgspec.structs.replace(config.boot, cmdline=config.boot.cmdline + " bench=off cryptomgr.notests")
    machine = msgspec.structs.replace(config.machine, memory=memory_mib << 20)
    plan = prepare(dataclasses.replace(config, boot=boot, machine=machine))
    said = qemu_plan.run(plan, tmp_path, memory_mib, cpu)
    assert "pnp: PnP ACPI: found 3 devices" in said
    assert "ttyS0 at I/O 0x3f8 (irq = 4, base_baud = 115200) is a 16550A" in said
    assert "PNP: PS/2 Controller [PNP0303:KBD] at 0x60,0x64 irq 1" in said
    assert ("Using 1 I/O APICs" in said) == (name == "linux")
    assert "GUEST-READY" in said
    assert "reboot: Power down" in said
