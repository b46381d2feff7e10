"""Fetching the guest: with a stand-in for apt, because a test may not depend on a network."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from launcher.guest import apt
from launcher.guest.apt import GuestUnavailable
from launcher.guest.fetch import MODULES, cached, fetch, newest

REPO = Path(__file__).parents[2]

FAKE_APT = """#!/bin/sh
# Stand-in for apt: state in $FAKE, one line per call in $FAKE/calls.
name=$(basename "$0")
echo "$name $*" >> "$FAKE/calls"
[ "$1" = -c ] && { config=$2; shift 2; }
case "$name $*" in
*update) echo "W: a warning" >&2; echo "E: $(cat "$FAKE/complaint" 2>/dev/null)" >&2 ;;
*pkgnames) cat "$FAKE/names" ;;
*"download "*)
    for package; do :; done
    cp "$FAKE/$package.deb" "./${package}_1%3a2_i386.deb" 2>/dev/null && exit
    echo "E: no $package" >&2; exit 100 ;;
"apt-config dump"*) echo 'Acquire::IndexTargets::deb::Icons::MetaKey "x";' ;;
*indextargets*) cat "$FAKE/targets" 2>/dev/null ;;
"dpkg-deb --fsys-tarfile "*) cat "$2" ;;
"dpkg-deb --field "*) echo "1:2-3" ;;
esac
"""


def package(members: dict[str, bytes]) -> bytes:
    """What `dpkg-deb --fsys-tarfile` would write; the stand-in's packages are just that."""
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return out.getvalue()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-in's state, which offers one kernel and busybox."""
    state, programs = tmp_path / "fake", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
        (programs / name).write_text(FAKE_APT)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(state))
    (state / "names").write_text("linux-image-686\nlinux-image-6.1.0-50-686\nlinux-image-6.1.0-50-686-pae\n")
    kernel = {"./boot/System.map": b"map", "./boot/vmlinuz-6.1.0-50-686": b"kernel", "./lib/x": bytes(100)}
    modules = (*MODULES, "other.ko")
    kernel |= {f"./lib/modules/6.1.0-50-686/kernel/x/{name}": name.encode() for name in modules}
    (state / "linux-image-6.1.0-50-686.deb").write_bytes(package(kernel))
    (state / "busybox-static.deb").write_bytes(package({"./bin/busybox": b"busybox"}))
    return state


def calls(fake: Path) -> list[str]:
    path = fake / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_the_newest_kernel_by_number_and_no_other_flavour() -> None:
    names = ["linux-image-6.1.0-9-686", "linux-image-6.1.0-47-686", "linux-image-5.10.0-99-686"]
    names += ["linux-image-6.1.0-50-686-pae", "linux-image-6.2.0-1-rt-686", "linux-image-6.3.0-1-686-dbg"]
    assert newest(names) == "linux-image-6.1.0-47-686"
    assert newest(["linux-image-686", "linux-image-amd64"]) is None


def test_fetch_then_nothing_more_to_do(fake: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "guest"
    files = fetch(folder, said.append)
    assert (folder / "vmlinuz").read_bytes() == b"kernel"
    assert (folder / "busybox").read_bytes() == b"busybox"
    assert (folder / "ext4.ko").read_bytes() == b"ext4.ko"
    assert not (folder / "other.ko").exists()
    assert {(file.name, file.package, file.version) for file in files} == {
        *((name, "linux-image-6.1.0-50-686", "1:2-3") for name in ("vmlinuz", *MODULES)),
        ("busybox", "busybox-static", "1:2-3"),
    }
    assert len(said) >= 3
    assert not (folder / "apt").exists()
    assert calls(fake)
    assert fetch(folder, said.append) == files
    assert calls(fake) == []


@pytest.mark.parametrize("harm", ["changed", "missing", "manifest cut"])
def test_what_differs_from_the_manifest_is_fetched_again(harm: str, fake: Path, tmp_path: Path) -> None:
    folder = tmp_path / "guest"
    files = fetch(folder, lambda line: None)
    if harm == "changed":
        (folder / "vmlinuz").write_bytes(b"kernex")
    elif harm == "missing":
        (folder / "busybox").unlink()
    else:
        (folder / "manifest.json").write_text(json.dumps([])[:1])
    assert cached(folder) is None
    assert fetch(folder, lambda line: None) == files
    assert cached(folder) == files


def test_apt_is_private_and_for_i386(fake: Path, tmp_path: Path) -> None:
    private = apt.PrivateApt(tmp_path / "apt", "i386")
    text = private.config.read_text()
    for line in (f'Dir::State "{tmp_path}/apt/state";', f'Dir::State::status "{tmp_path}/apt/status";'):
        assert line in text
    assert f'Dir::Cache "{tmp_path}/apt/cache";' in text
    assert 'APT::Architectures { "i386"; };' in text
    assert "#clear APT::Update::Post-Invoke;" in text  # the system's hooks would touch the system
    assert 'Acquire::IndexTargets::deb::Icons::DefaultEnabled "false";' in text
    private.update()
    assert calls(fake)[-1] == f"apt-get -c {private.config} -q update"


def test_lists_which_are_only_partly_there_will_do(fake: Path, tmp_path: Path) -> None:
    (fake / "complaint").write_text("Failed to fetch one of many")
    said: list[str] = []
    fetch(tmp_path / "guest", said.append)
    assert "using the lists apt has (Failed to fetch one of many)" in said


def test_without_a_kernel_an_older_debian_is_asked(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "names").write_text("linux-image-amd64\n")
    (fake / "complaint").write_text("no network")
    (fake / "targets").write_text("Ubuntu Ubuntu http://x/\nDebian Debian http://mirror.example/debian/\n")
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(apt, "DEBIAN_KEYRING", keyring)
    with pytest.raises(GuestUnavailable) as caught:
        fetch(tmp_path / "guest", lambda line: None)
    assert "apt offers no linux-image-*-686 (no network)" in str(caught.value)
    sources = (tmp_path / "guest" / "apt" / "debian.list").read_text()
    assert sources == f"deb [signed-by={keyring}] http://mirror.example/debian/ bookworm main\n"
    config = (tmp_path / "guest" / "apt" / "debian" / "apt.conf").read_text()
    assert f'Dir::Etc::SourceList "{tmp_path}/guest/apt/debian.list";' in config
    assert 'Dir::Etc::SourceParts "/dev/null";' in config


def test_a_failed_download_leaves_no_manifest(fake: Path, tmp_path: Path) -> None:
    (fake / "busybox-static.deb").unlink()
    with pytest.raises(
        GuestUnavailable, match=r"busybox-static cannot be downloaded \(no busybox-static\); try"
    ):
        fetch(tmp_path / "guest", lambda line: None)
    assert cached(tmp_path / "guest") is None


def test_a_package_without_the_file_is_refused(fake: Path, tmp_path: Path) -> None:
    (fake / "linux-image-6.1.0-50-686.deb").write_bytes(package({"./boot/vmlinuz-6.1.0-50-686": b"kernel"}))
    with pytest.raises(GuestUnavailable, match=r"linux-image-6\.1\.0-50-686 has no crc16\.ko"):
        fetch(tmp_path / "guest", lambda line: None)
    assert cached(tmp_path / "guest") is None
