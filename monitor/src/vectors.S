// SPDX-License-Identifier: MIT OR Apache-2.0
//
// EL3's vectors. What a lower level was doing is saved into the frame that
// TPIDR_EL3's record points to; Rust may point it to another frame; that one
// is resumed. Interrupts are always masked at EL3, so nothing nests.

    .macro  lower, kind
    .balign 128
    stp     x0, x1, [sp, #-16]!
    mov     x0, #\kind
    b       save
    .endm

    // EL3's own exceptions: the stack may be what broke.
    .macro  own, kind
    .balign 128
    msr     tpidr_el0, x0               // nobody goes on after this
    mov     x0, #\kind
    b       broken
    .endm

    .text
    .balign 2048
    .global vectors_el3
vectors_el3:
    own     0                           // SP_EL0: not used
    own     1
    own     2
    own     3
    own     0
    own     1
    own     2
    own     3
    lower   0                           // synchronous
    lower   1                           // IRQ
    lower   2                           // FIQ
    lower   3                           // SError
    lower   0                           // not reached: EL2 is AArch64
    lower   1
    lower   2
    lower   3

save:
    mrs     x1, tpidr_el3
    ldr     x1, [x1, #{per_cpu_frame}]
    stp     x2, x3, [x1, #16]
    ldp     x2, x3, [sp], #16           // x0, x1
    stp     x2, x3, [x1, #0]
    stp     x4, x5, [x1, #32]
    stp     x6, x7, [x1, #48]
    stp     x8, x9, [x1, #64]
    stp     x10, x11, [x1, #80]
    stp     x12, x13, [x1, #96]
    stp     x14, x15, [x1, #112]
    stp     x16, x17, [x1, #128]
    stp     x18, x19, [x1, #144]
    stp     x20, x21, [x1, #160]
    stp     x22, x23, [x1, #176]
    stp     x24, x25, [x1, #192]
    stp     x26, x27, [x1, #208]
    stp     x28, x29, [x1, #224]
    mrs     x2, elr_el3
    stp     x30, x2, [x1, #240]
    mrs     x3, spsr_el3
    str     x3, [x1, #{frame_spsr}]
    mov     x29, xzr
    mov     x30, xzr
    bl      {from_lower}

    // Also the way into a world for the first time: the stack is empty again.
    .global resume_current
resume_current:
    mrs     x0, tpidr_el3
    ldr     x1, [x0, #{per_cpu_stack}]
    mov     sp, x1
    ldr     x0, [x0, #{per_cpu_frame}]
    ldr     x2, [x0, #{frame_spsr}]
    msr     spsr_el3, x2
    ldp     x30, x2, [x0, #240]
    msr     elr_el3, x2
    ldp     x28, x29, [x0, #224]
    ldp     x26, x27, [x0, #208]
    ldp     x24, x25, [x0, #192]
    ldp     x22, x23, [x0, #176]
    ldp     x20, x21, [x0, #160]
    ldp     x18, x19, [x0, #144]
    ldp     x16, x17, [x0, #128]
    ldp     x14, x15, [x0, #112]
    ldp     x12, x13, [x0, #96]
    ldp     x10, x11, [x0, #80]
    ldp     x8, x9, [x0, #64]
    ldp     x6, x7, [x0, #48]
    ldp     x4, x5, [x0, #32]
    ldp     x2, x3, [x0, #16]
    ldp     x0, x1, [x0, #0]
    eret
    // Nothing behind ERET is run ahead of it with the other world's registers.
    dsb     nsh
    isb

broken:
    mrs     x1, tpidr_el3
    ldr     x1, [x1, #{per_cpu_emergency}]
    mov     sp, x1
    bl      {from_self}
1:  wfi
    b       1b
