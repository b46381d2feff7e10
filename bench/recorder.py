"""What a record costs its writer: `python -m bench.recorder` prints a line per kind, best of some rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from bus import recorder
from bus.recorder import Recorder

ROUNDS, CALLS = 15, 20_000


class Cpu:
    cr3 = 0x1000


class Place:
    at = 0xC0001234
    cpu = Cpu()


def best_ns(call: Callable[[], object]) -> float:
    """Per call; the loop around it is in it."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter_ns() - began) / CALLS)
    return min(times)


def main() -> None:
    fd = recorder.make("bench", 16)
    noted, place, frame = Recorder(fd, "bench"), Place(), bytes(100)
    done = noted.frame(b"cpu0.io", frame, 1)
    pieces = [(0x1000 * n, 512, False) for n in range(8)]
    calls: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "an access of the guest": lambda: noted.access(1, place, 0x3F8, 65),
        "a frame of 100 bytes": lambda: noted.frame(b"cpu0.io", frame, 1),
        "that it is done": lambda: noted.done(done),
        "a vector": lambda: noted.short(recorder.VECTOR, 0x30, 0xC0001234),
        "DMA of 8 pieces": lambda: noted.dma(pieces),
    }
    for name, call in calls.items():
        print(f"{name:24} {best_ns(call):6.0f} ns")
    os.close(fd)


if __name__ == "__main__":
    main()
