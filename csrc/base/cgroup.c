#include "base/cgroup.h"

#include <stdio.h>
#include <string.h>

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

bool qf_cgroup_read(const char *folder, const char *name, char *text, size_t size)
{
    char path[2048];
    int length = snprintf(path, sizeof path, "%s/%s", folder, name);
    return length > 0 && (size_t)length < sizeof path && read_text(path, text, size);
}

/* `group` is what stands in the membership file: up to the end of its line. */
static void walk_up(const char *root, const char *group, bool version2, qf_cgroup_fn fn, void *arg)
{
    char folder[1536];
    size_t root_length = strlen(root);
    size_t length = strcspn(group, "\n");
    if (root_length + length >= sizeof folder) {
        length = 0;
    }
    memcpy(folder, root, root_length + 1);
    memcpy(folder + root_length, group, length);
    folder[root_length + length] = '\0';
    for (;;) {
        char *slash = strrchr(folder + root_length, '/');
        if (slash != NULL && slash[1] == '\0') { /* "/" is the root itself */
            *slash = '\0';
            continue;
        }
        fn(arg, folder, version2);
        if (slash == NULL) {
            return;
        }
        *slash = '\0';
    }
}

/* Whether the comma-separated list from `at` up to a colon names the controller. */
static bool lists(const char *at, const char *controller)
{
    size_t length = strlen(controller);
    for (;; at++) {
        if (strncmp(at, controller, length) == 0 && (at[length] == ',' || at[length] == ':')) {
            return true;
        }
        at += strcspn(at, ",:\n");
        if (*at != ',') {
            return false;
        }
    }
}

void qf_cgroup_walk(const char *membership_file, const char *root, const char *controller, qf_cgroup_fn fn, void *arg)
{
    char text[4096], folder[512];
    if (!read_text(membership_file, text, sizeof text)) {
        return;
    }
    /* Lines are "id:controllers:path": version 2 names no controllers. */
    for (const char *line = text; line != NULL && *line != '\0'; line = strchr(line, '\n')) {
        line += *line == '\n' ? 1 : 0;
        const char *controllers = strchr(line, ':');
        const char *path = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (path == NULL) {
            return;
        }
        bool version2 = path == controllers + 1;
        if (version2) {
            walk_up(root, path + 1, true, fn, arg);
        } else if (lists(controllers + 1, controller)) {
            (void)snprintf(folder, sizeof folder, "%s/%s", root, controller);
            walk_up(folder, path + 1, false, fn, arg);
        }
    }
}
