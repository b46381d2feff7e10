"""Names of a guest kernel's functions: from its System.map, its /proc/kallsyms, or its vmlinux.

A System.map or vmlinux fits when the kernel runs where it was linked (`nokaslr`); /proc/kallsyms, copied from
the guest as root, always does. Left out: user programs, and ELF files of other machines than the 80386.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ELF_MAGIC = b"\x7fELF"
TEXT_MAX = 1 << 26  # bytes of a file of lines
LINE = re.compile(r"([0-9a-fA-F]{8,16}) ([A-Za-z?]) (\S+)(?:[ \t]+\[(\S+)\])?\s*")
CODE = "tTwW"  # types of symbols, nm(1)
NO_NAMES = ("$", ".L", "__pfx_")  # what compilers put in for themselves
REACH = 1 << 20  # bytes: no function is longer
LIMIT = 1 << 32
STT_NOTYPE, STT_OBJECT, STT_FUNC = 0, 1, 2
SHN_UNDEF, SHN_ABS = 0, 0xFFF1
DATA = 9  # the rank of what is no code
SYMBOL = struct.Struct("<IIIBBH")  # Elf32_Sym: name, value, size, info, other, section

Symbol = tuple[int, int, str]  # address, how good the name is (0 is best), name


class BadSymbols(ValueError):
    """A file that holds no symbols of a 32-bit kernel; one line."""


class Symbols:
    """Looks up addresses. `source`: the file."""

    def __init__(self, symbols: Iterable[Symbol], source: str = "") -> None:
        self.source = source
        best: dict[int, tuple[int, str]] = {}
        for va, rank, name in symbols:
            if va not in best or (rank, name) < best[va]:
                best[va] = rank, name
        self._places = sorted(best)
        self._names = ["" if best[va][0] >= DATA else best[va][1] for va in self._places]
        self._found: dict[int, str] = {}

    def __len__(self) -> int:
        return sum(map(bool, self._names))

    @classmethod
    def load(cls, path: Path) -> Symbols:
        """Raises BadSymbols, with the path in its line, also for files that can't be read."""
        try:
            with path.open("rb") as file:
                is_elf = file.read(len(ELF_MAGIC)) == ELF_MAGIC
                found = list(_of_elf(file, path) if is_elf else _of_lines(file, path))
        except OSError as error:
            raise BadSymbols(f"{path}: {error.strerror or error}") from error
        symbols = cls(found, str(path))
        if not len(symbols):
            raise BadSymbols(f"{path}: there is no function in it")
        return symbols

    def find(self, va: int) -> str:
        """`name+0x12`, or `name` at its begin; empty where no function is known."""
        found = self._found.get(va)
        if found is None:
            place = bisect_right(self._places, va) - 1
            found = ""
            if place >= 0 and va - self._places[place] < REACH and (name := self._names[place]):
                offset = va - self._places[place]
                found = f"{name}+{offset:#x}" if offset else name
            if len(self._found) < 1 << 16:
                self._found[va] = found
        return found


def _rank(name: str, is_global: bool) -> int:
    """Of several names of one place the least is shown: global ones, those that don't begin with _."""
    return 2 * (not is_global) + name.startswith("_")


def _of_lines(file: Any, path: Path) -> Iterator[Symbol]:
    file.seek(0)
    data = file.read(TEXT_MAX + 1)
    if len(data) > TEXT_MAX:
        raise BadSymbols(f"{path}: more than {TEXT_MAX >> 20} MiB are no System.map")
    if not data.strip():
        raise BadSymbols(f"{path}: the file is empty")
    some = False
    for number, line in enumerate(data.decode("latin-1").splitlines(), 1):
        match = LINE.fullmatch(line)
        if match is None:
            what = "no System.map, /proc/kallsyms or ELF file" if number == 1 else "no line of a System.map"
            raise BadSymbols(f"{path}: line {number} is {what}: {line[:40]!r}")
        digits, kind, name, module = match.groups()
        va = int(digits, 16)
        if va >= LIMIT:
            raise BadSymbols(f"{path}: line {number}: {va:#x} is no address of a 32-bit kernel")
        some = some or va > 0
        if va and kind not in "aA" and not name.startswith(NO_NAMES):
            shown = f"{name} [{module}]" if module else name
            yield va, _rank(name, kind.isupper()) if kind in CODE else DATA, shown
    if not some:
        raise BadSymbols(f"{path}: all addresses are 0: only root may read them in /proc/kallsyms")


def _of_elf(file: Any, path: Path) -> Iterator[Symbol]:
    try:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise BadSymbols(
            f"{path}: to read an ELF file takes pyelftools: pip install 'backplane[trace]'"
        ) from error
    file.seek(0)
    try:
        elf = ELFFile(file)
        if elf.elfclass != 32 or elf["e_machine"] != "EM_386":
            raise BadSymbols(
                f"{path}: an ELF file of {elf['e_machine']}, {elf.elfclass} bits, not of an 80386"
            )
        table = elf.get_section_by_name(".symtab")
        if table is None:
            raise BadSymbols(f"{path}: the ELF file has no .symtab: it is stripped")
        names = elf.get_section(table["sh_link"]).data()
        code = {number for number, section in enumerate(elf.iter_sections()) if section["sh_flags"] & 4}
        data = table.data()
        entries = SYMBOL.iter_unpack(data[: len(data) // SYMBOL.size * SYMBOL.size])
    except BadSymbols:
        raise
    except (ELFError, AttributeError, KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
        raise BadSymbols(f"{path}: a damaged ELF file: {' '.join(str(error).split()) or error!r}") from error
    for name_at, va, _, info, _, section in entries:
        kind = info & 15
        if section in (SHN_UNDEF, SHN_ABS) or kind > STT_FUNC or not va or name_at >= len(names):
            continue
        end = names.find(b"\0", name_at)
        name = names[name_at : end if end >= 0 else None].decode("latin-1")
        if name and not name.startswith(NO_NAMES):
            yield va, _rank(name, info >> 4 > 0) if section in code and kind != STT_OBJECT else DATA, name
