"""A reset of a machine whose nodes are played by the test."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.frames import Frame, Reset, ResetReply, SaveReply
from launcher.forkserver import ChildSpec
from launcher.resetting import Resetting

START = {"eip": 0x10_0000}


class Nodes:
    """Answers, and who was asked for what, when. `wrong`: answers something else."""

    def __init__(self, wrong: str = "") -> None:
        self.asked: list[tuple[str, Frame, int]] = []
        self.memory = os.memfd_create("ram")
        self.wrong = wrong

    def request(self, node: str, frame: Frame, timeout_ns: int) -> Frame:
        self.asked.append((node, frame, time.monotonic_ns()))
        return SaveReply({}) if node == self.wrong else ResetReply()

    def resetting(self, tmp_path: Any) -> Resetting:
        config = {"regions": [{"name": "ram", "size": 4096}]}
        memory = ChildSpec("memory", "", config, "", tmp_path, fds={"ram": self.memory})
        launch = SimpleNamespace(memory=memory, images=[(0x40, b"image")], start=START)
        processes = SimpleNamespace(launch=launch, devices=["uart0", "kbd"])
        return Resetting(cast(Any, processes), cast(Any, self))


def test_all_stand_before_memory_is_as_at_the_start_and_the_cpu_goes_on(tmp_path: Any) -> None:
    nodes = Nodes()
    resetting = nodes.resetting(tmp_path)
    os.pwrite(nodes.memory, b"spoilt", 0x40)
    resetting.reset()
    assert [(node, frame) for node, frame, _ in nodes.asked] == [
        ("cpu0", Reset()), ("uart0", Reset()), ("kbd", Reset()), ("cpu0", Reset(START)),
    ]  # fmt: skip
    assert os.pread(nodes.memory, 6, 0x40) == b"imaget"
    os.close(nodes.memory)


def test_what_was_asked_for_before_all_stood_is_done(tmp_path: Any) -> None:
    """A guest that pulls the pin twice is reset once; one that does it anew in its next life, again."""
    nodes = Nodes()
    resetting = nodes.resetting(tmp_path)
    assert not resetting.is_done(time.monotonic_ns())
    resetting.reset()
    *stopped, goes_on = (asked_ns for _, _, asked_ns in nodes.asked)
    assert all(resetting.is_done(asked_ns) for asked_ns in stopped)
    assert not resetting.is_done(goes_on)
    os.close(nodes.memory)


def test_another_answer_is_an_error(tmp_path: Any) -> None:
    nodes = Nodes(wrong="kbd")
    with pytest.raises(RuntimeError, match="kbd answered Reset with SaveReply"):
        nodes.resetting(tmp_path).reset()
    assert len(nodes.asked) == 3
    os.close(nodes.memory)
