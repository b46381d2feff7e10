"""The boot benchmark's arithmetic and its machine file; the timing itself is no test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import boot
from launcher.config import LinuxBoot, read_config

REPO = Path(__file__).parents[2]
GUEST = boot.Guest(Path("/g/vmlinuz"), Path("/g/initrd"), "console=ttyS0 bench=off", 64)


def test_the_ratio_is_taken_pair_by_pair() -> None:
    times = [(2.0, 1.0), (9.0, 3.0), (4.0, 4.0)]
    pairs = [
        {"backplane": boot.Run("backplane", {"ready": ours}), "qemu": boot.Run("qemu", {"ready": theirs})}
        for ours, theirs in times
    ]
    row = boot.summary(pairs, ["ready"])["ready"]
    assert row == {"backplane_s": 4.0, "qemu_s": 3.0, "ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0}


def test_both_engines_get_the_same_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "SCRATCH", tmp_path)
    command = boot.backplane_command(GUEST, REPO / "machines" / "linux.toml")
    config = read_config(Path(command[-1]))
    assert isinstance(config.boot, LinuxBoot)
    assert (config.boot.kernel, config.boot.initrd) == (GUEST.kernel, GUEST.initrd)
    assert (config.boot.cmdline, config.memory_bytes) == (GUEST.cmdline, 64 << 20)
    assert config.devices == read_config(REPO / "machines" / "linux.toml").devices
    qemu = boot.qemu_command(GUEST)
    assert qemu[qemu.index("-append") + 1] == GUEST.cmdline
    assert qemu[qemu.index("-m") + 1] == "64"


def test_marks_are_stamped_in_order_and_a_failed_run_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "SCRATCH", tmp_path)
    text = "import sys; print('Linux version 6'); print('GUEST-READY 1'); print('GUEST-END'); sys.exit(%d)"
    good = boot.timed("qemu", [sys.executable, "-c", text % 0], 60)
    assert boot.finished(good, "ready")
    assert 0 < good.seconds["kernel"] <= good.seconds["ready"] <= good.seconds["total"]
    assert not boot.finished(good, "bench")
    bad = boot.timed("qemu", [sys.executable, "-c", text % 5], 60)
    assert bad.status == 5
    assert not boot.finished(bad, "ready")
