/* Rows of q, k and v: vectors of what the QKV linear made, their rotation, and the write to a low-bit cache, whichever kernel
 * does it. */
#ifndef QF_KV_ROW_CUH
#define QF_KV_ROW_CUH

#include "common/ptx.cuh"
#include "kv_encode.cuh"

template <int width> struct floats {
    float v[width];
};

/* Plain loads, 16 bytes for width 4. Volatile: they stay behind the dependency wait, and all go out before their use.
 * */
static __device__ __forceinline__ floats<4> load_floats(const float *p, floats<4>)
{
    floats<4> r;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(r.v[0]), "=f"(r.v[1]), "=f"(r.v[2]), "=f"(r.v[3])
                 : "l"(p)
                 : "memory");
    return r;
}

static __device__ __forceinline__ floats<1> load_floats(const float *p, floats<1>)
{
    floats<1> r;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(r.v[0]) : "l"(p) : "memory");
    return r;
}

template <int width>
static __device__ __forceinline__ void rotate(const floats<width> &c, const floats<width> &s, floats<width> &low,
                                              floats<width> &high)
{
#pragma unroll
    for (int i = 0; i < width; i++) {
        const float x = low.v[i], y = high.v[i];
        low.v[i] = __fmaf_rn(x, c.v[i], -__fmul_rn(y, s.v[i]));
        high.v[i] = __fmaf_rn(y, c.v[i], __fmul_rn(x, s.v[i]));
    }
}

/* Where a row of a kv head is. */
struct kv_row {
    uint8_t *codes;
    uint16_t *words;
    int32_t index; /* of the block's rows */
};

template <int format>
static __device__ __forceinline__ kv_row find_low_bit(const qf_cuda_kv &kv, bool key, int32_t slot, int32_t kv_head)
{
    const int32_t words = qf_kv_words(format, kv.head_dim), row_bytes = qf_kv_row_bytes(format, kv.head_dim);
    const int32_t block = slot / kv.block_size, row = kv_head * kv.block_size + (slot - block * kv.block_size);
    const int64_t rows = (int64_t)kv.num_kv_heads * kv.block_size;
    uint8_t *base = static_cast<uint8_t *>(key ? kv.k : kv.v) + block * rows * (row_bytes + 2 * words);
    return kv_row{base + (int64_t)row * row_bytes,
                  reinterpret_cast<uint16_t *>(base + rows * row_bytes) + (int64_t)row * words, row};
}

/* Codes and words of a row's eight columns j .. and half + j .., which this thread has. */
template <int format>
static __device__ __forceinline__ void store_low_bit(const kv_row &to, int32_t head_dim, bool key, int32_t j,
                                                     const floats<4> &low, const floats<4> &high, bool store)
{
    const int32_t half = head_dim / 2, words = qf_kv_words(format, head_dim);
    const kv_codes c = encode_columns<format>(low.v, high.v, head_dim / 8);
    store_codes<format>(to.codes, to.index, c.low, head_dim, j, key, store);
    store_codes<format>(to.codes, to.index, c.high, head_dim, half + j, key, store);
    if (store && (words == 1 ? j == 0 : j % 32 == 0)) {
        to.words[words == 1 ? 0 : j / 32] = (uint16_t)c.low_word;
        if (words > 1) {
            to.words[(half + j) / 32] = (uint16_t)c.high_word;
        }
    }
}

#endif
