"""The back end on seccomp: a child traps into a handler of its own, which stops it; no ptrace is needed.

Every event is a signal in the child: SIGSYS for system calls, by a seccomp filter (seccomp_image.py), the
fault signals, SIGUSR1 when the node wants it back. The kernel writes the whole context into memory shared
with the node; the handler stops its process, and wait4() tells the node, which reads it there and writes what
the handler is to go on with. Another process, the mapper, makes the mappings while the child is stopped.

Against hostile code in the child: that it is stopped is the kernel's word, and nothing is done before. What
it writes into the frame is no more than the registers it has anyway; addresses found there are checked. It
can call kill(itself, SIGSTOP), which is a stop like others, and rt_sigprocmask to unblock all signals, which
are unblocked. It can't map anything: the mapper is stopped while it runs, reads a list that the child can't
write, and keeps what it needs in registers.
Left out: breakpoints (code that needs them is translated).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time

from cpu_node.direct import exits, image
from cpu_node.direct import seccomp_image as at
from cpu_node.direct.clock import cpu_ns
from cpu_node.direct.exits import FX_USED, USER_CODE32, USER_CODE64
from cpu_node.direct.spawn_unsafe import RAM_FD, CallList, Program

_WALL = 0x4000_0000
_RF = 0x1_0000
_EFLAGS_FIXED = 0x202
_MAP_SHARED, _MAP_FIXED, _MAP_POPULATE = 0x01, 0x10, 0x8000
# struct ucontext [asm/ucontext.h, asm/sigcontext.h]
_UC_REGS, _UC_MASK = 104, 296
# rdi rsi rbp rbx rdx rax rcx rsp, rip eflags, cs gs fs ss, err trapno oldmask cr2, fpstate
_REGS = struct.Struct("<8Q2Q4H4QQ")
_RETURN = struct.Struct("<13Q")
_UC_SIZE = _UC_MASK + 8
_XSTATE_BV, _XSTATE_END = 512, 576  # the header behind the FXSAVE image says which parts are used
_XSTATE_MAGIC_AT, _XSTATE_MAGIC = 464, 0x4650_5853  # there is one, and more state behind it
_FP_ALIGNMENT = 64
_SI_CODE = 8
_TRAP_OVERFLOW, _TRAP_PAGE_FAULT, _TRAP_TRACE, _PF_WRITE = 4, 14, 2, 2
_CALL = signal.SIGUSR1
_OBEY_NS = 100_000_000  # of its own processor time, to stop when called
_STRAY_STOPS = 3


class SeccompBackend:
    """Makes children of the calling thread."""

    name = "seccomp"

    def __init__(self, ram_fd: int) -> None:
        self.ram_fd = ram_fd
        self._program = Program(at.program(os.getpid()))

    def spawn(self) -> SeccompChild:
        """Raises DirectUnavailable."""
        try:
            return SeccompChild(self._program, self.ram_fd)
        except OSError as error:
            raise exits.DirectUnavailable(f"seccomp: {' '.join(str(error).split())}") from error


class SeccompChild:
    """One address space: the process that runs in it and the one that maps it."""

    breakpoints = 0

    def __init__(self, program: Program, ram_fd: int) -> None:
        self._list = CallList()
        self._queue: list[tuple[int, ...]] = []
        frame_fd = os.memfd_create("backplane-frame", os.MFD_CLOEXEC)
        self.mapper = -1
        self._reaped: set[int] = set()
        try:
            os.ftruncate(frame_fd, at.FRAME_SIZE)
            self._frame = mmap.mmap(frame_fd, at.FRAME_SIZE)
            self.pid = program.spawn((ram_fd, self._list.fd, frame_fd))
        finally:
            os.close(frame_fd)
        self._closed = False
        try:
            self._make_ready()
        except BaseException:
            self.close()
            raise

    def _make_ready(self) -> None:
        self._wait_stopped(self.pid)
        self._list.write_bytes(at.SETUP - image.LIST, at.setup(self.pid))
        self._continue(self.pid)
        self._wait_stopped(self.pid)
        self.mapper = self._word(at.MAPPER)
        self._wait_stopped(self.mapper)

    # ---- processes

    def _wait_stopped(self, pid: int) -> None:
        _, status = os.waitpid(pid, _WALL | os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self._reaped.add(pid)
            raise ProcessLookupError(f"a child's process ended with status {status:#x}")

    @staticmethod
    def _continue(pid: int) -> None:
        os.kill(pid, signal.SIGCONT)

    def _word(self, place: int) -> int:
        return int.from_bytes(self._frame[place : place + 8], "little")

    # ---- mapping

    def map(self, va: int, length: int, prot: int, pa: int, populate: bool) -> None:
        flags = _MAP_SHARED | _MAP_FIXED | (_MAP_POPULATE if populate else 0)
        self._queue.append((image.SYS_MMAP, va, length, prot, flags, RAM_FD, pa))

    def protect(self, va: int, length: int, prot: int) -> None:
        self._queue.append((image.SYS_MPROTECT, va, length, prot))

    def unmap(self, va: int, length: int) -> None:
        self._queue.append((image.SYS_MUNMAP, va, length))

    def _flush(self) -> None:
        while self._queue:
            batch, self._queue = self._queue[: at.CAPACITY], self._queue[at.CAPACITY :]
            self._list.write(batch)
            self._list.write_bytes(at.SETUP - image.LIST + at.COUNT, len(batch).to_bytes(8, "little"))
            self._continue(self.mapper)
            self._wait_stopped(self.mapper)
            result = self._word(at.RESULT)
            if result:
                self._queue.clear()
                failed = batch[len(batch) - self._word(at.LEFT) - 1]
                raise exits.MapRefused(f"{failed}: errno {(1 << 64) - result}")

    def set_breakpoints(self, addresses: tuple[int, ...]) -> None:
        if addresses:
            raise ValueError("this back end has no breakpoints")

    # ---- running

    def run(self, state: exits.GuestState, wait: exits.Wait) -> exits.Exit:
        ran = False
        try:
            self._look_alive()
            if self._queue:
                self._flush()
            self._load(state)
            sequence = self._word(at.SEQUENCE)
            self._continue(self.pid)
            ran = True
            status = wait(self.pid)
            if status is None:
                os.kill(self.pid, _CALL)
                status = self._obeyed()
            strays = 0
            while os.WIFSTOPPED(status) and self._word(at.SEQUENCE) == sequence:
                strays += 1  # stopped by somebody else, its registers are nowhere
                if strays > _STRAY_STOPS:
                    os.kill(self.pid, signal.SIGKILL)
                os.kill(self.pid, _CALL)
                self._continue(self.pid)
                status = self._obeyed()
            if not os.WIFSTOPPED(status):
                self._reaped.add(self.pid)
                return exits.Gone(f"it ended with status {status:#x}", True)
            return self._exit(state)
        except (ProcessLookupError, ChildProcessError) as error:
            return exits.Gone(str(error), ran)

    def _look_alive(self) -> None:
        """Raises ProcessLookupError where it has died since it stopped."""
        pid, status = os.waitpid(self.pid, _WALL | os.WNOHANG)
        if pid:
            self._reaped.add(pid)
            raise ProcessLookupError(f"it ended with status {status:#x}")

    def _obeyed(self) -> int:
        """Wait for the stop that it has been called to.

        No code can put that off: the signal is blocked in the handler alone, for some dozen instructions. One
        that runs on all the same is killed.
        """
        begin = cpu_ns(self.pid)
        pauses = 0
        while True:
            pid, status = os.waitpid(self.pid, _WALL | os.WUNTRACED | os.WNOHANG)
            if pid:
                return status
            if cpu_ns(self.pid) - begin > _OBEY_NS:
                os.kill(self.pid, signal.SIGKILL)
                return os.waitpid(self.pid, _WALL)[1]
            time.sleep(0 if pauses < 20 else 0.0002)
            pauses += 1

    def _context(self) -> tuple[int, int]:
        """Offsets in the frame of the ucontext and of the FXSAVE image. Raises ProcessLookupError."""
        uc = self._word(at.CONTEXT) - at.FRAME
        if not image.PAGE <= uc <= at.FRAME_SIZE - _UC_SIZE:
            raise ProcessLookupError("its signal frame lies elsewhere")
        fp = _REGS.unpack_from(self._frame, uc + _UC_REGS)[-1] - at.FRAME
        if not image.PAGE <= fp <= at.FRAME_SIZE - _XSTATE_END or fp % _FP_ALIGNMENT:
            raise ProcessLookupError("its floating-point frame lies elsewhere")
        return uc, fp

    def _load(self, state: exits.GuestState) -> None:
        frame = self._frame
        _, fp = self._context()
        eax, ecx, edx, ebx, esp, ebp, esi, edi = state.regs
        _RETURN.pack_into(frame, at.RETURN, _EFLAGS_FIXED, edi, esi, ebp, edx, ecx, eax, ebx,
                          state.eip, USER_CODE32, state.eflags | _EFLAGS_FIXED, esp, state.ss)
        magic = int.from_bytes(frame[fp + _XSTATE_MAGIC_AT : fp + _XSTATE_MAGIC_AT + 4], "little")
        struct.pack_into("<2Q", frame, at.FP_STATE, fp + at.FRAME, magic == _XSTATE_MAGIC)
        fx = state.fx[:FX_USED]
        if fx != frame[fp : fp + FX_USED]:
            frame[fp : fp + FX_USED] = fx
        frame[fp + _XSTATE_BV] |= 3
        struct.pack_into("<6Q", frame, at.DS, state.ds, state.es, state.fs, state.gs, state.fs_base,
                         state.gs_base)

    def _exit(self, state: exits.GuestState) -> exits.Exit:
        frame = self._frame
        uc, fp = self._context()
        number, _, info, _, ds, es, fs, gs, fs_base, gs_base, *_ = at.WORDS.unpack_from(frame, 0)
        (edi, esi, ebp, ebx, edx, eax, ecx, esp, eip, eflags, cs, _, _, ss, error, trap, _, cr2, _
         ) = _REGS.unpack_from(frame, uc + _UC_REGS)
        place = info - at.FRAME + _SI_CODE
        if not 0 <= place <= at.FRAME_SIZE - 4:
            raise ProcessLookupError("its signal frame lies elsewhere")
        (code,) = struct.unpack_from("<i", frame, place)
        if code <= 0 and cs == USER_CODE64 and eip in at.RETURNING:
            return exits.Kicked()  # before anything ran: `state` is what it was loaded from
        state.regs[:] = [value & 0xFFFF_FFFF for value in (eax, ecx, edx, ebx, esp, ebp, esi, edi)]
        state.eip, state.eflags = eip & 0xFFFF_FFFF, eflags & ~_RF
        state.ss, state.ds, state.es, state.fs, state.gs = ss, ds, es, fs, gs
        state.fs_base, state.gs_base = fs_base, gs_base
        state.fx[:FX_USED] = frame[fp : fp + FX_USED]
        if cs != USER_CODE32:
            return exits.ForeignMode(cs)
        if code <= 0:  # from kill(): the node's, or somebody's
            return exits.Kicked()
        match number:
            case signal.SIGSYS:
                return exits.SystemCall()
            case signal.SIGSEGV if trap == _TRAP_PAGE_FAULT:
                return exits.PageFault(cr2 & 0xFFFF_FFFF, bool(error & _PF_WRITE))
            case signal.SIGSEGV if trap == _TRAP_OVERFLOW:
                return exits.SoftwareTrap()
            case signal.SIGTRAP:
                return exits.SingleStep() if code == _TRAP_TRACE else exits.SoftwareTrap()
            case signal.SIGSEGV | signal.SIGBUS | signal.SIGFPE | signal.SIGILL:
                return exits.Fault()
            case _:
                return exits.Kicked()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for pid in (self.pid, self.mapper):
            if pid > 0 and pid not in self._reaped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, _WALL)
        self._frame.close()
        self._list.close()
