# Meets what a machine reports: unknown MSRs, ports nobody owns, instructions this processor does not have.

start:
    call set_up_idt

    lea eax, [after_rdmsr]
    mov [resume], eax
    lea eax, [the_rdmsr]
    lea esi, [rdmsr_text]
    call say
    mov ecx, 0x12345678
the_rdmsr:
    rdmsr
after_rdmsr:

    lea eax, [after_wrmsr]
    mov [resume], eax
    lea eax, [the_wrmsr]
    lea esi, [wrmsr_text]
    call say
    mov ecx, 0xc0001234
    mov eax, 0x89abcdef
    mov edx, 0x01234567
the_wrmsr:
    wrmsr
after_wrmsr:

    lea eax, [after_ud2]
    mov [resume], eax
    lea eax, [the_ud2]
    lea esi, [ud2_text]
    call say
the_ud2:
    .byte 0x0f, 0x0b            # ud2: for this very purpose
after_ud2:

    lea eax, [after_xgetbv]
    mov [resume], eax
    lea eax, [the_xgetbv]
    lea esi, [xgetbv_text]
    call say
    xor ecx, ecx
the_xgetbv:
    .byte 0x0f, 0x01, 0xd0      # xgetbv: of processors with XSAVE
after_xgetbv:

    lea eax, [after_vex]
    mov [resume], eax
    lea eax, [the_vex]
    lea esi, [vex_text]
    call say
the_vex:
    .byte 0xc5, 0xf8, 0x77      # vzeroupper: AVX; of older ones: an LDS that has no memory operand
after_vex:

    mov dx, 0x2e9
    mov eax, 0
    in al, dx
    lea esi, [byte_text]
    call say
    mov dx, 0x3a4
    mov eax, 0
    in ax, dx
    lea esi, [word_text]
    call say
    mov dx, 0x3b4
    mov eax, 0
    in eax, dx
    lea esi, [long_text]
    call say
    mov dx, 0x2e9
    mov al, 0x5a
    out dx, al
    lea esi, [done_text]
    call print
    jmp power_off

rdmsr_text: .asciz "rdmsr at "
wrmsr_text: .asciz "wrmsr at "
ud2_text: .asciz "ud2 at "
xgetbv_text: .asciz "xgetbv at "
vex_text: .asciz "vzeroupper at "
byte_text: .asciz "in al "
word_text: .asciz "in ax "
long_text: .asciz "in eax "
done_text: .asciz "done\r\n"
