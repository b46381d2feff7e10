"""Who may import whom, and where raw memory may be touched. Read from the sources, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("bench", "bus", "cpu_node", "devices", "launcher", "memory_node", "tests", "tracing")

# package -> the modules of ours that it may import, apart from its own
ALLOWED: dict[str, tuple[str, ...]] = {
    "bus": (),
    "devices": ("bus",),
    "memory_node": ("bus",),
    "cpu_node": ("bus", "memory_node.client"),
    "launcher": ("bus", "cpu_node", "devices", "memory_node", "tracing"),
    "bench": ("bus", "cpu_node", "devices", "launcher", "memory_node", "tracing"),
    "tracing": ("bus",),
}
RAW_MEMORY = {"ctypes", "_ctypes", "cffi"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    return imports_of(path.read_text(encoding="utf-8"), path)


def imports_of(text: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands, import_module("...") included."""
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = resolved(path, node)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def resolved(path: Path, node: ast.ImportFrom) -> str:
    """The absolute name of the module that a `from ... import` starts at."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("package", ALLOWED)
def test_who_imports_whom(package: str) -> None:
    allowed = (package, *ALLOWED[package])
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in sources(package)
        for line, module in imports(path)
        if module.split(".")[0] in OURS and not any(within(module, a) for a in allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_raw_memory_only_in_files_named_unsafe() -> None:
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in sources(*ALLOWED)
        if not path.stem.endswith("_unsafe")
        for line, module in imports(path)
        if module.split(".")[0] in RAW_MEMORY
    ]
    assert not wrong, "\n".join(wrong)


def test_no_raw_memory_through_the_back_door() -> None:
    """Names that reach raw memory without an import statement of ctypes in the same file."""
    back_doors = {"from_address", "string_at", "memmove", "addressof", "CDLL", "PyDLL"}
    wrong = [
        f"{where(path, node.lineno)} uses {node.attr}"
        for path in sources(*ALLOWED)
        if not path.stem.endswith("_unsafe")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in back_doors
    ]
    assert not wrong, "\n".join(wrong)


def test_files_named_unsafe_need_the_name() -> None:
    """The suffix warns a reader; on a file without raw memory it would cry wolf."""
    for path in sources(*ALLOWED):
        if path.stem.endswith("_unsafe"):
            modules = {module.split(".")[0] for _, module in imports(path)}
            unsafe_of_ours = {m for _, m in imports(path) if "_unsafe" in m and m.split(".")[0] in OURS}
            assert modules & (RAW_MEMORY | {"mmap", "fcntl", "ptrace"}) or unsafe_of_ours, where(path, 1)


def test_every_package_is_known_here() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= {*ALLOWED, "tests"}, "a new package needs a row in ALLOWED"


def test_the_checker_sees_every_form_of_import() -> None:
    text = (
        "import a.b, c\nfrom d.e import f\ndef g():\n    from h import i\n"
        "import importlib\nimportlib.import_module('j.k')\nfrom . import l\nfrom .m import n\n"
    )
    modules = {module for _, module in imports_of(text, ROOT / "bus" / "x.py")}
    assert modules == {"a.b", "c", "d.e.f", "h.i", "importlib", "j.k", "bus.l", "bus.m.n"}
