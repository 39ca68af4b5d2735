// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: entering a guest. The vCPU that KVM's handlers work on is a shadow:
 * it gets what an exit exposes, as if that were in x0 to x3, and what the
 * handlers leave there goes back, as far as that exit allows an answer.
 */
#include <linux/irqchip/arm-gic.h>
#include <linux/kvm_host.h>

#include <kvm/arm_vgic.h>
#include <uapi/linux/psci.h>

#include <asm/daifflags.h>
#include <asm/kvm_emulate.h>

#include "havmsi.h"

static bool is_gicv3(void)
{
	return static_branch_unlikely(&kvm_vgic_global_state.gicv3_cpuif);
}

/*
 * A GICv2's list registers travel in GICv3's format: HW, group, state and
 * priority move, and above bit 9 either the physical interrupt's number or EOI
 * (its top bit) and the sender of an SGI.
 */
static u64 lr_from_gicv2(u32 lr)
{
	u32 virtual = lr & GICH_LR_HW ? GENMASK(9, 0) : GENMASK(12, 0);

	return (u64)(lr >> 31 & 1) << 61 | (u64)(lr >> 30 & 1) << 60 |
	       (u64)(lr >> 28 & 3) << 62 | (u64)(lr >> 23 & 0x1f) << 51 |
	       (u64)(lr & GENMASK(19, 0) & ~virtual) << 22 | (lr & virtual);
}

/* What KVM's handlers made of the last exit, as the answer to it. */
static u64 answer(struct kvm_vcpu *vcpu, struct havmsi_vcpu *hvcpu)
{
	struct havmsi_run_entry *entry = &hvcpu->run->entry;
	bool exception = vcpu_get_flag(vcpu, PENDING_EXCEPTION);
	/* Shares a bit with EXCEPT_MASK, so it means nothing with an exception. */
	bool done = !exception && vcpu_get_flag(vcpu, INCREMENT_PC);
	int i;

	switch (hvcpu->exit_class) {
	case HAVMSI_EXIT_MMIO_READ:
	case HAVMSI_EXIT_MMIO_WRITE:
		entry->data = vcpu_get_reg(vcpu, 0);
		return exception ? HAVMSI_ENTRY_INJECT_SEA :
		       done ? HAVMSI_ENTRY_COMPLETE : 0;
	case HAVMSI_EXIT_SYSREG_READ:
	case HAVMSI_EXIT_SYSREG_WRITE:
		entry->data = vcpu_get_reg(vcpu, 0);
		return exception ? HAVMSI_ENTRY_INJECT_UNDEF :
		       done ? HAVMSI_ENTRY_COMPLETE : 0;
	case HAVMSI_EXIT_HVC:
		for (i = 0; i < 4; i++)
			entry->gpr[i] = vcpu_get_reg(vcpu, i);
		return HAVMSI_ENTRY_COMPLETE;
	default:
		return 0;
	}
}

static void fill_entry(struct kvm_vcpu *vcpu, struct havmsi_vcpu *hvcpu)
{
	struct havmsi_run_entry *entry = &hvcpu->run->entry;
	u64 flags = answer(vcpu, hvcpu);
	int i;

	if (vcpu->arch.hcr_el2 & HCR_TWI)
		flags |= HAVMSI_ENTRY_TRAP_WFI;
	if (vcpu->arch.hcr_el2 & HCR_TWE)
		flags |= HAVMSI_ENTRY_TRAP_WFE;
	entry->flags = flags;

	entry->ich_hcr = 0;
	entry->nr_lr = 0;
	if (!irqchip_in_kernel(vcpu->kvm))
		return;
	if (is_gicv3()) {
		struct vgic_v3_cpu_if *cpu_if = &vcpu->arch.vgic_cpu.vgic_v3;

		entry->ich_hcr = cpu_if->vgic_hcr;
		entry->nr_lr = cpu_if->used_lrs;
		for (i = 0; i < cpu_if->used_lrs; i++)
			entry->lr[i] = cpu_if->vgic_lr[i];
	} else {
		struct vgic_v2_cpu_if *cpu_if = &vcpu->arch.vgic_cpu.vgic_v2;

		entry->ich_hcr = cpu_if->vgic_hcr;
		entry->nr_lr = cpu_if->used_lrs;
		for (i = 0; i < cpu_if->used_lrs; i++)
			entry->lr[i] = lr_from_gicv2(cpu_if->vgic_lr[i]);
	}
}

static void take_vgic(struct kvm_vcpu *vcpu, struct havmsi_run_exit *exit)
{
	int i;

	if (!irqchip_in_kernel(vcpu->kvm))
		return;
	/*
	 * VMCR is for kvm_vgic_vcpu_pending_irq(): priority mask and group
	 * enables. Of a list register the state is what a guest changes.
	 */
	if (is_gicv3()) {
		struct vgic_v3_cpu_if *cpu_if = &vcpu->arch.vgic_cpu.vgic_v3;

		cpu_if->vgic_vmcr = exit->vmcr;
		for (i = 0; i < cpu_if->used_lrs; i++)
			cpu_if->vgic_lr[i] = (cpu_if->vgic_lr[i] & ~ICH_LR_STATE) |
					     (exit->lr[i] & ICH_LR_STATE);
	} else {
		struct vgic_v2_cpu_if *cpu_if = &vcpu->arch.vgic_cpu.vgic_v2;

		cpu_if->vgic_vmcr = exit->vmcr;
		for (i = 0; i < cpu_if->used_lrs; i++)
			cpu_if->vgic_lr[i] = (cpu_if->vgic_lr[i] & ~GICH_LR_STATE) |
					     (u32)(exit->lr[i] >> 62) << 28;
	}
}

static int take_exit(struct kvm_vcpu *vcpu, struct havmsi_vcpu *hvcpu)
{
	struct havmsi_run_exit *exit = &hvcpu->run->exit;
	struct kvm_vcpu_fault_info *fault = &vcpu->arch.fault;
	u64 esr = exit->esr;
	int i;

	/* The answer was taken, whatever it was. */
	vcpu_clear_flag(vcpu, PENDING_EXCEPTION);
	vcpu_clear_flag(vcpu, EXCEPT_MASK);

	take_vgic(vcpu, exit);
	hvcpu->exit_class = exit->class;
	hvcpu->exit_ipa = exit->ipa;

	switch (exit->class) {
	case HAVMSI_EXIT_IRQ:
		return ARM_EXCEPTION_IRQ;
	case HAVMSI_EXIT_SERROR:
		pr_warn_ratelimited("havmsi: SError interrupt in a guest\n");
		return ARM_EXCEPTION_IRQ;
	case HAVMSI_EXIT_MMIO_WRITE:
	case HAVMSI_EXIT_SYSREG_WRITE:
		/* The register's number is masked to 0. */
		vcpu_set_reg(vcpu, 0, exit->data);
		break;
	case HAVMSI_EXIT_HVC:
		for (i = 0; i < 4; i++)
			vcpu_set_reg(vcpu, i, exit->gpr[i]);
		/* That vCPU is off: nobody waits for an answer. */
		if ((u32)exit->gpr[0] == PSCI_0_2_FN_CPU_OFF)
			hvcpu->exit_class = HAVMSI_EXIT_IRQ;
		/* About a page: handled where faults are. */
		if ((u32)exit->gpr[0] == ARM_SMCCC_VENDOR_HYP_KVM_MEM_UNSHARE_FUNC_ID) {
			hvcpu->exit_ipa = exit->gpr[1];
			esr = ESR_ELx_EC_DABT_LOW << ESR_ELx_EC_SHIFT | ESR_ELx_IL;
		}
		break;
	}

	*vcpu_cpsr(vcpu) &= ~(PSR_MODE_MASK | PSR_MODE32_BIT);
	*vcpu_cpsr(vcpu) |= exit->mode ? PSR_MODE_EL1h : PSR_MODE_EL0t;
	fault->esr_el2 = esr;
	fault->far_el2 = exit->ipa & ~PAGE_MASK;
	fault->hpfar_el2 = (exit->ipa >> PAGE_SHIFT) << 4;
	return ARM_EXCEPTION_TRAP;
}

/* RCU is not watching between enter and exit. */
static noinstr long enter(u64 handle, u64 idx)
{
	struct arm_smccc_res res;

	guest_state_enter_irqoff();
	/*
	 * With interrupt priorities in use, interrupts must reach the CPU again,
	 * or the guest can't be interrupted; see __kvm_vcpu_run() for VHE.
	 */
	local_daif_mask();
	pmr_sync();
	arm_smccc_1_1_smc(HAVMSI_FN_VCPU_RUN, handle, idx, &res);
	local_daif_restore(DAIF_PROCCTX_NOIRQ);
	guest_state_exit_irqoff();

	return (long)res.a0;
}

/* In place of kvm_arm_vcpu_enter_exit(). Interrupts are off. */
int havmsi_vcpu_enter_exit(struct kvm_vcpu *vcpu)
{
	struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;
	long status;

	if (WARN_ON_ONCE(!hvcpu || !hvcpu->created))
		return ARM_EXCEPTION_IL;

	fill_entry(vcpu, hvcpu);
	status = enter(hvcpu->handle, vcpu->vcpu_id);

	switch (status) {
	case HAVMSI_SUCCESS:
		if (hvcpu->moving)
			havmsi_unshared(hvcpu);
		return take_exit(vcpu, hvcpu);
	case HAVMSI_ERR_AGAIN:
	case HAVMSI_ERR_BUSY:
		/* Nothing was taken, nothing has run: come back with the same. */
		return ARM_EXCEPTION_IRQ;
	case HAVMSI_ERR_INTEGRITY:
		pr_err_ratelimited("havmsi: VM %llu vCPU %d: the monitor has stopped the VM: a page that came back is not what was sealed\n",
				   hvcpu->handle & 0xffff, vcpu->vcpu_id);
		return ARM_EXCEPTION_IL;
	case HAVMSI_ERR_STATE:
		/* A reset came first; the next round launches or waits for it. */
		if (!havmsi_vm_sealed(vcpu->kvm))
			return ARM_EXCEPTION_IRQ;
		fallthrough;
	default:
		pr_err_ratelimited("havmsi: VM %llu vCPU %d: VCPU_RUN failed (%ld) after exit class %llu with flags %#llx\n",
				   hvcpu->handle & 0xffff, vcpu->vcpu_id, status,
				   hvcpu->exit_class, hvcpu->run->entry.flags);
		return ARM_EXCEPTION_IL;
	}
}

/* KVM_RUN returns to user space; the vCPU is still loaded. */
void havmsi_vcpu_run_done(struct kvm_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;

	/*
	 * Pending answers wait for the next entry. On a guest's reset the VMM is
	 * about to write to its memory: all vCPUs were stopped, so take it back.
	 */
	if (run->exit_reason == KVM_EXIT_SYSTEM_EVENT &&
	    run->system_event.type == KVM_SYSTEM_EVENT_RESET)
		havmsi_vm_reset(vcpu->kvm);
}
