// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: dirty logging. What a VM shares can change at any time, by the VM or
 * by whomever it shares it with, so all of that is dirty whenever somebody asks.
 * What it does not share nobody can read, so it is never dirty: a log that is
 * complete would still not make a copy of the VM.
 */
#include <linux/kvm_host.h>
#include <linux/sched.h>

#include "havmsi.h"

/* KVM is about to read the slot's bitmap; slots_lock is held. */
void havmsi_sync_dirty_log(struct kvm *kvm, struct kvm_memory_slot *slot)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	unsigned long gfn;
	struct page *page;

	down_read(&hv->lock);
	xa_for_each_range(&hv->pages, gfn, page, slot->base_gfn,
			  slot->base_gfn + slot->npages - 1) {
		switch (havmsi_page_kind(hv, gfn, page)) {
		case HAVMSI_PAGE_SHARED:
			set_bit_le(gfn - slot->base_gfn, slot->dirty_bitmap);
			break;
		case HAVMSI_PAGE_PRIVATE:
		case HAVMSI_PAGE_SEALED:
			if (hv->told)
				break;
			hv->told = true;
			kvm_info("HA-VMSI VM %llu: dirty logging tells of shared pages only: this VM can't be migrated or saved\n",
				 hv->handle & 0xffff);
			break;
		case HAVMSI_PAGE_HOST:
			break;
		}
		cond_resched();
	}
	up_read(&hv->lock);
}
