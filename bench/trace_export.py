"""How long a trace takes to be read, joined and exported, in which memory: `python -m bench.trace_export`.

Makes a trace of a million records (--records) from a seed; each export is a process of its own. The limits
(docs/tracing-exports.md) are 20 s of a CPU and 500 MB, of the process with all that it has imported; the time
by the clock is shown, too: on a busy host it is longer.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.trace_made import make
from tracing import pcapng, perfetto
from tracing.chains import chains, steps
from tracing.explain import explain
from tracing.file import Trace
from tracing.lines import Lines
from tracing.report import report

LIMIT_S, LIMIT_MB = 20, 500


def _read(trace: Trace, out: Path) -> int:
    return sum(1 for _ in trace.records())


def _join(trace: Trace, out: Path) -> int:
    return sum(1 for _ in steps(trace))


def _chains(trace: Trace, out: Path) -> int:
    return sum(chain.complete for chain in chains(steps(trace)))


def _perfetto(trace: Trace, out: Path) -> int:
    with out.open("wb") as file:
        perfetto.export(steps(trace), trace.meta, file)
    return out.stat().st_size


def _pcapng(trace: Trace, out: Path) -> int:
    with out.open("wb") as file:
        pcapng.export(trace, file)
    return out.stat().st_size


def _text(trace: Trace, out: Path) -> int:
    lines = Lines(trace.meta)
    with out.open("w", encoding="utf-8") as file:
        for step in steps(trace):
            file.write(f"{lines.line(step)}\n")
    return out.stat().st_size


def _explain(trace: Trace, out: Path) -> int:
    return out.write_text(report(explain(trace), top=10), encoding="utf-8")


WORK: dict[str, tuple[Callable[[Trace, Path], int], str]] = {  # what to do, what it returns
    "read": (_read, "records"),
    "join": (_join, "steps"),
    "chains": (_chains, "complete chains"),
    "perfetto": (_perfetto, "bytes"),
    "pcapng": (_pcapng, "bytes"),
    "text": (_text, "bytes"),
    "explain": (_explain, "bytes of HTML"),
}


def one(name: str, file: Path, out: Path) -> None:
    """In a process of its own: a line with its figures."""
    began, used = time.perf_counter(), time.process_time()
    with Trace(file) as trace:
        result = WORK[name][0](trace, out)
        assert not trace.complaints, trace.complaints
        assert not trace.lost, trace.lost
    took, used = time.perf_counter() - began, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"{name:9} {took:6.1f} s {used:6.1f} s {peak:6.0f} MB   {result} {WORK[name][1]}")
    sys.exit(0 if used < LIMIT_S and peak < LIMIT_MB else 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.trace_export")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("EXPORT", "FILE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], Path(options.one[1]), Path(options.one[2]))
    failed = []
    with tempfile.TemporaryDirectory(prefix="backplane-bench-") as place:
        file, out = Path(place, "made.bptrace"), Path(place, "out")
        count = make(file, options.records, options.seed)
        print(f"{count} records, {file.stat().st_size} bytes")
        print(f"{'export':9} {'time':>8} {'of a CPU':>8} {'peak':>9}   makes", flush=True)
        for name in WORK:
            command = [sys.executable, "-m", "bench.trace_export", "--one", name, str(file), str(out)]
            if subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}).returncode:
                failed.append(name)
    if failed:
        sys.exit(f"bench.trace_export: beyond {LIMIT_S} s of a CPU or {LIMIT_MB} MB: {', '.join(failed)}")


if __name__ == "__main__":
    main()
