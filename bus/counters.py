"""Counters of an endpoint: frames in and out, what went wrong on the way, latencies."""

from __future__ import annotations

from typing import Any

import msgspec

SUB_BITS = 2  # four buckets per power of two: a quantile is at most 25 % too high
BUCKETS = 64 << SUB_BITS


class Histogram:
    """Times in nanoseconds, in buckets of a quarter of a power of two."""

    __slots__ = ("_buckets", "count", "highest_ns")

    def __init__(self) -> None:
        self._buckets = [0] * BUCKETS
        self.count = 0
        self.highest_ns = 0

    def add(self, ns: int) -> None:
        if ns < 0:  # clocks of two hosts
            ns = 0
        self.count += 1
        if ns > self.highest_ns:
            self.highest_ns = ns
        shift = ns.bit_length() - 1 - SUB_BITS
        self._buckets[(shift << SUB_BITS) + (ns >> shift) if shift > 0 else ns] += 1

    def quantile_ns(self, q: float) -> int:
        """An upper bound of the q-quantile; 0 when nothing was counted."""
        wanted, seen = q * self.count, 0
        for bucket, n in enumerate(self._buckets):
            seen += n
            if n and seen >= wanted:
                return min(_upper_bound_ns(bucket), self.highest_ns)
        return 0


    def buckets(self) -> list[tuple[int, int]]:
        """(upper bound in ns, how many are between the bound before and this one), where there are any."""
        return [(_upper_bound_ns(bucket), n) for bucket, n in enumerate(self._buckets) if n]


def _upper_bound_ns(bucket: int) -> int:
    shift = (bucket >> SUB_BITS) - 1
    if shift <= 0:
        return bucket
    return ((bucket - (shift << SUB_BITS) + 1) << shift) - 1


class Counters(msgspec.Struct):
    """`latency` is the way of a frame (received minus sent) for a node that is asked, and the round trip
    for one that asks."""

    frames_in: int = 0
    frames_out: int = 0
    bad_frames: int = 0  # unknown version or kind, wrong shape
    lost: int = 0  # frames dropped because one before them was missing; they come again
    duplicated: int = 0  # frames dropped because their number had been seen
    unroutable: int = 0  # replies whose asker is gone
    latency: Histogram = msgspec.field(default_factory=Histogram)

    def to_plain(self) -> dict[str, Any]:
        return {
            "frames_in": self.frames_in,
            "frames_out": self.frames_out,
            "bad_frames": self.bad_frames,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "unroutable": self.unroutable,
            "latency_p50_ns": self.latency.quantile_ns(0.50),
            "latency_p99_ns": self.latency.quantile_ns(0.99),
            "latency_max_ns": self.latency.highest_ns,
            "latency_buckets": self.latency.buckets(),
        }
