"""The one instruction table: decoder, translator, simulator, tests and docs read it.

Source: Intel SDM vol. 2 (opcode maps of appendix A), Pentium Pro plus MMX and SSE to SSE4.2.
What has no row is #UD for the guest: VEX/EVEX, XSAVE, VMX, RDRAND, MONITOR, SYSCALL, PREFETCHW's
3DNow! relatives, and everything that exists in 64-bit mode only.

A line of TABLE is `key mnemonic operands access words...`
  key       opcode bytes in hex. Mandatory prefix first: `66.0F6F`, `F3.0FB8`, `NP.0F10` (no 66/F2/F3);
            without one, 66 is the operand size and F2/F3 are ignored. `/n` is ModRM.reg, a following
            `m` or `r` restricts ModRM.mod to memory or register, `:n` fixes ModRM.rm (x87).
  operands  Intel notation, `-` for none. The r/m operand is one of E. M. W. Q. U. N. R.; its suffix is
            the memory width (WIDTH below). I.: immediate, J.: relative, O.: absolute address, Ap: far.
  access    of the memory operand: r, w, m (read, modify, write), - (none or address only)
  words     `lock` LOCK allowed; `u=SZAPCO` flags left undefined; an action:
            `copy` (default) the host executes it, memory operand redirected into the window;
            `sim` the simulator; `stop` the simulator, and it may change EIP;
            any other: a shape of its own in emit.py (push, call, string, ...).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTH = {  # bytes of the memory operand; v: by operand size, negative codes resolved by `memory_width`
    "b": 1, "w": 2, "d": 4, "q": 8, "dq": 16, "t": 10, "fx": 512, "s": 6, "v": -1, "p": -2, "a": -3,
    "env": -4, "sav": -5, "": 0,
}  # fmt: skip
_BY_SIZE = {-1: (4, 2), -2: (6, 4), -3: (8, 4), -4: (28, 14), -5: (108, 94)}  # (32-bit, 16-bit)
RM_LETTERS = "EMWQUNR"
FLAG_BITS = {"C": 0x1, "P": 0x4, "A": 0x10, "Z": 0x40, "S": 0x80, "O": 0x800}


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction form."""

    map: int  # 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A
    opcode: int
    prefix: int | None  # 0x66, 0xF2, 0xF3: mandatory; 0: none of them allowed; None: not a selector
    ext: int | None  # ModRM.reg
    mod: str  # "m", "r" or ""
    rm: int | None
    mnemonic: str
    operands: tuple[str, ...]
    access: str
    action: str
    lockable: bool
    undefined: int  # EFLAGS mask
    group: str  # int, string, x87, mmx, sse, system
    # derived
    rm_operand: str = field(init=False)  # the operand that ModRM.rm names, or ""
    has_modrm: bool = field(init=False)
    _widths: tuple[int, int] = field(init=False)  # of the memory operand, by operand size 32 and 16

    @property
    def key(self) -> str:
        head = {None: "", 0: "NP.", 0x66: "66.", 0xF2: "F2.", 0xF3: "F3."}[self.prefix]
        op = ("", "0F", "0F38", "0F3A")[self.map] + f"{self.opcode:02X}"
        tail = "" if self.ext is None else f"/{self.ext}"
        return head + op + tail + self.mod + ("" if self.rm is None else f":{self.rm}")

    def __post_init__(self) -> None:
        named = [o for o in self.operands if o not in _NOT_MODRM]
        operand = next((o for o in named if o[0] in RM_LETTERS), "")
        width = WIDTH.get(operand[1:], 0)  # registers have none
        set_once = object.__setattr__  # frozen
        set_once(self, "rm_operand", operand)
        set_once(self, "has_modrm", self.ext is not None or bool(self.mod) or any(o[0] in "EMWQUNRGVPSCD"
                                                                                  for o in named))
        set_once(self, "_widths", _BY_SIZE[width] if width < 0 else (width, width))

    @property
    def aligned(self) -> bool:
        """A memory operand that isn't at a multiple of 16 is #GP, before any #SS or #PF."""
        return self._widths[0] >= 16 and self.mnemonic not in _UNALIGNED

    @property
    def waits(self) -> bool:
        """An x87 exception that is pending comes first, before any fault of the operand."""
        uses_x87 = self.group in ("x87", "mmx") or self.operands[0][0] == "P"
        return uses_x87 and self.mnemonic not in _NOT_WAITING

    def memory_width(self, opsize16: bool) -> int:
        """Bytes of the memory operand (0: address only)."""
        return self._widths[opsize16]


_NOT_WAITING = frozenset(("fnstenv", "fnstcw", "fnsave", "fnstsw"))
_UNALIGNED = frozenset(  # operands of 16 bytes and more that may lie anywhere
    ("movups", "movupd", "movdqu", "lddqu", "pcmpestri", "pcmpestrm", "pcmpistri", "pcmpistrm", "fnsave",
     "frstor", "fnstenv", "fldenv")
)  # fmt: skip
_NOT_MODRM = frozenset(("CL", "CS", "DS", "ES", "SS", "FS", "GS", "DX"))

TABLE = """
0FAF imul Gv,Ev r u=SZAP
27 daa - - sim u=O
2F das - - sim u=O
37 aaa - - sim u=OSZP
3F aas - - sim u=OSZP
60 pusha - - pusha
61 popa - - popa
62m bound Gv,Ma r stop
63 arpl Ew,Gw m sim
68 push Iz - pushimm
69 imul Gv,Ev,Iz r u=SZAP
6A push Ibs - pushimm
6B imul Gv,Ev,Ibs r u=SZAP
6C insb - - sim
6D insv - - sim
6E outsb - - sim
6F outsv - - sim
84 test Eb,Gb r u=A
85 test Ev,Gv r u=A
86 xchg Eb,Gb m lock
87 xchg Ev,Gv m lock
88 mov Eb,Gb w
89 mov Ev,Gv w
8A mov Gb,Eb r
8B mov Gv,Ev r
8C mov Ew,Sw w movfromseg
8E mov Sw,Ew r stop
8Dm lea Gv,M - lea
8F/0 pop Ev w popm
90 nop - -
9A call Ap - stop
9B fwait - -
9C pushf - - pushf
9D popf - - popf
9E sahf - -
9F lahf - -
A0 mov AL,Ob r moffs
A1 mov eAX,Ov r moffs
A2 mov Ob,AL w moffs
A3 mov Ov,eAX w moffs
A4 movsb - - string
A5 movsv - - string
A6 cmpsb - - string
A7 cmpsv - - string
A8 test AL,Ib - u=A
A9 test eAX,Iz - u=A
AA stosb - - string
AB stosv - - string
AC lodsb - - string
AD lodsv - - string
AE scasb - - string
AF scasv - - string
C2 ret Iw - ret
C3 ret - - ret
C4m les Gv,Mp r stop
C5m lds Gv,Mp r stop
C6/0 mov Eb,Ib w
C7/0 mov Ev,Iz w
C8 enter Iw,Ib - sim
C9 leave - - leave
CA retf Iw - stop
CB retf - - stop
CC int3 - - stop
CD int Ib - stop
CE into - - stop
CF iret - - stop
D4 aam Ib - sim u=OAC
D5 aad Ib - sim u=OAC
D6 salc - - sim
D7 xlat - - xlat
E0 loopne Jb - loop
E1 loope Jb - loop
E2 loop Jb - loop
E3 jcxz Jb - loop
E4 in AL,Ib - sim
E5 in eAX,Ib - sim
E6 out Ib,AL - sim
E7 out Ib,eAX - sim
E8 call Jz - call
E9 jmp Jz - jmp
EA jmp Ap - stop
EB jmp Jb - jmp
EC in AL,DX - sim
ED in eAX,DX - sim
EE out DX,AL - sim
EF out DX,eAX - sim
F1 int1 - - stop
F4 hlt - - stop
F5 cmc - -
F8 clc - -
F9 stc - -
FA cli - - cli
FB sti - - sti
FC cld - -
FD std - -
F6/0 test Eb,Ib r u=A
F6/1 test Eb,Ib r u=A
F6/2 not Eb m lock
F6/3 neg Eb m lock
F6/4 mul Eb r u=SZAP
F6/5 imul Eb r u=SZAP
F6/6 div Eb r u=OSZAPC
F6/7 idiv Eb r u=OSZAPC
F7/0 test Ev,Iz r u=A
F7/1 test Ev,Iz r u=A
F7/2 not Ev m lock
F7/3 neg Ev m lock
F7/4 mul Ev r u=SZAP
F7/5 imul Ev r u=SZAP
F7/6 div Ev r u=OSZAPC
F7/7 idiv Ev r u=OSZAPC
FE/0 inc Eb m lock
FE/1 dec Eb m lock
FF/0 inc Ev m lock
FF/1 dec Ev m lock
FF/2 call Ev r icall
FF/3m call Mp r stop
FF/4 jmp Ev r ijmp
FF/5m jmp Mp r stop
FF/6 push Ev r pushm
0F00/0 sldt Ew w sim
0F00/1 str Ew w sim
0F00/2 lldt Ew r stop
0F00/3 ltr Ew r stop
0F00/4 verr Ew r sim
0F00/5 verw Ew r sim
0F01/0m sgdt Ms w sim
0F01/1m sidt Ms w sim
0F01/2m lgdt Ms r stop
0F01/3m lidt Ms r stop
0F01/4 smsw Ew w sim
0F01/6 lmsw Ew r stop
0F01/7m invlpg M - stop
0F02 lar Gv,Ew r sim
0F03 lsl Gv,Ew r sim
0F06 clts - - stop
0F08 invd - - sim
0F09 wbinvd - - sim
0F0B ud2 - - stop
0F0D nop M - hintnop
0F18 prefetch M - hintnop
0F19 nop M - hintnop
0F1A nop M - hintnop
0F1B nop M - hintnop
0F1C nop M - hintnop
0F1D nop M - hintnop
0F1E nop M - hintnop
0F1F nop M - hintnop
0F20r mov Rd,Cd - stop
0F21r mov Rd,Dd - stop
0F22r mov Cd,Rd - stop
0F23r mov Dd,Rd - stop
0F30 wrmsr - - stop
0F31 rdtsc - - rdtsc
0F32 rdmsr - - stop
0F33 rdpmc - - sim
0F34 sysenter - - stop
0F35 sysexit - - stop
0FA0 push FS - pushseg
0FA1 pop FS - stop
0FA2 cpuid - - sim
0FA3 bt Ev,Gv r bitstring u=OSZAP
0FA4 shld Ev,Gv,Ib m u=OA
0FA5 shld Ev,Gv,CL m u=OA
0FA8 push GS - pushseg
0FA9 pop GS - stop
0FAB bts Ev,Gv m bitstring lock u=OSZAP
0FAC shrd Ev,Gv,Ib m u=OA
0FAD shrd Ev,Gv,CL m u=OA
0FB0 cmpxchg Eb,Gb m lock
0FB1 cmpxchg Ev,Gv m lock
0FB2m lss Gv,Mp r stop
0FB3 btr Ev,Gv m bitstring lock u=OSZAP
0FB4m lfs Gv,Mp r stop
0FB5m lgs Gv,Mp r stop
0FB6 movzx Gv,Eb r
0FB7 movzx Gv,Ew r
F3.0FB8 popcnt Gv,Ev r
0FBA/4 bt Ev,Ib r u=OSZAP
0FBA/5 bts Ev,Ib m lock u=OSZAP
0FBA/6 btr Ev,Ib m lock u=OSZAP
0FBA/7 btc Ev,Ib m lock u=OSZAP
0FBB btc Ev,Gv m bitstring lock u=OSZAP
0FBC bsf Gv,Ev r u=OSAPC
0FBD bsr Gv,Ev r u=OSAPC
0FBE movsx Gv,Eb r
0FBF movsx Gv,Ew r
0FC0 xadd Eb,Gb m lock
0FC1 xadd Ev,Gv m lock
NP.0FC3m movnti Md,Gd w
0FC7/1m cmpxchg8b Mq m lock
D8/0m fadd Md r
D8/1m fmul Md r
D8/2m fcom Md r
D8/3m fcomp Md r
D8/4m fsub Md r
D8/5m fsubr Md r
D8/6m fdiv Md r
D8/7m fdivr Md r
D9/0m fld Md r
D9/2m fst Md w
D9/3m fstp Md w
D9/4m fldenv Menv r
D9/5m fldcw Mw r
D9/6m fnstenv Menv w
D9/7m fnstcw Mw w
DA/0m fiadd Md r
DA/1m fimul Md r
DA/2m ficom Md r
DA/3m ficomp Md r
DA/4m fisub Md r
DA/5m fisubr Md r
DA/6m fidiv Md r
DA/7m fidivr Md r
DB/0m fild Md r
DB/1m fisttp Md w
DB/2m fist Md w
DB/3m fistp Md w
DB/5m fld Mt r
DB/7m fstp Mt w
DC/0m fadd Mq r
DC/1m fmul Mq r
DC/2m fcom Mq r
DC/3m fcomp Mq r
DC/4m fsub Mq r
DC/5m fsubr Mq r
DC/6m fdiv Mq r
DC/7m fdivr Mq r
DD/0m fld Mq r
DD/1m fisttp Mq w
DD/2m fst Mq w
DD/3m fstp Mq w
DD/4m frstor Msav r
DD/6m fnsave Msav w
DD/7m fnstsw Mw w
DE/0m fiadd Mw r
DE/1m fimul Mw r
DE/2m ficom Mw r
DE/3m ficomp Mw r
DE/4m fisub Mw r
DE/5m fisubr Mw r
DE/6m fidiv Mw r
DE/7m fidivr Mw r
DF/0m fild Mw r
DF/1m fisttp Mw w
DF/2m fist Mw w
DF/3m fistp Mw w
DF/4m fbld Mt r
DF/5m fild Mq r
DF/6m fbstp Mt w
DF/7m fistp Mq w
D8/0r fadd - -
D8/1r fmul - -
D8/2r fcom - -
D8/3r fcomp - -
D8/4r fsub - -
D8/5r fsubr - -
D8/6r fdiv - -
D8/7r fdivr - -
D9/0r fld - -
D9/1r fxch - -
D9/2r:0 fnop - -
D9/3r fstp - -
D9/4r:0 fchs - -
D9/4r:1 fabs - -
D9/4r:4 ftst - -
D9/4r:5 fxam - -
D9/5r:0 fld1 - -
D9/5r:1 fldl2t - -
D9/5r:2 fldl2e - -
D9/5r:3 fldpi - -
D9/5r:4 fldlg2 - -
D9/5r:5 fldln2 - -
D9/5r:6 fldz - -
D9/6r:0 f2xm1 - -
D9/6r:1 fyl2x - -
D9/6r:2 fptan - -
D9/6r:3 fpatan - -
D9/6r:4 fxtract - -
D9/6r:5 fprem1 - -
D9/6r:6 fdecstp - -
D9/6r:7 fincstp - -
D9/7r:0 fprem - -
D9/7r:1 fyl2xp1 - -
D9/7r:2 fsqrt - -
D9/7r:3 fsincos - -
D9/7r:4 frndint - -
D9/7r:5 fscale - -
D9/7r:6 fsin - -
D9/7r:7 fcos - -
DA/0r fcmovb - -
DA/1r fcmove - -
DA/2r fcmovbe - -
DA/3r fcmovu - -
DA/5r:1 fucompp - -
DB/0r fcmovnb - -
DB/1r fcmovne - -
DB/2r fcmovnbe - -
DB/3r fcmovnu - -
DB/4r:0 fneni - -
DB/4r:1 fndisi - -
DB/4r:2 fnclex - -
DB/4r:3 fninit - -
DB/4r:4 fnsetpm - -
DB/5r fucomi - -
DB/6r fcomi - -
DC/0r fadd - -
DC/1r fmul - -
DC/2r fcom - -
DC/3r fcomp - -
DC/4r fsubr - -
DC/5r fsub - -
DC/6r fdivr - -
DC/7r fdiv - -
DD/0r ffree - -
DD/1r fxch - -
DD/2r fst - -
DD/3r fstp - -
DD/4r fucom - -
DD/5r fucomp - -
DE/0r faddp - -
DE/1r fmulp - -
DE/2r fcomp - -
DE/3r:1 fcompp - -
DE/4r fsubrp - -
DE/5r fsubp - -
DE/6r fdivrp - -
DE/7r fdivp - -
DF/0r ffreep - -
DF/1r fxch - -
DF/2r fstp - -
DF/3r fstp - -
DF/4r:0 fnstsw AX -
DF/5r fucomip - -
DF/6r fcomip - -
NP.0F77 emms - -
NP.0FAE/0m fxsave Mfx w
NP.0FAE/1m fxrstor Mfx r
NP.0FAE/2m ldmxcsr Md r
NP.0FAE/3m stmxcsr Md w
NP.0FAE/5r lfence - -
NP.0FAE/6r mfence - -
NP.0FAE/7r sfence - -
NP.0FAE/7m clflush Mb -
NP.0F10 movups Vx,Wdq r
NP.0F11 movups Wdq,Vx w
66.0F10 movupd Vx,Wdq r
66.0F11 movupd Wdq,Vx w
F3.0F10 movss Vx,Wd r
F3.0F11 movss Wd,Vx w
F2.0F10 movsd Vx,Wq r
F2.0F11 movsd Wq,Vx w
NP.0F12 movlps Vx,Wq r
NP.0F13m movlps Wq,Vx w
66.0F12m movlpd Vx,Wq r
66.0F13m movlpd Wq,Vx w
F3.0F12 movsldup Vx,Wdq r
F2.0F12 movddup Vx,Wq r
NP.0F14 unpcklps Vx,Wdq r
66.0F14 unpcklpd Vx,Wdq r
NP.0F15 unpckhps Vx,Wdq r
66.0F15 unpckhpd Vx,Wdq r
NP.0F16 movhps Vx,Wq r
NP.0F17m movhps Wq,Vx w
66.0F16m movhpd Vx,Wq r
66.0F17m movhpd Wq,Vx w
F3.0F16 movshdup Vx,Wdq r
NP.0F28 movaps Vx,Wdq r
NP.0F29 movaps Wdq,Vx w
66.0F28 movapd Vx,Wdq r
66.0F29 movapd Wdq,Vx w
NP.0F2A cvtpi2ps Vx,Qq r
66.0F2A cvtpi2pd Vx,Qq r
F3.0F2A cvtsi2ss Vx,Ed r
F2.0F2A cvtsi2sd Vx,Ed r
NP.0F2Bm movntps Wdq,Vx w
66.0F2Bm movntpd Wdq,Vx w
NP.0F2C cvttps2pi Px,Wq r
66.0F2C cvttpd2pi Px,Wdq r
F3.0F2C cvttss2si Gd,Wd r
F2.0F2C cvttsd2si Gd,Wq r
NP.0F2D cvtps2pi Px,Wq r
66.0F2D cvtpd2pi Px,Wdq r
F3.0F2D cvtss2si Gd,Wd r
F2.0F2D cvtsd2si Gd,Wq r
NP.0F2E ucomiss Vx,Wd r
66.0F2E ucomisd Vx,Wq r
NP.0F2F comiss Vx,Wd r
66.0F2F comisd Vx,Wq r
NP.0F50r movmskps Gd,Ux -
66.0F50r movmskpd Gd,Ux -
NP.0F52 rsqrtps Vx,Wdq r
F3.0F52 rsqrtss Vx,Wd r
NP.0F53 rcpps Vx,Wdq r
F3.0F53 rcpss Vx,Wd r
NP.0F54 andps Vx,Wdq r
66.0F54 andpd Vx,Wdq r
NP.0F55 andnps Vx,Wdq r
66.0F55 andnpd Vx,Wdq r
NP.0F56 orps Vx,Wdq r
66.0F56 orpd Vx,Wdq r
NP.0F57 xorps Vx,Wdq r
66.0F57 xorpd Vx,Wdq r
NP.0F5A cvtps2pd Vx,Wq r
66.0F5A cvtpd2ps Vx,Wdq r
F3.0F5A cvtss2sd Vx,Wd r
F2.0F5A cvtsd2ss Vx,Wq r
NP.0F5B cvtdq2ps Vx,Wdq r
66.0F5B cvtps2dq Vx,Wdq r
F3.0F5B cvttps2dq Vx,Wdq r
NP.0F60 punpcklbw Px,Qd r
NP.0F61 punpcklwd Px,Qd r
NP.0F62 punpckldq Px,Qd r
66.0F60 punpcklbw Vx,Wdq r
66.0F61 punpcklwd Vx,Wdq r
66.0F62 punpckldq Vx,Wdq r
66.0F6C punpcklqdq Vx,Wdq r
66.0F6D punpckhqdq Vx,Wdq r
NP.0F6E movd Px,Ed r
66.0F6E movd Vx,Ed r
NP.0F6F movq Px,Qq r
66.0F6F movdqa Vx,Wdq r
F3.0F6F movdqu Vx,Wdq r
NP.0F70 pshufw Px,Qq,Ib r
66.0F70 pshufd Vx,Wdq,Ib r
F3.0F70 pshufhw Vx,Wdq,Ib r
F2.0F70 pshuflw Vx,Wdq,Ib r
66.0F71/2r psrlw Ux,Ib -
66.0F71/4r psraw Ux,Ib -
66.0F71/6r psllw Ux,Ib -
66.0F72/2r psrld Ux,Ib -
66.0F72/4r psrad Ux,Ib -
66.0F72/6r pslld Ux,Ib -
66.0F73/2r psrlq Ux,Ib -
66.0F73/3r psrldq Ux,Ib -
66.0F73/6r psllq Ux,Ib -
66.0F73/7r pslldq Ux,Ib -
NP.0F71/2r psrlw Nx,Ib -
NP.0F71/4r psraw Nx,Ib -
NP.0F71/6r psllw Nx,Ib -
NP.0F72/2r psrld Nx,Ib -
NP.0F72/4r psrad Nx,Ib -
NP.0F72/6r pslld Nx,Ib -
NP.0F73/2r psrlq Nx,Ib -
NP.0F73/6r psllq Nx,Ib -
66.0F7C haddpd Vx,Wdq r
F2.0F7C haddps Vx,Wdq r
66.0F7D hsubpd Vx,Wdq r
F2.0F7D hsubps Vx,Wdq r
NP.0F7E movd Ed,Px w
66.0F7E movd Ed,Vx w
F3.0F7E movq Vx,Wq r
NP.0F7F movq Qq,Px w
66.0F7F movdqa Wdq,Vx w
F3.0F7F movdqu Wdq,Vx w
NP.0FC4 pinsrw Px,Ew,Ib r
66.0FC4 pinsrw Vx,Ew,Ib r
NP.0FC5r pextrw Gd,Nx,Ib -
66.0FC5r pextrw Gd,Ux,Ib -
NP.0FC6 shufps Vx,Wdq,Ib r
66.0FC6 shufpd Vx,Wdq,Ib r
66.0FD0 addsubpd Vx,Wdq r
F2.0FD0 addsubps Vx,Wdq r
66.0FD6 movq Wq,Vx w
F3.0FD6r movq2dq Vx,Nx -
F2.0FD6r movdq2q Px,Ux -
NP.0FD7r pmovmskb Gd,Nx -
66.0FD7r pmovmskb Gd,Ux -
66.0FE6 cvttpd2dq Vx,Wdq r
F3.0FE6 cvtdq2pd Vx,Wq r
F2.0FE6 cvtpd2dq Vx,Wdq r
NP.0FE7m movntq Mq,Px w
66.0FE7m movntdq Mdq,Vx w
F2.0FF0m lddqu Vx,Mdq r
NP.0FF7r maskmovq Px,Nx - maskmov
66.0FF7r maskmovdqu Vx,Ux - maskmov
66.0F3810 pblendvb Vx,Wdq r
66.0F3814 blendvps Vx,Wdq r
66.0F3815 blendvpd Vx,Wdq r
66.0F3817 ptest Vx,Wdq r
66.0F3820 pmovsxbw Vx,Wq r
66.0F3821 pmovsxbd Vx,Wd r
66.0F3822 pmovsxbq Vx,Ww r
66.0F3823 pmovsxwd Vx,Wq r
66.0F3824 pmovsxwq Vx,Wd r
66.0F3825 pmovsxdq Vx,Wq r
66.0F3828 pmuldq Vx,Wdq r
66.0F3829 pcmpeqq Vx,Wdq r
66.0F382Am movntdqa Vx,Mdq r
66.0F382B packusdw Vx,Wdq r
66.0F3830 pmovzxbw Vx,Wq r
66.0F3831 pmovzxbd Vx,Wd r
66.0F3832 pmovzxbq Vx,Ww r
66.0F3833 pmovzxwd Vx,Wq r
66.0F3834 pmovzxwq Vx,Wd r
66.0F3835 pmovzxdq Vx,Wq r
66.0F3837 pcmpgtq Vx,Wdq r
66.0F3838 pminsb Vx,Wdq r
66.0F3839 pminsd Vx,Wdq r
66.0F383A pminuw Vx,Wdq r
66.0F383B pminud Vx,Wdq r
66.0F383C pmaxsb Vx,Wdq r
66.0F383D pmaxsd Vx,Wdq r
66.0F383E pmaxuw Vx,Wdq r
66.0F383F pmaxud Vx,Wdq r
66.0F3840 pmulld Vx,Wdq r
66.0F3841 phminposuw Vx,Wdq r
F2.0F38F0 crc32 Gd,Eb r
F2.0F38F1 crc32 Gd,Ev r
66.0F3A08 roundps Vx,Wdq,Ib r
66.0F3A09 roundpd Vx,Wdq,Ib r
66.0F3A0A roundss Vx,Wd,Ib r
66.0F3A0B roundsd Vx,Wq,Ib r
66.0F3A0C blendps Vx,Wdq,Ib r
66.0F3A0D blendpd Vx,Wdq,Ib r
66.0F3A0E pblendw Vx,Wdq,Ib r
NP.0F3A0F palignr Px,Qq,Ib r
66.0F3A0F palignr Vx,Wdq,Ib r
66.0F3A14m pextrb Mb,Vx,Ib w
66.0F3A14r pextrb Rd,Vx,Ib -
66.0F3A15m pextrw Mw,Vx,Ib w
66.0F3A15r pextrw Rd,Vx,Ib -
66.0F3A16 pextrd Ed,Vx,Ib w
66.0F3A17 extractps Ed,Vx,Ib w
66.0F3A20m pinsrb Vx,Mb,Ib r
66.0F3A20r pinsrb Vx,Rd,Ib -
66.0F3A21 insertps Vx,Wd,Ib r
66.0F3A22 pinsrd Vx,Ed,Ib r
66.0F3A40 dpps Vx,Wdq,Ib r
66.0F3A41 dppd Vx,Wdq,Ib r
66.0F3A42 mpsadbw Vx,Wdq,Ib r
66.0F3A60 pcmpestrm Vx,Wdq,Ib r
66.0F3A61 pcmpestri Vx,Wdq,Ib r
66.0F3A62 pcmpistrm Vx,Wdq,Ib r
66.0F3A63 pcmpistri Vx,Wdq,Ib r
"""

_ALU = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_SHIFT = ("rol", "ror", "rcl", "rcr", "shl", "shr", "shl", "sar")
_CC = ("o", "no", "b", "nb", "z", "nz", "be", "nbe", "s", "ns", "p", "np", "l", "nl", "le", "nle")
_PACKED = {  # opcode of map 0F: name; MMX with no prefix, SSE2 with 66
    0x63: "packsswb", 0x64: "pcmpgtb", 0x65: "pcmpgtw", 0x66: "pcmpgtd", 0x67: "packuswb", 0x68: "punpckhbw",
    0x69: "punpckhwd", 0x6A: "punpckhdq", 0x6B: "packssdw", 0x74: "pcmpeqb", 0x75: "pcmpeqw", 0x76: "pcmpeqd",
    0xD1: "psrlw", 0xD2: "psrld", 0xD3: "psrlq", 0xD4: "paddq", 0xD5: "pmullw", 0xD8: "psubusb",
    0xD9: "psubusw", 0xDA: "pminub", 0xDB: "pand", 0xDC: "paddusb", 0xDD: "paddusw", 0xDE: "pmaxub",
    0xDF: "pandn", 0xE0: "pavgb", 0xE1: "psraw", 0xE2: "psrad", 0xE3: "pavgw", 0xE4: "pmulhuw",
    0xE5: "pmulhw", 0xE8: "psubsb", 0xE9: "psubsw", 0xEA: "pminsw", 0xEB: "por", 0xEC: "paddsb",
    0xED: "paddsw", 0xEE: "pmaxsw", 0xEF: "pxor", 0xF1: "psllw", 0xF2: "pslld", 0xF3: "psllq",
    0xF4: "pmuludq", 0xF5: "pmaddwd", 0xF6: "psadbw", 0xF8: "psubb", 0xF9: "psubw", 0xFA: "psubd",
    0xFB: "psubq", 0xFC: "paddb", 0xFD: "paddw", 0xFE: "paddd",
}  # fmt: skip
_SSSE3 = {
    0x00: "pshufb", 0x01: "phaddw", 0x02: "phaddd", 0x03: "phaddsw", 0x04: "pmaddubsw", 0x05: "phsubw",
    0x06: "phsubd", 0x07: "phsubsw", 0x08: "psignb", 0x09: "psignw", 0x0A: "psignd", 0x0B: "pmulhrsw",
    0x1C: "pabsb", 0x1D: "pabsw", 0x1E: "pabsd",
}  # fmt: skip
_ARITH = {0x51: "sqrt", 0x58: "add", 0x59: "mul", 0x5C: "sub", 0x5D: "min", 0x5E: "div", 0x5F: "max"}
_FORMATS = (("NP", "ps", "Wdq"), ("66", "pd", "Wdq"), ("F3", "ss", "Wd"), ("F2", "sd", "Wq"))


def _families() -> Iterator[str]:
    """Lines of the regular parts of the opcode map."""
    for n, name in enumerate(_ALU):
        acc = "r" if name == "cmp" else "m"
        tail = ("" if name == "cmp" else " lock") + (" u=A" if name in ("or", "and", "xor") else "")
        reg_tail = tail.replace(" lock", "")
        yield f"{8 * n:02X} {name} Eb,Gb {acc}{tail}"
        yield f"{8 * n + 1:02X} {name} Ev,Gv {acc}{tail}"
        yield f"{8 * n + 2:02X} {name} Gb,Eb r{reg_tail}"
        yield f"{8 * n + 3:02X} {name} Gv,Ev r{reg_tail}"
        yield f"{8 * n + 4:02X} {name} AL,Ib -{reg_tail}"
        yield f"{8 * n + 5:02X} {name} eAX,Iz -{reg_tail}"
        for opcode, form in ((0x80, "Eb,Ib"), (0x81, "Ev,Iz"), (0x82, "Eb,Ib"), (0x83, "Ev,Ibs")):
            yield f"{opcode:02X}/{n} {name} {form} {acc}{tail}"
    for n, name in enumerate(("es", "cs", "ss", "ds")):
        yield f"{8 * n + 6:02X} push {name.upper()} - pushseg"
        if name != "cs":
            yield f"{8 * n + 7:02X} pop {name.upper()} - stop"
    for n, name in enumerate(_SHIFT):
        undefined = "O" if n < 4 else "OA"
        for opcode, form in ((0xC0, "Eb,Ib"), (0xC1, "Ev,Ib"), (0xD0, "Eb"), (0xD1, "Ev"), (0xD2, "Eb,CL"),
                             (0xD3, "Ev,CL")):
            extra = "C" if n >= 4 and opcode in (0xC0, 0xD2) else ""  # count beyond the operand's width
            yield f"{opcode:02X}/{n} {name} {form} m u={undefined}{extra}"
    for n in range(8):
        yield f"{0x40 + n:02X} inc Zv - incdec"
        yield f"{0x48 + n:02X} dec Zv - incdec"
        yield f"{0x50 + n:02X} push Zv - push"
        yield f"{0x58 + n:02X} pop Zv - pop"
        if n:
            yield f"{0x90 + n:02X} xchg Zv,eAX -"
        yield f"{0xB0 + n:02X} mov Zb,Ib -"
        yield f"{0xB8 + n:02X} mov Zv,Iz -"
        yield f"0F{0xC8 + n:02X} bswap Zd -"
    yield "98 cwde - -"
    yield "99 cdq - -"
    for n, cc in enumerate(_CC):
        yield f"{0x70 + n:02X} j{cc} Jb - jcc"
        yield f"0F{0x80 + n:02X} j{cc} Jz - jcc"
        yield f"0F{0x40 + n:02X} cmov{cc} Gv,Ev r"
        yield f"0F{0x90 + n:02X} set{cc} Eb w"
    for opcode, name in _PACKED.items():
        yield f"NP.0F{opcode:02X} {name} Px,Qq r"
        yield f"66.0F{opcode:02X} {name} Vx,Wdq r"
    for opcode, name in _SSSE3.items():
        yield f"NP.0F38{opcode:02X} {name} Px,Qq r"
        yield f"66.0F38{opcode:02X} {name} Vx,Wdq r"
    for opcode, name in _ARITH.items():
        for prefix, kind, operand in _FORMATS:
            yield f"{prefix}.0F{opcode:02X} {name}{kind} Vx,{operand} r"
    for prefix, kind, operand in _FORMATS:
        yield f"{prefix}.0FC2 cmp{kind} Vx,{operand},Ib r"


def _group(mapno: int, opcode: int, mnemonic: str, operands: tuple[str, ...], action: str) -> str:
    if action == "string":
        return "string"
    if mnemonic in ("lfence", "mfence", "sfence", "clflush"):
        return "int"  # they heed neither CR0.TS nor CR4.OSFXSR
    if mapno == 0 and (0xD8 <= opcode <= 0xDF or opcode == 0x9B):
        return "x87"
    kinds = "".join(o[0] for o in operands if o not in _NOT_MODRM)
    if any(k in kinds for k in "VWU") or (mapno == 1 and opcode == 0xAE):
        return "sse"
    if any(k in kinds for k in "PQN") or (mapno == 1 and opcode == 0x77):
        return "mmx"
    return "system" if action in ("sim", "stop") else "int"


def _parse(line: str) -> Row:
    key, mnemonic, operand_text, access, *words = line.split()
    prefix = None
    if "." in key:
        head, key = key.split(".")
        prefix = {"NP": 0, "66": 0x66, "F2": 0xF2, "F3": 0xF3}[head]
    rm = None
    if ":" in key:
        key, number = key.split(":")
        rm = int(number)
    mod = key[-1] if key[-1] in "mr" else ""
    key = key.rstrip("mr")
    ext = None
    if "/" in key:
        key, number = key.split("/")
        ext = int(number)
    mapno = {2: 0, 4: 1}.get(len(key), 2 if key[2:4] == "38" else 3)
    opcode = int(key[-2:], 16)
    operands = () if operand_text == "-" else tuple(operand_text.split(","))
    undefined = 0
    action = "copy"
    for word in words:
        if word.startswith("u="):
            undefined = sum(FLAG_BITS[f] for f in word[2:])
        elif word != "lock":
            action = word
    group = _group(mapno, opcode, mnemonic, operands, action)
    return Row(mapno, opcode, prefix, ext, mod, rm, mnemonic, operands, access, action, "lock" in words,
               undefined, group)


def _opcode_of(line: str) -> tuple[int, int]:
    """(map, opcode), as `_parse` has them."""
    key = line.split(" ", 1)[0].rpartition(".")[2].partition(":")[0].partition("/")[0].rstrip("mr")
    return {2: 0, 4: 1}.get(len(key), 2 if key[2:4] == "38" else 3), int(key[-2:], 16)


_LINES: dict[tuple[int, int], list[str]] = {}
for _line in (*TABLE.strip().splitlines(), *_families()):
    _LINES.setdefault(_opcode_of(_line), []).append(_line)


@functools.cache
def rows_of(mapno: int, opcode: int) -> tuple[Row, ...]:
    """The rows of an opcode, none where there is no such instruction.

    Made when first asked for: a start with kept translations needs few, and all take 10 ms.
    """
    return tuple(_parse(line) for line in _LINES.get((mapno, opcode), ()))


@functools.cache
def all_rows() -> tuple[Row, ...]:
    """Of all opcodes."""
    return tuple(row for opcode in _LINES for row in rows_of(*opcode))
