/* The control groups (version 1 or 2) that a process is in. */
#ifndef QF_BASE_CGROUP_H
#define QF_BASE_CGROUP_H

#include <stdbool.h>
#include <stddef.h>

/* `folder` is a group that limits `controller`: the process's own, then each one around it. */
typedef void (*qf_cgroup_fn)(void *arg, const char *folder, bool version2);

/* membership_file is /proc/self/cgroup, root /sys/fs/cgroup; a test passes its own. In a container the paths may be
 * those of the host and not exist here: then only the root, which is the container's own group, can be read. */
void qf_cgroup_walk(const char *membership_file, const char *root, const char *controller, qf_cgroup_fn fn, void *arg);

/* Reads the start of folder/name as text; false if it cannot be read or is empty. */
bool qf_cgroup_read(const char *folder, const char *name, char *text, size_t size);

#endif
