/* SipHash-2-4 with 128-bit output (Aumasson and Bernstein, 2012): a keyed hash for the prefix cache. */
#ifndef QF_BASE_HASH_H
#define QF_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct qf_hash128 {
    uint64_t low, high;
} qf_hash128;

qf_hash128 qf_siphash128(const void *data, size_t size_bytes, uint64_t key0, uint64_t key1);

/* A fresh 64-bit value from the operating system. */
uint64_t qf_random_u64(void);

#endif
