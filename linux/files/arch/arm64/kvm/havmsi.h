/* SPDX-License-Identifier: GPL-2.0 */
/* HA-VMSI: what its files share. */
#ifndef __KVM_HAVMSI_H
#define __KVM_HAVMSI_H

#include <linux/arm-smccc.h>
#include <linux/kvm_host.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/xarray.h>

#include <asm/havmsi.h>
#include <asm/havmsi_abi.h>

/* Device pages of a VM: the GICv2 virtual CPU interface has two. */
#define HAVMSI_MAX_DEV	2

#define HAVMSI_DIGEST_SIZE	32

struct havmsi_dev {
	u64 ipa;
	u64 pa;
	bool mapped;
};

/* What the monitor wants to see when a page comes back; 0 if nothing. */
struct havmsi_tag {
	u64 low, high;
};

#define HAVMSI_TAGS	(PAGE_SIZE / sizeof(struct havmsi_tag))

/*
 * Pages that were sealed, came back, and were refused; calls that map or take back
 * pages, after the launch: of all VMs since boot.
 */
extern atomic64_t havmsi_sealed, havmsi_unsealed, havmsi_refused, havmsi_calls;

/* Pages in a row of the table memory that the monitor has for a VM. */
struct havmsi_chunk {
	struct list_head list;
	struct page *page;
	unsigned int order;
};

struct havmsi_vm {
	struct kvm *kvm;
	/* The monitor's name of the VM, 0 before VM_CREATE. */
	u64 handle;
	/*
	 * Read: a vCPU resolves a fault. Write: launch, reset, teardown,
	 * a memory slot goes. Taken inside slots_lock and kvm->srcu, outside
	 * mmap_lock.
	 */
	struct rw_semaphore lock;
	/* VM_ACTIVATE was done; written under the lock. */
	bool launched;
	/*
	 * Pages that the VM has, by gfn; MMU notifiers take them back. Places are
	 * taken at any time, pages come and go under kvm->mmu_lock.
	 */
	struct xarray pages;
	/* Pages of tags, by gfn / HAVMSI_TAGS; the tags under kvm->mmu_lock. */
	struct xarray tags;
	/* Table memory that the monitor has for this VM. */
	struct mutex pool_lock;
	struct list_head pool;
	struct havmsi_dev dev[HAVMSI_MAX_DEV];
	int nr_dev;
	/* For those who look: of the last launch, launches, faults that got a page. */
	u8 digest[HAVMSI_DIGEST_SIZE];
	unsigned long launches;
	atomic64_t faults, seals, unseals, refusals;
	/* The log has the line about dirty logging. */
	bool told;
};

struct havmsi_vcpu {
	struct havmsi_run_page *run;
	u64 handle;
	/* What the last exit was, as far as it can still be answered. */
	u64 exit_class;
	u64 exit_ipa;
	/* The page that the answer is about, if it ends sharing. */
	struct page *moving;
	bool created;
};

/* A call to the monitor: status, results from a1 on in @res if not NULL. */
long havmsi_call(u64 fn, u64 a1, u64 a2, u64 a3, u64 a4,
		 struct arm_smccc_1_2_regs *res);
/* As an errno; calls again when told so, and donates table memory on demand. */
int havmsi_vm_call(struct havmsi_vm *hv, struct arm_smccc_1_2_regs *regs,
		   struct arm_smccc_1_2_regs *res);
int havmsi_errno(long status);

int havmsi_pool_donate(struct havmsi_vm *hv, unsigned long pages);
void havmsi_pool_free(struct havmsi_vm *hv);
int havmsi_populate(struct havmsi_vm *hv);
int havmsi_declare_ram(struct havmsi_vm *hv);
int havmsi_map_devices(struct havmsi_vm *hv);
void havmsi_forget_pages(struct havmsi_vm *hv);
void havmsi_unshared(struct havmsi_vcpu *hvcpu);

/* havmsi_dirty.c, havmsi_debugfs.c: for KVM's own calls, in arm.c */
void havmsi_sync_dirty_log(struct kvm *kvm, struct kvm_memory_slot *slot);
void havmsi_create_debugfs(struct kvm *kvm);

/* What the VM has at @gfn, for which @page is in the list; hv->lock is held. */
enum havmsi_kind {
	HAVMSI_PAGE_HOST, HAVMSI_PAGE_PRIVATE, HAVMSI_PAGE_SHARED, HAVMSI_PAGE_SEALED,
};
enum havmsi_kind havmsi_page_kind(struct havmsi_vm *hv, gfn_t gfn, struct page *page);

#endif /* __KVM_HAVMSI_H */
