"""`python -m launcher.guest`: have the guest's kernel and initramfs in build/guest.

Prints nothing when all is there, else one line per long step; where apt can't be had, one line and status 2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from launcher.errors import EXIT_INPUT, LauncherError
from launcher.guest import initramfs
from launcher.guest.apt import GuestUnavailable
from launcher.guest.fetch import MODULES, fetch, locked

REPO = Path(__file__).resolve().parents[2]
BENCH_SOURCE = REPO / "bench" / "guest" / "src"
BENCH_PROGRAMS = ("bench", "tiny")


def say(line: str) -> None:
    print(f"guest: {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.guest", description=__doc__)
    parser.add_argument("--dir", type=Path, default=REPO / "build" / "guest", help="where the files go")
    parser.add_argument("--bench", action="store_true", help="also the benchmark initramfs (needs gcc -m32)")
    options = parser.parse_args()
    try:
        make_guest(options.dir, options.bench)
    except LauncherError as e:
        print(e, file=sys.stderr)
        return e.exit_status
    except OSError as e:
        print(f"guest: {e.filename}: {e.strerror}; make it writable or name another folder", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        return 130
    return 0


def make_guest(folder: Path, bench: bool) -> None:
    """Have vmlinuz, initramfs.cpio, modules.cpio (with `bench` also initramfs-bench.cpio) in `folder`."""
    fetch(folder, say, show=sys.stderr.isatty())
    busybox = (folder / "busybox").read_bytes()
    init = initramfs.INIT.read_bytes()
    with locked(folder):
        write_if_new(folder / "initramfs.cpio", initramfs.build(busybox, init))
        modules = {name: (folder / name).read_bytes() for name in MODULES}
        write_if_new(folder / "modules.cpio", initramfs.build_modules(modules))
        if bench:
            programs = build_bench(folder)
            write_if_new(folder / "initramfs-bench.cpio", initramfs.build(busybox, init, programs))


def build_bench(folder: Path) -> dict[str, bytes]:
    """Compile the benchmark programs as static i386 binaries; they also run natively on an x86-64 host."""
    target = folder / "bench"
    target.mkdir(exist_ok=True)
    command = ["make", "-s", "-C", str(target), "-f", str(BENCH_SOURCE / "Makefile"), f"VPATH={BENCH_SOURCE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise GuestUnavailable(f"the benchmark does not compile ({reason})", "install make and gcc-multilib")
    return {name: (target / name).read_bytes() for name in BENCH_PROGRAMS}


def write_if_new(path: Path, data: bytes) -> None:
    """Write only a change, so that nothing which depends on the file's time is done again."""
    if path.exists() and path.read_bytes() == data:
        return
    say(f"writing {path.name} ({len(data) >> 10} KiB)")
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
