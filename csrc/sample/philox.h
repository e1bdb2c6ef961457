/* Philox4x32-10 as published, for the published test vectors; the sampler's own use of it is qf_philox4x32. */
#ifndef QF_SAMPLE_PHILOX_H
#define QF_SAMPLE_PHILOX_H

#include <stdint.h>

void qf_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* In (0, 1): the first two words' upper 53 bits, of which the lowest is set so that 0 never comes. */
static inline double qf_uniform_from_words(const uint32_t words[4])
{
    uint64_t bits = ((uint64_t)words[0] << 32 | words[1]) >> 11;
    return (double)(bits | 1u) * 0x1p-53;
}

#endif
