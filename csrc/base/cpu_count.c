/* How many CPUs this process may use. */
/* needs: base/cgroup.c */
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "base/cgroup.h"
#include "base/threads.h"

/* One group's quota in CPUs, rounded up; 0 if there is none ("max" or -1) or no such file. */
static int64_t read_quota(const char *folder, bool version2)
{
    char text[64], period_text[64];
    if (!qf_cgroup_read(folder, version2 ? "cpu.max" : "cpu.cfs_quota_us", text, sizeof text)) {
        return 0;
    }
    char *period_at; /* version 2 has both numbers in one line */
    int64_t quota = strtoll(text, &period_at, 10);
    if (!version2) {
        period_at = qf_cgroup_read(folder, "cpu.cfs_period_us", period_text, sizeof period_text) ? period_text
                                                                                               : period_at;
    }
    int64_t period = strtoll(period_at, NULL, 10);
    return quota > 0 && period > 0 ? (quota - 1) / period + 1 : 0;
}

static void take_least_quota(void *arg, const char *folder, bool version2)
{
    int64_t *least = arg;
    int64_t quota = read_quota(folder, version2);
    *least = quota > 0 && (*least == 0 || quota < *least) ? quota : *least;
}

int32_t qf_cgroup_cpu_limit(const char *membership_file, const char *root)
{
    int64_t limit = 0;
    qf_cgroup_walk(membership_file, root, "cpu", take_least_quota, &limit);
    return limit < INT32_MAX ? (int32_t)limit : INT32_MAX;
}

int32_t qf_cpu_count(void)
{
    long count = sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
    /* The system call, unlike the library's, takes a mask of any size and says how much of it the kernel filled. */
    enum { MAX_CPUS = 1 << 16 };
    unsigned long mask[MAX_CPUS / (8 * sizeof(unsigned long))];
    long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask);
    if (bytes > 0) {
        count = 0;
        for (size_t i = 0; i < (size_t)bytes / sizeof mask[0]; i++) {
            count += __builtin_popcountl(mask[i]);
        }
    }
#endif
    int32_t limit = qf_cgroup_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup");
    if (limit > 0 && limit < count) {
        count = limit;
    }
    return count < 1 ? 1 : (int32_t)count;
}
