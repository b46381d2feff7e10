"""Steps and chains: what several rings noted is joined, and what is lacking is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from bus.frames import (
    PROTOCOL_VERSION,
    TABLE,
    IntAck,
    IntAckReply,
    PostedBatch,
    Read,
    StringIn,
    StringInReply,
)
from bus.recorder import LONG, MARK, MMIO, POSTED, RESUMED, WRITE
from tests.tracing.maker import COM1, DISK_BASE, PIC_BASE, Maker, batch_of
from tracing.chains import Chain, Filter, Step, steps
from tracing.file import Trace


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(monkeypatch, tmp_path / "t.bptrace")
    yield maker
    maker.close()


def of(chain: Chain) -> list[str]:
    return [f"{step.node} {step.kind}" for step in chain.steps]


def accesses(found: list[Step]) -> list[Step]:
    return [step for step in found if step.kind in ("access", "open-bus")]


# --- accesses


def test_posted_writes_are_one_chain_with_their_batch(make: Maker) -> None:
    trace = make.posted(0x41, 0x42)
    chain = make.chains()[trace]
    assert of(chain) == ["cpu0 access", "cpu0 access", "uart0 frame"]
    assert [step.span for step in chain.steps] == [trace, trace + 1, trace]
    assert [step.way for step in chain.steps[:2]] == ["posted", "posted"]
    assert [step.name for step in chain.steps] == [
        "uart0 THR = 0x41",
        "uart0 THR = 0x42",
        "THR = 0x41, THR = 0x42",
    ]
    assert chain.complete, chain.why_not
    assert chain.steps[2].frame == batch_of(0x41, 0x42)
    assert chain.root.pid == os.getpid()
    assert chain.root.args() == {
        "eip": "0xc0100000", "cr3": "0x00001000", "class": "posted", "address": "0x3f8", "width": 1,
        "value": "0x41", "direction": "write", "device": "uart0", "region": "regs", "register": "THR",
    }  # fmt: skip


def test_posted_writes_that_never_left_are_not_complete(make: Maker) -> None:
    make.access(1 | WRITE | POSTED, COM1, 1)
    (chain,) = make.chains().values()
    assert chain.steps[0].way == "unsent"
    assert not chain.complete
    assert "no frame" in chain.why_not


def test_a_batch_that_nobody_took_is_not_complete(make: Maker) -> None:
    trace = make.post(1, 2)
    chain = make.chains()[trace]
    assert not chain.complete
    assert chain.why_not.startswith("uart0 has not taken uart0 THR")


def test_a_read_that_carries_posted_writes_is_one_chain(make: Maker) -> None:
    make.access(1 | WRITE | POSTED, COM1, 0x41)
    trace = make.read(writes=(("regs", 0, 1, 0x41),))
    chain = make.chains()[trace]
    assert of(chain) == ["cpu0 access", "cpu0 access", "uart0 frame", "cpu0 frame"]
    assert [step.way for step in chain.steps[:2]] == ["posted", "synchronous"]
    assert chain.complete, chain.why_not
    assert chain.steps[1].end_ns == chain.steps[3].begin_ns


def test_a_batch_of_another_device_leaves_before_a_request(make: Maker) -> None:
    make.access(1 | WRITE | POSTED, PIC_BASE, 0x20)
    make.access(1, COM1 + 6, 7)
    batch = make.batch("pic", 1)
    request = make.ask("uart0")
    make.frame("pic", "cpu0.io", PostedBatch((("master", 0, 1, 0x20),)), batch, batch)
    make.frame("uart0", "cpu0.io", Read("regs", 6, 1), request, request)
    found = make.chains()
    assert of(found[batch]) == ["cpu0 access", "pic frame"]
    assert found[batch].complete, found[batch].why_not
    assert of(found[request]) == ["cpu0 access", "uart0 frame"]
    assert found[request].why_not == "uart0 has not answered uart0 regs+0x6 -> 0x7"
    assert found[request].root.end_ns == 0


def test_mirrored_and_open_bus_accesses_are_chains_of_one_step(make: Maker) -> None:
    make.access(1, COM1 + 5, 0x60)
    make.access(1 | WRITE, 0x80, 1)
    make.access(4 | MMIO, 0xFF00_0000, 0xFFFF_FFFF)
    found = list(make.chains().values())
    assert [(c.id, of(c), c.complete) for c in found] == [
        (0, ["cpu0 access"], True), (0, ["cpu0 open-bus"], True), (0, ["cpu0 open-bus"], True),
    ]  # fmt: skip
    assert [c.root.name for c in found] == [
        "uart0 LSR -> 0x60",
        "port 0x80 = 0x1",
        "mmio 0xff000000 -> 0xffffffff",
    ]
    assert [c.root.way for c in found] == ["mirrored", "open-bus", "open-bus"]


def test_a_read_without_a_mirror_that_led_to_nothing_is_not_complete(make: Maker) -> None:
    make.access(1, COM1 + 6, 7)
    make.access(1, COM1 + 5, 7)
    assert [c.complete for c in make.chains().values()] == [False, True]


def test_what_a_read_cleared_is_told_to_the_device(make: Maker) -> None:
    make.posted(1)
    make.access(1, COM1 + 2, 0xC1)
    make.access(1, COM1 + 2, 0xC2)  # it was set: an entry of width 0 says so to the UART
    make.rings["cpu0.io"].told()
    make.access(1, COM1 + 2, 0xC1)
    trace = make.batch("uart0", 1)
    make.frame("uart0", "cpu0.io", PostedBatch((("regs", 2, 0, 0xC2),)), trace, trace)
    found = make.chains()
    assert [(s.node, s.kind, s.record.two) for s in found[trace].steps] == [
        ("cpu0", "access", 0xC2),
        ("uart0", "frame", 0),
    ]
    assert found[trace].complete
    assert found[trace].steps[0].way == "mirrored"


def test_strings_of_several_messages(make: Maker) -> None:
    make.access(1 | LONG, COM1, 70_000)
    spans = []
    for count in (65_536, 4_464):
        spans.append(make.ask("uart0"))
        make.frame("uart0", "cpu0.io", StringIn("regs", 0, 1, count), spans[-1], spans[-1])
        make.frame("cpu0.io", "uart0", StringInReply(bytes(count)), spans[-1], spans[-1], done=False)
    found = make.chains()
    assert set(found) == set(spans)
    for span in spans:
        assert of(found[span]) == ["cpu0 access", "uart0 frame", "cpu0 frame"]
        assert found[span].complete, found[span].why_not
    assert found[spans[0]].root is found[spans[1]].root
    answer = found[spans[0]].steps[2]
    assert answer.frame is None  # it was cut
    assert answer.name == "StringInReply"
    assert found[spans[0]].root.name == "uart0 RBR -> 70000 x 1 bytes"


def test_a_wide_access_that_is_split(make: Maker) -> None:
    make.access(2 | WRITE | POSTED, COM1, 0x4142)
    trace = make.batch("uart0", 2)
    make.frame("uart0", "cpu0.io", PostedBatch((("regs", 0, 1, 0x42), ("regs", 1, 1, 0x41))), trace, trace)
    chain = make.chains()[trace]
    assert of(chain) == ["cpu0 access", "uart0 frame"]
    assert chain.complete


# --- interrupts


def test_an_interrupt_through_the_ioapic(make: Maker) -> None:
    trace = make.posted(0x41)
    make.interrupt(4, 0x34, trace, eoi=False)
    make.access(1, COM1 + 5, 0x60)
    handler = make.read()
    make.eoi(0x34)
    make.access(1, COM1 + 5, 0x61)
    make.wait(2_000_000)
    make.access(1, COM1 + 5, 0x62)
    found = make.chains()
    chain = found[trace]
    assert of(chain) == [
        "cpu0 access", "uart0 frame", "ioapic frame", "ioapic mark", "cpu0 frame", "cpu0 vector", "cpu0 eoi",
    ]  # fmt: skip
    assert chain.complete, chain.why_not
    assert [step.irq for step in chain.steps] == [-1, -1, 4, -1, 4, 4, 4]
    assert chain.steps[5].name == "IRQ 4 vector 0x34"
    assert found[handler].root.cause == trace
    mirrored = [c.root.cause for c in found.values() if c.id == 0]
    assert mirrored == [trace, trace, 0]


def test_an_interrupt_that_is_not_over(make: Maker) -> None:
    first = make.posted(1)
    make.line("ioapic", 4, True, first)
    make.rings["ioapic"].long(MARK, 0, "irq", make.tick(), 4)
    second = make.posted(2)
    make.line("ioapic", 3, True, second)
    make.message(3, 0x33, second)
    third = make.posted(3)
    make.interrupt(5, 0x35, third, eoi=False)
    found = make.chains()
    assert found[first].why_not == "the message of line 4 never arrived"
    assert found[second].why_not == "vector 0x33 was not delivered"
    assert found[third].why_not == "vector 0x35 has not ended"


def test_a_level_that_stays_high_interrupts_again_for_the_same_cause(make: Maker) -> None:
    trace = make.write(0x60, 1)
    make.line("ioapic", 9, True, trace, "disk0.irq")
    make.message(9, 0x39, trace, level=True)
    make.vector(0x39)
    end = make.end_level(0x39)
    make.message(9, 0x39, end, level=True)
    make.vector(0x39)
    make.end_level(0x39)
    found = make.chains()
    assert set(found) == {trace}
    assert [s.kind for s in found[trace].steps].count("vector") == 2
    assert [s.kind for s in found[trace].steps].count("eoi") == 2
    assert found[trace].complete, found[trace].why_not


def test_two_messages_of_one_step_are_told_apart_by_their_marks(make: Maker) -> None:
    first, second = make.posted(1), make.posted(2)
    make.line("ioapic", 4, True, first)
    make.line("ioapic", 9, True, second, "disk0.irq")
    unmask = make.id()
    make.frame(
        "ioapic", "cpu0.io", PostedBatch((("regs", 16, 4, 0),)), unmask, unmask
    )  # in its step both are sent
    make.message(4, 0x34, unmask)
    make.message(9, 0x39, unmask)
    for vector in (0x39, 0x34):
        make.vector(vector)
        make.eoi(vector)
    found = make.chains()
    assert [s.record.flags for s in found[first].steps if s.kind == "vector"] == [0x34]
    assert [s.record.flags for s in found[second].steps if s.kind == "vector"] == [0x39]


def test_messages_that_merge_while_they_wait_are_one_interrupt_of_both_chains(make: Maker) -> None:
    first, second = make.posted(1), make.posted(2)
    for trace in (first, second):
        make.line("ioapic", 4, True, trace)
        make.message(4, 0x34, trace)
        make.line("ioapic", 4, False, trace)
    make.vector(0x34)
    make.eoi(0x34)
    found = make.chains()
    assert found[first].complete, found[first].why_not
    assert found[second].complete, found[second].why_not
    assert found[first].steps[-1] is found[second].steps[-1]


def test_a_message_that_arrives_after_the_next_rise_is_of_the_first(make: Maker) -> None:
    first, second = make.posted(1), make.posted(2)
    marks = make.rings["ioapic"]
    for trace in (first, second):
        make.line("ioapic", 4, True, trace)
        marks.long(MARK, 0, "irq", make.tick(), 4)
        make.line("ioapic", 4, False, trace)
    for trace in (first, second):
        make.arrive(0x34, trace)
        make.vector(0x34)
        make.eoi(0x34)
    found = make.chains()
    for trace in (first, second):
        assert [s.kind for s in found[trace].steps].count("vector") == 1
        assert found[trace].complete, found[trace].why_not


def test_a_message_that_waits_for_the_cpus_thread_is_of_the_next_delivery(make: Maker) -> None:
    first, second = make.posted(1), make.posted(2)
    marks, spans = make.rings["ioapic"], []
    for trace in (first, second):
        make.line("ioapic", 4, True, trace)
        marks.long(MARK, 0, "irq", make.tick(), 4)
    spans = [make.arrive(0x34, trace, accepted=False) for trace in (first, second)]
    for span in spans:
        make.accept(0x34, span)
        make.vector(0x34)
        make.eoi(0x34)
    third = make.posted(3)
    make.line("ioapic", 4, True, third)
    marks.long(MARK, 0, "irq", make.tick(), 4)
    make.arrive(0x34, third, accepted=False)  # by no APIC
    found = make.chains()
    for trace in (first, second):
        assert [s.kind for s in found[trace].steps].count("vector") == 1
        assert found[trace].complete, found[trace].why_not
    assert found[third].why_not == "vector 0x34 was not delivered"


def test_the_local_apics_own_timer_begins_a_chain(make: Maker) -> None:
    make.vector(0xEC)
    make.access(1, COM1 + 5, 0)
    make.eoi(0xEC)
    found = [chain for chain in make.chains().values() if chain.id]
    (chain,) = found
    assert of(chain) == ["cpu0 vector", "cpu0 eoi"]
    assert chain.complete, chain.why_not
    assert accesses(make.steps())[0].cause == chain.id


def test_an_interrupt_of_the_8259(make: Maker) -> None:
    trace = make.posted(0x41)
    make.line("pic", 4, True, trace)
    make.intr(True, trace)
    make.access(1, COM1 + 5, 0)
    make.acknowledge(4, 0x0C)
    make.access(1 | WRITE | POSTED, PIC_BASE, 0x20)
    eoi = make.batch("pic", 1)
    make.frame("pic", "cpu0.io", PostedBatch((("master", 0, 1, 0x20),)), eoi, eoi)
    make.wait(2_000_000)
    make.access(1, COM1 + 5, 0)
    found = make.chains()
    chain = found[trace]
    assert of(chain) == ["cpu0 access", "uart0 frame", "pic frame", "cpu0 frame", "pic frame", "pic mark",
                         "cpu0 frame", "cpu0 vector"]  # fmt: skip
    assert chain.complete, chain.why_not
    assert chain.steps[-1].name == "IRQ 4 vector 0xc"
    assert found[eoi].root.cause == trace
    assert found[eoi].complete
    mirrored = [c.root for c in found.values() if c.id == 0]
    assert [(step.way, step.cause) for step in mirrored] == [("mirrored", 0), ("mirrored", 0)]


def test_an_8259_that_raises_int_for_one_line_and_is_asked_for_another(make: Maker) -> None:
    first, second = make.posted(1), make.posted(2)
    make.line("pic", 4, True, first)
    make.intr(True, first)
    make.line("pic", 1, True, second)
    make.acknowledge(1, 0x09)
    eoi = make.posted(3)
    make.intr(True, eoi)  # INT rises again in the step of the EOI
    make.acknowledge(4, 0x0C)
    found = make.chains()
    for trace, vector in ((first, 0x0C), (second, 0x09)):
        assert [s.record.flags for s in found[trace].steps if s.kind == "vector"] == [vector]
        assert found[trace].complete, found[trace].why_not
    assert found[eoi].complete, found[eoi].why_not


def test_an_inta_that_comes_too_late_finds_nothing(make: Maker) -> None:
    asked = make.ask("pic")
    make.frame("pic", "cpu0.io", IntAck(), asked, asked)
    make.frame("cpu0.io", "pic", IntAckReply(None), asked, asked, done=False)
    trace = make.posted(1)
    make.interrupt(4, 0x34, trace)
    found = make.chains()
    assert of(found[asked]) == ["pic frame", "cpu0 frame"]
    assert found[asked].complete, found[asked].why_not
    assert [step.way for step in found[trace].steps if step.kind == "vector"] == ["apic"]
    assert found[trace].complete, found[trace].why_not


def test_int_that_goes_low_again_needs_no_acknowledgement(make: Maker) -> None:
    first, second = make.posted(1), make.posted(2)
    make.intr(True, first)
    make.intr(False, second)
    third = make.posted(3)
    make.intr(True, third)
    found = make.chains()
    assert found[first].complete
    assert found[third].why_not == "the 8259's interrupt was not acknowledged"


# --- what devices do by themselves


def test_timers_begin_chains(make: Maker) -> None:
    trace = make.id()
    make.timer("uart0", "tick", trace, 99)
    make.interrupt(0, 0x30, trace)
    chain = make.chains()[trace]
    assert of(chain)[0] == "uart0 timer"
    assert chain.complete, chain.why_not


def test_disk_io_with_its_dma_and_interrupt(make: Maker) -> None:
    make.access(4 | WRITE | MMIO | POSTED, DISK_BASE + 0x50, 0)
    trace = make.batch("disk0", 1)
    place = make.frame("disk0", "cpu0.io", PostedBatch((("regs", 0x50, 4, 0),)), trace, trace, done=False)
    ring = make.rings["disk0"]
    ring.long(MARK, 0, "queue", make.tick(), 0)
    ring.dma([(0x1000, 16, False)])
    make.disk(trace, 8192, 4096)
    ring.dma([(0x2000, 4096, True)])
    ring.done(place)
    make.disk_done(trace, 7)
    make.line("ioapic", 9, True, trace, "disk0.irq")
    make.message(9, 0x39, trace, level=True)
    make.vector(0x39)
    make.end_level(0x39)
    found = make.chains()
    chain = found[trace]
    assert of(chain)[:5] == ["cpu0 access", "disk0 frame", "disk0 mark", "disk0 disk", "disk0 disk-done"]
    assert chain.complete, chain.why_not
    frame, mark, disk = chain.steps[1:4]
    assert (disk.name, disk.within, mark.within) == ("read 4096 at 8192", frame, frame)
    assert disk.args()["dma"] == "0x2000+4096 written"
    assert frame.args()["dma"] == "0x1000+16"
    assert chain.root.name == "disk0 QueueNotify = 0x0"


def test_bytes_of_several_steps_leave_consoles_at_once_and_one_of_them_in_two(make: Maker) -> None:
    traces = []
    for position, count in ((0, 1), (1, 1), (2, 10)):
        traces.append(make.posted(0x41))
        make.output("uart0", "serial", position, count)
    make.out("uart0:serial", 0, 5)
    make.out("uart0:serial", 5, 7)
    last = make.posted(0x42)
    make.output("uart0", "serial", 12, 1)
    found = make.chains()
    for trace in traces:
        assert found[trace].complete, found[trace].why_not
    assert [of(found[trace])[2:] for trace in traces] == [
        ["uart0 output", "consoles terminal"],
        ["uart0 output", "consoles terminal"],
        ["uart0 output", "consoles terminal", "consoles terminal"],
    ]
    assert found[last].why_not == "output of uart0 was not passed on"


def test_what_is_typed_begins_the_chain_of_the_input(make: Maker) -> None:
    make.typed("uart0:tx", 0, 2)
    first, second = make.id(), make.id()
    make.input("uart0", "serial", first, 0, 1)
    make.interrupt(4, 0x34, first)
    make.input("uart0", "serial", second, 1, 1)
    make.wait(1)
    make.typed("uart0:tx", 2, 1)
    found = make.chains()
    assert of(found[first])[:2] == ["consoles typed", "uart0 input"]
    assert of(found[second])[:2] == ["consoles typed", "uart0 input"]
    assert found[first].complete, found[first].why_not
    assert found[first].root is found[second].root
    untaken = [c for c in found.values() if c.why_not == "no device took it"]
    assert len(untaken) == 1


# --- processes that end


def test_a_device_that_is_killed_in_a_chain_shows_both_processes(make: Maker) -> None:
    trace = make.post(0x41)
    make.frame("uart0", "cpu0.io", batch_of(0x41), trace, trace, done=False, seq=5)
    make.restart("uart0")
    killed = make.chains()[trace]
    assert killed.why_not == f"process {os.getpid()} of uart0 has not done THR = 0x41"
    make.frame("uart0", "cpu0.io", batch_of(0x41), trace, trace, seq=5)
    make.interrupt(4, 0x34, trace)
    chain = make.chains()[trace]
    assert chain.complete, chain.why_not
    assert [step.pid - os.getpid() for step in chain.steps if step.node == "uart0"] == [0, 1]


def test_a_process_that_ended_after_it_had_committed(make: Maker) -> None:
    """Its successor brings the step to its end without taking the frame again."""
    other = make.posted(1)
    trace = make.post(0x41)
    make.frame("uart0", "cpu0.io", batch_of(0x41), trace, trace, done=False)
    make.restart("uart0")
    make.step("uart0", RESUMED, os.getpid() + 1, "", trace, 0)
    make.line("pic", 4, True, trace)
    make.restart("uart0")  # and one that had nothing left to do
    make.step("uart0", RESUMED, os.getpid() + 1, "", other, 0)
    found = make.chains()
    assert of(found[trace]) == ["cpu0 access", "uart0 frame", "uart0 process", "pic frame"]
    assert found[trace].complete, found[trace].why_not
    assert [step.pid - os.getpid() for step in found[trace].steps if step.node == "uart0"] == [0, 1]
    assert found[trace].steps[2].name == f"process {os.getpid() + 1} goes on"
    assert of(found[other]) == ["cpu0 access", "uart0 frame"]


def test_a_swap_in_a_chain(make: Maker) -> None:
    trace = make.post(0x41)
    make.restart("uart0")
    make.frame("uart0", "cpu0.io", batch_of(0x41), trace, trace)
    chain = make.chains()[trace]
    assert chain.complete
    assert chain.steps[-1].pid == os.getpid() + 1
    assert chain.root.pid == os.getpid()


def test_a_timer_that_a_killed_process_had_begun(make: Maker) -> None:
    first, second = make.id(), make.id()
    make.timer("uart0", "tick", first, 99, done=False)
    make.restart("uart0")
    make.timer("uart0", "tick", second, 99)
    make.line("ioapic", 4, True, second)
    found = make.chains()
    assert set(found) == {first}
    assert of(found[first]) == ["uart0 timer", "uart0 timer", "ioapic frame"]
    assert found[first].complete, found[first].why_not


# --- what is lacking


def test_a_trace_that_begins_in_the_middle(make: Maker) -> None:
    trace = make.id()
    make.frame("uart0", "cpu0.io", batch_of(1), trace, trace)
    make.eoi(0x34)
    answer = make.id()
    make.frame("cpu0.io", "uart0", Read("regs", 0, 1), answer, answer, done=False)
    make.out("uart0:serial", 700, 5)
    found = make.chains()
    assert not any(chain.complete for chain in found.values())
    assert len(found) == 4
    assert "begins before the trace" in found[trace].why_not


def test_records_that_were_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make = Maker(monkeypatch, tmp_path / "t.bptrace", blocks=4)
    for number in range(4000):
        make.posted(number & 0xFF, 1, 2)
    found = make.steps()
    lost = [step for step in found if step.kind == "lost"]
    assert {step.ring.name for step in lost} == {"uart0", "cpu0.io"}
    with Trace(make.save()) as trace:
        list(steps(trace))
        assert sum(trace.lost.values()) == sum(step.record.number for step in lost)
    judged = [chain.complete for chain in make.chains().values()]
    assert 500 < sum(judged) < 4000
    assert not all(judged)
    assert [step.begin_ns for step in found] == sorted(step.begin_ns for step in found)
    make.close()


def test_frames_that_cannot_be_read_harm_nothing(make: Maker) -> None:
    for data in (b"", b"\xff" * 40, b"\xc1", b"\x97\x04\x05\xc0\xc0\xc0\xc0\xc0", b"\x90", b"x" * 70_000):
        for node in ("uart0", "cpu0", "cpu0.io", "ioapic"):
            make.rings[node].frame(b"peer", data, make.tick())
    for step in make.steps():
        assert isinstance(step.name, str)
        assert isinstance(step.args(), dict)
        assert step.frame is None
    assert not any(chain.complete for chain in make.chains().values())


@pytest.mark.parametrize("value", [None, 1.5, "x", [1], [["a", 1]], {"a": 1}, {}, -1])
def test_frames_whose_fields_are_of_other_types_harm_nothing(make: Maker, value: object) -> None:
    for kind, (cls, _) in TABLE.items():
        values = [value] * len(cls.__struct_fields__)
        for node in ("uart0", "cpu0", "cpu0.io", "ioapic", "pic"):
            data = msgpack.packb([PROTOCOL_VERSION, kind, 1, 0, 5, 5, 5, *values])
            make.rings[node].frame(b"peer", data, make.tick())
    found = make.steps()
    assert len(found) > 5 * len(TABLE)
    for step in found:
        assert isinstance(step.name, str)
        assert isinstance(step.args(), dict)
    assert make.chains()


def test_a_filter_keeps_whole_chains(make: Maker) -> None:
    uart = make.posted(1)
    make.interrupt(4, 0x34, uart)
    disk = make.write(0x60, 1)
    path = make.save()
    with Trace(path) as trace:
        kept = list(steps(trace, keep=Filter(devices=frozenset({"uart0"}))))
        assert {step.chain for step in kept if step.kind != "process"} == {uart}
        assert len([step for step in kept if step.chain]) == 7
        kept = list(steps(trace, keep=Filter(ports=(range(DISK_BASE, DISK_BASE + 0x100),))))
        assert {step.chain for step in kept} == {disk}
        assert list(steps(trace, keep=Filter(since_ns=make.now + 1))) == []
