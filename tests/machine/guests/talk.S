# Prints numbered lines for ever; says what hexadecimal number was on each line that it hears.
# COUNT holds the number of the last line whose every byte was written.

COUNT = 0x200000

start:
    xor ebx, ebx
    xor edi, edi                # of the line that it hears
next_line:
    inc ebx
    mov eax, ebx
    lea esi, [text]
    call say
    mov [COUNT], ebx
hear:
    mov dx, COM1+5
    in al, dx
    test al, 1
    jz next_line
    mov dx, COM1
    in al, dx
    cmp al, 10
    je heard
    sub al, 48                  # '0'
    cmp al, 10
    jb digit
    sub al, 39                  # 'a' - '9' - 1
digit:
    and eax, 15
    shl edi, 4
    or edi, eax
    jmp hear
heard:
    mov eax, edi
    xor edi, edi
    lea esi, [heard_text]
    call say
    jmp hear

text: .asciz "line "
heard_text: .asciz "heard "
