// SPDX-License-Identifier: GPL-2.0-only
/*
 * The key of this VM, from the HA-VMSI monitor: 32 bytes that root reads in
 * /sys/firmware/havmsi/key. The kernel keeps no copy.
 */

#include <linux/arm-smccc.h>
#include <linux/init.h>
#include <linux/kobject.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/unaligned.h>

#include <asm/havmsi_abi.h>

#define KEY_SIZE 32

static bool get_key(u8 *key)
{
	for (unsigned long half = 0; half < 2; half++, key += KEY_SIZE / 2) {
		struct arm_smccc_res res;

		arm_smccc_1_1_invoke(HAVMSI_FN_GUEST_KEY, half, &res);
		if (res.a0 != SMCCC_RET_SUCCESS)
			return false;
		put_unaligned_le64(res.a1, key);
		put_unaligned_le64(res.a2, key + 8);
		memzero_explicit(&res, sizeof(res));
	}
	return true;
}

static ssize_t key_read(struct file *file, struct kobject *kobj,
			struct bin_attribute *attr, char *to, loff_t from,
			size_t count)
{
	u8 key[KEY_SIZE];
	ssize_t ret = -EIO;

	if (get_key(key))
		ret = memory_read_from_buffer(to, count, &from, key, sizeof(key));
	memzero_explicit(key, sizeof(key));
	return ret;
}

static BIN_ATTR(key, 0400, key_read, NULL, KEY_SIZE);

/*
 * The call's number is in a range where each platform has its own: the monitor
 * has to be there, which its random number service tells.
 */
static bool on_monitor(void)
{
	struct arm_smccc_res res;

	if (arm_smccc_get_version() < ARM_SMCCC_VERSION_1_1)
		return false;
	arm_smccc_1_1_invoke(ARM_SMCCC_TRNG_GET_UUID, &res);
	return lower_32_bits(res.a0) == HAVMSI_UID_0 &&
	       lower_32_bits(res.a1) == HAVMSI_UID_1 &&
	       lower_32_bits(res.a2) == HAVMSI_UID_2 &&
	       lower_32_bits(res.a3) == HAVMSI_UID_3;
}

static int __init havmsi_guest_init(void)
{
	u8 key[KEY_SIZE];
	bool has_key = on_monitor() && get_key(key);
	struct kobject *dir;
	int ret;

	memzero_explicit(key, sizeof(key));
	if (!has_key)
		return 0;
	dir = kobject_create_and_add("havmsi", firmware_kobj);
	if (!dir)
		return -ENOMEM;
	ret = sysfs_create_bin_file(dir, &bin_attr_key);
	if (ret)
		kobject_put(dir);
	return ret;
}
device_initcall(havmsi_guest_init);
