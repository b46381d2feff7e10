"""The guest's first root file system: busybox, an init script, and nothing else.

Kernel modules are an archive of their own, which only machines that need them load behind the first.
`bench` adds the benchmark programs (built by bench/guest/src/Makefile) and makes the init run them.
"""

from __future__ import annotations

from pathlib import Path

from launcher.guest.cpio import Archive

INIT = Path(__file__).with_name("init")
LOAD, MODPROBE = INIT.with_name("load"), INIT.with_name("modprobe")
DIRECTORIES = ("/bin", "/dev", "/etc", "/proc", "/root", "/sys", "/tmp")


def build(busybox: bytes, init: bytes, bench: dict[str, bytes] | None = None) -> bytes:
    """The archive; `bench` maps program names to their binaries."""
    archive = Archive()
    for path in DIRECTORIES:
        archive.directory(path)
    archive.character_device("/dev/console", 5, 1)
    archive.character_device("/dev/null", 1, 3, 0o666)
    archive.file("/bin/busybox", busybox)
    archive.symlink("/bin/sh", "busybox")
    archive.file("/init", init)
    if bench is not None:
        for name, program in bench.items():
            archive.file(f"/bin/{name}", program)
        archive.file("/etc/bench", b"on\n", 0o644)
    return bytes(archive)


def build_modules(modules: dict[str, bytes]) -> bytes:
    """The archive of kernel modules, by file name, with what loads them."""
    archive = Archive()
    for path in ("/lib", "/lib/modules", "/sbin"):
        archive.directory(path)
    for name, module in sorted(modules.items()):
        archive.file(f"/lib/modules/{name}", module, 0o644)
    archive.file("/lib/modules/load", LOAD.read_bytes(), 0o644)
    archive.file("/sbin/modprobe", MODPROBE.read_bytes())
    return bytes(archive)
