#include "base/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

typedef struct sip_state {
    uint64_t v0, v1, v2, v3;
} sip_state;

static inline uint64_t rotate_left(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

/* Bytes to words by shifts: the hash is the same on every machine, and compilers make one load of it. */
static inline uint64_t load_u64_le(const uint8_t *p)
{
    uint64_t word = 0;
    for (int i = 0; i < 8; i++) {
        word |= (uint64_t)p[i] << (8 * i);
    }
    return word;
}

static inline void sip_rounds(sip_state *s, int count)
{
    for (int i = 0; i < count; i++) {
        s->v0 += s->v1;
        s->v2 += s->v3;
        s->v1 = rotate_left(s->v1, 13) ^ s->v0;
        s->v3 = rotate_left(s->v3, 16) ^ s->v2;
        s->v0 = rotate_left(s->v0, 32);
        s->v2 += s->v1;
        s->v0 += s->v3;
        s->v1 = rotate_left(s->v1, 17) ^ s->v2;
        s->v3 = rotate_left(s->v3, 21) ^ s->v0;
        s->v2 = rotate_left(s->v2, 32);
    }
}

static inline void sip_absorb(sip_state *s, uint64_t word)
{
    s->v3 ^= word;
    sip_rounds(s, 2);
    s->v0 ^= word;
}

static inline uint64_t sip_output(const sip_state *s) { return s->v0 ^ s->v1 ^ s->v2 ^ s->v3; }

qf_hash128 qf_siphash128(const void *data, size_t size_bytes, uint64_t key0, uint64_t key1)
{
    /* The initial constants spell "somepseudorandomlygeneratedbytes"; 0xee marks the 128-bit variant. */
    sip_state s = {key0 ^ 0x736f6d6570736575u, key1 ^ 0x646f72616e646f6du ^ 0xeeu, key0 ^ 0x6c7967656e657261u,
                   key1 ^ 0x7465646279746573u};
    const uint8_t *bytes = data;
    size_t whole = size_bytes & ~(size_t)7;
    for (size_t i = 0; i < whole; i += 8) {
        sip_absorb(&s, load_u64_le(bytes + i));
    }
    uint64_t last = (uint64_t)size_bytes << 56; /* the length modulo 256 closes the padding */
    for (size_t i = whole; i < size_bytes; i++) {
        last |= (uint64_t)bytes[i] << (8 * (i - whole));
    }
    sip_absorb(&s, last);

    qf_hash128 hash;
    s.v2 ^= 0xeeu;
    sip_rounds(&s, 4);
    hash.low = sip_output(&s);
    s.v1 ^= 0xddu;
    sip_rounds(&s, 4);
    hash.high = sip_output(&s);
    return hash;
}

static int random_from_kernel(uint64_t *out)
{
#if defined(SYS_getrandom)
    long got;
    do {
        got = syscall(SYS_getrandom, out, sizeof *out, 0u);
    } while (got < 0 && errno == EINTR);
    return got == (long)sizeof *out;
#else
    (void)out;
    return 0;
#endif
}

static int random_from_device(uint64_t *out)
{
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return 0;
    }
    ssize_t got;
    do {
        got = read(fd, out, sizeof *out);
    } while (got < 0 && errno == EINTR);
    (void)close(fd);
    return got == (ssize_t)sizeof *out;
}

uint64_t qf_random_u64(void)
{
    uint64_t value = 0;
    if (random_from_kernel(&value) || random_from_device(&value)) {
        return value;
    }
    /* A sandbox without either: clocks, process and stack address. Guessable, but still different every time. */
    struct timespec times[2] = {{0, 0}, {0, 0}};
    (void)clock_gettime(CLOCK_REALTIME, &times[0]);
    (void)clock_gettime(CLOCK_MONOTONIC, &times[1]);
    uint64_t seed[5] = {(uint64_t)times[0].tv_sec, (uint64_t)times[0].tv_nsec, (uint64_t)times[1].tv_sec,
                        (uint64_t)times[1].tv_nsec, (uint64_t)(uintptr_t)&value};
    return qf_siphash128(seed, sizeof seed, (uint64_t)getpid(), 0).low;
}
