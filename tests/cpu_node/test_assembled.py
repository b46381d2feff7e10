"""What keystone made is found again by the next start if nobody touched it; otherwise keystone works anew."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_node import assembled

TAG, OTHER = bytes(range(32)), bytes(32)
TEXT, HA = "mov eax, 0x1234\nret", 0x1000
CODE = bytes.fromhex("b834120000c3")


@pytest.fixture(autouse=True)
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Begin as a new process would; the list it returns takes the texts that keystone is given."""

    def begin() -> list[str]:
        asked: list[str] = []
        real = assembled._assembler()

        class Spy:
            def asm(self, text: str, ha: int) -> tuple[list[int], int]:
                asked.append(text)
                code: tuple[list[int], int] = real.asm(text, ha)
                return code

        monkeypatch.setattr(assembled, "_known", {})
        monkeypatch.setattr(assembled, "_unsaved", [])
        monkeypatch.setattr(assembled, "_assembler", Spy)
        return asked

    begin_once = begin()
    assert begin_once == []
    monkeypatch.undo()
    return begin


def kept(folder: Path) -> Path:
    return folder / TAG.hex()[:32] / assembled.NAME


def test_what_was_assembled_is_found_again(tmp_path: Path, start: Callable[[], list[str]]) -> None:
    folder = tmp_path / "kept"
    asked = start()
    assembled.load(folder, TAG)
    assert assembled.assemble(TEXT, HA) == assembled.assemble(TEXT, HA) == CODE
    assembled.keep(folder, TAG)
    assert asked == [TEXT]
    assert kept(folder).stat().st_mode & 0o777 == 0o600
    assert os.listdir(kept(folder).parent) == [assembled.NAME]


@pytest.mark.parametrize(
    ("what", "is_used"),
    [("nothing", True), ("a byte", False), ("the end", False), ("all", False), ("the rights", False),
     ("a link", False)],
)
def test_a_file_that_was_changed(
    what: str, is_used: bool, tmp_path: Path, start: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    start()
    assembled.assemble(TEXT, HA)
    assembled.keep(folder, TAG)
    monkeypatch.undo()
    file = kept(folder)
    data = file.read_bytes()
    match what:
        case "a byte":
            file.write_bytes(data.replace(CODE, b"\xcc" + CODE[1:]))
        case "the end":
            file.write_bytes(data[:-1])
        case "all":
            file.write_bytes(b"")
        case "the rights":
            file.chmod(0o620)
        case "a link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
    asked = start()
    with caplog.at_level(logging.WARNING):
        assembled.load(folder, TAG)
    assert len(caplog.records) == (not is_used)
    assert assembled.assemble(TEXT, HA) == CODE
    assert asked == [] if is_used else asked == [TEXT]


def test_other_texts_places_and_versions_are_others(tmp_path: Path, start: Callable[[], list[str]],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kept"
    start()
    assembled.assemble("jmp 0x2000", 0x1000)
    assembled.keep(folder, TAG)
    monkeypatch.undo()
    asked = start()
    assembled.load(folder, TAG)
    assert assembled.assemble("jmp 0x2000", 0x1800) != assembled.assemble("jmp 0x2000", 0x1000)
    assert asked == ["jmp 0x2000"]
    monkeypatch.undo()
    asked = start()
    assembled.load(folder, OTHER)
    assembled.assemble("jmp 0x2000", 0x1000)
    assert asked == ["jmp 0x2000"]


def test_a_folder_that_cannot_be_used_costs_nothing_but_time(
    tmp_path: Path, start: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kept").write_text("a file")
    start()
    assembled.load(tmp_path / "kept", TAG)
    assert assembled.assemble(TEXT, HA) == CODE
    assembled.keep(tmp_path / "kept", TAG)
    assert len(caplog.records) == 2
