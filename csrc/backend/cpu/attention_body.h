/* Attention: out = softmax(scale q K^T) V over each row's visible positions, a row being one (token, head).
 *
 * K of a block and KV head lies as (block_size / 16, head_dim, 16): a vector holds one component of sixteen keys, so
 * scores need broadcasts of q and no sums across lanes. V lies as (block_size, head_dim).
 *
 * Positions are cut into splits of 512, at absolute positions. Within a split:
 *   s_j = sum over d of q_d K_jd (fma, d ascending);  m = max s_j;  p_j = exp(s_j - m)
 *   l = sum of p_j, sixteen lanes (j mod 16) then a fixed tree;  a = sum of p_j V_j (fma, j ascending)
 * and the splits' (m, l, a) are merged in ascending order. Nothing depends on which rows share a pass, so a row has
 * the same bits alone, in a chunk, or with its splits on other threads. Positions outside a row's range never enter
 * its arithmetic: their scores are replaced by -infinity lane by lane, and V is only summed over the range.
 *
 * Roofline: decode reads K and V once for all heads of a group (2 x head_dim x 2 bytes per position against
 * 4 x group x head_dim operations): memory. Prefill reuses each K vector for 8 rows and each V vector for 4.
 *
 * Measured (Zen 5, one thread, CPU time, AVX-512; 14 heads over 2 KV heads of 64, bfloat16): 512 tokens 3.7 ms = 126
 * GFLOPS; decode at 512 positions 12 us, at 8192 194 us = 151 GFLOPS, 22 GB/s. AVX2: 7.1 ms, 22 us, 406 us. */

QF_INLINE vf load_kv(const void *p, size_t index, const qf_dtype dtype)
{
    return dtype == QF_DTYPE_F32 ? vf_load((const float *)p + index) : vf_load_bf16((const uint16_t *)p + index);
}

/* Scores of R rows against T tiles of sixteen keys. q: (head_dim, R). */
QF_INLINE void score_tiles(const void *const keys[2], const float *q, int32_t head_dim, float *scores,
                           const qf_dtype dtype, const int R, const int T)
{
    vf acc[QF_ATTENTION_ROWS][2];
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            acc[r][t] = vf_set1(0.0f);
        }
    }
    for (int32_t d = 0; d < head_dim; d++) {
        vf key[2];
        QF_UNROLL for (int t = 0; t < T; t++) {
            key[t] = load_kv(keys[t], (size_t)d * 16, dtype);
        }
        QF_UNROLL for (int r = 0; r < R; r++) {
            vf value = vf_set1(q[d * R + r]);
            QF_UNROLL for (int t = 0; t < T; t++) {
                acc[r][t] = vf_fma(value, key[t], acc[r][t]);
            }
        }
    }
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            vf_store(scores + r * QF_SPLIT_TOKENS + t * 16, acc[r][t]);
        }
    }
}

typedef void (*score_fn)(const void *const keys[2], const float *q, int32_t head_dim, float *scores);

#define QF_SCORE_FUNCTION(NAME, DTYPE, R, T)                                                                         \
    static void score_##NAME##_##R##_##T(const void *const keys[2], const float *q, int32_t head_dim, float *scores)  \
    {                                                                                                                \
        score_tiles(keys, q, head_dim, scores, DTYPE, R, T);                                                         \
    }
#define QF_SCORE_ROWS(R)                                                                                             \
    QF_SCORE_FUNCTION(f32, QF_DTYPE_F32, R, 1) QF_SCORE_FUNCTION(f32, QF_DTYPE_F32, R, 2)                            \
    QF_SCORE_FUNCTION(bf16, QF_DTYPE_BF16, R, 1) QF_SCORE_FUNCTION(bf16, QF_DTYPE_BF16, R, 2)
QF_SCORE_ROWS(1) QF_SCORE_ROWS(2) QF_SCORE_ROWS(3) QF_SCORE_ROWS(4)
QF_SCORE_ROWS(5) QF_SCORE_ROWS(6) QF_SCORE_ROWS(7) QF_SCORE_ROWS(8)

#define QF_SCORE_ENTRY(R) {{score_f32_##R##_1, score_f32_##R##_2}, {score_bf16_##R##_1, score_bf16_##R##_2}}
static const score_fn score_table[QF_ATTENTION_ROWS][2][2] = {
    QF_SCORE_ENTRY(1), QF_SCORE_ENTRY(2), QF_SCORE_ENTRY(3), QF_SCORE_ENTRY(4),
    QF_SCORE_ENTRY(5), QF_SCORE_ENTRY(6), QF_SCORE_ENTRY(7), QF_SCORE_ENTRY(8),
};

/* acc[r] += p[r][j] * V_j for `count` consecutive rows of V and head_dim components from `d`, N vectors of them. */
QF_INLINE void weigh_values(const void *values, size_t head_dim, int32_t count, const float *const p[4],
                            float *const acc[4], const qf_dtype dtype, const int R, const int N)
{
    vf sum[4][4];
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int n = 0; n < N; n++) {
            sum[r][n] = vf_load(acc[r] + 16 * n);
        }
    }
    for (int32_t j = 0; j < count; j++) {
        vf value[4];
        QF_UNROLL for (int n = 0; n < N; n++) {
            value[n] = load_kv(values, (size_t)j * head_dim + (size_t)n * 16, dtype);
        }
        QF_UNROLL for (int r = 0; r < R; r++) {
            vf weight = vf_set1(p[r][j]);
            QF_UNROLL for (int n = 0; n < N; n++) {
                sum[r][n] = vf_fma(weight, value[n], sum[r][n]);
            }
        }
    }
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int n = 0; n < N; n++) {
            vf_store(acc[r] + 16 * n, sum[r][n]);
        }
    }
}

/* The components past the last whole vector, one by one. */
static void weigh_tail(const void *values, int32_t head_dim, int32_t d, int32_t count, const float *p, float *acc,
                       qf_dtype dtype)
{
    for (; d < head_dim; d++) {
        float sum = acc[d];
        for (int32_t j = 0; j < count; j++) {
            size_t at = (size_t)j * (size_t)head_dim + (size_t)d;
            float value = dtype == QF_DTYPE_F32 ? ((const float *)values)[at]
                                                : qf_bf16_to_f32(((const uint16_t *)values)[at]);
            sum = __builtin_fmaf(p[j], value, sum);
        }
        acc[d] = sum;
    }
}

QF_INLINE void weigh_rows(const void *values, int32_t head_dim, int32_t count, const float *const p[4],
                          float *const acc[4], const qf_dtype dtype, const int R)
{
    const size_t size = dtype == QF_DTYPE_F32 ? 4 : 2;
    int32_t d = 0;
    for (; d + 16 <= head_dim;) {
        const void *from = (const char *)values + (size_t)d * size;
        float *to[4];
        QF_UNROLL for (int r = 0; r < R; r++) {
            to[r] = acc[r] + d;
        }
        if (d + 64 <= head_dim) {
            weigh_values(from, (size_t)head_dim, count, p, to, dtype, R, 4);
            d += 64;
        } else {
            weigh_values(from, (size_t)head_dim, count, p, to, dtype, R, 1);
            d += 16;
        }
    }
    for (int r = 0; r < R && d < head_dim; r++) {
        weigh_tail(values, head_dim, d, count, p[r], acc[r], dtype);
    }
}

typedef void (*weigh_fn)(const void *values, int32_t head_dim, int32_t count, const float *const p[4],
                         float *const acc[4]);

#define QF_WEIGH_FUNCTION(NAME, DTYPE, R)                                                                            \
    static void weigh_##NAME##_##R(const void *values, int32_t head_dim, int32_t count, const float *const p[4],      \
                                   float *const acc[4])                                                              \
    {                                                                                                                \
        weigh_rows(values, head_dim, count, p, acc, DTYPE, R);                                                       \
    }
#define QF_WEIGH_ROWS(R) QF_WEIGH_FUNCTION(f32, QF_DTYPE_F32, R) QF_WEIGH_FUNCTION(bf16, QF_DTYPE_BF16, R)
QF_WEIGH_ROWS(1) QF_WEIGH_ROWS(2) QF_WEIGH_ROWS(3) QF_WEIGH_ROWS(4)

static const weigh_fn weigh_table[4][2] = {
    {weigh_f32_1, weigh_bf16_1}, {weigh_f32_2, weigh_bf16_2}, {weigh_f32_3, weigh_bf16_3}, {weigh_f32_4, weigh_bf16_4},
};

/* Positions [begin, end) of the unpacked ones, which are from `unpacked` on. */
static void weigh_unpacked(int32_t head_dim, qf_attention_scratch *scratch, int row, int count, int32_t split_begin,
                           int32_t unpacked, int32_t begin, int32_t end)
{
    const float *p[4];
    float *acc[4];
    for (int r = 0; r < count; r++) {
        p[r] = scratch->scores[row + r] + (begin - split_begin);
        acc[r] = scratch->part[row + r].acc;
    }
    if (begin < end) {
        weigh_table[count - 1][0](scratch->values + (size_t)(begin - unpacked) * (size_t)head_dim, head_dim, end - begin,
                                  p, acc);
    }
}

/* Positions [begin, end) for rows [row, row + count), at most 4, all of which see all of them. */
static void weigh_range(const qf_kv_cache *cache, const qf_attention_rows *rows, qf_attention_scratch *scratch, int row,
                        int count, int32_t split_begin, int32_t unpacked, int32_t begin, int32_t end)
{
    if (qf_kv_is_low_bit(cache->format)) {
        weigh_unpacked(cache->head_dim, scratch, row, count, split_begin, unpacked, begin, end);
        return;
    }
    const size_t size = cache->dtype == QF_DTYPE_F32 ? 4 : 2;
    while (begin < end) {
        const int32_t offset = begin % cache->block_size;
        const int32_t run = cache->block_size - offset < end - begin ? cache->block_size - offset : end - begin;
        const size_t block = (size_t)rows->block_table[begin / cache->block_size - rows->first_block];
        const size_t first = (block * (size_t)cache->num_kv_heads + (size_t)rows->kv_head) * (size_t)cache->block_size +
                             (size_t)offset;
        const void *values = (const char *)cache->v + first * (size_t)cache->head_dim * size;
        const float *p[4];
        float *acc[4];
        for (int r = 0; r < count; r++) {
            p[r] = scratch->scores[row + r] + (begin - split_begin);
            acc[r] = scratch->part[row + r].acc;
        }
        weigh_table[count - 1][cache->dtype == QF_DTYPE_BF16](values, cache->head_dim, run, p, acc);
        begin += run;
    }
}

/* Positions [part_begin, part_end) of the split. Rows share the positions that all of them see; what only some see at
 * either end is done row by row, in the same ascending order. */
static void weigh_part(const qf_kv_cache *cache, const qf_attention_rows *rows, qf_attention_scratch *scratch,
                       int32_t split_begin, int32_t part_begin, int32_t part_end)
{
    for (int row = 0; row < rows->num_rows;) {
        const int count = rows->num_rows - row >= 4 ? 4 : rows->num_rows - row;
        int32_t common_first = part_begin, common_end = part_end;
        for (int r = row; r < row + count; r++) {
            common_first = rows->first[r] > common_first ? rows->first[r] : common_first;
            common_end = rows->end[r] < common_end ? rows->end[r] : common_end;
        }
        const bool shared = common_first < common_end;
        for (int r = row; r < row + count; r++) {
            const int32_t first = rows->first[r] > part_begin ? rows->first[r] : part_begin;
            const int32_t end = rows->end[r] < part_end ? rows->end[r] : part_end;
            weigh_range(cache, rows, scratch, r, 1, split_begin, part_begin, first, shared ? common_first : end);
        }
        if (shared) {
            weigh_range(cache, rows, scratch, row, count, split_begin, part_begin, common_first, common_end);
            for (int r = row; r < row + count; r++) {
                const int32_t end = rows->end[r] < part_end ? rows->end[r] : part_end;
                weigh_range(cache, rows, scratch, r, 1, split_begin, part_begin, common_end, end);
            }
        }
        row += count;
    }
}

/* The same of a low-bit cache: some sixteens of positions at a time are unpacked for all rows. first, end: what any of
 * them sees. */
static void weigh_packed(const qf_kv_cache *cache, const qf_attention_rows *rows, qf_attention_scratch *scratch,
                         int32_t split_begin, int32_t first, int32_t end)
{
    const size_t record_bytes = 16 * qf_kv_row_bytes(cache->format, cache->head_dim);
    const int32_t most = QF_UNPACKED_VALUES / cache->head_dim / 16 * 16;
    const unpack_values_fn unpack = unpack_values_table[cache->format - QF_KV_FP8_E4M3];
    for (int32_t begin = first / 16 * 16; begin < end; begin += most) {
        const int32_t part_end = begin + most < end ? begin + most : end;
        for (int32_t at = begin; at < part_end; at += 16) {
            if (at + 32 < end) {
                prefetch_record(find_record(cache, cache->v, rows, at + 32), record_bytes);
            }
            unpack(find_record(cache, cache->v, rows, at), cache->head_dim,
                   scratch->values + (size_t)(at - begin) * (size_t)cache->head_dim, &scratch->unpack);
        }
        weigh_part(cache, rows, scratch, split_begin, begin, part_end);
    }
}

/* Scores of the rows at the positions of the tiles that any of them sees: scores[row][position - begin]. */
static void score_split(const qf_kv_cache *cache, const qf_attention_rows *rows, const float *q,
                        float (*scores)[QF_SPLIT_TOKENS], int32_t split_begin, int32_t first, int32_t end)
{
    const size_t tile_bytes = (size_t)cache->head_dim * 16 * (cache->dtype == QF_DTYPE_F32 ? 4u : 2u);
    const int32_t tiles_per_block = cache->block_size / 16;
    const int32_t num_tiles = (end + 15) / 16;
    for (int32_t tile = first / 16; tile < num_tiles;) {
        const int count = num_tiles - tile >= 2 ? 2 : 1;
        const void *keys[2] = {NULL, NULL};
        for (int t = 0; t < count; t++) {
            const size_t block = (size_t)rows->block_table[(tile + t) / tiles_per_block - rows->first_block];
            const size_t index = (block * (size_t)cache->num_kv_heads + (size_t)rows->kv_head) *
                                     (size_t)tiles_per_block + (size_t)((tile + t) % tiles_per_block);
            keys[t] = (const char *)cache->k + index * tile_bytes;
        }
        score_table[rows->num_rows - 1][cache->dtype == QF_DTYPE_BF16][count - 1](
            keys, q, cache->head_dim, scores[0] + (tile * 16 - split_begin));
        tile += count;
    }
}

/* The same of a low-bit cache: tiles are unpacked for all rows. */
static void score_packed(const qf_kv_cache *cache, const qf_key_bias *key_bias, const qf_attention_rows *rows,
                         qf_attention_scratch *scratch, int32_t split_begin, int32_t first, int32_t end)
{
    const int32_t head_dim = cache->head_dim, num_tiles = (end + 15) / 16;
    const size_t record_bytes = 16 * qf_kv_row_bytes(cache->format, head_dim);
    const float *bias = key_bias->bias + (size_t)rows->kv_head * (size_t)head_dim;
    const unpack_keys_fn unpack = unpack_keys_table[cache->format - QF_KV_FP8_E4M3];
    const void *const keys[2] = {scratch->keys[0], scratch->keys[1]};
    int32_t turned = -1;
    for (int32_t tile = first / 16; tile < num_tiles;) {
        const int count = num_tiles - tile >= 2 ? 2 : 1;
        for (int t = 0; t < count; t++) {
            const int32_t at = (tile + t) * 16, bias_tile = at / QF_BIAS_TILE;
            if (bias_tile != turned) {
                rope_head(bias, key_bias->tile_turn + (size_t)bias_tile * (size_t)head_dim, scratch->turned_bias, head_dim);
                turned = bias_tile;
            }
            if (at + 32 < end) {
                prefetch_record(find_record(cache, cache->k, rows, at + 32), record_bytes);
            }
            unpack(find_record(cache, cache->k, rows, at), head_dim, scratch->turned_bias,
                   key_bias->step_turn + at % QF_BIAS_TILE, scratch->keys[t], &scratch->unpack);
        }
        score_table[rows->num_rows - 1][0][count - 1](keys, scratch->q, head_dim,
                                                      scratch->scores[0] + (tile * 16 - split_begin));
        tile += count;
    }
}

/* Scores to weights, for one row: max, exp, sum. first and end are the row's own, inside the split. */
static void softmax_row(float *scores, int32_t split_begin, int32_t first, int32_t end, qf_attention_partial *part)
{
    const float outside = -__builtin_inff();
    vf top = vf_set1(outside);
    for (int32_t at = first / 16 * 16; at < end; at += 16) {
        float *p = scores + (at - split_begin);
        vf s = vf_load(p);
        if (at < first || at + 16 > end) {
            s = vf_select_range(s, first - at, end - at, outside);
            vf_store(p, s);
        }
        top = vf_max(s, top);
    }
    part->max = vf_reduce_max(top);
    const vf max = vf_set1(part->max);
    vf sum = vf_set1(0.0f);
    for (int32_t at = first / 16 * 16; at < end; at += 16) {
        float *p = scores + (at - split_begin);
        vf weight = vf_exp(vf_sub(vf_load(p), max));
        vf_store(p, weight);
        sum = vf_add(sum, weight);
    }
    part->sum = vf_reduce_add(sum);
}

/* The positions of [begin, end) that any row sees; false: none. */
static bool seen_by_any(const qf_attention_rows *rows, int32_t begin, int32_t end, int32_t *first, int32_t *last)
{
    *first = end;
    *last = begin;
    for (int r = 0; r < rows->num_rows; r++) {
        if (rows->first[r] < rows->end[r]) {
            *first = rows->first[r] < *first ? rows->first[r] : *first;
            *last = rows->end[r] > *last ? rows->end[r] : *last;
        }
    }
    *first = *first < begin ? begin : *first;
    *last = *last > end ? end : *last;
    return *first < *last;
}

/* The rows with the positions that they read in 16 bits, and with the others. */
static void part_rows(const qf_attention_rows *rows, qf_attention_rows *old, qf_attention_rows *recent)
{
    *old = *rows;
    *recent = *rows;
    recent->block_table = rows->window_table;
    recent->first_block = rows->window_first_block;
    for (int r = 0; r < rows->num_rows; r++) {
        old->end[r] = rows->recent[r] < rows->end[r] ? rows->recent[r] : rows->end[r];
        recent->first[r] = rows->recent[r] > rows->first[r] ? rows->recent[r] : rows->first[r];
    }
}

/* scratch->scores of all positions of [begin, end) that a row sees. */
static void score_both(const qf_attention_args *args, const qf_attention_rows *old, const qf_attention_rows *recent,
                       qf_attention_scratch *scratch, int32_t begin, int32_t end)
{
    int32_t first, last;
    if (seen_by_any(old, begin, end, &first, &last)) {
        score_packed(&args->cache, &args->key_bias, old, scratch, begin, first, last);
    }
    if (!seen_by_any(recent, begin, end, &first, &last)) {
        return;
    }
    score_split(&args->window, recent, scratch->q, scratch->window_scores, begin, first, last);
    for (int r = 0; r < recent->num_rows; r++) {
        const int32_t from = recent->first[r] > begin ? recent->first[r] : begin;
        const int32_t to = recent->end[r] < end ? recent->end[r] : end;
        if (from < to) {
            memcpy(scratch->scores[r] + (from - begin), scratch->window_scores[r] + (from - begin),
                   (size_t)(to - from) * sizeof(float));
        }
    }
}

static void attention_split(const qf_attention_args *args, const qf_attention_rows *rows, qf_attention_scratch *scratch,
                            int32_t begin, int32_t end)
{
    const qf_kv_cache *cache = &args->cache;
    const bool packed = qf_kv_is_low_bit(cache->format);
    int32_t first, last;
    qf_attention_rows old, recent;
    if (!seen_by_any(rows, begin, end, &first, &last)) {
        return;
    }
    if (packed) {
        part_rows(rows, &old, &recent);
        score_both(args, &old, &recent, scratch, begin, end);
    } else {
        score_split(cache, rows, scratch->q, scratch->scores, begin, first, last);
    }
    for (int r = 0; r < rows->num_rows; r++) {
        const int32_t row_first = rows->first[r] > begin ? rows->first[r] : begin;
        const int32_t row_end = rows->end[r] < end ? rows->end[r] : end;
        if (row_first < row_end) {
            softmax_row(scratch->scores[r], begin, row_first, row_end, &scratch->part[r]);
            memset(scratch->part[r].acc, 0, (size_t)cache->head_dim * sizeof(float));
        }
    }
    if (!packed) {
        weigh_part(cache, rows, scratch, begin, begin, end);
        return;
    }
    if (seen_by_any(&old, begin, end, &first, &last)) {
        weigh_packed(cache, &old, scratch, begin, first, last);
    }
    if (seen_by_any(&recent, begin, end, &first, &last)) {
        weigh_part(&args->window, &recent, scratch, begin, begin, end);
    }
}

/* total = total merged with part, which comes later. A NaN maximum cannot arise: the maximum skips NaN scores, and
 * their weights are NaN. */
static void attention_merge(qf_attention_partial *total, const qf_attention_partial *part, int32_t head_dim)
{
    const float max = part->max > total->max ? part->max : total->max;
    float factors[16] = {total->max - max, part->max - max};
    vf_store(factors, vf_exp(vf_load(factors)));
    const vf keep = vf_set1(factors[0]), join = vf_set1(factors[1]);
    total->max = max;
    total->sum = __builtin_fmaf(part->sum, factors[1], total->sum * factors[0]);
    for (int32_t d = 0; d < head_dim; d += 16) {
        const int32_t left = head_dim - d;
        const vf kept = vf_mul(load_row(total->acc + d, left), keep);
        store_row(total->acc + d, vf_fma(load_row(part->acc + d, left), join, kept), left);
    }
}

static void attention_finish(const qf_attention_partial *total, float *out, int32_t head_dim)
{
    const vf inverse = vf_set1(1.0f / total->sum);
    for (int32_t d = 0; d < head_dim; d += 16) {
        store_row(out + d, vf_mul(load_row(total->acc + d, head_dim - d), inverse), head_dim - d);
    }
}
