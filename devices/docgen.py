"""Writes docs/devices.md from the built-in devices' declarations: `python -m devices.docgen`.

A test fails when the page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bus.ranges import IoRange
from devices.base import Device
from devices.registry import BUILT_IN, load_class

PAGE = Path(__file__).resolve().parent.parent / "docs" / "devices.md"
INTRODUCTION = """\
# Devices

Generated from the classes in `devices/` by `python -m devices.docgen`. How a device works, and how to write
one: [device-model.md](device-model.md). The classes of I/O:
[decisions/002](decisions/002-three-classes-of-io.md); a register without one is synchronous. *p* posted,
*!* posted and sent at once (prompt), *m* mirrored, *o* mirrored, and only posted writes of itself change it,
*r* mirrored and relaxed, *l* a latch: reading clears it, and is known without asking.
"""


def page() -> str:
    """The whole text of docs/devices.md."""
    return "\n".join([INTRODUCTION, *(_section(name, load_class(name)) for name in BUILT_IN)])


def _section(name: str, cls: type[Device[Any]]) -> str:
    lines = [f"## {name}", "", cleandoc(sys.modules[cls.__module__].__doc__ or ""), ""]
    lines += _table("regions", "bytes | widths | classes of I/O, by offset", map(_region, _ranges(cls)))
    lines += _table("settings", "type | default", _settings(cls))
    lines.append(f"Lines: {_names(cls.IRQS)}. Channels: {_channels(cls)}.")
    return "\n".join(lines) + "\n"


def _ranges(cls: type[Device[Any]]) -> Iterable[IoRange]:
    return (*cls.PORTS, *cls.MMIO)


def _table(title: str, columns: str, rows: Iterable[str]) -> list[str]:
    body = list(rows)
    if not body:
        return []
    return [f"| {title} | {columns} |", "|---" * (columns.count("|") + 2) + "|", *body, ""]


def _region(r: IoRange) -> str:
    marks: dict[str, list[int]] = {}
    for offset in range(r.length):
        mark = ("!" if offset in r.prompt else "p" if offset in r.posted else "") + (
            "r" if offset in r.relaxed else "o" if offset in r.own else "m" if offset in r.mirrored
            else "l" if offset in dict(r.latched) else ""
        )
        if mark:
            marks.setdefault(mark, []).append(offset)
    classes = "; ".join(f"{', '.join(map(str, offsets))}: {mark}" for mark, offsets in marks.items())
    widths = ", ".join(map(str, r.widths))
    return f"| `{r.name}` ({r.SPACE}) | {r.length} | {widths} | {classes or 'all synchronous'} |"


def _settings(cls: type[Device[Any]]) -> Iterable[str]:
    hints = get_type_hints(cls.SETTINGS)
    for f in fields(cls.SETTINGS):
        yield f"| `{f.name}` | {_type(hints[f.name])} | {_default(f)} |"


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in get_args(hint))
    return str(hint.__name__)


def _default(f: Field[Any]) -> str:
    if f.default_factory is not MISSING:
        return "taken from the host at start"
    return "required" if f.default is MISSING else f"`{f.default!r}`".replace("'", '"')


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _channels(cls: type[Device[Any]]) -> str:
    if not cls.CHANNELS:
        return "none"
    sends = _names(channel.sends for channel in cls.CHANNELS)
    receives = _names(channel.receives for channel in cls.CHANNELS if channel.receives)
    return f"out {sends}, in {receives}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
