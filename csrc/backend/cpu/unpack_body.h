/* Reading a low-bit KV cache: records of sixteen positions to float32. kernels.h draws the records, kv/format.h the codes.
 *
 *   key[d][i] = scale * code + (R_{t + i} bias)_d, t the first position of the bias's tile:
 *     with b = R_t bias (once a tile) and the turn (c, s) of step i:  (R_i b)_j = b_j c - b_j' s,  (R_i b)_j' = b_j' c + b_j s
 *   value[i][d] = scale * code
 *
 * The bias enters in float32: three roundings of numbers of its size, nothing of it is ever quantised. The rows that share
 * a pass over the cache share the unpacked tile, which costs about as much as two or three rows' arithmetic on it. */

/* The record of a low-bit cache that holds position `at`. */
QF_INLINE const uint8_t *find_record(const qf_kv_cache *cache, const void *store, const qf_attention_rows *rows, int32_t at)
{
    const int32_t block = rows->block_table[at / cache->block_size];
    return (const uint8_t *)store + qf_cpu_kv_record(cache, block, rows->kv_head, at % cache->block_size);
}

/* Records are short and blocks anywhere, so the processor does not foresee them. */
QF_INLINE void prefetch_record(const uint8_t *record, size_t size_bytes)
{
    for (size_t at = 0; at < size_bytes; at += 64) {
        v_prefetch(record + at);
    }
}

/* The codes of sixteen components or positions as float32, up to a factor that unpack_scales puts into the scale. */
QF_INLINE vf unpack_8(const uint8_t *p, const qf_kv_format format)
{
    return format == QF_KV_FP8_E4M3 ? vf_load_e4m3(p) : vf_from_vi(vi_load_s8((const int8_t *)p));
}

QF_INLINE vf unpack_4(vi codes, vi zero, vf levels, const qf_kv_format format)
{
    return format == QF_KV_NF4 ? vf_lookup(levels, codes) : vf_from_vi(vi_sub(codes, zero));
}

/* Sixteen scale words to scales, and int4's to zero points. */
QF_INLINE vf unpack_scales(const uint16_t *words, const qf_kv_format format)
{
    const vf shifted = vf_load_bf16(words); /* the word in the upper half */
    if (format == QF_KV_INT4) {
        return vf_bits(vi_and(vi_srl(vi_bits(shifted), 1), vi_set1(0x7ff80000)));
    }
    return format == QF_KV_FP8_E4M3 ? vf_mul(shifted, vf_set1(256.0f)) : shifted;
}

QF_INLINE vi unpack_zeros(const uint16_t *words, const qf_kv_format format)
{
    return format == QF_KV_INT4 ? vi_and(vi_srl(vi_bits(vf_load_bf16(words)), 16), vi_set1(15)) : vi_set1(0);
}

/* out: (head_dim, 16). bias: (head_dim) turned to its tile; turn: (head_dim / 2, 2, QF_BIAS_TILE) from the record's first
 * step on. */
QF_INLINE void unpack_keys(const uint8_t *record, int32_t head_dim, const float *bias, const float *turn, float *out,
                           qf_unpack_scratch *scratch, const qf_kv_format format)
{
    const bool narrow = format == QF_KV_INT4 || format == QF_KV_NF4;
    const int32_t half = head_dim / 2, num_scales = narrow ? head_dim / QF_KV_GROUP : 1;
    const uint16_t *words = (const uint16_t *)(const void *)(record + (size_t)head_dim * (narrow ? 8 : 16));
    float(*const scales)[16] = scratch->scales;
    int32_t(*const zeros)[16] = scratch->zeros;
    const vf levels = format == QF_KV_NF4 ? vf_load(qf_kv_nf4_levels()) : vf_set1(0.0f);
    for (int32_t g = 0; g < num_scales; g++) {
        vf_store(scales[g], unpack_scales(words + g * 16, format));
        vi_store(zeros[g], unpack_zeros(words + g * 16, format));
    }
    for (int32_t start = 0; start < half; start += 16) { /* one scale each for these components and for their partners */
        const int32_t g = narrow ? start / QF_KV_GROUP : 0, h = narrow ? (start + half) / QF_KV_GROUP : 0;
        const vf scale_g = vf_load(scales[g]), scale_h = vf_load(scales[h]);
        const vi zero_g = vi_load(zeros[g]), zero_h = vi_load(zeros[h]);
        for (int32_t j = start; j < start + 16; j++) {
            vf first, second;
            if (narrow) {
                const vi both = vi_load_u8(record + (size_t)j * 16);
                first = unpack_4(vi_and(both, vi_set1(15)), zero_g, levels, format);
                second = unpack_4(vi_srl(both, 4), zero_h, levels, format);
            } else {
                first = unpack_8(record + (size_t)j * 16, format);
                second = unpack_8(record + (size_t)(j + half) * 16, format);
            }
            const vf cosine = vf_load(turn + (size_t)j * 2 * QF_BIAS_TILE);
            const vf sine = vf_load(turn + ((size_t)j * 2 + 1) * QF_BIAS_TILE);
            const vf b = vf_set1(bias[j]), c = vf_set1(bias[j + half]);
            vf_store(out + (size_t)j * 16, vf_fma(first, scale_g, vf_fnma(c, sine, vf_mul(b, cosine))));
            vf_store(out + (size_t)(j + half) * 16, vf_fma(second, scale_h, vf_fma(b, sine, vf_mul(c, cosine))));
        }
    }
}

/* out: (16, head_dim) */
QF_INLINE void unpack_values(const uint8_t *record, int32_t head_dim, float *out, qf_unpack_scratch *scratch,
                             const qf_kv_format format)
{
    const bool narrow = format == QF_KV_INT4 || format == QF_KV_NF4;
    const int32_t num_scales = narrow ? head_dim / QF_KV_GROUP : 1;
    const uint16_t *words = (const uint16_t *)(const void *)(record + (size_t)head_dim * (narrow ? 8 : 16));
    float(*const scales)[16] = scratch->scales;
    int32_t(*const zeros)[16] = scratch->zeros;
    const vf levels = format == QF_KV_NF4 ? vf_load(qf_kv_nf4_levels()) : vf_set1(0.0f);
    for (int32_t g = 0; g < num_scales; g++) {
        vf_store(scales[g], unpack_scales(words + g * 16, format));
        vi_store(zeros[g], unpack_zeros(words + g * 16, format));
    }
    for (int32_t i = 0; i < 16; i++) {
        if (narrow) {
            for (int32_t g = 0; g < num_scales; g++) {
                const vi both = vi_load_u8(record + ((size_t)i * (size_t)num_scales + (size_t)g) * 16);
                const vf scale = vf_set1(scales[g][i]);
                const vi zero = vi_set1(zeros[g][i]);
                vf_store(out, vf_mul(unpack_4(vi_and(both, vi_set1(15)), zero, levels, format), scale));
                vf_store(out + 16, vf_mul(unpack_4(vi_srl(both, 4), zero, levels, format), scale));
                out += 32;
            }
        } else {
            const vf scale = vf_set1(scales[0][i]);
            for (int32_t d = 0; d < head_dim; d += 16, out += 16) {
                vf_store(out, vf_mul(unpack_8(record + (size_t)i * (size_t)head_dim + d, format), scale));
            }
        }
    }
}

typedef void (*unpack_keys_fn)(const uint8_t *record, int32_t head_dim, const float *bias, const float *turn, float *out,
                               qf_unpack_scratch *scratch);
typedef void (*unpack_values_fn)(const uint8_t *record, int32_t head_dim, float *out, qf_unpack_scratch *scratch);

#define QF_UNPACK_FUNCTIONS(NAME, FORMAT)                                                                            \
    static void unpack_keys_##NAME(const uint8_t *record, int32_t head_dim, const float *bias, const float *turn,    \
                                   float *out, qf_unpack_scratch *scratch)                                           \
    {                                                                                                                \
        unpack_keys(record, head_dim, bias, turn, out, scratch, FORMAT);                                             \
    }                                                                                                                \
    static void unpack_values_##NAME(const uint8_t *record, int32_t head_dim, float *out, qf_unpack_scratch *scratch) \
    {                                                                                                                \
        unpack_values(record, head_dim, out, scratch, FORMAT);                                                       \
    }
QF_UNPACK_FUNCTIONS(fp8, QF_KV_FP8_E4M3)
QF_UNPACK_FUNCTIONS(int8, QF_KV_INT8)
QF_UNPACK_FUNCTIONS(int4, QF_KV_INT4)
QF_UNPACK_FUNCTIONS(nf4, QF_KV_NF4)

/* By format - QF_KV_FP8_E4M3. */
static const unpack_keys_fn unpack_keys_table[4] = {unpack_keys_fp8, unpack_keys_int8, unpack_keys_int4, unpack_keys_nf4};
static const unpack_values_fn unpack_values_table[4] = {unpack_values_fp8, unpack_values_int8, unpack_values_int4,
                                                        unpack_values_nf4};
