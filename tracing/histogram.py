"""Durations, counted: exact count, sum and maximum; quantiles within an eighth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

STEPS = 8  # buckets of one power of two


class Histogram:
    """Of durations in ns. A duration below 0 counts as 0: clocks of one host agree, but are read at
    different moments."""

    __slots__ = ("buckets", "count", "max", "total")

    def __init__(self) -> None:
        self.count = self.total = self.max = 0
        self.buckets: dict[int, int] = {}  # number of the bucket, see limits() -> how many

    def add(self, ns: int) -> None:
        if ns < 16:
            ns = key = max(ns, 0)
        else:
            shift = ns.bit_length() - 4
            key = (shift << 3) + (ns >> shift)
        self.count += 1
        self.total += ns
        if ns > self.max:
            self.max = ns
        self.buckets[key] = self.buckets.get(key, 0) + 1

    def quantile(self, part: float) -> int:
        """What this part of the durations took at most, in ns; 0 of none."""
        rest = part * self.count
        for key in sorted(self.buckets):
            rest -= self.buckets[key]
            if rest <= 0:
                return min(limits(key)[1] - 1, self.max)
        return self.max

    def take(self, other: Histogram) -> None:
        """Those of the other as well."""
        self.count += other.count
        self.total += other.total
        self.max = max(self.max, other.max)
        for key, count in other.buckets.items():
            self.buckets[key] = self.buckets.get(key, 0) + count

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """(from ns, below ns, count) in order, without empty ones."""
        for key in sorted(self.buckets):
            yield *limits(key), self.buckets[key]

    def plain(self) -> dict[str, int]:
        """For JSON."""
        return {
            "count": self.count, "total_ns": self.total, "p50_ns": self.quantile(0.5),
            "p99_ns": self.quantile(0.99), "max_ns": self.max,
        }  # fmt: skip


def limits(key: int) -> tuple[int, int]:
    """From which ns on, and below which, a bucket counts."""
    if key < 2 * STEPS:
        return key, key + 1
    shift = key // STEPS - 1
    begin = key - shift * STEPS
    return begin << shift, begin + 1 << shift


def together(parts: Iterable[Histogram]) -> Histogram:
    whole = Histogram()
    for part in parts:
        whole.take(part)
    return whole
