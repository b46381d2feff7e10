"""Perfetto: its own trace processor reads what we write without an error, and finds each step and arrow."""

from __future__ import annotations

import io
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.frames import Ping, PostedBatch, StatsReply, Write
from bus.recorder import DISK, LONG, MARK, MMIO, POSTED, WRITE
from tests.tracing import trace_processor
from tests.tracing.maker import COM1, DISK_BASE, Maker, batch_of
from tracing import perfetto, protobuf, trackevents
from tracing.file import Trace
from tracing.steps import Step

ROOT = Path(__file__).resolve().parent.parent.parent
STATS = "select name, severity, value from stats where severity in ('error', 'data_loss') and value > 0"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Maker]:
    """Each node with a process of its own."""
    pids = iter([100, 101, 102, 103, 104, 104, 105])  # as in maker.RINGS: cpu0 has two
    monkeypatch.setattr(os, "getpid", lambda: next(pids, 200))
    maker = Maker(monkeypatch, tmp_path / "t.bptrace", blocks=64)
    yield maker
    maker.close()


def play(make: Maker) -> None:
    """A bit of everything."""
    for turn in range(3):
        trace = make.posted(0x41 + turn, 0x42)
        make.output("uart0", "serial", 2 * turn, 2)
        make.interrupt(4, 0x34, trace)
        make.access(1, COM1 + 5, 0x60)
        make.out("uart0:serial", 2 * turn, 2)
        make.read()
        make.write(0x10, turn)
    make.access(1 | WRITE, 0x80, 7)  # open bus
    make.access(2 | LONG, 0x1F0, 256)
    make.typed("uart0:serial", 0, 1)
    typed = make.id()
    make.input("uart0", "serial", typed, 0, 1)
    timer = make.id()
    make.timer("uart0", "tick", timer, 99)
    make.line("pic", 0, True, timer)
    make.intr(True, timer)
    make.acknowledge(0, 0x08)
    make.access(4 | WRITE | MMIO | POSTED, DISK_BASE + 0x50, 0)
    trace = make.batch("disk0", 1)
    place = make.frame("disk0", "cpu0.io", PostedBatch((("regs", 0x50, 4, 0),)), trace, trace, done=False)
    make.rings["disk0"].long(MARK, 0, "queue", make.tick(), 0)
    make.rings["disk0"].dma([(0x1000, 16, False)])
    make.disk(trace, 8192, 4096)
    make.rings["disk0"].dma([(0x2000, 4096, True)])
    make.rings["disk0"].done(place)
    make.disk_done(trace, 7)
    make.line("ioapic", 9, True, trace, "disk0.irq")
    make.message(9, 0x39, trace, level=True)
    make.vector(0x39)
    make.read()  # of the handler
    make.end_level(0x39)
    make.frame("uart0", "launcher", Ping(), make.id())
    make.frame("uart0", "launcher", StatsReply({"a": 1}), make.id())
    make.rings["uart0"].frame(b"\xff?", b"\xc1", make.tick())
    killed = make.post(0x43)
    make.frame("uart0", "cpu0.io", batch_of(0x43), killed, killed, done=False, seq=90)
    make.restart("uart0")
    make.frame("uart0", "cpu0.io", batch_of(0x43), killed, killed, seq=90)


def export(steps: list[Step], make: Maker, path: Path) -> Path:
    with Trace(make.path) as trace, path.open("wb") as file:
        perfetto.export(steps, trace.meta, file)
    return path


def ask(make: Maker, path: Path, *queries: str) -> tuple[list[Step], list[list[dict[str, Any]]]]:
    """The steps, and what the trace processor answers; no import error is there."""
    trace_processor.need()
    steps = make.steps()
    errors, *answers = trace_processor.query(export(steps, make, path / "t.pftrace"), STATS, *queries)
    assert errors == []
    return steps, answers


SLICES = """
    select slice.id, ts, dur, slice.name, slice.category, process.name as process, pid,
           process_track.name as track, extract_arg(slice.arg_set_id, 'debug.chain') as chain
    from slice join process_track on slice.track_id = process_track.id join process using (upid)
    order by ts, slice.id"""
FLOWS = "select slice_out as a, slice_in as b from flow"


def test_every_step_is_a_slice(make: Maker, tmp_path: Path) -> None:
    play(make)
    steps, (slices,) = ask(make, tmp_path, SLICES)
    assert len(slices) == len(steps) > 80
    got = Counter((row["ts"], row["process"], row["category"], row["pid"]) for row in slices)
    shown = map(Shown, steps)
    assert got == Counter((one.begin_ns, one.node, one.kind_shown, one.pid) for one in shown)
    by_begin = {(row["ts"], row["process"], row["category"]): row for row in slices}
    for step in steps:
        row = by_begin[step.begin_ns, step.node, Shown(step).kind_shown]
        assert int(row["chain"] or 0) == step.chain
        if step.kind in ("frame", "timer", "input", "disk", "access") and not step.ring.cpu and step.end_ns:
            assert row["dur"] == step.end_ns - step.begin_ns, step
    assert [row["name"] for row in slices if row["dur"] == -1] == ["frame of 1 bytes", "PostedBatch"]


class Shown:
    """A step with the category it has in the viewer."""

    def __init__(self, step: Step) -> None:
        self.begin_ns, self.node, self.pid = step.begin_ns, step.node, step.pid
        self.kind_shown = "interrupt" if step.kind in ("vector", "eoi") else step.kind
        if step.kind == "open-bus":
            self.kind_shown = "access"


def test_names_and_arguments(make: Maker, tmp_path: Path) -> None:
    play(make)
    arguments = "select slice.id, key, display_value as value from slice join args using (arg_set_id)"
    _, (slices, rows) = ask(make, tmp_path, SLICES, arguments)
    args: dict[int, dict[str, str]] = {}
    for row in rows:
        args.setdefault(row["id"], {})[row["key"].removeprefix("debug.")] = row["value"]

    def first(name: str, **more: str) -> dict[str, str]:
        found = [args[row["id"]] for row in slices if row["name"] == name]
        return next(one for one in found if more.items() <= one.items())

    access = first("uart0 THR")
    assert access.pop("chain").startswith("0x")
    assert access == {
        "eip": "0xc0100000", "cr3": "0x1000", "class": "posted", "address": "0x3f8", "width": "1",
        "value": "0x41", "direction": "write", "device": "uart0", "region": "regs", "register": "THR",
    }  # fmt: skip
    batch = first("PostedBatch", **{"from": "cpu0.io", "writes": "2"})
    assert (batch["write 0"], batch["write 1"], batch["wait_ns"]) == ("THR = 0x41", "THR = 0x42", "1500")
    assert first("Read regs+0x6")["register"] == "regs+0x6"
    assert first("ReadReply")["value"] == "0x7"
    assert first("Write regs+0x10", value="0x2")["offset"] == "16"
    assert first("Line 4 high")["source"] == "uart0.irq"
    assert first("IRQ 4 vector 0x34")["irq"] == "4"
    assert first("read disk")["dma"] == "0x2000+4096 written"
    assert first("read disk")["offset"] == "8192"
    assert first("output serial")["position"] == "0"
    assert first("mark queue")["value"] == "0"
    assert [row["track"] for row in slices if row["name"] == "terminal"] == ["uart0:serial"] * 3
    assert {row["track"] for row in slices} == {
        "steps", "accesses", "answers", "interrupts", "bus thread", "disk I/O", "uart0:serial",
    }  # fmt: skip


def test_arrows_lead_along_chains(make: Maker, tmp_path: Path) -> None:
    play(make)
    steps, (slices, flows) = ask(make, tmp_path, SLICES, FLOWS)
    key = {row["id"]: (row["ts"], row["process"], row["category"]) for row in slices}
    got = Counter((key[row["a"]], key[row["b"]]) for row in flows)
    expected: Counter[Any] = Counter()
    last: dict[int, Step] = {}
    for step in steps:
        ids = [step.chain, *step.also] if step.chain else []
        if step.cause and step.chain not in last:
            ids.append(step.cause)
        for chain in ids:
            if chain in last:
                shown = [Shown(one) for one in (last[chain], step)]
                expected[tuple((one.begin_ns, one.node, one.kind_shown) for one in shown)] += 1
            last[chain] = step
    assert got == expected
    assert sum(got.values()) > 40


def test_an_interrupt_lasts_to_its_eoi(make: Maker, tmp_path: Path) -> None:
    make.interrupt(4, 0x34, make.posted(1), eoi=False)
    make.wait(7000)
    make.interrupt(5, 0x45, make.posted(2))  # of a higher class: nested
    make.eoi(0x34)
    make.vector(0xFF)  # spurious: no EOI
    make.interrupt(4, 0x34, make.posted(3))
    make.interrupt(4, 0x34, make.posted(3), eoi=False)
    sql = "select name, ts, dur, depth from slice where category = 'interrupt' and dur != 0 order by ts"
    steps, (rows,) = ask(make, tmp_path, sql)
    at = {kind: [s.begin_ns for s in steps if s.kind == kind] for kind in ("vector", "eoi")}
    assert [(row["name"], row["ts"], row["dur"], row["depth"]) for row in rows] == [
        ("IRQ 4 vector 0x34", at["vector"][0], at["eoi"][1] - at["vector"][0], 0),
        ("IRQ 5 vector 0x45", at["vector"][1], at["eoi"][0] - at["vector"][1], 1),
        ("vector 0xff", at["vector"][2], at["vector"][3] - at["vector"][2], 0),  # a lower one follows
        ("IRQ 4 vector 0x34", at["vector"][3], at["eoi"][2] - at["vector"][3], 0),
        ("IRQ 4 vector 0x34", at["vector"][4], -1, 0),
    ]


def test_overlapping_disk_io_lies_in_lanes(make: Maker, tmp_path: Path) -> None:
    ring = make.rings["disk0"]
    places = []
    for number in range(3):
        trace = make.id()
        make.frame("disk0", "cpu0.io", Write("regs", 0x50, 4, 0), trace, trace)
        places.append(ring.step(DISK, 4096, "disk", trace, number << 14))
    for place in places:
        ring.done(place)
    sql = "select count(distinct track_id) as tracks, count(*) as n from slice where category = 'disk'"
    counter = """
        select max(value) as most from counter join counter_track on counter.track_id = counter_track.id
        where name = 'disk I/O under way'"""
    _, answers = ask(make, tmp_path, sql, counter)
    assert answers == [[{"tracks": 3, "n": 3}], [{"most": 3}]]


def test_clock_of_the_day(make: Maker, tmp_path: Path) -> None:
    play(make)
    _, (rows,) = ask(make, tmp_path, "select clock_name, clock_value from clock_snapshot")
    with Trace(make.path) as trace:
        meta = trace.meta
    assert {row["clock_name"]: int(row["clock_value"]) for row in rows} == {
        "MONOTONIC": meta.monotonic_ns, "REALTIME": meta.realtime_ns,
    }  # fmt: skip


def test_examples_of_the_docs_give_rows(make: Maker, tmp_path: Path) -> None:
    play(make)
    text = (ROOT / "docs" / "tracing-exports.md").read_text(encoding="utf-8")
    examples = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    assert len(examples) > 4
    _, answers = ask(make, tmp_path, *examples)
    for example, rows in zip(examples, answers, strict=True):
        assert rows, example


@pytest.mark.parametrize("seed", range(3))
def test_whatever_steps_come(make: Maker, tmp_path: Path, seed: int) -> None:
    """Steps left out, ends moved: slices may lie across each other. Nothing raises, nothing is an error."""
    trace_processor.need()
    choice = random.Random(seed)
    for _ in range(10):
        play(make)
    steps = [step for step in make.steps() if choice.random() > 0.3]
    for step in steps:
        match choice.randrange(8):
            case 0:
                step.end_ns = 0
            case 1:
                step.end_ns = step.begin_ns + choice.randrange(100_000)
            case 2:
                step.begin_ns += choice.randrange(-3000, 3000)
            case 3:
                step.chain = choice.choice((0, 1, 2**64 - 1))
            case 4:
                step.cause = choice.choice((0, 1, step.chain))
            case 5 if step.items:
                odd: tuple[list[Any], ...] = ([], [None] * 4, ["regs", 1, 1, [["regs", "x"]]], [[[]]])
                step.items[7:] = choice.choice(odd)
    path = export(steps, make, tmp_path / "t.pftrace")
    errors, (count,) = trace_processor.query(path, STATS, "select count(*) as n from slice")
    assert errors == []
    assert count["n"] == len(steps)


def test_varints() -> None:
    def plain(v: int) -> bytes:
        out = bytearray()
        while v > 127:
            out.append(v & 127 | 128)
            v >>= 7
        return bytes((*out, v))

    for shift in range(64):
        for v in ((1 << shift) - 1, 1 << shift, (1 << shift) + 1):
            assert protobuf.varint(v) == plain(v)
    assert protobuf.varint(2**64 - 1) == plain(2**64 - 1)


def test_what_waits_is_bounded(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackevents, "CHAINS_MAX", 50)
    monkeypatch.setattr(perfetto, "PARTS_MAX", 60)
    monkeypatch.setattr(trackevents, "CACHE_MAX", 20)
    for turn in range(500):
        make.posted(turn)
    steps = make.steps()
    out = io.BytesIO()
    with Trace(make.path) as trace:
        writer = perfetto.Writer(out, trace.meta)
    for step in steps:
        writer.step(step)
        assert len(writer.waiting) <= 50 + 60 / 6
        assert len(writer._values) <= 20
    writer.end()
    assert len(out.getvalue()) > 500 * 100
