"""`make bench`: Backplane against QEMU's TCG and the bare host, the rows of bench/rows.py, run in turn.

    python -m bench.compare [-n 5] [--rows boot,int,...] [--scale 1] [--json FILE] [--svg FILE]

A round boots each machine and runs the same benchmark programs in it; rounds alternate who goes first. The
table has medians, and ratios formed round by round with their spread; a target counts as met only if every
round met it. Exit status 1 if a machine did not reach its end or gave another answer than the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import boot
from bench.chart import svg
from bench.load import Load
from bench.rows import BOOT, BOOT_CPU, PARTS, ROWS, Result, Row, checks_of, result_of, times_of
from bench.table import table
from launcher.config import read_config
from launcher.errors import LauncherError

STORE = boot.SCRATCH / "translations"
NATIVE = boot.GUEST / "bench"
BUSY = 0.15  # cores that others use


class Failed(Exception):
    """A machine did not do what was asked."""


@dataclass(slots=True)
class Plan:
    """What to run, and what has come of it."""

    parts: Sequence[str]
    scale: int
    machine: Path
    memory_mib: int
    limit_s: float
    native: bool
    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    answers: dict[str, dict[str, str]] = field(default_factory=dict)  # program -> series -> what it printed
    missing: dict[str, str] = field(default_factory=dict)  # series -> why it is left out

    def rows(self) -> list[Row]:
        return [row for row in ROWS if row.part in self.parts and row.series not in self.missing]

    def groups(self, series: str | None = None) -> list[str]:
        """The benchmark groups that some row (of a series) needs."""
        rows = [row for row in self.rows() if series in (None, row.series)]
        return list(dict.fromkeys(group for row in rows for group in row.groups))

    # ---- one run each

    def qemu_boot(self) -> None:
        self._boot("qemu", boot.qemu_command(self._guest()))

    def own_boots(self) -> None:
        """With an empty store of translations, then with what that start left there."""
        shutil.rmtree(STORE, ignore_errors=True)
        for series in ("first", "kept"):
            if series not in self.missing:
                keys = {} if "kept" in self.missing else {"translations": str(STORE)}
                self._boot(series, boot.backplane_command(self._guest(), self.machine, keys))

    def qemu_bench(self) -> None:
        self._bench("qemu", boot.qemu_command(self._guest(self.groups())))

    def translated(self) -> None:
        self._own_bench("translated")

    def auto(self) -> None:
        self._own_bench("auto")

    def on_host(self) -> None:
        """The same binary, on the bare host."""
        command = [str(NATIVE / "bench"), "-s", str(self.scale), *(g for g in self.groups() if g != "hw")]
        env = {**os.environ, "TINY": str(NATIVE / "tiny")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=self.limit_s)
        if done.returncode:
            raise Failed(f"native: {command[0]} ended with status {done.returncode}: {done.stderr.strip()}")
        self._keep("native", done.stdout.splitlines())

    def _guest(self, groups: Sequence[str] = ()) -> boot.Guest:
        words = f"bench=on bgroups={','.join(groups)} bscale={self.scale}" if groups else "bench=off"
        initrd = boot.GUEST / ("initramfs-bench.cpio" if groups else "initramfs.cpio")
        return boot.Guest(boot.GUEST / "vmlinuz", initrd, f"{boot.CMDLINE} {words}", self.memory_mib)

    def _own_bench(self, series: str) -> None:
        keys: dict[str, object] = {"user_mode": series} if "auto" not in self.missing else {}
        if "kept" not in self.missing:
            shutil.rmtree(STORE, ignore_errors=True)
            keys["translations"] = str(STORE)
        guest = self._guest(self.groups(series))
        self._bench(series, boot.backplane_command(guest, self.machine, keys))

    def _boot(self, series: str, command: list[str]) -> None:
        run = self._run(series, command, "ready")
        times = {BOOT: run.seconds["ready"] * 1e9, BOOT_CPU: run.cpu * 1e9}
        self.rounds[-1].setdefault(series, {}).update(times)

    def _bench(self, series: str, command: list[str]) -> None:
        self._keep(series, self._run(series, command, "bench").lines)

    def _run(self, series: str, command: list[str], wanted: str) -> boot.Run:
        run = boot.timed(series, command, self.limit_s)
        if not boot.finished(run, wanted):
            errors = (boot.SCRATCH / f"{series}.err").read_text(errors="replace")[-2000:]
            last = "\n".join(run.lines[-10:])
            raise Failed(f"{series} did not finish (status {run.status}); its last lines:\n{last}\n{errors}")
        print(f"  {series:10}  {run.seconds['total']:6.1f} s, to its shell {run.seconds['ready']:.2f} s",
              flush=True)
        return run

    def _keep(self, series: str, lines: list[str]) -> None:
        self.rounds[-1].setdefault(series, {}).update(times_of(lines))
        for program, answer in checks_of(lines).items():
            self.answers.setdefault(program, {})[series] = answer

    def steps(self) -> list[list[Callable[[], None]]]:
        """Runs to be compared stand side by side; every other round goes through them backwards."""
        own = {row.series for row in self.rows()}
        lists: list[list[Callable[[], None]]] = []
        if "boot" in self.parts:
            lists.append([self.qemu_boot, self.own_boots])
        if self.groups():
            steps = [self.qemu_bench, self.translated]
            if "auto" in own:
                steps.append(self.auto)
            if self.native and any(group != "hw" for group in self.groups()):
                steps.append(self.on_host)
            lists.append(steps)
        return lists

    def disagreements(self) -> list[str]:
        """Programs whose answers differ between machines, and complaints of programs about themselves."""
        wrong = []
        for program, by_series in self.answers.items():
            if program.startswith("MISMATCH") or len(set(by_series.values())) > 1:
                wrong.append(f"{program}: " + ", ".join(f"{s} {a}" for s, a in by_series.items()))
        return wrong


def why_not(machine: Path, keys: Mapping[str, object]) -> str | None:
    """Why a machine file with these [cpu] keys isn't accepted; None if it is."""
    guest = boot.Guest(boot.GUEST / "vmlinuz", boot.GUEST / "initramfs.cpio", boot.CMDLINE, 256)
    try:
        read_config(Path(boot.backplane_command(guest, machine, keys)[-1]))
    except LauncherError as e:
        return str(e).partition("boot.toml: ")[2] or str(e)
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=_count, default=5, help="rounds (default 5)")
    parser.add_argument("--rows", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--scale", type=_count, default=1, help="divide the programs' work (default 1)")
    parser.add_argument("--json", type=Path, default=boot.SCRATCH / "bench.json", help="for all figures")
    parser.add_argument("--svg", type=Path, default=boot.SCRATCH / "bench.svg", help="for the plot")
    parser.add_argument("--machine", type=Path, default=boot.REPO / "machines" / "linux.toml")
    parser.add_argument("--memory", type=_count, default=256, help="MiB of guest memory (default 256)")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a run has failed")
    parser.add_argument("--again", type=Path, metavar="FILE", help="show an earlier run's --json file")
    parser.add_argument("--no-native", action="store_true", help="leave the runs on the bare host out")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _parts(text: str) -> list[str]:
    parts = [part for part in text.split(",") if part]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise argparse.ArgumentTypeError(f"no rows {','.join(unknown)!r}; there are {','.join(PARTS)}")
    return parts


def main() -> int:
    options = _arguments()
    if options.again is not None:
        return _again(options)
    plan = Plan(options.rows, options.scale, options.machine, options.memory, options.limit,
                not options.no_native)
    for file in ("vmlinuz", "initramfs.cpio", "initramfs-bench.cpio"):
        if not (boot.GUEST / file).exists():
            sys.exit(f"{boot.GUEST / file} does not exist; say `make guest-bench`")
    try:
        facts = boot.host()
    except FileNotFoundError:
        sys.exit("qemu-system-i386 is not installed; install qemu-system-x86")
    for series, keys in (("kept", {"translations": str(STORE)}), ("auto", {"user_mode": "auto"})):
        reason = why_not(options.machine, keys)
        if reason is not None:
            plan.missing[series] = reason

    load, failed = Load(), ""
    print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores: {facts['cpu']}", flush=True)
    for number in range(options.n):
        print(f"round {number + 1} of {options.n}", flush=True)
        plan.rounds.append({})
        try:
            for steps in plan.steps():
                for step in steps if number % 2 == 0 else reversed(steps):
                    step()
        except (Failed, subprocess.TimeoutExpired) as e:
            failed = str(e)
            plan.rounds.pop()
            break
    results = [r for r in (result_of(row, plan.rounds) for row in plan.rows()) if r is not None]
    facts["others_cores"] = round(load.others_cores(), 2)
    _show(plan, results, facts)
    _write(options, plan, results, facts)
    if failed:
        print(failed, file=sys.stderr)
    wrong = plan.disagreements()
    for line in wrong:
        print(f"answers differ: {line}", file=sys.stderr)
    return 1 if failed or wrong else 0


def _again(options: argparse.Namespace) -> int:
    """Table and plot of figures that are there already."""
    try:
        whole = json.loads(options.again.read_text())
        plan = Plan(options.rows, whole["scale"], options.machine, whole["memory_mib"], 0, native=True,
                    rounds=whole["rounds_ns"], answers=whole["answers"], missing=whole["left_out"])
        results = [r for r in (result_of(row, plan.rounds) for row in plan.rows()) if r is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        print(f"{options.again}: no figures of make bench: {e}", file=sys.stderr)
        return 2
    _show(plan, results, whole["host"])
    _draw(options.svg, plan, results, whole["host"])
    return 0


def _show(plan: Plan, results: list[Result], facts: dict[str, Any]) -> None:
    print()
    print(table(results))
    for series, reason in plan.missing.items():
        if any(row.series == series and row.part in plan.parts for row in ROWS):
            print(f"rows of {series!r} are left out: {reason}")
    agreed = len(plan.answers) - len(plan.disagreements())
    print(f"{len(plan.rounds)} rounds, work divided by {plan.scale}; {agreed} of {len(plan.answers)} answers "
          "of the programs equal everywhere; "
          f"other work took {facts['others_cores']} of {os.cpu_count()} cores")
    if facts["others_cores"] > BUSY:
        print("WARNING: the host was busy with other work: trust ratios alone, within their spread")


def _write(options: argparse.Namespace, plan: Plan, results: list[Result], facts: dict[str, Any]) -> None:
    rows = []
    for result in results:
        verdict = result.verdict
        rows.append({**asdict(result), "verdict": verdict.value if verdict else None})
    whole = {
        "host": facts,
        "guest": json.loads((boot.GUEST / "manifest.json").read_text()),
        "memory_mib": plan.memory_mib,
        "scale": plan.scale,
        "left_out": plan.missing,
        "rows": rows,
        "rounds_ns": plan.rounds,
        "answers": plan.answers,
    }
    _put(options.json, json.dumps(whole, indent=1) + "\n")
    _draw(options.svg, plan, results, facts)


def _draw(file: Path, plan: Plan, results: list[Result], facts: dict[str, Any]) -> None:
    qemu = str(facts["qemu"]).partition("(")[0].strip()
    caption = (f"{len(plan.rounds)} rounds, work divided by {plan.scale}; {facts['cpu']}, {qemu}; "
               f"other work on {facts['others_cores']} of {facts['cores']} cores")
    _put(file, svg(results, caption))


def _put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
