/* sources: base/memory.c base/status.c */
/* sanitizers: address */
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/memory.h"
#include "check.h"

static void write_text(const char *folder, const char *name, const char *text)
{
    char path[512];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    CHECK(file != NULL);
    if (file != NULL) {
        (void)fputs(text, file);
        (void)fclose(file);
    }
}

static void make_folder(char *path, size_t size, const char *parent, const char *name)
{
    (void)snprintf(path, size, "%s/%s", parent, name);
    CHECK(mkdir(path, 0700) == 0);
}

static void test_groups(void)
{
    char root[] = "/tmp/qf_test_memory_XXXXXX";
    char inner[128], v1[128], membership[128];
    CHECK(mkdtemp(root) != NULL);
    (void)snprintf(membership, sizeof membership, "%s/membership", root);
    write_text(root, "membership", "5:cpu,memory:/\n0::/job/step\n");
    CHECK(qf_cgroup_memory_left(membership, root) == UINT64_MAX);

    make_folder(inner, sizeof inner, root, "job");
    write_text(inner, "memory.max", "1000000\n");
    write_text(inner, "memory.current", "900000\n");
    CHECK_INT((long long)qf_cgroup_memory_left(membership, root), 100000);
    write_text(inner, "memory.stat", "anon 1\ninactive_file 700000\nactive_file 5\n"); /* can be dropped */
    CHECK_INT((long long)qf_cgroup_memory_left(membership, root), 800000);
    write_text(inner, "memory.current", "2000000\n"); /* beyond the limit: nothing is left */
    CHECK_INT((long long)qf_cgroup_memory_left(membership, root), 0);
    write_text(inner, "memory.max", "max\n");
    CHECK(qf_cgroup_memory_left(membership, root) == UINT64_MAX);

    make_folder(v1, sizeof v1, root, "memory");
    write_text(v1, "memory.limit_in_bytes", "5000\n");
    write_text(v1, "memory.usage_in_bytes", "2000\n");
    CHECK_INT((long long)qf_cgroup_memory_left(membership, root), 3000);

    char command[160];
    (void)snprintf(command, sizeof command, "rm -r '%s'", root);
    CHECK(system(command) == 0);
    CHECK(qf_cgroup_memory_left(membership, root) == UINT64_MAX);
}

static void test_this_machine(void)
{
    CHECK(qf_available_memory_bytes() >= 4096);
    CHECK(qf_available_memory_bytes() < (uint64_t)1 << 50);
}

int main(void)
{
    RUN(test_groups);
    RUN(test_this_machine);
    return check_report();
}
