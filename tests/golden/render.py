"""The text of each group of blocks, and where the accepted text is kept."""

from __future__ import annotations

from pathlib import Path

from tests.cpu_node.board import asm
from tests.golden.blocks import GROUPS, Block
from tests.golden.listing import VA, crossing, listing, page

ACCEPTED = Path(__file__).parent / "accepted"
ACCEPT = "python -m tests.golden.accept"


def accepted_file(group: str) -> Path:
    return ACCEPTED / f"{group}.txt"


def render(group: str) -> str:
    return "\n".join(_block(block) for block in GROUPS[group])


def _block(block: Block) -> str:
    if block.crosses:
        assert isinstance(block.text, str)
        length = len(asm(block.text, VA))
        length = len(asm(block.text, VA + 0x1000 - length + 1))
        code = asm(block.text, VA + 0x1000 - length + 1)
        line, made = crossing(code, block.mode, block.verify)
    else:
        code = block.text if isinstance(block.text, bytes) else asm(block.text.strip(), VA)
        line, made = page(code, block.mode, block.verify)
    return listing(block.title, block.mode, line, made, len(code))
