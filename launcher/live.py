"""`launcher swap`, `launcher dev`, `launcher kill`: the processes of a running machine's devices."""

from __future__ import annotations

import os
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.control import NoAnswer, ask
from launcher.errors import EXIT_OK, ConfigError
from launcher.rundir import CONTROL

SWAP_S = 60.0  # for the whole of it
LOOK_S = 0.1  # between two looks at a watched file


def swap(run_dir: Path, device: str, with_type: str | None, settings: list[str]) -> int:
    """Replace a device's process; prints what was done. NoAnswer says why it was not."""
    print(_swap(run_dir, device, _type(with_type), dict(map(_setting, settings))), flush=True)
    return EXIT_OK


def develop(run_dir: Path, device: str, watched: str, go_on: Callable[[], bool] = lambda: True) -> int:
    """Swap the device for what the file says now, and again whenever it changes, until Ctrl-C."""
    named = watched if _has_class(watched) else f"{watched}:{_class_of(Path(watched))}"
    with_type = _type(named) or named
    path = Path(with_type.rpartition(":")[0])
    print(f"{run_dir.name}: {device} follows {path}; Ctrl-C leaves it as it is then", flush=True)
    seen: tuple[int, int] | None = None
    last = _stamp(path)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while go_on():
            now = _stamp(path)
            still = now == last  # an editor may empty a file before it writes it
            last = now
            if now is not None and still and now != seen:
                seen = now
                try:
                    print(_swap(run_dir, device, with_type, {}), flush=True)
                except NoAnswer as error:
                    print(f"{error}; the old one goes on", flush=True)
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        print()
    return EXIT_OK


def kill(run_dir: Path, device: str) -> int:
    """Kill -9 of its process; the supervisor starts another."""
    reply = ask(run_dir / CONTROL, "kill", run_dir.name, device=device)
    print(f"{run_dir.name}: {device} (pid {reply['pid']}) killed")
    return EXIT_OK


def _swap(run_dir: Path, device: str, with_type: str | None, settings: dict[str, Any]) -> str:
    reply = ask(run_dir / CONTROL, "swap", run_dir.name, SWAP_S,
                device=device, type=with_type, settings=settings, folder=os.getcwd())  # fmt: skip
    pause_ns, pids = reply["pause_ns"], f"pid {reply['old']} -> {reply['new']}"
    took = "the guest was not connected" if pause_ns is None else f"a pause of {pause_ns / 1e6:.1f} ms"
    if reply["type"] is None:
        return f"{run_dir.name}: {device} has a new process ({pids}), {took} of its own"
    return f"{run_dir.name}: {device} is {reply['type']} in a new process ({pids}), {took}"


def _has_class(text: str) -> bool:
    return text.rpartition(":")[2].isidentifier() and ":" in text


def _type(text: str | None) -> str | None:
    """File paths absolute: the launcher has another working directory."""
    if text is None or ":" not in text:
        return text
    path, _, name = text.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(path, "", "no such file", "write path/to/file.py:Class")
    return f"{file}:{name}"


def _class_of(path: Path) -> str:
    """The only device class that a file defines, found without running it."""
    import ast

    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), "", error.strerror or "cannot be read", "name a file") from error
    except SyntaxError as error:
        problem = f"line {error.lineno}: {error.msg}"
        raise ConfigError(str(path), "", problem, "correct it, or write path/to/file.py:Class") from error
    names = [
        node.name for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Device" in ast.unparse(base).split("[")[0].split(".")[-1:]
                                                  for base in node.bases)
    ]  # fmt: skip
    if len(names) != 1:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise ConfigError(str(path), "", f"not one class derived from Device: {has}", "write FILE.py:Class")
    return names[0]


def _setting(text: str) -> tuple[str, Any]:
    """`key=value`: a TOML value where it is one, else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("--set", text, "not key=value", "write --set backend=log")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:  # an editor is replacing it
        return None
    return status.st_mtime_ns, status.st_size
