"""The little of protobuf's wire format that tracing/perfetto.py needs, made for millions of small messages.

Left out: reading, groups, signed integers (sint), packed fields.
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

VARINT, FIXED64, BYTES = 0, 1, 2  # wire types
SHORT = 14  # bits
MASK = (1 << SHORT) - 1
LAST = [bytes((v,)) if v < 128 else bytes((v & 127 | 128, v >> 7)) for v in range(1 << SHORT)]
MORE = [bytes((v & 127 | 128, v >> 7 | 128)) for v in range(1 << SHORT)]  # more follows


def varint(v: int) -> bytes:
    """0 <= v < 2**64."""
    if v <= MASK:
        return LAST[v]
    if v < 1 << 28:
        return MORE[v & MASK] + LAST[v >> 14]
    if v < 1 << 42:
        return MORE[v & MASK] + MORE[v >> 14 & MASK] + LAST[v >> 28]
    low = MORE[v & MASK] + MORE[v >> 14 & MASK] + MORE[v >> 28 & MASK]
    return low + LAST[v >> 42] if v < 1 << 56 else low + MORE[v >> 42 & MASK] + LAST[v >> 56]


def tag(number: int, wire: int = VARINT) -> bytes:
    return varint(number << 3 | wire)


def uint(number: int, value: int) -> bytes:
    return tag(number) + varint(value)


def message(number: int, *parts: bytes) -> bytes:
    """A field that is a message, or bytes."""
    body = b"".join(parts)
    return tag(number, BYTES) + varint(len(body)) + body


def text(number: int, value: str) -> bytes:
    return message(number, value.encode())
