"""A process that sends spans to a collector by OTLP over HTTP: `python -m launcher.exporting`.

On its standard input come spans of launcher/spans.py, each with its length before it, until it ends.
Where and how is said by the SDK's environment variables.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import IO

import msgspec
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode, Tracer, set_span_in_context

from launcher.spans import CLOSE_S, Handed, Span

NAME = "backplane"
EVERY_MS = 500  # between two messages to the collector


def main() -> int:
    os.setsid()  # Ctrl-C is for the launcher, which tells us by ending our input
    logging.disable(logging.CRITICAL)  # a collector that doesn't answer is no news of the machine's
    provider = TracerProvider(
        resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", NAME)})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=EVERY_MS))
    tracer = provider.get_tracer(NAME)
    while (handed := _next(sys.stdin.buffer)) is not None:
        send(tracer, handed, handed.span, None)
    provider.force_flush(int(CLOSE_S * 900))
    os._exit(0)  # the SDK's threads may still wait for a collector


def send(tracer: Tracer, handed: Handed, span: Span, parent: Context | None) -> None:
    """A span and those below it."""
    attributes: dict[str, str | int | bool] = {f"{NAME}.machine": handed.machine}
    attributes |= {f"{NAME}.{name}": value for name, value in span.attributes.items()}
    begin_ns = span.begin_ns + handed.offset_ns
    begun = tracer.start_span(span.name, parent, attributes=attributes, start_time=begin_ns)
    if span.error:
        begun.set_status(Status(StatusCode.ERROR, span.error))
    for child in span.children:
        send(tracer, handed, child, set_span_in_context(begun))
    begun.end(span.end_ns + handed.offset_ns)


def _next(pipe: IO[bytes]) -> Handed | None:
    length = pipe.read(4)
    if len(length) < 4:
        return None
    data = pipe.read(int.from_bytes(length, "little"))
    return msgspec.msgpack.decode(data, type=Handed)


if __name__ == "__main__":
    raise SystemExit(main())
