// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: the host writes to a page that is not its own.
 *
 * The monitor answers with a synchronous external abort at EL1. It must never
 * take the host down: user code gets SIGBUS; a system call that works on behalf
 * of a user fails with -EFAULT. Where the kernel has an exception table entry
 * (all accesses to user addresses) that does it. Where it writes through its own
 * mapping of a user's page (process_vm_writev(), /proc/PID/mem, ptrace(), fixed
 * io_uring buffers: plain memcpy()) the store is dropped, and the system call's
 * result is replaced on its way out.
 */
#include <linux/bitfield.h>
#include <linux/extable.h>
#include <linux/ptrace.h>
#include <linux/sched/signal.h>
#include <linux/sched/task_stack.h>
#include <linux/slab.h>
#include <linux/task_work.h>
#include <linux/uaccess.h>

#include <asm/esr.h>
#include <asm/extable.h>
#include <asm/insn.h>
#include <asm/syscall.h>
#include <asm/system_misc.h>
#include <asm/traps.h>

#include <asm/havmsi.h>

static unsigned long base_read(struct pt_regs *regs, unsigned int rn)
{
	return rn == 31 ? regs->sp : regs->regs[rn];
}

static void base_write(struct pt_regs *regs, unsigned int rn, unsigned long val)
{
	if (rn == 31)
		regs->sp = val;
	else
		regs->regs[rn] = val;
}

/*
 * Step over a store, with its update of the base register. Only what copies and
 * fills memory: stores of one register or a pair, and DC ZVA (Arm ARM C4.1.94).
 */
static bool drop_store(struct pt_regs *regs)
{
	unsigned int rn, op;
	long offset = 0;
	u32 insn;

	if (get_kernel_nofault(insn, (__le32 *)instruction_pointer(regs)))
		return false;
	insn = le32_to_cpu((__force __le32)insn);
	rn = FIELD_GET(GENMASK(9, 5), insn);

	if ((insn & 0x3a400000) == 0x28000000) {
		/* STP, STNP: bits 24:23 are no-allocate, post, offset, pre. */
		bool simd = insn & BIT(26);
		unsigned int opc = insn >> 30;
		unsigned int scale = simd ? 2 + opc : 2 + (opc >> 1);

		if (opc == 3 || (!simd && opc == 1))
			return false;
		if (insn & BIT(23))
			offset = sign_extend64(FIELD_GET(GENMASK(21, 15), insn), 6) << scale;
	} else if ((insn & 0x3b000000) == 0x39000000 ||
		   (insn & 0x3b200000) == 0x38000000 ||
		   (insn & 0x3b200c00) == 0x38200800) {
		/* STR by unsigned, unscaled, post- or pre-indexed, register offset. */
		bool simd = insn & BIT(26);

		op = FIELD_GET(GENMASK(23, 22), insn);
		if (op != 0 && !(simd && op == 2 && insn >> 30 == 0))
			return false;
		if ((insn & 0x3b200000) == 0x38000000 && insn & BIT(10))
			offset = sign_extend64(FIELD_GET(GENMASK(20, 12), insn), 8);
	} else if ((insn & 0xffffffe0) != 0xd50b7420) {
		/* Not DC ZVA either. */
		return false;
	}

	if (offset)
		base_write(regs, rn, base_read(regs, rn) + offset);
	arm64_skip_faulting_instruction(regs, AARCH64_INSN_SIZE);
	return true;
}

/* On the way out to user space, after the result was stored. */
static void fail_syscall(struct callback_head *work)
{
	struct pt_regs *regs = current_pt_regs();

	kfree(work);
	if (in_syscall(regs))
		syscall_set_return_value(current, regs, -EFAULT, 0);
}

bool havmsi_handle_sea(unsigned long far, unsigned long esr,
		       struct pt_regs *regs)
{
	struct callback_head *work;

	if (user_mode(regs)) {
		pr_warn_ratelimited("havmsi: %s[%d] accessed memory that belongs to a protected VM or the monitor\n",
				    current->comm, task_pid_nr(current));
		arm64_force_sig_fault(SIGBUS, BUS_OBJERR,
				      esr & ESR_ELx_FnV ? 0 : untagged_addr(far),
				      "access to protected memory");
		return true;
	}
	if (ESR_ELx_EC(esr) != ESR_ELx_EC_DABT_CUR)
		return false;
	if (fixup_exception(regs)) {
		/* Who turned faults off looks at the result. */
		if (pagefault_disabled())
			return true;
		pr_warn_ratelimited("havmsi: %s[%d]: a system call's access to memory of a protected VM was refused\n",
				    current->comm, task_pid_nr(current));
		return true;
	}
	if (!drop_store(regs))
		return false;

	/* One a system call, not one a store. */
	if (in_task() && !(current->flags & (PF_KTHREAD | PF_USER_WORKER))) {
		work = task_work_cancel_func(current, fail_syscall);
		if (work) {
			task_work_add(current, work, TWA_RESUME);
			return true;
		}
		work = kmalloc(sizeof(*work), GFP_ATOMIC | __GFP_NOWARN);
		if (work) {
			init_task_work(work, fail_syscall);
			if (task_work_add(current, work, TWA_RESUME))
				kfree(work);
		}
	}
	pr_warn_ratelimited("havmsi: %s[%d]: %pS: a write to memory of a protected VM was dropped\n",
			    current->comm, task_pid_nr(current),
			    (void *)instruction_pointer(regs));
	return true;
}
