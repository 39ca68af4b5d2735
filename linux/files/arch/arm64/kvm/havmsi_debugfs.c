// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: what the host knows of a VM, in KVM's folder of it under debugfs
 * (kvm/PID-FD): "havmsi" has name, digest and counts, "havmsi_pages" says which
 * physical memory is the VM's. All of it is this kernel's word: whoever doesn't
 * trust it asks the monitor.
 */
#include <linux/debugfs.h>
#include <linux/kvm_host.h>
#include <linux/sched.h>
#include <linux/seq_file.h>

#include "havmsi.h"

/* Removing the files waits for those who read: the VM is there. */

static int havmsi_show(struct seq_file *m, void *unused)
{
	struct havmsi_vm *hv = m->private;
	unsigned long gfn, private = 0, shared = 0, sealed = 0, tables = 0, vcpus = 0, i;
	struct havmsi_chunk *chunk;
	struct kvm_vcpu *vcpu;
	struct page *page;

	down_read(&hv->lock);
	kvm_for_each_vcpu(i, vcpu, hv->kvm)
		vcpus += vcpu->arch.havmsi && vcpu->arch.havmsi->created;
	xa_for_each(&hv->pages, gfn, page) {
		enum havmsi_kind kind = havmsi_page_kind(hv, gfn, page);

		private += kind == HAVMSI_PAGE_PRIVATE;
		shared += kind == HAVMSI_PAGE_SHARED;
		sealed += kind == HAVMSI_PAGE_SEALED;
		cond_resched();
	}
	mutex_lock(&hv->pool_lock);
	list_for_each_entry(chunk, &hv->pool, list)
		tables += 1UL << chunk->order;
	mutex_unlock(&hv->pool_lock);

	seq_printf(m, "vm %#llx\nlaunched %d\n", hv->handle, hv->launched);
	if (hv->launched)
		seq_printf(m, "digest %*phN\n", HAVMSI_DIGEST_SIZE, hv->digest);
	seq_printf(m, "vcpus %lu\nprivate_pages %lu\nshared_pages %lu\nsealed_pages %lu\npool_pages %lu\n",
		   vcpus, private, shared, sealed, tables);
	seq_printf(m, "faults %lld\nseals %lld\nunseals %lld\nintegrity_failures %lld\nlaunches %lu\n",
		   atomic64_read(&hv->faults), atomic64_read(&hv->seals),
		   atomic64_read(&hv->unseals), atomic64_read(&hv->refusals), hv->launches);
	up_read(&hv->lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(havmsi);

/* A position is a gfn; behind all of these are the pool's chunks. */
#define POOL_POS	(1LL << 52)
/* A run of pages is no longer than that, so that nobody waits long for a lock. */
#define RUN_MAX		512

struct run {
	struct havmsi_vm *hv;
	phys_addr_t start;
	unsigned long nr;
	gfn_t gfn;
	const char *kind;
};

static const char *const names[] = {
	[HAVMSI_PAGE_PRIVATE] = "private",
	[HAVMSI_PAGE_SHARED] = "shared",
	[HAVMSI_PAGE_SEALED] = NULL,	/* Where it lies is its owner's to know. */
};

/* The first run at @pos or behind. */
static struct run *find_run(struct run *run, loff_t *pos)
{
	struct havmsi_vm *hv = run->hv;
	struct havmsi_chunk *chunk;
	unsigned long gfn = *pos;
	struct page *page;
	loff_t at;

	if (*pos < POOL_POS) {
		xa_for_each_start(&hv->pages, gfn, page, gfn) {
			enum havmsi_kind kind = havmsi_page_kind(hv, gfn, page);

			cond_resched();
			if (!names[kind])
				continue;
			*pos = gfn;
			run->gfn = gfn;
			run->start = page_to_phys(page);
			run->kind = names[kind];
			for (run->nr = 1; run->nr < RUN_MAX; run->nr++) {
				struct page *next = xa_load(&hv->pages, gfn + run->nr);

				if (next != page + run->nr ||
				    havmsi_page_kind(hv, gfn + run->nr, next) != kind)
					break;
			}
			return run;
		}
		*pos = POOL_POS;
	}
	at = POOL_POS;
	list_for_each_entry(chunk, &hv->pool, list) {
		if (at++ != *pos)
			continue;
		run->start = page_to_phys(chunk->page);
		run->nr = 1UL << chunk->order;
		run->kind = NULL;
		return run;
	}
	return NULL;
}

static void *pages_start(struct seq_file *m, loff_t *pos)
{
	struct run *run = m->private;

	down_read(&run->hv->lock);
	mutex_lock(&run->hv->pool_lock);
	return find_run(run, pos);
}

static void *pages_next(struct seq_file *m, void *v, loff_t *pos)
{
	struct run *run = v;

	*pos += run->kind ? run->nr : 1;
	return find_run(run, pos);
}

static void pages_stop(struct seq_file *m, void *v)
{
	struct run *run = m->private;

	mutex_unlock(&run->hv->pool_lock);
	up_read(&run->hv->lock);
}

/* As /proc/iomem: first and last byte; what it is; the guest's address. */
static int pages_show(struct seq_file *m, void *v)
{
	struct run *run = v;

	seq_printf(m, "%llx-%llx ", run->start,
		   run->start + ((u64)run->nr << PAGE_SHIFT) - 1);
	if (run->kind)
		seq_printf(m, "%s %llx\n", run->kind, run->gfn << PAGE_SHIFT);
	else
		seq_puts(m, "table\n");
	return 0;
}

static const struct seq_operations pages_ops = {
	.start = pages_start,
	.next = pages_next,
	.stop = pages_stop,
	.show = pages_show,
};

static int pages_open(struct inode *inode, struct file *file)
{
	struct run *run = __seq_open_private(file, &pages_ops, sizeof(*run));

	if (!run)
		return -ENOMEM;
	run->hv = inode->i_private;
	return 0;
}

static const struct file_operations pages_fops = {
	.owner = THIS_MODULE,
	.open = pages_open,
	.read = seq_read,
	.llseek = seq_lseek,
	.release = seq_release_private,
};

void havmsi_create_debugfs(struct kvm *kvm)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;

	debugfs_create_file("havmsi", 0444, kvm->debugfs_dentry, hv, &havmsi_fops);
	/* Physical addresses are nobody else's business. */
	debugfs_create_file("havmsi_pages", 0400, kvm->debugfs_dentry, hv,
			    &pages_fops);
}
