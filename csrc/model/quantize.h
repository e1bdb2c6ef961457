/* Round-to-nearest quantisation of float rows, with a search for the best clip per group. */
#ifndef QF_MODEL_QUANTIZE_H
#define QF_MODEL_QUANTIZE_H

#include <stdint.h>

/* Asymmetric: w ~ scales * (q - zeros), q and zeros in [0, 2^bits - 1], groups of `group_size` along k (the last
 * may be shorter). For each group a grid of shrunken ranges is tried and the one with the least squared error
 * kept. Scales are values that float16 represents exactly. w: (count, k); q: (count, k); scales, zeros:
 * (count, ceil(k / group_size)). Pure; safe to call from many threads. bits: 4 or 8. */
void qf_quantize_rows(const float *w, int32_t count, int32_t k, int32_t bits, int32_t group_size, uint8_t *q,
                      float *scales, uint8_t *zeros);

#endif
