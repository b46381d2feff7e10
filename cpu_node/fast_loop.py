"""The translator's inner loop: its assembly text, and where in memory it finds and leaves what it works on.

What it does, and the form of templates in memory, is said in fast_unsafe.py. It is called as a function
without arguments; RAX is 1 where it stopped at an instruction that Python must do, else 0 and the chunk is
complete. First all runs of instructions are put out: from the start, then from each target of their jumps
inside the page (`ahead`). Then the rel32 are filled in (`resolve`): those that lead into this chunk, or out
of it through a stub behind it. What has to do with other chunks is left in the list of fixups.
"""

from __future__ import annotations

from cpu_node import layout as at
from cpu_node.encode import EXIT_CHAIN, JUMP_R8, MOV_R8
from cpu_node.line import PAGE

# Offsets from layout.TRANSLATOR. A fixup is (end of a rel32 from the chunk's start, or -1 for a return
# site; the target's offset in the page), a stub (target, place), an offset a word, hosts and places
# dwords from the start.
CODE, PARAMETERS, PAGE_COPY, HERE, KNOWN = 0x0000, 0x1000, 0x2000, 0x3800, 0x4000
OFFSETS, HOSTS, FIXUPS, STUBS, PLACES, ARENA = 0x5000, 0x6000, 0x8000, 0xA000, 0xC000, 0x10000
NODE = 1024  # bytes of a node of the trie
# Flags of a leaf: what it puts out, and what follows.
GUEST, WITH_VA, BEHIND, WITH_TARGET, SHORT = (1 << n for n in range(5))
FOLLOWS, RETURN, ENDS, MAY_CROSS, TAIL = (1 << n for n in range(5, 10))
# Offsets of parameters: host address of the next byte, guest offset, instructions left, ...
OUT, I, LEFT, ROOT, VA0, COUNT, N_FIXUPS, FOLLOWING, TO, START = 0, *range(8, 44, 4)
ENDED, SPARE, CURSOR = 48, 52, 56  # the run is at its end; `left` that stays; first fixup not followed


def text() -> str:
    """For keystone, to lie at layout.TRANSLATOR + CODE."""
    base = at.TRANSLATOR
    return f"""
        push rbx
        push rbp
        push r12
        push r13
        push r14
        push r15
        movabs r14, {base + PARAMETERS:#x}
        movabs rsi, {base + PAGE_COPY:#x}
        movabs r9, {base + ARENA:#x}
        movabs r10, {base + KNOWN:#x}
        movabs r11, {base + OFFSETS:#x}
        movabs r12, {base + HOSTS:#x}
        movabs r13, {base + FIXUPS:#x}
        mov eax, [r14+{COUNT}]
        lea r11, [r11+rax*2]
        lea r12, [r12+rax*4]
        mov eax, [r14+{N_FIXUPS}]
        lea r13, [r13+rax*8]
        mov rdi, [r14+{OUT}]
        mov rbx, [r14+{START}]
        mov r8d, [r14+{I}]
        mov r15d, [r14+{LEFT}]
        cmp dword ptr [r14+{ENDED}], 0
        jne ended
    next:
        test r15d, r15d
        jz join
        cmp r8d, {PAGE}
        jae join
        bt dword ptr [r10], r8d
        jc join
        mov eax, [r14+{ROOT}]
        lea rcx, [rsi+r8]
    walk:
        movzx edx, byte ptr [rcx]
        inc rcx
        lea rdx, [rax+rdx*4]
        mov eax, [r9+rdx]
        test eax, eax
        jz need
        test al, 1
        jz walk
        lea rbp, [r9+rax-1]
        movzx eax, word ptr [rbp]
        movzx edx, byte ptr [rbp+2]
        lea ecx, [r8+rdx]
        cmp ecx, {PAGE}
        jbe fits
        test eax, {MAY_CROSS}
        jz need
    fits:
        dec r15d
        bts dword ptr [r10], r8d
        mov [r11], r8w
        add r11, 2
        mov rdx, rdi
        sub rdx, rbx
        mov [r12], edx
        mov [r14+r8*4+{PLACES - PARAMETERS}], edx
        bts dword ptr [r14+{HERE - PARAMETERS}], r8d
        add r12, 4
        inc dword ptr [r14+{COUNT}]
        mov [r14+{FOLLOWING}], ecx
        test eax, {WITH_TARGET}
        jz put
        test eax, {SHORT}
        jz long
        movsx edx, byte ptr [rsi+rcx-1]
        jmp have
    long:
        mov edx, [rsi+rcx-4]
    have:
        add edx, ecx
        mov [r14+{TO}], edx
        test eax, {FOLLOWS}
        jz put
        cmp edx, {PAGE}
        jae put
        bt dword ptr [r10], edx
        jc put
        mov r8d, edx
        jmp next
    put:
        movzx ecx, byte ptr [rbp+4]
        lea rdx, [rbp+16]
        call copy
        test eax, {GUEST}
        jz middle
        movzx edx, byte ptr [rbp+3]
        mov ecx, [r14+{FOLLOWING}]
        sub ecx, r8d
        sub ecx, edx
        push rax
        movzx eax, byte ptr [rbp+7]
        sub ecx, eax
        pop rax
        add rdx, rsi
        add rdx, r8
        call copy
    middle:
        movzx ecx, byte ptr [rbp+5]
        movzx edx, word ptr [rbp+8]
        add rdx, rbp
        call copy
        test eax, {TAIL}
        jz whole
        movzx ecx, byte ptr [rbp+7]
        mov edx, [r14+{FOLLOWING}]
        sub edx, ecx
        add rdx, rsi
        call copy
    whole:
        test eax, {WITH_VA}
        jz after
        mov edx, [r14+{VA0}]
        test eax, {BEHIND}
        jz here
        add edx, [r14+{FOLLOWING}]
        jmp address
    here:
        add edx, r8d
    address:
        mov [rdi], edx
        add rdi, 4
    after:
        movzx ecx, byte ptr [rbp+6]
        movzx edx, word ptr [rbp+10]
        add rdx, rbp
        call copy
        test eax, {WITH_TARGET}
        jz noted
        add rdi, 4
        mov rdx, rdi
        sub rdx, rbx
        mov [r13], edx
        mov edx, [r14+{TO}]
        mov [r13+4], edx
        add r13, 8
        inc dword ptr [r14+{N_FIXUPS}]
    noted:
        mov r8d, [r14+{FOLLOWING}]
        test eax, {RETURN}
        jz go_on
        mov dword ptr [r13], -1
        mov [r13+4], r8d
        add r13, 8
        inc dword ptr [r14+{N_FIXUPS}]
    go_on:
        test eax, {ENDS}
        jz next
        jmp ended
    join:
        mov byte ptr [rdi], 0xe9
        add rdi, 5
        mov rdx, rdi
        sub rdx, rbx
        mov [r13], edx
        mov [r13+4], r8d
        add r13, 8
        inc dword ptr [r14+{N_FIXUPS}]
    ended:
        mov dword ptr [r14+{ENDED}], 0
        mov rcx, [r14+{CURSOR}]
    ahead:
        cmp rcx, r13
        jae resolve
        mov eax, [rcx]
        mov edx, [rcx+4]
        add rcx, 8
        cmp eax, -1
        je ahead
        cmp edx, {PAGE}
        jae ahead
        bt dword ptr [r10], edx
        jc ahead
        cmp r15d, [r14+{SPARE}]
        jle resolve
        mov [r14+{CURSOR}], rcx
        mov r8d, edx
        jmp next
    resolve:
        movabs rcx, {base + FIXUPS:#x}
        mov r12, rcx
        movabs rbp, {base + STUBS:#x}
        mov r11, rbp
    each:
        cmp rcx, r13
        jae all
        mov eax, [rcx]
        mov edx, [rcx+4]
        add rcx, 8
        cmp eax, -1
        je report
        cmp edx, {PAGE}
        jae search
        bt dword ptr [r14+{HERE - PARAMETERS}], edx
        jc within
        bt dword ptr [r10], edx
        jc report
    search:
        mov r8, rbp
    compare:
        cmp r8, r11
        jae stub
        cmp [r8], edx
        je stubbed
        add r8, 8
        jmp compare
    stub:
        mov [r11], edx
        mov r9, rdi
        sub r9, rbx
        mov [r11+4], r9d
        add r11, 8
        mov word ptr [rdi], {int.from_bytes(MOV_R8, "little"):#x}
        mov r9d, [r14+{VA0}]
        add r9d, edx
        mov [rdi+2], r9d
        mov r9d, {int.from_bytes(JUMP_R8, "little"):#x}
        cmp edx, {PAGE}
        jae outside
        mov r9d, {int.from_bytes(EXIT_CHAIN, "little"):#x}
    outside:
        mov [rdi+6], r9d
        add rdi, 10
    stubbed:
        mov r8d, [r8+4]
        cmp edx, {PAGE}
        jae link
        mov [r12], eax
        mov [r12+4], edx
        add r12, 8
        jmp link
    within:
        mov r8d, [r14+rdx*4+{PLACES - PARAMETERS}]
    link:
        sub r8d, eax
        mov [rbx+rax-4], r8d
        jmp each
    report:
        mov [r12], eax
        mov [r12+4], edx
        add r12, 8
        jmp each
    all:
        movabs rcx, {base + FIXUPS:#x}
        sub r12, rcx
        shr r12, 3
        mov [r14+{N_FIXUPS}], r12d
        xor eax, eax
        jmp leave
    need:
        mov eax, 1
    leave:
        mov [r14+{OUT}], rdi
        mov [r14+{I}], r8d
        mov [r14+{LEFT}], r15d
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbp
        pop rbx
        ret
    copy:
        movups xmm0, [rdx]
        movups [rdi], xmm0
        cmp ecx, 16
        jbe copied
        push rcx
        push rdi
    more:
        add rdx, 16
        add rdi, 16
        sub ecx, 16
        movups xmm0, [rdx]
        movups [rdi], xmm0
        cmp ecx, 16
        ja more
        pop rdi
        pop rcx
    copied:
        add rdi, rcx
        ret
    """
