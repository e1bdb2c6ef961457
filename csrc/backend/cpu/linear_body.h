/* Linear layers: out[m][c] = bias[c] + sum over k of x[m][k] * w[c][k], for 4-, 8-, 16- and 32-bit w.
 *
 * Quantised weights, int8 activations. In group g (G values of k):
 *   d   = sum of q_w * q_x - zero * sum of q_x              int32, exact in any order
 *   acc = fma(d, scale_w * scale_x, acc)                    float32, g ascending
 * Float activations: acc = fma(x[k], scale_w * (q_w - zero), acc), k ascending; dense weights likewise.
 * One output's float operations come in this order whatever the number of rows, tiles or threads.
 *
 * A register block is R rows by T tiles of 16 outputs. Per line of 64 weight bytes (16 outputs x 8 values of k at
 * 4 bits): one load, two ands and a shift, then 2 R dot instructions with x broadcast from memory.
 *
 *            tile t (16 outputs)  tile t+1
 *   row 0    acc[0][0]            acc[0][1]         x: (k / 4, R, 4) int8, read in sequence
 *   ...      ...                  ...               w: records of the pair in sequence: one stream
 *   row R-1  acc[R-1][0]          acc[R-1][1]
 *
 * Roofline: 1 row reads 4.25 bits per weight (G 128) and is bound by memory; from about 8 rows on the dot
 * instructions bound it: 64 multiply-adds each, two per cycle. R 8, T 2 makes 16 independent accumulators (latency
 * 4, two per cycle: 8 would do) and 10 loads per 16 dots.
 *
 * Measured (Zen 5, 2 cores, AVX-512 VNNI, November 2026; all layers and a 4-bit head of the 0.5B shape, 262 MB):
 *   2 threads, wall time:  1 row 7.2 ms = 36.6 GB/s, 95 % of a plain read of as many bytes; 8 rows 10.6 ms (5.4 x)
 *   1 thread, CPU time:    1 row 33.9 GB/s, 88 %; 8 rows 12.1 ms; 512 rows 0.73 TOPS, 72 % of a loop of dots alone,
 *                          rounding the activations included. AVX2: 1 row 28.9 GB/s, 512 rows 0.22 TOPS.
 * Tried and lost: one stream per tile (records of a tile in sequence): the first lines of every second tile miss,
 * 4 rows 12.8 instead of 8.9 ms; records of two tiles alternating by group: 1 row 24 GB/s, the order of addresses
 * defeats the prefetcher; prefetching 1 KB ahead: 30 GB/s; 4 or 8 KB: like 2. */

#define QF_PREFETCH_BYTES 2048

/* --- activations to int8 ------------------------------------------------------------------------------- */

/* scale = amax / 127, q = nearest even of x * (127 / amax). A group that holds an infinity or NaN gets the scale NaN,
 * so that it shows in every output. */
static void quantize_group(const float *x, int32_t count, int32_t group_size, int32_t rows, int8_t *q, float *scale,
                           int32_t *sum)
{
    const vi magnitude = vi_set1(0x7fffffff);
    vi top = vi_set1(0); /* floats of one sign compare like integers, NaN above all */
    for (int32_t i = 0; i < count; i += 16) {
        vf v = count - i >= 16 ? vf_load(x + i) : vf_load_part(x + i, count - i);
        top = vi_max(top, vi_and(vi_bits(v), magnitude));
    }
    const float amax = qf_bits_f32((uint32_t)vi_reduce_max(top));
    const bool finite = amax <= 3.402823466e38f;
    const bool usable = finite && amax >= 0x1p-100f; /* 127 / amax must be finite */
    const vf inverse = vf_set1(usable ? 127.0f / amax : 0.0f);
    *scale = finite ? (usable ? amax / 127.0f : 0.0f) : qf_bits_f32(0x7fc00000u);
    vi total = vi_set1(0);
    for (int32_t i = 0; i < group_size; i += 16) {
        int32_t left = count - i < 0 || !usable ? 0 : count - i;
        vf v = left >= 16 ? vf_load(x + i) : left > 0 ? vf_load_part(x + i, left) : vf_set1(0.0f);
        vi rounded = vi_round_vf(vf_mul(v, inverse));
        total = vi_add(total, rounded);
        const int32_t quads = group_size - i >= 16 ? 4 : (group_size - i) / 4;
        if (rows == 1 && quads == 4) {
            vi_store_s8(q + i, rounded);
            continue;
        }
        int8_t bytes[16];
        vi_store_s8(bytes, rounded);
        for (int32_t j = 0; j < quads; j++) {
            memcpy(q + (size_t)(i / 4 + j) * (size_t)rows * 4, bytes + 4 * j, 4);
        }
    }
    *sum = (int32_t)vf_reduce_add(vf_from_vi(total)); /* at most 128 * 127: exact */
}

static void quantize_rows(const float *x, int32_t rows, int32_t k, int32_t group_size, int32_t num_groups, int8_t *q,
                          float *scales, int32_t *sums)
{
    for (int32_t g = 0; g < num_groups; g++) {
        int32_t begin = g * group_size;
        int32_t count = k - begin < group_size ? k - begin : group_size;
        for (int32_t r = 0; r < rows; r++) {
            size_t at = (size_t)g * (size_t)rows + (size_t)r;
            quantize_group(x + (size_t)r * (size_t)k + begin, count, group_size, rows,
                           q + (size_t)begin * (size_t)rows + (size_t)r * 4, scales + at, sums + at);
        }
    }
}

/* --- quantised weights, int8 activations --------------------------------------------------------------- */

QF_INLINE void store_tile(const qf_cpu_linear *w, int32_t tile, float *out, vf value)
{
    const int32_t column = tile * QF_TILE;
    if (column >= w->n) {
        return; /* the tile that makes their number even */
    }
    if (w->bias != NULL) {
        value = vf_add(value, vf_load(w->bias + column));
    }
    if (w->n - column >= QF_TILE) {
        vf_store(out + column, value);
    } else {
        vf_store_part(out + column, value, w->n - column);
    }
}

QF_INLINE vf record_scales(const uint8_t *record, bool wide)
{
    return wide ? vf_load((const float *)(const void *)record)
                : vf_load_f16((const uint16_t *)(const void *)record);
}

/* One R x T block over all of k. bits, R and T are constants after inlining. */
QF_INLINE void i8_block(const qf_cpu_linear *w, const int8_t *q, const float *scales, const int32_t *sums, float *out,
                        int32_t tile, const int bits, const int R, const int T)
{
    const int split = R * T <= 4; /* few accumulators: two each, so that latency does not bind */
    const vi low = vi_set1(0x0f0f0f0f);
    const int32_t num_lines = w->group_size / (bits == 4 ? 8 : 4);
    const size_t header = w->header_bytes;
    const uint8_t *record = qf_cpu_pair(w, tile);
    const size_t odd = (size_t)(tile % 2);
    vf total[QF_MAX_ROWS][2];
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            total[r][t] = vf_set1(0.0f);
        }
    }
    for (int32_t g = 0; g < w->num_groups; g++, record += w->record_bytes) {
        vi acc[QF_MAX_ROWS][2][2];
        QF_UNROLL for (int r = 0; r < R; r++) {
            QF_UNROLL for (int t = 0; t < T; t++) {
                acc[r][t][0] = vi_set1(0);
                acc[r][t][1] = vi_set1(0);
            }
        }
        const uint8_t *line = record + 2 * header + odd * 64;
        for (int32_t i = 0; i < num_lines; i++, line += 128) {
            vi lo[2], hi[2];
            QF_UNROLL for (int t = 0; t < T; t++) {
                const vi both = vi_load(line + 64 * t);
                v_prefetch(line + 64 * t + QF_PREFETCH_BYTES);
                lo[t] = bits == 4 ? vi_and(both, low) : both;
                hi[t] = bits == 4 ? vi_and(vi_srl(both, 4), low) : both;
            }
            QF_UNROLL for (int r = 0; r < R; r++) {
                const vi x = vi_set1_4u8(q + 4 * r);
                const vi x_hi = bits == 4 ? vi_set1_4u8(q + 4 * R + 4 * r) : x;
                QF_UNROLL for (int t = 0; t < T; t++) {
                    if (bits == 4) {
                        vi_dot_u4(&acc[r][t][0], &acc[r][t][split], lo[t], x, hi[t], x_hi);
                    } else {
                        acc[r][t][0] = vi_dot_u8(acc[r][t][0], lo[t], x);
                    }
                }
            }
            q += bits == 4 ? 8 * R : 4 * R;
        }
        QF_UNROLL for (int t = 0; t < T; t++) {
            const uint8_t *own = record + ((size_t)t + odd) * header;
            const vf scale = record_scales(own, w->wide_scales);
            const vi zero = vi_load_u8(own + header / 2);
            v_prefetch(own + QF_PREFETCH_BYTES);
            QF_UNROLL for (int r = 0; r < R; r++) {
                vi dot = split && bits == 4 ? vi_add(acc[r][t][0], acc[r][t][1]) : acc[r][t][0];
                dot = vi_sub(dot, vi_mul(zero, vi_set1(sums[r])));
                total[r][t] = vf_fma(vf_from_vi(dot), vf_mul(scale, vf_set1(scales[r])), total[r][t]);
            }
        }
        scales += R;
        sums += R;
    }
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            store_tile(w, tile + t, out + (size_t)r * (size_t)w->n, total[r][t]);
        }
    }
}

/* A pair of tiles: together, or one after the other where the registers would not hold R x 2 accumulators. */
#define QF_I8_FUNCTION(BITS, R)                                                                                      \
    static void i8_block_##BITS##_##R(const qf_cpu_linear *w, const int8_t *q, const float *scales,                   \
                                      const int32_t *sums, float *out, int32_t tile)                                 \
    {                                                                                                                \
        if ((R) <= QF_TWO_TILE_ROWS) {                                                                               \
            i8_block(w, q, scales, sums, out, tile, BITS, R, 2);                                                     \
        } else {                                                                                                     \
            i8_block(w, q, scales, sums, out, tile, BITS, R, 1);                                                     \
            i8_block(w, q, scales, sums, out, tile + 1, BITS, R, 1);                                                 \
        }                                                                                                            \
    }
#define QF_I8_ROWS(R) QF_I8_FUNCTION(4, R) QF_I8_FUNCTION(8, R)
QF_FOR_EACH_ROW_COUNT(QF_I8_ROWS)

typedef void (*i8_block_fn)(const qf_cpu_linear *w, const int8_t *q, const float *scales, const int32_t *sums,
                            float *out, int32_t tile);

#define QF_I8_ENTRY(R) {i8_block_4_##R, i8_block_8_##R},
static const i8_block_fn i8_blocks[QF_ROWS_PER_BLOCK][2] = {QF_FOR_EACH_ROW_COUNT(QF_I8_ENTRY)};

static void linear_i8(const qf_linear_operands *op, int32_t tile_begin, int32_t tile_end)
{
    const qf_cpu_linear *w = op->linear;
    const size_t k_padded = (size_t)w->num_groups * (size_t)w->group_size;
    for (int32_t tile = tile_begin; tile < tile_end; tile += 2) {
        for (int32_t row = op->row_begin; row < op->row_end; row += QF_ROWS_PER_BLOCK) {
            int32_t rows = op->num_tokens - row < QF_ROWS_PER_BLOCK ? op->num_tokens - row : QF_ROWS_PER_BLOCK;
            size_t groups_before = (size_t)row * (size_t)w->num_groups;
            i8_blocks[rows - 1][w->kind == QF_WEIGHT_W8](
                w, op->q + (size_t)row * k_padded, op->scales + groups_before, op->sums + groups_before,
                op->out + (size_t)row * (size_t)w->n, tile);
        }
    }
}

/* --- float activations --------------------------------------------------------------------------------- */

QF_INLINE vf load_weights(const uint8_t *p, const qf_weight_kind kind)
{
    return kind == QF_WEIGHT_F32    ? vf_load((const float *)(const void *)p)
           : kind == QF_WEIGHT_BF16 ? vf_load_bf16((const uint16_t *)(const void *)p)
                                    : vf_load_f16((const uint16_t *)(const void *)p);
}

QF_INLINE void dense_block(const qf_cpu_linear *w, const float *x, float *out, int32_t tile,
                           const qf_weight_kind kind, const int R, const int T)
{
    const size_t step = kind == QF_WEIGHT_F32 ? 64 : 32;
    const uint8_t *p = w->weights + (size_t)tile * w->tile_bytes;
    vf acc[QF_MAX_ROWS][2];
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            acc[r][t] = vf_set1(0.0f);
        }
    }
    for (int32_t k = 0; k < w->k; k++, p += step) {
        vf weight[2];
        QF_UNROLL for (int t = 0; t < T; t++) {
            weight[t] = load_weights(p + (size_t)t * w->tile_bytes, kind);
            v_prefetch(p + (size_t)t * w->tile_bytes + QF_PREFETCH_BYTES);
        }
        QF_UNROLL for (int r = 0; r < R; r++) {
            vf value = vf_set1(x[(size_t)r * (size_t)w->k + (size_t)k]);
            QF_UNROLL for (int t = 0; t < T; t++) {
                acc[r][t] = vf_fma(value, weight[t], acc[r][t]);
            }
        }
    }
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            store_tile(w, tile + t, out + (size_t)r * (size_t)w->n, acc[r][t]);
        }
    }
}

/* Quantised weights, float activations: values are unpacked in registers, in order of k. */
QF_INLINE void dequant_block(const qf_cpu_linear *w, const float *x, float *out, int32_t tile, const int bits,
                             const int R, const int T)
{
    const int per_line = bits == 4 ? 8 : 4;
    const size_t header = w->header_bytes, odd = (size_t)(tile % 2);
    const uint8_t *record = qf_cpu_pair(w, tile);
    const vi mask = vi_set1(bits == 4 ? 0x0f : 0xff);
    vf acc[QF_MAX_ROWS][2];
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            acc[r][t] = vf_set1(0.0f);
        }
    }
    for (int32_t g = 0; g < w->num_groups; g++, record += w->record_bytes) {
        const int32_t end = (g + 1) * w->group_size < w->k ? (g + 1) * w->group_size : w->k;
        const uint8_t *line = record + 2 * header + odd * 64;
        vf scale[2];
        vi zero[2];
        QF_UNROLL for (int t = 0; t < T; t++) {
            const uint8_t *own = record + ((size_t)t + odd) * header;
            scale[t] = record_scales(own, w->wide_scales);
            zero[t] = vi_load_u8(own + header / 2);
        }
        for (int32_t k0 = g * w->group_size; k0 < end; k0 += per_line, line += 128) {
            vi packed[2], bytes[2]; /* low nibbles are k0 .. k0 + 3, high ones k0 + 4 .. k0 + 7 */
            QF_UNROLL for (int t = 0; t < T; t++) {
                packed[t] = bytes[t] = vi_load(line + 64 * t);
                v_prefetch(line + 64 * t + QF_PREFETCH_BYTES);
            }
            for (int32_t i = 0; i < per_line && k0 + i < end; i++) {
                vf weight[2];
                QF_UNROLL for (int t = 0; t < T; t++) {
                    bytes[t] = i == 4 ? vi_srl(packed[t], 4) : bytes[t];
                    weight[t] = vf_mul(scale[t], vf_from_vi(vi_sub(vi_and(bytes[t], mask), zero[t])));
                    bytes[t] = vi_srl(bytes[t], 8);
                }
                QF_UNROLL for (int r = 0; r < R; r++) {
                    const vf value = vf_set1(x[(size_t)r * (size_t)w->k + (size_t)(k0 + i)]);
                    QF_UNROLL for (int t = 0; t < T; t++) {
                        acc[r][t] = vf_fma(value, weight[t], acc[r][t]);
                    }
                }
            }
        }
    }
    QF_UNROLL for (int r = 0; r < R; r++) {
        QF_UNROLL for (int t = 0; t < T; t++) {
            store_tile(w, tile + t, out + (size_t)r * (size_t)w->n, acc[r][t]);
        }
    }
}

/* One or two tiles from `tile` on: together, or one after the other where the registers would not hold them. */
QF_INLINE void f32_block(const qf_cpu_linear *w, const float *x, float *out, int32_t tile, int32_t tiles, const int R)
{
#define QF_BLOCK(KIND, BLOCK, ARG)                                                                                   \
    if (w->kind == (KIND)) {                                                                                         \
        if (tiles == 2 && (R <= QF_TWO_TILE_ROWS || (KIND) <= QF_WEIGHT_F16)) {                                      \
            BLOCK(w, x, out, tile, (ARG), R, 2);                                                                     \
            return;                                                                                                  \
        }                                                                                                            \
        for (int32_t t = 0; t < tiles; t++) {                                                                        \
            BLOCK(w, x, out, tile + t, (ARG), R, 1);                                                                 \
        }                                                                                                            \
        return;                                                                                                      \
    }
    QF_BLOCK(QF_WEIGHT_F32, dense_block, QF_WEIGHT_F32)
    QF_BLOCK(QF_WEIGHT_BF16, dense_block, QF_WEIGHT_BF16)
    QF_BLOCK(QF_WEIGHT_F16, dense_block, QF_WEIGHT_F16)
    QF_BLOCK(QF_WEIGHT_W8, dequant_block, 8)
    QF_BLOCK(QF_WEIGHT_W4, dequant_block, 4)
#undef QF_BLOCK
}

#define QF_F32_FUNCTION(R)                                                                                           \
    static void f32_block_##R(const qf_cpu_linear *w, const float *x, float *out, int32_t tile, int32_t tiles)        \
    {                                                                                                                \
        f32_block(w, x, out, tile, tiles, R);                                                                        \
    }
QF_FOR_EACH_ROW_COUNT(QF_F32_FUNCTION)

typedef void (*f32_block_fn)(const qf_cpu_linear *w, const float *x, float *out, int32_t tile, int32_t tiles);

#define QF_F32_ENTRY(R) f32_block_##R,
static const f32_block_fn f32_blocks[QF_ROWS_PER_BLOCK] = {QF_FOR_EACH_ROW_COUNT(QF_F32_ENTRY)};

static void linear_f32(const qf_linear_operands *op, int32_t tile_begin, int32_t tile_end)
{
    const qf_cpu_linear *w = op->linear;
    for (int32_t tile = tile_begin; tile < tile_end; tile += 2) {
        const int32_t tiles = tile_end - tile >= 2 ? 2 : 1;
        for (int32_t row = op->row_begin; row < op->row_end; row += QF_ROWS_PER_BLOCK) {
            int32_t rows = op->num_tokens - row < QF_ROWS_PER_BLOCK ? op->num_tokens - row : QF_ROWS_PER_BLOCK;
            f32_blocks[rows - 1](w, op->x + (size_t)row * (size_t)w->k, op->out + (size_t)row * (size_t)w->n, tile,
                                 tiles);
        }
    }
}
