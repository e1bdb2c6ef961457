/* Low-bit prefill attention: a tile in shared memory from codes to bf16, keys with their rotated bias. The whole is described
 * in attention_prefill_lowbit.cuh. */
#ifndef QF_ATTENTION_PREFILL_LOWBIT_CONVERT_CUH
#define QF_ATTENTION_PREFILL_LOWBIT_CONVERT_CUH

#include "attention_prefill_lowbit_tiles.cuh"
#include "common/kv_codec.cuh"

/* Four float32 numbers of a table that no running kernel writes. */
static __device__ __forceinline__ void load_table_4(const float *from, float *to)
{
    const float4 v = __ldg(reinterpret_cast<const float4 *>(from));
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
}

/* The pair (x, y) is turned. */
static __device__ __forceinline__ void turn(float &x, float &y, float cosine, float sine)
{
    const float a = x, b = y;
    x = __fmaf_rn(a, cosine, -__fmul_rn(b, sine));
    y = __fmaf_rn(b, cosine, __fmul_rn(a, sine));
}

/* Pairs first .. first + 7 of a head turn by a row of the table. */
static __device__ __forceinline__ void turn_8(float (&low)[8], float (&high)[8], const float *rotation, int half)
{
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float cosine[4], sine[4];
        load_table_4(rotation + i, cosine);
        load_table_4(rotation + half + i, sine);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            turn(low[i + j], high[i + j], cosine[j], sine[j]);
        }
    }
}

/* R_p0(b), by the threads that have copied the rotation: each has waited for its own copies, and reads nothing else's. */
template <int head_dim, int m_tiles>
static __device__ __forceinline__ void turn_bias(const lowbit_shared<head_dim, m_tiles> &m)
{
    constexpr int half = head_dim / 2;
    const int first = 4 * (int)threadIdx.x;
    if (first < half) {
#pragma unroll
        for (int j = first; j < first + 4; j++) {
            float x = m.bias[j], y = m.bias[half + j];
            turn(x, y, m.coarse[j], m.coarse[half + j]);
            m.turned[j] = x;
            m.turned[half + j] = y;
        }
    }
}

/* Columns 8 u .. 8 u + 7 of a key, without their scale, which is returned. */
template <qf_cuda_kv_format format, int head_dim>
static __device__ __forceinline__ float load_key(const char *codes, const uint16_t *scales, int u, uint32_t (&pairs)[4])
{
    const int group = u / 4, t = u % 4;
    uint32_t words[2];
    if (format >= QF_CUDA_KV_INT4) {
        words[0] = *reinterpret_cast<const uint32_t *>(codes + t * (head_dim / 8) + 4 * group);
    } else {
        const uint2 both = *reinterpret_cast<const uint2 *>(codes + (group / 2 * 4 + t) * 16 + group % 2 * 8);
        words[0] = both.x;
        words[1] = both.y;
    }
    qf_kv_key_pairs<format>(words, pairs);
    const uint32_t scale = scales[format >= QF_CUDA_KV_INT4 ? group : 0];
    if (format == QF_CUDA_KV_INT4) {
        const uint32_t zero = qf_kv_int4_zeros(scale | scale << 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            pairs[i] = qf_sub_bf16(pairs[i], zero);
        }
        return qf_kv_int4_step_low(scale);
    }
    return __uint_as_float(scale << 16);
}

/* codes times scale plus x, to bf16; what that leaves out to `rest`, rounded in its turn. */
static __device__ __forceinline__ void store_key(const uint32_t (&codes)[4], float scale, const float (&x)[8], uint16_t *to,
                                                 uint16_t *rest, bool low)
{
    uint32_t high[4], left[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float a = __fmaf_rn(qf_bf16_low(codes[i]), scale, x[2 * i]);
        const float b = __fmaf_rn(qf_bf16_high(codes[i]), scale, x[2 * i + 1]);
        high[i] = qf_pack_bf16(a, b);
        if (low) {
            left[i] = qf_pack_bf16(a - qf_bf16_low(high[i]), b - qf_bf16_high(high[i]));
        }
    }
    *reinterpret_cast<uint4 *>(to) = make_uint4(high[0], high[1], high[2], high[3]);
    if (low) {
        *reinterpret_cast<uint4 *>(rest) = make_uint4(left[0], left[1], left[2], left[3]);
    }
}

/* A thread converts columns 8 u .. 8 u + 7 and the same half a head further of every rows-th key. From one of its keys to the
 * next the bias turns by the same angles. Rows that no query sees are masked by all: whatever they are. */
template <qf_cuda_kv_format format, int head_dim, int m_tiles>
static __device__ __forceinline__ void convert_keys(const attention_params &p, const lowbit_item &it,
                                                    const lowbit_shared<head_dim, m_tiles> &m)
{
    constexpr int units = head_dim / 16, rows = ATTENTION_THREADS / units, half = head_dim / 2;
    constexpr int code_bytes = format >= QF_CUDA_KV_INT4 ? head_dim / 2 : head_dim;
    constexpr int scale_words = format >= QF_CUDA_KV_INT4 ? head_dim / 32 : 1;
    const int thread = thread_now(), u = thread % units, first = thread / units;
    const bool biased = p.a.kv.k_bias != NULL, low_part = it.low_steps >> (u / 2) & 1;
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(m.scales);
    float bias[2][8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bias[0][i] = biased ? m.turned[8 * u + i] : 0.0f;
        bias[1][i] = biased ? m.turned[half + 8 * u + i] : 0.0f;
    }
    if (biased) {
        turn_8(bias[0], bias[1], p.a.bias_rotation + first * head_dim + 8 * u, half);
    }
#pragma unroll
    for (int row = first, i = 0; i < PREFILL_TILE / rows; row += rows, i++) {
        if (i > 0 && biased) {
            turn_8(bias[0], bias[1], p.a.bias_rotation + rows * head_dim + 8 * u, half);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t pairs[4];
            const float scale = load_key<format, head_dim>(m.codes + row * code_bytes, scales + row * scale_words,
                                                           h * units + u, pairs);
            const int at = swizzled<head_dim>(row, h * units + u);
            store_key(pairs, scale, bias[h], m.keys + at, m.keys_low + at, low_part);
        }
    }
}

/* Four neighbouring columns of a value to two pairs, times their scale (twice in `scale`). */
template <qf_cuda_kv_format format>
static __device__ __forceinline__ uint2 scale_bytes(uint32_t codes, uint32_t scale)
{
    const uint32_t word = __byte_perm(codes, 0, 0x3120u); /* neighbours, two bytes apart */
    const uint32_t first = format == QF_CUDA_KV_INT8 ? qf_kv_int8_pair(word) : qf_kv_e4m3_pair(word << 8);
    const uint32_t second = format == QF_CUDA_KV_INT8 ? qf_kv_int8_pair(word >> 8) : qf_kv_e4m3_pair(word);
    return make_uint2(qf_mul_bf16(first, scale), qf_mul_bf16(second, scale));
}

/* Four columns each of two neighbouring groups, whose scale words stand side by side too. */
template <qf_cuda_kv_format format>
static __device__ __forceinline__ void scale_nibbles(uint32_t codes, uint32_t words, uint2 (&out)[2])
{
    if (format == QF_CUDA_KV_INT4) {
        const uint32_t steps = qf_kv_int4_steps(words), zeros = qf_kv_int4_zeros(words);
        uint32_t x[4]; /* a column of both groups */
#pragma unroll
        for (int n = 0; n < 4; n++) {
            x[n] = qf_mul_bf16(qf_sub_bf16(qf_kv_nibble_pair(codes >> (4 * n)), zeros), steps);
        }
        out[0] = make_uint2(__byte_perm(x[0], x[1], 0x5410u), __byte_perm(x[2], x[3], 0x5410u));
        out[1] = make_uint2(__byte_perm(x[0], x[1], 0x7632u), __byte_perm(x[2], x[3], 0x7632u));
    } else {
        const uint32_t low_bits = codes & 0x77777777u, high_bits = (codes >> 3) & 0x11111111u;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t scale = __byte_perm(words, 0, h == 0 ? 0x1010u : 0x3232u);
            uint32_t first, second;
            qf_kv_nf4_pairs(low_bits >> (16 * h), high_bits >> (16 * h), first, second);
            out[h] = make_uint2(qf_mul_bf16(first, scale), qf_mul_bf16(second, scale));
        }
    }
}

/* A thread converts columns 32 G + 4 g .. + 3, all G, of some values: neighbours where they are stored. A product of codes
 * and scale is rounded once. Rows that no query sees become zeros, for all weigh them with 0: their scale does. */
template <qf_cuda_kv_format format, int head_dim, int m_tiles>
static __device__ __forceinline__ void convert_values(const lowbit_item &it, int32_t tile,
                                                      const lowbit_shared<head_dim, m_tiles> &m)
{
    constexpr bool nibbles = format >= QF_CUDA_KV_INT4;
    constexpr int code_bytes = nibbles ? head_dim / 2 : head_dim, num_words = code_bytes / 32;
    constexpr int row_words = nibbles ? head_dim / 32 : 1; /* of scales */
    const int thread = thread_now(), g = thread % 8, sub = thread / 8 % 4;
    const int32_t begin = it.base.item.kv_begin - tile * PREFILL_TILE, end = it.base.item.kv_end - tile * PREFILL_TILE;
    const char *codes = m.codes + PREFILL_TILE * code_bytes + g * (nibbles ? 2 : code_bytes / 8);
    const uint16_t *scales = reinterpret_cast<const uint16_t *>(m.scales) + PREFILL_TILE * row_words;
#pragma unroll
    for (int i = 0; i < PREFILL_TILE / 16; i++) {
        /* A warp's rows r, r + 1, r + 4, r + 5: swizzled, their pieces lie in all banks. */
        const int index = i * ATTENTION_WARPS + thread / 32;
        const int row = index / 2 * 8 + index % 2 * 2 + sub / 2 + sub % 2 * 4;
        const bool seen = row >= begin && row < end;
        uint32_t words[num_words];
#pragma unroll
        for (int w = 0; w < num_words; w++) {
            const char *from = codes + row * code_bytes;
            if (nibbles) { /* of two groups */
                const int low = qf_kv_value_piece(head_dim, row, 2 * w), high = qf_kv_value_piece(head_dim, row, 2 * w + 1);
                words[w] = *reinterpret_cast<const uint16_t *>(from + 16 * low) |
                           (uint32_t)*reinterpret_cast<const uint16_t *>(from + 16 * high) << 16;
            } else {
                words[w] = reinterpret_cast<const uint32_t *>(from)[w];
            }
        }
        uint16_t *to = m.values + g % 2 * 4;
#pragma unroll
        for (int w = 0; w < num_words; w++) {
            if (nibbles) {
                const uint32_t both = reinterpret_cast<const uint32_t *>(scales + row * row_words)[w];
                uint2 out[2];
                scale_nibbles<format>(words[w], seen ? both : 0, out);
                *reinterpret_cast<uint2 *>(to + swizzled<head_dim>(row, 8 * w + g / 2)) = out[0];
                *reinterpret_cast<uint2 *>(to + swizzled<head_dim>(row, 8 * w + 4 + g / 2)) = out[1];
            } else {
                const uint32_t scale = seen ? scales[row] * 0x10001u : 0;
                *reinterpret_cast<uint2 *>(to + swizzled<head_dim>(row, 4 * w + g / 2)) =
                    scale_bytes<format>(words[w], scale);
            }
        }
    }
}

template <qf_cuda_kv_format format, int head_dim, int m_tiles>
static __device__ __forceinline__ void convert_as(const attention_params &p, const lowbit_item &it, int32_t tile,
                                                  const lowbit_shared<head_dim, m_tiles> &m)
{
    convert_keys<format, head_dim, m_tiles>(p, it, m);
    convert_values<format, head_dim, m_tiles>(it, tile, m);
}

template <int head_dim, int m_tiles>
static __device__ __forceinline__ void convert_tile(const attention_params &p, const lowbit_item &it, int32_t tile,
                                                    const lowbit_shared<head_dim, m_tiles> &m)
{
    switch (p.a.kv.format) {
    case QF_CUDA_KV_FP8: convert_as<QF_CUDA_KV_FP8, head_dim, m_tiles>(p, it, tile, m); break;
    case QF_CUDA_KV_INT8: convert_as<QF_CUDA_KV_INT8, head_dim, m_tiles>(p, it, tile, m); break;
    case QF_CUDA_KV_INT4: convert_as<QF_CUDA_KV_INT4, head_dim, m_tiles>(p, it, tile, m); break;
    default: convert_as<QF_CUDA_KV_NF4, head_dim, m_tiles>(p, it, tile, m); break;
    }
}

#endif
