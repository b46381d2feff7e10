"""What the launcher does, as spans that a collector gets: taken apart with OpenTelemetry's own messages."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from launcher.spans import BadEndpoint, endpoint
from tests.machine.drive import ROOT, Screen, command
from tests.machine.processes import titles

HELLO = ROOT / "machines" / "hello.toml"


class Collector:
    """Listens on a port of its own; keeps the spans of what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.wrong: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path != "/v1/traces" or self.headers["Content-Type"] != "application/x-protobuf":
                    collector.wrong.append(f"{self.path} {self.headers['Content-Type']}")
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
                    collector.services.add(attributes["service.name"])
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def named(self, name: str) -> Span:
        found = [span for span in self.spans if span.name == name]
        assert len(found) == 1, [span.name for span in self.spans]
        return found[0]

    def below(self, parent: Span) -> list[str]:
        children = [span for span in self.spans if span.parent_span_id == parent.span_id]
        assert all(span.trace_id == parent.trace_id for span in children)
        assert all(parent.start_time_unix_nano <= span.start_time_unix_nano for span in children)
        assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in children)
        return [span.name for span in children]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def attributes(span: Span) -> dict[str, str | int]:
    return {
        a.key.removeprefix("backplane."): a.value.int_value or a.value.string_value for a in span.attributes
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.mark.machine
def test_up_swap_snapshot_and_crash(
    runtime: Path, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "a test")
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("q powers off")
        before = titles("hello")["pic"]
        command("swap", "hello", "pic", runtime=runtime)
        after = titles("hello")["pic"]
        command("snapshot", "hello", tmp_path / "hello.snap", runtime=runtime)
        killed = titles("hello")["uart0"]
        os.kill(killed, signal.SIGKILL)
        screen.type("still there")
        screen.wait_for("still there")
        screen.type("q")
        screen.finish(0)
        screen.wait_gone()
    assert collector.services == {"a test"}
    assert not collector.wrong
    assert collector.below(collector.named("up")) == [
        "images are loaded", "processes are forked", "processes get ready",
    ]  # fmt: skip
    swap = collector.named("swap")
    told = attributes(swap)
    assert (told["machine"], told["device"], told["pid.old"], told["pid.new"]) == (
        "hello",
        "pic",
        before,
        after,
    )
    assert 0 < int(told["pause_ns"]) < swap.end_time_unix_nano - swap.start_time_unix_nano
    assert "takes over" in collector.below(swap)
    assert attributes(collector.named("snapshot"))["size"] == (tmp_path / "hello.snap").stat().st_size
    crash = collector.named("crash")
    assert (attributes(crash)["device"], attributes(crash)["pid.old"]) == ("uart0", killed)
    assert crash.status.code == Status.STATUS_CODE_ERROR


@pytest.mark.machine
def test_restore(
    runtime: Path, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("q powers off")
        command("snapshot", "hello", tmp_path / "hello.snap", runtime=runtime)
        screen.type("q")
        screen.finish(0)
        screen.wait_gone()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with Screen("restore", tmp_path / "hello.snap", runtime=runtime) as screen:
        screen.type("here again")
        screen.wait_for("here again")
        screen.type("q")
        screen.finish(0)
        screen.wait_gone()
    assert "processes get ready" in collector.below(collector.named("restore"))


@pytest.mark.machine
def test_a_collector_that_does_not_answer_is_not_noticed(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("q powers off")
        command("swap", "hello", "pic", runtime=runtime)
        screen.type("q")
        screen.finish(0)
        assert "Traceback" not in screen.text()
        screen.wait_gone()


@pytest.mark.machine
def test_a_url_that_is_none_is_refused(runtime: Path, tmp_path: Path) -> None:
    machine = tmp_path / "hello.toml"
    text = HELLO.read_text().replace('source = "', f'source = "{HELLO.parent}/')
    machine.write_text(text.replace("[machine]\n", '[machine]\notlp = "localhost:4318"\n'))
    with Screen("up", machine, runtime=runtime) as screen:
        screen.finish(2)
        assert "machine.otlp: 'localhost:4318' is no URL of a collector; write one like" in screen.text()
    assert not list(runtime.glob("*"))


def test_where_spans_go() -> None:
    assert endpoint("", {}) == ""
    assert endpoint("", {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) == ""
    assert endpoint("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}) == "environment"
    assert endpoint("https://c:4318", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d"}) == "https://c:4318"


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.spans.find_spec", lambda name: None)
    with pytest.raises(BadEndpoint, match="install backplane's extra `otlp`"):
        endpoint("http://c", {})


@pytest.mark.parametrize(
    "text",
    ["http://[", "http://c:99999", "http://c:x", "http://c:0", "http://", "ftp://c", "http://a b", "c:4318"],
)
def test_no_url(text: str) -> None:
    with pytest.raises(BadEndpoint, match="is no URL of a collector"):
        endpoint(text, {})


def test_with_the_sdk_and_no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(name)
        return find

    monkeypatch.setattr("launcher.spans.find_spec", find)
    with pytest.raises(BadEndpoint, match="install backplane's extra `otlp`"):
        endpoint("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"})
