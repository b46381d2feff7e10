# lines PAUSE_MS SALT: numbered lines both ways on a raw terminal (standard input and output), checked here.
#
# Out, 64 bytes each, without end: "G number taken characters\n"; `taken`: how many lines have come in.
# In: "H number characters\n". All characters follow from number and salt, so each byte is known beforehand.
# "Q..." ends it: the last line begins with Z. A wrong line in is told as "E taken", then what came.
# 32-bit Linux system calls: fork, one process for each direction, a shared page between them.

SIZE = 64
TAKEN = 0
WRONG = 4
ENDED = 8
GOT = 64

start:
    mov esi, [esp+8]
    call decimal
    imul eax, eax, 1000000
    mov [nap+4], eax
    mov esi, [esp+12]
    call decimal
    mov [salt], eax
    mov eax, 192                # mmap2: one page, read and write, shared and anonymous
    xor ebx, ebx
    mov ecx, 4096
    mov edx, 3
    mov esi, 0x21
    mov edi, -1
    xor ebp, ebp
    int 0x80
    mov [shared], eax
    mov eax, 2                  # fork
    int 0x80
    test eax, eax
    jz reader

writer:
    mov ebp, [shared]
    cmp dword ptr [ebp+WRONG], 0
    jne wrong
    cmp dword ptr [ebp+ENDED], 0
    jne ended
    mov al, 71                  # G
    call say
    mov eax, 162                # nanosleep
    lea ebx, [nap]
    xor ecx, ecx
    int 0x80
    jmp writer

ended:
    mov al, 90                  # Z
    call say
    xor ebx, ebx
    jmp exit

wrong:
    mov al, 69                  # E
    call say
    lea ecx, [ebp+GOT]
    call put
    mov ebx, 1
exit:
    mov eax, 1
    int 0x80

say:                            # the next line, beginning with al
    lea edi, [line]
    mov [edi], al
    inc edi
    inc dword ptr [number]
    mov eax, [number]
    call hex
    mov eax, [ebp+TAKEN]
    call hex
    mov byte ptr [edi], 32
    inc edi
    mov eax, [number]
    mov ecx, SIZE - 21
    call fill
    lea ecx, [line]
put:                            # a line at ecx
    mov edx, SIZE
put_more:
    mov ebx, 1
    mov eax, 4                  # write
    int 0x80
    test eax, eax
    js put_end
    add ecx, eax
    sub edx, eax
    jnz put_more
put_end:
    ret

reader:
    mov ebp, [shared]
    lea ecx, [line]
    mov edx, SIZE
read_more:
    mov eax, 3                  # read
    xor ebx, ebx
    int 0x80
    test eax, eax
    jle reader_ends
    add ecx, eax
    sub edx, eax
    jnz read_more
    cmp byte ptr [line], 81     # Q
    je reader_ends
    mov eax, [ebp+TAKEN]
    inc eax
    mov edx, eax
    lea edi, [expected]
    mov byte ptr [edi], 72      # H
    inc edi
    call hex
    mov byte ptr [edi], 32
    inc edi
    mov eax, edx
    mov ecx, SIZE - 12
    call fill
    lea esi, [line]
    lea edi, [expected]
    mov ecx, SIZE
    cld
    repe cmpsb
    jne reader_wrong
    inc dword ptr [ebp+TAKEN]
    jmp reader
reader_wrong:
    lea esi, [line]
    lea edi, [ebp+GOT]
    mov ecx, SIZE
    rep movsb
    mov dword ptr [ebp+WRONG], 1
reader_ends:
    mov dword ptr [ebp+ENDED], 1
    xor ebx, ebx
    jmp exit

fill:                           # ecx characters of line eax, and a line feed, to edi
    mov ebx, 0x9E3779B1
    imul eax, ebx
    xor eax, [salt]
    or eax, 1
fill_more:
    mov ebx, eax
    shl ebx, 13
    xor eax, ebx
    mov ebx, eax
    shr ebx, 17
    xor eax, ebx
    mov ebx, eax
    shl ebx, 5
    xor eax, ebx
    mov ebx, eax
    shr ebx, 8
    and ebx, 31
    add ebx, 65
    mov [edi], bl
    inc edi
    dec ecx
    jnz fill_more
    mov byte ptr [edi], 10
    ret

hex:                            # a space and eax in eight digits to edi
    mov byte ptr [edi], 32
    inc edi
    mov ecx, 8
hex_more:
    rol eax, 4
    mov ebx, eax
    and ebx, 15
    mov bl, [digits+ebx]
    mov [edi], bl
    inc edi
    dec ecx
    jnz hex_more
    ret

decimal:                        # eax: the number in decimal digits at esi
    xor eax, eax
decimal_more:
    movzx ebx, byte ptr [esi]
    sub ebx, 48
    js decimal_end
    imul eax, eax, 10
    add eax, ebx
    inc esi
    jmp decimal_more
decimal_end:
    ret

digits: .ascii "0123456789abcdef"
nap: .long 0, 0
salt: .long 0
shared: .long 0
number: .long 0
line: .zero 64
expected: .zero 64
