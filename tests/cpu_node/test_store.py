"""The store: what is in it is found again, whatever is wrong with it costs a line of log and nothing else."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_node import mode as modes
from cpu_node.cache import _RESERVE
from cpu_node.cpu import CR4_PSE, EAX, EBX
from cpu_node.kept import MAX_CODE, Kept, unpack
from cpu_node.line import PAGE
from cpu_node.store import MOST_FILES, SUFFIX, Store, version
from tests.cpu_node.board import CODE, MMIO, Board, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.test_kept import ENTRIES, PROGRAM, VA, page, translated
from tests.cpu_node.twice import aliased_board

TAG = bytes(range(32))
BODY = asm(PROGRAM, VA)


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


CLOCK = Clock()


def opened(folder: Path, tag: bytes = TAG, limit: int = 1 << 20) -> Store:
    return Store(folder, tag, CLOCK, limit)


def record(number: int = 0, **kind: object) -> bytes:
    """A record that differs from those of other numbers in its code."""
    return translated(code(number), ENTRIES, **kind).record()


def code(number: int) -> bytes:
    return BODY.replace(b"\x78\x56\x34\x12", number.to_bytes(4, "little"))


def found(store: Store, number: int = 0, **kind: object) -> Kept | None:
    return store.find(page(code(number), **kind))  # type: ignore[arg-type]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*{SUFFIX}"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture(autouse=True)
def _close(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stores hold descriptors; close what a test opened."""
    made: list[Store] = []
    original = Store.__init__

    def init(self: Store, *args: object, **kwargs: object) -> None:
        made.append(self)
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "__init__", init)
    yield
    for store in made:
        store.close()


# ---- files


def test_what_was_added_is_found_by_this_store_and_the_next(folder: Path) -> None:
    first = opened(folder)
    assert found(first) is None
    first.add([record(0), record(1)])
    for store in (first, opened(folder)):
        for number in (0, 1):
            kept = found(store, number)
            assert kept is not None
            assert number.to_bytes(4, "little") in kept.code
        assert found(store, 2) is None


def test_the_newest_record_that_fits_is_taken(folder: Path) -> None:
    first = opened(folder)
    first.add([translated(BODY).record()])
    first.add([translated(BODY, ENTRIES).record()])
    for store in (first, opened(folder)):
        kept = store.find(page(BODY))
        assert kept is not None
        assert len(kept.offsets) == len(translated(BODY, ENTRIES).line.host)


CHANGES = {
    "linear address": {"va": VA + PAGE},
    "user": {"mode": modes.USER},
    "no FPU": {"mode": modes.NO_FPU},
    "no SSE": {"mode": modes.NO_SSE},
    "RDTSC": {"mode": modes.TSC_SIMULATED},
    "verifying": {"verify": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_key(folder: Path, change: str) -> None:
    store = opened(folder)
    store.add([record()])
    assert found(store) is not None
    assert found(store, **CHANGES[change]) is None
    store.add([record(**CHANGES[change])])
    assert found(store, **CHANGES[change]) is not None


def test_another_version_sees_nothing(folder: Path) -> None:
    opened(folder).add([record()])
    assert found(opened(folder, bytes(32))) is None


def test_version_depends_on_sources_assembler_and_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tags = {version(["sse", "fpu"]), version(["fpu"])}
    assert version(["fpu", "sse"]) in tags
    monkeypatch.setattr("cpu_node.store.assembler_version", lambda: b"0")
    tags.add(version(["fpu"]))
    monkeypatch.setattr("cpu_node.store.__file__", str(tmp_path / "store.py"))
    for text in ("", "x = 1", "x = 2"):
        (tmp_path / "store.py").write_text(text)
        tags.add(version(["fpu"]))
    (tmp_path / "more.py").write_text("")
    tags.add(version(["fpu"]))
    assert len(tags) == 7


def test_many_files_become_one_that_holds_everything_once(folder: Path) -> None:
    for number in range(MOST_FILES):
        opened(folder).add([record(number), record(99)])
    assert len(files(folder)) == MOST_FILES
    opened(folder).add([record(MOST_FILES)])
    (file,) = files(folder)
    assert file.stat().st_size < (MOST_FILES + 3) * (len(record()) + 100)
    store = opened(folder)
    assert all(found(store, number) for number in (*range(MOST_FILES + 1), 99))


def test_what_was_used_last_stays_when_there_is_too_much(folder: Path) -> None:
    limit = 2 * MOST_FILES * (len(record()) + 200) // 2
    for number in range(MOST_FILES):
        opened(folder, limit=limit).add([record(number)])
    for more in range(20, 20 + MOST_FILES):
        store = opened(folder, limit=limit)
        assert found(store, 0) is not None  # used each time
        store.add([record(more)])
        store.close()
    store = opened(folder, limit=limit)
    assert found(store, 0) is not None
    assert found(store, 1) is None


def test_the_limit_holds_over_all_versions(folder: Path) -> None:
    limit = 5 * len(record())
    for number in range(30):
        store = opened(folder, bytes([number % 10]) * 32, limit)
        store.add([record(number)])
        store.close()
        assert sum(f.stat().st_size for f in files(folder)) <= limit
    assert found(opened(folder, bytes([9]) * 32, limit), 29) is not None


# ---- what may be wrong


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_damage_anywhere_is_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record(n) for n in range(6)])
    (file,) = files(folder)
    whole, rng = file.read_bytes(), random.Random(7)
    lost = 0
    for n in range(400):
        place = n if n < 60 else len(whole) - 1 - n if n < 120 else rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        caplog.clear()
        store = opened(folder)
        here = 0
        for number in range(6):
            kept = found(store, number)
            here += kept is None
            assert kept is None or kept.code == expected(number)
        assert len(warnings(caplog)) == 1
        assert here
        lost += here
        store.close()
    assert lost < 400 * 6  # most of a damaged file is of use


def expected(number: int) -> bytes:
    return unpack(record(number)).code


def test_files_cut_short(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record(n) for n in range(3)])
    (file,) = files(folder)
    whole = file.read_bytes()
    for length in [*range(80), *range(80, len(whole), 97)]:
        file.write_bytes(whole[:length])
        caplog.clear()
        store = opened(folder)
        assert found(store) is None
        assert len(warnings(caplog)) == 1
        store.close()


def test_file_that_is_cut_while_it_is_open(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record(n) for n in range(3)])
    store = opened(folder)
    os.truncate(files(folder)[0], 100)
    assert [found(store, n) for n in range(3)] == [None] * 3
    assert len(warnings(caplog)) == 1
    store.add([record(0)])
    assert found(store) is not None


def test_files_from_elsewhere(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder).add([record()])
    own = files(folder)[0].parent
    (own / f"zz{SUFFIX}").write_bytes(b"not ours" * 1000)
    (own / f"folder{SUFFIX}").mkdir()
    (own / f"link{SUFFIX}").symlink_to("/etc/passwd")
    os.mkfifo(own / f"pipe{SUFFIX}", 0o600)
    (own / "half-written.new").write_bytes(b"x" * 100)
    assert found(opened(folder)) is not None
    assert len(warnings(caplog)) == 1


def test_folder_of_somebody_else(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(folder).add([record()])
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    store = opened(folder)
    assert not store.usable
    assert found(store) is None
    store.add([record(1)])
    assert ["belongs to another user" in text for text in warnings(caplog)] == [True]


@pytest.mark.parametrize("what", ["folder", "version", "file"])
def test_what_others_may_write_to_is_not_run(
    folder: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    opened(folder).add([record()])
    (file,) = files(folder)
    target = {"folder": folder, "version": file.parent, "file": file}[what]
    target.chmod(target.stat().st_mode | 0o020)
    assert found(opened(folder)) is None
    assert ["can be written by others" in text for text in warnings(caplog)] == [True]


def test_made_for_the_user_alone(folder: Path) -> None:
    os.umask(os.umask(0))
    opened(folder).add([record()])
    (file,) = files(folder)
    assert [p.stat().st_mode & 0o777 for p in (folder, file.parent, file)] == [0o700, 0o700, 0o600]


def test_folder_that_is_a_link_is_not_followed(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert not opened(folder).usable
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("place", ["/proc/nothing/here", "/dev/null", "/dev/null/below"])
def test_folder_that_cannot_be(place: str, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(Path(place))
    store.add([record()])
    assert found(store) is None
    assert len(warnings(caplog)) == 1


@isolated
def test_disk_that_is_full(folder: Path) -> None:
    """No room: nothing half-written is left, and the store goes on."""
    store = opened(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    store.add([record()])
    assert list(files(folder)) == []
    assert list(folder.glob("*/*")) == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.add([record()])
    assert found(opened(folder)) is not None


def test_folder_removed_while_in_use(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(folder)
    store.add([record()])
    for file in files(folder):
        file.unlink()
    files_folder = next(p for p in folder.iterdir() if p.is_dir())
    files_folder.rmdir()
    assert found(store) is not None  # it is open
    store.add([record(1)])
    assert len(warnings(caplog)) == 1


# ---- several at once


def forked(body: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            body()  # type: ignore[operator]
        finally:
            os._exit(0)
    return pid


def test_writers_at_the_same_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every record of each of them is there in the end, and every file whole."""
    writers, rounds = 4, 2 * MOST_FILES

    def write(writer: int) -> None:
        for n in range(rounds):
            store = opened(folder)
            store.add([record(n, va=VA + writer * PAGE)])
            store.close()

    for pid in [forked(lambda w=w: write(w)) for w in range(writers)]:
        os.waitpid(pid, 0)
    store = opened(folder)
    missing = [(w, n) for w in range(writers) for n in range(rounds)
               if not found(store, n, va=VA + w * PAGE)]
    assert missing == []
    assert warnings(caplog) == []
    assert len(files(folder)) < writers * rounds


def test_writer_killed_at_any_moment(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was there stays, what is there is whole."""
    opened(folder).add([record(5)])
    rng = random.Random(3)

    def write() -> None:
        while True:
            store = opened(folder)
            store.add([record(n) for n in range(8)])
            store.close()

    for _ in range(15):
        pid = forked(write)
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        store = opened(folder)
        assert found(store, 5) is not None
        store.close()
    assert warnings(caplog) == []


# ---- in the engine

GUEST = f"""
    mov ebp, 3
again:
    mov esi, {CODE + 0x1000:#x}
    call esi
    mov esi, {CODE + 0x2FFD:#x}
    call esi
    add ebx, eax
    in al, 0x10
    mov edx, [{MMIO:#x}]
    test ebp, 1
    jz odd
    add ebx, 7
odd:
    dec ebp
    jnz again
    hlt"""
SECOND = "mov ecx, 10\nloop1: inc eax\ncall inner\nloop loop1\nret\n.align 512\ninner: add eax, ebx\nret"
CROSSING = "mov eax, 0x11223344\nret"


def prepared(board: Board, store: Store) -> Board:
    cache = board.engine.contexts.cache
    cache.store = None
    board.ram[:] = bytes(len(board.ram))
    board.forget()
    board.paging(CR4_PSE)
    cache.store = store
    board.ram[CODE + 0x1000 : CODE + 0x1000 + 4096] = asm(SECOND, CODE + 0x1000).ljust(4096, b"\xf4")
    crossing = asm(CROSSING, CODE + 0x2FFD)
    board.ram[CODE + 0x2FFD : CODE + 0x2FFD + len(crossing)] = crossing
    return board


def outcome(board: Board) -> tuple[object, ...]:
    state = (list(board.regs), board.cpu.eip, board.cpu.eflags & 0xCD5, board.ports[:], board.mmio[:])
    board.ports.clear()
    board.mmio.clear()
    return state


@isolated
def test_second_start_translates_nothing_and_does_the_same(folder: Path) -> None:
    board = Board()
    cache = board.engine.contexts.cache
    states, translated_here = [], []
    for _ in range(3):
        store = opened(folder)
        prepared(board, store)
        before = cache.instructions
        board.run(GUEST)
        states.append(outcome(board))
        translated_here.append(cache.instructions - before)
        cache.keep()
    assert states[0] == states[1] == states[2]
    assert translated_here[0] > 20
    assert translated_here[1:] == [0, 0]
    assert len(files(folder)) == 1  # nothing new, nothing written


@isolated
def test_faults_and_roll_back_in_code_taken_over(folder: Path) -> None:
    """A page fault in the middle of taken-over code finds its guest instruction."""
    board = Board()
    states = []
    for _ in range(2):
        store = opened(folder)
        prepared(board, store)
        board.gate(14, CODE + 0x3000)
        board.ram[CODE + 0x3000 : CODE + 0x3010] = asm("mov edi, [esp+4]\nhlt").ljust(16, b"\x90")
        board.run("mov eax, 5\nmov esi, 0x70000000\npush eax\nadd eax, [esi]\ninc ebx\nhlt")
        states.append(outcome(board))
        board.engine.contexts.cache.keep()
    assert states[0] == states[1]
    assert board.regs[7] == CODE + 11  # the ADD
    assert board.engine.contexts.cache.taken_over > 0


@isolated
def test_taken_over_code_that_is_changed(folder: Path) -> None:
    """Self-modifying code, on a page that becomes mixed: the same with and without what was kept."""
    text = """
        mov ecx, 40
        xor ebx, ebx
    again:
        mov [victim+1], ecx
    victim:
        mov eax, 0
        add ebx, eax
        loop again
        hlt"""
    board = aliased_board()
    for _ in range(3):
        store = opened(folder)
        prepared(board, store)
        board.run(text)
        assert board.regs[EBX] == 40 * 41 // 2
        assert board.regs[EAX] == 1
        board.engine.contexts.cache.keep()
        store.close()
    assert board.engine.contexts.cache.taken_over > 0


@isolated
def test_flush_keeps_what_it_drops(folder: Path) -> None:
    board = Board()
    prepared(board, opened(folder))
    cache = board.engine.contexts.cache
    board.run(GUEST)
    state, before = outcome(board), cache.instructions
    assert before
    board.engine.contexts.flush_cache()
    prepared_again = (list(board.regs), board.cpu.eip)
    assert prepared_again == state[:2]
    board.regs[EBX] = 0
    board.run(None)
    assert cache.instructions == before


@isolated
def test_dead_translations_do_not_fill_the_store(folder: Path) -> None:
    """A compiler in the guest that writes function after function to one place."""
    board = Board()
    store = opened(folder, limit=1 << 30)
    prepared(board, store)
    for n in range(200):
        board.load(f"mov eax, {n}\nhlt", CODE)
        board.engine.contexts.writes.clear()  # or the page would be mixed
        board.run(None)
    board.engine.contexts.cache.keep()
    (file,) = files(folder)
    assert file.stat().st_size < 5000


def test_lines_of_the_store_are_never_larger_than_allowed() -> None:
    assert MAX_CODE <= _RESERVE


@isolated
def test_kept_in_portions(folder: Path) -> None:
    board = Board()
    prepared(board, opened(folder))
    board.run(GUEST)
    cache = board.engine.contexts.cache
    assert not cache.keep(most=200)
    assert cache.keep()
    assert cache.keep()
    assert len(files(folder)) == 2
    before = cache.instructions
    prepared(board, opened(folder))
    board.run(GUEST)
    assert cache.instructions == before


def test_many_files_stay_many_while_there_is_no_time(folder: Path) -> None:
    store = opened(folder)
    for number in range(MOST_FILES + 3):
        store.add([record(number)], tidy=False)
    assert len(files(folder)) == MOST_FILES + 3
    store.add([record(50)])
    assert len(files(folder)) == 1
    assert all(found(opened(folder), number) for number in (0, MOST_FILES + 2, 50))


@isolated
def test_error_while_keeping_costs_nothing_else(folder: Path) -> None:
    board = Board()
    prepared(board, opened(folder))
    board.run(GUEST)
    cache = board.engine.contexts.cache
    cache._chunks[0].line.entries[0] = -1  # what can't be packed
    assert cache.keep()
    assert cache.store is None
    board.engine.contexts.flush_cache()
