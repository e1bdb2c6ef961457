/* Files of a checkpoint directory: whole text files, and safetensors mapped into memory. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/alloc.h"
#include "model/safetensors.h"

#define MAX_PATH_BYTES 4096

qf_status qf_model_path(const char *dir, const char *name, char *buffer, size_t size, qf_error *err)
{
    int n = snprintf(buffer, size, "%s/%s", dir, name);
    if (n < 0 || (size_t)n >= size) {
        return QF_FAIL(err, QF_ERROR_IO, "the path of %s has %d bytes; at most %zu are read", name, n, size - 1);
    }
    return QF_OK;
}

/* Opens a regular file for reading. O_NONBLOCK: a named pipe in the directory must not hang the load. */
static qf_status open_regular(const char *path, int *fd, size_t *size_bytes, qf_error *err)
{
    struct stat info;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) {
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
    QF_TRY(qf_model_path(dir, name, path, sizeof path, err));
    if (optional && stat(path, &info) != 0 && errno == ENOENT) {
        return QF_OK;
    }
    QF_TRY(open_regular(path, &fd, size_bytes, err));
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

qf_status qf_safetensors_open(const char *path, qf_safetensors_file *out, qf_error *err)
{
    qf_status status = QF_OK;
    memset(out, 0, sizeof *out);
    QF_TRY(open_regular(path, &out->fd, &out->size_bytes, err));
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
