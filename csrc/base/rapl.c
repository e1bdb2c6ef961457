#include "base/rapl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_ZONES 64 /* looked for: packages come first, then whole-platform zones */

/* The first bytes of a file as text; false with errno. */
static bool read_at(int fd, char *text, size_t size)
{
    ssize_t got = pread(fd, text, size - 1, 0);
    if (got < 0) {
        return false;
    }
    text[got] = '\0';
    return true;
}

static int open_file(const char *root, int zone, const char *name)
{
    char path[512];
    int length = snprintf(path, sizeof path, "%s/intel-rapl:%d/%s", root, zone, name);
    if (length < 0 || (size_t)length >= sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    return open(path, O_RDONLY | O_CLOEXEC);
}

static bool read_file(const char *root, int zone, const char *name, char *text, size_t size)
{
    int fd = open_file(root, zone, name);
    bool ok = fd >= 0 && read_at(fd, text, size);
    int kept = errno;
    if (fd >= 0) {
        (void)close(fd);
    }
    errno = kept;
    return ok;
}

/* Digits, and then nothing but the end of the line. */
static bool parse(const char *text, uint64_t *out)
{
    char *end;
    if (text[0] < '0' || text[0] > '9') {
        return false;
    }
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    *out = value;
    return errno == 0 && (*end == '\n' || *end == '\0');
}

static bool read_counter(const qf_rapl_package *package, uint64_t *out)
{
    char text[32];
    return read_at(package->fd, text, sizeof text) && parse(text, out);
}

/* Adds zone `zone` if it is a package that can be read; false with a reason if it is one that cannot. */
static bool add_package(qf_rapl *self, const char *root, int zone, const char *name)
{
    qf_rapl_package package = {0};
    char text[32];
    uint64_t number;
    package.fd = open_file(root, zone, "energy_uj");
    if (package.fd < 0) {
        (void)snprintf(self->reason, sizeof self->reason, "intel-rapl:%d/energy_uj: %s%s", zone, strerror(errno),
                       errno == EACCES ? " (only root may read it)" : "");
        return false;
    }
    if (!read_file(root, zone, "max_energy_range_uj", text, sizeof text) || !parse(text, &package.range_uj) ||
        !read_counter(&package, &package.reading_uj)) {
        (void)snprintf(self->reason, sizeof self->reason, "intel-rapl:%d: no number in energy_uj or its range", zone);
        (void)close(package.fd);
        return false;
    }
    package.number = parse(name, &number) && number < 1024 ? (int32_t)number : zone;
    self->packages[self->num_packages++] = package;
    return true;
}

void qf_rapl_init(qf_rapl *self, const char *root)
{
    static const char prefix[] = "package-";
    *self = (qf_rapl){0};
    bool any = false;
    for (int zone = 0; zone < MAX_ZONES && self->num_packages < QF_RAPL_MAX_PACKAGES; zone++) {
        char name[32];
        if (!read_file(root, zone, "name", name, sizeof name)) {
            continue;
        }
        any = true;
        if (strncmp(name, prefix, sizeof prefix - 1) == 0) { /* not "psys", which holds the packages */
            (void)add_package(self, root, zone, name + sizeof prefix - 1);
        }
    }
    if (self->num_packages > 0) {
        self->reason[0] = '\0';
    } else if (!any) {
        (void)snprintf(self->reason, sizeof self->reason, "no processor energy counter: %s has no intel-rapl zone",
                       root);
    } else if (self->reason[0] == '\0') {
        (void)snprintf(self->reason, sizeof self->reason, "no intel-rapl zone under %s is a processor package", root);
    }
}

void qf_rapl_deinit(qf_rapl *self)
{
    for (int32_t i = 0; i < self->num_packages; i++) {
        (void)close(self->packages[i].fd);
    }
    self->num_packages = 0;
}

bool qf_rapl_read(qf_rapl *self, int32_t index, uint64_t *energy_uj)
{
    qf_rapl_package *package = &self->packages[index];
    uint64_t reading;
    if (!read_counter(package, &reading)) {
        return false;
    }
    uint64_t last = package->reading_uj;
    bool around = reading < last && last <= package->range_uj;
    package->total_uj += around ? package->range_uj - last + reading : reading >= last ? reading - last : 0;
    package->reading_uj = reading;
    *energy_uj = package->total_uj;
    return true;
}
