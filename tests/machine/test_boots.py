"""Boots in a row, with little and much memory, with APICs and without; the benchmark programs' results."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.machine.drive import Screen
from tests.machine.files import GUEST, linux_machine

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("guest_files")]

MACHINES = ("linux.toml", "linux-pic.toml")
SIZES_MIB = (64, 256, 1024)
IN_A_ROW = int(os.environ.get("BOOTS", "6"))  # `make boots` says 20
WORDS = "cryptomgr.notests bench=off"  # up, GUEST-READY, power-off
BELOW_1M_KIB = 4 + 4 + 384  # page 0, the page with the EBDA, 640 KiB to 1 MiB
BENCH_SCALE = 20  # divides the work; the result of mem.readloop depends on it
CHECKS = 18
GROUPS = ["int", "x87", "sse2", "mem", "sys", "proc", "vm", "call", "jit", "hw"]


@pytest.mark.parametrize("number", range(IN_A_ROW))
def test_boots_in_a_row(number: int, tmp_path: Path, runtime: Path) -> None:
    """Both kinds of machine and all sizes take turns."""
    base, mib = MACHINES[number % 2], SIZES_MIB[number // 2 % 3]
    machine = linux_machine(tmp_path, base, "row", WORDS, f"{mib}M")
    with Screen("up", machine, runtime=runtime) as screen:
        screen.wait_for("GUEST-READY")
        ready_s = time.monotonic() - screen.started
        screen.finish(0)
        text = screen.text()
        print(f"boot {number}: {base} {mib} MiB, GUEST-READY after {ready_s:.2f} s")
    found = re.search(r"Memory: \d+K/(\d+)K available", text)
    assert found is not None, text
    assert int(found[1]) == mib * 1024 - BELOW_1M_KIB
    assert "row: powered off after" in text
    assert not list(runtime.glob("*"))


@pytest.mark.parametrize("base", MACHINES)
def test_benchmark_programs_compute_what_they_do_natively(base: str, tmp_path: Path, runtime: Path) -> None:
    program = GUEST / "bench" / "bench"
    if not program.exists():
        pytest.skip("no benchmark programs: `make guest-bench` needs gcc -m32")
    native = subprocess.run([program, "-s", str(BENCH_SCALE)], capture_output=True, text=True, check=True)
    words = f"quiet bench=on bscale={BENCH_SCALE}"
    machine = linux_machine(tmp_path, base, "bench", words, initrd="initramfs-bench.cpio")
    with Screen("up", machine, runtime=runtime) as screen:
        screen.finish(0)
        text = screen.text()
    assert "BENCH-DONE" in text
    assert len(checks(native.stdout)) == CHECKS
    assert checks(text) == checks(native.stdout)
    assert re.findall(r"^GROUP (\S+) ", text, re.MULTILINE) == GROUPS


def checks(output: str) -> dict[str, str]:
    return dict(re.findall(r"^CHECK (\S+) (\S+)$", output, re.MULTILINE))
