/* SPDX-License-Identifier: GPL-2.0 */
/* What the module's files share. */
#ifndef ATTACKER_H
#define ATTACKER_H

#include "havmsi_attacker.h"

long atk_io(struct atk_io *io);
long atk_dma(struct atk_dma *d);
long atk_cpu(struct atk_cpu *arg);
long atk_watch(struct atk_watch *w);

#endif
