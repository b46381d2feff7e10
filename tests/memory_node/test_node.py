"""The memory node as a process: grants over its socket, the bus side, misbehaving clients."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from bus.endpoint import Endpoint, Received, RequestRefused
from bus.frames import Eoi, Event, IntAck, Ping, Pong, Refused, Reset, ResetReply, Shutdown, Stats, StatsReply
from memory_node import wire
from memory_node.client import SOCKET_NAME, MemoryClient, MemoryRefused, attach
from memory_node.node import run
from memory_node.regions import pc_regions

MIB = 1 << 20
SECOND = 10**9


@pytest.fixture
def run_dir(short_path: Path) -> Iterator[Path]:
    config = {
        "run_dir": str(short_path),
        "machine": "test",
        "regions": [r.to_plain() for r in pc_regions(16 * MIB, mirror_pages=2)],
    }
    process = multiprocessing.get_context("spawn").Process(target=run, args=(config,), daemon=True)
    process.start()
    yield short_path
    process.kill()
    process.join()


def first_frame(endpoint: Endpoint) -> Received:
    while True:
        endpoint.wait(10 * SECOND)
        for received in endpoint.receive():
            return received


def test_grants_are_the_same_memory(run_dir: Path) -> None:
    first, size = attach(run_dir, "ram", writable=True)
    second, _ = attach(run_dir, "ram", writable=False)
    assert size == 16 * MIB == os.fstat(first).st_size
    with mmap.mmap(first, size) as writer, mmap.mmap(second, size, prot=mmap.PROT_READ) as reader:
        writer[size - 4 :] = b"last"
        assert reader[size - 4 :] == b"last"
    with pytest.raises(PermissionError):
        mmap.mmap(second, size)
    os.close(first)
    os.close(second)


def test_loading_reading_marks_and_maps(run_dir: Path, tmp_path: Path) -> None:
    with MemoryClient(run_dir) as memory:
        data = os.urandom(300_001)  # more than one record
        memory.load("ram", 0x1001, data)
        assert memory.read("ram", 0x1001, len(data)) == data
        memory.set_mark("m")
        memory.load("ram", 5 * 4096 - 1, bytes(byte ^ 0xFF for byte in memory.read("ram", 5 * 4096 - 1, 2)))
        assert list(memory.written_since("m")) == [4, 5]
        memory.drop_mark("m")
        (tmp_path / "image").write_bytes(b"hello")
        assert memory.load_file("ram", 8 * MIB, tmp_path / "image") == 5
        assert memory.dump("ram", tmp_path / "dump") == 16 * MIB
        assert (tmp_path / "dump").read_bytes()[8 * MIB : 8 * MIB + 5] == b"hello"
        assert memory.regions() == pc_regions(16 * MIB, 2)
        assert memory.e820([(0x9F000, 0x1000, 2)])[0] == (0, 0x9F000, 1)
        stats = memory.stats()
        assert stats["bytes_loaded"] == 300_001 + 2 + 5
        assert stats["bytes_in_use_ram"] > 300_000


def test_pieces_put_at_once(run_dir: Path) -> None:
    with MemoryClient(run_dir) as memory:
        data = os.urandom(300_001)
        memory.put("ram", [(0x1001, data), (16 * MIB - 2, b"ab"), (0, b"")])
        assert memory.read("ram", 0x1001, len(data)) == data
        assert memory.read("ram", 16 * MIB - 2, 2) == b"ab"
        for offset in (-1, 16 * MIB - 1):
            with pytest.raises(MemoryRefused, match="beyond"):
                memory.put("ram", [(offset, b"cd")])


def test_refusals_name_the_reason_and_the_node_lives_on(run_dir: Path, tmp_path: Path) -> None:
    with MemoryClient(run_dir) as memory:
        with pytest.raises(MemoryRefused, match="no region 'x'"):
            memory.attach("x", True)
        with pytest.raises(MemoryRefused, match="beyond"):
            memory.load("ram", 16 * MIB, b"x")
        with pytest.raises(MemoryRefused, match="No such file"):
            memory.load_file("ram", 0, tmp_path / "nothing")
        with pytest.raises(MemoryRefused, match="no mark"):
            list(memory.written_since("m"))
        assert memory.stats()["refused"] == 4


@pytest.mark.parametrize(
    "record",
    [b"\xc1", b"\x93\x01\x02\x03", b"\x81\xa2op\xa5fetch", b"\x81\xa2op\xa6attach", b"\x81\x01\x02", b"\x80"],
    ids=["not msgpack", "array", "unknown op", "no arguments", "number as key", "no op"],
)
def test_a_bad_record_costs_at_most_its_connection(run_dir: Path, record: bytes) -> None:
    MemoryClient(run_dir).close()  # waits for the node
    bad = wire.connect(run_dir / SOCKET_NAME, 240.0)
    bad.send(record)
    answer = wire.receive_record(bad)
    assert answer is None or "error" in answer[0]
    bad.close()
    with MemoryClient(run_dir) as memory:
        stats = memory.stats()
    assert stats.get("refused", 0) + stats.get("bad_records", 0) == 1


def test_a_client_that_never_reads_is_dropped(run_dir: Path) -> None:
    MemoryClient(run_dir).close()
    greedy = wire.connect(run_dir / SOCKET_NAME, 240.0)
    greedy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    request = {"op": "read", "region": "ram", "offset": 0, "size": wire.DATA_MAX}
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 1000:
            wire.send_record(greedy, request)
            sent += 1
    assert sent < 1000
    with MemoryClient(run_dir) as memory:
        assert memory.stats()["read"] >= 1


def test_the_bus_side(run_dir: Path) -> None:
    with Endpoint(run_dir, "launcher") as launcher:
        launcher.bind()
        launcher.connect("memory")
        ready = first_frame(launcher)
        assert (ready.peer, ready.frame) == ("memory", Event("ready", "memory is there"))
        assert launcher.request("memory", Ping(), 5 * SECOND) == Pong()
        assert launcher.request("memory", Reset(), 5 * SECOND) == ResetReply()
        stats = launcher.request("memory", Stats(), 5 * SECOND)
        assert isinstance(stats, StatsReply)
        assert stats.counters["frames_in"] == 3
        assert stats.counters["bytes_in_use_mirror"] == 0
        with pytest.raises(RequestRefused, match="memory takes no IntAck"):
            launcher.request("memory", IntAck(), 5 * SECOND)
        launcher.send("memory", Eoi(3))
        assert isinstance(first_frame(launcher).frame, Refused)


def test_shutdown_ends_it_and_leaves_no_socket(short_path: Path) -> None:
    regions = [r.to_plain() for r in pc_regions(MIB, 0)]
    config = {"run_dir": str(short_path), "machine": "t", "regions": regions}
    process = multiprocessing.get_context("spawn").Process(target=run, args=(config,), daemon=True)
    process.start()
    with Endpoint(short_path, "launcher") as launcher:
        launcher.bind()
        launcher.connect("memory")
        launcher.meet("memory", 240 * SECOND)
        launcher.send("memory", Shutdown())
        process.join(240)
    assert process.exitcode == 0
    assert list(short_path.iterdir()) == []


def test_no_node_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_node.client.CONNECT_S", 0.0)
    with pytest.raises(MemoryRefused, match="no memory node answers"):
        MemoryClient(tmp_path)
