"""Pausing a machine, the nodes being played by the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from bus.frames import Continue, ContinueReply, Frame, Pause, PauseReply, Refused
from launcher.pausing import DRAIN_S, NotQuiet, Pausing, under_way

CPU, DEVICES = "cpu0", ["uart0", "pic"]


class Nodes:
    """Answers, and what was asked. `late`: frames that arrive only after so many questions."""

    def __init__(self, late: int = 0) -> None:
        self.asked: list[tuple[str, Frame]] = []
        self.clocks = {"cpu0": 100, "uart0": 300, "pic": 200}
        self.late = late
        self.host_ns = 5_000
        self.silent = ""

    def ask(self, node: str, frame: Frame) -> Frame:
        self.asked.append((node, frame))
        self.host_ns += 10
        if node == self.silent:
            raise RuntimeError(f"{node} has not answered")
        if isinstance(frame, Continue):
            return ContinueReply()
        assert isinstance(frame, Pause)
        self.late -= node == "pic"
        return PauseReply(self.clocks[node], self.frames(node))

    def ask_all(self, nodes: Sequence[str], frame: Frame) -> list[Frame]:
        return [self.ask(node, frame) for node in nodes]

    def frames(self, node: str) -> dict[str, Any]:
        taken = 6 if self.late > 0 else 7
        return {
            "cpu0": {"cpu0.io>uart0": [9, 3], "cpu0>launcher": [5, 1]},
            "uart0": {"cpu0.io>uart0": [3, 9], "uart0>pic": [7, 0], "uart0>cpu0": [0, 0],
                      "launcher>uart0": [1, 1]},
            "pic": {"uart0>pic": [0, taken], "memory>pic": [4, 4]},
        }[node]


def _pausing(nodes: Nodes) -> Pausing:
    return Pausing(nodes.ask_all, lambda: nodes.host_ns)


def test_the_cpu_stands_first_and_goes_on_last_from_the_latest_clock() -> None:
    nodes = Nodes()
    pausing = _pausing(nodes)
    assert pausing.node_config() == {"clock_offset_ns": 0, "clock_stopped_ns": None}
    pausing.pause(CPU, DEVICES)
    assert nodes.asked == [(node, Pause()) for node in ("cpu0", "uart0", "pic")]
    assert pausing.paused
    assert pausing.node_config() == {"clock_offset_ns": 0, "clock_stopped_ns": 300}
    pausing.pause(CPU, DEVICES)
    assert len(nodes.asked) == 3  # it is already
    nodes.asked.clear()
    host_ns = nodes.host_ns
    pausing.resume(CPU, DEVICES)
    assert nodes.asked == [(node, Continue(300, host_ns)) for node in ("uart0", "pic", "cpu0")]
    assert not pausing.paused
    assert pausing.node_config() == {"clock_offset_ns": 300 - host_ns, "clock_stopped_ns": None}


def test_it_asks_until_all_that_was_sent_has_arrived() -> None:
    nodes = Nodes(late=4)
    pausing = _pausing(nodes)
    pausing.pause(CPU, DEVICES)
    assert len(nodes.asked) == 3 * 4


def test_what_never_arrives_undoes_the_pause() -> None:
    nodes = Nodes(late=1 << 60)
    pausing = _pausing(nodes)

    def slow(them: Sequence[str], frame: Frame) -> list[Frame]:
        nodes.host_ns += int(DRAIN_S * 1e8) * len(them)
        return nodes.ask_all(them, frame)

    pausing._ask_all = slow
    with pytest.raises(NotQuiet, match=r"^not paused: after 5 s frames are under way: uart0>pic$"):
        pausing.pause(CPU, DEVICES)
    assert not pausing.paused
    undone = [(n, frame.clock_ns - frame.host_ns) for n, frame in nodes.asked if isinstance(frame, Continue)]
    assert undone == [("uart0", 0), ("pic", 0), ("cpu0", 0)]


@pytest.mark.parametrize("silent", ["cpu0", "uart0"])
def test_a_node_without_an_answer_undoes_the_pause(silent: str) -> None:
    nodes = Nodes()
    nodes.silent = silent
    pausing = _pausing(nodes)
    with pytest.raises(NotQuiet, match=f"not paused: {silent} has not answered"):
        pausing.pause(CPU, DEVICES)
    assert not pausing.paused
    assert {node for node, frame in nodes.asked if isinstance(frame, Continue)} == {"uart0", "pic", "cpu0"}


def test_a_refusal_is_no_pause() -> None:
    pausing = Pausing(lambda nodes, frame: [Refused("no") for _ in nodes], lambda: 0)
    with pytest.raises(NotQuiet, match="cpu0 answered Pause with Refused"):
        pausing.pause(CPU, DEVICES)


def test_under_way_compares_both_ends() -> None:
    ends = {"a": {"a>b": [3, 2], "c>a": [1, 1]}, "b": {"a>b": [2, 3], "b>a": [4, 0]}}
    assert under_way(ends) == ["b>a"]  # of c nothing is known
    ends["a"]["b>a"] = [0, 4]
    assert under_way(ends) == []
    ends["b"]["a>b"] = [2, 2]
    assert under_way(ends) == ["a>b"]
