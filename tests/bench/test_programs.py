"""The pieces of `make programs`, and one program in the guest where its packages can be had."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from bench.programs import packages
from bench.programs.__main__ import FOLDER, good, run, verdict
from bench.programs.catalogue import catalogue, chosen
from bench.programs.runs import Outcome
from launcher.guest.apt import GuestUnavailable


def test_the_catalogue_is_whole() -> None:
    programs = catalogue()
    assert len({program.name for program in programs}) == len(programs) >= 12
    for program in programs:
        assert program.packages
        assert 128 <= program.memory_mib <= 3072
        subprocess.run(["sh", "-n"], input=program.script, text=True, check=True)
    assert [program.name for program in chosen("perl, luajit")] == ["perl", "luajit"]
    assert len(chosen("")) == len(programs)
    with pytest.raises(ValueError, match="no 'parl'"):
        chosen("parl")


def package(folder: Path, files: dict[str, bytes], links: dict[str, str]) -> Path:
    """A .deb with these files."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: i386\nMaintainer: x <x@y>\nDescription: x\n"
    )
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
        (tree / path).chmod(0o755)
    for path, target in links.items():
        (tree / path).symlink_to(target)
    deb = folder / "x.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, deb], check=True, capture_output=True)
    return deb


def test_a_tree_has_merged_folders_and_no_documentation(tmp_path: Path) -> None:
    files = {"bin/tool": b"tool", "usr/share/doc/x/readme": b"no", "lib/i386/libx.so.1": b"library"}
    tree = packages.unpack([package(tmp_path, files, {"lib/i386/libx.so": "libx.so.1"})])
    assert tree["usr/bin/tool"] == packages.Node(stat.S_IFREG | 0o755, b"tool")
    assert tree["bin"].data == b"usr/bin"
    assert tree["usr/lib/i386/libx.so"] == packages.Node(stat.S_IFLNK | 0o777, b"libx.so.1")
    assert "usr/share/doc/x/readme" not in tree
    root = tmp_path / "root"
    root.mkdir()
    packages.to_folder(tree, root)
    assert (root / "lib" / "i386" / "libx.so").read_bytes() == b"library"
    image = packages.to_cpio(tree)
    assert image.index(b"usr/bin\0") < image.index(b"usr/bin/tool\0")
    assert b"readme" not in image


def test_verdicts() -> None:
    ours = Outcome(["1", "status 0"], 1.0)
    same, other, broken = (
        Outcome(["1", "status 0"], 2.0),
        Outcome(["2", "status 0"], 2.0),
        Outcome([], 0, "no"),
    )
    assert good({"backplane": ours, "native": same})
    assert good({"backplane": ours, "native": same, "qemu": broken})
    assert not good({"backplane": ours, "native": same, "qemu": other})
    assert not good({"backplane": ours})
    assert not good({"backplane": Outcome(["1", "status 1"], 1.0), "native": Outcome(["1", "status 1"], 1.0)})
    assert not good({"backplane": Outcome(["1", "status 0"], 1.0, "segfault"), "native": same})
    assert verdict({"backplane": ours, "native": other}, "native") == "DIFFERS"
    assert verdict({"backplane": ours}, "qemu") == "-"


@pytest.mark.machine
def test_luajit_runs_in_the_guest() -> None:
    """A compiler that makes code at run time, as natively, or as under QEMU."""
    (luajit,) = chosen("luajit")
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        packages.fetch(FOLDER, luajit.name, luajit.packages, lambda line: None)
    except GuestUnavailable as e:
        pytest.skip(str(e))
    engines = ("backplane", "native")
    outcomes = run(luajit, engines, 600, keep=False)
    if "native" not in outcomes:
        outcomes |= run(luajit, ("qemu",), 600, keep=False)
    assert good(outcomes), outcomes
