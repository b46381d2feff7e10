"""pcapng: tshark shows what was recorded, for every kind of frame; what the codec refuses is malformed."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bus import codec, recorder
from bus.frames import TABLE, Frame, Line, PostedBatch, Read, ReadReply, Refused, Write, WriteReply
from bus.recorder import DATA_MAX, FRAME, Recorder
from tests.tracing import tshark
from tests.tracing.maker import RINGS, Maker
from tracing import luagen, pcapng
from tracing.file import Trace
from tracing.file import Writer as TraceWriter
from tracing.meta import Meta, meta_of
from tracing.records import Record
from tracing.rings import Ring

META = Meta("m", ["uart0", "cpu0.io"], monotonic_ns=1_000, realtime_ns=1_800_000_000_000_000_000)
T = 5_000_000_000
# What a field of each type may hold; the first is noted with every kind.
SAMPLES: dict[str, tuple[Any, ...]] = {
    "int": (0x41, 0, 127, 128, 65536, 2**32, 2**63, 2**64 - 1),
    "int | None": (0x30, None),
    "bool": (True, False),
    "str": ("regs", "", "größer \N{SNOWMAN}", "x" * 40),
    "bytes": (b"\0\1\xff", b"x" * 300),
    "dict[str, Any]": ({"a": [1, -2, None, 2.5, {"b": b"\xff"}], "c": "d" * 300}, {}),
    "tuple[PostedWrite, ...]": ((("regs", 0, 1, 0x41), ("mmio", 2**33, 4, 2**32 - 1)), ()),
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(monkeypatch, tmp_path / "t.bptrace")
    yield maker
    maker.close()


def noted(
    frame: Frame | bytes, sender: str = "cpu0.io", span: int = 1, sent: int = T, length: int = 0
) -> Record:
    data = frame if isinstance(frame, bytes) else codec.encode(frame, 7, 6, 2**63 + 5, span, sent)
    return Record(
        FRAME, len(sender), length or len(data), sent + 2500, sent + 10_000, 0, 0, -1, sender, data[:DATA_MAX]
    )


def written(path: Path, records: Sequence[tuple[int, Record]]) -> Path:
    with path.open("wb") as file:
        writer = pcapng.Writer(file, META)
        for ring, record in records:
            writer.record(ring, record)
        writer.end()
    return path


def every_frame() -> Iterator[Frame]:
    for cls, _ in TABLE.values():
        types = [cls.__annotations__[name] for name in cls.__struct_fields__]
        for turn in range(max([len(SAMPLES[kind]) for kind in types], default=1)):
            yield cls(*[SAMPLES[kind][turn % len(SAMPLES[kind])] for kind in types])


def blocks(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        assert size % 4 == 0
        assert struct.unpack_from("<I", data, at + size - 4) == (size,)
        yield kind, data[at + 8 : at + size - 4]
        at += size


def test_the_dissector_s_table_is_up_to_date() -> None:
    text = pcapng.DISSECTOR.read_text(encoding="utf-8")
    assert text == luagen.renewed(text), "stale: run `python -m tracing.luagen` and commit the result"
    assert text.count(luagen.BEGIN) == text.count(luagen.END) == 1


def test_blocks_of_a_recorded_ring(tmp_path: Path) -> None:
    """From a Recorder through a trace file: a packet per frame, as the bytes that came."""
    fd = recorder.make("uart0", 4)
    try:
        noted = Recorder(fd, "uart0: first")
        frames = [codec.encode(Write("regs", n, 1, n), n, 0, n, n, 0) for n in range(20)]
        frames.append(b"\xc6" + b"y" * DATA_MAX)
        for frame in frames:
            noted.done(noted.frame(b"cpu0.io", frame, recorder.now_ns()))
            noted.long(recorder.MARK, 0, "queue", 3, 99)
        ring = Ring("uart0", fd)
        with (tmp_path / "t.bptrace").open("wb") as file:
            writer = TraceWriter(file, meta_of("m", ["uart0"]))
            for position, data in ring.pieces(0, ring.tail):
                writer.piece(0, position, data)
            writer.end()
    finally:
        os.close(fd)
    out = io.BytesIO()
    with Trace(tmp_path / "t.bptrace") as trace:
        pcapng.export(trace, out)
    kinds = list(blocks(out.getvalue()))
    packets = [pcapng.PACKET] * len(frames)
    assert [kind for kind, _ in kinds] == [pcapng.SECTION, pcapng.INTERFACE, *packets, pcapng.STATISTICS]
    for frame, (_, body) in zip(frames, kinds[2:-1], strict=True):
        interface, _, _, captured, length = struct.unpack_from("<IIIII", body)
        assert interface == 0
        packet = body[20 : 20 + captured]
        assert packet[:4] == bytes([1, 0, 7, 5])
        taken, done = struct.unpack_from(">QQ", packet, 4)
        assert 0 < taken <= done
        assert packet[20:32] == b"cpu0.iouart0"
        assert packet[32:] == frame[:DATA_MAX]
        assert length == 32 + len(frame)
    assert b"process %d begins: uart0: first" % os.getpid() in kinds[2][1]


def test_packets_of_all_rings_come_in_order_of_time(make: Maker) -> None:
    for turn in range(50):
        make.interrupt(4, 0x34, make.posted(turn))
        make.read()
    with Trace(make.save()) as trace:
        records = list(pcapng.by_time(trace))
        times = [record.time_ns for _, record in records]
        assert times == sorted(times)
        frames = [record for _, record in records if record.kind == FRAME]
        assert len(frames) == 50 * 5
        assert {trace.meta.rings[ring] for ring, _ in records} == set(RINGS)
        of_disk, of_uart = io.BytesIO(), io.BytesIO()
        pcapng.export(trace, of_disk, frozenset({"disk0"}))
        pcapng.export(trace, of_uart, frozenset({"uart0"}))
    assert [kind for kind, _ in blocks(of_disk.getvalue())].count(pcapng.PACKET) == 0
    assert [kind for kind, _ in blocks(of_uart.getvalue())].count(pcapng.PACKET) == 50 * 4


@tshark.needed
def test_every_kind_shows_all_its_fields(tmp_path: Path) -> None:
    frames = list(every_frame())
    filters = {}  # (class, field) -> name in filters
    for line in luagen.table().splitlines():
        name, _, rest = line.partition("{{")
        cls = name.partition('{"')[2].partition('"')[0]
        for part in rest.split("{"):
            words = part.split('"')
            if len(words) > 5:
                filters[cls, words[1]] = "backplane." + words[5]
    parts = [f"backplane.{part}" for part in ("region", "offset", "width", "value")]
    names = sorted({*filters.values(), *parts})
    head = [f"backplane.{x}" for x in ("version", "kind", "seq", "ack", "trace", "span", "clock", "name")]
    other = [f"backplane.{name}" for name in ("sender", "receiver", "wait", "handling")]
    other += ["frame.time_epoch", "_ws.malformed", "_ws.expert", "_ws.col.Info"]
    path = written(tmp_path / "t.pcapng", [(n & 1, noted(frame, span=n)) for n, frame in enumerate(frames)])
    rows = tshark.rows(path, *head, *other, *names)
    assert len(rows) == len(frames)
    for n, (frame, row) in enumerate(zip(frames, rows, strict=True)):
        values = dict(zip([*head, *other, *names], row, strict=True))
        numbers = [int(values[name], 0) for name in head[:7]]
        kind = next(kind for kind, (cls, _) in TABLE.items() if cls is type(frame))
        assert numbers == [4, kind, 7, 6, 2**63 + 5, n, T]
        assert values["backplane.name"] == type(frame).__name__
        assert values["frame.time_epoch"] == "1800000005.000001500"  # taken, on the clock of the day
        assert (values["backplane.sender"], values["backplane.receiver"]) == ("cpu0.io", META.rings[n & 1])
        assert (float(values["backplane.wait"]), float(values["backplane.handling"])) == (2.5, 7.5)
        assert not values["_ws.malformed"]
        assert bool(values["_ws.expert"]) == isinstance(frame, Refused)
        assert values["_ws.col.Info"].startswith(type(frame).__name__)
        for name in frame.__struct_fields__:
            check(frame, name, values, filters[type(frame).__name__, name])


def check(frame: Frame, name: str, values: dict[str, str], shown_as: str) -> None:
    expected, shown = getattr(frame, name), values[shown_as]
    if type(expected) is int:
        got = [int(word, 0) for word in shown.split("|")]
        assert got[0] == expected, (frame, name)
    elif expected is None:
        assert shown == ""
    elif type(expected) is bool:
        assert shown in (("1", "True") if expected else ("0", "False"))
    elif type(expected) is bytes:
        assert shown == expected.hex()
    elif type(expected) is str:
        assert shown.split("|")[0] == expected
    elif type(expected) is tuple and isinstance(frame, PostedBatch):
        columns = [values[f"backplane.{part}"] for part in ("region", "offset", "width", "value")]
        got = [column.split("|") if column else [] for column in columns]
        assert got[0] == [write[0] for write in expected]
        for place in (1, 2, 3):
            assert [int(word, 0) for word in got[place]] == [write[place] for write in expected]


@tshark.needed
def test_info_column_and_links(tmp_path: Path) -> None:
    records = [
        (0, noted(Write("regs", 0, 1, 0x41), span=5, sent=T)),
        (1, noted(WriteReply(), "uart0", span=5, sent=T + 20_000)),
        (0, noted(Read("regs", 5, 1), span=6, sent=T + 30_000)),
        (0, noted(Read("regs", 5, 1), span=6, sent=T + 30_000)),  # its first taker died
        (1, noted(ReadReply(0x60), "uart0", span=6, sent=T + 40_000)),
        (0, noted(PostedBatch((("regs", 0, 1, 0x41), ("regs", 0x70, 4, 0x42))), span=7)),
        (0, noted(Line(4, True, "uart0.irq"), "uart0")),
    ]
    path = written(tmp_path / "t.pcapng", records)
    # Twice through the file: then a request knows its answer, too.
    done = subprocess.run(
        tshark.command("-2", "-r", str(path), "-T", "fields", "-E", "separator=;",
                       *[word for name in ("_ws.col.Info", "backplane.request_in", "backplane.response_in",
                                           "backplane.response_time") for word in ("-e", name)]),
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.decode().splitlines() == [
        "Write uart0 regs+0 = 0x41;;2;",
        "WriteReply;1;;22.5",
        "Read uart0 regs+5;;5;",
        "Read uart0 regs+5;;5;",
        "ReadReply = 0x60;4;;12.5",
        "PostedBatch uart0 regs+0 = 0x41, regs+0x70 = 0x42;;;",
        "Line 4 high, by uart0.irq;;;",
    ]


TAGS = (0xC0, 0xC1, 0xC2, 0xD9, 0xDC, 0xDE, 0xC7, 0xD4, 0xFF, 0x80, 0x90, 0xA1)  # of msgpack


def mutated(random: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(changed))
        match random.randrange(4):
            case 0:
                changed[at] = random.choice(TAGS)
            case 1:
                changed[at] = random.randrange(256)
            case 2:
                del changed[at:]
            case _:
                changed[at:at] = bytes([random.randrange(256)])
        if not changed:
            break
    return bytes(changed)


@tshark.needed
@pytest.mark.parametrize("seed", range(2))
def test_malformed_is_what_the_codec_refuses(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    good = [codec.encode(frame, 7, 6, 5, 4, T) for frame in every_frame()]
    frames = [*good, *[mutated(choice, data) for data in good for _ in range(12)]]
    path = written(tmp_path / "t.pcapng", [(0, noted(data)) for data in frames])
    rows = tshark.rows(path, "backplane.malformed", "_ws.malformed", "_ws.col.Info")
    assert len(rows) == len(frames)
    refused = 0
    for data, (malformed, exception, info) in zip(frames, rows, strict=True):
        try:
            codec.decode(data)
            reason = ""
        except codec.BadFrame as error:
            reason = str(error)
        refused += bool(reason)
        assert bool(malformed) == bool(reason), (data, info, reason)
        assert bool(exception) == bool(reason), (data, info)  # the viewer's own word for it
    assert len(frames) / 4 < refused < len(frames) - len(good)


@tshark.needed
def test_frames_that_were_cut(tmp_path: Path) -> None:
    whole = codec.encode(PostedBatch(tuple(("regs", n, 1, 0x41) for n in range(64))), 7, 6, 5, 4, T)
    records = [(0, noted(whole[:size], length=len(whole))) for size in (0, 1, 9, 40, 100, len(whole) - 1)]
    path = written(tmp_path / "t.pcapng", records)
    rows = tshark.rows(path, "backplane.cut", "backplane.malformed", "_ws.malformed", "frame.len")
    assert len(rows) == len(records)
    for cut, malformed, exception, length in rows:
        assert cut
        assert (malformed, exception) == ("", "")
        assert int(length) == 20 + len("cpu0.iouart0") + len(whole)


@tshark.needed
def test_live_through_a_pipe() -> None:
    """Each packet is shown when it has been flushed, long before the end."""
    reader = subprocess.Popen(
        tshark.command("-l", "-i", "-", "-T", "fields", "-e", "_ws.col.Info"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert reader.stdin
    assert reader.stdout
    try:
        writer = pcapng.Writer(reader.stdin, META)
        late = writer.ring("rtc0")  # a ring that came up meanwhile
        for n in range(3):
            writer.record(late if n == 2 else 0, noted(Write("regs", n, 1, n)))
            writer.flush()
            receiver = "rtc0" if n == 2 else "uart0"
            assert reader.stdout.readline().decode() == f"Write {receiver} regs+{n} = 0x{n}\n"
        writer.end()
        reader.stdin.close()
        assert reader.stdout.read() == b""
        assert reader.wait(timeout=30) == 0
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()
