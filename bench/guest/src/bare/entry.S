// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The first vCPU and the one that it turns on come in here at EL1 with the MMU
// off; the vectors.

    .section .text.entry, "ax"
    .global _start
_start:
    movz    xzr, #{stop}                // the end of a VM's start
    mov     x19, x0
    mov     x20, x1
    mov     x21, x2
    ldr     x1, =STACKS + {stack_size}
    bl      set_up
    mov     x0, x19
    mov     x1, x20
    mov     x2, x21
    bl      {main}
1:  wfi
    b       1b

// CPU_ON.
    .global second_start
second_start:
    ldr     x1, =STACKS + 2 * {stack_size}
    bl      set_up
    bl      {second}
    b       1b

// x1 = stack. Identity map in 1 GiB blocks, the first for devices; caches on.
set_up:
    mov     sp, x1
    ldr     x1, =vectors
    msr     vbar_el1, x1
    ldr     x1, =ROOT
    msr     ttbr0_el1, x1
    ldr     x2, =0x0060000000000401     // device, not to be executed
    ldr     x3, =0x0000000040000705     // normal, inner shareable
    str     x2, [x1], #8
    mov     x4, #0x40000000
    mov     x5, #16
2:  str     x3, [x1], #8
    add     x3, x3, x4
    subs    x5, x5, #1
    b.ne    2b
    mov     x1, #0xff00                 // MAIR: 0 nGnRnE, 1 normal write-back
    msr     mair_el1, x1
    ldr     x1, =0x200803519            // T0SZ 25, write-back inner shareable walks, no TTBR1, 40 bits
    msr     tcr_el1, x1
    dsb     ish
    isb
    tlbi    vmalle1
    dsb     nsh
    isb
    ldr     x1, =0x30d01805             // M, C, I
    msr     sctlr_el1, x1
    isb
    ret
    .ltorg

    .text
    .balign 2048
vectors:
    .rept   5
    .balign 128
    b       unexpected
    .endr
    .balign 128
    sub     sp, sp, #176
    stp     x0, x1, [sp]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x29, [sp, #144]
    str     x30, [sp, #160]
    bl      {interrupt}
    ldr     x30, [sp, #160]
    ldp     x18, x29, [sp, #144]
    ldp     x16, x17, [sp, #128]
    ldp     x14, x15, [sp, #112]
    ldp     x12, x13, [sp, #96]
    ldp     x10, x11, [sp, #80]
    ldp     x8, x9, [sp, #64]
    ldp     x6, x7, [sp, #48]
    ldp     x4, x5, [sp, #32]
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    add     sp, sp, #176
    eret
    .rept   10
    .balign 128
    b       unexpected
    .endr
unexpected:
    mrs     x0, esr_el1
    ldr     x1, ={fault}
    str     x0, [x1]
    b       unexpected

    .section .bss.tables, "aw", %nobits
    .balign 4096
ROOT:
    .space  4096
STACKS:
    .space  2 * {stack_size}
