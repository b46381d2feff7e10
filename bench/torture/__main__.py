"""`make torture`: kill -9 and swaps of all devices at random, under a guest that checks all that it does.

    python -m bench.torture [--kills 1000] [--swaps 1000] [--seed N] [--devices uart0,disk0] [--minutes M]

In the guest: a checker of blocks and a shell that copies files, on a file system on the virtio disk; numbered
lines both ways on the UART and the virtio console. The host checks each byte of the lines, keeps a journal of
the blocks whose writes were acknowledged, and looks for them in the raw image. Ends with a table of pauses by
device; status 1 if anything was wrong. docs/live-swap.md says more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.torture import guest, report
from bench.torture.faults import Plan
from bench.torture.run import CALM_S, DEVICES, Torture

APART_S = 0.3  # between two kills, and two swaps, on average


def devices(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in DEVICES]:
        raise argparse.ArgumentTypeError(f"no device {unknown[0]!r}; these are: {', '.join(DEVICES)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.torture", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the order of faults and all contents")
    parser.add_argument("--devices", type=devices, default=list(DEVICES), help="some of " + ",".join(DEVICES))
    parser.add_argument("--minutes", type=float, help="end after so long, even if not all is done")
    parser.add_argument("--apart", type=float, default=APART_S, help="seconds between faults of a kind, mean")
    parser.add_argument("--json", type=Path, help="write all kills and swaps into this file")
    parser.add_argument("--document", type=Path, help="write the result into this Markdown file")
    options = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f}  {line}", flush=True)

    torture = Torture(guest.Load(options.seed), say)
    plans = [Plan.make(kind, count, options.devices, options.apart, options.seed)
             for kind, count in (("kill", options.kills), ("swap", options.swaps))]  # fmt: skip
    torture.run(plans, options.minutes)
    text = result(torture, options.seed)
    print(text)
    for line in torture.wrong:
        print(f"torture: {line}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in torture.faults.done]) + "\n", encoding="utf-8")
    if options.document and not torture.wrong:
        report.write(options.document, text)
    return 1 if torture.wrong else 0


def result(torture: Torture, seed: int) -> str:
    """In Markdown."""
    done = torture.faults.done
    kills = [fault for fault in done if fault.kind == "kill"]
    trips = torture.faults.round_trips_ns
    trip_ns = float(trips[-1]) if trips else 1e5
    unknown = sum(fault.pause_ns is None and fault.device not in report.UNSEEN for fault in kills)
    lines = [
        f"Seed {seed}: {len(kills)} kills and {len(done) - len(kills)} swaps in {torture.minutes:.1f}"
        f" minutes, {len(torture.wrong)} faults. {torture.faults.refused} swaps were refused because a kill"
        f" met them, and asked for again; {unknown} kills met a process that was being replaced, or stood by."
        f" Bus round trip, the CPU's median: {trip_ns / 1000:.0f} us.",
        "",
        report.table(done, trip_ns),
        "",
    ]
    for stream in torture.streams:
        heard = [f for f in done if f.ended_ns is not None and f.ended_ns / 1e9 > stream.arrivals[0]]
        silences = [1000 * stream.longest_silence(f.begun_ns / 1e9, (f.ended_ns or 0) / 1e9) for f in heard]
        shown = ", ".join(f"{name} {report.quantile(silences, q):.0f}" for name, q in
                          (("p50", 0.5), ("p99", 0.99), ("max", 1.0))) if silences else "-"  # fmt: skip
        lines.append(
            f"- {stream.console}: {stream.number} lines from the guest, {stream.taken} to it, each byte as"
            f" expected. Longest silence around a fault, in ms: {shown};"
            f" in {CALM_S:.0f} s without one: {1000 * torture.calm_silences.get(stream.console, 0):.0f}."
        )
    blocks = torture.blocks
    lines.append(
        f"- disk0: {blocks.acknowledged} runs of blocks acknowledged, {blocks.checked} blocks found in the"
        f" image at once; at the end all {len(blocks.latest)}, by the guest and in the image."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
