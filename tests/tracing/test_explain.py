"""What `launcher explain` finds: exact figures of traces with known contents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from bus.frames import IntAck, IntAckReply, ReadReply
from bus.recorder import LONG, MARK, MMIO, POSTED, WRITE
from launcher.main import main
from tests.tracing.maker import COM1, DISK_BASE, EIP, PIC_BASE, Maker, batch_of
from tracing.activity import BINS, FIRST_NS, Activity
from tracing.explain import OF_A_KIND, Explained, explain
from tracing.explaintext import number, part, plain, text, time
from tracing.file import Trace
from tracing.histogram import Histogram, limits, together
from tracing.legs import NOTHING, Leg, shares
from tracing.symbols import Symbols


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(monkeypatch, tmp_path / "t.bptrace")
    yield maker
    maker.close()


def explained(make: Maker, symbols: Symbols | None = None) -> Explained:
    with Trace(make.save()) as trace:
        return explain(trace, symbols)


def printed(found: Explained, top: int = 10) -> str:
    return "\n".join(text(found, top))


# --- chains


def disk_read(make: Maker) -> int:
    """A read of the disk, from the guest's write to its EOI; each time of it is known."""
    make.access(4 | WRITE | MMIO | POSTED, DISK_BASE + 0x50, 0)
    trace = make.batch("disk0", 1)
    make.wait(10_000)  # in the queue
    place = make.frame("disk0", "cpu0.io", batch_of(0), trace, trace, done=False)
    ring = make.rings["disk0"]
    ring.dma([(0x1000, 16, False)])
    io = ring.step(12, 4096, "disk", trace, 8192 << 2)
    make.wait(40_000)
    ring.done(io)
    ring.dma([(0x2000, 4096, True)])
    make.wait(20_000)
    ring.done(place)
    make.line("ioapic", 9, True, trace, "disk0.irq")
    make.message(9, 0x39, trace, level=True)
    make.wait(100_000)
    make.vector(0x39)
    make.wait(5_000)
    make.end_level(0x39)
    return trace


def test_the_legs_of_a_chain(make: Maker) -> None:
    trace = disk_read(make)
    found = explained(make, Symbols([(EIP - 4, 0, "outl"), (EIP + 0x100, 0, "next")]))
    (slow,) = found.slowest(10)
    assert (slow.id, slow.kind, slow.why_not) == (trace, "disk0 QueueNotify written", "")
    assert [(leg.node, leg.kind, leg.waited_ns, leg.took_ns) for leg in slow.legs] == [
        ("cpu0", "posted", 0, 10_500),  # to the batch's record 1 us, then 10, and 0.5 before the clock
        ("disk0", "frame", 1_500, 63_000),
        ("disk0", "disk", 0, 41_000),
        ("ioapic", "frame", 1_500, 1_000),
        ("cpu0", "frame", 1_500, 1_000),
        ("cpu0", "vector", 100_000 + 2_000, 6_000),
        ("cpu0", "eoi", 0, 0),
        ("ioapic", "frame", 1_500, 1_000),
    ]
    assert slow.legs[0].detail == f"eip {EIP:#010x} outl+0x4"
    assert slow.legs[1].detail == "DMA 1 piece, 16 bytes"
    assert slow.legs[2].detail == "DMA 1 piece, 4096 bytes"
    assert slow.took_ns == found.end_ns - found.kinds["disk0 QueueNotify written"].shown[0].begin_ns
    assert slow.shares[0] == ("until cpu0 took an interrupt", 102_000)
    assert dict(slow.shares)["in the file of disk0"] == 41_000
    assert sum(ns for _, ns in slow.shares) == slow.took_ns
    lines = printed(found)
    assert "disk0 QueueNotify written" in lines
    assert "outl+0x4" in lines
    assert "DMA 1 piece, 4096 bytes" in lines


def test_where_time_goes_is_a_partition() -> None:
    legs = [
        Leg("synchronous", "cpu0", 1, 0, 0, 100, "", works="waited"),
        Leg("frame", "uart0", 1, 30, 10, 20, "", waits="queue", works="work"),
        Leg("disk", "uart0", 1, 35, 0, 5, "", works="file"),
        Leg("vector", "cpu0", 1, 150, 20, 0, "", waits="delivery"),
    ]
    assert shares(legs, 160) == [
        ("waited", 70), (NOTHING, 40), ("delivery", 20), ("work", 15), ("queue", 10), ("file", 5),
    ]  # fmt: skip
    assert shares([], 0) == []
    assert shares([], 5) == [(NOTHING, 5)]


def test_accesses_of_a_batch_are_one_leg(make: Maker) -> None:
    make.posted(*range(60))
    (slow,) = explained(make).slowest(1)
    assert (slow.legs[0].text, slow.legs[0].times) == ("uart0 THR = 0x0 and 59 more", 60)
    assert len(slow.legs) == 2
    assert slow.steps == 61


def test_the_slowest_are_shown_and_no_kind_fills_the_list(make: Maker) -> None:
    for wait in range(10):
        trace = make.post(wait)
        make.wait(wait * 1_000_000)
        make.frame("uart0", "cpu0.io", batch_of(wait), trace, trace)
    make.write(0x60, 1)
    make.access(1, COM1 + 5, 0)
    found = explained(make)
    slowest = found.slowest(10)
    assert [slow.kind for slow in slowest] == ["uart0 THR written"] * OF_A_KIND + ["disk0 regs+0x60 written"]
    assert [slow.took_ns // 1_000_000 for slow in slowest] == [9, 8, 7, 0]
    kind = found.kinds["uart0 THR written"]
    assert (kind.took.count, kind.incomplete, kind.node) == (10, 0, "uart0")
    assert kind.took.max == slowest[0].took_ns
    assert (found.chains, found.incomplete, found.alone) == (12, 0, 1)
    assert [slow.took_ns // 1_000_000 for slow in found.slowest(2)] == [9, 8]


def test_chains_that_are_not_complete_are_counted_by_their_reason(make: Maker) -> None:
    make.post(1)
    make.post(2, 3)
    make.posted(4)
    make.step("uart0", 9, 0, "tick", make.id(), 99, done=False)
    found = explained(make)
    reasons = {reason.why: reason for reason in found.reasons.values()}
    assert {why: reason.count for why, reason in reasons.items()} == {
        "uart0 has not taken uart0 THR = …": 2,
        "process … of uart0 has not done timer tick": 1,
    }
    first = reasons["uart0 has not taken uart0 THR = …"]
    assert first.example == "uart0 has not taken uart0 THR = 0x1"
    assert (found.chains, found.incomplete) == (4, 3)
    assert (found.accesses, found.accesses_incomplete) == (4, 3)
    lines = printed(found)
    assert "4 chains, 1 complete (25.00 %)" in lines
    assert f"2: uart0 has not taken uart0 THR = 0x1 (chain {first.chain:#x}" in lines
    assert f"process {os.getpid()} of uart0 has not done timer tick" in lines


# --- registers, and who waited


def test_registers(make: Maker) -> None:
    make.posted(1, 2, 3)
    for _ in range(5):
        make.access(1, COM1 + 5, 0x60)
    make.access(1 | WRITE, 0x80, 1)
    begin = make.now
    make.access(1, COM1 + 6, 7)
    trace = make.ask("uart0")
    make.wait(50_000)
    make.frame("cpu0.io", "uart0", ReadReply(7), trace, trace, done=False)
    waited_ns = make.now - begin - 1000
    make.access(1 | LONG, 0x500, 512)
    found = explained(make)
    rows = [(r.name, r.write, r.ways, r.units, r.waited.total) for r in found.registers]
    assert rows == [
        ("uart0 LSR", False, {"mirrored": 5}, 0, 0),
        ("uart0 THR", True, {"posted": 3}, 0, 0),
        ("port 0x500", False, {"open-bus": 1}, 512, 0),
        ("port 0x80", True, {"open-bus": 1}, 0, 0),
        ("uart0 regs+0x6", False, {"synchronous": 1}, 0, waited_ns),
    ]
    assert {node: h.total for node, h in found.waited.items()} == {"uart0": waited_ns}


def test_who_waited_for_whom(make: Maker) -> None:
    make.posted(1)
    trace = make.post(2)
    make.frame("uart0", "cpu0.io", batch_of(2), trace, trace, done=False)
    make.read()
    found = explained(make)
    assert set(found.pairs) == {("cpu0.io", "uart0"), ("uart0", "cpu0.io")}
    pair = found.pairs["cpu0.io", "uart0"]
    assert (pair.count, pair.kinds, pair.undone) == (3, {"PostedBatch": 2, "Read": 1}, 1)
    assert (pair.queued.count, pair.queued.total) == (3, 3 * 1_500)
    assert (pair.handled.count, pair.handled.total) == (2, 2 * 1_000)
    answers = found.pairs["uart0", "cpu0.io"]
    assert (answers.kinds, answers.handled.count) == ({"ReadReply": 1}, 0)


# --- interrupts


def test_interrupts_from_the_line_to_the_eoi(make: Maker) -> None:
    for wait in (10_000, 30_000):
        trace = make.posted(0x41)
        make.line("ioapic", 4, True, trace, "uart0.intr")
        make.line("pic", 4, True, trace, "uart0.intr")
        make.message(4, 0x34, trace)
        make.wait(wait)
        make.vector(0x34)
        make.wait(7_000)
        make.eoi(0x34)
    make.vector(0xEC)
    make.eoi(0xEC)
    found = explained(make).interrupts
    first, own = found.busiest
    assert (first.irq, first.vector, first.way, first.count, first.again) == (4, 0x34, "apic", 2, 0)
    between = 500 + 9_000  # the line was sent 0.5 us before the maker's clock; records cost 1 us each
    assert first.latency.total == 2 * between + 40_000
    assert first.latency.max == between + 30_000
    assert (first.handled.count, first.handled.total) == (2, 2 * 8_000)
    assert (own.irq, own.vector, own.way, own.spurious) == (-1, 0xEC, "own", False)
    (line,) = found.lines.values()
    assert (line.irq, line.sources, line.rises, line.sent, line.delivered) == (4, ["uart0.intr"], 2, 2, 2)
    assert (line.ignored, line.lost) == (0, 0)
    assert not found.unsent


def test_a_level_that_stays_high_is_delivered_again(make: Maker) -> None:
    trace = make.write(0x60, 1)
    make.line("ioapic", 9, True, trace, "disk0.irq")
    make.message(9, 0x39, trace, level=True)
    make.vector(0x39)
    end = make.end_level(0x39)
    make.message(9, 0x39, end, level=True)
    make.vector(0x39)
    make.end_level(0x39)
    (vector,) = explained(make).interrupts.busiest
    assert (vector.count, vector.again, vector.latency.count, vector.handled.count) == (2, 1, 1, 2)


def test_interrupts_that_nobody_handled(make: Maker) -> None:
    masked = make.posted(1)
    make.line("ioapic", 3, True, masked, "uart0.intr")
    sent = make.posted(2)
    make.line("ioapic", 5, True, sent, "disk0.irq")
    make.message(5, 0x35, sent)
    make.interrupt(4, 0x34, make.posted(3), eoi=False)
    make.vector(0xFF)
    found = explained(make)
    lines = found.interrupts.lines
    assert [(lines[n].ignored, lines[n].lost, lines[n].delivered) for n in (3, 5, 4)] == [
        (1, 0, 0), (0, 1, 0), (0, 0, 1),
    ]  # fmt: skip
    assert [(cpu, vector) for cpu, vector, _ in found.interrupts.unsent] == [("cpu0", 0x35)]
    told = printed(found)
    for expected in (
        "line 3 (uart0.intr): 1 of 1 rises led to nothing",
        "line 5 (disk0.irq): 1 of 1 rises were sent on and never delivered",
        "vector 0x35: arrived at cpu0",
        "vector 0x34 (line 4): 1 delivered and never ended",
        "vector 0xff: 1 spurious",
    ):
        assert expected in told


def test_an_8259_and_its_spurious_interrupts(make: Maker) -> None:
    trace = make.posted(1)
    make.line("pic", 4, True, trace)
    make.intr(True, trace)
    make.acknowledge(4, 0x0C)
    spurious = make.ask("pic")
    make.frame("pic", "cpu0.io", IntAck(), spurious, spurious)
    make.frame("cpu0.io", "pic", IntAckReply(0x0F), spurious, spurious, done=False)
    make.vector(0x0F)
    make.intr(True, make.posted(2))
    found = explained(make).interrupts
    rows = {v.vector: (v.irq, v.way, v.count, v.spurious, v.unended) for v in found.busiest}
    assert rows == {0x0C: (4, "8259", 1, False, 0), 0x0F: (-1, "8259", 1, True, 0)}
    assert found.unacknowledged_ns
    make.intr(False, make.posted(3))
    assert not explained(make).interrupts.unacknowledged_ns


# --- processes and losses


def test_processes_that_were_replaced(make: Maker) -> None:
    trace = make.post(0x41)
    make.frame("uart0", "cpu0.io", batch_of(0x41), trace, trace, done=False, seq=5)
    make.restart("uart0")
    make.frame("uart0", "cpu0.io", batch_of(0x41), trace, trace, seq=5)
    found = explained(make)
    (replaced,) = found.replaced
    assert (replaced.node, replaced.before, replaced.after) == ("uart0", os.getpid(), os.getpid() + 1)
    assert [leg.pid for leg in found.slowest(1)[0].legs[1:]] == [os.getpid(), os.getpid() + 1]
    assert found.slowest(1)[0].legs[1].took_ns == -1
    assert found.incomplete == 0
    assert f"uart0: {os.getpid() + 1} (uart0 2) after {os.getpid()}" in printed(found)


def test_records_that_were_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make = Maker(monkeypatch, tmp_path / "t.bptrace", blocks=4)
    for value in range(4000):
        make.posted(value & 0xFF, 1, 2)
    found = explained(make)
    with Trace(make.path) as trace:
        list(trace.records())
        assert found.lost == {trace.meta.rings[ring]: count for ring, count in trace.lost.items()}
    assert set(found.lost) == {"uart0", "cpu0.io"}
    lines = [line.split(maxsplit=1) for line in printed(found).split("\n")]
    assert ["uart0", number(found.lost["uart0"])] in lines
    make.close()


def test_frames_that_cannot_be_read_harm_nothing(make: Maker) -> None:
    for data in (b"", b"\xff" * 40, b"\xc1", b"\x97\x04\x05\xc0\xc0\xc0\xc0\xc0", b"\x90", b"x" * 70_000):
        for node in ("uart0", "cpu0", "cpu0.io", "ioapic"):
            make.rings[node].frame(b"peer\x1b", data, make.tick())
    make.rings["ioapic"].long(MARK, 0, "irq", make.tick(), 1 << 63)
    found = explained(make)
    assert found.pairs["peer\x1b", "uart0"].kinds == {"?": 6}
    assert "\x1b" not in printed(found)
    json.dumps(plain(found, 10))


def test_an_empty_trace(make: Maker) -> None:
    found = explained(make)  # nothing but processes
    assert (found.chains, found.steps) == (0, 7)
    make.used = []
    found = explained(make)
    assert (found.chains, found.steps, found.slowest(3)) == (0, 0, [])
    assert "Interrupts that nobody handled\n  none" in printed(found)


# --- its parts


def test_histograms() -> None:
    h = Histogram()
    for ns in (-5, 0, 15, 16, 17, 1_000, 1_000_000, 123_456_789):
        h.add(ns)
    assert (h.count, h.max, h.total) == (8, 123_456_789, 124_457_837)
    assert h.quantile(0.5) == 17  # 16 is counted together with 17
    assert h.quantile(1.0) == h.max
    assert Histogram().quantile(0.5) == 0
    rows = list(h.rows())
    assert sum(count for _, _, count in rows) == 8
    assert [rows[0], rows[-1][2]] == [(0, 1, 2), 1]
    for ns in (*range(70), 4_095, 4_096, 10**9, 10**12):
        one = Histogram()
        one.add(ns)
        ((begin, end, _),) = one.rows()
        assert begin <= ns < end
        assert end - begin <= max(1, begin / 8)
    both = together([h, h])
    assert (both.count, both.total, both.max) == (16, 2 * h.total, h.max)
    keys = [limits(key) for key in range(200)]
    assert all(a[1] == b[0] for a, b in pairwise(keys))


def test_activity_keeps_all_counts_however_long_it_goes_on() -> None:
    shown = Activity()
    moments = [0, 50_000, FIRST_NS, BINS * FIRST_NS, 10**12, 10**12 + 1]
    for ns in moments:
        shown.add("uart0", 5_000 + ns)
    shown.busy("uart0", 5_000, 5_000 + 10**12)
    (row,) = shown.rows.values()
    assert sum(row.steps) == len(moments)
    assert row.steps[0] >= 3
    assert sum(row.busy_ns) == 10**12
    assert BINS // 2 <= shown.bins <= BINS
    assert row.steps[(10**12) // shown.bin_ns] == 2


@pytest.mark.parametrize(
    ("ns", "expected"),
    [(0, "0 ns"), (999, "999 ns"), (1_000, "1.00 us"), (99_940, "99.9 us"), (99_960, "100 us"),
     (999_600, "1.00 ms"), (12_345_678, "12.3 ms"), (19_100_000_000, "19.1 s")],
)  # fmt: skip
def test_times_have_three_digits(ns: int, expected: str) -> None:
    assert time(ns) == expected


def test_nearly_all_is_not_all() -> None:
    assert part(999_999, 1_000_000) == "99.99 %"
    assert part(5, 5) == "100 %"
    assert part(0, 0) == "-"


# --- the command


def test_the_command_prints_text_or_json(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    trace = disk_read(make)
    path = make.save()
    assert main(["explain", str(path), "--top", "1"]) == 0
    out, err = capsys.readouterr()
    assert "Slowest chains" in out
    assert err == ""
    assert main(["explain", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["slowest"][0]["id"] == trace
    assert told["registers"][0]["name"] == "disk0 QueueNotify"
    assert told["vectors"][0]["delay"]["count"] == 1


@pytest.mark.parametrize(
    ("what", "expected"),
    [("no.bptrace", "cannot be read (No such file or directory)"), ("", "cannot be read (Is a directory)"),
     ("text", "no trace file of version 1"), ("short", "the trace file's beginning is damaged"),
     ("empty", "the trace file has no beginning")],
)  # fmt: skip
def test_what_is_no_trace_is_refused_with_one_line(
    what: str, expected: str, make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make.save().read_bytes()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "short").write_bytes(whole[:40])
    (tmp_path / "empty").write_bytes(whole[:8])
    assert main(["explain", str(tmp_path / what)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"launcher: {tmp_path / what}: ")
    assert expected in err


def test_other_bad_input_is_refused_with_one_line(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make.save())
    (tmp_path / "bad.map").write_text("nothing of the kind\n")
    for more in (
        ["--symbols", str(tmp_path / "none.map")],
        ["--symbols", str(tmp_path / "bad.map")],
        ["--out", str(tmp_path)],
        ["--out", str(tmp_path / "none" / "r.html")],
    ):
        assert main(["explain", path, *more]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert more[1] in err
    for top in ("0", "-1", "x", "1e3", "99999"):
        with pytest.raises(SystemExit) as ended:
            main(["explain", path, "--top", top])
        assert ended.value.code == 2
        assert "is no number from 1 to 10000" in capsys.readouterr().err


def test_a_damaged_trace_is_explained_up_to_the_damage(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in range(3000):
        make.posted(value & 0xFF)
    whole = bytearray(make.save().read_bytes())
    cut, broken = tmp_path / "cut.bptrace", tmp_path / "broken.bptrace"
    cut.write_bytes(whole[:-30])
    whole[len(whole) // 2] ^= 0x55
    broken.write_bytes(whole)
    steps = explained(make).steps
    for path, expected in ((cut, "cut short"), (broken, "damaged at byte")):
        assert main(["explain", str(path), "--json"]) == 0
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert err.startswith(f"launcher: {path}: ")
        assert expected in err
        told = json.loads(out)
        assert 1000 < told["steps"] < steps
        assert len(told["complaints"]) == 1


def test_symbols_name_the_guests_functions(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_read(make)
    path = tmp_path / "System.map"
    path.write_text(f"{EIP - 16:08x} T iowrite32\n{EIP + 0x1000:08x} T next\n")
    assert main(["explain", str(make.save()), "--symbols", str(path)]) == 0
    assert f"eip {EIP:#010x} iowrite32+0x10" in capsys.readouterr().out


def test_the_pic_writes_of_a_handler_name_their_cause(make: Maker) -> None:
    trace = make.posted(0x41)
    make.interrupt(4, 0x34, trace, eoi=False)
    make.access(1 | WRITE | POSTED, PIC_BASE, 0x20)
    handler = make.batch("pic", 1)
    make.eoi(0x34)
    slow = next(slow for slow in explained(make).slowest(10) if slow.id == handler)
    assert slow.cause == trace
    assert slow.why_not == "pic has not taken pic OCW2 = 0x20"
