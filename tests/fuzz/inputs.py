"""Inputs made from a seed: random bytes, random instructions, both mutated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tests.fuzz.case import HEAD, MAX_CODE
from tests.insn.generate import Generator

CORPUS = Path(__file__).parent / "corpus"
PREFIXES = b"\x66\x67\xf0\xf2\xf3\x26\x2e\x36\x3e\x64\x65\x0f"
MOST_CHANGES = 4


def inputs(seed: int, corpus: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Without end; the same for a seed and a corpus."""
    rng = Random(seed)
    generator = Generator(seed)
    for number in range(1 << 30):
        kind = rng.randrange(8)
        if kind == 0:
            yield rng.randbytes(rng.randint(1, HEAD + MAX_CODE))
        elif kind < 3 and corpus:
            yield mutated(rng, rng.choice(corpus))
        else:
            code = b"".join(generator.family(8 * number + n).case.code() for n in range(rng.randint(1, 4)))
            data = rng.randbytes(HEAD) + code[:MAX_CODE]
            yield mutated(rng, data) if kind < 6 else data


def mutated(rng: Random, data: bytes) -> bytes:
    """A few bytes changed, inserted, removed or repeated."""
    out = bytearray(data)
    for _ in range(rng.randint(1, MOST_CHANGES)):
        place = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            out[place:place] = bytes((rng.choice(PREFIXES),))
        elif kind == 1:
            out[place:place] = rng.randbytes(rng.randint(1, 4))
        elif kind == 2:
            del out[place : place + rng.randint(1, 4)]
        elif kind == 3:
            out[place:place] = out[place : place + rng.randint(1, 8)]
        elif place < len(out):
            out[place] = out[place] ^ 1 << rng.randrange(8) if kind == 4 else rng.getrandbits(8)
    return bytes(out)


def read_corpus() -> list[bytes]:
    """The inputs that are kept, in the order of their names."""
    return [file.read_bytes() for file in sorted(CORPUS.iterdir())]
