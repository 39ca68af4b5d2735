/* SPDX-License-Identifier: GPL-2.0 */
/*
 * HA-VMSI: KVM on a security monitor at EL3 (kvm-arm.mode=havmsi).
 *
 * All that the rest of the kernel knows of it. Without CONFIG_KVM_HAVMSI
 * havmsi_present is a constant, and the calls below go with it.
 */
#ifndef __ASM_HAVMSI_H
#define __ASM_HAVMSI_H

#include <linux/types.h>

struct kvm;
struct kvm_memory_slot;
struct kvm_vcpu;
struct pt_regs;

#ifdef CONFIG_KVM_HAVMSI
/* Set before anything looks at it, then constant: the monitor owns EL2. */
extern bool havmsi_present;
bool havmsi_probe(void);
#else
#define havmsi_present	false
static inline bool havmsi_probe(void)
{
	return false;
}
#endif

/* havmsi.c: the monitor, VMs and vCPUs */
int havmsi_init(void);
bool havmsi_warn_hyp_call(const char *call);
bool havmsi_cap_allowed(long cap);
u64 havmsi_vgic_config(void);
u32 havmsi_ipa_limit(u32 host_limit);
unsigned long havmsi_vcpu_features(unsigned long features);
int havmsi_vm_init(struct kvm *kvm);
void havmsi_vm_free(struct kvm *kvm);
int havmsi_vm_create(struct kvm *kvm);
void havmsi_vm_teardown(struct kvm *kvm);
int havmsi_vm_reset(struct kvm *kvm);
bool havmsi_vm_sealed(struct kvm *kvm);
int havmsi_vcpu_prepare(struct kvm_vcpu *vcpu);
void havmsi_timer_load(u64 cntvoff);

/* havmsi_mmu.c: a VM's memory */
int havmsi_map_dev(struct kvm *kvm, u64 ipa, u64 pa, unsigned long size);
int havmsi_handle_guest_abort(struct kvm_vcpu *vcpu);
void havmsi_unmap_range(struct kvm *kvm, u64 start, u64 size, bool may_block);

/* havmsi_run.c: entering the guest */
int havmsi_vcpu_enter_exit(struct kvm_vcpu *vcpu);
void havmsi_vcpu_run_done(struct kvm_vcpu *vcpu);

/* havmsi_sea.c: the host's own accesses to what it does not own */
bool havmsi_handle_sea(unsigned long far, unsigned long esr,
		       struct pt_regs *regs);

#endif /* __ASM_HAVMSI_H */
