"""The directory of one running machine: its sockets, its logs, and the lock that says it is alive.

`<runtime>/<machine>/`, where runtime is $BACKPLANE_RUNTIME_DIR, else $XDG_RUNTIME_DIR/backplane, else
/tmp/backplane-<uid>. The launcher holds a flock on `lock` as long as it lives, and the fork server with it; a
directory whose lock is free belongs to a dead machine and is removed by whoever notices. The messages of a
detached launcher are in `<runtime>/<machine>.log`, which stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import ConfigError

LOCK = "lock"  # holds the launcher's pid as text
CONTROL = "control.sock"
SOCKET_PATH_MAX = 107  # bytes in sun_path without the final zero [unix(7)]


def runtime_root(environment: Mapping[str, str] | None = None) -> Path:
    """Where run directories are; the directory itself may not exist yet."""
    environment = os.environ if environment is None else environment
    if own := environment.get("BACKPLANE_RUNTIME_DIR"):
        return Path(own).absolute()
    if xdg := environment.get("XDG_RUNTIME_DIR"):
        return Path(xdg) / "backplane"
    return Path(f"/tmp/backplane-{os.getuid()}")


class RunDir:
    """An existing run directory, locked for as long as this object is open."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.lock_fd = lock_fd
        self._left = False

    @classmethod
    def create(cls, machine: str, longest_file_name: str) -> RunDir:
        """Make and lock the directory; ConfigError when it can't be written or the machine runs already."""
        root = runtime_root()
        path = root / machine
        if len(os.fsencode(path / longest_file_name)) > SOCKET_PATH_MAX:
            problem = f"its path is too long for a socket (over {SOCKET_PATH_MAX} bytes)"
            raise ConfigError(path, "", problem, "set BACKPLANE_RUNTIME_DIR to a shorter directory")
        try:
            lock_fd = _lock_new(path)
        except OSError as e:
            remedy = "set BACKPLANE_RUNTIME_DIR to a directory that can be written"
            raise ConfigError(path, "", f"the run directory can't be made ({e.strerror})", remedy) from e
        if lock_fd is None:
            pid = launcher_pid(path)
            remedy = f"choose another name with --name, or stop it with `launcher down {machine}`"
            raise ConfigError(path, "", f"a machine named {machine!r} is running (launcher {pid})", remedy)
        _empty(path)
        return cls.adopt(path, lock_fd)

    @classmethod
    def adopt(cls, path: Path, lock_fd: int) -> RunDir:
        """Be the launcher of a locked directory."""
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, str(os.getpid()).encode(), 0)
        return cls(path, lock_fd)

    def leave(self) -> None:
        """Another has it now: nothing of it is removed."""
        self._left = True
        os.close(self.lock_fd)

    def remove(self) -> None:
        """Delete the directory, then release the lock."""
        if self._left:
            return
        _empty(self.path)
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink()
            self.path.rmdir()
        os.close(self.lock_fd)
        if "BACKPLANE_RUNTIME_DIR" not in os.environ:
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()  # the last machine takes the root along


def running_machines() -> list[Path]:
    """Run directories of live machines, by name; those of dead ones are removed on the way."""
    try:
        candidates = sorted(p for p in runtime_root().iterdir() if p.is_dir())
    except OSError:
        return []
    return [path for path in candidates if not remove_if_dead(path)]


def remove_if_dead(path: Path) -> bool:
    """Remove the directory of a machine whose launcher is gone; False when it lives."""
    try:
        fd = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    if not _try_lock(fd):
        os.close(fd)
        return False
    RunDir(path, fd).remove()
    return True


def launcher_pid(path: Path) -> int | None:
    """Pid of the launcher that holds a run directory, None where it has not said so yet."""
    try:
        return int((path / LOCK).read_text())
    except (OSError, ValueError):
        return None


def _make_root(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = root.stat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise PermissionError(1, f"{root} belongs to another user")


def _lock_new(path: Path) -> int | None:
    """A locked descriptor of path/lock, None when someone else holds it."""
    while True:
        _make_root(path.parent)
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the last owner of the directory, or of the root, has just removed it
            continue
        if not _try_lock(fd):
            os.close(fd)
            return None
        try:
            same = os.path.samestat(os.fstat(fd), (path / LOCK).stat())
        except FileNotFoundError:
            same = False
        if same:
            return fd
        os.close(fd)  # locked a file that its owner has just removed: again


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            from shutil import rmtree  # takes its time to import, and is seldom needed

            rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
