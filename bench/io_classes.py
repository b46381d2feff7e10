"""Costs of the three classes of I/O: `python -m bench.io_classes` prints one line per figure.

The device is a scratch register in a real host process; "one core" pins both processes to the same one.
The baseline is a bare ZeroMQ DEALER and ROUTER that pass the same bytes to and fro.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from bus.addressmap import AddressMap
from bus.codec import encode
from bus.endpoint import Endpoint
from bus.frames import Ping
from bus.io import IoClient
from bus.mirror import Counter, MirrorWriter, page_of, slots
from devices.host import run
from devices.registry import load_class

SCRATCH = """
from dataclasses import dataclass
from devices.base import Device, DeviceState, PortRange

@dataclass(slots=True)
class ScratchState(DeviceState):
    value: int = 0

class Scratch(Device[ScratchState]):
    NAME = "scratch"
    # 0 synchronous, 1 posted, 2 mirrored, 4-7 a counter
    PORTS = (
        PortRange("regs", 8, widths=(1, 2, 4), posted=frozenset({1}), mirrored=frozenset({2, 4, 5, 6, 7})),
    )
    STATE = ScratchState

    def reset(self):
        self.state = ScratchState()

    def read(self, region, offset, width):
        return self.state.value

    def write(self, region, offset, width, value):
        self.state.value = value

    def drive_lines(self):
        pass
"""
BASE = 0x300


def per_call_us(call: Callable[[], object], n: int, rounds: int = 15) -> float:
    """The best of some rounds of n calls: what it costs when nobody else wants the core."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        for _ in range(n):
            call()
        times.append((time.perf_counter_ns() - began) / n / 1000)
    return min(times)


def echo(address: str) -> None:
    router: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    router.bind(address)
    while True:
        router.send_multipart(router.recv_multipart())


def baseline_us(run_dir: str, cores: tuple[int, int]) -> float:
    address = f"ipc://{run_dir}/echo.ipc"
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {cores[1]})
        echo(address)
    context = zmq.Context()
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    dealer.connect(address)
    frame = encode(Ping(), 1, 1, 1 << 60, 1 << 60, 1 << 50)

    def round_trip() -> None:
        dealer.send(frame)
        dealer.recv()

    round_trip()
    us = per_call_us(round_trip, 20, 200)
    dealer.close()
    context.term()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return us


def show(what: str, us: float) -> None:
    print(f"{what:32} {us:8.2f} us")


def start_device(run_dir: str, type_name: str, core: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        try:
            run({"node": "dev", "run_dir": run_dir, "machine": "bench", "type": type_name})
        finally:
            os._exit(0)
    return pid


def measure(run_dir: str, type_name: str, cores: tuple[int, int]) -> None:
    pid = start_device(run_dir, type_name, cores[1])
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores[0]})
    try:
        where = "one core" if cores[0] == cores[1] else "two cores"
        show(f"{where}: bare ZeroMQ", baseline_us(run_dir, cores))
        ranges = load_class(type_name).PORTS
        amap = AddressMap()
        amap.add_device("dev", ranges, {"regs": BASE}, 0)
        mirror = memoryview(bytearray(4096))
        writer = MirrorWriter(page_of(mirror, 0), slots(ranges))
        writer.publish({("regs", 2): 0x60, ("regs", 4): Counter(0, 3_579_545, 0xFF_FFFF, 4)})
        io = IoClient(
            run_dir, "cpu0", amap, mirror, time.monotonic_ns, lambda *access: None, pic=None, ioapics=()
        )
        with Endpoint(run_dir, "other") as other:
            other.connect("dev")
            other.request("dev", Ping(), 5_000_000_000)
            show(f"{where}: synchronous read", per_call_us(lambda: io.port_read(BASE, 1), 20, 200))
            show(f"{where}:   its p50 over all", io.stats()["latency_p50_ns"] / 1000)
            ping = per_call_us(lambda: other.request("dev", Ping(), 5_000_000_000), 20, 200)
            show(f"{where}: Endpoint.request", ping)
            show(f"{where}: rep insb of 512", per_call_us(lambda: io.port_in_string(BASE, 1, 512), 10, 100))
            show(f"{where}: posted write, sent", per_call_us(lambda: io.port_write(BASE + 1, 1, 7), 640, 50))
            io.port_read(BASE, 1)
        if cores[0] == cores[1]:
            show("mirrored byte", per_call_us(lambda: io.port_read(BASE + 2, 1), 1000, 50))
            show("mirrored 32-bit counter", per_call_us(lambda: io.port_read(BASE + 4, 4), 1000, 50))
            show("open-bus read", per_call_us(lambda: io.port_read(0x80, 1), 1000, 50))
            io.port_write(BASE + 1, 1, 7)
            target = io._targets["dev"]

            def post_and_forget() -> None:
                if len(target.batch) > 60:
                    del target.batch[1:]
                io.port_write(BASE + 1, 1, 7)

            show("posted write, queueing alone", per_call_us(post_and_forget, 1000, 50))
        io.close()
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        os.sched_setaffinity(0, cpus)


def main() -> None:
    with tempfile.TemporaryDirectory() as run_dir:
        device = Path(run_dir) / "scratch.py"
        device.write_text(SCRATCH)
        cores = sorted(os.sched_getaffinity(0))
        measure(run_dir, f"{device}:Scratch", (cores[0], cores[0]))
        if len(cores) > 1:
            measure(run_dir, f"{device}:Scratch", (cores[0], cores[1]))


if __name__ == "__main__":
    main()
