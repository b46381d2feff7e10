"""Translations as text: each guest instruction with the host instructions that stand for it.

Nothing here needs a CPU: translate() returns bytes for a place in a code cache that needn't exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import capstone

from cpu_node import mode as modes
from cpu_node.decode import TooLong, Undefined, decode
from cpu_node.emit_soft import templates_of
from cpu_node.line import PAGE, Line, page_line, single_line
from cpu_node.translate import Translation, translate

VA = 0x8000_0000  # where the guest's page lies
POSITION = 0x2000  # where the first host instruction goes, in the code cache
_GUEST = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
_HOST = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


def page(code: bytes, mode: int, verify: bool) -> tuple[Line, list[Translation]]:
    """All of `code`, at the start of a page, translated in address order; up to what is no instruction."""
    line = page_line(VA >> 12, VA >> 12, mode, code.ljust(PAGE, b"\xf4"), verify)
    templates, made, offset, position = templates_of(mode), [], 0, POSITION
    while offset < len(code):
        if offset in line.host:
            try:
                offset += decode(line.code, offset).length
            except (Undefined, TooLong):
                break
            continue
        translation = translate(line, offset, templates, position)
        made.append(translation)
        position += len(translation.code)
    return line, made


def crossing(code: bytes, mode: int, verify: bool) -> tuple[Line, list[Translation]]:
    """The one instruction `code`, its last byte on the next page."""
    line = single_line(VA + PAGE - len(code) + 1, (VA >> 12, (VA >> 12) + 1), mode, code, verify)
    return line, [translate(line, 0, templates_of(mode), POSITION)]


def listing(title: str, mode: int, line: Line, made: list[Translation], size: int) -> str:
    """The text of one block."""
    verify = ", verifying" if line.verify else ""
    out = [f"==== {title} ({modes.describe(mode)}{verify})", ""]
    for number, translation in enumerate(made):
        if number:
            out.append("")
        chunk = translation.chunk
        for behind, target in translation.patches:
            out.append(f"patched: the jump that ends at {behind:x}, to {target:x}")
        if translation.returns:
            out.append("dispatch entries for " + ", ".join(f"{line.va + r:08x}" for r in translation.returns))
        guest_at = dict(zip(chunk.hosts, chunk.offsets, strict=True))  # a followed jump has no host code
        silent = [o for h, o in zip(chunk.hosts, chunk.offsets, strict=True) if guest_at[h] != o]
        for offset in silent:
            if offset < size:
                out += _guest(line, offset)
        for at, text in _host(translation):
            offset = guest_at.get(at - chunk.start)
            if offset is not None and offset >= size:
                out.append("")
                break  # padding behind the block
            if offset is not None:
                out += _guest(line, offset)
            out.append(text)
    return "\n".join(out).rstrip() + "\n"


def _guest(line: Line, offset: int) -> list[str]:
    code = line.code[offset : offset + 15]
    for va, length, name, operands in _GUEST.disasm_lite(code, line.va + offset, 1):
        text = code[:length].hex(" ")
        return [f"{va:08x}  {text:<36}{name} {operands}".rstrip()]
    return [f"{line.va + offset:08x}  {line.code[offset : offset + 8].hex(' ')} ...  (no instruction)"]


def _host(translation: Translation) -> Iterator[tuple[int, str]]:
    code, start = translation.code, translation.chunk.start
    for at, length, name, operands in _HOST.disasm_lite(code, start):
        piece = code[at - start : at - start + length].hex(" ")
        yield at, f"    {at:x}  {piece:<38}{name} {operands}".rstrip()
