"""Interesting values: integers, floating point of each format, vector registers, FPU states, page contents.

Source: Intel SDM volume 1, 4.8 (floating-point formats), 8.1 (x87 state), 10.2.3 (MXCSR).
"""

from __future__ import annotations

import functools
import struct
from random import Random

from tests.insn.state import FX_SIZE, MXCSR_DEFAULT, PAGE_SIZE, X87_DEFAULT_CONTROL, fx_image

INTEGERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF,
    0x10000,
    0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFF80, 0xFFFF8000, 0xFFFFFFFE, 0xFFFFFFFF, 0x55555555,
    0xAAAAAAAA,
)  # fmt: skip

SINGLES = tuple(
    struct.pack("<I", bits)
    for bits in (
        0, 0x80000000, 0x3F800000, 0xBF800000, 0x40490FDB, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF,
        0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001, 0xFFABCDEF, 0x4F000000, 0xCF000000,
        0x3F000000,
        0x4B800001, 0x34000000,
    )
)  # fmt: skip
DOUBLES = tuple(
    struct.pack("<Q", bits)
    for bits in (
        0, 1 << 63, 0x3FF0000000000000, 0xBFF0000000000000, 0x400921FB54442D18, 1, 0x800FFFFFFFFFFFFF,
        0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000,
        0xFFF8123456789ABC, 0x7FF0000000000001, 0xFFF4567890ABCDEF, 0x41E0000000000000, 0xC1E0000000000000,
        0x43E0000000000000, 0x3FE0000000000000, 0x47EFFFFFE0000000, 0x380FFFFFE0000000,
    )
)  # fmt: skip
# (sign and exponent, significand): zeros, ones, pi, denormal, pseudo-denormal, infinities, NaNs, invalid ones
EXTENDED = tuple(
    struct.pack("<QH", significand, head)
    for head, significand in (
        (0, 0), (0x8000, 0), (0x3FFF, 1 << 63), (0xBFFF, 1 << 63), (0x4000, 0xC90FDAA22168C235), (0, 1),
        (0x8000, 0x7FFFFFFFFFFFFFFF), (0, 1 << 63), (1, 1 << 63), (0x7FFE, 0xFFFFFFFFFFFFFFFF),
        (0x7FFF, 1 << 63),
        (0xFFFF, 1 << 63), (0x7FFF, 0xC000000000000000), (0xFFFF, 0xC123456789ABCDEF),
        (0x7FFF, 0x8000000000000001),
        (0xFFFF, 0xA000000000000000), (0x4005, 0x0000000000000001), (0x7FFF, 0), (0x403E, 1 << 63),
        (0xC03E, 1 << 63),
        (0x3FFE, 1 << 63), (0x4034, 0x8000000000000001), (0x3C00, 0xFFFFFFFFFFFFFFFF),
        (0x43FE, 0xFFFFFFFFFFFFF800),
    )
)  # fmt: skip

# x87 control and status, MXCSR [8.1.3, 8.1.5, 10.2.3]
X87_MASKS, X87_SUMMARY = 0x3F, 0x8080  # the six exception masks; ES and B
MXCSR_FLAGS, MXCSR_MASKS_SHIFT, MXCSR_WRITABLE = 0x3F, 7, 0xFFFF
POOL_PAGES = 24
POOL_REGISTERS = 2048
POOL_INTEGERS = 1 << 15


def chance(rng: Random, percent: float) -> bool:
    return rng.random() * 100 < percent


def integer(rng: Random, bits: int = 32) -> int:
    """Half of the time a boundary value."""
    kind = rng.getrandbits(2)
    if kind < 2:
        value = rng.choice(INTEGERS)
    elif kind == 2:
        value = rng.getrandbits(bits)
    else:
        value = rng.getrandbits(rng.randint(1, bits))
    return value & ((1 << bits) - 1)


@functools.cache
def integer_pool() -> tuple[int, ...]:
    """Values of `integer`, for where eight are needed at once."""
    rng = Random(POOL_INTEGERS)
    return tuple(integer(rng) for _ in range(POOL_INTEGERS))


def single(rng: Random) -> bytes:
    kind = rng.getrandbits(2)
    if kind == 0:
        return rng.randbytes(4)
    if kind == 1:
        return struct.pack("<f", rng.randint(-300, 300) / 4)
    return rng.choice(SINGLES)


def double(rng: Random) -> bytes:
    kind = rng.getrandbits(2)
    if kind == 0:
        return rng.randbytes(8)
    if kind == 1:
        return struct.pack("<d", rng.randint(-300, 300) / 4)
    return rng.choice(DOUBLES)


def extended(rng: Random) -> bytes:
    kind = rng.getrandbits(2)
    if kind == 0:  # a normal number near 1, so that results are of interest too
        return struct.pack(
            "<QH", rng.getrandbits(63) | 1 << 63, rng.randint(0x3FF0, 0x400F) | rng.getrandbits(1) << 15
        )
    if kind == 1:
        value = rng.choice((rng.getrandbits(8), rng.getrandbits(20), rng.getrandbits(63))) + 1
        shift = 64 - value.bit_length()
        return struct.pack("<QH", value << shift, 0x3FFF + 63 - shift | rng.getrandbits(1) << 15)
    if kind == 2 and rng.getrandbits(1):
        return rng.randbytes(10)
    return rng.choice(EXTENDED)


def vector(rng: Random) -> bytes:
    """Sixteen bytes: singles, doubles, or integers."""
    kind = rng.getrandbits(2)
    if kind == 0:
        return b"".join(single(rng) for _ in range(4))
    if kind == 1:
        return double(rng) + double(rng)
    if kind == 2:
        return b"".join(integer(rng).to_bytes(4, "little") for _ in range(4))
    return rng.randbytes(16)


def x87_control(rng: Random) -> int:
    if chance(rng, 60):
        return X87_DEFAULT_CONTROL
    masks = X87_MASKS if chance(rng, 60) else rng.getrandbits(6)
    precision = rng.choice((0, 2, 3))
    return masks | 0x40 | precision << 8 | rng.getrandbits(2) << 10


def x87_status(rng: Random, control: int) -> int:
    """A status word with ES and B as they follow from the flags and masks."""
    flags = rng.getrandbits(7) & rng.getrandbits(7) if chance(rng, 25) else 0
    if chance(rng, 85):
        flags &= control & X87_MASKS  # nothing is pending
    status = flags | rng.getrandbits(3) << 11 | rng.getrandbits(3) << 8 | rng.getrandbits(1) << 14
    return status | (X87_SUMMARY if flags & ~control & X87_MASKS else 0)


def mxcsr(rng: Random) -> int:
    if chance(rng, 55):
        return MXCSR_DEFAULT
    masks = 0x3F if chance(rng, 65) else rng.getrandbits(6)
    flags = rng.getrandbits(6) if chance(rng, 30) else 0
    ftz_daz = rng.getrandbits(1) << 15 | rng.getrandbits(1) << 6 if chance(rng, 25) else 0
    return masks << MXCSR_MASKS_SHIFT | flags | rng.getrandbits(2) << 13 | ftz_daz


def fpu_state(rng: Random, mmx: bool) -> bytes:
    """A FXSAVE image; with mmx the registers hold integers more often than numbers."""
    control = x87_control(rng)
    status = x87_status(rng, control)
    tags = rng.choice((0xFF, 0xFF, 0, rng.getrandbits(8), rng.getrandbits(8) | rng.getrandbits(8)))
    st = []
    for _ in range(8):
        if mmx and chance(rng, 80):
            st.append(vector(rng)[:8] + b"\xff\xff")
        else:
            st.append(extended(rng))
    return fx_image(control, status, tags, tuple(st), mxcsr(rng), tuple(vector(rng) for _ in range(8)))


class FpuPool:
    """FXSAVE images put together from registers made in advance: a twentieth of what fpu_state costs."""

    def __init__(self, seed: int) -> None:
        rng = Random(seed)
        self._st = [extended(rng) + bytes(6) for _ in range(POOL_REGISTERS)]
        self._mm = [vector(rng)[:8] + b"\xff\xff" + bytes(6) for _ in range(POOL_REGISTERS)]
        self._xmm = [vector(rng) for _ in range(POOL_REGISTERS)]

    def image(self, rng: Random, mmx: bool) -> bytes:
        control = x87_control(rng)
        tags = rng.choice((0xFF, 0xFF, 0, rng.getrandbits(8)))
        head = struct.pack("<HHB19xII", control, x87_status(rng, control), tags, mxcsr(rng), 0xFFFF)
        st = rng.choices(self._mm if mmx and rng.getrandbits(2) else self._st, k=8)
        return b"".join((head, *st, *rng.choices(self._xmm, k=8))).ljust(FX_SIZE, b"\0")


def _page(rng: Random) -> bytes:
    out = bytearray()
    while len(out) < PAGE_SIZE:
        kind = rng.getrandbits(3)
        if kind < 4:
            out += integer(rng).to_bytes(4, "little")
        elif kind == 4:
            out += double(rng)
        elif kind == 5:
            out += vector(rng)
        elif kind == 6:
            out += bytes((rng.getrandbits(8),)) * rng.randint(4, 40)
        else:
            out += rng.randbytes(8)
    return bytes(out[:PAGE_SIZE])


def page_pool(seed: int) -> tuple[bytes, ...]:
    """Pages that the cases of a seed share (and the pickles of a batch hold once)."""
    rng = Random(seed)
    return tuple(_page(rng) for _ in range(POOL_PAGES))
