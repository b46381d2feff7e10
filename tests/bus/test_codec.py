"""Every frame survives the wire; whatever else arrives is a BadFrame, never a crash."""

from __future__ import annotations

import contextlib
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bus.frames
from bus.codec import BadFrame, decode, encode
from bus.frames import KIND_OF, PROTOCOL_VERSION, TABLE, Frame, Header, PostedWrite, Read, Refused

WORD = st.integers(0, 2**64 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | WORD | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: WORD,
    int | None: st.none() | WORD,
    bool: st.booleans(),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
    dict[str, Any]: st.dictionaries(st.text(max_size=6), PLAIN, max_size=4),
    tuple[PostedWrite, ...]: st.lists(st.tuples(st.text(max_size=5), WORD, WORD, WORD), max_size=5).map(
        tuple
    ),
}


def frames() -> st.SearchStrategy[Frame]:
    def of(cls: type[Frame]) -> st.SearchStrategy[Frame]:
        hints = get_type_hints(cls)
        return st.builds(cls, **{name: BY_TYPE[hints[name]] for name in cls.__struct_fields__})

    return st.one_of([of(cls) for cls, _ in TABLE.values()])


@given(frame=frames(), seq=WORD, ack=WORD, trace=WORD, span=WORD, clock=WORD)
def test_a_frame_survives_the_wire(
    frame: Frame, seq: int, ack: int, trace: int, span: int, clock: int
) -> None:
    header = Header(seq, ack, trace, span, clock)
    assert decode(encode(frame, *header)) == (header, frame)


@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_a_bad_frame(data: bytes) -> None:
    with contextlib.suppress(BadFrame):
        decode(data)


@given(items=st.lists(PLAIN, max_size=12))
def test_any_msgpack_array_is_a_frame_or_a_bad_frame(items: list[Any]) -> None:
    with contextlib.suppress(BadFrame):
        decode(msgpack.packb([PROTOCOL_VERSION, *items]))


@given(frame=frames(), cut=st.integers(0, 200))
def test_a_cut_frame_is_a_bad_frame(frame: Frame, cut: int) -> None:
    data = encode(frame, 1, 2, 3, 4, 5)
    if cut < len(data):
        with pytest.raises(BadFrame):
            decode(data[:cut])


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([PROTOCOL_VERSION + 1, 1, 1, 0, 0, 0, 0, "r", 0, 1], "protocol version"),
        ([PROTOCOL_VERSION, 999, 1, 0, 0, 0, 0], "unknown kind"),
        ([PROTOCOL_VERSION, "1", 1, 0, 0, 0, 0], "unknown kind"),
        ([PROTOCOL_VERSION, 1, 1, 0, 0, 0, 0, "r", 0], "4 fields"),
        ([PROTOCOL_VERSION, 1, 1, 0, 0, 0, 0, "r", -1, 1, []], "unsigned"),
        ([PROTOCOL_VERSION, 1, 1, 0, 0, 0, 0, "r", True, 1, []], "unsigned"),
        ([PROTOCOL_VERSION, 1, 1, 0, 0, 0, 0, 7, 0, 1, []], "no str"),
        ([PROTOCOL_VERSION, 5, 1, 0, 0, 0, 0, [["r", 0, 1]]], "no write"),
        ([PROTOCOL_VERSION, 16, 1, 0, 0, 0, 0, 4, 1, "uart0.intr"], "no bool"),
        ([PROTOCOL_VERSION, 1, -1, 0, 0, 0, 0, "r", 0, 1], "header"),
        ([PROTOCOL_VERSION], "header"),
    ],
)
def test_refusals_say_why(items: list[Any], words: str) -> None:
    with pytest.raises(BadFrame, match=words):
        decode(msgpack.packb(items))


def test_a_bad_frame_with_a_good_header_keeps_it_for_the_answer() -> None:
    with pytest.raises(BadFrame) as caught:
        decode(msgpack.packb([PROTOCOL_VERSION, 999, 5, 6, 7, 8, 9]))
    assert caught.value.header == Header(5, 6, 7, 8, 9)


def test_ids_are_one_to_one_and_every_message_is_in_the_table() -> None:
    assert len(KIND_OF) == len(TABLE)
    declared = {cls for cls in vars(bus.frames).values() if isinstance(cls, type) and issubclass(cls, Frame)}
    assert {cls for cls, _ in TABLE.values()} == declared - {Frame}


def test_a_request_has_its_reply_and_all_have_docstrings() -> None:
    replies = {cls.__name__ for cls, direction in TABLE.values() if direction == "reply"}
    for cls, direction in TABLE.values():
        assert cls.__doc__
        if direction == "request" and cls.__name__ != "Ping":
            assert f"{cls.__name__}Reply" in replies


def test_frames_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Read("regs", 0, 1).offset = 3  # type: ignore[misc]
    assert Refused("x") == Refused("x")
