/* Frequencies of the rotary embedding: plain, and YaRN (Peng et al., 2023).
 *
 * Pair j of a head of size d turns by inv_freq[j] radians per position, inv_freq[j] = theta^(-2j/d). YaRN divides
 * the slow frequencies by `factor`, keeps the fast ones, and blends in between: `low` and `high` are the pairs
 * that turn beta_fast and beta_slow times within the original context. */
#include <math.h>

#include "model/config.h"

#define TWO_PI 6.283185307179586476925286766559

/* The (fractional) pair that makes `rotations` turns within the original context. */
static double correction_dim(const qf_rope_config *rope, int32_t head_dim, double rotations)
{
    double context = (double)rope->original_max_position_embeddings;
    return (double)head_dim * log(context / (rotations * TWO_PI)) / (2.0 * log(rope->theta));
}

void qf_rope_inv_freq(const qf_rope_config *rope, int32_t head_dim, float *inv_freq)
{
    double low = 0.0;
    double high = 0.0;
    if (rope->yarn) {
        low = correction_dim(rope, head_dim, rope->beta_fast);
        high = correction_dim(rope, head_dim, rope->beta_slow);
        if (rope->truncate) {
            low = floor(low);
            high = ceil(high);
        }
        low = fmax(low, 0.0);
        high = fmin(high, (double)(head_dim - 1));
        if (low == high) {
            high += 0.001; /* no division by zero: the ramp becomes a step */
        }
    }
    for (int32_t j = 0; j < head_dim / 2; j++) {
        double plain = pow(rope->theta, -2.0 * (double)j / (double)head_dim);
        double value = plain;
        if (rope->yarn) {
            double ramp = fmin(fmax(((double)j - low) / (high - low), 0.0), 1.0);
            value = ramp * (plain / rope->factor) + (1.0 - ramp) * plain;
        }
        inv_freq[j] = (float)value;
    }
}
