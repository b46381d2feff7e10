"""Runs a test's body in a forked child: the CPU's stubs take fault signals and fixed addresses of a process.

A failure comes back as text, so does a skip; a child that dies or hangs is a failure. Fixtures and parameters
are untouched.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import traceback
from collections.abc import Callable

import pytest

from cpu_node import stubs_unsafe

HANGS_S = 600.0  # a bound on hanging, not an expectation
SKIPPED = 77  # exit status; the text says why


def isolated(body: Callable[..., None]) -> Callable[..., None]:
    """Decorator: `body` runs in a child in which the stubs are installed."""

    @functools.wraps(body)
    def test(*args: object, **kwargs: object) -> None:
        __tracebackhide__ = True
        stubs_unsafe.stub_image()  # assembled once, here
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _child(body, args, kwargs, write_end)
        os.close(write_end)
        try:
            text = _read_all(read_end)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            text = f"no end after {HANGS_S} s"
        finally:
            os.close(read_end)
            _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) == SKIPPED:
            pytest.skip(text)
        if os.waitstatus_to_exitcode(status) != 0:
            pytest.fail(text or f"child ended with status {os.waitstatus_to_exitcode(status)}", pytrace=False)

    return test


def _child(body: Callable[..., None], args: tuple[object, ...], kwargs: dict[str, object], out: int) -> None:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stubs_unsafe.install()
        body(*args, **kwargs)
    except pytest.skip.Exception as skipped:
        with os.fdopen(out, "w", errors="replace") as stream:
            stream.write(str(skipped))
        os._exit(SKIPPED)
    except BaseException:
        with os.fdopen(out, "w", errors="replace") as stream:
            stream.write(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _read_all(source: int) -> str:
    data = b""
    while True:
        ready, _, _ = select.select([source], [], [], HANGS_S)
        if not ready:
            raise TimeoutError
        piece = os.read(source, 1 << 16)
        if not piece:
            return data.decode(errors="replace")
        data += piece
