"""What a device that writes memory and a CPU that translates tell each other."""

from __future__ import annotations

import random

from bus.codemap import HOLDS, PAGE, WRITTEN, CodeMap, size_of


def test_sizes() -> None:
    assert size_of(16 << 20) == 4096 + 4096
    assert size_of((16 << 20) + 4096) == 8192 + 4096
    assert size_of(3 << 30) == (3 << 18) + 4096


def test_only_pages_that_hold_code_are_marked() -> None:
    region = memoryview(bytearray(size_of(16 << 20)))
    cpu, device = CodeMap(region), CodeMap(region)
    device.written(0, 16 << 20)
    assert (cpu.news(), cpu.marked()) == (False, [])
    for page in (3, 4, 9):
        cpu.pages[page] = HOLDS
    device.written(5 * PAGE, 4 * PAGE)
    assert (cpu.news(), cpu.marked()) == (False, [])
    device.written(4 * PAGE + 4095, 2)
    assert (cpu.news(), cpu.news(), cpu.marked()) == (True, False, [4])
    cpu.pages[4] = HOLDS
    device.written(3 * PAGE - 1, 1)
    assert (cpu.news(), cpu.marked()) == (False, [])
    device.written(3 * PAGE - 1, 7 * PAGE)
    assert (cpu.news(), cpu.marked()) == (True, [3, 4, 9])
    assert cpu.pages[9] == HOLDS | WRITTEN


def test_against_a_plain_set() -> None:
    rng = random.Random(3)
    region = memoryview(bytearray(size_of(1 << 20)))
    cpu, device = CodeMap(region), CodeMap(region)
    for _ in range(300):
        held = {rng.randrange(256) for _ in range(rng.randrange(40))}
        for page in range(256):
            cpu.pages[page] = page in held
        pa = rng.randrange(1 << 20)
        size = rng.randrange(1, min(5 * PAGE, (1 << 20) - pa) + 1)
        device.written(pa, size)
        touched = {byte // PAGE for byte in (*range(pa, pa + size, PAGE), pa + size - 1)}
        assert cpu.marked() == sorted(held & touched)
        assert cpu.news() == bool(held & touched)
