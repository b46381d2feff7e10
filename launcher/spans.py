"""What the launcher does, as OpenTelemetry spans: up, restore, swap, snapshot, crash.

They are handed to a process of its own (launcher/exporting.py) through a pipe, and forgotten: neither a
collector that doesn't answer nor the SDK's threads and imports are in the launcher. Nothing of this exists
where nobody asked for it. Left out: spans of a machine's second launcher (re-attached).
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

if TYPE_CHECKING:
    import subprocess

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")  # of the SDK
FROM_ENVIRONMENT = "environment"
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
CLOSE_S = 3.0  # for what was handed over to reach the collector
LONGEST_ERROR = 500  # characters; a span must fit into PIPE_BUF
MISSING = "the OpenTelemetry SDK is not installed; install backplane's extra `otlp`"


class Span(msgspec.Struct):
    """Times on CLOCK_MONOTONIC in ns. `error`: one line, if it failed."""

    name: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, str | int | bool] = {}
    error: str = ""
    children: list[Span] = []


class Handed(msgspec.Struct):
    """What goes through the pipe. `offset_ns`: added to its times gives the time of day."""

    machine: str
    offset_ns: int
    span: Span


class BadEndpoint(ValueError):
    """Spans can't be sent there."""


def endpoint(setting: str, environment: Mapping[str, str]) -> str:
    """Where spans go: a URL, FROM_ENVIRONMENT (the SDK looks there), or "", nowhere. Raises BadEndpoint.

    `setting`: of the machine file, "": none.
    """
    if setting and not _is_url(setting):
        raise BadEndpoint(f"{setting!r} is no URL of a collector")
    if not setting and not any(environment.get(name) for name in VARIABLES):
        return ""
    if not all(map(_installed, NEEDED)):
        raise BadEndpoint(MISSING)
    return setting or FROM_ENVIRONMENT


def from_environment(environment: Mapping[str, str]) -> tuple[str, str]:
    """Where spans go, and a line for the user if the environment asks for some and there can't be any."""
    try:
        return endpoint("", environment), ""
    except BadEndpoint as error:
        return "", f"no spans are sent: {error}"


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port  # ValueError where it is none
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return plain and url.scheme in ("http", "https") and bool(url.hostname) and port != 0


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def in_phases(name: str, begin_ns: int, ends_ns: Mapping[str, int]) -> Span:
    """A span of phases that follow each other, by the end of each."""
    children, at_ns = [], begin_ns
    for phase, end_ns in ends_ns.items():
        children.append(Span(phase, at_ns, end_ns))
        at_ns = end_ns
    return Span(name, begin_ns, at_ns, {}, "", children)


class Spans:
    """Of one machine."""

    def __init__(self, machine: str, endpoint: str) -> None:
        self._machine, self._endpoint = machine, endpoint
        self._process: subprocess.Popen[bytes] | None = None
        self.dropped = 0

    def emit(self, span: Span) -> None:
        """Hand it over; if that would have to wait it is dropped."""
        if not self._endpoint:
            return
        pipe = self._pipe()
        span = msgspec.structs.replace(span, error=span.error[:LONGEST_ERROR])
        data = msgspec.msgpack.encode(Handed(self._machine, time.time_ns() - time.monotonic_ns(), span))
        if len(data) + 4 > select.PIPE_BUF:
            self.dropped += 1
            return
        try:
            os.write(pipe, len(data).to_bytes(4, "little") + data)  # below PIPE_BUF it is all or nothing
        except (BlockingIOError, BrokenPipeError):
            self.dropped += 1

    def close(self) -> None:
        """Returns when all has been sent, or it takes too long."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        pidfd = os.pidfd_open(self._process.pid)
        select.select([pidfd], [], [], CLOSE_S)
        os.close(pidfd)
        self._process.kill()
        self._process.wait()

    def _pipe(self) -> int:
        if self._process is None:
            import subprocess  # takes its time to import

            environment: dict[str, Any] = dict(os.environ)
            if self._endpoint != FROM_ENVIRONMENT:
                environment[VARIABLES[0]] = self._endpoint
                environment.pop(VARIABLES[1], None)  # the SDK would prefer it
            command = [sys.executable, "-m", "launcher.exporting"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
        assert self._process.stdin is not None
        return self._process.stdin.fileno()
