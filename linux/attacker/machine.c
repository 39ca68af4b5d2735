// SPDX-License-Identifier: GPL-2.0
/*
 * A compromised host kernel, on the machine itself: device registers, DMA, and
 * CPUs that it turns on with code of its own.
 */
#include <linux/arm-smccc.h>
#include <linux/cpu.h>
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <uapi/linux/psci.h>

#include "attacker.h"

/* ---- Device registers ----------------------------------------------------- */

static long access_device(void *va, struct atk_io *io)
{
	u64 value64 = io->value;
	u32 value32 = io->value;
	u8 value8 = io->value;

	pagefault_disable();
	switch (io->width | io->write << 8) {
	case 1:
		__get_kernel_nofault(&value8, va, u8, fault);
		io->value = value8;
		break;
	case 4:
		__get_kernel_nofault(&value32, va, u32, fault);
		io->value = value32;
		break;
	case 8:
		__get_kernel_nofault(&value64, va, u64, fault);
		io->value = value64;
		break;
	case 1 | 1 << 8:
		__put_kernel_nofault(va, &value8, u8, fault);
		break;
	case 4 | 1 << 8:
		__put_kernel_nofault(va, &value32, u32, fault);
		break;
	case 8 | 1 << 8:
		__put_kernel_nofault(va, &value64, u64, fault);
		break;
	}
	dsb(sy);
	pagefault_enable();
	return 0;
fault:
	pagefault_enable();
	return -EFAULT;
}

long atk_io(struct atk_io *io)
{
	void __iomem *va;
	long ret;

	if ((io->width != 1 && io->width != 4 && io->width != 8) ||
	    io->pa & (io->width - 1) || io->pa >> 48 || io->write > 1)
		return -EINVAL;
	va = ioremap(io->pa & PAGE_MASK, PAGE_SIZE);
	if (!va)
		return -ENOMEM;
	ret = access_device((void __force *)va + (io->pa & ~PAGE_MASK), io);
	iounmap(va);
	return ret;
}

/* ---- DMA: QEMU's "edu" device (its docs/specs/edu.rst) -------------------- */

#define EDU_SOURCE	0x80
#define EDU_TARGET	0x88
#define EDU_COUNT	0x90
#define EDU_COMMAND	0x98
#define EDU_RUN		BIT(0)
#define EDU_TO_RAM	BIT(1)
#define EDU_BUFFER	0x40000

static int edu_copy(void __iomem *edu, phys_addr_t pa, size_t len, bool to_ram)
{
	int i;

	writeq(to_ram ? EDU_BUFFER : pa, edu + EDU_SOURCE);
	writeq(to_ram ? pa : EDU_BUFFER, edu + EDU_TARGET);
	writeq(len, edu + EDU_COUNT);
	writeq(EDU_RUN | (to_ram ? EDU_TO_RAM : 0), edu + EDU_COMMAND);
	for (i = 0; i < 2000; i++) {
		if (!(readq(edu + EDU_COMMAND) & EDU_RUN))
			return 0;
		usleep_range(1000, 2000);
	}
	return -ETIMEDOUT;
}

/*
 * The device's buffer is first filled from a page of ours. A read of memory that
 * the device can't reach leaves that there.
 */
static long dma(void __iomem *edu, struct atk_dma *d, u64 *page)
{
	phys_addr_t own = virt_to_phys(page);
	size_t len = sizeof(d->data);
	int ret;

	memcpy(page, d->data, len);
	ret = edu_copy(edu, own, len, false);
	if (!ret)
		ret = edu_copy(edu, d->pa, d->write ? sizeof(u64) : len, d->write);
	memset(page, 0xa5, len);
	if (!ret)
		ret = edu_copy(edu, own, len, true);
	memcpy(d->data, page, len);
	return ret;
}

long atk_dma(struct atk_dma *d)
{
	struct pci_dev *dev = pci_get_device(0x1234, 0x11e8, NULL);
	void __iomem *edu;
	void *page = (void *)get_zeroed_page(GFP_KERNEL);
	long ret = -ENODEV;

	if (!dev || !page)
		goto free;
	ret = pci_enable_device(dev);
	if (ret)
		goto free;
	pci_set_master(dev);
	edu = pci_iomap(dev, 0, 0);
	ret = edu ? dma(edu, d, page) : -ENOMEM;
	if (edu)
		pci_iounmap(dev, edu);
	pci_disable_device(dev);
free:
	free_page((unsigned long)page);
	pci_dev_put(dev);
	return ret;
}

/* ---- A CPU with code of ours ---------------------------------------------- */

/* What that code works on; the offsets are in the assembly. */
struct atk_context {
	u64 el;
	u64 pa;
	u64 marker;
	u64 read[8];
	u64 state;
	u64 esr;
};

/*
 * Entered with the MMU off, at whatever exception level the firmware chooses,
 * with x0 = the context. Reads 64 bytes, writes the last word of that page,
 * turns the CPU off.
 */
asm(
"	.pushsection .rodata, \"a\"\n"
"	.balign	4096\n"
"havmsi_cpu_code:\n"
"	mov	x19, x0\n"
"	mrs	x1, CurrentEL\n"
"	str	x1, [x19]\n"
"	adr	x2, 5f\n"
"	cmp	x1, #8\n"
"	b.eq	1f\n"
"	msr	vbar_el1, x2\n"
"	b	2f\n"
"1:	msr	vbar_el2, x2\n"
"2:	isb\n"
"	ldr	x3, [x19, #8]\n"
"	add	x4, x19, #24\n"
"	mov	x5, #8\n"
"3:	ldr	x6, [x3], #8\n"
"	str	x6, [x4], #8\n"
"	subs	x5, x5, #1\n"
"	b.ne	3b\n"
"	mov	x6, #1\n"
"	str	x6, [x19, #88]\n"
"	ldr	x3, [x19, #8]\n"
"	ldr	x6, [x19, #16]\n"
"	str	x6, [x3, #4088]\n"
"	dsb	sy\n"
"	mov	x6, #2\n"
"	str	x6, [x19, #88]\n"
"4:	dsb	sy\n"
"	movz	w0, #0x8400, lsl #16\n"
"	orr	w0, w0, #2\n"
"	smc	#0\n"
"	b	.\n"
"	.balign	2048\n"
"5:	.rept	16\n"
"	mrs	x6, esr_el1\n"
"	cmp	x1, #8\n"
"	b.ne	6f\n"
"	mrs	x6, esr_el2\n"
"6:	str	x6, [x19, #96]\n"
"	mov	x6, #3\n"
"	str	x6, [x19, #88]\n"
"	b	4b\n"
"	.balign	128\n"
"	.endr\n"
"	.popsection\n"
);
extern const char havmsi_cpu_code[];

/* The CPU that comes up has its MMU off. */
static void to_memory(void *p)
{
	void *end = p + PAGE_SIZE;

	for (; p < end; p += 16)
		asm volatile("dc civac, %0" :: "r" (p) : "memory");
	dsb(sy);
}

static u64 psci(u64 fn, u64 a1, u64 a2, u64 a3)
{
	struct arm_smccc_res res;

	arm_smccc_1_1_smc(fn, a1, a2, a3, &res);
	return res.a0;
}

long atk_cpu(struct atk_cpu *arg)
{
	void *code = (void *)__get_free_page(GFP_KERNEL);
	struct atk_context *ctx = (void *)get_zeroed_page(GFP_KERNEL);
	u64 mpidr;
	long ret = -EINVAL;
	int i;

	if (!code || !ctx || arg->cpu >= nr_cpu_ids || cpu_online(arg->cpu))
		goto free;
	/* On the virt machine, up to 8 CPUs: Aff0 is the number. */
	mpidr = arg->cpu;
	memcpy(code, havmsi_cpu_code, PAGE_SIZE);
	ctx->pa = arg->pa;
	ctx->marker = arg->marker;
	to_memory(code);
	to_memory(ctx);
	arg->status = psci(PSCI_0_2_FN64_CPU_ON, mpidr, virt_to_phys(code), virt_to_phys(ctx));
	ret = -ETIMEDOUT;
	for (i = 0; i < 1000 && arg->status == PSCI_RET_SUCCESS; i++) {
		usleep_range(1000, 2000);
		if (psci(PSCI_0_2_FN64_AFFINITY_INFO, mpidr, 0, 0) == PSCI_0_2_AFFINITY_LEVEL_OFF) {
			ret = 0;
			break;
		}
	}
	if (arg->status != PSCI_RET_SUCCESS)
		ret = 0;
	to_memory(ctx);
	arg->el = ctx->el >> 2;
	arg->state = ctx->state;
	arg->esr = ctx->esr;
	memcpy(arg->read, ctx->read, sizeof(arg->read));
	/* A CPU that did not end still runs in there. */
	if (ret == -ETIMEDOUT)
		return ret;
free:
	free_page((unsigned long)code);
	free_page((unsigned long)ctx);
	return ret;
}
