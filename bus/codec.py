"""Frames to bytes and back: msgpack arrays `[version, kind, seq, ack, trace, span, clock_ns, *fields]`.

Whatever arrives, decode returns a frame or raises BadFrame. Types are checked field by field against the
structs; what the values mean is the receiver's to judge.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgpack

from bus.frames import KIND_OF, PROTOCOL_VERSION, TABLE, Frame, Header, PostedWrite

HEADER_ITEMS = 7  # version, kind, seq, ack, trace, span, clock_ns
WORD_LIMIT = 1 << 64


class BadFrame(ValueError):
    """Bytes that are no frame of this protocol version. `header` is set when at least that was readable."""

    def __init__(self, reason: str, header: Header | None = None) -> None:
        super().__init__(reason)
        self.header = header


def encode(frame: Frame, seq: int, ack: int, trace: int, span: int, clock_ns: int) -> bytes:
    cls = type(frame)
    packed: bytes = msgpack.packb(
        (PROTOCOL_VERSION, KIND_OF[cls], seq, ack, trace, span, clock_ns, *_VALUES_OF[cls](frame))
    )
    return packed


def decode(data: bytes) -> tuple[Header, Frame]:
    try:
        items = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadFrame(f"not msgpack: {error or type(error).__name__}") from error
    if not isinstance(items, list) or len(items) < HEADER_ITEMS:
        raise BadFrame("not an array with a header")
    version, kind, seq, ack, trace, span, clock_ns = items[:HEADER_ITEMS]
    if version != PROTOCOL_VERSION:
        raise BadFrame(f"protocol version {version!r}, this is {PROTOCOL_VERSION}")
    if not (_is_int(seq) and _is_int(ack) and _is_int(trace) and _is_int(span) and _is_int(clock_ns)):
        raise BadFrame("header fields are not unsigned 64-bit integers")
    header = Header(seq, ack, trace, span, clock_ns)
    reader = _READERS.get(kind) if _is_int(kind) else None
    if reader is None:
        raise BadFrame(f"unknown kind {kind!r}", header)
    cls, readers = reader
    values = items[HEADER_ITEMS:]
    if len(values) != len(readers):
        raise BadFrame(f"{cls.__name__} has {len(readers)} fields, got {len(values)}", header)
    try:
        return header, cls(*[read(value) for read, value in zip(readers, values, strict=True)])
    except _Mismatch as error:
        raise BadFrame(f"{cls.__name__}: {error}", header) from error


class _Mismatch(ValueError):
    pass


def _is_int(value: Any) -> bool:
    return type(value) is int and 0 <= value < WORD_LIMIT


def _int(value: Any) -> int:
    if type(value) is int and value >= 0:  # msgpack carries nothing above 64 bits
        return value
    raise _Mismatch(f"{value!r} is no unsigned integer")


def _int_or_none(value: Any) -> int | None:
    return None if value is None else _int(value)


def _exactly(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise _Mismatch(f"{value!r:.60} is no {kind.__name__}")

    return read


def _writes(value: Any) -> tuple[PostedWrite, ...]:
    if type(value) is not list:
        raise _Mismatch("writes are no array")
    for write in value:
        if type(write) is not list or len(write) != 4 or type(write[0]) is not str:
            raise _Mismatch(f"{write!r:.60} is no write")
        _int(write[1]), _int(write[2]), _int(write[3])
    return tuple(map(tuple, value))


# By the annotation as it is written: to evaluate them all would cost every process some milliseconds.
_READER_OF: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "int | None": _int_or_none,
    "bool": _exactly(bool),
    "str": _exactly(str),
    "bytes": _exactly(bytes),
    "dict[str, Any]": _exactly(dict),
    "tuple[PostedWrite, ...]": _writes,
}


def _values_of(cls: type[Frame]) -> Callable[[Frame], tuple[Any, ...]]:
    names = cls.__struct_fields__
    if not names:
        return lambda frame: ()
    if len(names) == 1:
        get = attrgetter(names[0])
        return lambda frame: (get(frame),)
    return attrgetter(*names)


_VALUES_OF = {cls: _values_of(cls) for cls, _ in TABLE.values()}
_READERS: dict[int, tuple[type[Frame], tuple[Callable[[Any], Any], ...]]] = {
    kind: (cls, tuple(_READER_OF[cls.__annotations__[name]] for name in cls.__struct_fields__))
    for kind, (cls, _) in TABLE.items()
}
