"""`python -m tests.launcher.drive ENTRY ARGUMENTS...`: the launcher, with a CPU node out of fake_cpu.py."""

from __future__ import annotations

import sys

from launcher.entries import EntryPoints
from launcher.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], entries=EntryPoints(cpu=f"tests.launcher.fake_cpu.{sys.argv[1]}")))
