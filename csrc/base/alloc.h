/* Memory. Everything in csrc allocates through these functions, so that a test can link its own alloc.c which
 * fails the n-th call. Sizes are checked for overflow; zero-sized requests return a valid unique pointer. */
#ifndef QF_BASE_ALLOC_H
#define QF_BASE_ALLOC_H

#include <stddef.h>

#include "base/status.h"

/* count * size zeroed bytes, aligned for any type; NULL on overflow or when memory is out. */
void *qf_calloc(size_t count, size_t size);
/* Grows or shrinks; on failure NULL is returned and `memory` stays valid. New bytes are not initialised. */
void *qf_realloc(void *memory, size_t count, size_t size);
void qf_free(void *memory);

/* `what` names the thing in the message; *out is NULL on failure. */
qf_status qf_alloc(void **out, size_t count, size_t size, const char *what, qf_error *err);

/* Page-aligned, zeroed memory straight from the kernel, for weights and caches: pages are committed when first
 * touched, large pages asked for. Free with qf_pages_free and the same size. */
qf_status qf_pages_alloc(void **out, size_t size_bytes, const char *what, qf_error *err);
void qf_pages_free(void *memory, size_t size_bytes);

/* Checked arithmetic: false on overflow (and *out is then unspecified). */
static inline int qf_mul_size(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline int qf_add_size(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }

#endif
