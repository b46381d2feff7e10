# Prints numbered lines for ever, and hears keys: p powers the machine off, r resets it, other keys are shown.

start:
    xor ebx, ebx
next_line:
    inc ebx
    mov eax, ebx
    lea esi, [text]
    call say
    mov dx, COM1+5
    in al, dx
    test al, 1
    jz next_line
    mov dx, COM1
    in al, dx
    cmp al, 'p'
    je off
    cmp al, 'r'
    je reset
    movzx eax, al
    lea esi, [key]
    call say
    jmp next_line
off:
    lea esi, [bye]
    call print
    jmp power_off
reset:
    mov al, 0xfe                # pulse output port bit 0
    out 0x64, al
    cli
    hlt

text: .asciz "line "
key: .asciz "key "
bye: .asciz "good night\r\n"
