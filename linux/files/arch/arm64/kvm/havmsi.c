// SPDX-License-Identifier: GPL-2.0
/*
 * HA-VMSI: KVM without EL2. A security monitor at EL3 owns EL2 and all stage-2
 * tables; what KVM's EL2 half does elsewhere is asked for by SMC here.
 *
 * This file: finding the monitor, the life of VMs and vCPUs.
 *
 * Nothing in here is trusted by the monitor or by a guest. What this code gets
 * wrong costs availability, nothing else.
 */
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/kvm_host.h>
#include <linux/of_fdt.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/syscore_ops.h>

#include <kvm/arm_arch_timer.h>
#include <kvm/arm_vgic.h>

#include <asm/kvm_emulate.h>
#include <asm/kvm_mmu.h>

#include "havmsi.h"

/* How often a call is repeated while a vCPU of the VM still runs. */
#define BUSY_TRIES	20000

bool havmsi_present __ro_after_init;

static u64 havmsi_ich_vtr __ro_after_init;
static u32 havmsi_ipa_bits __ro_after_init;
/* The system goes down: no vCPU enters any more. */
static bool havmsi_down;

/* ---- calls ---- */

long havmsi_call(u64 fn, u64 a1, u64 a2, u64 a3, u64 a4,
		 struct arm_smccc_1_2_regs *res)
{
	struct arm_smccc_1_2_regs regs = {
		.a0 = fn, .a1 = a1, .a2 = a2, .a3 = a3, .a4 = a4,
	};

	arm_smccc_1_2_smc(&regs, &regs);
	if (res)
		*res = regs;
	return (long)regs.a0;
}

int havmsi_errno(long status)
{
	switch (status) {
	case HAVMSI_SUCCESS:
		return 0;
	case HAVMSI_ERR_NOT_SUPPORTED:
		return -EOPNOTSUPP;
	case HAVMSI_ERR_DENIED:
		return -EPERM;
	case HAVMSI_ERR_NOMEM:
		return -ENOSPC;
	case HAVMSI_ERR_BUSY:
		return -EBUSY;
	case HAVMSI_ERR_AGAIN:
		return -EAGAIN;
	case HAVMSI_ERR_STATE:
		return -ENXIO;
	case HAVMSI_ERR_INTEGRITY:
		return -EIO;
	default:
		return -EINVAL;
	}
}

int havmsi_vm_call(struct havmsi_vm *hv, struct arm_smccc_1_2_regs *regs,
		   struct arm_smccc_1_2_regs *res)
{
	struct arm_smccc_1_2_regs out;
	int ret;

	for (;;) {
		arm_smccc_1_2_smc(regs, &out);
		switch ((long)out.a0) {
		case HAVMSI_ERR_NOMEM:
			/* No pages wanted: something else ran out. */
			if (!out.a1)
				return -ENOSPC;
			ret = havmsi_pool_donate(hv, out.a1);
			if (ret)
				return ret;
			continue;
		case HAVMSI_ERR_AGAIN:
			cond_resched();
			continue;
		}
		if (res)
			*res = out;
		return havmsi_errno((long)out.a0);
	}
}

/* ---- probe ---- */

/*
 * An SMC where nobody handles it is undefined, so look at the tree first: a
 * monitor is the machine's PSCI firmware.
 */
static bool __init psci_by_smc(void)
{
	unsigned long root = of_get_flat_dt_root();
	const char *method;
	int node, len;

	node = of_get_flat_dt_subnode_by_name(root, "psci");
	if (node < 0)
		return false;
	method = of_get_flat_dt_prop(node, "method", &len);
	return method && len >= 4 && !strncmp(method, "smc", 4);
}

static bool __init monitor_answers(void)
{
	struct arm_smccc_1_2_regs res;

	/* Booted at EL2: there is no monitor that keeps EL2 to itself. */
	if (__boot_cpu_mode[1] == BOOT_CPU_MODE_EL2 || is_kernel_in_hyp_mode())
		return false;
	if (!psci_by_smc())
		return false;
	havmsi_call(HAVMSI_FN_UID, 0, 0, 0, 0, &res);
	return (u32)res.a0 == HAVMSI_UID_0 && (u32)res.a1 == HAVMSI_UID_1 &&
	       (u32)res.a2 == HAVMSI_UID_2 && (u32)res.a3 == HAVMSI_UID_3;
}

/* From the command line's kvm-arm.mode=havmsi, on the boot CPU. */
bool __init havmsi_probe(void)
{
	struct arm_smccc_1_2_regs res;
	long status;

	if (is_kernel_in_hyp_mode() || __boot_cpu_mode[1] == BOOT_CPU_MODE_EL2) {
		pr_err("havmsi: the kernel was started at EL2, so no HA-VMSI monitor holds it; ignoring kvm-arm.mode=havmsi\n");
		return false;
	}
	if (!monitor_answers()) {
		pr_err("havmsi: no HA-VMSI monitor at EL3 answers; ignoring kvm-arm.mode=havmsi\n");
		return false;
	}
	status = havmsi_call(HAVMSI_FN_VERSION, 0, 0, 0, 0, &res);
	if (status || res.a1 >> 16 != HAVMSI_VERSION_MAJOR) {
		pr_err("havmsi: the monitor speaks version %lu.%lu of its interface, this kernel %u.%u; ignoring kvm-arm.mode=havmsi\n",
		       res.a1 >> 16, res.a1 & 0xffff,
		       HAVMSI_VERSION_MAJOR, HAVMSI_VERSION_MINOR);
		return false;
	}
	status = havmsi_call(HAVMSI_FN_CPU_INFO, 0, 0, 0, 0, &res);
	if (status) {
		pr_err("havmsi: the monitor's CPU_INFO failed (%ld); ignoring kvm-arm.mode=havmsi\n",
		       status);
		return false;
	}
	havmsi_ich_vtr = res.a1;
	havmsi_ipa_bits = res.a3;
	havmsi_present = true;
	return true;
}

/* /sys/kernel/debug/havmsi_stats: what the monitor counts, then what this kernel does. */
static int havmsi_stats_show(struct seq_file *m, void *unused)
{
	struct arm_smccc_1_2_regs res;
	long status = havmsi_call(HAVMSI_FN_STATS, 0, 0, 0, 0, &res);

	if (status)
		return havmsi_errno(status);
	seq_printf(m, "vms %lu\nvcpus %lu\nprivate_pages %lu\npool_pages %lu\nshared_pages %lu\nhost_pages %lu\n",
		   res.a1, res.a2, res.a3, res.a4, res.a6, res.a5);
	seq_printf(m, "pages_sealed %lld\npages_unsealed %lld\nintegrity_failures %lld\npage_calls %lld\n",
		   atomic64_read(&havmsi_sealed), atomic64_read(&havmsi_unsealed),
		   atomic64_read(&havmsi_refused), atomic64_read(&havmsi_calls));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(havmsi_stats);

static int __init havmsi_late_init(void)
{
	if (havmsi_present)
		debugfs_create_file("havmsi_stats", 0444, NULL, NULL,
				    &havmsi_stats_fops);
	else if (kvm_get_mode() != KVM_MODE_NONE && monitor_answers())
		pr_info("havmsi: a HA-VMSI monitor is below this kernel: boot with kvm-arm.mode=havmsi to use KVM\n");
	return 0;
}
late_initcall(havmsi_late_init);

static long host_reset(void)
{
	long status;
	int tries = 0;

	do {
		status = havmsi_call(HAVMSI_FN_HOST_RESET, 0, 0, 0, 0, NULL);
		if (status == HAVMSI_ERR_BUSY)
			udelay(50);
	} while (status == HAVMSI_ERR_AGAIN ||
		 (status == HAVMSI_ERR_BUSY && ++tries < BUSY_TRIES));
	return status;
}

static void kick(void *unused)
{
}

/* Reboot, kexec, power off: the next kernel finds all of RAM its own. */
static void havmsi_shutdown(void)
{
	long status;

	WRITE_ONCE(havmsi_down, true);
	on_each_cpu(kick, NULL, 1);
	status = host_reset();
	if (status)
		pr_err("havmsi: HOST_RESET failed (%ld)\n", status);
}

static struct syscore_ops havmsi_syscore_ops = {
	.shutdown = havmsi_shutdown,
};

int __init havmsi_init(void)
{
	long status = host_reset();

	if (status) {
		pr_err("havmsi: HOST_RESET failed (%ld)\n", status);
		return -EIO;
	}
	register_syscore_ops(&havmsi_syscore_ops);
	kvm_info("HA-VMSI mode: VMs are protected by the monitor at EL3\n");
	return 0;
}

bool havmsi_warn_hyp_call(const char *call)
{
	return WARN_ONCE(1, "havmsi: %s was called, but there is no EL2\n", call);
}

/* ICH_VTR_EL2 or GICH_VTR; the run page has room for 16 list registers. */
u64 havmsi_vgic_config(void)
{
	u64 last = min(havmsi_ich_vtr & 0x3f, HAVMSI_MAX_LRS - 1);

	return (havmsi_ich_vtr & U32_MAX & ~0x3fULL) | last;
}

u32 havmsi_ipa_limit(u32 host_limit)
{
	return min(host_limit, havmsi_ipa_bits);
}

/* ---- what user space may have ---- */

/* What a protected VM can keep; all else is hidden. */
bool havmsi_cap_allowed(long cap)
{
	switch (cap) {
	case KVM_CAP_ARM_IRQ_LINE_LAYOUT_2:
	case KVM_CAP_ARM_PSCI:
	case KVM_CAP_ARM_PSCI_0_2:
	case KVM_CAP_ARM_SET_DEVICE_ADDR:
	case KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES:
	case KVM_CAP_ARM_VM_IPA_SIZE:
	case KVM_CAP_BINARY_STATS_FD:
	case KVM_CAP_CHECK_EXTENSION_VM:
	case KVM_CAP_COALESCED_MMIO:
	case KVM_CAP_DESTROY_MEMORY_REGION_WORKS:
	case KVM_CAP_DEVICE_CTRL:
	case KVM_CAP_ENABLE_CAP_VM:
	case KVM_CAP_HALT_POLL:
	case KVM_CAP_IMMEDIATE_EXIT:
	case KVM_CAP_INTERNAL_ERROR_DATA:
	case KVM_CAP_IOEVENTFD:
	case KVM_CAP_IOEVENTFD_ANY_LENGTH:
	case KVM_CAP_IRQCHIP:
	case KVM_CAP_IRQFD:
	case KVM_CAP_IRQFD_RESAMPLE:
	case KVM_CAP_IRQ_ROUTING:
	case KVM_CAP_JOIN_MEMORY_REGIONS_WORKS:
	case KVM_CAP_MAX_VCPUS:
	case KVM_CAP_MAX_VCPU_ID:
	case KVM_CAP_MP_STATE:
	case KVM_CAP_NR_MEMSLOTS:
	case KVM_CAP_NR_VCPUS:
	case KVM_CAP_ONE_REG:
	case KVM_CAP_SYNC_MMU:
	case KVM_CAP_SYSTEM_EVENT_DATA:
	case KVM_CAP_USER_MEMORY:
	case KVM_CAP_USER_MEMORY2:
	case KVM_CAP_VCPU_ATTRIBUTES:
		return true;
	default:
		return false;
	}
}

unsigned long havmsi_vcpu_features(unsigned long features)
{
	return features & (BIT(KVM_ARM_VCPU_POWER_OFF) |
			   BIT(KVM_ARM_VCPU_PSCI_0_2));
}

/* After the launch the registers are the guest's: writes have no effect. */
bool havmsi_vm_sealed(struct kvm *kvm)
{
	return READ_ONCE(kvm->arch.havmsi->launched);
}

/* ---- VMs ---- */

int havmsi_vm_init(struct kvm *kvm)
{
	struct havmsi_vm *hv = kzalloc(sizeof(*hv), GFP_KERNEL_ACCOUNT);

	if (!hv)
		return -ENOMEM;
	hv->kvm = kvm;
	init_rwsem(&hv->lock);
	mutex_init(&hv->pool_lock);
	INIT_LIST_HEAD(&hv->pool);
	xa_init(&hv->pages);
	xa_init(&hv->tags);
	kvm->arch.havmsi = hv;
	/* The counter's offset is the monitor's: keep everybody else off it. */
	set_bit(KVM_ARCH_FLAG_VM_COUNTER_OFFSET, &kvm->arch.flags);
	return 0;
}

static u64 gic_model(struct kvm *kvm)
{
	if (!irqchip_in_kernel(kvm))
		return 0;
	return kvm->arch.vgic.vgic_model == KVM_DEV_TYPE_ARM_VGIC_V3 ? 3 : 2;
}

/* Before the first run of each vCPU, before its timer is loaded. */
int havmsi_vm_create(struct kvm *kvm)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	struct arm_smccc_1_2_regs res;
	struct kvm_vcpu *vcpu;
	unsigned long i;
	u64 vcpus = 0;
	int ret = 0;
	long status;

	down_write(&hv->lock);
	if (hv->handle)
		goto out;

	kvm_for_each_vcpu(i, vcpu, kvm)
		vcpus = max_t(u64, vcpus, vcpu->vcpu_id + 1);
	status = havmsi_call(HAVMSI_FN_VM_CREATE, vcpus, gic_model(kvm),
			     kvm_phys_shift(&kvm->arch.mmu), 0, &res);
	if (status) {
		kvm_err("HA-VMSI: VM_CREATE for %llu vCPUs failed (%ld)%s\n",
			vcpus, status, status == HAVMSI_ERR_NOMEM ?
			": too many VMs" : status == HAVMSI_ERR_NOT_SUPPORTED ?
			": the monitor got no seed for random numbers" : "");
		ret = havmsi_errno(status);
		goto out;
	}
	/* The physical counter has no offset; nobody has looked at the virtual one yet. */
	kvm->arch.timer_data.voffset = res.a2;
	kvm->arch.timer_data.poffset = 0;
	WRITE_ONCE(hv->handle, res.a1);
out:
	up_write(&hv->lock);
	return ret;
}

static int vcpu_create(struct havmsi_vm *hv, struct kvm_vcpu *vcpu)
{
	struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;
	struct arm_smccc_1_2_regs regs;
	int ret;

	if (!hvcpu) {
		hvcpu = kzalloc(sizeof(*hvcpu), GFP_KERNEL_ACCOUNT);
		if (!hvcpu)
			return -ENOMEM;
		hvcpu->run = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
		if (!hvcpu->run) {
			kfree(hvcpu);
			return -ENOMEM;
		}
		vcpu->arch.havmsi = hvcpu;
	}
	hvcpu->exit_class = HAVMSI_EXIT_IRQ;
	if (hvcpu->created)
		return 0;

	regs = (struct arm_smccc_1_2_regs) {
		.a0 = HAVMSI_FN_VCPU_CREATE, .a1 = hv->handle,
		.a2 = vcpu->vcpu_id, .a3 = virt_to_phys(hvcpu->run),
	};
	ret = havmsi_vm_call(hv, &regs, NULL);
	if (ret)
		return ret;
	hvcpu->handle = hv->handle;
	hvcpu->created = true;
	return 0;
}

static int set_boot(struct havmsi_vm *hv, struct kvm_vcpu *vcpu)
{
	struct arm_smccc_1_2_regs regs = {
		.a0 = HAVMSI_FN_VCPU_SET_BOOT, .a1 = hv->handle,
		.a2 = vcpu->vcpu_id, .a3 = *vcpu_pc(vcpu),
		.a4 = vcpu_get_reg(vcpu, 0), .a5 = vcpu_get_reg(vcpu, 1),
		.a6 = vcpu_get_reg(vcpu, 2), .a7 = vcpu_get_reg(vcpu, 3),
	};

	if (kvm_arm_vcpu_stopped(vcpu))
		return 0;
	return havmsi_vm_call(hv, &regs, NULL);
}

static int launch(struct havmsi_vm *hv)
{
	struct arm_smccc_1_2_regs regs, res;
	struct kvm *kvm = hv->kvm;
	struct kvm_vcpu *vcpu;
	const char *step;
	unsigned long i;
	__le64 digest[4];
	int ret;

	BUILD_BUG_ON(sizeof(digest) != HAVMSI_DIGEST_SIZE);

	step = "declaring RAM";
	ret = havmsi_declare_ram(hv);
	if (ret)
		goto fail;
	step = "creating vCPUs";
	kvm_for_each_vcpu(i, vcpu, kvm) {
		ret = vcpu_create(hv, vcpu);
		if (!ret)
			ret = set_boot(hv, vcpu);
		if (ret)
			goto fail;
	}
	step = "mapping the GICv2 CPU interface";
	ret = havmsi_map_devices(hv);
	if (ret)
		goto fail;
	step = "handing over the image";
	ret = havmsi_populate(hv);
	if (ret)
		goto fail;
	step = "activation";
	regs = (struct arm_smccc_1_2_regs) {
		.a0 = HAVMSI_FN_VM_ACTIVATE, .a1 = hv->handle,
	};
	ret = havmsi_vm_call(hv, &regs, &res);
	if (ret)
		goto fail;

	digest[0] = cpu_to_le64(res.a1);
	digest[1] = cpu_to_le64(res.a2);
	digest[2] = cpu_to_le64(res.a3);
	digest[3] = cpu_to_le64(res.a4);
	memcpy(hv->digest, digest, sizeof(digest));
	hv->launches++;
	kvm_info("HA-VMSI VM %llu launched, digest (as the monitor told the host) %*phN\n",
		 hv->handle & 0xffff, (int)sizeof(digest), digest);
	return 0;
fail:
	if (ret != -EINTR)
		kvm_err("HA-VMSI VM %llu: launch failed (%d) at %s\n",
			hv->handle & 0xffff, ret, step);
	return ret;
}

/* Give all private pages back; the launch is open again. hv->lock is held. */
static int reset(struct havmsi_vm *hv, u64 fn)
{
	struct kvm_vcpu *vcpu;
	unsigned long i;
	int tries = 0;
	long status;

	for (;;) {
		status = havmsi_call(fn, hv->handle, 0, 0, 0, NULL);
		if (status == HAVMSI_ERR_AGAIN) {
			cond_resched();
			continue;
		}
		if (status != HAVMSI_ERR_BUSY || ++tries > BUSY_TRIES)
			break;
		/* A vCPU is still in the guest, or on its way out. */
		kvm_for_each_vcpu(i, vcpu, hv->kvm)
			kvm_vcpu_kick(vcpu);
		usleep_range(20, 100);
	}
	if (status) {
		kvm_err("HA-VMSI VM %llu: %s failed (%ld)\n", hv->handle & 0xffff,
			fn == HAVMSI_FN_VM_RESET ? "VM_RESET" : "VM_DESTROY", status);
		return havmsi_errno(status);
	}
	/* Device pages were unmapped along with the rest. */
	for (i = 0; i < hv->nr_dev; i++)
		hv->dev[i].mapped = false;
	kvm_for_each_vcpu(i, vcpu, hv->kvm) {
		if (vcpu->arch.havmsi)
			vcpu->arch.havmsi->moving = NULL;
	}
	havmsi_forget_pages(hv);
	return 0;
}

/*
 * The guest is reset: its memory comes back to the VMM (wiped), which then
 * prepares the next launch. Does nothing before a launch.
 */
int havmsi_vm_reset(struct kvm *kvm)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	int ret = 0;

	down_write(&hv->lock);
	if (hv->launched) {
		/* Who enters now finds the launch to do and waits for the lock. */
		WRITE_ONCE(hv->launched, false);
		ret = reset(hv, HAVMSI_FN_VM_RESET);
		if (ret)
			WRITE_ONCE(hv->launched, true);
	}
	up_write(&hv->lock);
	return ret;
}

/* In the run loop, before each entry: 1 if the guest may be entered. */
int havmsi_vcpu_prepare(struct kvm_vcpu *vcpu)
{
	struct kvm *kvm = vcpu->kvm;
	struct havmsi_vm *hv = kvm->arch.havmsi;
	int ret = 1;

	if (unlikely(READ_ONCE(havmsi_down)))
		return -EIO;
	/*
	 * Who is stopped, or was asked to stop, gets no further than this anyway.
	 * It must not launch what the VMM is still preparing.
	 */
	if (likely(READ_ONCE(hv->launched)) ||
	    kvm_request_pending(vcpu) || kvm_arm_vcpu_stopped(vcpu))
		return 1;

	mutex_lock(&kvm->slots_lock);
	down_write(&hv->lock);
	if (!hv->handle) {
		ret = -EIO;
	} else if (!hv->launched) {
		ret = launch(hv);
		if (ret)
			reset(hv, HAVMSI_FN_VM_RESET);
		else
			WRITE_ONCE(hv->launched, true);
		ret = ret ?: 1;
	}
	up_write(&hv->lock);
	mutex_unlock(&kvm->slots_lock);
	return ret;
}

/* The last user of the VM's address space is gone: nothing runs any more. */
void havmsi_vm_teardown(struct kvm *kvm)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;

	if (!hv)
		return;
	down_write(&hv->lock);
	if (hv->handle && !reset(hv, HAVMSI_FN_VM_DESTROY)) {
		WRITE_ONCE(hv->launched, false);
		WRITE_ONCE(hv->handle, 0);
		havmsi_pool_free(hv);
	} else if (hv->handle) {
		/* Its pages are about to be freed. */
		write_lock(&kvm->mmu_lock);
		havmsi_unmap_range(kvm, 0, ~0ULL, true);
		write_unlock(&kvm->mmu_lock);
	}
	up_write(&hv->lock);
}

void havmsi_vm_free(struct kvm *kvm)
{
	struct havmsi_vm *hv = kvm->arch.havmsi;
	struct kvm_vcpu *vcpu;
	unsigned long i;

	if (!hv)
		return;
	havmsi_vm_teardown(kvm);
	if (WARN_ON_ONCE(hv->handle))
		return;		/* The monitor still has it all: leak it. */
	kvm_for_each_vcpu(i, vcpu, kvm) {
		struct havmsi_vcpu *hvcpu = vcpu->arch.havmsi;

		vcpu->arch.havmsi = NULL;
		if (hvcpu) {
			free_page((unsigned long)hvcpu->run);
			kfree(hvcpu);
		}
	}
	havmsi_forget_pages(hv);
	kvm->arch.havmsi = NULL;
	kfree(hv);
}

/*
 * CNTVOFF_EL2, so that the host sees the guest's virtual counter while that
 * vCPU is loaded: 0, or what the running vCPU's VM was given by the monitor.
 */
void havmsi_timer_load(u64 cntvoff)
{
	struct kvm_vcpu *vcpu = kvm_get_running_vcpu();
	struct arm_smccc_res res;
	u64 handle = 0;

	if (cntvoff && vcpu)
		handle = READ_ONCE(vcpu->kvm->arch.havmsi->handle);
	arm_smccc_1_1_smc(HAVMSI_FN_TIMER_LOAD, handle, &res);
	WARN_ON_ONCE(res.a0);
}
