/* The power of two by which a fused linear's scales are stored. */
#include <math.h>
#include <string.h>

#include "backend/cuda/weights_stage.h"

#define SCALES_AT_ONCE 65536 /* a thread's share */

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

typedef struct scales_task {
    const qf_tensor *scales;
    size_t count;
    uint32_t *largest; /* (threads) */
} scales_task;

/* The bits of a positive float grow with its value. */
static void find_largest(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    const scales_task *task = arg;
    const char *data = task->scales->data;
    const size_t first = (size_t)begin * SCALES_AT_ONCE, last = min_size(task->count, (size_t)end * SCALES_AT_ONCE);
    uint32_t wide = 0;
    uint16_t narrow = 0;
    if (task->scales->dtype == QF_DTYPE_F32) {
        for (size_t i = first; i < last; i++) {
            uint32_t bits;
            memcpy(&bits, data + 4 * i, sizeof bits);
            bits &= 0x7fffffffu;
            wide = bits > wide ? bits : wide;
        }
    } else {
        for (size_t i = first; i < last; i++) {
            uint16_t bits;
            memcpy(&bits, data + 2 * i, sizeof bits);
            bits &= 0x7fffu;
            narrow = bits > narrow ? bits : narrow;
        }
        wide = qf_f32_bits(task->scales->dtype == QF_DTYPE_BF16 ? qf_bf16_to_f32(narrow) : qf_f16_to_f32(narrow));
    }
    task->largest[worker] = wide > task->largest[worker] ? wide : task->largest[worker];
}

/* The power of two that brings the largest scale up to fp16's last binade: then small ones lose no bits that they have
 * in the file (scales of fp16 never do), and none overflows. */
static float multiplier_for(float largest)
{
    int exponent;
    if (!(largest > 0.0f)) {
        return 1.0f;
    }
    (void)frexpf(largest, &exponent); /* 2^(exponent - 1) <= largest < 2^exponent */
    int shift = 16 - exponent;
    if (ldexpf(largest, shift) >= 65520.0f) { /* would round up to infinity */
        shift--;
    }
    shift = shift < 126 ? shift : 126; /* both powers stay normal numbers */
    return ldexpf(1.0f, -shift);
}

float qf_cuda_scale_multiplier(const qf_cuda_fused *fused, qf_thread_pool *pool, uint32_t *largest_of_thread)
{
    const int32_t threads = qf_thread_pool_size(pool);
    uint32_t largest = 0;
    for (int32_t i = 0; i < fused->num_parts; i++) {
        const qf_tensor *scales = &fused->parts[i]->scales;
        if (fused->parts[i]->format == QF_LINEAR_DUMMY) {
            continue; /* one scale, which is fp16: any multiplier will do */
        }
        scales_task task = {.scales = scales,
                            .count = scales->size_bytes / qf_dtype_size(scales->dtype),
                            .largest = largest_of_thread};
        memset(largest_of_thread, 0, (size_t)threads * sizeof *largest_of_thread);
        qf_thread_pool_run(pool, find_largest, &task,
                           (int64_t)((task.count + SCALES_AT_ONCE - 1) / SCALES_AT_ONCE), 1);
        for (int32_t t = 0; t < threads; t++) {
            largest = largest_of_thread[t] > largest ? largest_of_thread[t] : largest;
        }
    }
    return multiplier_for(qf_bits_f32(largest));
}
