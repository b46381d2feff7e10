"""Linux with user code that runs directly, or by one MMU or the other all the time: boots, right results, and
hosts that forbid what direct execution needs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine.drive import LAUNCHER, PATIENCE_S, ROOT, Screen, environment
from tests.machine.files import GUEST, linux_machine
from tests.machine.test_boots import BENCH_SCALE, checks

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("guest_files")]

WORDS = "quiet cryptomgr.notests bench=off"
COMPUTE = "int,x87,sse2,call,sys"
ALL = "int,x87,sse2,mem,sys,proc,vm,call,jit,hw"


def machine_with(folder: Path, words: str, keys: str, initrd: str = "initramfs.cpio") -> Path:
    """machines/linux.toml with more in [cpu]."""
    file = linux_machine(folder, "linux.toml", "direct", words, initrd=initrd)
    text, count = re.subn(r"^\[cpu\]$", f"[cpu]\n{keys}", file.read_text(), flags=re.MULTILINE)
    assert count == 1
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("keys", "groups"),
    [
        ('user_mode = "direct"\ntrap_backend = "ptrace"', COMPUTE),
        ('user_mode = "direct"\ntrap_backend = "seccomp"', COMPUTE),
        ('user_mode = "auto"', ALL),
        ('mmu = "tlb"', ALL),
        ('mmu = "windows"', ALL),
    ],
)
def test_benchmark_programs_compute_what_they_do_natively(
    keys: str, groups: str, tmp_path: Path, runtime: Path
) -> None:
    program = GUEST / "bench" / "bench"
    if not program.exists():
        pytest.skip("no benchmark programs: `make guest-bench` needs gcc -m32")
    command = [program, "-s", str(BENCH_SCALE), *groups.split(",")]
    native = subprocess.run(command, capture_output=True, text=True, check=True)
    words = f"quiet cryptomgr.notests bench=on bscale={BENCH_SCALE} bgroups={groups}"
    machine = machine_with(tmp_path, words, keys, "initramfs-bench.cpio")
    with Screen("up", machine, runtime=runtime) as screen:
        screen.finish(0)
        text = screen.text()
    assert "BENCH-DONE" in text
    assert checks(native.stdout)
    assert checks(text) == checks(native.stdout)


@pytest.mark.parametrize("forbidden", ["ptrace", "seccomp", "ptrace,seccomp"])
def test_boots_where_the_host_forbids(forbidden: str, tmp_path: Path, runtime: Path) -> None:
    machine = machine_with(tmp_path, WORDS, 'user_mode = "direct"')
    forbid = [sys.executable, "-m", "tests.cpu_node.direct.forbid_unsafe", forbidden]
    done = subprocess.run(
        [*forbid, LAUNCHER, "up", machine, "--timeout", str(int(PATIENCE_S))],
        cwd=ROOT, env=environment(runtime), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE_S + 30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "GUEST-READY" in done.stdout
