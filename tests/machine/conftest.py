"""Where machines of these tests run, and which of them need the fetched guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machine.files import GUEST
from tests.machine.processes import adopt_orphans


@pytest.fixture(scope="session", autouse=True)
def subreaper() -> None:
    adopt_orphans()


@pytest.fixture(scope="session")
def guest_files() -> None:
    """The kernel and the initramfs are there, or what to do about it."""
    if not (GUEST / "vmlinuz").exists() or not (GUEST / "initramfs.cpio").exists():
        pytest.fail("the guest is not there; say `make guest`")


@pytest.fixture
def runtime(short_path: Path) -> Path:
    """BACKPLANE_RUNTIME_DIR of one test."""
    return short_path / "run"
