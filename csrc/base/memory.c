/* needs: base/cgroup.c */
#include "base/memory.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cgroup.h"

/* The number after `key` at the start of a line; 0 if there is none. */
static uint64_t number_after(const char *text, const char *key)
{
    size_t length = strlen(key);
    for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n' ? 1 : 0;
        if (strncmp(line, key, length) == 0) {
            return strtoull(line + length, NULL, 10);
        }
    }
    return 0;
}

static void take_least_left(void *arg, const char *folder, bool version2)
{
    uint64_t *least = arg;
    char text[8192];
    if (!qf_cgroup_read(folder, version2 ? "memory.max" : "memory.limit_in_bytes", text, sizeof text)) {
        return;
    }
    uint64_t limit = strtoull(text, NULL, 10); /* "max" reads as 0 */
    if (limit == 0 || limit >= (uint64_t)1 << 62) {
        return;
    }
    uint64_t used = 0;
    if (qf_cgroup_read(folder, version2 ? "memory.current" : "memory.usage_in_bytes", text, sizeof text)) {
        used = strtoull(text, NULL, 10);
    }
    if (qf_cgroup_read(folder, "memory.stat", text, sizeof text)) {
        uint64_t cache = number_after(text, version2 ? "inactive_file " : "total_inactive_file ");
        used -= cache < used ? cache : used;
    }
    uint64_t left = limit > used ? limit - used : 0;
    *least = left < *least ? left : *least;
}

uint64_t qf_cgroup_memory_left(const char *membership_file, const char *root)
{
    uint64_t least = UINT64_MAX;
    qf_cgroup_walk(membership_file, root, "memory", take_least_left, &least);
    return least;
}

uint64_t qf_available_memory_bytes(void)
{
    char text[4096];
    long page_bytes = sysconf(_SC_PAGESIZE);
    uint64_t page = page_bytes > 0 ? (uint64_t)page_bytes : 4096;
    uint64_t available = 0;
    if (qf_cgroup_read("/proc", "meminfo", text, sizeof text)) {
        available = number_after(text, "MemAvailable:") * 1024u;
    }
    if (available == 0) {
        long pages = sysconf(_SC_PHYS_PAGES);
        available = pages > 0 ? (uint64_t)pages * page : (uint64_t)1 << 30;
    }
    uint64_t left = qf_cgroup_memory_left("/proc/self/cgroup", "/sys/fs/cgroup");
    available = left < available ? left : available;
    return available > page ? available : page;
}
