"""The report of a trace: well-formed, loads nothing, shows all of it as text, opens in a browser."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bus.frames import Line
from bus.recorder import MARK
from launcher.main import main
from tests.tracing import chromium
from tests.tracing.maker import COM1, Maker, batch_of
from tracing.explain import explain
from tracing.file import Trace
from tracing.legs import LEGS_MAX, Leg, Slow
from tracing.report import TITLES, report
from tracing.timeline import WIDTH, timeline

VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = "\"><script>alert(1)</script><b a='"
LOADS = {"src", "srcset", "href", "xlink:href", "data", "action", "poster"}


class Page(HTMLParser):
    """Checks that what is begun is ended, and collects."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(monkeypatch, tmp_path / "t.bptrace")
    yield maker
    maker.close()


def reported(make: Maker, top: int = 10) -> str:
    with Trace(make.save()) as trace:
        return report(explain(trace), top)


def busy(make: Maker) -> None:
    """Something of everything."""
    trace = make.posted(*range(20))
    make.output("uart0", "serial", 0, 20)
    make.out("uart0:serial", 0, 20)
    make.interrupt(4, 0x34, trace)
    make.access(1, COM1 + 5, 0x60)
    make.read()
    make.timer("uart0", "tick", make.id(), 99)
    make.line("ioapic", 3, True, make.posted(1))
    taken = make.post(7)
    make.frame("uart0", "cpu0.io", batch_of(7), taken, taken, done=False, seq=50)
    make.restart("uart0")
    make.vector(0xEC)
    make.eoi(0xEC)
    make.post(2)


def test_the_report_is_well_formed_and_has_all_parts(make: Maker) -> None:
    busy(make)
    page = Page(reported(make))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert set(TITLES) <= set(ids)
    text = "\n".join(page.texts)
    for expected in ("Trace of m", "uart0 THR = 0x0 and 19 more", "ApicMessage vector 0x34", "uart0.irq",
                     "has not taken", "after", "half within"):  # fmt: skip
        assert expected in text
    pictures = re.findall(r"<svg.*?</svg>", reported(make), re.DOTALL)
    assert len(pictures) >= 5
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.attrib["viewBox"].startswith("0 0 ")
        for element in root.iter():
            for value in element.attrib.values():
                assert "nan" not in value
                assert "inf" not in value


def test_the_report_loads_nothing_and_runs_nothing(make: Maker) -> None:
    busy(make)
    text = reported(make)
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "img", "base", "form")
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in LOADS:
                assert value is not None
                assert value.startswith("#")
                assert value[1:] in TITLES
    assert "@import" not in text
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {"#tip"}
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_comes_from_the_trace_is_text(make: Maker) -> None:
    trace = make.id()
    make.step("uart0", 9, 0, EVIL, trace, 99)
    make.frame("ioapic", EVIL, Line(4, True, EVIL), trace)
    make.rings["ioapic"].long(MARK, 0, "irq", make.tick(), 4)
    make.output("uart0", EVIL, 0, 1)
    make.out(f"uart0:{EVIL}\x00\x1b[31m", 0, 1)
    make.frame("uart0", EVIL, batch_of(1), make.id(), done=False)
    page = Page(reported(make))
    text = "\n".join(page.texts)
    assert EVIL in text
    assert not {"script", "b"} & {tag for tag, attrs in page.tags if "a" in attrs or tag == "script"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", reported(make))


def test_reports_of_little(make: Maker) -> None:
    Page(reported(make))
    make.used = []
    Page(reported(make))


def test_a_timeline_shows_all_legs_within_its_width() -> None:
    legs = [
        Leg("posted", "cpu0", 1, 0, 0, 10, "one"),
        Leg("frame", "uart0", 1, 30, 20, 50, "two", sender="cpu0"),
        Leg("frame", "uart0", 2, 40, 30, -1, "three", sender="cpu0"),
        Leg("vector", "cpu0", 1, 100_000_000, 99_999_960, 1000, "four"),
    ]
    picture = timeline(Slow(1, "kind", 5, 100_001_000, 4, "", legs, 0, [], 0))
    root = ElementTree.fromstring(picture)
    titles = [element.text or "" for element in root.iter("title")]
    assert [title.split("\n")[0] for title in titles] == ["one", "two", "three", "four"]
    assert "never done" in titles[2]
    for rect in root.iter("rect"):
        assert 0 <= float(rect.attrib["x"]) <= WIDTH
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= WIDTH + 3
    nodes = [element.text for element in root.iter("text") if element.attrib["class"] == "node"]
    assert nodes == ["cpu0", "uart0"]
    ElementTree.fromstring(timeline(Slow(1, "kind", 5, 0, 1, "", legs[:1], 0, [], 0)))


def test_of_a_long_chain_the_longest_legs_are_shown(make: Maker) -> None:
    trace = make.post(1)
    for number in range(LEGS_MAX + 30):
        make.wait(number * 1000)
        make.frame("uart0", "cpu0.io", batch_of(1), trace, trace + number)
        make.output("uart0", f"c{number}", 0, 1)
    with Trace(make.save()) as opened:
        (slow,) = explain(opened).slowest(1)
    assert (len(slow.legs), slow.left_out) == (LEGS_MAX, 1 + 2 * (LEGS_MAX + 30) - LEGS_MAX)
    assert slow.legs[0].kind == "posted"
    assert "30 short ones" in reported(make) or f"{slow.left_out} short ones left out" in reported(make)


def test_the_command_writes_the_report(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busy(make)
    out = tmp_path / "r.html"
    assert main(["explain", str(make.save()), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text(encoding="utf-8") == reported(make)


@chromium.needed
def test_a_browser_shows_the_report(make: Maker, tmp_path: Path) -> None:
    busy(make)
    page = tmp_path / "r.html"
    page.write_text(reported(make), encoding="utf-8")
    tree = chromium.run(page, tmp_path, "--dump-dom")
    parsed = Page(tree)
    assert [attrs["id"] for tag, attrs in parsed.tags if tag == "section"] == list(TITLES)
    assert len([tag for tag, _ in parsed.tags if tag == "svg"]) == reported(make).count("<svg")
    image = tmp_path / "r.png"
    chromium.run(page, tmp_path, "--hide-scrollbars", "--window-size=1200,2400", f"--screenshot={image}")
    data = image.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 2400)
    assert len(data) > 40_000  # a page without pictures is smaller
