"""Names of addresses, from the three kinds of files; everything else is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tracing.symbols import BadSymbols, Symbols

MAP = """\
00000000 A kexec_control_code_size
c1000000 T _text
c1000000 T startup_32
c1000040 t local_helper
c1000040 T helper
c1000080 T __pfx_serial_putc
c1000080 W serial_putc
c1000100 D some_data
c1000200 T last
"""


def load(tmp_path: Path, data: bytes | str) -> Symbols:
    path = tmp_path / "symbols"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return Symbols.load(path)


@pytest.mark.parametrize(
    ("va", "name"),
    [
        (0xC100_0000, "startup_32"), (0xC100_0013, "startup_32+0x13"), (0xC100_0040, "helper"),
        (0xC100_00FF, "serial_putc+0x7f"), (0xC100_0100, ""), (0xC100_01FF, ""), (0xC100_0204, "last+0x4"),
        (0xC0FF_FFFF, ""), (0, ""), (0xC1FF_FFFF, ""), (0xFFFF_FFFF, ""),
    ],
)  # fmt: skip
def test_a_system_map(tmp_path: Path, va: int, name: str) -> None:
    symbols = load(tmp_path, MAP)
    assert symbols.find(va) == name
    assert symbols.find(va) == name


def test_proc_kallsyms_with_modules(tmp_path: Path) -> None:
    symbols = load(tmp_path, MAP + "d0801000 t virtblk_probe\t[virtio_blk]\n")
    assert symbols.find(0xD080_1010) == "virtblk_probe [virtio_blk]+0x10"
    assert symbols.source.endswith("symbols")


def elf(
    symbols: list[tuple[str, int, int, int]], machine: int = 3, word: int = 1, name: bytes = b".symtab"
) -> bytes:
    """An ELF file of sections .text, .data, .symtab, .strtab, .shstrtab. Symbols: name, va, info, section."""
    strings = b"\0" + b"".join(n.encode() + b"\0" for n, *_ in symbols)
    table, at = bytes(16), 1
    for n, va, info, section in symbols:
        table += struct.pack("<IIIBBH", at, va, 4, info, 0, section)
        at += len(n) + 1
    titles = b"\0.text\0.data\0" + name + b"\0.strtab\0.shstrtab\0"
    body, places = b"", []
    for part in (table, strings, titles):
        places.append((52 + len(body), len(part)))
        body += part
    heads = bytes(40)
    for title, kind, flags, (offset, size), link, entry in (
        (b".text", 1, 6, (0, 0), 0, 0), (b".data", 1, 3, (0, 0), 0, 0), (name, 2, 0, places[0], 4, 16),
        (b".strtab", 3, 0, places[1], 0, 0), (b".shstrtab", 3, 0, places[2], 0, 0),
    ):  # fmt: skip
        heads += struct.pack("<10I", titles.index(title), kind, flags, 0, offset, size, link, 0, 4, entry)
    ident = b"\x7fELF" + bytes([word, 1, 1]) + bytes(9)
    head = ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, 0, 0, 52 + len(body), 0, 52, 0, 0, 40, 6, 5)
    return head + body + heads


FUNC, OBJECT, LOCAL = 0x12, 0x11, 0x02
SOME = [("entry", 0xC100_0000, FUNC, 1), ("helper", 0xC100_0010, LOCAL, 1), ("table", 0xC100_0020, OBJECT, 2),
        ("nothing", 0, FUNC, 0), ("asm_exit", 0xC100_0030, 0x10, 1)]  # fmt: skip


def test_an_elf_file(tmp_path: Path) -> None:
    symbols = load(tmp_path, elf(SOME))
    assert [symbols.find(va) for va in (0xC100_0008, 0xC100_0010, 0xC100_0024, 0xC100_0031)] == [
        "entry+0x8", "helper", "", "asm_exit+0x1",
    ]  # fmt: skip
    assert len(symbols) == 3


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"), (b"\n \n", "empty"), (b"hello\n", "line 1 is no System.map"), (bytes(100), "line 1"),
        (MAP.encode() + b"and so on\n", "line 10"),
        (b"ffffffff81000000 T _text\n", "32-bit"),
        (b"00000000 T a\n00000000 T b\n", "all addresses are 0"),
        (b"c1000000 D data\n", "no function"),
        (b"\x7fELF", "damaged ELF"), (elf(SOME)[:100], "damaged ELF"),
        (elf(SOME, machine=62), "not of an 80386"), (elf(SOME, word=2), "ELF"),
        (elf(SOME, name=b".nothing"), "stripped"), (elf(SOME[3:4]), "no function"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_a_line(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(BadSymbols, match=why) as caught:
        load(tmp_path, data)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "symbols") in str(caught.value)


def test_damaged_elf_files_raise_nothing_else(tmp_path: Path) -> None:
    good, lines = elf(SOME), []
    for at in range(len(good)):
        for bit in (1, 0x80):
            data = good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :]
            try:
                load(tmp_path, data)
            except BadSymbols as error:
                lines.append(str(error))
    assert len(lines) > 100
    assert not [line for line in lines if "\n" in line]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadSymbols, match="No such file"):
        Symbols.load(tmp_path / "none")
    with pytest.raises(BadSymbols, match="directory"):
        Symbols.load(tmp_path)
