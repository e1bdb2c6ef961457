/* sources: base/rapl.c */
/* sanitizers: address */
/* Processor energy counters, over a folder that looks like Linux's. */
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rapl.h"
#include "check.h"

static void path_of(char *out, size_t size, const char *root, int zone, const char *file)
{
    (void)snprintf(out, size, "%s/intel-rapl:%d%s%s", root, zone, file[0] != '\0' ? "/" : "", file);
}

static void write_file(const char *root, int zone, const char *file, const char *text)
{
    char path[256];
    path_of(path, sizeof path, root, zone, "");
    (void)mkdir(path, 0700);
    path_of(path, sizeof path, root, zone, file);
    FILE *out = fopen(path, "w");
    CHECK(out != NULL);
    if (out != NULL) {
        (void)fputs(text, out);
        (void)fclose(out);
    }
}

static void add_zone(const char *root, int zone, const char *name, const char *energy)
{
    write_file(root, zone, "name", name);
    write_file(root, zone, "energy_uj", energy);
    write_file(root, zone, "max_energy_range_uj", "1000\n");
}

static void make_root(char *root, size_t size)
{
    (void)snprintf(root, size, "/tmp/qf_test_rapl_XXXXXX");
    CHECK(mkdtemp(root) != NULL);
}

static void remove_root(const char *root)
{
    static const char *const files[] = {"name", "energy_uj", "max_energy_range_uj", ""};
    for (int zone = 0; zone < 12; zone++) {
        for (int i = 0; i < 4; i++) {
            char path[256];
            path_of(path, sizeof path, root, zone, files[i]);
            (void)(files[i][0] != '\0' ? unlink(path) : rmdir(path));
        }
    }
    (void)rmdir(root);
}

static void test_packages_are_found_and_read(void)
{
    char root[64];
    make_root(root, sizeof root);
    add_zone(root, 0, "package-1\n", "400\n");
    add_zone(root, 1, "psys\n", "9\n"); /* the whole platform: packages again */
    add_zone(root, 2, "package-0\n", "0\n");
    qf_rapl rapl;
    qf_rapl_init(&rapl, root);
    CHECK_INT(rapl.num_packages, 2);
    CHECK_STRING(rapl.reason, "");
    CHECK_INT(rapl.packages[0].number, 1);
    CHECK_INT(rapl.packages[1].number, 0);
    uint64_t energy = 1;
    CHECK(qf_rapl_read(&rapl, 0, &energy));
    CHECK_INT(energy, 0); /* since it was opened */
    write_file(root, 0, "energy_uj", "950\n");
    CHECK(qf_rapl_read(&rapl, 0, &energy));
    CHECK_INT(energy, 550);
    write_file(root, 0, "energy_uj", "30\n"); /* came round */
    CHECK(qf_rapl_read(&rapl, 0, &energy));
    CHECK_INT(energy, 550 + 50 + 30);
    CHECK(qf_rapl_read(&rapl, 0, &energy));
    CHECK_INT(energy, 630);
    write_file(root, 0, "energy_uj", "nonsense\n");
    CHECK(!qf_rapl_read(&rapl, 0, &energy));
    CHECK(qf_rapl_read(&rapl, 1, &energy));
    qf_rapl_deinit(&rapl);
    remove_root(root);
}

static void check_reason(const char *root, const char *words)
{
    qf_rapl rapl;
    qf_rapl_init(&rapl, root);
    CHECK_INT(rapl.num_packages, 0);
    if (strstr(rapl.reason, words) == NULL) {
        CHECK_STRING(rapl.reason, words);
    }
    qf_rapl_deinit(&rapl);
}

static void test_reasons(void)
{
    char root[64];
    make_root(root, sizeof root);
    check_reason("/nowhere/at/all", "no processor energy counter: /nowhere/at/all has no intel-rapl zone");
    check_reason(root, "has no intel-rapl zone");
    add_zone(root, 0, "psys\n", "1\n");
    check_reason(root, "is a processor package");
    add_zone(root, 1, "package-0\n", "-5\n");
    check_reason(root, "intel-rapl:1: no number");
    add_zone(root, 1, "package-0\n", "5 and more\n");
    check_reason(root, "intel-rapl:1: no number");
    add_zone(root, 1, "package-0\n", "99999999999999999999\n");
    check_reason(root, "intel-rapl:1: no number");
    char path[256];
    path_of(path, sizeof path, root, 1, "energy_uj");
    (void)unlink(path);
    check_reason(root, "intel-rapl:1/energy_uj: No such file");
    remove_root(root);
}

static void test_what_may_not_be_read(void)
{
    char root[64], path[256];
    if (geteuid() == 0) {
        CHECK(true); /* root may read everything */
        return;
    }
    make_root(root, sizeof root);
    add_zone(root, 0, "package-0\n", "1\n");
    path_of(path, sizeof path, root, 0, "energy_uj");
    CHECK(chmod(path, 0) == 0);
    check_reason(root, "only root may read it");
    remove_root(root);
}

int main(void)
{
    RUN(test_packages_are_found_and_read);
    RUN(test_reasons);
    RUN(test_what_may_not_be_read);
    return check_report();
}
