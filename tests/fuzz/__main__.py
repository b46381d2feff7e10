"""`python -m tests.fuzz FILE...`: check inputs again, one after the other, and say what they do.

`--random N [--seed S]` checks random ones instead.  Status 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from cpu_node import stubs_unsafe
from tests.fuzz.case import parse
from tests.fuzz.inputs import inputs, read_corpus
from tests.fuzz.machine import Machine
from tests.fuzz.target import Broken, check


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    stubs_unsafe.install()
    machine = Machine()
    broken = count = 0
    chosen = itertools.islice(inputs(arguments.seed, read_corpus()), arguments.random)
    for data in itertools.chain((file.read_bytes() for file in arguments.files), chosen):
        count += 1
        try:
            check(data, machine)
        except Broken as exc:
            broken += 1
            print(f"{data.hex()}\n  {parse(data)}\n  {exc}")
    damage = machine.damage()
    print(f"{count} inputs, {broken} broke a promise; written outside of guest memory: {damage or 'nothing'}")
    return 1 if broken or damage else 0


if __name__ == "__main__":
    sys.exit(main())
