/* Stands in for base/alloc.c in fault-injecting builds: the same interface, where one chosen allocation fails.
 *
 * Page allocations come from the C heap here, so that the leak check sees them, and qf_pages_free() proves that it
 * is given the size that was allocated (munmap would silently leave a part behind). */
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"

#define PAGE_BYTES ((size_t)4096)

void check_fail_alloc(int64_t n);
bool check_alloc_failed(void);

static atomic_llong countdown; /* allocations until the one that fails; <= 0: none */
static atomic_bool fired;

void check_fail_alloc(int64_t n)
{
    atomic_store(&fired, false);
    atomic_store(&countdown, n);
}

bool check_alloc_failed(void) { return atomic_load(&fired); }

static bool must_fail(void)
{
    if (atomic_load(&countdown) <= 0 || atomic_fetch_sub(&countdown, 1) != 1) {
        return false;
    }
    atomic_store(&fired, true);
    return true;
}

void *qf_calloc(size_t count, size_t size)
{
    size_t bytes;
    if (!qf_mul_size(count, size, &bytes) || must_fail()) {
        return NULL;
    }
    return calloc(1, bytes > 0 ? bytes : 1);
}

void *qf_realloc(void *memory, size_t count, size_t size)
{
    size_t bytes;
    if (!qf_mul_size(count, size, &bytes) || must_fail()) {
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
    size_t bytes;
    char *memory = NULL;
    if (qf_add_size(size_bytes, PAGE_BYTES, &bytes) && !must_fail()) {
        void *base = NULL;
        memory = posix_memalign(&base, PAGE_BYTES, bytes) == 0 ? base : NULL;
    }
    if (memory == NULL) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot reserve %zu bytes for %s", size_bytes, what);
    }
    memset(memory, 0, bytes);
    memcpy(memory, &size_bytes, sizeof size_bytes); /* a page of our own in front */
    *out = memory + PAGE_BYTES;
    return QF_OK;
}

void qf_pages_free(void *memory, size_t size_bytes)
{
    if (memory == NULL) {
        return;
    }
    char *base = (char *)memory - PAGE_BYTES;
    size_t allocated;
    memcpy(&allocated, base, sizeof allocated);
    if (allocated != size_bytes) {
        (void)fprintf(stderr, "qf_pages_free: size %zu, but %zu bytes were allocated\n", size_bytes, allocated);
        abort();
    }
    free(base);
}
