/* What this machine can do, measured beside every benchmark: the rate at which threads read memory, and the rate of
 * int8 multiply-adds out of registers. Compiled by benchmarks/common.py; called by ctypes. Each thread times nothing
 * itself: the caller's clock runs from the barrier that starts them all to the last one's end. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef struct job {
    const uint8_t *data; /* (size_bytes), 64-byte aligned */
    size_t size_bytes;
    int64_t rounds;
    int32_t width; /* 512, 256 or 0 */
    uint64_t sum;
    pthread_barrier_t *start;
} job;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* --- streaming reads: eight independent accumulators, so that loads and not additions are the limit ---------- */

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static uint64_t read_512(const uint8_t *data, size_t size) {
    __m512i s[8];
    for (int i = 0; i < 8; ++i) {
        s[i] = _mm512_setzero_si512();
    }
    for (size_t at = 0; at + 512 <= size; at += 512) {
        for (int i = 0; i < 8; ++i) {
            s[i] = _mm512_add_epi64(s[i], _mm512_load_si512((const void *)(data + at + 64 * (size_t)i)));
        }
    }
    for (int i = 1; i < 8; ++i) {
        s[0] = _mm512_add_epi64(s[0], s[i]);
    }
    return (uint64_t)_mm512_reduce_add_epi64(s[0]);
}

__attribute__((target("avx2"))) static uint64_t read_256(const uint8_t *data, size_t size) {
    __m256i s[8];
    for (int i = 0; i < 8; ++i) {
        s[i] = _mm256_setzero_si256();
    }
    for (size_t at = 0; at + 256 <= size; at += 256) {
        for (int i = 0; i < 8; ++i) {
            s[i] = _mm256_add_epi64(s[i], _mm256_load_si256((const __m256i *)(const void *)(data + at + 32 * (size_t)i)));
        }
    }
    uint64_t parts[4], sum = 0;
    for (int i = 0; i < 8; ++i) {
        _mm256_storeu_si256((__m256i *)(void *)parts, s[i]);
        sum += parts[0] + parts[1] + parts[2] + parts[3];
    }
    return sum;
}
#endif

static uint64_t read_64(const uint8_t *data, size_t size) {
    uint64_t s[8] = {0};
    for (size_t at = 0; at + 64 <= size; at += 64) {
        for (size_t i = 0; i < 8; ++i) {
            uint64_t word;
            memcpy(&word, data + at + 8 * i, sizeof word);
            s[i] += word;
        }
    }
    return s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
}

static void *read_thread(void *arg) {
    job *self = arg;
    pthread_barrier_wait(self->start);
    for (int64_t i = 0; i < self->rounds; ++i) {
#if defined(__x86_64__)
        if (self->width == 512) {
            self->sum += read_512(self->data, self->size_bytes);
            continue;
        }
        if (self->width == 256) {
            self->sum += read_256(self->data, self->size_bytes);
            continue;
        }
#endif
        self->sum += read_64(self->data, self->size_bytes);
    }
    return NULL;
}

/* --- int8 dot products: twelve accumulators hide the latency; nothing touches memory -------------------------- */

#if defined(__x86_64__)
#define DOT_ACCUMULATORS 12
#define DOT_STEP(i) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(s[i]) : "v"(b), "v"(a))

__attribute__((target("avx512f,avx512vnni"))) static uint64_t dot_512(int64_t rounds) {
    __m512i s[DOT_ACCUMULATORS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
    for (int i = 0; i < DOT_ACCUMULATORS; ++i) {
        s[i] = _mm512_setzero_si512();
    }
    for (int64_t r = 0; r < rounds; ++r) {
        DOT_STEP(0); DOT_STEP(1); DOT_STEP(2); DOT_STEP(3); DOT_STEP(4); DOT_STEP(5);
        DOT_STEP(6); DOT_STEP(7); DOT_STEP(8); DOT_STEP(9); DOT_STEP(10); DOT_STEP(11);
    }
    uint64_t sum = 0;
    for (int i = 0; i < DOT_ACCUMULATORS; ++i) {
        sum += (uint64_t)(uint32_t)_mm512_reduce_add_epi32(s[i]);
    }
    return sum;
}

#define MADD_STEP(i)                                                                    \
    do {                                                                                \
        __m256i product;                                                                \
        __asm__ volatile("vpmaddubsw %1, %2, %0" : "=x"(product) : "x"(b), "x"(a));     \
        __asm__ volatile("vpmaddwd %1, %0, %0" : "+x"(product) : "x"(one));             \
        s[i] = _mm256_add_epi32(s[i], product);                                         \
    } while (0)

/* What int8 dot products cost without VNNI: multiply, widen, add. */
__attribute__((target("avx2"))) static uint64_t dot_256(int64_t rounds) {
    __m256i s[8], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1);
    for (int i = 0; i < 8; ++i) {
        s[i] = _mm256_setzero_si256();
    }
    for (int64_t r = 0; r < rounds; ++r) {
        MADD_STEP(0); MADD_STEP(1); MADD_STEP(2); MADD_STEP(3);
        MADD_STEP(4); MADD_STEP(5); MADD_STEP(6); MADD_STEP(7);
    }
    uint32_t parts[8];
    uint64_t sum = 0;
    for (int i = 0; i < 8; ++i) {
        _mm256_storeu_si256((__m256i *)(void *)parts, s[i]);
        sum += parts[0];
    }
    return sum;
}
#endif

static uint64_t dot_scalar(int64_t rounds) {
    int32_t s[4] = {0};
    volatile int8_t source_a = 3, source_b = 1;
    int8_t a = source_a, b = source_b;
    for (int64_t r = 0; r < rounds; ++r) {
        for (int i = 0; i < 4; ++i) {
            s[i] += a * b;
            __asm__ volatile("" : "+r"(s[i]));
        }
    }
    return (uint64_t)(uint32_t)(s[0] + s[1] + s[2] + s[3]);
}

static void *dot_thread(void *arg) {
    job *self = arg;
    pthread_barrier_wait(self->start);
#if defined(__x86_64__)
    if (self->width == 512) {
        self->sum = dot_512(self->rounds);
        return NULL;
    }
    if (self->width == 256) {
        self->sum = dot_256(self->rounds);
        return NULL;
    }
#endif
    self->sum = dot_scalar(self->rounds);
    return NULL;
}

/* Multiply-adds per round of the loop above. */
int32_t probe_dot_macs(int32_t width) {
    return width == 512 ? 12 * 64 : width == 256 ? 8 * 32 : 4;
}

/* 512: AVX-512 (for `dot`, with VNNI); 256: AVX2; 0: neither. */
int32_t probe_width(int32_t dot) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && (!dot || __builtin_cpu_supports("avx512vnni"))) {
        return 512;
    }
    if (__builtin_cpu_supports("avx2")) {
        return 256;
    }
#endif
    (void)dot;
    return 0;
}

/* Runs `num_threads` threads; returns seconds, or a negative number if they cannot be started. `data`: each thread
 * reads its own share of size_bytes; NULL: the dot loop. */
double probe_run(const uint8_t *data, size_t size_bytes, int64_t rounds, int32_t num_threads, int32_t width) {
    pthread_barrier_t start;
    pthread_t threads[256];
    job jobs[256];
    if (num_threads < 1 || num_threads > 256 || pthread_barrier_init(&start, NULL, (unsigned)num_threads + 1) != 0) {
        return -1.0;
    }
    size_t share = size_bytes / (size_t)num_threads / 512 * 512;
    for (int32_t i = 0; i < num_threads; ++i) {
        jobs[i] = (job){data ? data + share * (size_t)i : NULL, share, rounds, width, 0, &start};
        if (pthread_create(&threads[i], NULL, data ? read_thread : dot_thread, &jobs[i]) != 0) {
            return -1.0; /* the threads already waiting are lost; the caller gives up */
        }
    }
    pthread_barrier_wait(&start);
    double begin = now_s();
    for (int32_t i = 0; i < num_threads; ++i) {
        pthread_join(threads[i], NULL);
    }
    return now_s() - begin;
}

/* A buffer with every page touched, or NULL. */
uint8_t *probe_alloc(size_t size_bytes) {
    void *data = NULL;
    if (posix_memalign(&data, 1 << 21, size_bytes) != 0) {
        return NULL;
    }
    memset(data, 1, size_bytes);
    return data;
}

void probe_free(uint8_t *data) {
    free(data);
}
