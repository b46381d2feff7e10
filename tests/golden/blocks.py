"""The guest code whose translations are kept: one of every shape, in every mode that matters.

A block is assembly, one instruction a line, or the bytes where keystone would choose others.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpu_node import mode as modes

KERNEL = 0


@dataclass(frozen=True)
class Block:
    title: str
    text: str | bytes
    mode: int = KERNEL
    verify: bool = False
    crosses: bool = False  # one instruction over the end of the page


OPERANDS = """
add eax, ebx
add [esi], eax
add [esi+8], ax
add [esi+0x12345678], bl
mov eax, [0x1000]
mov ecx, [0x1000]
mov ebx, [ecx*4+0x20]
mov ecx, [ebp+esi*2-5]
mov edx, [esp+4]
mov [esp], ah
mov bh, [edi+ebp]
mov eax, ss:[ebx]
mov eax, cs:[ebx]
mov cs:[ebx], eax
mov byte ptr [ebx], 7
mov word ptr [ebx], 0x1234
mov dword ptr [ebx], 0x12345678
lock xadd [edi], ecx
mov [bx+si], eax
xchg eax, ecx
"""
ALU = """
adc eax, 0x12345678
sub al, 3
and ax, 0x1234
cmp dword ptr [eax], -1
imul eax, [ebx], 9
not byte ptr [eax]
div ecx
inc eax
dec dx
inc dword ptr [eax]
shl eax, 1
sar byte ptr [ebx], cl
shld [ebx], eax, 5
bt [ebx], eax
lock bts [ebx], eax
bswap edi
cmove eax, [ebx]
sete [ebx]
setg cl
movzx eax, byte ptr [ebx]
movsx eax, cx
cmpxchg8b [esi]
crc32 eax, byte ptr [ebx]
cwde
cdq
sahf
lahf
cmc
std
nop
pause
nop dword ptr [eax+eax]
prefetcht0 [eax]
lea eax, [ebx+ecx*2+4]
lea ax, [ebx]
lea esp, [ebp-4]
rdtsc
"""
STACK = """
push eax
push esp
push 0x12345678
push 5
push -5
push ax
push dword ptr [esi+4]
push dword ptr [esp+8]
push word ptr [esi]
pop ebx
pop esp
pop cx
pop dword ptr [esi+4]
pop dword ptr [esp+4]
pushal
popal
pushfd
popfd
pushf
popf
cli
sti
leave
enter 8, 0
.byte 0x0e
.byte 0x06
.byte 0x0f, 0xa8
.byte 0x1f
mov eax, ds
mov bx, fs
mov [ecx], gs
mov es, ax
xlatb
mov al, [0x12345678]
mov [0x12345678], eax
"""
SEGMENTED = """
mov eax, fs:[0]
mov fs:[ebx+ecx*4+8], eax
mov al, gs:[0x14]
mov gs:[ebx], ah
add dword ptr fs:[eax+4], 0x12345678
push dword ptr fs:[8]
pop dword ptr fs:[8]
movdqu xmm1, gs:[esi]
xadd fs:[edi], ecx
mov ds, fs:[eax]
call dword ptr gs:[0x10]
jmp dword ptr gs:[0x10]
"""
STRINGS = """
movsb
.byte 0xa5
stosb
stosw
stosd
lodsb
lodsd
scasb
cmpsb
rep movsb
rep stosd
repne scasb
repe cmpsb
.byte 0xf3, 0xad
.byte 0xf3, 0xa5
.byte 0x64, 0xac
.byte 0x67, 0xa4
insb
.byte 0xf3, 0x6e
maskmovdqu xmm0, xmm1
"""
FLOAT = """
fld dword ptr [esi]
fld tbyte ptr [esi]
fstp qword ptr [esi+8]
faddp st(1)
fnstsw ax
fnstcw [ebx]
fnsave [ebx]
fwait
fxsave [ebx]
ldmxcsr [ebx]
movq mm1, [ebx]
paddd mm0, mm1
emms
movaps xmm1, [ebx]
addps xmm0, xmm1
addsd xmm0, [esp]
pshufb xmm1, [eax]
pcmpistri xmm0, [eax], 3
movd eax, xmm1
cvtsi2sd xmm0, dword ptr [ebx]
pinsrw xmm1, eax, 3
clflush [eax]
"""
FLOW = """
loop_top: add eax, [esi]
jz next
js loop_top
jecxz next
loop loop_top
loopne far
call next
jmp loop_top
next: dec ecx
jnz far
call dword ptr [ebx]
call eax
jmp dword ptr [ebx+eax*4]
jmp ecx
ret
ret 8
jmp 0x80001234
call 0x80000ffe
far: jmp 0x7ffffff0
"""
FOLLOWED = """
jmp two
one: inc eax
jmp three
two: inc ebx
jmp one
three: ret
"""
SYSTEM = """
mov eax, cr0
mov cr3, eax
invlpg [eax]
in al, dx
out 0x80, al
cpuid
daa
hlt
.byte 0xcf
int 0x80
int3
.byte 0xf1
ud2
retf
lgdt [eax]
wrmsr
sysenter
bound eax, [ebx]
arpl ax, bx
.byte 0xd6
"""
STATE_DEPENDENT = """
fld1
paddd mm0, mm1
addps xmm0, xmm1
movd eax, xmm0
fwait
rdtsc
pushfd
popfd
cli
sti
nop
"""
SOFT = """
mov eax, [esi]
mov ecx, [ebp+esi*2-5]
mov byte ptr [0x1000], 7
mov dword ptr [ebx], 0x12345678
mov [esp], ah
mov ch, [esp]
mov eax, cs:[ebx]
mov cs:[ebx], eax
mov eax, fs:[0]
mov fs:[ebx+ecx*4+8], al
mov al, [0x12345678]
mov [0x12345678], eax
add [esi+8], ax
lock xadd [edi], ecx
shl dword ptr [ebx], cl
lock cmpxchg8b [esi]
bts [ebx], ecx
bt word ptr [ebx], cx
push eax
push 0x12345678
push -5
push dword ptr gs:[8]
push ecx
pop esp
pop ecx
pop dword ptr [esp+4]
.byte 0x0f, 0xa8
mov [ecx], gs
pushal
popal
pushfd
popfd
leave
xlatb
fld tbyte ptr [esi]
fnsave [ebx]
movq mm1, [ebx]
movaps xmm1, [ebx]
movups [ebx], xmm1
movss xmm1, [ebx]
fxsave [ebx]
.byte 0xf3, 0xa5
maskmovdqu xmm0, xmm1
call dword ptr [ebx]
call eax
call next
next: jmp dword ptr [ebx+eax*4]
ret
ret 8
"""

GROUPS: dict[str, tuple[Block, ...]] = {
    "integer": (Block("operands", OPERANDS), Block("arithmetic", ALU)),
    "stack": (Block("stack, flags, segment registers", STACK),),
    "segmented": (Block("through FS and GS", SEGMENTED),),
    "strings": (Block("strings", STRINGS),),
    "float": (Block("x87, MMX, SSE", FLOAT),),
    "flow": (
        Block("jumps, calls, returns", FLOW),
        Block("jumps are followed inside the page", FOLLOWED),
        Block("16-bit jumps", b"\x66\xeb\x00\x66\x74\x00\x66\xe8\x00\x00\x66\xc3\x66\xff\xe0\x66\xff\xd0"),
    ),
    "system": (
        Block("simulated", SYSTEM),
        Block("no such instruction", b"\x0f\x05"),
        Block("LOCK where it can't be", b"\xf0\x40"),
        Block("more than 15 bytes", b"\x2e" * 15 + b"\x40"),
    ),
    "modes": (
        *(Block("what depends on the mode", STATE_DEPENDENT, mode)
          for mode in (KERNEL, modes.USER, modes.NO_FPU, modes.NO_SSE, modes.TSC_SIMULATED | modes.USER)),
        Block("the machine was paused or restored", "rdtsc\nnop", modes.TSC_OFFSET),
    ),
    "verify": (
        Block("bytes are checked", "inc eax\nmov eax, [ebx]\njmp next\nnext: ret", verify=True),
        Block("call and loop", "call next\nnext: loop next\nsti\npopfd", modes.USER, True),
    ),
    "soft": (
        Block("data by the software TLB", SOFT, modes.SOFT | modes.USER),
        Block("bytes are checked", "inc eax\nmov eax, [ebx]", modes.SOFT | modes.USER, True),
    ),
    "crossing": (
        Block("a move", "mov eax, [ebx+0x12345678]", crosses=True),
        Block("a jump", "jz 0x80000800", crosses=True),
        Block("a call", "call 0x80000800", crosses=True),
        Block("a simulated one", "mov cr3, eax", crosses=True),
        Block("verified", "mov eax, 0x12345678", verify=True, crosses=True),
    ),
}
