// SPDX-License-Identifier: MIT OR Apache-2.0
//
// From reset to Rust. All CPUs arrive here at EL3 with the MMU off, at the
// image's copy in flash or at its home in secure RAM: code up to `home` is
// position independent.
//
// Register use: x19 CPU number.

    .section .text.entry, "ax"
    .global _start
_start:
    msr     daifset, #15
    ldr     x0, =0x30c50830             // SCTLR_EL3: RES1 bits only (Arm ARM D24.2.149)
    msr     sctlr_el3, x0
    isb
    // Caches and TLBs may hold anything after reset (D7.5.3.1, D8.17.1).
    ic      iallu
    tlbi    alle3
    dsb     nsh
    isb

    // Cortex-A53, A57, A72: CPUECTLR_EL1.SMPEN before any cache or TLB
    // maintenance is broadcast or received (their TRMs, 4.3).
    mrs     x0, midr_el1
    ubfx    x1, x0, #4, #12
    lsr     x2, x0, #24
    cmp     x2, #0x41                   // Arm
    b.ne    2f
    mov     x2, #0xd03
    cmp     x1, x2
    mov     x2, #0xd07
    ccmp    x1, x2, #4, ne
    mov     x2, #0xd08
    ccmp    x1, x2, #4, ne
    b.ne    2f
    mrs     x0, s3_1_c15_c2_1
    orr     x0, x0, #(1 << 6)
    msr     s3_1_c15_c2_1, x0
    isb

2:  // CPU number: place of our affinity in the platform's table.
    mrs     x0, mpidr_el1
    ldr     x1, =0xff00ffffff
    and     x0, x0, x1
    adrp    x1, {affinities}
    add     x1, x1, :lo12:{affinities}
    mov     x19, #0
3:  ldr     x2, [x1], #8
    cmp     x2, x0
    b.eq    4f
    add     x19, x19, #1
    cmp     x19, #{max_cpus}
    b.lo    3b
park:
    wfi                                 // not in the table: never used
    b       park
4:  cbnz    x19, secondary

    // The first CPU moves the image home. No dirty line of an earlier life may
    // be written over it later: invalidate the place first (nothing is
    // allocated there while the MMU is off), then write past the caches.
    ldr     x0, =__image_start
    ldr     x1, =__image_end
    mrs     x3, ctr_el0
    ubfx    x3, x3, #16, #4
    mov     x2, #4
    lsl     x2, x2, x3                  // DminLine in bytes
5:  dc      ivac, x0
    add     x0, x0, x2
    cmp     x0, x1
    b.lo    5b
    dsb     sy
    adrp    x0, _start
    ldr     x1, =__image_start
    ldr     x2, =__load_end
    cmp     x0, x1
    b.eq    7f
6:  ldp     x3, x4, [x0], #16
    stp     x3, x4, [x1], #16
    cmp     x1, x2
    b.lo    6b
7:  ldr     x1, =__bss_end
8:  stp     xzr, xzr, [x2], #16
    cmp     x2, x1
    b.lo    8b
    dsb     sy
    ic      iallu
    dsb     sy
    b       10f

    // The others wait until Rust lets them in. The word is cleared by this CPU in
    // this life, so what it holds afterwards is no left-over. Where Rust turns them
    // on, it is ready for them.
secondary:
    .if     {pen}
    ldr     x0, =PENS
    add     x0, x0, x19, lsl #{pen_shift}
    str     xzr, [x0]
    dsb     sy
9:  wfe
    ldr     x1, [x0]
    cmp     x1, #{pen_go}
    b.ne    9b
    .endif
10: isb
    ldr     x0, =home
    br      x0
    .ltorg

    .text
home:
    ldr     x0, =vectors_el3
    msr     vbar_el3, x0
    // Stack of this CPU, below its emergency stack; its per-CPU record.
    ldr     x0, =STACKS + {stack_stride} - {emergency_stack}
    mov     x1, #{stack_stride}
    madd    x0, x1, x19, x0
    mov     sp, x0
    ldr     x1, ={per_cpu}
    mov     x2, #{per_cpu_size}
    madd    x1, x2, x19, x1
    msr     tpidr_el3, x1
    mov     x0, x19
    bl      {early}
    dsb     sy
    ldr     x0, =0xff0400               // MAIR: 0 nGnRnE, 1 nGnRE, 2 normal write-back
    msr     mair_el3, x0
    // TCR_EL3: RES1, T0SZ 25, 4 KiB, walks write-back inner shareable; the
    // output size is the CPU's, at most 48 bits (D24.2.187).
    ldr     x0, =0x80803519
    mrs     x1, id_aa64mmfr0_el1
    and     x1, x1, #15
    mov     x2, #5
    cmp     x1, x2
    csel    x1, x1, x2, lo
    bfi     x0, x1, #16, #3
    msr     tcr_el3, x0
    ldr     x0, ={root}
    msr     ttbr0_el3, x0
    isb
    tlbi    alle3
    dsb     nsh
    isb
    // M, C, SA, I, WXN.
    ldr     x0, =0x30cd183d
    msr     sctlr_el3, x0
    isb
    // Only now: a store past the caches could be hidden by another CPU's line.
    mrs     x1, tpidr_el3
    mov     x0, sp
    str     x0, [x1, #{per_cpu_stack}]
    mov     x0, x19
    bl      {start}
    b       park
    .ltorg

    // One more: what a reset must not forget.
    .section .pens, "aw", %nobits
    .balign 4096
PENS:
    .space  ({max_cpus} + 1) << {pen_shift}

    .section .stacks, "aw", %nobits
    .balign 4096
STACKS:
    .space  {max_cpus} * {stack_stride}
    .global PENS
    .global STACKS
