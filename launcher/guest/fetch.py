"""Debian's own i386 kernel and busybox, fetched through apt and kept with a manifest.

In the folder (build/guest): `vmlinuz`, `busybox`, the modules that virtio disks and consoles and ext4 need,
`manifest.json` (package, version, size, SHA-256 of each) and, while fetching, apt's private state under
`apt/`. A second call finds files that equal the manifest and touches no network.
Left out: all other kernel modules (drivers of the other devices are built into this kernel).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.guest.apt import HELLO_RUNS, GuestUnavailable, PrivateApt, debian_sources

KERNEL_PACKAGE = re.compile(r"linux-image-([0-9.]+)-([0-9]+)-686")  # neither -pae, -rt nor -dbg
KERNEL_MEMBER = re.compile(r"\./boot/vmlinuz-.+")
BUSYBOX_PACKAGE = "busybox-static"
BUSYBOX_MEMBER = re.compile(r"\./(usr/)?bin/busybox")
MODULE_MEMBER = re.compile(r"\./(usr/)?lib/modules/.+/([^/]+\.ko)")
MODULES = tuple(
    f"{name}.ko"
    for name in ("virtio", "virtio_ring", "virtio_mmio", "virtio_blk", "virtio_console",
                 "crc16", "crc32c_generic", "mbcache", "jbd2", "ext4")
)  # fmt: skip
NAMES = {"vmlinuz", "busybox", *MODULES}
MANIFEST = "manifest.json"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GuestFile:
    """One line of the manifest."""

    name: str
    package: str
    version: str
    size: int
    sha256: str


def newest(packages: list[str]) -> str | None:
    """The kernel package with the highest version and ABI number."""

    def key(package: str) -> tuple[list[int], int]:
        found = KERNEL_PACKAGE.fullmatch(package)
        assert found is not None
        return [int(part) for part in found[1].split(".") if part], int(found[2])

    kernels = [package for package in packages if KERNEL_PACKAGE.fullmatch(package)]
    return max(kernels, key=key, default=None)


def cached(folder: Path) -> list[GuestFile] | None:
    """The manifest's files, if all are there with the size and hash they had when fetched."""
    try:
        lines = json.loads((folder / MANIFEST).read_text())
        files = [GuestFile(**line) for line in lines]
    except (OSError, ValueError, TypeError):
        return None
    for file in files:
        path = folder / file.name
        if not path.is_file() or describe(path, file.package, file.version) != file:
            return None
    return files if {file.name for file in files} == NAMES else None


def describe(path: Path, package: str, version: str) -> GuestFile:
    data = path.read_bytes()
    return GuestFile(path.name, package, version, len(data), hashlib.sha256(data).hexdigest())


def fetch(folder: Path, say: Say, show: bool = False, sources: Path | None = None) -> list[GuestFile]:
    """Have the guest's files in `folder`; GuestUnavailable where apt can't get them.

    `say` gets one line per long step, `show` lets apt draw its own progress, `sources` stands in for the
    system's apt sources.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        files = cached(folder)
        if files is not None:
            return files
        apt, kernel = _choose(folder, say, sources)
        (folder / MANIFEST).unlink(missing_ok=True)
        scratch = folder / "apt" / "debs"
        files = []
        for package, wanted in ((kernel, kernel_file), (BUSYBOX_PACKAGE, busybox_file)):
            say(f"downloading {package} (i386)")
            deb = apt.download(package, scratch, show)
            names = unpack(deb, wanted, folder)
            files += [describe(folder / name, package, _version(deb)) for name in names]
        missing = sorted(NAMES - {file.name for file in files})
        if missing:
            raise GuestUnavailable(f"{kernel} has no {missing[0]}", "fetch again with another release")
        _replace(folder / MANIFEST, json.dumps([asdict(file) for file in files], indent=1).encode() + b"\n")
        shutil.rmtree(folder / "apt")  # 70 MB of lists and packages
        return files


def _choose(folder: Path, say: Say, sources: Path | None) -> tuple[PrivateApt, str]:
    """An apt that offers a kernel: the system's sources, else Debian's release which has one."""
    say("reading the package lists (i386)")
    apt = PrivateApt(folder / "apt" / "system", "i386", sources)
    complaint = apt.update()
    kernel = newest(apt.package_names(KERNEL_PACKAGE))
    if kernel is None:
        say("the system's sources have no i386 kernel: reading those of an older Debian")
        list_file = folder / "apt" / "debian.list"
        debian_sources(list_file, folder / "apt" / "debs")
        apt = PrivateApt(folder / "apt" / "debian", "i386", list_file)
        complaint = apt.update() or complaint
        kernel = newest(apt.package_names(KERNEL_PACKAGE))
    if kernel is None:
        remedy = f"see that `apt-get update` works here; {HELLO_RUNS}"
        raise GuestUnavailable(f"apt offers no linux-image-*-686 ({complaint or 'no complaint'})", remedy)
    if complaint:
        say(f"using the lists apt has ({complaint})")
    return apt, kernel


def kernel_file(member: str) -> str | None:
    """What a file of the kernel's package is called here; None: it isn't wanted."""
    if KERNEL_MEMBER.fullmatch(member):
        return "vmlinuz"
    found = MODULE_MEMBER.fullmatch(member)
    return found[2] if found and found[2] in MODULES else None


def busybox_file(member: str) -> str | None:
    return "busybox" if BUSYBOX_MEMBER.fullmatch(member) else None


def unpack(deb: Path, wanted: Callable[[str], str | None], folder: Path) -> list[str]:
    """Write those of the package's regular files that `wanted` gives a name; the names, sorted."""
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    names = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for entry in archive:
                name = wanted(entry.name) if entry.isfile() else None
                if name is not None:
                    content = archive.extractfile(entry)
                    assert content is not None
                    _replace(folder / name, content.read())
                    names.append(name)
    return sorted(names)


def _version(deb: Path) -> str:
    done = subprocess.run(
        ["dpkg-deb", "--field", str(deb), "Version"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One fetch or build in a folder at a time; a second one waits."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
