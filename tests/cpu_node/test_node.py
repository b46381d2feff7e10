"""The CPU node as a process: accesses, interrupts, requests, resets, reports, kept translations."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from bus import codemap
from bus.codemap import CodeMap
from bus.frames import (
    ApicMessage,
    Eoi,
    IntAck,
    Intr,
    Load,
    Ping,
    Pong,
    PostedBatch,
    Read,
    Reset,
    ResetReply,
    Save,
    SaveReply,
    Shutdown,
    Stats,
    StatsReply,
    StringIn,
    StringOut,
    Write,
)
from devices.dma import GuestRam
from memory_node.client import attach
from tests.cpu_node.board import asm
from tests.cpu_node.node_machine import (
    CODE,
    DEADLINE_S,
    HANDLER,
    IRET,
    MMIO,
    PORTS,
    STACK,
    VECTOR,
    Machine,
)

with_apic = pytest.mark.parametrize("machine", [True], indirect=True)
FOREVER = "end: hlt\njmp end"


def test_port_accesses_become_frames(machine: Machine) -> None:
    machine.registers[4] = 0x12345678
    machine.start(f"""
        mov edx, {PORTS + 4:#x}
        in eax, dx
        mov [0x200000], eax
        mov eax, 0xabcd
        mov edx, {PORTS:#x}
        out dx, al
        mov edx, {PORTS + 2:#x}
        out dx, ax
        mov dword ptr [0x200004], 1
        {FOREVER}""")
    machine.until(lambda: machine.dword(0x200004) == 1, "end of the program")
    assert machine.dword(0x200000) == 0x12345678
    kinds = [frame for name, frame in machine.frames if name == "dev"]
    assert kinds[0] == Read("ports", 4, 4)
    assert isinstance(kinds[1], PostedBatch)  # flushed before the synchronous write
    assert kinds[1].writes[0][:4] == ("ports", 0, 1, 0xCD)
    assert kinds[2] == Write("ports", 2, 2, 0xABCD)


def test_posted_writes_leave_within_a_bounded_time(machine: Machine) -> None:
    """The guest computes and says nothing more."""
    machine.start(f"mov edx, {PORTS:#x}\nmov al, 5\nout dx, al\nhere: inc ecx\njmp here")
    machine.until(lambda: bool(machine.got(PostedBatch)), "posted write")


def test_strings_are_one_message(machine: Machine) -> None:
    machine.start(f"""
        mov edx, {PORTS + 4:#x}
        mov edi, 0x200000
        mov ecx, 100
        rep insw
        mov esi, 0x200000
        mov ecx, 50
        rep outsd
        mov dword ptr [0x300000], 1
        {FOREVER}""")
    machine.until(lambda: machine.dword(0x300000) == 1, "end of the program")
    assert machine.got(StringIn) == [StringIn("ports", 4, 2, 100)]
    assert machine.got(StringOut) == [StringOut("ports", 4, 4, bytes(n & 0xFF for n in range(200)))]


def test_mmio_accesses_become_frames(machine: Machine) -> None:
    machine.registers[8] = 7
    machine.start(f"add dword ptr [{MMIO + 8:#x}], 5\nmov dword ptr [0x200004], 1\n{FOREVER}")
    machine.until(lambda: machine.dword(0x200004) == 1, "end of the program")
    to_device = [frame for name, frame in machine.frames if name == "dev"]
    assert to_device == [Read("window", 8, 4), Write("window", 8, 4, 12)]


def test_interrupt_through_the_8259(machine: Machine) -> None:
    machine.start(f"sti\n{FOREVER}")
    for count in range(1, 4):
        machine.interrupt(VECTOR)
        machine.until(lambda count=count: machine.dword(0x200000) == count, f"interrupt {count}")
    machine.interrupt(VECTOR, VECTOR)
    machine.until(lambda: machine.dword(0x200000) == 5, "two at once")


def test_interrupt_stops_a_loop(machine: Machine) -> None:
    machine.start("sti\nhere: inc ecx\njmp here")
    machine.interrupt(VECTOR)
    machine.until(lambda: machine.dword(0x200000) == 1, "interrupt")


def test_interrupt_that_went_away(machine: Machine) -> None:
    """INT falls before the acknowledgement: the 8259 answers with nothing, the CPU goes on."""
    machine.start(f"sti\n{FOREVER}")
    machine.ends["pic"].send("cpu0", Intr(True))
    machine.until(lambda: bool(machine.got(IntAck)), "acknowledgement")
    machine.interrupt(VECTOR)
    machine.until(lambda: machine.dword(0x200000) == 1, "the next interrupt")


APIC_ON = """
    mov ecx, 0x1b
    mov eax, 0xfee00900
    xor edx, edx
    wrmsr
    mov dword ptr [0xfee000f0], 0x1ff
    mov dword ptr [0xfee00080], 0
"""


@with_apic
def test_message_of_an_io_apic(machine: Machine) -> None:
    """Level-triggered: the guest's EOI is broadcast to the I/O APICs."""
    machine.load(f"inc dword ptr [0x200000]\nmov dword ptr [0xfee000b0], 0\n{IRET}", HANDLER)
    machine.start(f"{APIC_ON}\nsti\n{FOREVER}")
    for count, level in ((1, False), (2, True)):
        machine.ends["ioapic"].send("cpu0", ApicMessage(VECTOR, 0, 0, 0, level, True))
        machine.until(lambda count=count: machine.dword(0x200000) == count, f"interrupt {count}")
    machine.until(lambda: machine.got(Eoi) == [Eoi(VECTOR)], "EOI")


@with_apic
def test_timer_of_the_local_apic_wakes_the_cpu(machine: Machine) -> None:
    machine.load(f"inc dword ptr [0x200000]\nmov dword ptr [0xfee000b0], 0\n{IRET}", HANDLER)
    machine.start(f"""{APIC_ON}
        mov dword ptr [0xfee003e0], 0xb
        mov dword ptr [0xfee00320], {0x20000 | VECTOR:#x}
        mov dword ptr [0xfee00380], 20000
        sti
        {FOREVER}""")
    machine.until(lambda: machine.dword(0x200000) >= 5, "five ticks")


def test_requests_are_answered_while_the_guest_runs(machine: Machine) -> None:
    machine.start("mov ebx, 0x1234\nhere: inc ecx\njmp here")
    assert isinstance(machine.ask(Ping()), Pong)
    machine.until(lambda: saved(machine)["ecx"] != 0, "the loop")
    state = saved(machine)
    assert state["ebx"] == 0x1234
    assert CODE <= state["eip"] < CODE + 0x20
    machine.until(lambda: saved(machine)["ecx"] != state["ecx"], "progress")
    # a request may also come while the guest's code doesn't run
    machine.until(lambda: counters(machine)["exits"].get("signal", 0) > 0, "a request that stopped the guest")
    assert counters(machine)["instructions_translated"] > 2


def saved(machine: Machine) -> dict[str, Any]:
    reply = machine.ask(Save())
    assert isinstance(reply, SaveReply)
    return dict(reply.state["cpu"])


def counters(machine: Machine) -> dict[str, Any]:
    reply = machine.ask(Stats())
    assert isinstance(reply, StatsReply)
    return reply.counters


def test_what_a_cpu_does_not_take_is_refused(machine: Machine) -> None:
    machine.start(FOREVER)
    with pytest.raises(RuntimeError, match="refused Load"):
        machine.ask(Load({}))
    assert isinstance(machine.ask(Ping()), Pong)


@pytest.mark.parametrize("state", ["running", "halted", "halted for ever"])
def test_shutdown_ends_the_process(machine: Machine, state: str) -> None:
    machine.start({"running": "here: jmp here", "halted": f"sti\n{FOREVER}", "halted for ever": "hlt"}[state])
    machine.ends["launcher"].send("cpu0", Shutdown())
    machine.cpu.join(DEADLINE_S)
    assert machine.cpu.exitcode == 0


def test_reset_holds_and_restarts(machine: Machine) -> None:
    """Reset without a state: nothing runs; with one: the guest starts there."""
    machine.load("mov dword ptr [0x200010], 9\nhlt", CODE + 0x1000)
    machine.start("here: inc dword ptr [0x200000]\njmp here")
    machine.until(lambda: machine.dword(0x200000) > 0, "life")
    assert isinstance(machine.ask(Reset()), ResetReply)
    count = machine.dword(0x200000)
    assert isinstance(machine.ask(Ping()), Pong)
    assert machine.dword(0x200000) == count
    assert isinstance(machine.ask(Reset(machine.start_state(CODE + 0x1000))), ResetReply)
    machine.until(lambda: machine.dword(0x200010) == 9, "the second start")


def test_triple_fault_is_reported_and_waits_for_a_reset(machine: Machine) -> None:
    machine.ram[0x3000:0x3006] = bytes(6)  # an IDT with nothing in it
    machine.start("mov eax, 0x77\nud2")
    event = machine.event("triple-fault")
    where = CODE + len(asm("lidt [0x3000]\nmov eax, 0x77"))
    assert f"0010:{where:08x}: 0f 0b" in event.text
    assert "ud2" in event.text
    assert event.data["eax"] == 0x77
    machine.load("mov dword ptr [0x200010], 9\nhlt", CODE + 0x1000)
    assert isinstance(machine.ask(Reset(machine.start_state(CODE + 0x1000))), ResetReply)
    machine.until(lambda: machine.dword(0x200010) == 9, "the second start")


REPORTS = {
    "open-bus": ("mov edx, 0x1234\nin al, dx", "read of port 0x1234"),
    "open-bus write": ("mov edx, 0x1234\nmov eax, 0x55\nout dx, eax", "write of 0x55 to port 0x1234"),
    "open-bus memory": ("mov eax, [0xd0000000]", "read of mmio 0xd0000000"),
    "unknown-msr": ("mov ecx, 0xc0000999\nrdmsr", "RDMSR 0xc0000999"),
    "bad-opcode": (".byte 0x0f, 0x05", "#UD"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports(machine: Machine, name: str) -> None:
    """One line with CS:EIP, the bytes and the disassembly; once for the same place."""
    text, expected = REPORTS[name]
    machine.gate(13, HANDLER + 0x100)
    machine.gate(6, HANDLER + 0x100)
    machine.load("mov dword ptr [0x200010], 1\nhlt", HANDLER + 0x100)
    machine.start(f"mov ebp, 3\nagain: {text}\ndec ebp\njnz again\nmov dword ptr [0x200010], 1\n{FOREVER}")
    kind = name.split()[0]
    event = machine.event(kind)
    assert expected in event.text
    assert "0010:0010" in event.text
    machine.until(lambda: machine.dword(0x200010) == 1, "end of the program")
    machine.ask(Ping())
    with contextlib.suppress(AssertionError):
        machine.turn(0.05)
    assert sum(e.kind == kind for e in machine.events) == 1


def test_translations_are_kept_for_the_next_node(tmp_path: Path, short_path: Path) -> None:
    """The second start of the same guest takes over all that the first translated."""
    folder = tmp_path / "kept"
    counts = []
    for number in range(2):
        run_dir = short_path / f"run{number}"
        run_dir.mkdir()
        machine = Machine(run_dir, False)
        machine.config["translations"] = str(folder)
        try:
            machine.start(f"mov ecx, 50\nagain: inc eax\nloop again\nmov dword ptr [0x200000], 1\n{FOREVER}")
            machine.until(lambda m=machine: m.dword(0x200000) == 1, "end of the program")
            stats = machine.ask(Stats())
            assert isinstance(stats, StatsReply)
            counters = stats.counters
            counts.append((counters["instructions_translated"], counters["instructions_taken_over"]))
            machine.ends["launcher"].send("cpu0", Shutdown())
            machine.cpu.join(DEADLINE_S)
            assert machine.cpu.exitcode == 0
        finally:
            machine.close()
    (first, nothing), second = counts
    assert nothing == 0
    assert second == (0, first)


def test_killed_node_has_kept_what_it_translated(machine: Machine, tmp_path: Path) -> None:
    """An idle CPU writes from time to time; kill -9 costs what came after that."""
    folder = tmp_path / "kept"
    machine.config |= {"translations": str(folder), "keep_after": 3, "keep_every_s": 0.0}
    machine.start(f"mov ecx, 50\nagain: inc eax\nloop again\nmov dword ptr [0x200000], 1\n{FOREVER}")
    machine.until(lambda: any(folder.glob("*/*.kept")), "file of translations")
    machine.cpu.kill()
    machine.cpu.join(DEADLINE_S)
    (file,) = folder.glob("*/*.kept")
    assert file.stat().st_size > 200
    assert not list(folder.glob("*/*.new"))


def test_code_that_a_device_has_replaced_is_translated_anew(machine: Machine) -> None:
    """A page that was run is read from a disk again: the guest runs what is there now."""
    page, body = 0x120000, "mov eax, {}\nret"
    machine.gate(VECTOR, HANDLER)
    machine.load(body.format(0x1111), page)
    machine.start(f"""
        mov esp, {STACK}
        again: mov ecx, {page}
        call ecx
        mov [0x200010], eax
        mov edx, {PORTS + 4}
        out dx, eax
        mov ecx, [0x200000]
        sti
        wait: hlt
        cmp ecx, [0x200000]
        je wait
        cli
        jmp again""")
    fd, size = attach(machine.run_dir, codemap.REGION, writable=True)
    device = GuestRam(memoryview(machine.ram), CodeMap(memoryview(mmap.mmap(fd, size))))
    os.close(fd)
    machine.until(lambda: machine.registers.get(4) == 0x1111, "first result")
    results = (0x2222, 0x3333, 0x4444, 0x5555, 0x6666, 0x7777)  # more often than makes a page mixed
    for number, result in enumerate(results, 2):
        device.write(page, asm(body.format(result), page))
        machine.interrupt(VECTOR)
        machine.until(lambda: len(machine.got(Write)) == number, "next result")  # noqa: B023
        assert machine.registers[4] == result
