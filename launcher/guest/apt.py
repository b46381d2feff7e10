"""apt for another architecture, as an ordinary user: private state, the system's sources, keys and proxies.

apt itself verifies everything: signatures of the package lists, then the hashes of the packages. Nothing of
the system's is written, and neither root nor `dpkg --add-architecture` is needed.
Source: apt.conf(5), apt-get(8) `indextargets`. Left out: installing, dependencies.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import LauncherError, one_line

LAST_WITH_KERNEL = "bookworm"  # Debian 12: the last release with an i386 kernel package
DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEBIAN_TEMPLATE = Path("/usr/share/python-apt/templates/Debian.info")  # has Debian's own address
HOOKS = ("APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")

CONFIG = """\
Dir::State "{root}/state";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
#clear APT::Architectures;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::IndexTargets::deb-src::Sources::DefaultEnabled "false";
"""


HELLO_RUNS = "`launcher up machines/hello.toml` needs no guest files"

Finished = subprocess.CompletedProcess[str]


class GuestUnavailable(LauncherError):
    """The guest's files can't be had: what went wrong and what to do, in one line."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(one_line(f"guest: {problem}; {remedy}"))


class PrivateApt:
    """apt with its own state below `root`. `sources` replaces the system's sources with one file."""

    def __init__(self, root: Path, architecture: str, sources: Path | None = None) -> None:
        self.config = root / "apt.conf"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        text = CONFIG.format(root=root.absolute(), architecture=architecture)
        text += "".join(f"#clear {hook};\n" for hook in HOOKS)
        text += "".join(
            f'Acquire::IndexTargets::deb::{target}::DefaultEnabled "false";\n' for target in _extra_targets()
        )
        if sources is not None:
            text += f'Dir::Etc::SourceList "{sources.absolute()}";\nDir::Etc::SourceParts "/dev/null";\n'
        self.config.write_text(text)

    def update(self) -> str:
        """Fetch the package lists. Returns apt's last complaint ("" if none): what it has may do anyway."""
        done = run_apt(["apt-get", "-c", str(self.config), "-q", "update"])
        return complaint(done.stderr)

    def package_names(self, pattern: re.Pattern[str]) -> list[str]:
        done = run_apt(["apt-cache", "-c", str(self.config), "pkgnames"])
        return [name for name in done.stdout.split() if pattern.fullmatch(name)]

    def download(self, package: str, folder: Path, show: bool = False) -> Path:
        """Download one package, newest version; `show` lets apt draw its progress on the terminal."""
        return _download(["-c", str(self.config)], package, folder, show)


def download_from_system(package: str, folder: Path) -> Path:
    """Download a package with the system's own lists and architecture."""
    return _download([], package, folder, False)


def run_apt(command: Sequence[str], cwd: Path | None = None, show: bool = False) -> Finished:
    """Run an apt program in the C locale; its status is the caller's to judge."""
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=None if show else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    except FileNotFoundError as e:
        remedy = f"this needs Debian or Ubuntu; {HELLO_RUNS}"
        raise GuestUnavailable(f"{command[0]} is not on this machine", remedy) from e


def complaint(stderr: str) -> str:
    """The first error apt wrote, else its first warning, else ""."""
    lines = stderr.splitlines()
    for mark in ("E: ", "W: "):
        for line in lines:
            if line.startswith(mark):
                return line.removeprefix(mark)
    return ""


def debian_sources(file: Path, scratch: Path) -> None:
    """Write a sources file for the Debian release that has the kernel.

    For systems whose own sources lack it: a newer Debian, or Ubuntu. Debian's keyring and address come from
    the system, or else from packages of the system's distribution, verified with its keys.
    """
    keyring = _system_file(DEBIAN_KEYRING, "debian-archive-keyring", scratch)
    address = _debian_address() or _template_address(scratch)
    file.write_text(f"deb [signed-by={keyring.absolute()}] {address} {LAST_WITH_KERNEL} main\n")


def _debian_address() -> str | None:
    """The address of a Debian archive in the system's sources, if there is one."""
    done = run_apt(["apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)"])
    for line in done.stdout.splitlines():
        origin, label, uri = [*line.split(), "", "", ""][:3]
        if (origin, label) == ("Debian", "Debian"):
            return uri
    return None


def _template_address(scratch: Path) -> str:
    text = _system_file(DEBIAN_TEMPLATE, "python-apt-common", scratch).read_text()
    found = re.search(r"^BaseURI:\s*(\S+)", text, re.MULTILINE)
    if found is None:
        raise GuestUnavailable(f"{DEBIAN_TEMPLATE} names no address", "add a Debian source to apt")
    return found[1]


def _system_file(path: Path, package: str, scratch: Path) -> Path:
    """`path` as installed, else out of the system's package of it."""
    if path.exists():
        return path
    deb = download_from_system(package, scratch)
    tree = scratch / package
    subprocess.run(["dpkg-deb", "-x", str(deb), str(tree)], check=True)
    return tree / path.relative_to("/")


def _download(options: Sequence[str], package: str, folder: Path, show: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{package}_*.deb"
    for old in folder.glob(pattern):
        old.unlink()
    done = run_apt(["apt-get", *options, "download", package], cwd=folder, show=show)
    found = sorted(folder.glob(pattern))
    if done.returncode != 0 or not found:
        problem = complaint(done.stderr) or f"apt-get ended with status {done.returncode}"
        remedy = f"try again later, or correct apt's sources; {HELLO_RUNS}"
        raise GuestUnavailable(f"{package} cannot be downloaded ({problem})", remedy)
    return found[0]


def _extra_targets() -> list[str]:
    """Index files other than package lists which the system's apt also fetches (icons, command names)."""
    done = run_apt(["apt-config", "dump", "Acquire::IndexTargets::deb"])
    targets = re.findall(r"^Acquire::IndexTargets::deb::([^: ]+)::MetaKey", done.stdout, re.MULTILINE)
    return [target for target in targets if target != "Packages"]
