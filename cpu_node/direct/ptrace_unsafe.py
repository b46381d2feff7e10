"""The back end on ptrace: a child is a tracee under PTRACE_SYSEMU, each event a stop (16 to 35 us).

Every system call that code in a child makes, by whatever instruction and in whatever mode, is a stop, and is
not executed. The only exception are runs of the trampoline (image.py), which the tracer starts with registers
of its own making, and which end in a stop before any code of the guest's goes on.
Sources: ptrace(2); Linux arch/x86/kernel/ptrace.c (which registers may be set), entry/syscall_32.c.
Left out: the error code and trap number of a fault: ptrace doesn't show them. So a page fault may be a read
or a write, and what is neither page fault nor trap is just a fault.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from ctypes import addressof, c_char

from ptrace import PtraceError
from ptrace.binding import func
from ptrace.binding.linux_struct import siginfo, user_fpregs_struct, user_regs_struct

from cpu_node.direct import exits, image
from cpu_node.direct.exits import FX_USED, USER_CODE32, USER_CODE64, USER_DATA
from cpu_node.direct.spawn_unsafe import LIST_FD, RAM_FD, CallList, Program

_SYSEMU, _SEIZE, _INTERRUPT, _CONT = 31, 0x4206, 0x4207, 7  # ptrace requests
_GETREGS, _SETREGS, _GETFPREGS, _SETFPREGS, _GETSIGINFO, _PEEKSIGINFO = 12, 13, 14, 15, 0x4202, 0x4209
_O_EXITKILL = 0x0010_0000
_WALL = 0x4000_0000
_SYSCALL_STOP = int(signal.SIGTRAP) | 0x80
_SEGV_MAPERR, _SEGV_ACCERR, _SEGV_PKUERR = 1, 2, 4
_TRAP_TRACE, _TRAP_HWBKPT = 2, 4  # si_code of SIGTRAP; others are of INT3 and INT1
_POKEUSER, _DEBUG_REGISTERS, _DR7 = 6, 848, 7  # offset of u_debugreg in struct user [asm/user_64.h]
_MAP_SHARED, _MAP_FIXED, _MAP_POPULATE, _PROT_READ = 0x01, 0x10, 0x8000, 1
_TRAMPOLINE_ENDS = frozenset((int(signal.SIGTRAP), int(signal.SIGILL), int(signal.SIGSEGV)))
_BATCH = image.LIST_CAPACITY - 1
_RF = 0x1_0000
_EFLAGS_FIXED = 0x202
_NO_RESTART = (1 << 64) - 1  # orig_rax: in no system call

# struct user_regs_struct in the order of the kernel [asm/user_64.h]
_REGS = struct.Struct("<27Q")
(_RBP, _RBX, _RAX, _RCX, _RDX, _RSI, _RDI, _ORIG, _RIP, _CS, _EFLAGS, _RSP, _SS, _FS_BASE, _GS_BASE, _DS, _ES,
 _FS, _GS) = (4, 5, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26)
_R12, _R13 = 3, 2
_PEEK = struct.Struct("<QIi")  # struct ptrace_peeksiginfo_args: from, of the thread's own signals, how many
_Request = tuple[int, ...]


class PtraceBackend:
    """Makes children of the calling thread."""

    name = "ptrace"

    def __init__(self, ram_fd: int) -> None:
        self.ram_fd = ram_fd
        self._program = Program(image.ptrace_program(os.getpid()))

    def spawn(self) -> PtraceChild:
        """Raises DirectUnavailable."""
        try:
            return PtraceChild(self._program, self.ram_fd)
        except (OSError, PtraceError) as error:
            raise exits.DirectUnavailable(f"ptrace: {' '.join(str(error).split())}") from error


class PtraceChild:
    """One tracee."""

    breakpoints = 4

    def __init__(self, program: Program, ram_fd: int) -> None:
        self._list = CallList()
        self._queue: list[_Request] = []
        self._registers = user_regs_struct()
        self._registers_ha = addressof(self._registers)
        self._regs = memoryview(self._registers).cast("B")
        self._fpregs = user_fpregs_struct()
        self._fpregs_ha = addressof(self._fpregs)
        self._fx = memoryview(self._fpregs).cast("B")
        self._fx_in_child = b""
        self._siginfo = siginfo()
        self._siginfo_ha = addressof(self._siginfo)
        peek = (c_char * _PEEK.size)()
        self._peek, self._peek_ha = memoryview(peek).cast("B"), addressof(peek)
        self._reaped = False
        self._breakpoints: tuple[int, ...] = ()
        self._breakpoints_set = True
        self.stops = 0
        self.pid = program.spawn((ram_fd, self._list.fd))
        try:
            self._take_over()
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        """Seize the process and empty its address space but for trampoline and list."""
        func.ptrace(_SEIZE, self.pid, 0, _O_EXITKILL | func.PTRACE_O_TRACESYSGOOD)
        func.ptrace(_INTERRUPT, self.pid, 0, 0)
        self._stopped()
        args = (image.LIST, image.LIST_SIZE, _PROT_READ, _MAP_SHARED | _MAP_FIXED, LIST_FD, 0)
        self._registers.r10, self._registers.r8, self._registers.r9 = args[3:]
        self._set(_RDI, args[0], _RSI, args[1], _RDX, args[2])
        if self._trampoline(image.GADGET, image.SYS_MMAP) != signal.SIGTRAP:
            raise OSError("the child's process did not start as it should")
        name = self._list.write_bytes(image.LIST_SIZE - 16, b"backplane-user\0")
        behind_list = image.LIST + image.LIST_SIZE
        self._queue += [
            (image.SYS_PRCTL, image.PR_SET_PDEATHSIG, image.SIGKILL),
            (image.SYS_PRCTL, image.PR_SET_NAME, name),
            (image.SYS_CLOSE_RANGE, RAM_FD + 1, 0xFFFF_FFFF),
            (image.SYS_MUNMAP, 0, image.TRAMPOLINE),
            (image.SYS_MUNMAP, image.TRAMPOLINE + image.PAGE, image.LIST - image.TRAMPOLINE - image.PAGE),
            (image.SYS_MUNMAP, behind_list, image.USER_END - behind_list),
        ]
        self._flush()

    # ---- mapping

    def map(self, va: int, length: int, prot: int, pa: int, populate: bool) -> None:
        flags = _MAP_SHARED | _MAP_FIXED | (_MAP_POPULATE if populate else 0)
        self._queue.append((image.SYS_MMAP, va, length, prot, flags, RAM_FD, pa))

    def protect(self, va: int, length: int, prot: int) -> None:
        self._queue.append((image.SYS_MPROTECT, va, length, prot))

    def unmap(self, va: int, length: int) -> None:
        self._queue.append((image.SYS_MUNMAP, va, length))

    def _flush(self) -> None:
        """Have the queue done by the trampoline."""
        while self._queue:
            batch, self._queue = self._queue[:_BATCH], self._queue[_BATCH:]
            self._list.write(batch)
            self._set(_R12, image.LIST, _R13, len(batch))
            if self._trampoline(image.LIST_LOOP, 0) != signal.SIGTRAP:
                done = len(batch) - self._get(_R13)
                self._queue.clear()
                raise exits.MapRefused(f"{batch[done]}: errno {(1 << 64) - self._get(_RAX)}")

    def _trampoline(self, entry: int, rax: int) -> int:
        """Run code of image.py from registers set so far; the signal that ended it."""
        self._set(_RIP, entry, _RAX, rax, _CS, USER_CODE64, _SS, USER_DATA, _EFLAGS, _EFLAGS_FIXED,
                  _ORIG, _NO_RESTART, _DS, 0, _ES, 0, _FS, 0, _GS, 0)
        func.ptrace(_SETREGS, self.pid, 0, self._registers_ha)
        while True:
            func.ptrace(_CONT, self.pid, 0, 0)
            number = self._stopped()
            if number in _TRAMPOLINE_ENDS:  # else an interrupt that came late, or a signal from outside
                func.ptrace(_GETREGS, self.pid, 0, self._registers_ha)
                return number

    def _set(self, *pairs: int) -> None:
        regs = self._regs
        for index in range(0, len(pairs), 2):
            place = 8 * pairs[index]
            regs[place : place + 8] = pairs[index + 1].to_bytes(8, "little")

    def _get(self, index: int) -> int:
        return int.from_bytes(self._regs[8 * index : 8 * index + 8], "little")

    def _stopped(self) -> int:
        """Wait for the next stop; its signal, 0 for an event. Raises ProcessLookupError when it has died."""
        _, status = os.waitpid(self.pid, _WALL)
        if not os.WIFSTOPPED(status):
            self._reaped = True
            raise ProcessLookupError(f"child ended with status {status:#x}")
        return 0 if status >> 16 else os.WSTOPSIG(status)

    # ---- running

    def set_breakpoints(self, addresses: tuple[int, ...]) -> None:
        self._breakpoints, self._breakpoints_set = addresses, False

    def _arm_breakpoints(self) -> None:
        """Into DR0 to DR3: execution, enabled for this task [SDM vol. 3 17.2.4]."""
        self._breakpoints_set = True
        func.ptrace(_POKEUSER, self.pid, _DEBUG_REGISTERS + 8 * _DR7, 0)
        for index, address in enumerate(self._breakpoints):
            func.ptrace(_POKEUSER, self.pid, _DEBUG_REGISTERS + 8 * index, address)
        enabled = sum(1 << 2 * index for index in range(len(self._breakpoints)))
        func.ptrace(_POKEUSER, self.pid, _DEBUG_REGISTERS + 8 * _DR7, enabled)

    def run(self, state: exits.GuestState, wait: exits.Wait) -> exits.Exit:
        pid, ran = self.pid, False
        try:
            if self._queue:
                self._flush()
            if not self._breakpoints_set:
                self._arm_breakpoints()
            eax, ecx, edx, ebx, esp, ebp, esi, edi = state.regs
            _REGS.pack_into(
                self._regs, 0, 0, 0, 0, 0, ebp, ebx, 0, 0, 0, 0, eax, ecx, edx, esi, edi, _NO_RESTART,
                state.eip, USER_CODE32, state.eflags | _EFLAGS_FIXED, esp, state.ss,
                state.fs_base, state.gs_base, state.ds, state.es, state.fs, state.gs)
            func.ptrace(_SETREGS, pid, 0, self._registers_ha)
            fx = state.fx[:FX_USED]
            if fx != self._fx_in_child:
                func.ptrace(_GETFPREGS, pid, 0, self._fpregs_ha)
                self._fx[:FX_USED] = fx
                func.ptrace(_SETFPREGS, pid, 0, self._fpregs_ha)
            func.ptrace(_SYSEMU, pid, 0, 0)
            ran = True
            status = wait(pid)
            if status is None:
                func.ptrace(_INTERRUPT, pid, 0, 0)
                _, status = os.waitpid(pid, _WALL)
            if status >> 16 and self._signal_pending():
                # A fault happened as the interrupt came. It is reported next, before any instruction.
                func.ptrace(_SYSEMU, pid, 0, 0)
                _, status = os.waitpid(pid, _WALL)
            self.stops += 1
            if not os.WIFSTOPPED(status):
                self._reaped = True
                return exits.Gone(f"it ended with status {status:#x}", True)
            func.ptrace(_GETREGS, pid, 0, self._registers_ha)
            func.ptrace(_GETFPREGS, pid, 0, self._fpregs_ha)
            return self._exit(state, status)
        except (ProcessLookupError, PtraceError) as error:
            return exits.Gone(" ".join(str(error).split()), ran)

    def _signal_pending(self) -> bool:
        _PEEK.pack_into(self._peek, 0, 0, 0, 1)
        return bool(func.ptrace(_PEEKSIGINFO, self.pid, self._peek_ha, self._siginfo_ha))

    def _exit(self, state: exits.GuestState, status: int) -> exits.Exit:
        regs = _REGS.unpack(self._regs)
        number = status >> 8 & 0xFF
        eax = regs[_ORIG] if number == _SYSCALL_STOP else regs[_RAX]
        general = (eax, regs[_RCX], regs[_RDX], regs[_RBX], regs[_RSP], regs[_RBP], regs[_RSI], regs[_RDI])
        state.regs[:] = [value & 0xFFFF_FFFF for value in general]
        state.eip = regs[_RIP] & 0xFFFF_FFFF
        state.eflags = regs[_EFLAGS] & ~_RF
        state.ss, state.ds, state.es = regs[_SS], regs[_DS], regs[_ES]
        state.fs, state.fs_base = regs[_FS], regs[_FS_BASE]
        state.gs, state.gs_base = regs[_GS], regs[_GS_BASE]
        self._fx_in_child = bytes(self._fx[:FX_USED])
        state.fx[:FX_USED] = self._fx_in_child
        if regs[_CS] != USER_CODE32:
            return exits.ForeignMode(regs[_CS])
        if number == _SYSCALL_STOP:
            return exits.SystemCall()
        if status >> 16:  # a ptrace event: our interrupt
            return exits.Kicked()
        match number:
            case signal.SIGSEGV | signal.SIGBUS | signal.SIGTRAP:
                return self._explained(number)
            case signal.SIGFPE | signal.SIGILL:
                return exits.Fault()
            case _:  # somebody sent it; it goes no further
                return exits.Kicked()

    def _explained(self, number: int) -> exits.Exit:
        func.ptrace(_GETSIGINFO, self.pid, 0, self._siginfo_ha)
        info = self._siginfo
        code = info.si_code
        if code <= 0:  # from kill(), not from the processor
            return exits.Kicked()
        if number == signal.SIGTRAP:
            if code == _TRAP_HWBKPT:
                return exits.Breakpoint()
            return exits.SingleStep() if code == _TRAP_TRACE else exits.SoftwareTrap()
        if number == signal.SIGSEGV and code in (_SEGV_MAPERR, _SEGV_ACCERR, _SEGV_PKUERR):
            return exits.PageFault((info._sigfault._addr or 0) & 0xFFFF_FFFF, None)
        return exits.Fault(perhaps_overflow=number == signal.SIGSEGV)

    def close(self) -> None:
        if not self._reaped:
            self._reaped = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, _WALL)
            self._list.close()
