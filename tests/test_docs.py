"""The documents say what is so: links lead somewhere, what is named exists, what exists is named.

Examples are checked where they can be: machine files are read, commands are looked up in the command line
and the Makefile. Left out: the outputs shown, and http links.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

from cpu_node.layout import EXIT_NAMES
from launcher.config import CpuTable, DeviceTable, LinuxBoot, MachineTable, MemoryTable, read_config
from launcher.main import main

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bench", "bus", "cpu_node", "devices", "launcher", "memory_node")
FOLDERS = (*PACKAGES, "docs", "machines", "tests")
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
ABSOLUTE = re.compile(r"(?<![\w.`>)~/:-])/[a-z][\w.-]*(?:/[\w.*<>$-]+)+")
SYSTEM_PATHS = ("/dev/", "/proc/", "/sys/", "/usr/share/", "/tmp/backplane-", "/bin/")
MARKETING = re.compile(
    r"\b(blazing(ly)?|seamless(ly)?|powerful|cutting.edge|state.of.the.art|world.class|revolutionary|effortless(ly)?|"
    r"game.chang\w+|elegant(ly)?|robust(ly)?|leverag\w+|unleash\w*|supercharg\w+)\b",
    re.IGNORECASE,
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    """As the usual renderers make it of a heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in LINK.findall(FENCE.sub("", text_of(name))):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if fragment:
            headings = [anchor(h) for h in HEADING.findall(file.read_text(encoding="utf-8"))]
            assert fragment in headings, f"{name}: {target}"


def modules() -> Iterator[str]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                yield str(path.relative_to(ROOT))


def test_the_code_map_has_every_module() -> None:
    code_map = text_of("ARCHITECTURE.md").partition("## Code map")[2]
    rows = re.findall(r"^\| `([^`]+)` \|", code_map, re.MULTILINE)
    assert [m for m in modules() if m not in rows] == []
    assert len(rows) == len(set(rows)), "a file has two rows"


def paths_in(text: str) -> Iterator[str]:
    """Paths of this repository among the words in code style."""
    for word in CODE.findall(text):
        path = word.partition(":")[0]
        if path.partition("/")[0] in FOLDERS and "/" in path and not re.search(r"[\s<>$()]", path):
            yield path


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    for path in paths_in(FENCE.sub("", text_of(name))):
        assert any(ROOT.glob(path.rstrip("/"))), f"{name}: {path}"


def commands_in(text: str, program: str) -> Iterator[list[str]]:
    """The words after `program`, in code style or behind a shell's prompt."""
    typed = re.findall(r"^ *\$ (.*)$", text, re.MULTILINE)
    for line in [*CODE.findall(FENCE.sub("", text)), *typed]:
        found = re.match(rf"(?:[\w./]*/)?{program} (.*)$", line)
        if found:
            yield found[1].partition("#")[0].split()


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    for words in commands_in(text_of(name), "make"):
        assert words[0] in targets, f"{name}: make {' '.join(words)}"


@pytest.mark.parametrize("name", NAMES)
def test_launcher_commands_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands_in(text_of(name), "launcher"):
        command, options = words[0], [w.partition("=")[0] for w in words[1:] if w.startswith("--")]
        asked = ["--help"] if command == "--help" else [command, "--help"]
        with pytest.raises(SystemExit) as end:
            main(asked)
        printed = capsys.readouterr().out
        assert end.value.code == 0, f"{name}: launcher {' '.join(words)}"
        assert all(option in printed for option in options), f"{name}: launcher {' '.join(words)}"


@pytest.mark.parametrize("name", NAMES)
def test_python_modules_exist(name: str) -> None:
    for words in commands_in(text_of(name), "python"):
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]) is not None, f"{name}: python {' '.join(words)}"
        elif words[0].endswith(".py"):
            assert (ROOT / words[0]).exists(), f"{name}: python {' '.join(words)}"


def test_machine_files_in_the_readme_are_valid(tmp_path: Path) -> None:
    machines = [body for kind, body in FENCE.findall(text_of("README.md")) if kind == "toml"]
    assert machines
    for number, body in enumerate(machines):
        file = tmp_path / f"{number}.toml"
        file.write_text(body, encoding="utf-8")
        read_config(file)
        assert tomllib.loads(body)["machine"]


@pytest.mark.parametrize("table", [MachineTable, CpuTable, LinuxBoot, MemoryTable, DeviceTable])
def test_every_key_of_a_machine_file_is_in_the_readme(table: type[msgspec.Struct]) -> None:
    section = text_of("README.md").partition("## The machine file")[2].partition("\n## ")[0]
    for key in get_type_hints(table):
        assert re.search(rf"\b{key}\b", section), f"{table.__name__}.{key}"


def test_every_exit_is_explained() -> None:
    rows = re.findall(r"^\| (\w+) \|", text_of("docs/how-it-works.md"), re.MULTILINE)
    assert [name for name in EXIT_NAMES if name and name not in rows] == []


def test_decisions_are_numbered() -> None:
    files = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [file.name[:3] for file in files]
    assert len(numbers) == len(set(numbers)), "two decisions have one number"
    for file in files:
        assert file.read_text(encoding="utf-8").startswith(f"# {file.name[:3]} "), file.name


@pytest.mark.parametrize("name", NAMES)
def test_words(name: str) -> None:
    """Nothing of the machine a text was written on, and no advertising."""
    text = text_of(name)
    strangers = [path for path in ABSOLUTE.findall(text) if not path.startswith(SYSTEM_PATHS)]
    assert not strangers, f"{name}: {strangers}"
    found = MARKETING.search(text)
    assert found is None, f"{name}: {found and found[0]!r}"


def test_licence() -> None:
    assert "GNU GENERAL PUBLIC LICENSE" in text_of("LICENSE")[:100]
    assert "Version 2, June 1991" in text_of("LICENSE")[:150]
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert project["license"] == {"text": "GPL-2.0-or-later"}
