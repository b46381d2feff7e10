"""Writes the table of kinds and their fields in backplane.lua from bus/frames.py: `python -m tracing.luagen`.

A test fails when it is stale.
"""

from __future__ import annotations

from bus.frames import PROTOCOL_VERSION, TABLE, Header
from tracing.pcapng import DISSECTOR

BEGIN, END = "-- generated: begin\n", "-- generated: end\n"
WRITES = "tuple[PostedWrite, ...]"
# By the annotation, as in bus/codec.py; a new one has to get a reader in backplane.lua.
LUA_TYPE = {
    "int": "uint", "int | None": "uint?", "bool": "bool", "str": "str", "bytes": "bin",
    "dict[str, Any]": "map", WRITES: "writes",
}  # fmt: skip
TAKEN = {"version", "kind", *Header._fields}  # names of the header's fields


def table() -> str:
    """The Lua text between the markers."""
    types: dict[str, set[str]] = {}
    for cls, _ in TABLE.values():
        for name in cls.__struct_fields__:
            types.setdefault(name, set()).add(LUA_TYPE[cls.__annotations__[name]].rstrip("?"))
    lines = [f"local PROTOCOL_VERSION = {PROTOCOL_VERSION}", "local KINDS = {"]
    for kind, (cls, direction) in sorted(TABLE.items()):
        fields = []
        for name in cls.__struct_fields__:
            alone = name in TAKEN or len(types[name]) > 1
            filter_name = f"{cls.__name__.lower()}.{name}" if alone else name
            fields.append(f'{{"{name}", "{LUA_TYPE[cls.__annotations__[name]]}", "{filter_name}"}}')
        lines.append(f'  [{kind}] = {{"{cls.__name__}", "{direction}", {{{", ".join(fields)}}}}},')
    return "\n".join([*lines, "}"]) + "\n"


def renewed(text: str) -> str:
    """`text` of backplane.lua with the table of now."""
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return before + BEGIN + table() + END + behind


if __name__ == "__main__":
    DISSECTOR.write_text(renewed(DISSECTOR.read_text(encoding="utf-8")), encoding="utf-8")
