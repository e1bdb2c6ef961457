/* Host side of the packed weights of qf_kernels.h for tests: makes them, reads single weights back, puts them on the
 * device. Rows are packed rows: for gate_up use interleaved_row() to find a projection's row. */
#ifndef WEIGHTS_CUH
#define WEIGHTS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <vector>

#include "check_cuda.cuh"

/* Packed row of row j of gate_proj (up = 0) or of up_proj (up = 1). */
static inline int interleaved_row(int j, int up) { return j / 8 * 16 + 8 * up + j % 8; }

/* What of `value` an fp16 number keeps, and its bits. */
static inline uint16_t fp16_bits(float value)
{
    __half h = __float2half(value);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}
static inline float fp16_value(uint16_t bits)
{
    __half h;
    memcpy((void *)&h, &bits, 2);
    return __half2float(h);
}

/* A packed matrix on the host. All of it follows from data, scales and bias; value() and row() dequantise. */
struct PackedWeight {
    int n, k;                     /* as packed: multiples of 16 and 128 */
    int bits, group_size;         /* 4, 8, 16; 32, 64, 128 */
    float scale_multiplier = 1;   /* a power of two */
    std::vector<uint8_t> data;
    std::vector<uint32_t> scales; /* empty for 16 bits */
    std::vector<float> bias;      /* (n) or empty */

    PackedWeight(int rows, int columns, int num_bits, int group)
        : n(rows), k(columns), bits(num_bits), group_size(group), data((size_t)rows * columns * num_bits / 8),
          scales(num_bits == 16 ? 0 : (size_t)rows * (columns / group))
    {
        CHECK(n % 16 == 0 && k % 128 == 0);
    }

    /* First bit of element (row, column) in data. */
    size_t bit_index(int row, int column) const
    {
        int r = row % 16, step = column % 128 / 16, c = column % 16;
        int lane = r % 8 * 4 + c % 8 / 2, reg = r / 8 + c / 8 * 2;
        size_t block = ((size_t)(row / 16) * (k / 128) + column / 128) * (256 * (size_t)bits), byte;
        if (bits == 4) {
            byte = block + step / 4 * 512 + lane * 16 + step % 4 * 4;
            return byte * 8 + 4 * reg + 16 * (c % 2);
        }
        if (bits == 8) {
            byte = block + step / 2 * 512 + lane * 16 + step % 2 * 8 + reg * 2 + c % 2;
        } else {
            byte = block + step * 512 + lane * 16 + reg * 4 + c % 2 * 2;
        }
        return byte * 8;
    }
    size_t scale_index(int row, int column) const
    {
        size_t groups = 128 / group_size;
        return (((size_t)(row / 16) * (k / 128) + column / 128) * groups + column % 128 / group_size) * 16 + row % 16;
    }

    /* Stores q (an integer of 4 or 8 bits, or bf16 bits); earlier content is replaced. */
    void set(int row, int column, uint32_t q)
    {
        size_t at = bit_index(row, column);
        if (bits == 4) {
            uint8_t *byte = &data[at / 8];
            *byte = (uint8_t)((*byte & ~(15u << (at % 8))) | (q << (at % 8)));
        } else {
            memcpy(&data[at / 8], &q, bits / 8);
        }
    }
    void set_scale(int row, int column, float scale, int zero)
    {
        scales[scale_index(row, column)] = fp16_bits(scale) | (uint32_t)bf16_bits((float)zero) << 16;
    }
    uint32_t quantised(int row, int column) const
    {
        size_t at = bit_index(row, column);
        if (bits == 4) {
            return (data[at / 8] >> (at % 8)) & 15u;
        }
        uint32_t q = 0;
        memcpy(&q, &data[at / 8], bits / 8);
        return q;
    }
    float value(int row, int column) const
    {
        uint32_t q = quantised(row, column);
        if (bits == 16) {
            return scale_multiplier * bf16_value((uint16_t)q);
        }
        uint32_t word = scales[scale_index(row, column)];
        return scale_multiplier * fp16_value((uint16_t)word) * ((float)q - bf16_value((uint16_t)(word >> 16)));
    }
    std::vector<float> row(int r) const
    {
        std::vector<float> values(k);
        for (int i = 0; i < k; i++) {
            values[i] = value(r, i);
        }
        return values;
    }
    /* (n, k); small matrices only */
    std::vector<float> dense() const
    {
        std::vector<float> values;
        for (int r = 0; r < n; r++) {
            std::vector<float> one = row(r);
            values.insert(values.end(), one.begin(), one.end());
        }
        return values;
    }
};

/* A matrix of random codes (any bits are a valid weight), scales and zero points; values are about 0.02 in size. Rows
 * from real_n on and columns from real_k on are padding: scale 0 (16 bits: weight 0). Fast enough for a large one. */
static inline PackedWeight random_weight(int real_n, int real_k, int bits, int group_size, uint64_t seed,
                                         bool with_bias = false)
{
    PackedWeight w((real_n + 15) / 16 * 16, (real_k + 127) / 128 * 128, bits, group_size);
    Random random(seed);
    uint32_t *words = (uint32_t *)w.data.data();
    for (size_t i = 0; i < w.data.size() / 4; i++) {
        uint32_t u = random.bits();
        if (bits == 16) { /* two bf16 of random sign and mantissa, 2^-7 .. 2^-5 */
            u = (u & 0x80ff80ffu) | 0x3c003c00u;
        }
        words[i] = u;
    }
    for (int r = 0; r < w.n && bits != 16; r++) {
        for (int c = 0; c < w.k; c += group_size) {
            bool real = r < real_n && c < real_k;
            float scale = (bits == 4 ? 0.004f : 0.00025f) * (0.5f + random.uniform());
            int zero = bits == 4 ? random.below(16) : 96 + random.below(64);
            w.set_scale(r, c, real ? scale : 0.0f, zero);
        }
    }
    for (int r = 0; r < w.n && bits == 16; r++) {
        for (int c = r < real_n ? real_k : 0; c < w.k; c++) {
            w.set(r, c, 0);
        }
    }
    if (with_bias) {
        for (int r = 0; r < w.n; r++) {
            w.bias.push_back(r < real_n ? random.normal() : 0.0f);
        }
    }
    return w;
}

/* The same on the device; `view` is what the launchers take. */
struct DeviceWeight {
    Device<uint8_t> data;
    Device<uint32_t> scales;
    Device<float> bias;
    qf_cuda_weight view;
    explicit DeviceWeight(const PackedWeight &w) : data(w.data), scales(w.scales), bias(w.bias), view()
    {
        view.data = data.data;
        view.scales = w.bits == 16 ? nullptr : scales.data;
        view.bias = w.bias.empty() ? nullptr : bias.data;
        view.n = w.n;
        view.k = w.k;
        view.bits = w.bits;
        view.group_size = w.group_size;
        view.scale_multiplier = w.scale_multiplier;
    }
};

/* Random activations: float rows (num_tokens, real_k) already rounded to bf16, and their tiled form for packed k.
 * Padding tokens of the last tile are NaN: nothing may come of them. */
struct Activations {
    int num_tokens, real_k, k;
    std::vector<float> rows;
    std::vector<uint16_t> tiled;
    Activations(int tokens, int columns, uint64_t seed)
        : num_tokens(tokens), real_k(columns), k((columns + 127) / 128 * 128), rows((size_t)tokens * columns),
          tiled((size_t)qf_cuda_tiled_size(k, tokens), 0xffff)
    {
        Random random(seed);
        for (int t = 0; t < tokens; t++) {
            for (int i = 0; i < k; i++) {
                float x = i < columns ? bf16_round(random.normal()) : 0.0f;
                if (i < columns) {
                    rows[(size_t)t * columns + i] = x;
                }
                tiled[tiled_index(i, t, tokens)] = bf16_bits(x);
            }
        }
    }
};

#endif
