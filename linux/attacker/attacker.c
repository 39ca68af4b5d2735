// SPDX-License-Identifier: GPL-2.0
/*
 * A compromised host kernel, as a module: what code at EL1 can do to KVM's
 * guests. Only for test machines: it hands physical memory, page tables and
 * registers to whoever may open /dev/havmsi_attacker (root).
 *
 * The attacks must be able to fail without taking the host down, so each access
 * to memory that a monitor may have taken away goes through an exception-table
 * entry and ends in -EFAULT.
 */
#include <linux/arm-smccc.h>
#include <linux/capability.h>
#include <linux/completion.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include <asm/kvm_emulate.h>
#include <asm/kvm_pgtable.h>

#if defined(CONFIG_KVM_HAVMSI) && __has_include("havmsi.h")
#include "havmsi.h"
#define WITH_HAVMSI 1
#else
#define WITH_HAVMSI 0
#endif

#include "attacker.h"

/* ---- Memory that may not be there --------------------------------------- */

/* copy_to_kernel_nofault() isn't exported. Whole, aligned words only. */
static long write_nofault(void *dst, const void *src, size_t size)
{
	pagefault_disable();
	for (; size >= sizeof(u64); size -= sizeof(u64)) {
		__put_kernel_nofault(dst, src, u64, fault);
		dst += sizeof(u64);
		src += sizeof(u64);
	}
	pagefault_enable();
	return 0;
fault:
	pagefault_enable();
	return -EFAULT;
}

/*
 * An address for a page: in the linear map, or in a mapping of our own. What
 * isn't System RAM (a carve-out of the monitor's, say) has no linear address.
 */
static void *map_page(phys_addr_t pa, bool fresh, void **unmap_v, void **unmap_m)
{
	unsigned long pfn = PHYS_PFN(pa);
	struct page *page;

	if (!pfn_is_map_memory(pfn)) {
		*unmap_m = memremap(pa & PAGE_MASK, PAGE_SIZE, MEMREMAP_WB);
		return *unmap_m;
	}
	if (!fresh)
		return __va(pa & PAGE_MASK);
	page = pfn_to_page(pfn);
	*unmap_v = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	return *unmap_v;
}

static long atk_mem(struct atk_mem *m)
{
	void *unmap_v = NULL, *unmap_m = NULL, *buffer, *va;
	size_t offset = m->pa & ~PAGE_MASK;
	long ret;

	if (!m->len || m->len > PAGE_SIZE - offset || (m->pa | m->len) & 7 || m->pa >> 52)
		return -EINVAL;
	buffer = kzalloc(m->len, GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	ret = -EFAULT;
	if (m->flags & ATK_MEM_WRITE &&
	    copy_from_user(buffer, u64_to_user_ptr(m->buffer), m->len))
		goto free;
	ret = -ENOMEM;
	va = map_page(m->pa, m->flags & ATK_MEM_FRESH, &unmap_v, &unmap_m);
	if (!va)
		goto free;
	if (m->flags & ATK_MEM_WRITE)
		ret = write_nofault(va + offset, buffer, m->len);
	else
		ret = copy_from_kernel_nofault(buffer, va + offset, m->len);
	if (unmap_v)
		vunmap(unmap_v);
	if (unmap_m)
		memunmap(unmap_m);
	if (!ret && !(m->flags & ATK_MEM_WRITE) &&
	    copy_to_user(u64_to_user_ptr(m->buffer), buffer, m->len))
		ret = -EFAULT;
free:
	kfree(buffer);
	return ret;
}

/* ---- Looking for a stream ----------------------------------------------- */

#define GAMMA		0x9e3779b97f4a7c15ULL
#define CHUNK		512	/* pages of one mapping of our own */

static u64 mix(u64 z)
{
	z ^= z >> 30;
	z *= 0xbf58476d1ce4e5b9ULL;
	z ^= z >> 27;
	z *= 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

struct scan {
	struct atk_scan *arg;
	u64 tag[ATK_SEEDS];
	u64 *words;		/* a copy of a page */
	struct page **pages;
};

/* The stream as userland/README.md defines it. */
static bool whole_page(const u64 *seed, const u64 *words)
{
	u64 number = words[1] ^ mix(seed[1] + GAMMA);
	u64 state = mix(seed[2] + number * GAMMA);
	u64 n;

	for (n = 2; n < PAGE_SIZE / sizeof(u64); n++)
		if (words[n] != mix(state + seed[3] + n * GAMMA))
			return false;
	return true;
}

static void scan_page(struct scan *s, const void *va, unsigned long pfn)
{
	struct atk_scan *arg = s->arg;
	unsigned int i;
	u64 first;

	arg->pages++;
	if (copy_from_kernel_nofault(&first, va, sizeof(first))) {
		if (arg->faults < ATK_FRAMES)
			arg->fault_pfn[arg->faults] = pfn;
		arg->faults++;
		return;
	}
	for (i = 0; i < arg->seeds; i++) {
		struct atk_hits *hits = &arg->hits[i];

		if (first != s->tag[i])
			continue;
		if (copy_from_kernel_nofault(s->words, va, PAGE_SIZE))
			return;
		if (!whole_page(arg->seed[i], s->words)) {
			hits->partial++;
			continue;
		}
		if (hits->whole < ATK_FRAMES)
			hits->pfn[hits->whole] = pfn;
		hits->whole++;
	}
}

static int scan_range(struct resource *range, void *data)
{
	struct scan *s = data;
	unsigned long pfn = PFN_UP(range->start), end = PFN_DOWN(range->end + 1);

	while (pfn < end) {
		unsigned long n = min_t(unsigned long, end - pfn, CHUNK), i;
		void *va = NULL;

		if (fatal_signal_pending(current))
			return -EINTR;
		for (i = 0; i < n && pfn_is_map_memory(pfn + i); i++)
			s->pages[i] = pfn_to_page(pfn + i);
		if (!i) {
			pfn++;
			continue;
		}
		n = i;
		if (s->arg->fresh) {
			va = vmap(s->pages, n, VM_MAP, PAGE_KERNEL);
			if (!va)
				return -ENOMEM;
		}
		for (i = 0; i < n; i++)
			scan_page(s, va ? va + i * PAGE_SIZE : __va(PFN_PHYS(pfn + i)), pfn + i);
		if (va)
			vunmap(va);
		pfn += n;
		cond_resched();
	}
	return 0;
}

static long atk_scan(struct atk_scan *arg)
{
	struct scan s = { .arg = arg };
	unsigned int i;
	long ret = -ENOMEM;

	if (!arg->seeds || arg->seeds > ATK_SEEDS)
		return -EINVAL;
	arg->pages = 0;
	arg->faults = 0;
	memset(arg->fault_pfn, 0, sizeof(arg->fault_pfn));
	memset(arg->hits, 0, sizeof(arg->hits));
	for (i = 0; i < arg->seeds; i++)
		s.tag[i] = mix(arg->seed[i][0] + GAMMA);
	s.words = kmalloc(PAGE_SIZE, GFP_KERNEL);
	s.pages = kcalloc(CHUNK, sizeof(*s.pages), GFP_KERNEL);
	if (s.words && s.pages)
		ret = walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY,
					  0, -1, &s, scan_range);
	/* Our copy of a page is no find of the next scan. */
	kfree_sensitive(s.words);
	kfree(s.pages);
	return ret;
}

/* ---- Processes, VMs ------------------------------------------------------ */

static long atk_page(struct atk_page *p)
{
	struct task_struct *task = get_pid_task(find_vpid(p->pid), PIDTYPE_PID);
	struct mm_struct *mm;
	struct page *page;
	long n;

	if (!task)
		return -ESRCH;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return -ESRCH;
	mmap_read_lock(mm);
	n = get_user_pages_remote(mm, p->va, 1, FOLL_FORCE, &page, NULL);
	mmap_read_unlock(mm);
	mmput(mm);
	if (n != 1)
		return n < 0 ? n : -EFAULT;
	p->pa = page_to_phys(page) + (p->va & ~PAGE_MASK);
	put_page(page);
	return 0;
}

/* The file behind a descriptor of the caller's, if it is one of KVM's of that kind. */
static struct file *kvm_file(u64 fd, const char *name)
{
	struct file *file = fget(fd);

	if (!file)
		return ERR_PTR(-EBADF);
	if (strncmp(file->f_path.dentry->d_name.name, name, strlen(name)) || !file->private_data) {
		fput(file);
		return ERR_PTR(-EINVAL);
	}
	return file;
}

/* KVM's table structure, which another kernel may not fill in. */
static long table_of(struct kvm *kvm, struct kvm_pgtable *table)
{
	struct kvm_pgtable *pgt = READ_ONCE(kvm->arch.mmu.pgt);

	if (!pgt || copy_from_kernel_nofault(table, pgt, sizeof(*table)))
		return -ENOENT;
	return 0;
}

#if WITH_HAVMSI
/* As havmsi_mmu.c has it; a look, nothing depends on it. */
struct pool_chunk {
	struct list_head list;
	struct page *page;
	unsigned int order;
};

static void monitors_view(struct kvm *kvm, struct atk_vm *vm)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	struct pool_chunk *chunk;
	unsigned int i = 0;

	if (!hv)
		return;
	vm->handle = READ_ONCE(hv->handle);
	mutex_lock(&hv->pool_lock);
	list_for_each_entry(chunk, &hv->pool, list) {
		if (i == ATK_FRAMES)
			break;
		vm->pool[i++] = page_to_pfn(chunk->page);
	}
	mutex_unlock(&hv->pool_lock);
}
#else
static void monitors_view(struct kvm *kvm, struct atk_vm *vm)
{
}
#endif

static long atk_vm(struct atk_vm *vm)
{
	struct file *file = kvm_file(vm->fd, "kvm-vm");
	struct kvm_memory_slot *slot;
	struct kvm_pgtable table;
	struct kvm *kvm;
	int bucket, idx;

	if (IS_ERR(file))
		return PTR_ERR(file);
	kvm = file->private_data;
	vm->pgd_pa = kvm->arch.mmu.pgd_phys;
	vm->ia_bits = 0;
	vm->start_level = 0;
	if (!table_of(kvm, &table)) {
		vm->ia_bits = table.ia_bits;
		vm->start_level = (u8)table.start_level;
	}
	vm->vcpus = atomic_read(&kvm->online_vcpus);
	vm->slots = 0;
	idx = srcu_read_lock(&kvm->srcu);
	kvm_for_each_memslot(slot, bucket, kvm_memslots(kvm)) {
		if (vm->slots == ATK_SLOTS)
			break;
		vm->slot[vm->slots++] = (struct atk_slot) {
			.ipa = slot->base_gfn << PAGE_SHIFT,
			.size = slot->npages << PAGE_SHIFT,
			.va = slot->userspace_addr,
		};
	}
	srcu_read_unlock(&kvm->srcu, idx);
	vm->handle = 0;
	memset(vm->pool, 0, sizeof(vm->pool));
	monitors_view(kvm, vm);
	fput(file);
	return 0;
}

static long walk_stage2(struct kvm *kvm, struct atk_stage2 *s)
{
	struct kvm_pgtable table;
	phys_addr_t base = kvm->arch.mmu.pgd_phys;
	u64 desc, mask;
	s8 level;
	long ret = table_of(kvm, &table);

	if (ret)
		return ret;
	if (!base || table.ia_bits < 32 || table.ia_bits > 52 ||
	    table.start_level < -1 || table.start_level > 3)
		return -ENOENT;
	/* The first table may be several pages side by side. */
	mask = BIT(table.ia_bits) - 1;
	for (level = table.start_level; level <= 3; level++) {
		unsigned int shift = 12 + 9 * (3 - level);

		s->level = level;
		s->desc_pa = base + ((s->ipa & mask) >> shift) * sizeof(desc);
		mask = BIT(shift) - 1;
		if (!pfn_is_map_memory(PHYS_PFN(s->desc_pa)))
			return -EFAULT;
		if (copy_from_kernel_nofault(&desc, __va(s->desc_pa), sizeof(desc)))
			return -EFAULT;
		if (!(desc & 1))
			return -ENXIO;
		if (level == 3 || !(desc & 2))
			break;
		base = desc & GENMASK_ULL(47, 12);
	}
	if (s->write) {
		u64 new = s->desc;

		ret = write_nofault(__va(s->desc_pa), &new, sizeof(new));
		dsb(ish);
		kvm_flush_remote_tlbs(kvm);
	}
	s->desc = desc;
	return ret;
}

static long atk_stage2(struct atk_stage2 *s)
{
	struct file *file = kvm_file(s->fd, "kvm-vm");
	long ret;

	if (IS_ERR(file))
		return PTR_ERR(file);
	ret = walk_stage2(file->private_data, s);
	fput(file);
	return ret;
}

/* ---- Registers ------------------------------------------------------------ */

static long atk_regs(struct atk_regs *r)
{
	static const int sys[] = {
		SP_EL1, ELR_EL1, TTBR0_EL1, TTBR1_EL1, VBAR_EL1, TPIDR_EL0, TPIDR_EL1, SCTLR_EL1,
	};
	struct file *file = kvm_file(r->fd, "kvm-vcpu");
	struct kvm_cpu_context *ctxt;
	struct kvm_vcpu *vcpu;
	unsigned int i;

	if (IS_ERR(file))
		return PTR_ERR(file);
	vcpu = file->private_data;
	ctxt = &vcpu->arch.ctxt;
	for (i = 0; i < 31; i++)
		if (r->write & BIT(i))
			WRITE_ONCE(ctxt->regs.regs[i], r->x[i]);
	if (r->write & BIT(31))
		WRITE_ONCE(ctxt->regs.pc, r->pc);
	for (i = 0; i < 31; i++)
		r->x[i] = READ_ONCE(ctxt->regs.regs[i]);
	r->sp = ctxt->regs.sp;
	r->pc = ctxt->regs.pc;
	r->pstate = ctxt->regs.pstate;
	memcpy(r->v, ctxt->fp_regs.vregs, sizeof(r->v));
	for (i = 0; i < ARRAY_SIZE(sys); i++)
		r->sys[i] = ctxt_sys_reg(ctxt, sys[i]);
	fput(file);
	return 0;
}

/*
 * KVM takes a vCPU's ioctls only in the address space that made the VM: a kernel
 * thread can adopt it.
 */
struct one_reg {
	struct atk_one_reg *arg;
	struct file *file;
	struct mm_struct *mm;
	struct completion done;
	long ret;
};

static int one_reg_thread(void *data)
{
	struct one_reg *o = data;
	struct {
		struct kvm_one_reg reg;
		u64 value[2];
	} io = { .reg.id = o->arg->id };
	unsigned long va;

	memcpy(io.value, o->arg->value, sizeof(io.value));
	kthread_use_mm(o->mm);
	va = vm_mmap(NULL, 0, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, 0);
	if (IS_ERR_VALUE(va)) {
		o->ret = (long)va;
		goto out;
	}
	io.reg.addr = va + sizeof(io.reg);
	o->ret = -EFAULT;
	if (!copy_to_user((void __user *)va, &io, sizeof(io))) {
		unsigned int cmd = o->arg->write ? KVM_SET_ONE_REG : KVM_GET_ONE_REG;

		o->arg->result = o->file->f_op->unlocked_ioctl(o->file, cmd, va);
		if (!copy_from_user(&io, (void __user *)va, sizeof(io)))
			o->ret = 0;
	}
	vm_munmap(va, PAGE_SIZE);
	memcpy(o->arg->value, io.value, sizeof(io.value));
out:
	kthread_unuse_mm(o->mm);
	complete(&o->done);
	return 0;
}

static long atk_one_reg(struct atk_one_reg *arg)
{
	struct one_reg o = { .arg = arg };
	struct task_struct *thread;
	struct kvm_vcpu *vcpu;

	o.file = kvm_file(arg->fd, "kvm-vcpu");
	if (IS_ERR(o.file))
		return PTR_ERR(o.file);
	vcpu = o.file->private_data;
	o.mm = vcpu->kvm->mm;
	o.ret = -ESRCH;
	if (!mmget_not_zero(o.mm))
		goto put;
	init_completion(&o.done);
	thread = kthread_run(one_reg_thread, &o, "havmsi_one_reg");
	if (IS_ERR(thread))
		o.ret = PTR_ERR(thread);
	else
		wait_for_completion(&o.done);
	mmput(o.mm);
put:
	fput(o.file);
	return o.ret;
}

/* ---- Firmware ------------------------------------------------------------- */

static long atk_smc(struct atk_smc *s)
{
	struct arm_smccc_1_2_regs in, out;

	BUILD_BUG_ON(sizeof(in) != sizeof(*s));
	if (arm_smccc_1_1_get_conduit() != SMCCC_CONDUIT_SMC)
		return -EOPNOTSUPP;
	memcpy(&in, s, sizeof(in));
	arm_smccc_1_2_smc(&in, &out);
	memcpy(s, &out, sizeof(out));
	return 0;
}

/* ---- The device ----------------------------------------------------------- */

static long atk_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	size_t size = _IOC_SIZE(cmd);
	void __user *user = (void __user *)arg;
	void *data;
	long ret;

	if (!capable(CAP_SYS_RAWIO))
		return -EPERM;
	if (_IOC_TYPE(cmd) != 'H' || !size || size > PAGE_SIZE)
		return -ENOTTY;
	data = kzalloc(size, GFP_KERNEL);
	if (!data)
		return -ENOMEM;
	ret = -EFAULT;
	if (copy_from_user(data, user, size))
		goto free;
	switch (cmd) {
	case ATK_SCAN:
		ret = atk_scan(data);
		break;
	case ATK_MEM:
		ret = atk_mem(data);
		break;
	case ATK_PAGE:
		ret = atk_page(data);
		break;
	case ATK_VM:
		ret = atk_vm(data);
		break;
	case ATK_STAGE2:
		ret = atk_stage2(data);
		break;
	case ATK_REGS:
		ret = atk_regs(data);
		break;
	case ATK_ONE_REG:
		ret = atk_one_reg(data);
		break;
	case ATK_SMC:
		ret = atk_smc(data);
		break;
	case ATK_IO:
		ret = atk_io(data);
		break;
	case ATK_DMA:
		ret = atk_dma(data);
		break;
	case ATK_CPU:
		ret = atk_cpu(data);
		break;
	case ATK_WATCH:
		ret = atk_watch(data);
		break;
	default:
		ret = -ENOTTY;
	}
	if (copy_to_user(user, data, size))
		ret = -EFAULT;
free:
	kfree(data);
	return ret;
}

static const struct file_operations atk_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = atk_ioctl,
};

static struct miscdevice atk_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "havmsi_attacker",
	.fops = &atk_fops,
	.mode = 0600,
};
module_misc_device(atk_device);

MODULE_DESCRIPTION("HA-VMSI test: a compromised host kernel");
MODULE_LICENSE("GPL");
