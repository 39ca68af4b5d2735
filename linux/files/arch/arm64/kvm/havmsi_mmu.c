// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: a VM's memory. Pages are pinned in the VMM's address space and
 * donated to the VM by the monitor; they come back wiped. What the VM shares
 * is still its own, and there for us to use: the monitor shows it again where
 * it always was. Nothing else of KVM's stage-2 code does anything in this
 * mode: its table stays empty.
 */
#include <linux/delay.h>
#include <linux/kvm_host.h>
#include <linux/ksm.h>
#include <linux/mm.h>
#include <linux/pgtable.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include <asm/asm-extable.h>
#include <asm/kvm_emulate.h>
#include <asm/kvm_mmu.h>

#include "havmsi.h"

#define PIN_FLAGS	(FOLL_WRITE | FOLL_LONGTERM)
#define BATCH		(PAGE_SIZE / sizeof(struct page *))

#define kvm_pr_limited(fmt, ...) \
	pr_err_ratelimited("kvm [%i]: " fmt, task_pid_nr(current), ##__VA_ARGS__)

/* ---- table memory ---- */

static int donate_chunk(struct havmsi_vm *hv, unsigned int order)
{
	struct havmsi_chunk *chunk = kmalloc(sizeof(*chunk), GFP_KERNEL_ACCOUNT);
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
	struct havmsi_chunk *chunk, *next;

	list_for_each_entry_safe(chunk, next, &hv->pool, list) {
		__free_pages(chunk->page, chunk->order);
		kfree(chunk);
	}
	INIT_LIST_HEAD(&hv->pool);
}

/* ---- whose a page is, before it is pinned for a transfer ---- */

/*
 * A device's access to a page that is not ours aborts, and what the device's
 * driver makes of that is not to be relied on. So no page of a VM is pinned but
 * while it is shared, and no page goes to a VM while somebody has it pinned:
 * who pins looks here after that, who gives looks for pins after it wrote here.
 */
static DEFINE_XARRAY(held);	/* Pages of all VMs, by pfn. */

/* Shared or not: the monitor doesn't tell. */
#define HELD	xa_mk_value(0)
/* Shared, as was seen. Remains so while we don't agree to its end. */
#define SHARED	xa_mk_value(1)
/* Given to the VM or taken back by it right now. */
#define MOVING	xa_mk_value(2)

/* Pages that are being given right now: those are HELD already. */
struct giving {
	struct list_head list;
	unsigned long pfn, nr;
};
static LIST_HEAD(givings);	/* The lock of @held protects it. */

static bool is_being_given(unsigned long pfn)
{
	struct giving *g;

	list_for_each_entry(g, &givings, list)
		if (pfn - g->pfn < g->nr)
			return true;
	return false;
}

/*
 * Fills @nr places that are empty, but that at @but may be taken, with @first and
 * what follows that, or with @first. Adds @g to its list with the first one. Leaves
 * all as it is if one is taken (-EBUSY) or there is no memory.
 */
static int fill_places(struct xarray *xa, unsigned long at, unsigned long nr,
		       unsigned long but, void *first, struct giving *g)
{
	XA_STATE(xas, xa, at);
	unsigned long i = 0;
	void *entry;

	do {
		xas_lock(&xas);
		if (!i) {
			xas_for_each(&xas, entry, at + nr - 1) {
				if (xas.xa_index == but)
					continue;
				xas_unlock(&xas);
				return -EBUSY;
			}
			xas_set(&xas, at);
			if (g && list_empty(&g->list))
				list_add(&g->list, &givings);
		}
		for (; i < nr; i++) {
			xas_store(&xas, xa_is_value(first) ? first :
				  (struct page *)first + i);
			if (xas_error(&xas))
				break;
			xas_next(&xas);
		}
		xas_unlock(&xas);
	} while (xas_nomem(&xas, GFP_KERNEL));
	if (!xas_error(&xas))
		return 0;
	while (i--)
		if (at + i != but)
			xa_erase(xa, at + i);
	return xas_error(&xas);
}

/* There is something already, so nothing is allocated. */
static void hold(struct page *page, void *state)
{
	xa_store(&held, page_to_pfn(page), state, GFP_ATOMIC);
}

/* What it was, so that it can be that again; NULL if it moves already. */
static void *start_moving(struct page *page)
{
	void *state;

	xa_lock(&held);
	state = xa_load(&held, page_to_pfn(page));
	if (state == MOVING)
		state = NULL;
	if (state)
		__xa_store(&held, page_to_pfn(page), MOVING, GFP_ATOMIC);
	xa_unlock(&held);
	smp_mb();
	return state;
}

/* Stores what is there, in one go: the guest may be writing as well. */
static bool can_be_written(struct page *page)
{
	u64 *p = page_address(page), value;
	int ret = 0;
	u32 failed;

	asm volatile("1:	ldxr	%0, %3\n"
		     "2:	stxr	%w1, %0, %3\n"
		     "	cbnz	%w1, 1b\n"
		     "3:\n"
		     _ASM_EXTABLE_KACCESS_ERR(1b, 3b, %w2)
		     _ASM_EXTABLE_KACCESS_ERR(2b, 3b, %w2)
		     : "=&r" (value), "=&r" (failed), "+r" (ret), "+Q" (*p));
	return !ret;
}

static bool may_be_pinned(struct page *page)
{
	void *state = xa_load(&held, page_to_pfn(page));

	if (likely(!state) || state == SHARED)
		return true;
	/* A store of ours must not meet a transfer: only the first pin tries. */
	xa_lock(&held);
	state = xa_load(&held, page_to_pfn(page));
	if (state == HELD && !is_being_given(page_to_pfn(page)) &&
	    can_be_written(page)) {
		state = SHARED;
		__xa_store(&held, page_to_pfn(page), state, GFP_ATOMIC);
	}
	xa_unlock(&held);
	return !state || state == SHARED;
}

/*
 * Only a store tells what is shared from what is private, and the log need not
 * have a line for each of those.
 */
enum havmsi_kind havmsi_page_kind(struct page *page)
{
	bool shared;

	if (!xa_load(&held, page_to_pfn(page)))
		return HAVMSI_PAGE_HOST;
	pagefault_disable();
	shared = may_be_pinned(page);
	pagefault_enable();
	return shared ? HAVMSI_PAGE_SHARED : HAVMSI_PAGE_PRIVATE;
}

/* What pin_user_pages_fast() returns for @pages, of which it got @nr. */
int arch_check_pinned(struct page **pages, int nr)
{
	int i;

	if (!havmsi_present)
		return nr;
	/* Pairs with those in give() and start_moving(). */
	smp_mb();
	for (i = 0; i < nr && !xa_empty(&held); i++) {
		if (may_be_pinned(pages[i]))
			continue;
		unpin_user_pages(pages + i, nr - i);
		return i ?: -EFAULT;
	}
	return nr;
}

/* ---- pages that come back ---- */

/* Wiped, so whatever copy of it lies elsewhere (swap) is out of date. */
static void unpin(struct page *page)
{
	xa_erase(&held, page_to_pfn(page));
	unpin_user_pages_dirty_lock(&page, 1, true);
}

void havmsi_unpin_all(struct havmsi_vm *hv)
{
	unsigned long gfn;
	struct page *page;

	hv->drops++;
	xa_for_each(&hv->pages, gfn, page) {
		unpin(page);
		cond_resched();
	}
	xa_destroy(&hv->pages);
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

/*
 * The entry that maps 2 MiB around @addr or leads to their table, none if there is
 * nothing. mmap_lock is held, or interrupts are off.
 */
static pmd_t user_pmd(struct mm_struct *mm, unsigned long addr)
{
	pgd_t *pgd = pgd_offset(mm, addr);
	p4d_t *p4d;
	pud_t *pud, value;

	if (pgd_none(READ_ONCE(*pgd)))
		return __pmd(0);
	p4d = p4d_offset(pgd, addr);
	if (p4d_none(READ_ONCE(*p4d)))
		return __pmd(0);
	pud = pud_offset(p4d, addr);
	value = READ_ONCE(*pud);
	if (pud_none(value))
		return __pmd(0);
	/* 1 GiB: 2 MiB of that. */
	if (pud_leaf(value))
		return __pmd(pud_val(value) + (addr & ~PUD_MASK & PMD_MASK));
	return pmdp_get_lockless(pmd_offset(pud, addr));
}

static int populate_page(struct havmsi_vm *hv, gfn_t gfn, struct page *page)
{
	struct arm_smccc_1_2_regs regs = {
		.a0 = HAVMSI_FN_VM_POPULATE, .a1 = hv->handle,
		.a2 = gfn << PAGE_SHIFT, .a3 = page_to_phys(page),
	};
	int ret;

	/* Zero pages don't count, and the guest gets zeros anyway. */
	if (!memchr_inv(page_address(page), 0, PAGE_SIZE)) {
		unpin_user_page(page);
		return 0;
	}
	ret = xa_err(xa_store(&hv->pages, gfn, page, GFP_KERNEL_ACCOUNT));
	if (!ret)
		ret = xa_insert(&held, page_to_pfn(page), HELD, GFP_KERNEL);
	if (!ret) {
		ret = havmsi_vm_call(hv, &regs, NULL);
		if (ret)
			xa_erase(&held, page_to_pfn(page));
	}
	if (ret) {
		xa_erase(&hv->pages, gfn);
		unpin_user_page(page);
	}
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
		int ret = 0;

		cond_resched();
		if (fatal_signal_pending(current))
			return -EINTR;

		mmap_read_lock(mm);
		vma = find_vma(mm, hva);
		if (vma)
			end = min(end, vma->vm_start > hva ? vma->vm_start : vma->vm_end);
		skip = (end - hva) >> PAGE_SHIFT;
		if (vma && vma->vm_start <= hva &&
		    !(vma->vm_flags & (VM_IO | VM_PFNMAP)) &&
		    !(vma_is_anonymous(vma) && pmd_none(user_pmd(mm, hva)))) {
			got = pin_user_pages(hva, skip, PIN_FLAGS | FOLL_DUMP, pages);
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
				ret = populate_page(hv, slot->base_gfn + off + i, pages[i]);
			else
				unpin_user_page(pages[i]);
		}
		if (ret)
			return ret;
		off += got ?: skip;
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

/*
 * The guest wants a page back that it shared. The monitor takes it out of our
 * map when we answer 0; the guest asks again until it is answered.
 */
static int unshare_page(struct kvm_vcpu *vcpu, u64 ipa)
{
	struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;
	struct havmsi_vm *hv = vcpu->kvm->arch.havmsi;
	XA_STATE(xas, &hv->pages, ipa >> PAGE_SHIFT);
	void *state = NULL;
	struct page *page;
	int ret = 1;

	down_read(&hv->lock);
	/* Not xa_load(): a place that is taken is to be told from none. */
	xa_lock(&hv->pages);
	page = xas_load(&xas);
	xa_unlock(&hv->pages);
	if (page && !xa_is_zero(page))
		state = start_moving(page);
	if (!page) {
		/* Not 0: there may be one, shared and pinned, when that arrives. */
		vcpu_set_reg(vcpu, 0, SMCCC_RET_INVALID_PARAMETER);
	} else if (!state || pinned_by_others(hvcpu, hv, xas.xa_index, page, false)) {
		if (state)
			hold(page, state);
		/* No answer. */
		hvcpu->exit_class = HAVMSI_EXIT_IRQ;
		ret = not_yet();
	} else {
		hvcpu->moving = page;
		vcpu_set_reg(vcpu, 0, 0);
	}
	up_read(&hv->lock);
	return ret;
}

/* The monitor took the answer. Interrupts are off. */
void havmsi_unshared(struct havmsi_vcpu *hvcpu)
{
	xa_cmpxchg(&held, page_to_pfn(hvcpu->moving), MOVING, HELD, GFP_ATOMIC);
	hvcpu->moving = NULL;
}

/*
 * @page, pinned, is part of a huge page of the VMM's: how much of that can go to the VM
 * with it, around it. All of it where the VM has nothing there as yet; else the largest
 * power of 2 that it lies in. That is pinned now as well, and has its place in the list.
 */
static unsigned long around(struct havmsi_vcpu *hvcpu, struct havmsi_vm *hv,
			    struct kvm_memory_slot *slot, gfn_t gfn,
			    unsigned long hva, struct page *page)
{
	unsigned long pfn = page_to_pfn(page), flags, nr, i;
	struct folio *folio = page_folio(page);
	pmd_t pmd;

	if (!folio_test_pmd_mappable(folio) ||
	    ((hva >> PAGE_SHIFT) ^ gfn) % PTRS_PER_PMD ||
	    (pfn ^ gfn) % PTRS_PER_PMD)
		return 1;
	local_irq_save(flags);
	pmd = user_pmd(current->mm, hva);
	local_irq_restore(flags);
	if (!pmd_leaf(pmd) || pmd_pfn(pmd) != ALIGN_DOWN(pfn, PTRS_PER_PMD))
		return 1;

	for (nr = PTRS_PER_PMD; nr > 1; nr /= 2) {
		gfn_t first = ALIGN_DOWN(gfn, nr);

		if (first < slot->base_gfn ||
		    first + nr > slot->base_gfn + slot->npages)
			continue;
		/* The pins first: rather one too many for pinned_by_others(). */
		for (i = 1; i < nr; i++)
			folio_add_pin(folio);
		if (!fill_places(&hv->pages, first, nr, gfn, page - (gfn - first), NULL))
			break;
		unpin_user_page_range_dirty_lock(page - (gfn - first), nr - 1, false);
	}
	if (hvcpu->folio != folio || hvcpu->drops != hv->drops) {
		hvcpu->folio = folio;
		hvcpu->own = nr - 1;
		hvcpu->drops = hv->drops;
	} else {
		hvcpu->own += nr - 1;
	}
	return nr;
}

/*
 * We have pinned these pages: they become the VM's, unless others have them as well.
 * How many did.
 */
static long give(struct havmsi_vcpu *hvcpu, struct havmsi_vm *hv, gfn_t gfn,
		 struct page *page, unsigned long nr)
{
	unsigned long pfn = page_to_pfn(page), done = 0, i;
	struct giving g = { .list = LIST_HEAD_INIT(g.list), .pfn = pfn, .nr = nr };
	int ret;

	ret = fill_places(&held, pfn, nr, ULONG_MAX, HELD, &g);
	if (ret)
		goto out;
	smp_mb();
	ret = pinned_by_others(hvcpu, hv, gfn, page, true) ? -EAGAIN : 0;
	while (done < nr && !ret) {
		struct arm_smccc_1_2_regs regs = {
			.a0 = HAVMSI_FN_PAGE_MAP, .a1 = hv->handle,
			.a2 = (gfn + done) << PAGE_SHIFT,
			.a3 = page_to_phys(page + done),
			.a4 = min(nr - done, HAVMSI_MAX_PAGES_PER_MAP) << PAGE_SHIFT,
		};

		ret = havmsi_vm_call(hv, &regs, NULL);
		if (!ret)
			done += regs.a4 >> PAGE_SHIFT;
	}
	for (i = done; i < nr; i++)
		xa_erase(&held, pfn + i);
out:
	xa_lock(&held);
	list_del(&g.list);
	xa_unlock(&held);
	return done ?: ret;
}

/* Pages that did not go. */
static void release(struct havmsi_vcpu *hvcpu, struct havmsi_vm *hv, gfn_t gfn,
		    struct page *page, unsigned long nr)
{
	if (nr)
		hvcpu->folio = NULL;
	for (; nr; nr--, gfn++, page++) {
		xa_erase(&hv->pages, gfn);
		unpin_user_page(page);
	}
}

/* The guest wants a page of its RAM that it doesn't have yet. */
static int map_page(struct kvm_vcpu *vcpu, u64 ipa)
{
	struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;
	struct kvm *kvm = vcpu->kvm;
	struct havmsi_vm *hv = kvm->arch.havmsi;
	gfn_t gfn = ipa >> PAGE_SHIFT;
	struct kvm_memory_slot *slot;
	unsigned long hva, nr, off;
	struct page *page;
	bool writable;
	int ret, idx;
	long done;

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

	/* Its place in the list. */
	ret = xa_insert(&hv->pages, gfn, NULL, GFP_KERNEL_ACCOUNT);
	if (ret) {
		/* Another vCPU is at the same page: let it. */
		if (ret == -EBUSY) {
			cond_resched();
			ret = 1;
		}
		goto out;
	}
	ret = pin_user_pages_fast(hva, 1, PIN_FLAGS, &page);
	if (ret != 1) {
		xa_release(&hv->pages, gfn);
		if (ret == -EINTR || ret == -EAGAIN)
			goto out;
		kvm_pr_limited("HA-VMSI VM %llu: can't pin the memory behind guest address %#llx (%d)\n",
				    hv->handle & 0xffff, ipa, ret);
		ret = -EFAULT;
		goto out;
	}

	nr = around(hvcpu, hv, slot, gfn, hva, page);
	off = gfn % nr;
	done = give(hvcpu, hv, gfn - off, page - off, nr);
	if (done < 0 && done != -EAGAIN && nr > 1) {
		/* Something of it can't go: this page alone, then. */
		release(hvcpu, hv, gfn - off, page - off, off);
		release(hvcpu, hv, gfn + 1, page + 1, nr - off - 1);
		nr = 1;
		off = 0;
		done = give(hvcpu, hv, gfn, page, 1);
	}
	if (done < 0) {
		ret = done;
		release(hvcpu, hv, gfn - off, page - off, nr);
		if (ret == -EAGAIN) {
			ret = not_yet();
			goto out;
		}
		kvm_pr_limited("HA-VMSI VM %llu: PAGE_MAP of guest address %#llx failed (%d)\n",
				    hv->handle & 0xffff, ipa, ret);
		ret = ret == -ENOMEM ? ret : -EFAULT;
		goto out;
	}
	if (nr == 1)
		xa_store(&hv->pages, gfn, page, GFP_KERNEL_ACCOUNT);
	if (hvcpu->folio == page_folio(page))
		hvcpu->own++;
	atomic64_inc(&hv->faults);
	/* The first pages went: the guest may have to come again. */
	release(hvcpu, hv, gfn - off + done, page - off + done, nr - done);
	ret = 1;
out:
	up_read(&hv->lock);
	srcu_read_unlock(&kvm->srcu, idx);
	return ret;
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

/* A memory slot goes (slots_lock is held): its pages come back wiped. */
void havmsi_flush_memslot(struct kvm *kvm, struct kvm_memory_slot *slot)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	gfn_t end = slot->base_gfn + slot->npages;
	unsigned long gfn;
	struct page *page;

	if (!hv)
		return;
	down_write(&hv->lock);
	if (!hv->handle)
		goto out;
	hv->drops++;
	xa_for_each_range(&hv->pages, gfn, page, slot->base_gfn, end - 1) {
		struct arm_smccc_1_2_regs regs = {
			.a0 = HAVMSI_FN_PAGE_UNMAP, .a1 = hv->handle,
			.a2 = gfn << PAGE_SHIFT, .a3 = 1,
		};

		/* What the monitor doesn't give back stays pinned until VM_DESTROY. */
		if (WARN_ON_ONCE(havmsi_vm_call(hv, &regs, NULL)))
			continue;
		xa_erase(&hv->pages, gfn);
		unpin(page);
		cond_resched();
	}
out:
	up_write(&hv->lock);
}
