/* Files of a checkpoint directory: whole text files, and safetensors mapped into memory. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/alloc.h"
#include "model/fields.h"
#include "model/safetensors.h"

#define MAX_PATH_BYTES 4096

static qf_status join_path(const char *dir, const char *name, char *path, qf_error *err)
{
    int n = snprintf(path, MAX_PATH_BYTES, "%s/%s", dir, name);
    if (n < 0 || n >= MAX_PATH_BYTES) {
        return QF_FAIL(err, QF_ERROR_IO, "the path of %s has %d bytes; at most %d are read", name, n,
                       MAX_PATH_BYTES - 1);
    }
    return QF_OK;
}

static bool ends_with(const char *text, const char *suffix)
{
    size_t length = strlen(text);
    size_t suffix_bytes = strlen(suffix);
    return length > suffix_bytes && strcmp(text + length - suffix_bytes, suffix) == 0;
}

/* The first by name of the files in other formats of weights; false if there is none. */
static bool find_other_weights(const char *dir, char *found, size_t size)
{
    static const char *const suffixes[] = {".bin", ".pt", ".pth", ".gguf"};
    const struct dirent *entry;
    DIR *listing = opendir(dir);
    found[0] = '\0';
    while (listing != NULL && (entry = readdir(listing)) != NULL) {
        for (size_t i = 0; i < sizeof suffixes / sizeof suffixes[0]; i++) {
            if (ends_with(entry->d_name, suffixes[i]) && (found[0] == '\0' || strcmp(entry->d_name, found) < 0)) {
                (void)snprintf(found, size, "%s", entry->d_name);
            }
        }
    }
    if (listing != NULL) {
        (void)closedir(listing);
    }
    return found[0] != '\0';
}

/* A file that a checkpoint must have is not there. The directory comes last: it may be too long for the message. */
static qf_status fail_missing(const char *dir, const char *name, const char *alternative, qf_error *err)
{
    char other[NAME_MAX + 1];
    char text[97];
    char names[NAME_MAX + 64];
    if (alternative != NULL) {
        (void)snprintf(names, sizeof names, "%s (or %s)", name, alternative);
    } else {
        (void)snprintf(names, sizeof names, "%s", name);
    }
    if (ends_with(name, ".safetensors") && find_other_weights(dir, other, sizeof other)) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s is missing (there is %s, but only safetensors is read): %s", names,
                       qf_printable(other, strlen(other), text, sizeof text), dir);
    }
    return QF_FAIL(err, QF_ERROR_MODEL, "%s is missing from the checkpoint directory %s", names, dir);
}

/* Opens dir/name, a regular file, for reading, and leaves its path in `path` (MAX_PATH_BYTES). O_NONBLOCK: a named
 * pipe in the directory must not hang the load. */
static qf_status open_regular(const char *dir, const char *name, const char *alternative, char *path, int *fd,
                              size_t *size_bytes, qf_error *err)
{
    struct stat info;
    QF_TRY(join_path(dir, name, path, err));
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) {
        int reason = errno;
        if (reason == ENOENT && stat(dir, &info) == 0) {
            return fail_missing(dir, name, alternative, err);
        }
        errno = reason;
        return QF_FAIL(err, QF_ERROR_IO, "cannot open %s: %m", path);
    }
    if (fstat(*fd, &info) != 0) {
        qf_status status = QF_FAIL(err, QF_ERROR_IO, "cannot read the size of %s: %m", path);
        (void)close(*fd);
        return status;
    }
    if (!S_ISREG(info.st_mode)) {
        (void)close(*fd);
        return QF_FAIL(err, QF_ERROR_IO, "%s is no regular file", path);
    }
    *size_bytes = (size_t)info.st_size;
    return QF_OK;
}

static qf_status read_all(int fd, const char *path, char *out, size_t size_bytes, qf_error *err)
{
    size_t done = 0;
    while (done < size_bytes) {
        ssize_t n = read(fd, out + done, size_bytes - done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return QF_FAIL(err, QF_ERROR_IO, "cannot read %s: %m", path);
        }
        if (n == 0) {
            return QF_FAIL(err, QF_ERROR_IO, "%s ends after %zu bytes; it had %zu when it was opened", path, done,
                           size_bytes);
        }
        done += (size_t)n;
    }
    return QF_OK;
}

qf_status qf_model_read_file(const char *dir, const char *name, size_t max_bytes, int optional, char **out,
                             size_t *size_bytes, qf_error *err)
{
    char path[MAX_PATH_BYTES];
    qf_status status = QF_OK;
    struct stat info;
    int fd;
    *out = NULL;
    *size_bytes = 0;
    QF_TRY(join_path(dir, name, path, err));
    if (optional && stat(path, &info) != 0 && errno == ENOENT) {
        return QF_OK;
    }
    QF_TRY(open_regular(dir, name, NULL, path, &fd, size_bytes, err));
    if (*size_bytes > max_bytes) {
        status = QF_FAIL(err, QF_ERROR_MODEL, "%s has %zu bytes; at most %zu are read", path, *size_bytes, max_bytes);
        goto fail;
    }
    QF_TRY_GOTO(qf_alloc((void **)out, *size_bytes + 1, 1, name, err), fail);
    QF_TRY_GOTO(read_all(fd, path, *out, *size_bytes, err), fail);
    (void)close(fd);
    return QF_OK;
fail:
    (void)close(fd);
    qf_free(*out);
    *out = NULL;
    return status;
}

qf_status qf_safetensors_open(const char *dir, const char *name, const char *alternative, qf_safetensors_file *out,
                              qf_error *err)
{
    char path[MAX_PATH_BYTES];
    qf_status status = QF_OK;
    memset(out, 0, sizeof *out);
    QF_TRY(open_regular(dir, name, alternative, path, &out->fd, &out->size_bytes, err));
    if (out->size_bytes == 0) {
        status = QF_FAIL(err, QF_ERROR_MODEL, "%s is empty", path);
        goto fail;
    }
    void *map = mmap(NULL, out->size_bytes, PROT_READ, MAP_PRIVATE, out->fd, 0);
    if (map == MAP_FAILED) {
        status = QF_FAIL(err, QF_ERROR_IO, "cannot map the %zu bytes of %s: %m", out->size_bytes, path);
        goto fail;
    }
    out->map = map;
    QF_TRY_GOTO(qf_safetensors_parse(map, out->size_bytes, path, &out->header, err), fail);
    return QF_OK;
fail:
    if (out->map != NULL) {
        (void)munmap(out->map, out->size_bytes);
    }
    (void)close(out->fd);
    memset(out, 0, sizeof *out);
    return status;
}

void qf_safetensors_close(qf_safetensors_file *self)
{
    if (self->map == NULL) {
        return;
    }
    qf_safetensors_deinit(&self->header);
    (void)munmap(self->map, self->size_bytes);
    (void)close(self->fd);
    memset(self, 0, sizeof *self);
}
