# blocks FILE COUNT SEED STOP: writes runs of blocks of 4 KiB in FILE, and checks what it reads, without end.
#
# First all COUNT blocks, then 1 to 16 at random, by the page cache or directly. Told on standard output, in
# lines of 64 bytes: "W sequence block count" before, "A ..." after fsync has returned: that is acknowledged.
# After each, others are read back past the cache (O_DIRECT) and compared with what they must be, word by word.
# When the file STOP exists all are read back; "V sequence count 0" is the last line, status 0.
# Wrong: "E sequence block word" and "F found expected 0", status 1. A system call that fails: "S error line 0".
#
# Of block b in sequence s, with x = xorshift(s * 0x9e3779b1 ^ b * 0x85ebca6b ^ seed): word i is
# pattern[i] ^ x, but words 0 to 3 are magic, b, s, seed. pattern: xorshift, from 0x2545f491 on.

MAGIC = 0x42505442
BLOCK = 4096
MOST = 16
BSS = 0x09000000
PATTERN = 0x09001000
TABLE = 0x09010000
BUFFER = 0x09100000
EXPECTED = 0x09200000

start:
    mov esi, [esp+12]
    call decimal
    mov [blocks], eax
    mov esi, [esp+16]
    call decimal
    mov [seed], eax
    or eax, 1
    mov [random], eax
    mov eax, [esp+20]
    mov [stop], eax
    mov eax, 192                # mmap2: private, anonymous, fixed
    mov ebx, BSS
    mov ecx, 0x300000
    mov edx, 3
    mov esi, 0x32
    mov edi, -1
    xor ebp, ebp
    int 0x80
    call check
    mov eax, 5                  # open
    mov ebx, [esp+8]
    mov ecx, 0x42               # O_RDWR | O_CREAT
    mov edx, 0x1a4
    int 0x80
    call check
    mov [cached], eax
    mov eax, 5
    mov ebx, [esp+8]
    mov ecx, 0x4002             # O_RDWR | O_DIRECT
    xor edx, edx
    int 0x80
    call check
    mov [direct], eax
    mov eax, 0x2545F491
    xor ecx, ecx
pattern_more:
    call xorshift
    mov [PATTERN+ecx*4], eax
    inc ecx
    cmp ecx, BLOCK/4
    jb pattern_more

    mov dword ptr [first], 0
all_more:                       # each block once
    mov dword ptr [count], MOST
    call write_run
    mov eax, [first]
    add eax, MOST
    mov [first], eax
    cmp eax, [blocks]
    jb all_more

next:
    call choose
    call write_run
    call choose
    call verify_run
    mov eax, 33                 # access
    mov ebx, [stop]
    xor ecx, ecx
    int 0x80
    test eax, eax
    jnz next

    mov dword ptr [first], 0
final_more:
    mov dword ptr [count], MOST
    call verify_run
    mov eax, [first]
    add eax, MOST
    mov [first], eax
    cmp eax, [blocks]
    jb final_more
    mov eax, [blocks]
    mov [first], eax
    mov dword ptr [count], 0
    mov al, 86                  # V
    call say
    xor ebx, ebx
exit:
    mov eax, 1
    int 0x80

choose:                         # first and count
    call next_random
    shr eax, 8
    and eax, MOST-1
    inc eax
    mov [count], eax
    call next_random
    xor edx, edx
    mov ecx, [blocks]
    sub ecx, MOST
    div ecx
    mov [first], edx
    ret

next_random:
    mov eax, [random]
    call xorshift
    mov [random], eax
    ret

xorshift:                       # eax; uses ebx
    mov ebx, eax
    shl ebx, 13
    xor eax, ebx
    mov ebx, eax
    shr ebx, 17
    xor eax, ebx
    mov ebx, eax
    shl ebx, 5
    xor eax, ebx
    ret

content:                        # of block eax in sequence ecx, to edi, which moves on
    push eax
    push ecx
    mov ebx, 0x85EBCA6B
    imul eax, ebx
    mov ebx, 0x9E3779B1
    imul ecx, ebx
    xor eax, ecx
    xor eax, [seed]
    call xorshift
    mov edx, eax
    xor ecx, ecx
content_more:
    mov eax, [PATTERN+ecx*4]
    xor eax, edx
    mov [edi+ecx*4], eax
    inc ecx
    cmp ecx, BLOCK/4
    jb content_more
    pop ecx
    pop eax
    mov dword ptr [edi], MAGIC
    mov [edi+4], eax
    mov [edi+8], ecx
    mov ebx, [seed]
    mov [edi+12], ebx
    add edi, BLOCK
    ret

write_run:
    inc dword ptr [sequence]
    mov al, 87                  # W
    call say
    mov edi, BUFFER
    mov eax, [first]
    mov esi, [count]
write_more:
    mov ecx, [sequence]
    call content
    mov ecx, [sequence]
    mov [TABLE+eax*4], ecx
    inc eax
    dec esi
    jnz write_more
    call next_random
    mov ebx, [cached]
    test eax, 0x100
    jz write_cached
    mov ebx, [direct]
write_cached:
    mov eax, 181                # pwrite64
    call transfer
    mov eax, 118                # fsync
    mov ebx, [cached]
    int 0x80
    call check
    mov al, 65                  # A
    jmp say

transfer:                       # the run, by system call eax and file ebx
    mov ecx, BUFFER
    mov edx, [count]
    shl edx, 12
    mov esi, [first]
    mov edi, esi
    shl esi, 12
    shr edi, 20
    int 0x80
    cmp eax, edx
    jne failed
    ret

verify_run:
    mov ebx, [direct]
    mov eax, 180                # pread64
    call transfer
    xor ebp, ebp
verify_more:
    mov eax, [first]
    add eax, ebp
    mov ecx, [TABLE+eax*4]
    mov edi, EXPECTED
    call content
    mov esi, ebp
    shl esi, 12
    add esi, BUFFER
    mov edi, EXPECTED
    mov ecx, BLOCK/4
    cld
    repe cmpsd
    jne wrong
    inc ebp
    cmp ebp, [count]
    jb verify_more
    ret

wrong:                          # in the word before esi
    mov [sequence], eax
    mov eax, [TABLE+eax*4]
    xchg eax, [sequence]
    mov [first], eax
    mov eax, BLOCK/4 - 1
    sub eax, ecx
    mov [count], eax
    mov al, 69                  # E
    call say
    mov eax, [esi-4]
    mov [sequence], eax
    mov eax, [edi-4]
    mov [first], eax
    mov dword ptr [count], 0
    mov al, 70                  # F
    call say
    mov ebx, 1
    jmp exit

check:                          # a system call's result
    cmp eax, -4096
    ja failed
    ret
failed:
    mov [sequence], eax
    pop eax
    mov [first], eax
    mov dword ptr [count], 0
    mov al, 83                  # S
    call say
    mov ebx, 1
    jmp exit

say:                            # a line that begins with al
    lea edi, [line]
    mov [edi], al
    inc edi
    mov eax, [sequence]
    call hex
    mov eax, [first]
    call hex
    mov eax, [count]
    call hex
    mov ecx, 64 - 1 - 27 - 1
    mov al, 46
    cld
    rep stosb
    mov byte ptr [edi], 10
    mov eax, 4                  # write: one call, so that no other line comes between
    mov ebx, 1
    lea ecx, [line]
    mov edx, 64
    int 0x80
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
blocks: .long 0
seed: .long 0
random: .long 0
stop: .long 0
cached: .long 0
direct: .long 0
first: .long 0
count: .long 0
sequence: .long 0
line: .zero 64
