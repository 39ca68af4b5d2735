// SPDX-License-Identifier: GPL-2.0
/*
 * A compromised host kernel that looks at each exit of each guest, right behind
 * the switch: what KVM has of the vCPU's registers, and what is still in the
 * CPU's own FP/SIMD registers.
 */
#include <linux/kprobes.h>
#include <linux/kvm_host.h>

#include "attacker.h"

static struct atk_watch seen;
static DEFINE_RAW_SPINLOCK(seen_lock);

/* The kernel itself uses none of these between a guest's exit and its next entry. */
static void live_fp(u64 *v)
{
	asm volatile(
	"	.arch_extension fp\n"
	"	.arch_extension simd\n"
	"	stp	q0, q1, [%0]\n"
	"	stp	q2, q3, [%0, #32]\n"
	"	stp	q4, q5, [%0, #64]\n"
	"	stp	q6, q7, [%0, #96]\n"
	"	stp	q8, q9, [%0, #128]\n"
	"	stp	q10, q11, [%0, #160]\n"
	"	stp	q12, q13, [%0, #192]\n"
	"	stp	q14, q15, [%0, #224]\n"
	"	stp	q16, q17, [%0, #256]\n"
	"	stp	q18, q19, [%0, #288]\n"
	"	stp	q20, q21, [%0, #320]\n"
	"	stp	q22, q23, [%0, #352]\n"
	"	stp	q24, q25, [%0, #384]\n"
	"	stp	q26, q27, [%0, #416]\n"
	"	stp	q28, q29, [%0, #448]\n"
	"	stp	q30, q31, [%0, #480]\n"
	:: "r" (v) : "memory");
}

static u64 equal(const u64 *a, const u64 *b, unsigned int n)
{
	u64 count = 0;

	while (n--)
		count += a[n] == b[n];
	return count;
}

/* handle_exit_early(vcpu, code) */
static int on_exit(struct kprobe *kp, struct pt_regs *regs)
{
	struct kvm_vcpu *vcpu = (struct kvm_vcpu *)regs->regs[0];
	struct kvm_cpu_context *ctxt = &vcpu->arch.ctxt;
	u64 live[ATK_FP], general = 0;
	unsigned long flags;
	unsigned int i;

	live_fp(live);
	raw_spin_lock_irqsave(&seen_lock, flags);
	for (i = 0; i < ATK_GENERAL; i++)
		if (seen.reg[i] < 31)
			general += ctxt->regs.regs[seen.reg[i]] == seen.general[i];
	seen.exits++;
	seen.classes |= ARM_EXCEPTION_CODE(regs->regs[1]) == ARM_EXCEPTION_TRAP ?
			BIT(vcpu->arch.fault.esr_el2 >> 26 & 63) : BIT(0);
	seen.best_general = max(seen.best_general, general);
	seen.best_fp = max(seen.best_fp, equal((u64 *)ctxt->fp_regs.vregs, seen.fp, ATK_FP));
	seen.best_live = max(seen.best_live, equal(live, seen.fp, ATK_FP));
	raw_spin_unlock_irqrestore(&seen_lock, flags);
	return 0;
}

static struct kprobe probe;

long atk_watch(struct atk_watch *w)
{
	long ret;

	if (w->start) {
		seen = *w;
		seen.exits = 0;
		seen.classes = 0;
		seen.best_general = 0;
		seen.best_fp = 0;
		seen.best_live = 0;
		probe = (struct kprobe) {
			.symbol_name = "handle_exit_early",
			.pre_handler = on_exit,
		};
		ret = register_kprobe(&probe);
	} else {
		unregister_kprobe(&probe);
		*w = seen;
		ret = 0;
	}
	return ret;
}
