"""What `make bench-restore` says of its times."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from bench.restores import ANSWER, RUNNING, TYPED, answered, complaints, table
from bus.link import console_path


def test_the_table_has_a_row_for_each_time() -> None:
    text = table({RUNNING: [0.2, 0.1, 0.4, 0.3, 0.25], "other": [0.02] * 5})
    assert f"| {RUNNING} | 100 | 250 | 400 | 400 |" in text
    assert "| other | 20 | 20 | 20 | 20 |" in text
    assert "5 restores of 256 MiB" in text


def test_what_is_slower_than_asked_is_said() -> None:
    assert complaints([0.1] * 8 + [0.299] * 2) == []
    assert complaints([0.1] * 9 + [0.3]) == ["the 90th percentile of running again is 300 ms, not below 300"]
    assert [line.split(" of ")[0] for line in complaints([0.3])] == ["the median", "the 90th percentile"]


@pytest.mark.parametrize("ends", [False, True])
def test_the_echo_of_what_was_typed_is_no_answer(short_path: Path, ends: bool) -> None:
    assert ANSWER not in TYPED
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(console_path(short_path, "uart0")))
        listener.listen()
        echoed = threading.Event()

        def shell() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(client.recv(len(TYPED)))
                echoed.set()
                if not ends:
                    client.sendall(ANSWER[:2])
                    client.sendall(ANSWER[2:] + b"\n")
                    client.recv(1)  # until it hangs up

        thread = threading.Thread(target=shell)
        thread.start()
        if ends:
            with pytest.raises(SystemExit, match="ended before it had answered"):
                answered(short_path)
        else:
            answered(short_path)
        thread.join()
        assert echoed.is_set()
