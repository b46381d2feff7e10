"""Whatever is wrong with the store's files or folder costs a line of log and nothing else."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path

import pytest

from cpu_node.store import SUFFIX
from tests.cpu_node.child import isolated
from tests.cpu_node.store.kit import (
    expected,
    files,
    found,
    opened,
    record,
    warnings,
)


def test_damage_anywhere_is_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record(n) for n in range(6)])
    (file,) = files(folder)
    whole, rng = file.read_bytes(), random.Random(7)
    lost = 0
    for n in range(400):
        place = n if n < 60 else len(whole) - 1 - n if n < 120 else rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        caplog.clear()
        store = opened(folder)
        here = 0
        for number in range(6):
            kept = found(store, number)
            here += kept is None
            assert kept is None or kept.code == expected(number)
        assert len(warnings(caplog)) == 1
        assert here
        lost += here
        store.close()
    assert lost < 400 * 6  # most of a damaged file is of use


def test_files_cut_short(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record(n) for n in range(3)])
    (file,) = files(folder)
    whole = file.read_bytes()
    for length in [*range(80), *range(80, len(whole), 97)]:
        file.write_bytes(whole[:length])
        caplog.clear()
        store = opened(folder)
        assert found(store) is None
        assert len(warnings(caplog)) == 1
        store.close()


def test_file_that_is_cut_while_it_is_open(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record(n) for n in range(3)])
    store = opened(folder)
    os.truncate(files(folder)[0], 100)
    assert [found(store, n) for n in range(3)] == [None] * 3
    assert len(warnings(caplog)) == 1
    store.add([record(0)])
    assert found(store) is not None


def test_files_from_elsewhere(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record()])
    own = files(folder)[0].parent
    (own / f"zz{SUFFIX}").write_bytes(b"not ours" * 1000)
    (own / f"folder{SUFFIX}").mkdir()
    (own / f"link{SUFFIX}").symlink_to("/etc/passwd")
    os.mkfifo(own / f"pipe{SUFFIX}", 0o600)
    (own / "half-written.new").write_bytes(b"x" * 100)
    assert found(opened(folder)) is not None
    assert len(warnings(caplog)) == 1


def test_folder_of_somebody_else(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(folder).add([record()])
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    store = opened(folder)
    assert not store.usable
    assert found(store) is None
    store.add([record(1)])
    assert ["belongs to another user" in text for text in warnings(caplog)] == [True]


@pytest.mark.parametrize("what", ["folder", "version", "file"])
def test_what_others_may_write_to_is_not_run(
    folder: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    opened(folder).add([record()])
    (file,) = files(folder)
    target = {"folder": folder, "version": file.parent, "file": file}[what]
    target.chmod(target.stat().st_mode | 0o020)
    assert found(opened(folder)) is None
    assert ["can be written by others" in text for text in warnings(caplog)] == [True]


def test_made_for_the_user_alone(folder: Path) -> None:
    os.umask(os.umask(0))
    opened(folder).add([record()])
    (file,) = files(folder)
    assert [p.stat().st_mode & 0o777 for p in (folder, file.parent, file)] == [0o700, 0o700, 0o600]


def test_folder_that_is_a_link_is_not_followed(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert not opened(folder).usable
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("place", ["/proc/nothing/here", "/dev/null", "/dev/null/below"])
def test_folder_that_cannot_be(place: str, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(Path(place))
    store.add([record()])
    assert found(store) is None
    assert len(warnings(caplog)) == 1


@isolated
def test_disk_that_is_full(folder: Path) -> None:
    """No room: nothing half-written is left, and the store goes on."""
    store = opened(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    store.add([record()])
    assert list(files(folder)) == []
    assert list(folder.glob("*/*")) == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.add([record()])
    assert found(opened(folder)) is not None


def test_folder_removed_while_in_use(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(folder)
    store.add([record()])
    for file in files(folder):
        file.unlink()
    files_folder = next(p for p in folder.iterdir() if p.is_dir())
    files_folder.rmdir()
    assert found(store) is not None  # it is open
    store.add([record(1)])
    assert len(warnings(caplog)) == 1
