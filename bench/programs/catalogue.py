"""The programs of programs.toml: what Debian packages they need, and what they are made to do."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("programs.toml")


@dataclass(frozen=True, slots=True)
class Program:
    """One entry: `script` runs under sh in the guest, its output must be the same at every run."""

    name: str
    what: str
    packages: tuple[str, ...]
    script: str
    memory_mib: int


def catalogue(file: Path = FILE) -> list[Program]:
    """All programs, in the file's order; KeyError or TypeError for a malformed entry."""
    entries = tomllib.loads(file.read_text())["program"]
    return [
        Program(e["name"], e["what"], tuple(e["packages"]), e["script"], e["memory_mib"]) for e in entries
    ]


def chosen(words: str) -> list[Program]:
    """The programs named in `words` (commas or blanks between), all for ""; ValueError for an unknown one."""
    programs = {program.name: program for program in catalogue()}
    names = words.replace(",", " ").split()
    for name in names:
        if name not in programs:
            raise ValueError(f"programs.toml has no {name!r}; it has {', '.join(programs)}")
    return [programs[name] for name in names or programs]
