# Prints numbered lines for ever; COUNT holds the number of the last one whose every byte was written.

COUNT = 0x200000

start:
    xor ebx, ebx
next_line:
    inc ebx
    mov eax, ebx
    lea esi, [text]
    call say
    mov [COUNT], ebx
    jmp next_line

text: .asciz "line "
