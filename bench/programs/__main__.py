"""Programs of Debian's i386 archive in the guest, compared with themselves run natively and under QEMU.

    python -m bench.programs [--only perl,gcc] [--without native,qemu] [--keep]

Prints a table: the program, what it did, whether its output was the same as natively and as under QEMU, and
the seconds each took. Exit status 1 if a program failed under Backplane or printed something else. Consoles
are kept in build/programs. Seconds are information: they contain no boot, but all that else runs here.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys

from bench.boot import GUEST, REPO
from bench.programs import packages, runs
from bench.programs.catalogue import Program, chosen
from launcher.errors import LauncherError

FOLDER = REPO / "build" / "programs"
ENGINES = ("backplane", "native", "qemu")


def say(line: str) -> None:
    print(f"programs: {line}", file=sys.stderr, flush=True)


def run(program: Program, engines: tuple[str, ...], limit_s: float, keep: bool) -> dict[str, runs.Outcome]:
    """The outcome by engine; an engine that this host hasn't is not there."""
    tree = packages.unpack(packages.fetch(FOLDER, program.name, program.packages, say))
    runs.furnish(tree, program.script)
    outcomes: dict[str, runs.Outcome] = {}
    if "native" in engines:
        root = FOLDER / f"{program.name}.root"
        shutil.rmtree(root, ignore_errors=True)
        outcome = runs.native(tree, root, limit_s)
        if outcome is not None:
            outcomes["native"] = outcome
    initrd = FOLDER / f"{program.name}.cpio"
    initrd.write_bytes(packages.to_cpio(tree))
    try:
        if "qemu" in engines and shutil.which("qemu-system-i386"):
            outcomes["qemu"] = runs.qemu(initrd, program.memory_mib, limit_s)
        if "backplane" in engines:
            outcomes["backplane"] = runs.backplane(initrd, program.memory_mib, limit_s)
    finally:
        if not keep:
            initrd.unlink()
    return outcomes


def verdict(outcomes: dict[str, runs.Outcome], other: str) -> str:
    """How Backplane's output relates to another's."""
    if other not in outcomes:
        return "-"
    if outcomes[other].problem:
        return "failed there"
    return "same" if outcomes["backplane"].output == outcomes[other].output else "DIFFERS"


def good(outcomes: dict[str, runs.Outcome]) -> bool:
    """Backplane ran it with status 0, and as at least one other did; none differs."""
    ours = outcomes["backplane"]
    verdicts = [verdict(outcomes, other) for other in ("native", "qemu")]
    ended_well = not ours.problem and ours.output[-1:] == ["status 0"]
    return ended_well and "same" in verdicts and "DIFFERS" not in verdicts


def explain(outcomes: dict[str, runs.Outcome]) -> None:
    """What is not as it should be, on standard error."""
    ours = outcomes["backplane"]
    for name, outcome in outcomes.items():
        if outcome.problem:
            print(f"{name}: {outcome.problem}", file=sys.stderr)
    for other in ("native", "qemu"):
        if verdict(outcomes, other) == "DIFFERS":
            diff = difflib.unified_diff(outcomes[other].output, ours.output, other, "backplane", lineterm="")
            print("\n".join([*diff][:40]), file=sys.stderr)
    if ours.output[-1:] != ["status 0"]:
        print("\n".join(["backplane, its last lines:", *ours.output[-10:]]), file=sys.stderr)


def row(program: Program, outcomes: dict[str, runs.Outcome]) -> str:
    times = [f"{outcomes[e].seconds:8.1f}" if e in outcomes else f"{'-':>8}" for e in ENGINES]
    verdicts = [f"{verdict(outcomes, other):12}" for other in ("native", "qemu")]
    return f"{program.name:10} {''.join(verdicts)} {''.join(times)}  {program.what}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="these programs (names with commas)")
    parser.add_argument("--without", default="", help="leave out native, qemu or both (with a comma)")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a run has failed")
    parser.add_argument("--keep", action="store_true", help="keep the initramfs (build/programs/NAME.cpio)")
    options = parser.parse_args()
    try:
        programs = chosen(options.only)
    except ValueError as e:
        sys.exit(str(e))
    for file in (GUEST / "vmlinuz", GUEST / "busybox"):
        if not file.exists():
            sys.exit(f"{file} does not exist; say `make guest`")
    FOLDER.mkdir(parents=True, exist_ok=True)
    engines = tuple(engine for engine in ENGINES if engine not in options.without.split(","))
    head = f"{'program':10} {'to native':12}{'to QEMU':12} {'ours s':>8}{'native s':>8}{'QEMU s':>8}"
    print(f"{head}  what it did")
    failed = []
    for program in programs:
        try:
            outcomes = run(program, engines, options.limit, options.keep)
        except LauncherError as e:
            print(e, file=sys.stderr)
            failed.append(program.name)
            continue
        print(row(program, outcomes), flush=True)
        if not good(outcomes):
            failed.append(program.name)
            explain(outcomes)
    print(f"{len(programs) - len(failed)} of {len(programs)} programs ran as they do elsewhere", end="")
    print(f"; not: {', '.join(failed)}" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
