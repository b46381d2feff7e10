"""The device process as the launcher and the CPU node see it: a real process, real sockets."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from bus.addressmap import AddressMap
from bus.endpoint import Endpoint, Received, RequestRefused
from bus.frames import (
    ApicMessage,
    Continue,
    ContinueReply,
    Eoi,
    Event,
    Frame,
    IntAck,
    IntAckReply,
    Intr,
    Line,
    Load,
    LoadReply,
    Pause,
    PauseReply,
    Ping,
    Pong,
    PostedBatch,
    Read,
    ReadReply,
    Reset,
    ResetReply,
    Save,
    SaveReply,
    Shutdown,
    Stats,
    StatsReply,
    StringOut,
    StringOutReply,
    Write,
    WriteReply,
)
from bus.grants import GrantRefused, attach
from bus.io import IoClient
from bus.link import console_path
from devices.host_config import HostConfig
from tests.devices import parts
from tests.devices.parts import Gadget

ROOT = Path(__file__).resolve().parent.parent.parent
LONG_NS = 240_000_000_000  # a bound on hanging, not an expectation
START = "import msgpack, sys; from {module} import run; run(msgpack.unpackb(bytes.fromhex(sys.argv[1])))"
GADGET, HUB = f"{parts.__file__}:Gadget", f"{parts.__file__}:Hub"


def start(module: str, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    program = START.format(module=module)
    command = [sys.executable, "-c", program, msgpack.packb(config).hex()]
    return subprocess.Popen(command, cwd=ROOT, pass_fds=tuple(config.get("fds", {}).values()))


class Machine:
    """The test plays launcher and CPU; processes of devices are started on demand."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.launcher = Endpoint(run_dir, "launcher")
        self.cpu = Endpoint(run_dir, "cpu0")
        self.launcher.bind()
        self.cpu.bind()
        self.seen: list[Received] = []  # by the launcher
        self.at_cpu_before: list[Received] = []

    def start(self, node: str, type_name: str = GADGET, **more: Any) -> None:
        self.begin(node, type_name, **more)
        self.event(node, "ready")
        self.cpu.connect(node)
        self.cpu.meet(node, LONG_NS)

    def begin(self, node: str, type_name: str = GADGET, **more: Any) -> None:
        """Start a process that may not come to be ready."""
        config = {"node": node, "run_dir": str(self.run_dir), "machine": "m", "type": type_name, **more}
        self.processes[node] = start("devices.host", config)

    def ask(self, node: str, frame: Frame) -> Frame:
        return self.cpu.request(node, frame, LONG_NS)

    def event(self, node: str, kind: str) -> Event:
        """Wait for an event."""
        deadline = time.monotonic() + LONG_NS / 1e9
        while time.monotonic() < deadline:
            for received in self.seen:
                frame = received.frame
                if received.peer == node and isinstance(frame, Event) and frame.kind == kind:
                    self.seen.remove(received)
                    return frame
            self.launcher.wait(1_000_000_000)
            self.seen += self.launcher.receive()
        raise AssertionError(f"no event {kind} of {node}, but {self.seen}")

    def at_cpu(self, n: int) -> list[Received]:
        got, self.at_cpu_before = self.at_cpu_before, []
        deadline = time.monotonic() + LONG_NS / 1e9
        while len(got) < n and time.monotonic() < deadline:
            self.cpu.wait(1_000_000_000)
            got += self.cpu.receive()
        return got

    def exit_status(self, node: str) -> int:
        return self.processes[node].wait(LONG_NS / 1e9)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.launcher.close(0)
        self.cpu.close(0)


@pytest.fixture
def machine(short_path: Path) -> Iterator[Machine]:
    machine = Machine(short_path)
    try:
        yield machine
    finally:
        machine.close()


def attach_console(machine: Machine, node: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(LONG_NS / 1e9)
    client.connect(str(console_path(machine.run_dir, node)))
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(1 << 16):
        data += part
    return data


def test_register_access(machine: Machine) -> None:
    machine.start("g")
    assert machine.ask("g", Ping()) == Pong()
    assert machine.ask("g", Write("regs", 8, 4, 0x44332211)) == WriteReply()
    machine.cpu.send("g", PostedBatch((("regs", 8, 1, 0x99),)))
    assert machine.ask("g", Read("regs", 8, 4)) == ReadReply(0x44332299)
    with pytest.raises(RequestRefused, match="no region 'nowhere'"):
        machine.ask("g", Read("nowhere", 0, 1))
    assert machine.ask("g", Ping()) == Pong()


def test_an_answer_carries_the_trace_and_so_do_the_effects(machine: Machine) -> None:
    machine.start("hub", HUB, cpus=["cpu0"])
    machine.start("g", irqs={"line": 5}, controllers=["hub"])
    machine.at_cpu(1)
    span = machine.cpu.send("g", Write("regs", 0, 1, 1), trace=0x7777)
    answer, intr = sorted(machine.at_cpu(2), key=lambda received: received.asked)
    assert (answer.frame, answer.header.trace, answer.header.span) == (WriteReply(), 0x7777, span)
    assert (intr.frame, intr.header.trace, intr.peer) == (Intr(True), 0x7777, "hub")


def test_lines_go_to_every_controller_before_the_answer(machine: Machine) -> None:
    with Endpoint(machine.run_dir, "pic") as pic, Endpoint(machine.run_dir, "ioapic") as ioapic:
        pic.bind()
        ioapic.bind()
        machine.start("g", irqs={"line": 5}, controllers=["pic", "ioapic"])
        for level in (1, 0, 1):
            assert machine.ask("g", Write("regs", 0, 1, level)) == WriteReply()
        for controller in (pic, ioapic):
            got: list[Frame] = []
            while len(got) < 3:
                controller.wait(LONG_NS)
                got += [received.frame for received in controller.receive()]
            assert got == [Line(5, bool(level), "g.line") for level in (1, 0, 1)]


def test_interrupts_through_a_controller_process(machine: Machine) -> None:
    machine.start("hub", HUB, cpus=["cpu0", "cpu1"])
    machine.start("g", irqs={"line": 5}, controllers=["hub"])
    assert [r.frame for r in machine.at_cpu(1)] == [Intr(False)]
    machine.ask("g", Write("regs", 0, 1, 1))
    assert [r.frame for r in machine.at_cpu(1)] == [Intr(True)]
    assert machine.ask("hub", IntAck()) == IntAckReply(0x25)
    machine.ask("g", Write("regs", 0, 1, 0))
    assert [r.frame for r in machine.at_cpu(1)] == [Intr(False)]
    assert machine.ask("hub", IntAck()) == IntAckReply(None)
    machine.cpu.send("hub", Eoi(0x25))
    assert [r.frame for r in machine.at_cpu(1)] == [ApicMessage(0x25, 0, 0xFF, 0, True, True)]


def test_timers(machine: Machine) -> None:
    machine.start("hub", HUB, cpus=["cpu0"])
    machine.start("g", irqs={"line": 5}, controllers=["hub"])
    machine.at_cpu(1)
    began = time.monotonic_ns()
    machine.ask("g", Write("regs", 4, 1, 20))
    assert [r.frame for r in machine.at_cpu(1)] == [Intr(True)]
    assert time.monotonic_ns() - began >= 20_000_000
    assert machine.ask("g", Read("regs", 5, 1)) == ReadReply(1)


def test_save_and_load_into_another_process(machine: Machine) -> None:
    machine.start("hub", HUB, cpus=["cpu0"])
    machine.start("g", irqs={"line": 5}, controllers=["hub"])
    machine.ask("g", Write("regs", 8, 4, 0x01020304))
    saved = machine.ask("g", Save())
    assert isinstance(saved, SaveReply)
    machine.start("h", irqs={"line": 6}, controllers=["hub"])
    assert machine.ask("h", Load(saved.state)) == LoadReply()
    assert machine.ask("h", Save()) == saved
    assert machine.ask("h", Read("regs", 8, 4)) == ReadReply(0x01020304)
    with pytest.raises(RequestRefused, match="not a saved device"):
        machine.ask("h", Load({"nonsense": 1}))
    assert machine.ask("h", Reset()) == ResetReply()
    assert machine.ask("h", Read("regs", 8, 4)) == ReadReply(0)


def test_a_paused_device_has_no_timers_and_takes_no_input(machine: Machine) -> None:
    machine.start("g", settings={"backend": "console"})
    paused = machine.ask("g", Pause())
    assert isinstance(paused, PauseReply)
    assert paused.frames["cpu0>g"] == [0, 1]  # this question; its answer comes after
    machine.ask("g", Write("regs", 4, 1, 20))  # a timer of 20 ms
    state = machine.ask("g", Save())
    with attach_console(machine, "g") as client:
        client.sendall(b"x")
        time.sleep(0.2)
        again = machine.ask("g", Pause())
        assert isinstance(again, PauseReply)
        assert again.clock_ns == paused.clock_ns
        assert machine.ask("g", Save()) == state
        machine.ask("g", Write("regs", 4, 1, 20))
        began = time.monotonic_ns()
        assert machine.ask("g", Continue(paused.clock_ns, began)) == ContinueReply()
        while machine.ask("g", Read("regs", 3, 1)) == ReadReply(0):
            assert time.monotonic_ns() - began < LONG_NS
        while machine.ask("g", Read("regs", 5, 1)) == ReadReply(0):
            assert time.monotonic_ns() - began < LONG_NS
    assert time.monotonic_ns() - began >= 20_000_000


def test_a_timer_that_is_due_where_the_clock_stands_waits_too(machine: Machine) -> None:
    """The clock that all go on from may be later than where this one stood, and its timer be due there."""
    machine.start("g", clock_stopped_ns=1_000_000)
    machine.ask("g", Write("regs", 4, 1, 20))
    saved = machine.ask("g", Save())
    assert isinstance(saved, SaveReply)
    machine.start("h", state=saved.state, clock_stopped_ns=30_000_000)
    for _ in range(3):
        assert machine.ask("h", Save()) == saved
    assert machine.ask("h", Continue(30_000_000, time.monotonic_ns())) == ContinueReply()
    while machine.ask("h", Read("regs", 5, 1)) == ReadReply(0):
        pass


def test_a_device_begins_with_a_saved_state(machine: Machine) -> None:
    """Whom it drives hears of that state, and of nothing before it."""
    machine.start("hub", HUB, cpus=["cpu0"])
    machine.start("g", irqs={"line": 5}, controllers=["hub"])
    machine.at_cpu(1)
    machine.ask("g", Write("regs", 8, 4, 0x01020304))
    saved = machine.ask("g", Save())
    assert isinstance(saved, SaveReply)
    machine.start("h", irqs={"line": 6}, controllers=["hub"], state=saved.state, clock_stopped_ns=7)
    assert machine.ask("h", Save()) == saved
    assert machine.ask("h", Pause()).clock_ns == 7  # type: ignore[attr-defined]
    assert machine.ask("h", Read("regs", 8, 4)) == ReadReply(0x01020304)


def test_a_foreign_state_ends_the_start(machine: Machine) -> None:
    config = {"node": "g", "run_dir": str(machine.run_dir), "machine": "m", "type": GADGET}
    process = machine.processes["g"] = start("devices.host", {**config, "state": {"nonsense": 1}})
    assert process.wait(LONG_NS / 1e9) == 1


def test_stats(machine: Machine) -> None:
    machine.start("g")
    for _ in range(5):
        machine.ask("g", Ping())
    reply = machine.ask("g", Stats())
    assert isinstance(reply, StatsReply)
    counters = reply.counters
    assert counters["frames_in"] == 6
    assert (counters["bad_frames"], counters["lost"], counters["duplicated"]) == (0, 0, 0)
    assert 0 < counters["latency_p50_ns"] <= counters["latency_p99_ns"]
    assert counters["cpu_ns"] > 0


def test_the_mirror_page_is_published_before_the_answer(machine: Machine) -> None:
    regions = [{"name": "mirror", "kind": "mirror", "base": 0, "size": 2 * 4096, "file": None}]
    config = {"run_dir": str(machine.run_dir), "machine": "m", "regions": regions}
    machine.processes["memory"] = start("memory_node.node", config)
    machine.start("g", mirror_index=1)
    amap = AddressMap()
    bases = {"regs": 0x300, "window": 0xF000_0000}
    amap.add_device("g", (*Gadget.PORTS, *Gadget.MMIO), bases, 1)
    fd, size = attach(machine.run_dir, "mirror", writable=False)
    view = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    os.close(fd)
    io = IoClient(
        machine.run_dir,
        "cpu0",
        amap,
        memoryview(view),
        time.monotonic_ns,
        lambda *access: None,
        pic=None,
        ioapics=(),
    )
    try:
        for i in range(50):
            io.port_write(0x308, 2, i * 257)
            assert io.port_read(0x300, 1) == 0  # synchronous: brings the mirror up to date
            before = io.stats()["synchronous"]
            assert io.port_read(0x308, 2) == i * 257
            assert io.stats()["synchronous"] == before
        io.port_write(0x308, 1, 0xEE)
        assert io.port_read(0x308, 1) == 0xEE
    finally:
        io.close()
    with pytest.raises(GrantRefused, match="no region 'nonsense'"):
        attach(machine.run_dir, "nonsense", writable=False)


def test_without_a_memory_node_a_grant_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(GrantRefused, match="no memory node answers") as caught:
        attach(tmp_path, "mirror", writable=True, timeout_s=0.01)
    assert "\n" not in str(caught.value)


def test_console_output_and_input(machine: Machine) -> None:
    machine.start("g", settings={"backend": "console", "depth": 2}, irqs={"line": 5})
    machine.ask("g", StringOut("regs", 1, 1, b"scroll-back "))
    with attach_console(machine, "g") as client:
        machine.ask("g", StringOut("regs", 1, 1, b"live"))
        assert client.recv(16, socket.MSG_WAITALL) == b"scroll-back live"
        client.sendall(b"0123456789")
        got = b""
        while len(got) < 10:  # the device has room for two; the rest waits for its turn
            length = machine.ask("g", Read("regs", 3, 1))
            assert isinstance(length, ReadReply)
            assert length.value <= 2
            if length.value:
                byte = machine.ask("g", Read("regs", 2, 1))
                assert isinstance(byte, ReadReply)
                got += bytes([byte.value])
        assert got == b"0123456789"


@pytest.mark.parametrize("how", ["Shutdown", "SIGTERM"])
def test_the_end_delivers_everything_sent_before(machine: Machine, how: str) -> None:
    machine.start("g", settings={"backend": "console"})
    text = bytes(range(256)) * 512
    with attach_console(machine, "g") as client:
        collected: list[bytes] = []
        reader = threading.Thread(target=lambda: collected.append(read_all(client)))
        assert machine.ask("g", StringOut("regs", 1, 1, text)) == StringOutReply()
        machine.cpu.send("g", PostedBatch(tuple(("regs", 1, 1, byte) for byte in b"Power down\n")))
        if how == "Shutdown":
            machine.cpu.send("g", Shutdown())
        else:
            machine.ask("g", Ping())
            machine.processes["g"].send_signal(signal.SIGTERM)
        reader.start()
        reader.join()
        assert collected == [text + b"Power down\n"]
    assert machine.exit_status("g") == 0
    assert not console_path(machine.run_dir, "g").exists()
    assert not (machine.run_dir / "g.ipc").exists()


def test_ctrl_c_at_the_terminal_is_not_for_us(machine: Machine) -> None:
    machine.start("g")
    machine.processes["g"].send_signal(signal.SIGINT)
    assert machine.ask("g", Ping()) == Pong()


def test_events_and_log_lines_reach_the_launcher(machine: Machine) -> None:
    machine.start("g", settings={"backend": "log"})
    machine.ask("g", Write("regs", 7, 1, 3))
    assert machine.event("g", "log").text == "event 3"
    machine.ask("g", StringOut("regs", 1, 1, b"line\npart"))
    assert machine.event("g", "log").text == "line"
    machine.cpu.send("g", Shutdown())
    assert machine.event("g", "log").text == "part"
    assert machine.exit_status("g") == 0


def test_a_device_that_raises_says_so_in_one_line_and_exits_1(machine: Machine) -> None:
    machine.start("g", log_level="critical")
    machine.cpu.send("g", Read("regs", 6, 1))
    event = machine.event("g", "device-error")
    assert event.text == "g: RuntimeError: broken gadget"
    assert "parts.py" in event.data["traceback"]
    assert machine.exit_status("g") == 1


def test_a_frame_that_makes_no_sense_hurts_nobody(machine: Machine) -> None:
    machine.start("g", log_level="critical")
    machine.cpu.send("g", Line(3, True, "x.y"))
    machine.cpu.send("g", Pong())
    assert machine.ask("g", Ping()) == Pong()


def test_the_loop_turns_only_when_there_is_something_to_do(machine: Machine) -> None:
    machine.start("g", settings={"backend": "console"})
    turns = []
    for _ in range(200):
        reply = machine.ask("g", Stats())
        assert isinstance(reply, StatsReply)
        turns.append(reply.counters["turns"])
    assert turns[-1] - turns[0] < 4 * len(turns)  # a busy loop has a dozen between two questions


def test_the_config_is_checked() -> None:
    fields: dict[str, Any] = {"node": "g", "run_dir": "/tmp", "machine": "m", "type": "uart16550"}
    assert HostConfig(**fields).launcher == "launcher"
    process = start("devices.host", {**fields, "colour": "red"})
    assert process.wait(LONG_NS / 1e9) != 0


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"type": "uart16551"}, "g: ERROR: unknown device type 'uart16551'"),
        ({"settings": {"depth": "deep"}}, "g: ERROR: gadget settings: Expected `int`, got `str`"),
        ({"run_dir": "/tmp/" + "x" * 120}, "g: ERROR: socket path /tmp/x"),
    ],
)
def test_a_device_that_cannot_start_says_why_in_one_line(
    wrong: dict[str, Any], line: str, short_path: Path
) -> None:
    config = {"node": "g", "run_dir": str(short_path), "machine": "m", "type": GADGET, **wrong}
    done = subprocess.run(
        [sys.executable, "-c", START.format(module="devices.host"), msgpack.packb(config).hex()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG_NS / 1e9,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
