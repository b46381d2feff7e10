"""Translations, byte for byte, against accepted ones. A difference isn't wrong, but it must be meant."""

from __future__ import annotations

import difflib

import pytest

from cpu_node.emit import Templates
from cpu_node.line import PAGE, page_line
from cpu_node.translate import translate
from tests.cpu_node.board import asm
from tests.golden.blocks import GROUPS
from tests.golden.listing import POSITION, VA
from tests.golden.render import ACCEPT, ACCEPTED, accepted_file, render


@pytest.mark.parametrize("group", GROUPS)
def test_accepted(group: str) -> None:
    path = accepted_file(group)
    old = path.read_text() if path.exists() else ""
    new = render(group)
    if old != new:
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), str(path.name), "now", lineterm="")
        text = "\n".join(lines)
        pytest.fail(f"translations differ; if that is meant: {ACCEPT}\n{text}", pytrace=False)


def test_nothing_left_over() -> None:
    assert {path.stem for path in ACCEPTED.iterdir()} == set(GROUPS)


def test_host_code_does_not_depend_on_where_it_lies() -> None:
    code = asm("top: add eax, [esi]\njz top\npush 5\nsti\npopfd\ncall top\nret", VA).ljust(PAGE, b"\xf4")
    made = []
    for position in (POSITION, POSITION + 0x12340):
        line = page_line(VA >> 12, 1, 0, code, False)
        made.append(translate(line, 0, Templates(0), position))
    assert made[0].code == made[1].code
