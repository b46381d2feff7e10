"""A small AML encoder: enough for a DSDT of fixed devices and sleep packages.

Source: ACPI specification 6.4, chapter 20 (ACPI Machine Language) and 6.4 (resource descriptors);
[n] is a section of it. Every function returns the encoded bytes of one term.
Left out: methods, operation regions, references and every other term without a use here.
"""

from __future__ import annotations

import struct

ZERO_OP, ONE_OP, NAME_OP = 0x00, 0x01, 0x08
BYTE_PREFIX, WORD_PREFIX, DWORD_PREFIX, STRING_PREFIX = 0x0A, 0x0B, 0x0C, 0x0D
SCOPE_OP, BUFFER_OP, PACKAGE_OP, EXT_PREFIX, DEVICE_OP = 0x10, 0x11, 0x12, 0x5B, 0x82
IO_PORT_TAG, IRQ_TAG, END_TAG = 0x47, 0x22, 0x79  # small resource items, with their lengths [6.4.2]
MEMORY_TAG, WRITABLE = 0x86, 1  # large resource item [6.4.3.4]


def name_seg(name: str) -> bytes:
    """Four characters, padded with underscores [20.2.2]."""
    if not (1 <= len(name) <= 4 and name.isascii() and name.isupper() and not name[0].isdigit()):
        raise ValueError(f"{name!r} is no AML name")
    return name.ljust(4, "_").encode()


def integer(value: int) -> bytes:
    """The shortest encoding [20.2.3]."""
    if value in (0, 1):
        return bytes([ZERO_OP if value == 0 else ONE_OP])
    if value <= 0xFF:
        return struct.pack("<BB", BYTE_PREFIX, value)
    if value <= 0xFFFF:
        return struct.pack("<BH", WORD_PREFIX, value)
    return struct.pack("<BI", DWORD_PREFIX, value)


def string(text: str) -> bytes:
    """ASCII, ended by a zero [20.2.3]."""
    return bytes([STRING_PREFIX]) + text.encode("ascii") + b"\0"


def pkg(body: bytes) -> bytes:
    """PkgLength and body; the length counts its own bytes too [20.2.4]."""
    if len(body) + 1 <= 0x3F:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        length = len(body) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | length & 0x0F]) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"{len(body)} bytes do not fit an AML package")


def name(segment: str, value: bytes) -> bytes:
    return bytes([NAME_OP]) + name_seg(segment) + value


def package(*elements: bytes) -> bytes:
    return bytes([PACKAGE_OP]) + pkg(bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return bytes([BUFFER_OP]) + pkg(integer(len(data)) + data)


def scope(segment: str, *terms: bytes) -> bytes:
    return bytes([SCOPE_OP]) + pkg(name_seg(segment) + b"".join(terms))


def device(segment: str, *terms: bytes) -> bytes:
    return bytes([EXT_PREFIX, DEVICE_OP]) + pkg(name_seg(segment) + b"".join(terms))


def eisa_id(text: str) -> bytes:
    """A compressed EISA id such as PNP0501: three 5-bit letters and four hex digits, big-endian [19.6.36]."""
    letters, digits = text[:3], text[3:]
    if len(text) != 7 or not (letters.isalpha() and letters.isupper()):
        raise ValueError(f"{text!r} is no EISA id")
    packed = 0
    for letter in letters:
        packed = packed << 5 | ord(letter) - 0x40
    value = packed << 16 | int(digits, 16)
    return struct.pack("<B", DWORD_PREFIX) + value.to_bytes(4, "big")


def io_port(base: int, length: int) -> bytes:
    """I/O port descriptor, 16-bit decode, fixed base [6.4.2.5]."""
    return struct.pack("<BBHHBB", IO_PORT_TAG, 1, base, base, 1, length)


def memory(base: int, length: int) -> bytes:
    """32-bit fixed memory range, writable [6.4.3.4]."""
    return struct.pack("<BHBII", MEMORY_TAG, 9, WRITABLE, base, length)


def irq(line: int) -> bytes:
    """IRQ descriptor of 2 bytes: edge, active high, exclusive, as ISA lines are [6.4.2.1]."""
    return struct.pack("<BH", IRQ_TAG, 1 << line)


def resources(*items: bytes) -> bytes:
    """A resource template: the end tag's checksum of zero means "not computed" [6.4.2.9]."""
    return buffer(b"".join(items) + bytes([END_TAG, 0]))
