"""What a machine reports, and that it does as a PC does: exceptions, ports nobody owns, resets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.machine.drive import Screen
from tests.machine.files import asm_machine

pytestmark = pytest.mark.machine

RESETS = {
    "triple fault": ".byte 0x0f, 0x01, 0x1d\n.long no_idt\nint3",  # lidt [no_idt]: no vector has a gate
    "8042": "mov al, 0xfe\nout 0x64, al",  # pulse output port bit 0
    "port 92h": "mov al, 1\nout 0x92, al",
    "ACPI": "mov dx, 0x60c\nmov al, 1\nout dx, al",  # the FADT's reset register and value
}


def test_exceptions_and_open_bus_are_reported_and_like_a_pc_s(tmp_path: Path, runtime: Path) -> None:
    machine = asm_machine(tmp_path, "faults", "faults")
    with Screen("up", "--log-level", "info", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.finish(0)
        text, reports = screen.text(), screen.errors()
    at = {name: int(eip, 16) for name, eip in re.findall(r"^(\w+) at ([0-9a-f]{8})$", text, re.MULTILINE)}
    assert list(at) == ["rdmsr", "wrmsr", "ud2", "xgetbv", "vzeroupper"], text
    told = re.findall(r"exception ([0-9a-f]{8}) error ([0-9a-f]{8}) at ([0-9a-f]{8})", text)
    assert [(int(vector, 16), int(error, 16), int(eip, 16)) for vector, error, eip in told] == [
        (13, 0, at["rdmsr"]),
        (13, 0, at["wrmsr"]),
        (6, 0, at["ud2"]),
        (6, 0, at["xgetbv"]),
        (6, 0, at["vzeroupper"]),
    ]
    for what, name, code in (
        ("unknown-msr: RDMSR 0x12345678: no such MSR, #GP", "rdmsr", "0f 32 rdmsr"),
        ("unknown-msr: WRMSR 0xc0001234 = 0x123456789abcdef: no such MSR, #GP", "wrmsr", "0f 30 wrmsr"),
        ("bad-opcode: #UD", "ud2", "0f 0b ud2"),
        ("bad-opcode: #UD", "xgetbv", "0f 01 d0 xgetbv"),
        ("bad-opcode: #UD", "vzeroupper", "c5 f8 77 vzeroupper"),
    ):
        assert f"faults: cpu0: {what} at 0010:{at[name]:08x}: {code}\n" in reports

    assert "in al 000000ff\n" in text
    assert "in ax 0000ffff\n" in text
    assert "in eax ffffffff\n" in text
    for access, code in (
        ("read of port 0x02e9", "ec in al, dx"),
        ("read of port 0x03a4", "66 ed in ax, dx"),
        ("read of port 0x03b4", "ed in eax, dx"),
        ("write of 0x5a to port 0x02e9", "ee out dx, al"),
    ):
        told_at = rf"open-bus: {access}, which nobody owns, at 0010:0010[0-9a-f]{{4}}: {re.escape(code)}\n"
        assert len(re.findall(told_at, reports)) == 1, (access, reports)
    assert "done\n" in text


def test_the_default_log_level_tells_of_exceptions_and_counts_the_rest(tmp_path: Path, runtime: Path) -> None:
    with Screen("up", asm_machine(tmp_path, "faults", "faults"), runtime=runtime) as screen:
        screen.finish(0)
        text = screen.text()
    assert text.count("bad-opcode: #UD at 0010:") == 3
    assert "faults: not shown at log level warning: 4 open-bus, 2 unknown-msr\n" in text


@pytest.mark.parametrize("how", RESETS)
def test_a_reset_starts_the_machine_again(how: str, tmp_path: Path, runtime: Path) -> None:
    machine = asm_machine(tmp_path, "boots", "boots", {"RESET_HOW": RESETS[how]})
    with Screen("up", "--on-reset", "restart", machine, runtime=runtime) as screen:
        screen.finish(0)
        text = screen.text()
    assert re.findall(r"start (\d+)", text) == ["00000001", "00000002"]
    assert ("boots: cpu0: triple-fault: triple fault at 0010:" in text) == (how == "triple fault")


@pytest.mark.parametrize("how", RESETS)
def test_a_reset_stops_the_machine_with_its_state(how: str, tmp_path: Path, runtime: Path) -> None:
    machine = asm_machine(tmp_path, "boots", "boots", {"RESET_HOW": RESETS[how]})
    with Screen("up", "--on-reset", "stop", machine, runtime=runtime) as screen:
        screen.finish(3)
        text = screen.text()
        screen.wait_gone()
        assert screen.attributes() == screen.attributes_before
    assert re.findall(r"start (\d+)", text) == ["00000001"]
    assert "ebp=0badcafe" in text
    eip = re.search(r"^boots: eip=([0-9a-f]{8}) eflags=[0-9a-f]{8} cpl=00000000$", text, re.MULTILINE)
    assert eip is not None, text
    assert int(eip[1], 16) >> 8 == 0x1000
    assert "boots: cs=0010 base=00000000 limit=ffffffff rights=c09b\n" in text
    if how == "triple fault":
        told = rf"reset by cpu0: triple fault at 0010:{eip[1]}: cc +int3\n"
        assert re.search(told, text), text
    assert not list(runtime.glob("*"))
