#include "base/alloc.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

void *qf_calloc(size_t count, size_t size)
{
    size_t bytes;
    if (!qf_mul_size(count, size, &bytes)) {
        return NULL;
    }
    return calloc(1, bytes > 0 ? bytes : 1);
}

void *qf_realloc(void *memory, size_t count, size_t size)
{
    size_t bytes;
    if (!qf_mul_size(count, size, &bytes)) {
        return NULL;
    }
    return realloc(memory, bytes > 0 ? bytes : 1);
}

void qf_free(void *memory) { free(memory); }

qf_status qf_alloc(void **out, size_t count, size_t size, const char *what, qf_error *err)
{
    *out = qf_calloc(count, size);
    if (*out == NULL) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate %s: %zu items of %zu bytes", what, count, size);
    }
    return QF_OK;
}

qf_status qf_pages_alloc(void **out, size_t size_bytes, const char *what, qf_error *err)
{
    *out = NULL;
    size_t bytes = size_bytes > 0 ? size_bytes : 1;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot reserve %zu bytes for %s", size_bytes, what);
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= (size_t)4 << 20) {
        (void)madvise(memory, bytes, MADV_HUGEPAGE);
    }
#endif
    *out = memory;
    return QF_OK;
}

void qf_pages_free(void *memory, size_t size_bytes)
{
    if (memory != NULL) {
        (void)munmap(memory, size_bytes > 0 ? size_bytes : 1);
    }
}
