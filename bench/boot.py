"""Boot time of Backplane against QEMU's TCG: the same kernel, initramfs and command line, run by run in turn.

    python -m bench.boot [-n 5] [--json FILE] [--machine machines/linux.toml] [--words "quiet"] [--bench]

Prints a line per run, then medians, and the ratio Backplane / QEMU pair by pair: its median and its spread.
A host's speed changes with what else runs on it, so the ratio of neighbouring runs is the figure to trust.
Exit status 1 if a boot did not reach its end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

REPO = Path(__file__).resolve().parents[1]
GUEST = REPO / "build" / "guest"
SCRATCH = REPO / "build" / "bench"
CMDLINE = "console=ttyS0 panic=-1 nokaslr mitigations=off no_timer_check"
MARKS = {"kernel": b"Linux version", "ready": b"GUEST-READY", "bench": b"BENCH-DONE", "end": b"GUEST-END"}


@dataclass(slots=True)
class Run:
    """One boot: seconds from process start to each mark, to the end, and CPU seconds of all processes."""

    engine: str
    seconds: dict[str, float] = field(default_factory=dict)
    cpu: float = 0.0
    status: int = 0
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Guest:
    kernel: Path
    initrd: Path
    cmdline: str
    memory_mib: int


def timed(engine: str, command: list[str], limit_s: float) -> Run:
    """Run a machine that powers itself off, stamping its console lines."""
    run = Run(engine)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with open(SCRATCH / f"{engine}.err", "wb") as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        limit = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                now = time.monotonic() - start
                run.lines.append(line.decode("ascii", errors="replace").rstrip())
                for mark, text in MARKS.items():
                    if text in line:
                        run.seconds.setdefault(mark, round(now, 3))
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            limit.cancel()
        _pid, status, usage = os.wait4(process.pid, 0)
    run.seconds["total"] = round(time.monotonic() - start, 3)
    run.status = process.returncode = os.waitstatus_to_exitcode(status)
    run.cpu = round(usage.ru_utime + usage.ru_stime, 2)
    return run


def qemu_command(guest: Guest) -> list[str]:
    command = ["qemu-system-i386", "-M", "pc", "-accel", "tcg,thread=single", "-m", str(guest.memory_mib)]
    command += ["-smp", "1", "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]
    command += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", guest.cmdline]
    return command


def backplane_command(guest: Guest, machine: Path, cpu: Mapping[str, object] | None = None) -> list[str]:
    """The machine file with this guest's files, memory and command line in place of its own.

    `cpu` are keys of its [cpu] table, in place of its own too.
    """
    text = machine.read_text()
    values = {
        "kernel": guest.kernel,
        "initrd": guest.initrd,
        "cmdline": guest.cmdline,
        "memory": f"{guest.memory_mib}M",
        "name": "bench-boot",
    }
    for key, value in values.items():
        text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', text, count=1, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f'{machine}: has no line {key} = "..." to replace')
    for key, value in (cpu or {}).items():
        text = re.sub(rf"^{key} = .*\n", "", text, flags=re.MULTILINE)
        text = text.replace("[cpu]\n", f"[cpu]\n{key} = {json.dumps(value)}\n", 1)
    file = SCRATCH / "boot.toml"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return [str(REPO / ".venv" / "bin" / "launcher"), "up", str(file)]


def finished(run: Run, wanted: str) -> bool:
    return run.status == 0 and wanted in run.seconds and "end" in run.seconds


def summary(pairs: list[dict[str, Run]], marks: list[str]) -> dict[str, dict[str, float]]:
    """Per mark: both medians, and of the ratios of each pair the median, the least and the greatest."""
    rows = {}
    for mark in marks:
        ours = [pair["backplane"].seconds[mark] for pair in pairs]
        theirs = [pair["qemu"].seconds[mark] for pair in pairs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        values = (median(ours), median(theirs), median(ratios), min(ratios), max(ratios))
        names = ("backplane_s", "qemu_s", "ratio", "ratio_min", "ratio_max")
        rows[mark] = {name: round(value, 3) for name, value in zip(names, values, strict=True)}
    return rows


def record(run: Run) -> dict[str, object]:
    """A run for the JSON file, with the benchmark's own lines."""
    whole = asdict(run)
    whole["lines"] = [line for line in run.lines if line.startswith(("CHECK ", "BENCH "))]
    return whole


def host() -> dict[str, object]:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    version = subprocess.run(["qemu-system-i386", "--version"], capture_output=True, text=True, check=True)
    return {
        "cpu": model[1] if model else "unknown",
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": version.stdout.splitlines()[0],
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.boot", description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, default=5, help="pairs of runs (default 5)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--machine", type=Path, default=REPO / "machines" / "linux.toml")
    parser.add_argument("--memory", type=int, default=256, help="MiB of guest memory (default 256)")
    parser.add_argument("--words", default="", help="more words for the kernel's command line")
    parser.add_argument(
        "--bench", action="store_true", help="boot the benchmark initramfs and run it to its end"
    )
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run has failed")
    options = parser.parse_args()

    initrd = GUEST / ("initramfs-bench.cpio" if options.bench else "initramfs.cpio")
    for file in (GUEST / "vmlinuz", initrd):
        if not file.exists():
            sys.exit(f"{file} does not exist; say `make {'guest-bench' if options.bench else 'guest'}`")
    words = f"bench={'on' if options.bench else 'off'} {options.words}".strip()
    guest = Guest(GUEST / "vmlinuz", initrd, f"{CMDLINE} {words}", options.memory)
    commands = {"backplane": backplane_command(guest, options.machine), "qemu": qemu_command(guest)}
    try:
        facts = host()
    except FileNotFoundError:
        sys.exit("qemu-system-i386 is not installed; install qemu-system-x86")

    wanted = "bench" if options.bench else "ready"
    marks = ["ready", *(["bench"] if options.bench else []), "total"]
    pairs: list[dict[str, Run]] = []
    for number in range(options.n):
        order = ("qemu", "backplane") if number % 2 == 0 else ("backplane", "qemu")
        pair = {}
        for engine in order:
            run = timed(engine, commands[engine], options.limit)
            pair[engine] = run
            times = "  ".join(f"{mark} {run.seconds.get(mark, float('nan')):.2f}" for mark in marks)
            print(f"{number + 1:2} {engine:9}  {times}  cpu {run.cpu:.2f}", flush=True)
            if not finished(run, wanted):
                print(f"{engine} did not finish (status {run.status}); its last lines:", file=sys.stderr)
                print("\n".join(run.lines[-10:]), file=sys.stderr)
                print((SCRATCH / f"{engine}.err").read_text(errors="replace")[-2000:], file=sys.stderr)
                return 1
        pairs.append(pair)

    rows = summary(pairs, marks)
    for mark, row in rows.items():
        print(
            f"{mark:6} backplane {row['backplane_s']:.2f} s, qemu {row['qemu_s']:.2f} s, "
            f"ratio {row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
        )
    if options.json:
        runs = [{engine: record(run) for engine, run in pair.items()} for pair in pairs]
        manifest = json.loads((GUEST / "manifest.json").read_text())
        whole = {"host": facts, "guest": manifest, "cmdline": guest.cmdline, "summary": rows, "runs": runs}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
