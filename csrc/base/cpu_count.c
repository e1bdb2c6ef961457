/* How many CPUs this process may use. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "base/threads.h"

/* Reads the start of a small text file; false if it cannot be read. */
static bool read_text(const char *path, char *text, size_t size)
{
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return false;
    }
    size_t got = fread(text, 1, size - 1, file);
    text[got] = '\0';
    (void)fclose(file);
    return got > 0;
}

/* One group's quota in CPUs, rounded up; 0 if there is none ("max" or -1) or no such file. */
static int64_t read_quota(const char *root, const char *group, bool version2)
{
    char path[2048], text[64], period_text[64];
    (void)snprintf(path, sizeof path, "%s%s/%s", root, group, version2 ? "cpu.max" : "cpu.cfs_quota_us");
    if (!read_text(path, text, sizeof text)) {
        return 0;
    }
    char *period_at; /* version 2 has both numbers in one line */
    int64_t quota = strtoll(text, &period_at, 10);
    if (!version2) {
        (void)snprintf(path, sizeof path, "%s%s/cpu.cfs_period_us", root, group);
        period_at = read_text(path, period_text, sizeof period_text) ? period_text : period_at;
    }
    int64_t period = strtoll(period_at, NULL, 10);
    return quota > 0 && period > 0 ? (quota - 1) / period + 1 : 0;
}

/* The least quota of a group and of those around it. In a container the path may be that of the host and not exist
 * here: then only the root, which is the container's own group, is found. */
static int64_t least_quota(const char *root, const char *membership, bool version2)
{
    char group[512];
    size_t length = strcspn(membership, "\n");
    length = length < sizeof group ? length : sizeof group - 1;
    memcpy(group, membership, length);
    group[length] = '\0';
    int64_t least = 0;
    for (;;) {
        char *slash = strrchr(group, '/');
        if (slash != NULL && slash[1] == '\0') { /* "/" is the root itself */
            *slash = '\0';
            continue;
        }
        int64_t quota = read_quota(root, group, version2);
        least = quota > 0 && (least == 0 || quota < least) ? quota : least;
        if (slash == NULL) {
            return least;
        }
        *slash = '\0';
    }
}

int32_t qf_cgroup_cpu_limit(const char *membership_file, const char *root)
{
    char text[4096] = "", cpu_root[512];
    int64_t limit = 0;
    (void)read_text(membership_file, text, sizeof text);
    /* Lines are "id:controllers:path": version 2 has the id 0 and no controllers, version 1 lists "cpu". */
    for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n' ? 1 : 0;
        const char *controllers = strchr(line, ':');
        const char *path = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (path == NULL) {
            break;
        }
        bool version2 = path == controllers + 1;
        bool cpu = false;
        for (const char *at = controllers; at < path && !cpu; at += 1 + strcspn(at + 1, ",:\n")) {
            cpu = strncmp(at + 1, "cpu", 3) == 0 && (at[4] == ',' || at[4] == ':');
        }
        if (version2 || cpu) {
            (void)snprintf(cpu_root, sizeof cpu_root, "%s%s", root, version2 ? "" : "/cpu");
            int64_t quota = least_quota(cpu_root, path + 1, version2);
            limit = quota > 0 && (limit == 0 || quota < limit) ? quota : limit;
        }
    }
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
