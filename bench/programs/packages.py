"""Debian's i386 packages of a program with all they depend on, and a root file system from them.

apt resolves and verifies (see launcher/guest/apt.py); nothing is installed and no package's scripts run, so
alternatives, caches and users that those would make are missing: programs.toml's scripts call programs by
their own names. In the folder (build/programs): `debs/`, one list of file names per program, and apt's state.
Left out of the file system: documentation, translations, icons; ownership (all is root's); hard links are
symbolic ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.guest.apt import GuestUnavailable, PrivateApt, complaint, run_apt
from launcher.guest.cpio import Archive
from launcher.guest.fetch import locked

INSTALLED = re.compile(r"^Inst (\S+) \((\S+) .*\[(\S+)\]\)", re.MULTILINE)  # apt-get -s
MERGED = ("bin", "sbin", "lib")  # Debian 12: links to the folders in /usr
SKIPPED = re.compile(
    r"usr/share/(doc|man|info|locale|lintian|bug|icons|pixmaps|help|gtk-doc|bash-completion|zsh|doc-base)/"
)
OPTIONS = ("-o", "Debug::NoLocking=1", "--no-install-recommends", "-y", "-q")

SHELL = "dash"  # busybox's own shell would run its applets in place of the programs

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Node:
    """A file (`data`), a symbolic link (`data` is its target) or a folder; `mode` has the type, too."""

    mode: int
    data: bytes = b""


Tree = dict[str, Node]


def fetch(folder: Path, program: str, packages: Sequence[str], say: Say) -> list[Path]:
    """The packages' files with a shell and all dependencies; from the network only what isn't there.

    GuestUnavailable where apt can't get them.
    """
    packages = [SHELL, *packages]
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        listed = folder / f"{program}.json"
        have = _listed(listed, debs, packages)
        if have is not None:
            return have
        apt = PrivateApt(folder / "apt", "i386")
        config = ("-c", str(apt.config), "-o", f"Dir::Cache::archives={debs.absolute()}", *OPTIONS)
        (debs / "partial").mkdir(exist_ok=True)
        fresh = folder / "apt" / "fresh"
        if not fresh.exists():
            say("reading the package lists (i386)")
            if complained := apt.update():
                say(f"using the lists apt has ({complained})")
            fresh.touch()
        wanted = run_apt(["apt-get", *config, "-s", "install", *packages])
        names = [
            f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
            for name, version, architecture in INSTALLED.findall(wanted.stdout)
        ]
        say(f"{program}: downloading {len(names)} packages (i386)")
        done = run_apt(["apt-get", *config, "--download-only", "install", *packages])
        if wanted.returncode or done.returncode or not names:
            fresh.unlink()
            problem = complaint(wanted.stderr) or complaint(done.stderr) or "apt-get failed"
            raise GuestUnavailable(f"{program} cannot be downloaded ({problem})", "try again later")
        listed.write_text(
            json.dumps({"packages": list(packages), "debs": {n: _digest(debs / n) for n in names}}, indent=1)
        )
        return [debs / name for name in names]


def _listed(listed: Path, debs: Path, packages: Sequence[str]) -> list[Path] | None:
    """What an earlier fetch listed, if it is all there as it was."""
    try:
        record = json.loads(listed.read_text())
        if record["packages"] == list(packages) and all(
            _digest(debs / name) == digest for name, digest in record["debs"].items()
        ):
            return [debs / name for name in record["debs"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(debs: Sequence[Path]) -> Tree:
    """All files of the packages by path, without the leading "/"."""
    tree: Tree = {}
    for name in MERGED:
        tree[name] = Node(stat.S_IFLNK | 0o777, f"usr/{name}".encode())
    for deb in debs:
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=True)
        with tarfile.open(fileobj=io.BytesIO(done.stdout), mode="r:") as archive:
            for entry in archive:
                _add(tree, archive, entry)
    return tree


def _add(tree: Tree, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
    path = _merged(entry.name)
    if not path or SKIPPED.match(path) or path in MERGED:
        return
    for parent in [*PurePosixPath(path).parents][-2::-1]:
        tree.setdefault(str(parent), Node(stat.S_IFDIR | 0o755))
    if entry.isdir():
        tree[path] = Node(stat.S_IFDIR | entry.mode & 0o7777)
    elif entry.issym():
        tree[path] = Node(stat.S_IFLNK | 0o777, entry.linkname.encode())
    elif entry.islnk():
        tree[path] = Node(stat.S_IFLNK | 0o777, b"/" + _merged(entry.linkname).encode())
    elif entry.isfile():
        content = archive.extractfile(entry)
        assert content is not None
        tree[path] = Node(stat.S_IFREG | entry.mode & 0o777, content.read())


def _merged(name: str) -> str:
    path = name.removeprefix("./").strip("/")
    first, slash, _ = path.partition("/")
    return f"usr/{path}" if slash and first in MERGED else path


def to_cpio(tree: Tree) -> bytes:
    """An initramfs with a console; folders come before what is in them."""
    archive = Archive()
    archive.directory("dev")
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3, 0o666)
    for path in sorted(tree):
        node = tree[path]
        if stat.S_ISDIR(node.mode):
            archive.directory(path, node.mode & 0o7777)
        elif stat.S_ISLNK(node.mode):
            archive.symlink(path, node.data.decode())
        else:
            archive.file(path, node.data, node.mode & 0o777)
    return bytes(archive)


def to_folder(tree: Tree, folder: Path) -> None:
    """The same on the host's disk, in a folder that is empty; everything is ours."""
    for path in sorted(tree):
        node, target = tree[path], folder / path
        if stat.S_ISDIR(node.mode):
            target.mkdir(exist_ok=True)
        elif stat.S_ISLNK(node.mode):
            target.symlink_to(node.data.decode())
        else:
            target.write_bytes(node.data)
            target.chmod(node.mode & 0o777 | 0o400)
