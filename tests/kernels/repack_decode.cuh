/* Reading fragments back by the definition in qf_kernels.h, and comparing them with what csrc/model reads. */
#ifndef REPACK_DECODE_CUH
#define REPACK_DECODE_CUH

#include "repack_checkpoint.cuh"

/* A blob copied to the host, and a linear in it. */
struct Packed {
    const uint8_t *blob;
    const qf_cuda_linear_layout *linear;

    size_t unit(int row, int column) const { return (size_t)(row / 16) * (size_t)(linear->k / 128) + column / 128; }

    /* The integer, or the bf16 bits, at (row, column). */
    uint32_t code(int row, int column) const
    {
        int in_block = column % 128, step = in_block / 16, in_step = in_block % 16;
        int lane = row % 8 * 4 + in_step % 8 / 2, reg = (row % 16 >= 8 ? 1 : 0) + (in_step >= 8 ? 2 : 0);
        const uint8_t *at = blob + linear->data + unit(row, column) * (size_t)(256 * linear->bits);
        uint32_t word;
        uint16_t half;
        switch (linear->bits) {
        case 4:
            memcpy(&word, at + ((step / 4 * 32 + lane) * 4 + step % 4) * 4, 4);
            return (word >> (4 * reg + 16 * (column % 2))) & 15u;
        case 8: return at[(step / 2 * 32 + lane) * 16 + step % 2 * 8 + 2 * reg + column % 2];
        default: memcpy(&half, at + ((step * 32 + lane) * 4 + reg) * 4 + 2 * (column % 2), 2); return half;
        }
    }

    uint32_t scale_word(int row, int column) const
    {
        size_t groups = (size_t)(128 / linear->group_size);
        size_t index = (unit(row, column) * groups + (size_t)(column % 128 / linear->group_size)) * 16 + row % 16;
        uint32_t word;
        memcpy(&word, blob + linear->scales + 4 * index, 4);
        return word;
    }
    float scale(int row, int column) const
    {
        return linear->scale_multiplier * qf_f16_to_f32((uint16_t)scale_word(row, column));
    }
    float zero(int row, int column) const { return qf_bf16_to_f32((uint16_t)(scale_word(row, column) >> 16)); }

    float f32(int row, int column) const
    {
        float value;
        memcpy(&value, blob + linear->data + ((size_t)row * linear->real_k + column) * 4, 4);
        return value;
    }
};

/* Counts what differs; the first difference is told. */
struct Differences {
    const char *name;
    long count = 0;
    void add(const char *what, int row, int column, double actual, double expected)
    {
        if (count++ == 0) {
            fprintf(stderr, "%s: %s of (%d, %d) is %.9g, expected %.9g\n", name, what, row, column, actual, expected);
        }
    }
};

/* Where row `row` of part `part` of a fused linear stands. */
static inline int packed_row(const qf_cuda_fused &fused, int part, int row)
{
    if (fused.interleave) {
        return row / 8 * 16 + 8 * part + row % 8;
    }
    for (int i = 0; i < part; i++) {
        row += fused.parts[i]->n;
    }
    return row;
}

/* float scales are rounded to fp16's 11 bits; those of fp16 and (in its range) bf16 are exact. */
static inline bool same_scale(float actual, float expected, qf_dtype dtype)
{
    return dtype == QF_DTYPE_F32 ? fabsf(actual - expected) <= 0x1p-11f * expected : actual == expected;
}

/* A row's integers, scales and zero points: as stored, or rounded in whole groups of the whole linear. */
struct Quantized {
    int k, group, skip = 0; /* skip: columns of the first group that belong to another rank */
    std::vector<uint8_t> q, zeros;
    std::vector<float> scales;

    Quantized(const qf_linear_source *part, const qf_cuda_linear_layout *linear, int row)
    {
        qf_linear_source wide = *part;
        group = part->group_size;
        if (linear->quantize_bits != 0) {
            const int all = part->whole != nullptr ? part->whole->k : part->k;
            group = linear->quantize_group_size;
            skip = part->first_column % group;
            wide.first_column -= skip;
            wide.k = std::min((part->first_column + part->k + group - 1) / group * group, all) - wide.first_column;
        }
        k = wide.k;
        q.resize((size_t)k);
        zeros.resize((size_t)k);
        scales.resize((size_t)k);
        if (linear->quantize_bits != 0) {
            std::vector<float> values((size_t)k);
            qf_linear_source_read_f32(&wide, row, 1, values.data());
            qf_quantize_rows(values.data(), 1, k, linear->quantize_bits, group, q.data(), scales.data(), zeros.data());
        } else {
            qf_linear_source_read_quantized(part, row, 1, q.data(), scales.data(), zeros.data());
        }
    }
    int code(int column) const { return q[(size_t)(column + skip)]; }
    int zero(int column) const { return zeros[(size_t)((column + skip) / group)]; }
    float scale(int column) const { return scales[(size_t)((column + skip) / group)]; }
    float value(int column) const { return scale(column) * (float)(code(column) - zero(column)); }
};

static inline void compare_quantized(const qf_linear_source *part, const Packed &p, int row, int fused, Differences &d)
{
    const qf_cuda_linear_layout *linear = p.linear;
    const Quantized expected(part, linear, row);
    const bool fp16 = linear->quantize_bits != 0 || part->format == QF_LINEAR_DUMMY;
    for (int i = 0; i < linear->k; i++) {
        if (i >= part->k) { /* padding adds nothing */
            bool none = p.scale(fused, i) == 0.0f || p.zero(fused, i) == (float)p.code(fused, i);
            if (!none) {
                d.add("padding", row, i, p.scale(fused, i), 0);
            }
        } else if (p.code(fused, i) != (uint32_t)expected.code(i)) {
            d.add("code", row, i, p.code(fused, i), expected.code(i));
        } else if (p.zero(fused, i) != (float)expected.zero(i)) {
            d.add("zero point", row, i, p.zero(fused, i), expected.zero(i));
        } else if (!same_scale(p.scale(fused, i), expected.scale(i), fp16 ? QF_DTYPE_F16 : part->scales.dtype)) {
            d.add("scale", row, i, p.scale(fused, i), expected.scale(i));
        }
    }
}

static inline void compare_values(const qf_linear_source *part, const Packed &p, int row, int fused, Differences &d)
{
    std::vector<float> values((size_t)part->k);
    qf_linear_source_read_f32(part, row, 1, values.data());
    if (p.linear->quantize_bits != 0) {
        const Quantized rounded(part, p.linear, row);
        for (int i = 0; i < part->k; i++) {
            values[(size_t)i] = rounded.value(i);
        }
    }
    for (int i = 0; i < p.linear->k; i++) {
        float expected = i < part->k ? values[(size_t)i] : 0.0f;
        if (p.linear->bits == 32) {
            if (qf_f32_bits(p.f32(fused, i)) != qf_f32_bits(expected)) {
                d.add("float32", row, i, p.f32(fused, i), expected);
            }
        } else if (p.code(fused, i) != qf_f32_to_bf16(expected)) {
            d.add("bf16", row, i, qf_bf16_to_f32((uint16_t)p.code(fused, i)), expected);
        }
    }
}

static inline void compare_small(const qf_cuda_fused &fused, const Packed &p, Differences &d)
{
    const qf_cuda_linear_layout *linear = p.linear;
    std::vector<float> bias((size_t)linear->n, 0.0f);
    bool has_bias = false;
    for (int part = 0; part < fused.num_parts; part++) {
        for (int row = 0; fused.parts[part]->bias != nullptr && row < fused.parts[part]->n; row++) {
            bias[(size_t)packed_row(fused, part, row)] = fused.parts[part]->bias[row];
            has_bias = true;
        }
    }
    CHECK(has_bias == (linear->bias != SIZE_MAX));
    for (int row = 0; has_bias && row < linear->n; row++) {
        float value;
        memcpy(&value, p.blob + linear->bias + 4 * (size_t)row, 4);
        if (value != bias[(size_t)row]) {
            d.add("bias", row, 0, value, bias[(size_t)row]);
        }
    }
    const int32_t *perm = fused.parts[0]->perm;
    CHECK((linear->perm != SIZE_MAX) == (linear->bits <= 8 && perm != nullptr));
    for (int i = 0; linear->perm != SIZE_MAX && i < linear->k; i++) {
        int32_t value;
        memcpy(&value, p.blob + linear->perm + 4 * (size_t)i, 4);
        if (value != (i < linear->real_k ? perm[i] : i)) {
            d.add("column", 0, i, value, i < linear->real_k ? perm[i] : i);
        }
    }
}

/* All rows, or some 100 of a large one. */
static inline long compare_linear(const char *name, const qf_cuda_fused &fused, const Packed &p)
{
    Differences d{name};
    std::vector<bool> used((size_t)p.linear->n, false);
    int total = 0;
    for (int part = 0; part < fused.num_parts; part++) {
        const qf_linear_source *source = fused.parts[part];
        int step = (size_t)source->n * source->k > (1u << 21) ? source->n / 100 | 1 : 1;
        total += source->n;
        for (int row = 0; row < source->n; row++) {
            int at = packed_row(fused, part, row);
            CHECK(at >= 0 && at < p.linear->n && !used[(size_t)at]);
            used[(size_t)at] = true;
            if (row % step != 0 && row != source->n - 1) {
                continue;
            }
            if (p.linear->bits <= 8) {
                compare_quantized(source, p, row, at, d);
            } else {
                compare_values(source, p, row, at, d);
            }
        }
    }
    for (int row = 0; row < p.linear->n; row++) { /* padding rows */
        for (int i = 0; i < p.linear->k && !used[(size_t)row]; i++) {
            if ((p.linear->bits <= 8 ? (p.scale_word(row, i) & 0x7fffu) : p.code(row, i)) != 0) {
                d.add("padding row", row, i, 1, 0);
            }
        }
    }
    CHECK(total == p.linear->real_n);
    compare_small(fused, p, d);
    return d.count;
}

#endif
