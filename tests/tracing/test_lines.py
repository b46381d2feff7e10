"""Steps as lines of text."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bus import recorder
from bus.codec import encode
from bus.frames import Line, Ping
from bus.recorder import Recorder
from tracing.file import Trace, Writer
from tracing.joining import steps
from tracing.lines import Lines
from tracing.meta import Meta
from tracing.rings import Ring

SECOND = 1_000_000_000


def lines(tmp_path: Path, colour: bool = False) -> list[str]:
    """Of a ring with a frame that was dealt with, one that wasn't, and a mark."""
    fd = recorder.make("pic", 4)
    noted = Recorder(fd, "pic")
    done = noted.frame(b"uart0", encode(Line(4, True, "uart0.out"), 1, 0, 0xABCDE12345, 7, 100_000), 184_000)
    noted.long(recorder.MARK, 0, "irq", 190_000, 4)
    os.pwrite(fd, (215_000).to_bytes(8, "little"), 8 * done)
    noted.long(recorder.MARK, 0, "\x1b[2J", 190_000, 4)
    noted.frame(b"launcher", encode(Ping(), 1, 0, 9, 9, 3 * SECOND), 3 * SECOND)
    meta = Meta("m", ["pic"], monotonic_ns=0, realtime_ns=1_700_000_000 * SECOND)
    with (tmp_path / "t.bptrace").open("wb") as file:
        writer = Writer(file, meta)
        ring = Ring("pic", fd)
        for position, data in ring.pieces(0, ring.tail):
            writer.piece(0, position, data)
        writer.end()
    os.close(fd)
    with Trace(tmp_path / "t.bptrace") as trace:
        of = Lines(trace.meta, colour)
        return [of.line(step) for step in steps(trace) if step.kind != "process"]


def test_a_line_says_when_where_what_and_how_long(tmp_path: Path) -> None:
    first, mark, _, last = lines(tmp_path)
    what = "Line 4 high   waited 84 us, took 31 us"
    assert re.fullmatch(rf"\d\d:\d\d:20\.000184  pic       12345  frame      {what}", first)
    assert re.fullmatch(r"\d\d:\d\d:20\.000190  pic       12345  mark       .*irq.*4", mark)
    assert re.fullmatch(r"\d\d:\d\d:23\.000000  pic       00009  frame      Ping.*   not done", last)


def test_what_the_guest_says_does_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    assert not any("\x1b" in line for line in lines(tmp_path))
    assert "\\x1b[2J" in lines(tmp_path)[2]


def test_on_a_terminal_a_chain_has_a_colour(tmp_path: Path) -> None:
    first, mark, *_ = lines(tmp_path, colour=True)
    colours = [re.search(r"\x1b\[\d+m12345\x1b\[0m", line) for line in (first, mark)]
    assert colours[0] is not None
    assert colours[1] is not None
    assert colours[0][0] == colours[1][0]
