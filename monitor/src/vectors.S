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

    // Registers of the frame in x1, two at a time.
    .macro  pairs, op, first, second, others:vararg
    \op     x\first, x\second, [x1, #8 * \first]
    .ifnb   \others
    pairs   \op, \others
    .endif
    .endm

    .macro  general, op
    pairs   \op, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29
    .endm

    .text
    .balign 2048
    .global vectors_el3
vectors_el3:
    .irp    kind, 0, 1, 2, 3, 0, 1, 2, 3
    own     \kind                       // with SP_EL0 (not used), with SP_EL3
    .endr
    // Synchronous, IRQ, FIQ, SError (`Cause`); again for an AArch32 EL2, which is
    // not reached.
    .irp    kind, 0, 1, 1, 2, 0, 1, 1, 2
    lower   \kind
    .endr

save:
    mrs     x1, tpidr_el3
    ldr     x1, [x1, #{per_cpu_frame}]
    stp     x2, x3, [x1, #16]
    ldp     x2, x3, [sp], #16           // x0, x1
    stp     x2, x3, [x1, #0]
    general stp
    mrs     x2, elr_el3
    stp     x30, x2, [x1, #240]
    mrs     x3, spsr_el3
    str     x3, [x1, #{frame_spsr}]
    mov     x29, xzr
    mov     x30, xzr
    b       {from_lower}

    // The way into a world: the stack is empty again.
    .global resume
resume:
    mrs     x0, tpidr_el3
    ldr     x1, [x0, #{per_cpu_stack}]
    mov     sp, x1
    ldr     x1, [x0, #{per_cpu_frame}]
    ldp     x30, x2, [x1, #240]
    msr     elr_el3, x2
    ldr     x3, [x1, #{frame_spsr}]
    msr     spsr_el3, x3
    general ldp
    ldp     x2, x3, [x1, #16]
    ldp     x0, x1, [x1, #0]
    eret
    // Nothing behind ERET is run ahead of it with the other world's registers.
    dsb     nsh
    isb

broken:
    mrs     x1, tpidr_el3
    ldr     x1, [x1, #{per_cpu_stack}]
    add     sp, x1, #{emergency_stack}
    bl      {from_self}
1:  wfi
    b       1b
