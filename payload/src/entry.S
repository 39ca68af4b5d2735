// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The first CPU and those that PSCI turns on come in here at EL1 with the MMU
// off; the vectors; a guard that a broken test is unwound to.

    .section .text.entry, "ax"
    .global _start
_start:
    ldr     x1, =STACKS + {stack_size}
    mov     sp, x1
    ldr     x1, =__bss_start
    ldr     x2, =__bss_end
1:  stp     xzr, xzr, [x1], #16
    cmp     x1, x2
    b.lo    1b
    mov     x0, #0
    bl      set_up
    mov     x0, #0
    bl      {main}
2:  wfi
    b       2b

// CPU_ON: x0 = CPU number.
    .global secondary_start
secondary_start:
    mov     x19, x0
    ldr     x1, =STACKS
    mov     x2, #{stack_size}
    add     x3, x0, #1
    madd    x1, x2, x3, x1
    mov     sp, x1
    bl      set_up
    mov     x0, x19
    bl      {secondary}
    b       2b

// x0 = CPU number. Identity map in 1 GiB blocks, caches on.
    .global set_up
set_up:
    msr     tpidr_el1, x0
    ldr     x1, =vectors
    msr     vbar_el1, x1
    ldr     x1, ={root}
    msr     ttbr0_el1, x1
    mov     x1, #0xff00                 // MAIR: 0 nGnRnE, 1 normal write-back
    msr     mair_el1, x1
    ldr     x1, =0x200803519            // T0SZ 25, write-back inner shareable walks, no TTBR1, 40 bits
    msr     tcr_el1, x1
    isb
    tlbi    vmalle1
    dsb     nsh
    isb
    ldr     x1, =0x30d01805             // M, C, I
    msr     sctlr_el1, x1
    isb
    ret
    .ltorg

    .macro  vector, kind
    .balign 128
    sub     sp, sp, #288
    stp     x0, x1, [sp]
    mov     x0, #\kind
    b       save
    .endm

    .text
    .balign 2048
vectors:
    .irp    kind, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vector  \kind
    .endr

save:
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    mrs     x2, elr_el1
    mrs     x3, spsr_el1
    stp     x30, x2, [sp, #240]
    str     x3, [sp, #256]
    mov     x1, sp
    bl      {exception}
    ldp     x30, x2, [sp, #240]
    ldr     x3, [sp, #256]
    msr     elr_el1, x2
    msr     spsr_el1, x3
    ldp     x28, x29, [sp, #224]
    ldp     x26, x27, [sp, #208]
    ldp     x24, x25, [sp, #192]
    ldp     x22, x23, [sp, #176]
    ldp     x20, x21, [sp, #160]
    ldp     x18, x19, [sp, #144]
    ldp     x16, x17, [sp, #128]
    ldp     x14, x15, [sp, #112]
    ldp     x12, x13, [sp, #96]
    ldp     x10, x11, [sp, #80]
    ldp     x8, x9, [sp, #64]
    ldp     x6, x7, [sp, #48]
    ldp     x4, x5, [sp, #32]
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    add     sp, sp, #288
    eret

// x0 = function, x1 = its argument, x2 = place to keep the stack pointer.
// Gives the result in x0 and 0 in x1; or, from `unwind`, 1 in x1.
    .global guarded
guarded:
    stp     x29, x30, [sp, #-96]!
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x25, x26, [sp, #64]
    stp     x27, x28, [sp, #80]
    mov     x3, sp
    str     x3, [x2]
    mov     x3, x0
    mov     x0, x1
    blr     x3
    mov     x1, #0
1:  ldp     x27, x28, [sp, #80]
    ldp     x25, x26, [sp, #64]
    ldp     x23, x24, [sp, #48]
    ldp     x21, x22, [sp, #32]
    ldp     x19, x20, [sp, #16]
    ldp     x29, x30, [sp], #96
    ret
// x0 = the stack pointer that was kept.
    .global unwind
unwind:
    mov     sp, x0
    mov     x1, #1
    b       1b

// x0 = 31 words: x0 to x30 before and after an SMC.
    .global smc_with_all
smc_with_all:
    stp     x29, x30, [sp, #-112]!
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x25, x26, [sp, #64]
    stp     x27, x28, [sp, #80]
    str     x0, [sp, #96]
    mov     x30, x0
    ldp     x0, x1, [x30]
    ldp     x2, x3, [x30, #16]
    ldp     x4, x5, [x30, #32]
    ldp     x6, x7, [x30, #48]
    ldp     x8, x9, [x30, #64]
    ldp     x10, x11, [x30, #80]
    ldp     x12, x13, [x30, #96]
    ldp     x14, x15, [x30, #112]
    ldp     x16, x17, [x30, #128]
    ldp     x18, x19, [x30, #144]
    ldp     x20, x21, [x30, #160]
    ldp     x22, x23, [x30, #176]
    ldp     x24, x25, [x30, #192]
    ldp     x26, x27, [x30, #208]
    ldp     x28, x29, [x30, #224]
    ldr     x30, [x30, #240]
    smc     #0
    stp     x0, x30, [sp, #-16]!
    ldr     x0, [sp, #112]
    stp     x2, x3, [x0, #16]
    stp     x4, x5, [x0, #32]
    stp     x6, x7, [x0, #48]
    stp     x8, x9, [x0, #64]
    stp     x10, x11, [x0, #80]
    stp     x12, x13, [x0, #96]
    stp     x14, x15, [x0, #112]
    stp     x16, x17, [x0, #128]
    stp     x18, x19, [x0, #144]
    stp     x20, x21, [x0, #160]
    stp     x22, x23, [x0, #176]
    stp     x24, x25, [x0, #192]
    stp     x26, x27, [x0, #208]
    stp     x28, x29, [x0, #224]
    str     x1, [x0, #8]
    ldp     x2, x3, [sp], #16
    str     x2, [x0]
    str     x3, [x0, #240]
    ldp     x27, x28, [sp, #80]
    ldp     x25, x26, [sp, #64]
    ldp     x23, x24, [sp, #48]
    ldp     x21, x22, [sp, #32]
    ldp     x19, x20, [sp, #16]
    ldp     x29, x30, [sp], #112
    ret

// Runs x0 at EL0 (its alias) until it makes an SVC, which unwinds.
    .global enter_el0
enter_el0:
    msr     elr_el1, x0
    mov     x1, #0x3c0
    msr     spsr_el1, x1
    isb
    eret

    .section .bss.stacks, "aw", %nobits
    .balign 4096
    .global STACKS
STACKS:
    .space  {max_cpus} * {stack_size}
