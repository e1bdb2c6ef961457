/* Made-up weights for load_format="dummy": a counter-based generator, so any row can be had alone.
 *
 * Every value has mean zero: a mean of only 1e-3 would add up over thousands of columns to one common direction
 * that grows from layer to layer. */
#include "model/linear_formats.h"

/* The finaliser of SplitMix64 (Steele, Lea and Flood, 2014). */
static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

#define STEP 0x9e3779b97f4a7c15u

uint64_t qf_dummy_seed(uint64_t seed, int32_t layer, int32_t tensor)
{
    return mix(mix(seed + STEP) ^ (((uint64_t)(uint32_t)layer << 32) | (uint32_t)tensor));
}

static uint64_t row_seed(uint64_t seed, int32_t row) { return mix(seed + (uint64_t)(uint32_t)row * STEP); }

/* Eight nibbles as bytes, zeros replaced by 8: what is left lies evenly around 8. */
static uint64_t centred_nibbles(uint32_t word)
{
    uint64_t x = qf_spread_nibbles(word);
    uint64_t nonzero = ((x + 0x0f0f0f0f0f0f0f0fu) >> 4) & 0x0101010101010101u;
    return x | ((nonzero ^ 0x0101010101010101u) << 3);
}

/* Sixteen columns from 16 * block on, one byte each. */
static void unpack_block(uint64_t base, int32_t block, uint64_t out[2])
{
    uint64_t bits = mix(base + (uint64_t)(uint32_t)block * STEP);
    out[0] = centred_nibbles((uint32_t)bits);
    out[1] = centred_nibbles((uint32_t)(bits >> 32));
}

void qf_dummy_unpack(const qf_linear_source *self, int32_t n0, int32_t rows, int32_t i0, int32_t cols, qf_tile *out)
{
    int32_t skip = i0 % 16;
    for (int32_t r = 0; r < rows; r++) {
        uint64_t base = row_seed(self->dummy_seed, n0 + r);
        uint64_t bytes[2 * (QF_TILE / 16 + 1)]; /* the blocks that hold the columns */
        for (int32_t block = 0; 16 * block < skip + cols; block++) {
            unpack_block(base, i0 / 16 + block, bytes + 2 * block);
        }
        memcpy(out->q[r], (const uint8_t *)bytes + skip, (size_t)cols);
    }
}

/* An odd integer of at most 8 bits times 2^-13: bf16 holds it exactly, and the deviation is 0.018. */
static float dummy_value(uint64_t bits, int32_t lane)
{
    int32_t byte = (int8_t)(uint8_t)(bits >> (8 * lane));
    return (float)(2 * byte + 1) * 0x1p-13f;
}

void qf_dummy_f32(uint64_t seed, int32_t row, int32_t begin, int32_t end, float *out)
{
    uint64_t base = row_seed(seed, row);
    for (int32_t i = begin; i < end;) {
        uint64_t bits = mix(base + (uint64_t)(uint32_t)(i / 8) * STEP);
        for (int32_t lane = i % 8; lane < 8 && i < end; lane++, i++) {
            out[i - begin] = dummy_value(bits, lane);
        }
    }
}

void qf_dummy_bf16(uint64_t seed, int32_t row, int32_t k, uint16_t *out)
{
    uint64_t base = row_seed(seed, row);
    for (int32_t i = 0; i < k; i += 8) {
        uint64_t bits = mix(base + (uint64_t)(uint32_t)(i / 8) * STEP);
        for (int32_t lane = 0; lane < 8 && i + lane < k; lane++) {
            out[i + lane] = (uint16_t)(qf_f32_bits(dummy_value(bits, lane)) >> 16);
        }
    }
}
