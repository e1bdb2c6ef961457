/* How much memory this process may still use. */
#ifndef QF_BASE_MEMORY_H
#define QF_BASE_MEMORY_H

#include <stdint.h>

/* What the kernel calls available, or what control groups leave of it: the less. At least one page. */
uint64_t qf_available_memory_bytes(void);

/* What the groups around the process leave it: limit less use, where page cache that can be dropped does not count
 * as used; UINT64_MAX without a limit. See qf_cgroup_walk for the arguments. */
uint64_t qf_cgroup_memory_left(const char *membership_file, const char *root);

#endif
