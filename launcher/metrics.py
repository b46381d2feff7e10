"""A machine's counters as Prometheus text, of what `launcher stats --json` shows too.

Format: text exposition format 0.0.4. Times are in seconds, as Prometheus has them. Counters of a process
begin anew with its successor, as Prometheus expects of a restart: rate() knows that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "backplane"
Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]  # suffix of the name, labels, value

# name of a counter -> (metric, help, labels besides machine and device)
OF_DEVICES: dict[str, tuple[str, str, Labels]] = {
    "reads": ("device_operations_total", "Register accesses that a device did.", {"kind": "read"}),
    "writes": ("device_operations_total", "", {"kind": "write"}),
    "interrupts": ("device_interrupts_total", "Rises of a device's lines, and messages that it sent.", {}),
    "bytes_in": ("device_console_bytes_total", "Bytes of a device's consoles.", {"direction": "in"}),
    "bytes_out": ("device_console_bytes_total", "", {"direction": "out"}),
    "disk_requests": ("device_disk_requests_total", "Requests to disks.", {}),
    "disk_read": ("device_disk_bytes_total", "Bytes of disks.", {"direction": "read"}),
    "disk_written": ("device_disk_bytes_total", "", {"direction": "written"}),
}
OF_ALL: dict[str, tuple[str, str, Labels]] = {
    "frames_in": ("frames_total", "Frames of the bus.", {"direction": "in"}),
    "frames_out": ("frames_total", "", {"direction": "out"}),
    "bad_frames": ("frames_bad_total", "Frames that are none of this protocol.", {}),
    "lost": ("frames_lost_total", "Frames dropped because one before them was missing; they came again.", {}),
    "duplicated": ("frames_duplicated_total", "Frames dropped because they had been taken.", {}),
}
OF_ACCESSES: dict[str, tuple[str, str, Labels]] = {
    "synchronous": ("cpu_accesses_total", "Accesses of devices by the CPU.", {"class": "synchronous"}),
    "posted": ("cpu_accesses_total", "", {"class": "posted"}),
    "mirrored": ("cpu_accesses_total", "", {"class": "mirrored"}),
    "batches": ("cpu_batches_total", "Messages with posted writes.", {}),
}
OF_CPUS: dict[str, tuple[str, str, Labels]] = {
    "instructions_translated": ("cpu_instructions_translated_total", "Guest instructions translated.", {}),
    "cache_flushes": ("cpu_cache_flushes_total", "Times that all translations were dropped.", {}),
    "pages_filled": ("cpu_pages_filled_total", "Pages mapped into windows, or entered into the TLB.", {}),
}


class _Text:
    """Metrics in the order in which they come first, the samples of each together."""

    def __init__(self) -> None:
        self._heads: dict[str, str] = {}
        self._samples: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, help: str, samples: Iterable[Sample]) -> None:
        full = f"{PREFIX}_{name}"
        if full not in self._heads:
            self._heads[full] = f"# HELP {full} {help}\n# TYPE {full} {kind}"
            self._samples[full] = []
        for suffix, labels, value in samples:
            shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            self._samples[full].append(f"{full}{suffix}{{{shown}}} {value}")

    def __str__(self) -> str:
        parts = [f"{head}\n" + "\n".join(self._samples[name]) for name, head in self._heads.items()]
        return "\n".join(parts) + "\n"


def text(machine: str, rows: Iterable[dict[str, Any]]) -> str:
    """`rows`: of the control socket's "stats"."""
    out = _Text()
    for row in rows:
        node = {"machine": machine, "node": row["node"]}
        up = {**node, "pid": str(row["pid"])}
        out.add("process_cpu_seconds_total", "counter", "CPU time of a process.", [("", up, row["cpu_s"])])
        out.add("process_restarts_total", "counter", "Processes that ended and got a successor.",
                [("", node, row["restarts"])])  # fmt: skip
        out.add("process_swaps_total", "counter", "Processes that were replaced by command.",
                [("", node, row["swaps"])])  # fmt: skip
        counters = row.get("counters") or {}
        _add(out, OF_ALL, counters, node)
        if "latency_buckets" in counters:
            help = "Of frames, from sent to taken; of a CPU, its synchronous accesses."
            out.add("latency_seconds", "histogram", help, _histogram(node, counters["latency_buckets"]))
        if "exits" in counters:
            _add_cpu(out, counters, machine, row["node"])
        elif "reads" in counters:
            _add(out, OF_DEVICES, counters, {"machine": machine, "device": row["node"]})
    return str(out)


def _add(
    out: _Text, table: Mapping[str, tuple[str, str, Labels]], counters: Mapping[str, Any], labels: Labels
) -> None:
    helps = {metric: help for metric, help, _ in table.values() if help}
    for name, (metric, _, more) in table.items():
        if name in counters:
            out.add(metric, "counter", helps[metric], [("", {**labels, **more}, counters[name])])


def _add_cpu(out: _Text, counters: Mapping[str, Any], machine: str, cpu: str) -> None:
    labels = {"machine": machine, "cpu": cpu}
    exits = [("", {**labels, "exit": name}, count) for name, count in counters["exits"].items()]
    out.add("cpu_exits_total", "counter", "Ways out of translated code.", exits)
    _add(out, OF_CPUS, counters, labels)
    for device, accesses in counters.get("devices", {}).items():
        _add(out, OF_ACCESSES, accesses, {**labels, "device": device})
    direct = counters.get("direct")
    if direct is not None:
        modes = (("direct", direct["user_direct_ms"]), ("translated", direct["user_translated_ms"]))
        out.add("cpu_user_seconds_total", "counter", "Time of guest user code, by how it was run.",
                [("", {**labels, "mode": mode}, ms / 1000) for mode, ms in modes])  # fmt: skip


def _histogram(labels: Labels, buckets: Iterable[tuple[int, int]]) -> Iterator[Sample]:
    """The sum is not known: from the buckets' upper bounds, at most 25 % too high."""
    seen, total_s = 0, 0.0
    for bound_ns, count in buckets:
        seen += count
        total_s += count * bound_ns / 1e9
        yield "_bucket", {**labels, "le": f"{bound_ns / 1e9:.9f}"}, seen
    yield "_bucket", {**labels, "le": "+Inf"}, seen
    yield "_sum", labels, total_s
    yield "_count", labels, seen


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
