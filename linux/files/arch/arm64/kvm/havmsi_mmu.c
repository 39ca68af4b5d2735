// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: a VM's memory. Pages of the VMM's address space are donated to the
 * VM by the monitor. When an MMU notifier takes one back (swap, migration,
 * compaction, KSM, a slot that goes) the monitor encrypts it: we keep a tag
 * that it wants to see when the content returns to that guest address. What
 * the VM shares is still its own, and there for us to use: the monitor shows
 * it again where it always was, and it goes and comes as it is. A monitor
 * without entropy can't seal: then all pages are pinned until the VM is gone.
 *
 * Nothing else of KVM's stage-2 code does anything in this mode: its table
 * stays empty.
 */
#include <linux/delay.h>
#include <linux/kvm_host.h>
#include <linux/ksm.h>
#include <linux/mm.h>
#include <linux/pgtable.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/swap.h>

#include <asm/kvm_emulate.h>
#include <asm/kvm_mmu.h>

#include "havmsi.h"

#define BATCH		(PAGE_SIZE / sizeof(struct page *))

#define kvm_pr_limited(fmt, ...) \
	pr_err_ratelimited("kvm [%i]: " fmt, task_pid_nr(current), ##__VA_ARGS__)

/* ---- table memory ---- */

struct pool_chunk {
	struct list_head list;
	struct page *page;
	unsigned int order;
};

static int donate_chunk(struct havmsi_vm *hv, unsigned int order)
{
	struct pool_chunk *chunk = kmalloc(sizeof(*chunk), GFP_KERNEL_ACCOUNT);
	long status;

	if (!chunk)
		return -ENOMEM;
	chunk->order = order;
	chunk->page = alloc_pages(GFP_KERNEL_ACCOUNT |
				  (order ? __GFP_NORETRY | __GFP_NOWARN : 0), order);
	if (!chunk->page) {
		kfree(chunk);
		return -ENOMEM;
	}
	do {
		status = havmsi_call(HAVMSI_FN_POOL_DONATE, hv->handle,
				     page_to_phys(chunk->page), 1UL << order, 0, NULL);
	} while (status == HAVMSI_ERR_AGAIN);
	if (status) {
		__free_pages(chunk->page, order);
		kfree(chunk);
		return havmsi_errno(status);
	}
	list_add(&chunk->list, &hv->pool);
	return 0;
}

int havmsi_pool_donate(struct havmsi_vm *hv, unsigned long pages)
{
	int ret = 0;

	mutex_lock(&hv->pool_lock);
	/* A few at once, so that a VM that grows doesn't ask page by page. */
	pages = clamp(pages, 8UL, 1024UL);
	while (pages) {
		unsigned int order = min(ilog2(pages),
					 ilog2(HAVMSI_MAX_PAGES_PER_CALL));

		while ((ret = donate_chunk(hv, order)) == -ENOMEM && order)
			order = 0;
		if (ret)
			break;
		pages -= 1UL << order;
	}
	mutex_unlock(&hv->pool_lock);
	return ret;
}

void havmsi_pool_free(struct havmsi_vm *hv)
{
	struct pool_chunk *chunk, *next;

	list_for_each_entry_safe(chunk, next, &hv->pool, list) {
		__free_pages(chunk->page, chunk->order);
		kfree(chunk);
	}
	INIT_LIST_HEAD(&hv->pool);
}

/* ---- pages that go and come back ---- */

atomic64_t havmsi_sealed, havmsi_unsealed, havmsi_refused;

static void drop(struct page *page)
{
	if (havmsi_sealing)
		put_page(page);
	else
		unpin_user_page(page);
}

/* Somebody has written to it, so whatever copy lies elsewhere (swap) is old. */
static void drop_dirty(struct page *page)
{
	set_page_dirty_lock(page);
	mark_page_accessed(page);
	drop(page);
}

/* All pages came back, wiped. */
void havmsi_forget_pages(struct havmsi_vm *hv)
{
	unsigned long gfn;
	struct page *page;
	void *tags;

	hv->drops++;
	if (!havmsi_sealing)
		xa_for_each(&hv->pages, gfn, page) {
			drop_dirty(page);
			cond_resched();
		}
	write_lock(&hv->kvm->mmu_lock);
	xa_destroy(&hv->pages);
	xa_for_each(&hv->tags, gfn, tags)
		free_page((unsigned long)tags);
	xa_destroy(&hv->tags);
	write_unlock(&hv->kvm->mmu_lock);
}

static struct havmsi_tag *tag_of(struct havmsi_vm *hv, gfn_t gfn)
{
	struct havmsi_tag *tags = xa_load(&hv->tags, gfn / HAVMSI_TAGS);

	return tags ? &tags[gfn % HAVMSI_TAGS] : NULL;
}

/* All memory that is needed for a page that comes, and later goes. */
static int prepare_place(struct havmsi_vm *hv, gfn_t gfn)
{
	if (!tag_of(hv, gfn)) {
		void *tags = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
		void *old;

		if (!tags)
			return -ENOMEM;
		old = xa_cmpxchg(&hv->tags, gfn / HAVMSI_TAGS, NULL, tags,
				 GFP_KERNEL_ACCOUNT);
		if (old) {
			free_page((unsigned long)tags);
			if (xa_is_err(old))
				return xa_err(old);
		}
	}
	return xa_reserve(&hv->pages, gfn, GFP_KERNEL_ACCOUNT);
}

/*
 * Gives a page, which was looked up at @seq, to the VM by the call @fn.
 * -EAGAIN if it may be another one by now, -EEXIST if the VM has one there.
 */
static int donate(struct havmsi_vm *hv, u64 fn, gfn_t gfn, struct page *page,
		  unsigned long seq)
{
	struct kvm *kvm = hv->kvm;
	int ret;

	for (;;) {
		struct arm_smccc_1_2_regs regs = {
			.a0 = fn, .a1 = hv->handle, .a2 = gfn << PAGE_SHIFT,
			.a3 = page_to_phys(page), .a4 = PAGE_SIZE,
		};
		struct havmsi_tag *tag;

		ret = prepare_place(hv, gfn);
		if (ret)
			return ret;
		write_lock(&kvm->mmu_lock);
		if (havmsi_sealing && mmu_invalidate_retry(kvm, seq))
			ret = -EAGAIN;
		else if (xa_load(&hv->pages, gfn))
			ret = -EEXIST;
		if (ret) {
			write_unlock(&kvm->mmu_lock);
			return ret;
		}
		tag = tag_of(hv, gfn);
		regs.a5 = tag->low;
		regs.a6 = tag->high;
		arm_smccc_1_2_smc(&regs, &regs);
		if (regs.a0 == HAVMSI_SUCCESS) {
			/* Has its place already. */
			xa_store(&hv->pages, gfn, page, GFP_NOWAIT);
			if (tag->low | tag->high)
				atomic64_inc(&havmsi_unsealed);
			tag->low = tag->high = 0;
		}
		write_unlock(&kvm->mmu_lock);

		if ((long)regs.a0 == HAVMSI_ERR_NOMEM && regs.a1) {
			ret = havmsi_pool_donate(hv, regs.a1);
			if (ret)
				return ret;
			continue;
		}
		if ((long)regs.a0 == HAVMSI_ERR_AGAIN) {
			cond_resched();
			continue;
		}
		if ((long)regs.a0 == HAVMSI_ERR_INTEGRITY)
			atomic64_inc(&havmsi_refused);
		return havmsi_errno((long)regs.a0);
	}
}

/*
 * From an MMU notifier, or because a slot goes: the VM's pages there are ours
 * when this returns, encrypted. mmu_lock is held for writing.
 */
void havmsi_unmap_range(struct kvm *kvm, u64 start, u64 size, bool may_block)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	unsigned long gfn;
	struct page *page;

	if (!hv || !havmsi_sealing)
		return;
	xa_for_each_range(&hv->pages, gfn, page, start >> PAGE_SHIFT,
			  (start + size - 1) >> PAGE_SHIFT) {
		struct havmsi_tag *tag = tag_of(hv, gfn);
		struct arm_smccc_1_2_regs res;
		long status;

		status = havmsi_call(HAVMSI_FN_PAGE_UNMAP, hv->handle,
				     gfn << PAGE_SHIFT, 1, 0, &res);
		if (!status) {
			tag->low = res.a2;
			tag->high = res.a3;
			if (tag->low | tag->high)
				atomic64_inc(&havmsi_sealed);
		} else if (WARN_ON_ONCE(status != HAVMSI_ERR_INVALID)) {
			/* Not ours any more: nobody may get it. */
			get_page(page);
		}
		/* INVALID: the VM is gone, and has left all of it wiped. */
		xa_erase(&hv->pages, gfn);
		if (may_block)
			cond_resched_rwlock_write(&kvm->mmu_lock);
	}
}

void havmsi_uncharge(struct havmsi_vm *hv)
{
	if (hv->locked)
		account_locked_vm(hv->kvm->mm, hv->locked, false);
	hv->locked = 0;
}

/* ---- launch; slots_lock and hv->lock are held ---- */

int havmsi_declare_ram(struct havmsi_vm *hv)
{
	struct kvm_memslots *slots = kvm_memslots(hv->kvm);
	struct arm_smccc_1_2_regs regs;
	struct kvm_memslot_iter iter;
	unsigned long pages = 0;
	int ret;

	kvm_for_each_memslot_in_gfn_range(&iter, slots, 0, ~0ULL) {
		regs = (struct arm_smccc_1_2_regs) {
			.a0 = HAVMSI_FN_VM_ADD_RAM, .a1 = hv->handle,
			.a2 = iter.slot->base_gfn << PAGE_SHIFT,
			.a3 = iter.slot->npages << PAGE_SHIFT,
		};
		ret = havmsi_vm_call(hv, &regs, NULL);
		if (ret)
			return ret;
		pages += iter.slot->npages;
	}

	if (havmsi_sealing)
		return 0;
	/*
	 * Sooner or later all of it is pinned. Say so now, not when the guest
	 * touches the page that is one too many.
	 */
	if (pages > hv->locked) {
		ret = account_locked_vm(current->mm, pages - hv->locked, true);
		if (ret) {
			kvm_err("HA-VMSI: the memory of protected VMs is pinned: %lu MiB exceed RLIMIT_MEMLOCK of %s (ulimit -l)\n",
				pages >> (20 - PAGE_SHIFT), current->comm);
			return ret;
		}
		hv->locked = pages;
	}

	/* Pinned pages can't be merged: spare KSM the scanning. */
	mmap_write_lock(current->mm);
	ret = ksm_disable(current->mm);
	mmap_write_unlock(current->mm);
	return ret;
}

/* No page table there at all, so no page either. mmap_lock is held. */
static bool nothing_mapped(struct mm_struct *mm, unsigned long addr)
{
	pgd_t *pgd = pgd_offset(mm, addr);
	p4d_t *p4d;
	pud_t *pud;

	if (pgd_none(READ_ONCE(*pgd)))
		return true;
	p4d = p4d_offset(pgd, addr);
	if (p4d_none(READ_ONCE(*p4d)))
		return true;
	pud = pud_offset(p4d, addr);
	if (pud_none(READ_ONCE(*pud)))
		return true;
	return !pud_leaf(READ_ONCE(*pud)) &&
	       pmd_none(pmdp_get_lockless(pmd_offset(pud, addr)));
}

static int populate_page(struct havmsi_vm *hv, gfn_t gfn, struct page *page,
			 unsigned long seq)
{
	int ret;

	/* Zero pages don't count, and the guest gets zeros anyway. */
	if (!memchr_inv(page_address(page), 0, PAGE_SIZE)) {
		drop(page);
		return 0;
	}
	ret = donate(hv, HAVMSI_FN_VM_POPULATE, gfn, page, seq);
	if (ret)
		drop(page);
	else if (havmsi_sealing)
		drop_dirty(page);
	return ret;
}

/*
 * Hand over what the VMM has written. Anonymous memory that was never touched
 * is left alone; files in memory are taken as a whole, since they can't be told.
 */
static int populate_slot(struct havmsi_vm *hv, struct kvm_memory_slot *slot,
			 struct page **pages)
{
	struct mm_struct *mm = current->mm;
	unsigned long off = 0;

	while (off < slot->npages) {
		unsigned long hva = slot->userspace_addr + (off << PAGE_SHIFT);
		/* No further than to the end of one page of PTEs. */
		unsigned long end = min(ALIGN(hva + 1, PMD_SIZE),
					hva + ((slot->npages - off) << PAGE_SHIFT));
		struct vm_area_struct *vma;
		long got = 0, skip, i;
		unsigned long seq;
		int ret = 0;

		cond_resched();
		if (fatal_signal_pending(current))
			return -EINTR;

		mmap_read_lock(mm);
		vma = find_vma(mm, hva);
		if (vma)
			end = min(end, vma->vm_start > hva ? vma->vm_start : vma->vm_end);
		skip = (end - hva) >> PAGE_SHIFT;
		seq = hv->kvm->mmu_invalidate_seq;
		smp_rmb();
		if (vma && vma->vm_start <= hva &&
		    !(vma->vm_flags & (VM_IO | VM_PFNMAP)) &&
		    !(vma_is_anonymous(vma) && nothing_mapped(mm, hva))) {
			if (havmsi_sealing)
				got = get_user_pages(hva, skip, FOLL_WRITE | FOLL_DUMP,
						     pages);
			else
				got = pin_user_pages(hva, skip, FOLL_WRITE | FOLL_DUMP |
						     FOLL_LONGTERM, pages);
			/* A hole at @hva, or nothing that can be written. */
			if (got == -EFAULT)
				got = 0;
			skip = 1;
		}
		mmap_read_unlock(mm);

		if (got < 0)
			return got;
		for (i = 0; i < got; i++) {
			if (!ret)
				ret = populate_page(hv, slot->base_gfn + off, pages[i], seq);
			else
				drop(pages[i]);
			if (!ret)
				off++;
		}
		/* It may be another page by now: look again. */
		if (ret && ret != -EAGAIN)
			return ret;
		if (!got)
			off += skip;
	}
	return 0;
}

int havmsi_populate(struct havmsi_vm *hv)
{
	struct kvm_memslots *slots = kvm_memslots(hv->kvm);
	struct kvm_memslot_iter iter;
	struct page **pages;
	int ret = 0;

	pages = (struct page **)__get_free_page(GFP_KERNEL);
	if (!pages)
		return -ENOMEM;
	BUILD_BUG_ON(BATCH < PTRS_PER_PTE);
	kvm_for_each_memslot_in_gfn_range(&iter, slots, 0, ~0ULL) {
		ret = populate_slot(hv, iter.slot, pages);
		if (ret)
			break;
	}
	free_page((unsigned long)pages);
	return ret;
}

/* The VGIC tells its place before the VM exists: remember it for the launch. */
int havmsi_map_dev(struct kvm *kvm, u64 ipa, u64 pa, unsigned long size)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	int ret = 0;

	down_write(&hv->lock);
	for (; size && !ret; size -= PAGE_SIZE, ipa += PAGE_SIZE, pa += PAGE_SIZE) {
		if (hv->launched || hv->nr_dev == HAVMSI_MAX_DEV)
			ret = -EPERM;
		else
			hv->dev[hv->nr_dev++] = (struct havmsi_dev) { .ipa = ipa, .pa = pa };
	}
	up_write(&hv->lock);
	return ret;
}

int havmsi_map_devices(struct havmsi_vm *hv)
{
	struct arm_smccc_1_2_regs regs;
	int i, ret;

	for (i = 0; i < hv->nr_dev; i++) {
		struct havmsi_dev *dev = &hv->dev[i];

		regs = (struct arm_smccc_1_2_regs) {
			.a0 = HAVMSI_FN_MAP_DEV, .a1 = hv->handle,
			.a2 = dev->ipa, .a3 = dev->pa,
		};
		if (dev->mapped)
			continue;
		ret = havmsi_vm_call(hv, &regs, NULL);
		if (ret)
			return ret;
		dev->mapped = true;
	}
	return 0;
}

/* ---- while it runs ---- */

/*
 * Whether somebody else has the page pinned, for DMA by all means: direct I/O
 * of the VMM. It aborts if the page goes meanwhile. Beside our own pin, which
 * pages in the list have, and @page if @mine. May err on the safe side: pins
 * of a large folio are counted for all of it.
 */
static bool pinned_by_others(struct havmsi_vcpu *hvcpu, struct havmsi_vm *hv,
			     gfn_t gfn, struct page *page, bool mine)
{
	struct folio *folio = page_folio(page);
	unsigned long first, i, own = 0;
	struct page *other;

	/* We have none. */
	if (havmsi_sealing)
		return folio_maybe_dma_pinned(folio);

	if (!folio_test_large(folio))
		return (unsigned int)folio_ref_count(folio) >=
		       2 * GUP_PIN_COUNTING_BIAS;

	/* Pages are touched one after the other: don't count all each time. */
	if (hvcpu->folio == folio && hvcpu->drops == hv->drops &&
	    atomic_read(&folio->_pincount) <= hvcpu->own + mine)
		return false;

	first = gfn - min_t(gfn_t, gfn, folio_page_idx(folio, page));
	xa_for_each_range(&hv->pages, i, other, first,
			  first + folio_nr_pages(folio) - 1)
		own += page_folio(other) == folio;
	hvcpu->folio = folio;
	hvcpu->own = own;
	hvcpu->drops = hv->drops;
	return atomic_read(&folio->_pincount) > own + mine;
}

/* A device or a system call is at it: the guest comes again in a moment. */
static int not_yet(void)
{
	usleep_range(20, 200);
	return 1;
}

/* The guest wants a page of its RAM that it doesn't have, or not any more. */
static int map_page(struct kvm_vcpu *vcpu, u64 ipa)
{
	struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;
	struct kvm *kvm = vcpu->kvm;
	struct havmsi_vm *hv = kvm->arch.havmsi;
	gfn_t gfn = ipa >> PAGE_SHIFT;
	struct kvm_memory_slot *slot;
	unsigned long hva, seq;
	struct page *page;
	bool writable;
	int ret, idx;

	idx = srcu_read_lock(&kvm->srcu);
	down_read(&hv->lock);

	ret = 1;
	if (!hv->launched)
		goto out;	/* Reset meanwhile. */
	slot = gfn_to_memslot(kvm, gfn);
	hva = gfn_to_hva_memslot_prot(slot, gfn, &writable);
	if (kvm_is_error_hva(hva) || !writable) {
		kvm_pr_limited("HA-VMSI VM %llu: no memory behind guest address %#llx any more\n",
				    hv->handle & 0xffff, ipa);
		ret = -EFAULT;
		goto out;
	}
	seq = kvm->mmu_invalidate_seq;
	smp_rmb();
	if (havmsi_sealing)
		ret = get_user_pages_fast(hva, 1, FOLL_WRITE, &page);
	else
		ret = pin_user_pages_fast(hva, 1, FOLL_WRITE | FOLL_LONGTERM, &page);
	if (ret != 1) {
		if (ret == -EINTR || ret == -EAGAIN)
			goto out;
		kvm_pr_limited("HA-VMSI VM %llu: can't get the memory behind guest address %#llx (%d)\n",
				    hv->handle & 0xffff, ipa, ret);
		ret = -EFAULT;
		goto out;
	}

	if (pinned_by_others(hvcpu, hv, gfn, page, true)) {
		drop(page);
		ret = not_yet();
		goto out;
	}

	ret = donate(hv, HAVMSI_FN_PAGE_MAP, gfn, page, seq);
	if (!ret) {
		if (havmsi_sealing)
			drop_dirty(page);
		else if (hvcpu->folio == page_folio(page))
			hvcpu->own++;
		ret = 1;
		goto out;
	}
	drop(page);
	if (ret == -EAGAIN || ret == -EEXIST) {
		/* Taken from us again, or another vCPU was at the same page: try again. */
		cond_resched();
		ret = 1;
	} else if (ret == -EIO) {
		kvm_pr_limited("HA-VMSI VM %llu: the monitor has stopped it: what came back at guest address %#llx is not what was sealed there\n",
				    hv->handle & 0xffff, ipa);
		ret = -EFAULT;
	} else {
		kvm_pr_limited("HA-VMSI VM %llu: PAGE_MAP of guest address %#llx failed (%d)\n",
				    hv->handle & 0xffff, ipa, ret);
		ret = ret == -ENOMEM ? ret : -EFAULT;
	}
out:
	up_read(&hv->lock);
	srcu_read_unlock(&kvm->srcu, idx);
	return ret;
}

/*
 * The guest wants a page back that it shared. The monitor takes it out of our
 * map when we answer 0; the guest asks again until it is answered.
 */
static int unshare_page(struct kvm_vcpu *vcpu, u64 ipa)
{
	struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;
	struct kvm *kvm = vcpu->kvm;
	struct havmsi_vm *hv = kvm->arch.havmsi;
	gfn_t gfn = ipa >> PAGE_SHIFT;
	bool gone, pinned = false;
	struct page *page;

	down_read(&hv->lock);
	read_lock(&kvm->mmu_lock);
	page = xa_load(&hv->pages, gfn);
	gone = !page && tag_of(hv, gfn);
	if (page)
		pinned = pinned_by_others(hvcpu, hv, gfn, page, false);
	read_unlock(&kvm->mmu_lock);
	up_read(&hv->lock);

	if (!gone && !pinned) {
		vcpu_set_reg(vcpu, 0, 0);
		return 1;
	}
	/* No answer. */
	hvcpu->exit_class = HAVMSI_EXIT_IRQ;
	return gone ? map_page(vcpu, ipa) : not_yet();
}

/* In place of KVM's: the monitor has told RAM and devices apart already. */
int havmsi_handle_guest_abort(struct kvm_vcpu *vcpu)
{
	struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;
	int ret, idx;

	if (hvcpu->exit_class == HAVMSI_EXIT_FAULT)
		return map_page(vcpu, hvcpu->exit_ipa);
	if (hvcpu->exit_class == HAVMSI_EXIT_HVC)
		return unshare_page(vcpu, hvcpu->exit_ipa);

	idx = srcu_read_lock(&vcpu->kvm->srcu);
	ret = io_mem_abort(vcpu, hvcpu->exit_ipa);
	srcu_read_unlock(&vcpu->kvm->srcu, idx);
	return ret;
}
