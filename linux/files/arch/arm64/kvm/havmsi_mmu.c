// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: a VM's memory. Pages of the VMM's address space are donated to the
 * VM by the monitor. When an MMU notifier takes one back (swap, migration,
 * compaction, KSM, a slot that goes) the monitor encrypts it: we keep a tag
 * that it wants to see when the content returns to that guest address. What
 * the VM shares is still its own, and there for us to use: the monitor shows
 * it again where it always was, and it goes and comes as it is.
 *
 * Nothing else of KVM's stage-2 code does anything in this mode: its table
 * stays empty.
 */
#include <linux/delay.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/pgtable.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/swap.h>
#include <linux/uaccess.h>

#include <asm/asm-extable.h>
#include <asm/kvm_emulate.h>
#include <asm/kvm_mmu.h>

#include "havmsi.h"

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
 * Fills @nr places that are empty, but that at @but may be taken, with @entry. Adds
 * @g to its list with the first one. Leaves all as it is if one is taken (-EBUSY) or
 * there is no memory.
 */
static int fill_places(struct xarray *xa, unsigned long at, unsigned long nr,
		       unsigned long but, void *entry, struct giving *g)
{
	XA_STATE(xas, xa, at);
	unsigned long i = 0;
	void *taken;

	do {
		xas_lock(&xas);
		if (!i) {
			xas_for_each(&xas, taken, at + nr - 1) {
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
			xas_store(&xas, entry);
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

/* ---- pages that go and come back ---- */

atomic64_t havmsi_sealed, havmsi_unsealed, havmsi_refused, havmsi_calls;

/* For the VM and for all. */
static void count(atomic64_t *vm, atomic64_t *all)
{
	atomic64_inc(vm);
	atomic64_inc(all);
}

/* In the list: the VM's page was taken back. Its tag says what it was. */
#define GONE	xa_mk_value(0)

static struct havmsi_tag *tag_of(struct havmsi_vm *hv, gfn_t gfn)
{
	struct havmsi_tag *tags = xa_load(&hv->tags, gfn / HAVMSI_TAGS);

	return tags + gfn % HAVMSI_TAGS;
}

/*
 * Only a store tells what is shared from what is private, and the log need not
 * have a line for each of those.
 */
enum havmsi_kind havmsi_page_kind(struct havmsi_vm *hv, gfn_t gfn, struct page *page)
{
	bool shared;

	if (page == GONE) {
		struct havmsi_tag *tag = tag_of(hv, gfn);

		return tag->low | tag->high ? HAVMSI_PAGE_SEALED : HAVMSI_PAGE_HOST;
	}
	if (!xa_load(&held, page_to_pfn(page)))
		return HAVMSI_PAGE_HOST;
	pagefault_disable();
	shared = may_be_pinned(page);
	pagefault_enable();
	return shared ? HAVMSI_PAGE_SHARED : HAVMSI_PAGE_PRIVATE;
}

/* Room for the tags of pages that come: there is no memory to be had when they go. */
static int prepare_tags(struct havmsi_vm *hv, gfn_t gfn, unsigned long nr)
{
	unsigned long i;

	for (i = gfn / HAVMSI_TAGS; i <= (gfn + nr - 1) / HAVMSI_TAGS; i++) {
		void *tags, *old;

		if (xa_load(&hv->tags, i))
			continue;
		tags = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
		if (!tags)
			return -ENOMEM;
		old = xa_cmpxchg(&hv->tags, i, NULL, tags, GFP_KERNEL_ACCOUNT);
		if (old) {
			free_page((unsigned long)tags);
			if (xa_is_err(old))
				return xa_err(old);
		}
	}
	return 0;
}

/*
 * A place for the page at @gfn, if the VM neither has one nor gets one right now
 * (-EBUSY); says whether one was taken back there.
 */
static int take_place(struct havmsi_vm *hv, gfn_t gfn, bool *gone)
{
	int ret = xa_insert(&hv->pages, gfn, NULL, GFP_KERNEL_ACCOUNT);

	*gone = ret == -EBUSY &&
		xa_cmpxchg(&hv->pages, gfn, GONE, XA_ZERO_ENTRY, GFP_KERNEL_ACCOUNT) == GONE;
	return *gone ? 0 : ret;
}

/* Places to which no page came. */
static void leave_places(struct havmsi_vm *hv, gfn_t gfn, unsigned long nr, bool gone)
{
	for (; nr; nr--, gfn++) {
		if (gone)
			xa_store(&hv->pages, gfn, GONE, GFP_KERNEL_ACCOUNT);
		else
			xa_erase(&hv->pages, gfn);
	}
}

/* The pages have come to the places that were taken for them. */
static void fill_taken(struct havmsi_vm *hv, gfn_t gfn, struct page *page,
		       unsigned long nr)
{
	XA_STATE(xas, &hv->pages, gfn);

	xas_lock(&xas);
	for (; nr; nr--, page++) {
		xas_store(&xas, page);
		xas_next(&xas);
	}
	xas_unlock(&xas);
}

/*
 * Gives pages, which were looked up at @seq and have their places, to the VM by
 * the call @fn. -EAGAIN if there may be others by now.
 */
static int donate(struct havmsi_vm *hv, u64 fn, gfn_t gfn, struct page *page,
		  unsigned long nr, unsigned long seq)
{
	struct kvm *kvm = hv->kvm;
	int ret;

	for (;;) {
		struct havmsi_tag *tag = tag_of(hv, gfn);
		struct arm_smccc_1_2_regs regs = {
			.a0 = fn, .a1 = hv->handle, .a2 = gfn << PAGE_SHIFT,
			.a3 = page_to_phys(page), .a4 = nr << PAGE_SHIFT,
			.a5 = tag->low, .a6 = tag->high,
		};

		write_lock(&kvm->mmu_lock);
		if (mmu_invalidate_retry(kvm, seq)) {
			write_unlock(&kvm->mmu_lock);
			return -EAGAIN;
		}
		arm_smccc_1_2_smc(&regs, &regs);
		if (fn == HAVMSI_FN_PAGE_MAP)
			atomic64_inc(&havmsi_calls);
		if (regs.a0 == HAVMSI_SUCCESS) {
			fill_taken(hv, gfn, page, nr);
			if (tag->low | tag->high)
				count(&hv->unseals, &havmsi_unsealed);
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
			count(&hv->refusals, &havmsi_refused);
		return havmsi_errno((long)regs.a0);
	}
}

/*
 * A device or a system call is at it, or may be: some page of a large folio is
 * pinned, or it is being written to a disk. That aborts if the page goes meanwhile.
 */
static bool in_use(struct page *page)
{
	struct folio *folio = page_folio(page);

	return folio_maybe_dma_pinned(folio) || folio_test_writeback(folio);
}

/*
 * Pages that we have a reference to become the VM's, unless somebody is at them.
 * How many did.
 */
static long give(struct havmsi_vm *hv, u64 fn, gfn_t gfn, struct page *page,
		 unsigned long nr, unsigned long seq)
{
	unsigned long pfn = page_to_pfn(page), done = 0, i;
	struct giving g = { .list = LIST_HEAD_INIT(g.list), .pfn = pfn, .nr = nr };
	int ret;

	ret = prepare_tags(hv, gfn, nr);
	if (ret)
		return ret;
	/* Whatever copy of it lies elsewhere (swap) will be old. */
	set_page_dirty_lock(page);
	ret = fill_places(&held, pfn, nr, ULONG_MAX, HELD, &g);
	if (ret)
		goto out;
	smp_mb();
	ret = in_use(page) ? -EAGAIN : 0;
	while (done < nr && !ret) {
		unsigned long n = min(nr - done, HAVMSI_MAX_PAGES_PER_MAP);

		ret = donate(hv, fn, gfn + done, page + done, n, seq);
		if (!ret)
			done += n;
	}
	for (i = done; i < nr; i++)
		xa_erase(&held, pfn + i);
	mark_page_accessed(page);
out:
	xa_lock(&held);
	list_del(&g.list);
	xa_unlock(&held);
	return done ?: ret;
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

	if (!hv)
		return;
	xa_for_each_range(&hv->pages, gfn, page, start >> PAGE_SHIFT,
			  (start + size - 1) >> PAGE_SHIFT) {
		struct arm_smccc_1_2_regs res;
		struct havmsi_tag *tag;
		long status;

		if (page == GONE)
			continue;
		status = havmsi_call(HAVMSI_FN_PAGE_UNMAP, hv->handle,
				     gfn << PAGE_SHIFT, 1, 0, &res);
		atomic64_inc(&havmsi_calls);
		if (WARN_ON_ONCE(status)) {
			/* Not ours any more: nobody may get it. */
			get_page(page);
			continue;
		}
		tag = tag_of(hv, gfn);
		tag->low = res.a2;
		tag->high = res.a3;
		if (tag->low | tag->high)
			count(&hv->seals, &havmsi_sealed);
		xa_erase(&held, page_to_pfn(page));
		xa_store(&hv->pages, gfn, GONE, GFP_NOWAIT);
		if (may_block)
			cond_resched_rwlock_write(&kvm->mmu_lock);
	}
}

/* All pages came back, wiped. */
void havmsi_forget_pages(struct havmsi_vm *hv)
{
	rwlock_t *lock = &hv->kvm->mmu_lock;
	unsigned long gfn;
	struct page *page;
	void *tags;

	write_lock(lock);
	xa_for_each(&hv->pages, gfn, page) {
		if (page != GONE)
			xa_erase(&held, page_to_pfn(page));
		xa_erase(&hv->pages, gfn);
		cond_resched_rwlock_write(lock);
	}
	xa_for_each(&hv->tags, gfn, tags) {
		xa_erase(&hv->tags, gfn);
		free_page((unsigned long)tags);
	}
	write_unlock(lock);
}

/* A device or a system call is at it: the guest comes again in a moment. */
static int not_yet(void)
{
	usleep_range(20, 200);
	return 1;
}

/* ---- launch; slots_lock and hv->lock are held ---- */

int havmsi_declare_ram(struct havmsi_vm *hv)
{
	struct kvm_memslots *slots = kvm_memslots(hv->kvm);
	struct arm_smccc_1_2_regs regs;
	struct kvm_memslot_iter iter;
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
	}
	return 0;
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

/* -EAGAIN if there may be another page by now. */
static int populate_page(struct havmsi_vm *hv, gfn_t gfn, struct page *page,
			 unsigned long seq)
{
	bool gone;
	long ret;

	/* Zero pages don't count, and the guest gets zeros anyway. */
	if (!memchr_inv(page_address(page), 0, PAGE_SIZE))
		return 0;
	ret = take_place(hv, gfn, &gone);
	if (ret)
		return ret;
	ret = give(hv, HAVMSI_FN_VM_POPULATE, gfn, page, 1, seq);
	if (ret == 1)
		return 0;
	leave_places(hv, gfn, 1, gone);
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
		unsigned long seq;
		long got = 0, skip, i;
		int ret = 0;

		cond_resched();
		if (fatal_signal_pending(current))
			return -EINTR;

		seq = hv->kvm->mmu_invalidate_seq;
		smp_rmb();
		mmap_read_lock(mm);
		vma = find_vma(mm, hva);
		if (vma)
			end = min(end, vma->vm_start > hva ? vma->vm_start : vma->vm_end);
		skip = (end - hva) >> PAGE_SHIFT;
		if (vma && vma->vm_start <= hva &&
		    !(vma->vm_flags & (VM_IO | VM_PFNMAP)) &&
		    !(vma_is_anonymous(vma) && pmd_none(user_pmd(mm, hva)))) {
			got = get_user_pages(hva, skip, FOLL_WRITE | FOLL_DUMP, pages);
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
			if (!ret)
				off++;
			put_page(pages[i]);
		}
		/* Somebody is at it, or it is another page by now: look again. */
		if (ret == -EAGAIN)
			not_yet();
		else if (ret)
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
 * @page is part of a huge page of the VMM's: how much of that can go to the VM with
 * it, around it, and has its places now. All of it where the VM has nothing there as
 * yet; else the largest power of 2 that it lies in.
 */
static unsigned long around(struct havmsi_vm *hv, struct kvm_memory_slot *slot,
			    gfn_t gfn, unsigned long hva, struct page *page)
{
	unsigned long pfn = page_to_pfn(page), flags, nr;
	pmd_t pmd;

	if (!folio_test_pmd_mappable(page_folio(page)) ||
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

		if (first >= slot->base_gfn &&
		    first + nr <= slot->base_gfn + slot->npages &&
		    !fill_places(&hv->pages, first, nr, gfn, XA_ZERO_ENTRY, NULL))
			break;
	}
	return nr;
}

/* The guest wants a page of its RAM that it doesn't have, or not any more. */
static int map_page(struct kvm_vcpu *vcpu, u64 ipa)
{
	struct kvm *kvm = vcpu->kvm;
	struct havmsi_vm *hv = kvm->arch.havmsi;
	unsigned long hva, seq, nr = 1, off = 0;
	gfn_t gfn = ipa >> PAGE_SHIFT;
	struct kvm_memory_slot *slot;
	struct page *page;
	bool writable, gone;
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

	ret = take_place(hv, gfn, &gone);
	if (ret) {
		/* Another vCPU is at the same page: let it. */
		if (ret == -EBUSY) {
			cond_resched();
			ret = 1;
		}
		goto out;
	}
	seq = kvm->mmu_invalidate_seq;
	smp_rmb();
	ret = get_user_pages_fast(hva, 1, FOLL_WRITE, &page);
	if (ret != 1) {
		leave_places(hv, gfn, 1, gone);
		if (ret == -EINTR || ret == -EAGAIN)
			goto out;
		kvm_pr_limited("HA-VMSI VM %llu: can't get the memory behind guest address %#llx (%d)\n",
				    hv->handle & 0xffff, ipa, ret);
		ret = -EFAULT;
		goto out;
	}

	if (!gone) {
		nr = around(hv, slot, gfn, hva, page);
		off = gfn % nr;
	}
	done = give(hv, HAVMSI_FN_PAGE_MAP, gfn - off, page - off, nr, seq);
	if (done < 0 && done != -EAGAIN && nr > 1) {
		/* Something of it can't go: this page alone, then. */
		leave_places(hv, gfn - off, off, false);
		leave_places(hv, gfn + 1, nr - off - 1, false);
		nr = 1;
		off = 0;
		done = give(hv, HAVMSI_FN_PAGE_MAP, gfn, page, 1, seq);
	}
	if (done > 0)
		atomic64_inc(&hv->faults);
	/* If the first ones went the guest may have to come again. */
	ret = done < 0 ? done : 1;
	done = max(done, 0L);
	leave_places(hv, gfn - off + done, nr - done, gone);
	if (ret == -EAGAIN) {
		folio_wait_writeback(page_folio(page));
		ret = not_yet();
	} else if (ret == -EIO) {
		kvm_pr_limited("HA-VMSI VM %llu: the monitor has stopped it: what came back at guest address %#llx is not what was sealed there\n",
				    hv->handle & 0xffff, ipa);
		ret = -EFAULT;
	} else if (ret < 0) {
		kvm_pr_limited("HA-VMSI VM %llu: PAGE_MAP of guest address %#llx failed (%d)\n",
				    hv->handle & 0xffff, ipa, ret);
		ret = ret == -ENOMEM ? ret : -EFAULT;
	}
	put_page(page);
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
	XA_STATE(xas, &hv->pages, ipa >> PAGE_SHIFT);
	struct page *page;
	void *state;

	read_lock(&kvm->mmu_lock);
	/* Not xa_load(): a place that is taken is to be told from none. */
	xa_lock(&hv->pages);
	page = xas_load(&xas);
	xa_unlock(&hv->pages);
	if (page && !xa_is_zero(page) && page != GONE) {
		state = start_moving(page);
		if (state && !in_use(page)) {
			hvcpu->moving = page;
			read_unlock(&kvm->mmu_lock);
			vcpu_set_reg(vcpu, 0, 0);
			return 1;
		}
		if (state)
			hold(page, state);
	}
	read_unlock(&kvm->mmu_lock);
	if (!page) {
		/* Not 0: there may be one, shared and pinned, when that arrives. */
		vcpu_set_reg(vcpu, 0, SMCCC_RET_INVALID_PARAMETER);
		return 1;
	}
	/* No answer: the guest asks again. */
	hvcpu->exit_class = HAVMSI_EXIT_IRQ;
	return page == GONE ? map_page(vcpu, ipa) : not_yet();
}

/*
 * The monitor took the answer. Interrupts are off. If the page was taken from the
 * VM meanwhile it is no longer there, and the guest asks again.
 */
void havmsi_unshared(struct havmsi_vcpu *hvcpu)
{
	xa_cmpxchg(&held, page_to_pfn(hvcpu->moving), MOVING, HELD, GFP_ATOMIC);
	hvcpu->moving = NULL;
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
