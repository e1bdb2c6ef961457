/* The safetensors format: u64 little-endian header length N, N bytes of JSON, raw data.
 *
 *   {"__metadata__": {string: string}, name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
 *
 * The parser is a pure function over bytes. It accepts nothing that the reference package refuses, and refuses
 * besides: unknown dtypes, a rank above 4, names that are empty, hold a NUL or have more than 512 bytes, sizes
 * beyond int64. Data may lie at odd addresses: read it by memcpy. */
#ifndef QF_MODEL_SAFETENSORS_H
#define QF_MODEL_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "model/checkpoint.h"

#define QF_SAFETENSORS_MAX_HEADER_BYTES 100000000u
#define QF_SAFETENSORS_MAX_NAME_BYTES 512u

typedef struct qf_safetensors {
    qf_tensor *tensors; /* (num_tensors) sorted by name; `data` points into the parsed bytes */
    size_t num_tensors;
    char *names; /* the storage of their names */
} qf_safetensors;

/* `data` holds the whole file and outlives the result; only the header is read. `what` opens every message; errors
 * are QF_ERROR_MODEL. */
qf_status qf_safetensors_parse(const uint8_t *data, size_t size_bytes, const char *what, qf_safetensors *out,
                               qf_error *err);
void qf_safetensors_deinit(qf_safetensors *self);

/* A file, mapped and parsed. The descriptor stays open and the size is the one found at open. A file that is cut
 * short by someone else while it is mapped kills the process (SIGBUS), as with every mapped file. */
typedef struct qf_safetensors_file {
    qf_safetensors header;
    void *map;
    size_t size_bytes;
    int fd;
} qf_safetensors_file;

/* Opens dir/name. A file that is missing is QF_ERROR_MODEL (`alternative`, if not NULL, is named as well); where the
 * whole directory is missing, or the file cannot be read, QF_ERROR_IO. */
qf_status qf_safetensors_open(const char *dir, const char *name, const char *alternative, qf_safetensors_file *out,
                              qf_error *err);
void qf_safetensors_close(qf_safetensors_file *self); /* for a zeroed one, too */

/* Reads dir/name as text of at most max_bytes. With `optional`, a missing file gives *out = NULL;
 * otherwise it fails as above. */
qf_status qf_model_read_file(const char *dir, const char *name, size_t max_bytes, int optional, char **out,
                             size_t *size_bytes, qf_error *err);

#endif
