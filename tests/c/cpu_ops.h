/* What the tests of the CPU ops share: numbers, pools, and contexts for every instruction set. */
#ifndef QF_TESTS_CPU_OPS_H
#define QF_TESTS_CPU_OPS_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu.h"
#include "check.h"

#define MAX_TOKENS 40
#define MAX_FEATURES 1024

static uint64_t random_state = 88172645463325252u;

static inline uint32_t random_u32(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32);
}

static inline float random_uniform(void) { return (float)(random_u32() >> 8) * 0x1p-24f; }

static inline float random_normal(void)
{
    float sum = -6.0f;
    for (int i = 0; i < 12; i++) {
        sum += random_uniform();
    }
    return sum;
}

/* Mostly small, now and then tens of times larger: like the inputs of down_proj. */
static inline float random_heavy(void)
{
    float value = random_normal();
    return random_u32() % 64 == 0 ? value * 20.0f : value;
}

static inline void *test_alloc(size_t bytes)
{
    void *memory = calloc(1, bytes > 0 ? bytes : 1);
    if (memory == NULL) {
        abort();
    }
    return memory;
}

static inline float *test_floats(size_t count) { return test_alloc(count * sizeof(float)); }

static inline void poison(float *p, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        p[i] = NAN;
    }
}

static inline bool same_bits(const float *a, const float *b, size_t count)
{
    return memcmp(a, b, count * sizeof *a) == 0;
}

/* --- contexts ------------------------------------------------------------------------------------------- */

/* Every instruction set of this machine, on one thread and on three. */
typedef struct test_machine {
    qf_thread_pool *pools[2];
    qf_cpu_context *contexts[QF_ISA_COUNT][2];
    int num_isas;
} test_machine;

static inline void machine_init(test_machine *m)
{
    qf_error err;
    m->num_isas = (int)qf_isa_detect() + 1;
    for (int p = 0; p < 2; p++) {
        CHECK_OK(qf_thread_pool_create(p == 0 ? 1 : 3, &m->pools[p], &err));
        for (int isa = 0; isa < m->num_isas; isa++) {
            CHECK_OK(qf_cpu_context_create((qf_isa)isa, m->pools[p], MAX_TOKENS, MAX_FEATURES, &m->contexts[isa][p],
                                           &err));
        }
    }
}

static inline void machine_deinit(test_machine *m)
{
    for (int p = 0; p < 2; p++) {
        for (int isa = 0; isa < m->num_isas; isa++) {
            qf_cpu_context_destroy(m->contexts[isa][p]);
        }
        qf_thread_pool_destroy(m->pools[p]);
    }
}

#endif
