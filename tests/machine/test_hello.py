"""The smoke test: machines/hello.toml, which needs nothing but this repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.machine.drive import LEAVE, RAW_NOTICE, ROOT, Screen

pytestmark = pytest.mark.machine
HELLO = ROOT / "machines" / "hello.toml"


def test_it_ticks_echoes_and_powers_off(runtime: Path) -> None:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for(RAW_NOTICE)
        screen.wait_for("q powers off")
        screen.type("Backplane\r")
        screen.wait_for("Backplane\r\n")
        screen.type("\x03\x1a")  # keys for the guest, like any other
        screen.wait_for("\x03\x1a")
        screen.type("q")
        screen.finish(0)
        text = screen.text()
        assert re.findall(r"tick (\d)", text) == ["1", "2", "3", "4", "5"]
        assert re.search(r"hello: powered off after \d+\.\d s\n$", text), text
        assert screen.attributes() == screen.attributes_before
        screen.wait_gone()
    assert not list(runtime.glob("*"))


def test_ctrl_bracket_q_leaves(runtime: Path) -> None:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("tick 1")
        screen.type(LEAVE)
        screen.finish(0)
        assert "left with Ctrl-] q" in screen.text()
        assert screen.attributes() == screen.attributes_before
        screen.wait_gone()


def test_until_and_timeout(runtime: Path) -> None:
    with Screen("up", "--until", "tick 3", HELLO, runtime=runtime) as screen:
        screen.finish(0)
        assert "tick 3" in screen.text()
    with Screen("up", "--timeout", "1.5", HELLO, runtime=runtime) as screen:
        screen.finish(4)
        assert "still running when --timeout had passed" in screen.text()
    assert not list(runtime.glob("*"))


def test_translations_are_kept_and_may_be_spoilt(runtime: Path, tmp_path: Path) -> None:
    """Two starts fill and use the folder; what somebody does to it in between costs nothing but time."""
    kept = tmp_path / "kept"
    machine = tmp_path / "hello.toml"
    text = HELLO.read_text().replace('source = "', f'source = "{HELLO.parent}/')
    assert "[cpu]" in text
    machine.write_text(text.replace("[cpu]", f'[cpu]\ntranslations = "{kept}"'))
    damages = (lambda f: f.write_bytes(b"\xcc" * 5000), lambda f: f.unlink(), lambda f: f.chmod(0o666))
    for spoil in (None, *damages):
        for file in kept.glob("*/*.kept"):
            assert spoil is not None
            spoil(file)
        with Screen("up", "--until", "tick 2", machine, runtime=runtime) as screen:
            screen.finish(0)
            assert "tick 1" in screen.text()
        assert [f.stat().st_uid for f in kept.glob("*/*.kept")]
