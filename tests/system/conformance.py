"""System behaviour against QEMU and Unicorn: tables, and cases again.

    python -m tests.system.conformance [-n 200] [--seed 1] [--only "gates,tasks"] [--document FILE]
    python -m tests.system.conformance --case SEED:SUBJECT:INDEX

`-n` scenarios of each subject. A difference is printed with the command that repeats it, shrunk to the
actions it needs; exit status 1. `--document` writes docs/system-conformance.md's tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cpu_node import stubs_unsafe
from tests.system import compare, qemu, unicorn_first
from tests.system.backplane import SystemBoard
from tests.system.exclusions import AVOIDED, EXCLUSIONS
from tests.system.runner import Name, Tallies, differing, sharded, shrink
from tests.system.subjects import SUBJECTS, scenario

SHOWN = 10
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "system-conformance.md"
MARK = "<!-- the rest is written by `make conformance-system` -->\n"
HEAD = ("subject", "tried", "same as QEMU", "same but masked words", "with Unicorn", "different")


def rows(tallies: Tallies) -> list[tuple[str, ...]]:
    out = []
    for subject in [*(s for s in SUBJECTS if s in tallies)]:
        tally = tallies[subject]
        numbers = (tally.tried, tally.same, tally.covered, tally.unicorn, len(tally.different))
        out.append((subject, *(f"{number:,}" for number in numbers)))
    totals = [sum(int(row[column].replace(",", "")) for row in out) for column in range(1, 6)]
    return [*out, ("all", *(f"{number:,}" for number in totals))]


def markdown(tallies: Tallies, seed: int) -> str:
    """The generated part of the document."""
    text = f"\n## Results\n\nSeed {seed}.\n\n| {' | '.join(HEAD)} |\n|---|{'---:|' * (len(HEAD) - 1)}\n"
    text += "".join(f"| {' | '.join(row)} |\n" for row in rows(tallies))
    text += "\n## Masked words\n\nA word whose difference from QEMU is one of these is not counted.\n\n"
    text += "| what | SDM | why | words |\n|---|---|---|---:|\n"
    for exclusion in EXCLUSIONS:
        count = sum(tally.masked[exclusion.name] for tally in tallies.values())
        subjects = f" (in: {', '.join(exclusion.subjects)})" if exclusion.subjects else ""
        text += f"| {exclusion.name} | {exclusion.section} | {exclusion.reason}{subjects} | {count:,} |\n"
    text += "\n## Not tried against QEMU\n\n"
    text += "Scenarios keep off these: QEMU differs, or the manual leaves it open.\n\n"
    text += "| what | SDM | QEMU |\n|---|---|---|\n"
    text += "".join(f"| {what} | {section} | {qemu_does} |\n" for what, section, qemu_does in AVOIDED)
    text += "\n## Not tried against Unicorn\n\n| subject | why |\n|---|---|\n"
    return text + "".join(f"| {subject} | {why} |\n" for subject, why in unicorn_first.NOT_HERE.items())


def show(name: Name, with_qemu: bool) -> None:
    """A case in full: its actions, what differs, all events of both."""
    skip = shrink(name, with_qemu, False)
    builder = scenario(*name, skip)
    image = builder.image()
    others = {"simulated": SystemBoard(simulated=True).execute(image)}
    ours = SystemBoard().execute(image)
    if with_qemu:
        others["QEMU"] = qemu.run([image])[0]
    for number, text in enumerate(builder.texts):
        if number not in skip:
            print(f"action {number}: {text.replace(chr(10), '; ')}")
    for who, theirs in {"ours": ours, **others}.items():
        ended = theirs is not None and compare.finished(theirs)
        print(f"{who}: {'no end' if theirs is None else 'finished' if ended else 'triple fault'}")
        for event in compare.events(theirs) if theirs is not None else ():
            print(f"   {event}")
    for who, theirs in others.items():
        for line in differing(name[1] if who == "QEMU" else "", ours, theirs)[0][:SHOWN]:
            print(f"{who}: {line}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.system.conformance", description=__doc__.split("\n")[0]
    )
    parser.add_argument("-n", type=int, default=200, help="scenarios of each subject (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="these subjects (with commas)")
    parser.add_argument("--case", help="SEED:SUBJECT:INDEX: one scenario again, shrunk")
    parser.add_argument("--document", type=Path, help="write the tables into this file, behind its mark")
    options = parser.parse_args()
    for reason in (qemu.available(), unicorn_first.available()):
        if reason:
            print(f"not compared: {reason}", file=sys.stderr)
    with_qemu, with_unicorn = not qemu.available(), not unicorn_first.available()
    if options.case:
        seed, subject, index = options.case.split(":")
        stubs_unsafe.install()
        show((int(seed), subject, int(index)), with_qemu)
        return 0
    subjects = [name.strip() for name in options.only.split(",")] if options.only else [*SUBJECTS]
    names = [(options.seed, subject, index) for index in range(options.n) for subject in subjects]
    tallies = sharded(names, len(os.sched_getaffinity(0)), with_qemu, with_unicorn)
    for row in [HEAD, *rows(tallies)]:
        print(f"{row[0]:28}" + "".join(f"{cell:>24}" for cell in row[1:]))
    different = [(subject, *case) for subject, tally in tallies.items() for case in sorted(tally.different)]
    for subject, index, what in different[:SHOWN]:
        print(f"DIFFERENT {subject} {index}: {what}")
        print(f'  .venv/bin/python -m tests.system.conformance --case "{options.seed}:{subject}:{index}"')
    if options.document is not None:
        before = options.document.read_text().partition(MARK)[0]
        options.document.write_text(before + MARK + markdown(tallies, options.seed))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
