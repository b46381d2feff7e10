"""Copy on write, against a bytearray; what a killed process leaves; what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from devices.disks import BadDisk, DiskFile
from devices.overlay import PAGE, SECTOR, Overlay, overlay_size

SECTORS = 331  # a last byte of bits that isn't full, a data area that isn't whole pages


def _image(folder: Path) -> tuple[Path, bytes]:
    content = random.Random(1).randbytes(SECTORS * SECTOR)
    path = folder / "disk.img"
    path.write_bytes(content)
    return path, content


def _views(sizes: list[int]) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


def _split(rng: random.Random, data: bytes) -> list[memoryview]:
    """`data` in pieces of any size."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(4)))
    return [memoryview(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_it_reads_as_a_disk_that_is_written(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path, content = _image(tmp_path)
    model = bytearray(content)
    disk = DiskFile(path, False, str(tmp_path / "overlay"))
    for step in range(300):
        first = rng.randrange(SECTORS)
        count = min(rng.choice((1, 2, 7, 8, 9, 64, 200)), SECTORS - first)
        offset, size = first * SECTOR, count * SECTOR
        if rng.random() < 0.5:
            data = rng.randbytes(size) if rng.random() < 0.8 else bytes(size)
            disk.write(offset, _split(rng, data))
            model[offset : offset + size] = data
        else:
            views = _views([len(view) for view in _split(rng, bytes(size))])
            disk.read(offset, views)
            assert b"".join(views) == model[offset : offset + size], step
        if step % 50 == 49:  # as after the end of the process
            disk.close()
            disk = DiskFile(path, False, str(tmp_path / "overlay"))
    disk.flush()
    assert path.read_bytes() == content


def test_parts_of_a_sector_can_be_read(tmp_path: Path) -> None:
    path, content = _image(tmp_path)
    disk = DiskFile(path, False, str(tmp_path / "overlay"))
    disk.write(SECTOR, [memoryview(b"x" * SECTOR)])
    views = _views([300, 700])
    disk.read(200, views)
    assert b"".join(views) == content[200:SECTOR] + b"x" * SECTOR + content[2 * SECTOR : 1200]


def test_two_disks_share_a_file_and_nothing_else(tmp_path: Path) -> None:
    path, content = _image(tmp_path)
    one, two = (DiskFile(path, False, str(tmp_path / name)) for name in ("one", "two"))
    one.write(0, [memoryview(b"1" * SECTOR)])
    two.write(0, [memoryview(b"2" * SECTOR)])
    for disk, byte in ((one, b"1"), (two, b"2")):
        views = _views([SECTOR])
        disk.read(0, views)
        assert bytes(views[0]) == byte * SECTOR
    with pytest.raises(BadDisk, match="in use already"):
        DiskFile(path, False)  # who would write under them
    assert path.read_bytes() == content


def test_what_no_overlay_takes(tmp_path: Path) -> None:
    path, _ = _image(tmp_path)
    disk = DiskFile(path, False, str(tmp_path / "overlay"))
    with pytest.raises(OSError, match="no whole sectors"):
        disk.write(0, [memoryview(b"short")])
    with pytest.raises(EOFError):
        disk.write((SECTORS - 1) * SECTOR, [memoryview(bytes(2 * SECTOR))])
    (tmp_path / "other").write_bytes(bytes(PAGE))
    with pytest.raises(BadDisk, match=r"its overlay can't be used: .* has 4096 bytes"):
        DiskFile(path, False, str(tmp_path / "other"))
    with pytest.raises(BadDisk, match="overlay can't be used"):
        DiskFile(path, False, str(tmp_path / "nowhere" / "overlay"))


def test_it_is_sparse(tmp_path: Path) -> None:
    overlay = Overlay(tmp_path / "overlay", 1 << 30)
    overlay.write(1 << 29, [memoryview(b"x" * SECTOR)])
    info = (tmp_path / "overlay").stat()
    assert info.st_size == overlay_size(1 << 30)
    assert info.st_blocks * 512 < 1 << 20
    overlay.close()
