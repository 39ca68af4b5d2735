/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What the host agent asks of the hostile kernel module. All fields are 64 bits
 * wide, so that the layout is the same everywhere; userland/agent/src/attacker.rs
 * repeats it.
 */
#ifndef HAVMSI_ATTACKER_H
#define HAVMSI_ATTACKER_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define ATK_SEEDS	8	/* streams looked for in one scan */
#define ATK_FRAMES	8	/* page frame numbers reported a stream */
#define ATK_SLOTS	8	/* memory slots reported a VM */

struct atk_hits {
	__u64 whole;		/* pages of which every word is the stream's */
	__u64 partial;		/* pages that begin like the stream's */
	__u64 pfn[ATK_FRAMES];
};

/* Look at every page of System RAM for pages of the streams. */
struct atk_scan {
	__u64 seeds;		/* in: how many */
	__u64 fresh;		/* in: 1 = through mappings of our own */
	__u64 seed[ATK_SEEDS][4];
	__u64 pages;		/* out: looked at */
	__u64 faults;		/* out: couldn't be read */
	__u64 fault_pfn[ATK_FRAMES];
	struct atk_hits hits[ATK_SEEDS];
};

#define ATK_MEM_WRITE	1
#define ATK_MEM_FRESH	2	/* through a mapping of our own */

/* Read or write physical memory; within one page. */
struct atk_mem {
	__u64 pa;
	__u64 len;
	__u64 flags;
	__u64 buffer;		/* the caller's */
};

/* The physical address behind an address of a process. */
struct atk_page {
	__u64 pid;
	__u64 va;
	__u64 pa;		/* out */
};

struct atk_slot {
	__u64 ipa;
	__u64 size;
	__u64 va;
};

/* What there is to know about a VM, from a file descriptor of the caller's. */
struct atk_vm {
	__u64 fd;
	__u64 pgd_pa;
	__u64 ia_bits;
	__u64 start_level;
	__u64 vcpus;
	__u64 slots;
	struct atk_slot slot[ATK_SLOTS];
	__u64 handle;		/* the monitor's name of the VM, 0 if there is none */
	__u64 pool[ATK_FRAMES];	/* page frames that KVM gave the monitor for tables, 0 for none */
};

/* Find, or overwrite, the stage-2 descriptor of an address, in the table page itself. */
struct atk_stage2 {
	__u64 fd;		/* of the VM */
	__u64 ipa;
	__u64 write;		/* 1 = write @desc and flush the VM's TLBs */
	__u64 desc;		/* in and out; out: the one found */
	__u64 desc_pa;		/* out: where it lies */
	__u64 level;		/* out */
};

/* A vCPU's registers, in KVM's own structure. */
struct atk_regs {
	__u64 fd;		/* of the vCPU, the caller's */
	__u64 write;		/* bit i = write x[i]; bit 31 = pc */
	__u64 x[31];
	__u64 sp;
	__u64 pc;
	__u64 pstate;
	__u64 v[64];
	__u64 sys[8];		/* SP_EL1 ELR_EL1 TTBR0_EL1 TTBR1_EL1 VBAR_EL1 TPIDR_EL0 TPIDR_EL1 SCTLR_EL1 */
};

/* KVM_GET_ONE_REG / KVM_SET_ONE_REG on another process's vCPU, in its address space. */
struct atk_one_reg {
	__u64 fd;		/* of the vCPU, the caller's */
	__u64 id;
	__u64 write;
	__u64 value[2];
	__u64 result;		/* out: what KVM's ioctl returned */
};

/* Any SMC. */
struct atk_smc {
	__u64 x[18];
};

/* A register of a device, through a mapping of our own. */
struct atk_io {
	__u64 pa;
	__u64 width;		/* 1, 4 or 8 bytes */
	__u64 write;
	__u64 value;		/* in and out */
};

/* A device copies memory: 64 bytes to be read, 8 to be written. */
struct atk_dma {
	__u64 pa;
	__u64 write;
	__u64 data[8];		/* in: what the device holds; out: what it holds then */
};

/* A CPU that is off is turned on with code of ours, MMU off. */
struct atk_cpu {
	__u64 cpu;
	__u64 pa;		/* a page that it reads, and writes the last word of */
	__u64 marker;		/* that word */
	__u64 status;		/* out: of PSCI CPU_ON */
	__u64 el;		/* out: the exception level it came up at */
	__u64 state;		/* out: 1 = it has read, 2 = written too, 3 = exception */
	__u64 esr;		/* out: of the exception */
	__u64 read[8];		/* out */
};

#define ATK_GENERAL	25
#define ATK_FP		64

/* Look at all exits of all guests for values that are known to be a guest's. */
struct atk_watch {
	__u64 start;		/* 1 = begin, 0 = end, with what was seen */
	__u64 reg[ATK_GENERAL];	/* numbers of general registers */
	__u64 general[ATK_GENERAL];
	__u64 fp[ATK_FP];
	__u64 exits;		/* out */
	__u64 classes;		/* out: bits by exception class, bit 0 = interrupt */
	__u64 best_general;	/* out: at best, of KVM's structure */
	__u64 best_fp;		/* out */
	__u64 best_live;	/* out: at best, in the CPU's registers */
};

#define ATK_SCAN	_IOWR('H', 1, struct atk_scan)
#define ATK_MEM		_IOWR('H', 2, struct atk_mem)
#define ATK_PAGE	_IOWR('H', 3, struct atk_page)
#define ATK_VM		_IOWR('H', 4, struct atk_vm)
#define ATK_STAGE2	_IOWR('H', 5, struct atk_stage2)
#define ATK_REGS	_IOWR('H', 6, struct atk_regs)
#define ATK_ONE_REG	_IOWR('H', 7, struct atk_one_reg)
#define ATK_SMC		_IOWR('H', 8, struct atk_smc)
#define ATK_IO		_IOWR('H', 9, struct atk_io)
#define ATK_DMA		_IOWR('H', 10, struct atk_dma)
#define ATK_CPU		_IOWR('H', 11, struct atk_cpu)
#define ATK_WATCH	_IOWR('H', 12, struct atk_watch)

#endif
