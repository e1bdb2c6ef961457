/* sources: backend/cpu/isa.c backend/cpu/context.c backend/cpu/elementwise.c backend/cpu/attention.c backend/cpu/kernels_scalar.c backend/cpu/kernels_avx2.c backend/cpu/kernels_avx512.c backend/cpu/kernels_avx512_vnni.c base/threads.c base/cpu_count.c base/status.c base/alloc.c base/dtype.c */
/* sanitizers: address thread */
#include "cpu_ops.h"

static test_machine machine;

static void fill(float *p, size_t count, float scale)
{
    for (size_t i = 0; i < count; i++) {
        p[i] = random_normal() * scale;
    }
}

static bool close_to(float actual, double expected, double tolerance)
{
    return fabs((double)actual - expected) <= tolerance;
}

/* --- row ops -------------------------------------------------------------------------------------------- */

static void test_rmsnorm(void)
{
    static const int32_t sizes[] = {1, 2, 17, 118, 896};
    enum { ROWS = 33, MAX = 896 };
    float *base = test_floats(ROWS * MAX), *residual = test_floats(ROWS * MAX), *delta = test_floats(ROWS * MAX);
    float *weight = test_floats(MAX), *out = test_floats(ROWS * MAX), *first = test_floats(ROWS * MAX);
    for (int s = 0; s < 5; s++) {
        const int32_t n = sizes[s];
        const size_t count = ROWS * (size_t)n;
        fill(base, count, 100.0f);
        fill(delta, count, 10.0f);
        fill(weight, (size_t)n, 1.0f);
        for (int isa = 0; isa < machine.num_isas; isa++) {
            for (int32_t rows = 1; rows <= ROWS; rows += 32) {
                memcpy(residual, base, count * sizeof *base);
                poison(out, count);
                qf_rmsnorm_args args = {residual, delta, weight, out, rows, n, 1e-6f};
                qf_cpu_rmsnorm(machine.contexts[isa][1], &args);
                if (isa == 0 && rows == 1) {
                    memcpy(first, out, (size_t)n * sizeof *out);
                }
                CHECK(same_bits(out, first, (size_t)n));
            }
            for (size_t t = 0; t < ROWS; t++) {
                double squares = 0.0;
                for (size_t i = 0; i < (size_t)n; i++) {
                    const double v = (double)(base[t * (size_t)n + i] + delta[t * (size_t)n + i]);
                    CHECK(close_to(residual[t * (size_t)n + i], v, 0.0));
                    squares += v * v;
                }
                const double inverse = 1.0 / sqrt(squares / n + 1e-6);
                for (size_t i = 0; i < (size_t)n; i++) {
                    const double v = (double)residual[t * (size_t)n + i] * inverse * (double)weight[i];
                    CHECK(close_to(out[t * (size_t)n + i], v, 1e-6 * fabs(v)));
                }
            }
            /* No delta: the residual stays; no out: only the addition. */
            qf_rmsnorm_args norm_only = {residual, NULL, weight, out, ROWS, n, 1e-6f};
            memcpy(residual, base, count * sizeof *base);
            qf_cpu_rmsnorm(machine.contexts[isa][0], &norm_only);
            CHECK(same_bits(residual, base, count));
            qf_rmsnorm_args add_only = {residual, delta, weight, NULL, ROWS, n, 1e-6f};
            qf_cpu_rmsnorm(machine.contexts[isa][0], &add_only);
            CHECK(residual[count - 1] == base[count - 1] + delta[count - 1]);
        }
    }
    free(base);
    free(residual);
    free(delta);
    free(weight);
    free(out);
    free(first);
}

static void test_silu_mul(void)
{
    enum { ROWS = 3, N = 4867 };
    float *gate = test_floats(ROWS * N), *up = test_floats(ROWS * N), *out = test_floats(ROWS * N);
    float *scalar = test_floats(ROWS * N);
    fill(gate, ROWS * N, 20.0f);
    fill(up, ROWS * N, 1.0f);
    static const float special[] = {0.0f, 100.0f, -100.0f, 88.8f, -88.8f, -1e30f, 1e30f, 1e-30f, -87.4f, 87.4f};
    memcpy(gate, special, sizeof special);
    for (int isa = 0; isa < machine.num_isas; isa++) {
        poison(out, ROWS * N);
        qf_silu_mul_args args = {gate, up, out, ROWS, N};
        qf_cpu_silu_mul(machine.contexts[isa][1], &args);
        if (isa == 0) {
            memcpy(scalar, out, ROWS * N * sizeof *out);
        }
        CHECK(same_bits(out, scalar, ROWS * N));
        for (int i = 0; i < ROWS * N; i++) {
            const double expected = (double)gate[i] / (1.0 + exp(-(double)gate[i])) * (double)up[i];
            CHECK(close_to(out[i], expected, 1e-6 * fabs(expected) + 1e-30));
        }
        float in_place[20] = {NAN, 1.0f};
        qf_silu_mul_args alias = {in_place, up, in_place, 1, 20};
        qf_cpu_silu_mul(machine.contexts[isa][0], &alias);
        CHECK(isnan(in_place[0]));
        CHECK(close_to(in_place[1], (double)up[1] / (1.0 + exp(-1.0)), 1e-6));
    }
    free(gate);
    free(up);
    free(out);
    free(scalar);
}

static void test_embedding(void)
{
    static const qf_dtype dtypes[] = {QF_DTYPE_F32, QF_DTYPE_BF16, QF_DTYPE_F16};
    enum { VOCAB = 11, N = 37 };
    const int32_t ids[5] = {10, 0, 3, 3, 7};
    float values[VOCAB * N], out[5 * N];
    uint16_t halves[VOCAB * N];
    for (int d = 0; d < 3; d++) {
        for (int i = 0; i < VOCAB * N; i++) {
            values[i] = random_normal();
            halves[i] = d == 1 ? qf_f32_to_bf16(values[i]) : qf_f32_to_f16(values[i]);
            values[i] = d == 0 ? values[i] : d == 1 ? qf_bf16_to_f32(halves[i]) : qf_f16_to_f32(halves[i]);
        }
        for (int isa = 0; isa < machine.num_isas; isa++) {
            poison(out, 5 * N);
            qf_embedding_args args = {d == 0 ? (const void *)values : halves, dtypes[d], ids, out, 5, N};
            qf_cpu_embedding(machine.contexts[isa][1], &args);
            for (int t = 0; t < 5; t++) {
                CHECK(same_bits(out + t * N, values + ids[t] * N, N));
            }
        }
    }
}

/* --- the cache ------------------------------------------------------------------------------------------ */

typedef struct test_cache {
    qf_kv_cache kv;
    size_t bytes;
} test_cache;

static void cache_init(test_cache *c, qf_dtype dtype, int32_t num_blocks, int32_t block_size, int32_t kv_heads,
                       int32_t head_dim)
{
    c->bytes = qf_cpu_kv_cache_bytes(num_blocks, block_size, kv_heads, head_dim,
                                     dtype == QF_DTYPE_F32 ? QF_KV_F32 : QF_KV_BF16);
    qf_kv_cache kv = {test_alloc(c->bytes), test_alloc(c->bytes), dtype, num_blocks, block_size, kv_heads, head_dim,
                      QF_KV_AUTO};
    memset(kv.k, 0xff, c->bytes); /* NaN in both types */
    memset(kv.v, 0xff, c->bytes);
    c->kv = kv;
}

static void cache_free(test_cache *c)
{
    free(c->kv.k);
    free(c->kv.v);
}

static float cache_read(const void *p, qf_dtype dtype, size_t at)
{
    return dtype == QF_DTYPE_F32 ? ((const float *)p)[at] : qf_bf16_to_f32(((const uint16_t *)p)[at]);
}

static float read_k(const qf_kv_cache *kv, int32_t slot, int32_t head, int32_t d)
{
    const int32_t block = slot / kv->block_size, offset = slot % kv->block_size;
    const int32_t tile = (block * kv->num_kv_heads + head) * (kv->block_size / 16) + offset / 16;
    return cache_read(kv->k, kv->dtype, (size_t)((tile * kv->head_dim + d) * 16 + offset % 16));
}

static float read_v(const qf_kv_cache *kv, int32_t slot, int32_t head, int32_t d)
{
    const int32_t block = slot / kv->block_size, offset = slot % kv->block_size;
    const int32_t row = (block * kv->num_kv_heads + head) * kv->block_size + offset;
    return cache_read(kv->v, kv->dtype, (size_t)(row * kv->head_dim + d));
}

static float stored(float value, qf_dtype dtype)
{
    return dtype == QF_DTYPE_F32 ? value : qf_bf16_to_f32(qf_f32_to_bf16(value));
}

static void test_rope(void)
{
    static const int32_t head_dims[] = {2, 10, 64, 80, 128, 256};
    enum { TOKENS = 7, HEADS = 4, KV_HEADS = 2, MAX = 256 };
    const int32_t slots[TOKENS] = {95, 0, 17, 33, 32, 64, 50};
    float *q0 = test_floats(TOKENS * HEADS * MAX), *q = test_floats(TOKENS * HEADS * MAX);
    float *k = test_floats(TOKENS * KV_HEADS * MAX), *v = test_floats(TOKENS * KV_HEADS * MAX);
    float *cos_sin = test_floats(TOKENS * MAX), *scalar = test_floats(TOKENS * HEADS * MAX);
    for (int h = 0; h < 6; h++) {
        const int32_t hd = head_dims[h], half = hd / 2;
        fill(q0, (size_t)(TOKENS * HEADS * hd), 1.0f);
        fill(k, (size_t)(TOKENS * KV_HEADS * hd), 1.0f);
        fill(v, (size_t)(TOKENS * KV_HEADS * hd), 1.0f);
        for (int i = 0; i < TOKENS * hd; i++) {
            cos_sin[i] = i % hd < half ? cosf((float)i) : sinf((float)(i - half));
        }
        for (int isa = 0; isa < machine.num_isas; isa++) {
            const qf_dtype dtype = isa % 2 == 0 ? QF_DTYPE_BF16 : QF_DTYPE_F32;
            test_cache c;
            cache_init(&c, dtype, 3, 32, KV_HEADS, hd);
            memcpy(q, q0, (size_t)(TOKENS * HEADS * hd) * sizeof *q);
            qf_rope_kv_write_args args = {.q = q, .k = k, .v = v, .cos_sin = cos_sin, .slot_mapping = slots, .cache = c.kv,
                                          .num_tokens = TOKENS, .num_heads = HEADS};
            qf_cpu_rope_kv_write(machine.contexts[isa][1], &args);
            if (isa == 0) {
                memcpy(scalar, q, (size_t)(TOKENS * HEADS * hd) * sizeof *q);
            }
            CHECK(same_bits(q, scalar, (size_t)(TOKENS * HEADS * hd)));
            int written = 0;
            for (int32_t slot = 0; slot < 96; slot++) {
                written += !isnan(read_k(&c.kv, slot, 0, hd - 1)) && !isnan(read_v(&c.kv, slot, 1, 0));
            }
            CHECK_INT(written, TOKENS);
            for (int t = 0; t < TOKENS; t++) {
                for (int j = 0; j < half; j++) {
                    const double cs = (double)cos_sin[t * hd + j], sn = (double)cos_sin[t * hd + half + j];
                    for (int head = 0; head < HEADS; head++) {
                        const int at = (t * HEADS + head) * hd + j;
                        const double a = (double)q0[at], b = (double)q0[at + half];
                        CHECK(close_to(q[at], a * cs - b * sn, 1e-6));
                        CHECK(close_to(q[at + half], b * cs + a * sn, 1e-6));
                    }
                    for (int head = 0; head < KV_HEADS; head++) {
                        const int at = (t * KV_HEADS + head) * hd + j;
                        const double a = (double)k[at], b = (double)k[at + half];
                        const double tolerance = dtype == QF_DTYPE_F32 ? 1e-6 : 0.01 * (1.0 + fabs(a) + fabs(b));
                        CHECK(close_to(read_k(&c.kv, slots[t], head, j), a * cs - b * sn, tolerance));
                        CHECK(close_to(read_k(&c.kv, slots[t], head, j + half), b * cs + a * sn, tolerance));
                        CHECK(read_v(&c.kv, slots[t], head, j) == stored(v[at], dtype));
                        CHECK(read_v(&c.kv, slots[t], head, j + half) == stored(v[at + half], dtype));
                    }
                }
            }
            cache_free(&c);
        }
    }
    free(q0);
    free(q);
    free(k);
    free(v);
    free(cos_sin);
    free(scalar);
}

/* --- attention ------------------------------------------------------------------------------------------ */

typedef struct attention_case {
    int32_t heads, kv_heads, head_dim, block_size, length, window;
    qf_dtype dtype;
} attention_case;

/* One sequence's queries, keys and values, and two caches that hold the same under different block tables. */
typedef struct attention_data {
    attention_case shape;
    float *q, *k, *v; /* (length, heads or kv_heads, head_dim) */
    test_cache caches[2];
    int32_t *tables[2];
    int32_t num_blocks;
} attention_data;

static void attention_init(attention_data *d, const attention_case *shape)
{
    const size_t hd = (size_t)shape->head_dim, length = (size_t)shape->length;
    const size_t kv_count = length * (size_t)shape->kv_heads * hd;
    d->shape = *shape;
    d->q = test_floats(length * (size_t)shape->heads * hd);
    d->k = test_floats(kv_count);
    d->v = test_floats(kv_count);
    fill(d->q, length * (size_t)shape->heads * hd, 1.5f);
    fill(d->k, kv_count, 1.5f);
    fill(d->v, kv_count, 1.0f);
    d->num_blocks = (shape->length + shape->block_size - 1) / shape->block_size;
    float *cos_sin = test_floats(length * hd), *scratch = test_floats(length * (size_t)shape->heads * hd);
    int32_t *slots = test_alloc(length * sizeof *slots);
    for (size_t i = 0; i < length * hd; i++) {
        cos_sin[i] = i % hd < hd / 2 ? 1.0f : 0.0f;
    }
    for (int c = 0; c < 2; c++) {
        d->tables[c] = test_alloc((size_t)d->num_blocks * sizeof(int32_t));
        for (int32_t b = 0; b < d->num_blocks; b++) {
            d->tables[c][b] = c == 0 ? b : d->num_blocks - b; /* block 0 stays unused in the second */
        }
        for (int32_t t = 0; t < shape->length; t++) {
            slots[t] = d->tables[c][t / shape->block_size] * shape->block_size + t % shape->block_size;
        }
        cache_init(&d->caches[c], shape->dtype, d->num_blocks + 1, shape->block_size, shape->kv_heads,
                   shape->head_dim);
        qf_rope_kv_write_args args = {.q = scratch, .k = d->k, .v = d->v, .cos_sin = cos_sin, .slot_mapping = slots,
                                      .cache = d->caches[c].kv, .num_tokens = shape->length,
                                      .num_heads = shape->heads};
        qf_cpu_rope_kv_write(machine.contexts[0][0], &args);
    }
    free(cos_sin);
    free(scratch);
    free(slots);
}

static void attention_free(attention_data *d)
{
    free(d->q);
    free(d->k);
    free(d->v);
    for (int c = 0; c < 2; c++) {
        cache_free(&d->caches[c]);
        free(d->tables[c]);
    }
}

/* Rows [begin, end) of the sequence as one chunk; out is the whole sequence's. */
static void attend(const attention_data *d, qf_cpu_context *ctx, int cache, int32_t begin, int32_t end, float *out)
{
    const size_t row = (size_t)d->shape.heads * (size_t)d->shape.head_dim;
    const int32_t starts[2] = {0, end - begin};
    qf_attention_args args = {
        .q = d->q + (size_t)begin * row, .out = out + (size_t)begin * row, .cache = d->caches[cache].kv,
        .query_start_loc = starts, .seq_lens = &end, .block_tables = d->tables[cache],
        .block_table_stride = d->num_blocks, .num_seqs = 1, .num_heads = d->shape.heads,
        .sliding_window = d->shape.window, .scale = 1.0f / sqrtf((float)d->shape.head_dim)};
    qf_cpu_attention(ctx, &args);
}

static void check_attention(const attention_data *d, const float *out)
{
    const attention_case *s = &d->shape;
    const int32_t hd = s->head_dim, group = s->heads / s->kv_heads;
    double *p = test_alloc((size_t)s->length * sizeof *p);
    for (int32_t t = 0; t < s->length; t += t < 40 ? 1 : 37) {
        const int32_t first = s->window > 0 && t + 1 > s->window ? t + 1 - s->window : 0;
        for (int32_t h = 0; h < s->heads; h++) {
            const int32_t kv = h / group;
            double max = -INFINITY, sum = 0.0;
            for (int32_t j = first; j <= t; j++) {
                p[j] = 0.0;
                for (int32_t i = 0; i < hd; i++) {
                    p[j] += (double)d->q[(t * s->heads + h) * hd + i] *
                            (double)stored(d->k[(j * s->kv_heads + kv) * hd + i], s->dtype);
                }
                p[j] /= sqrt((double)hd);
                max = p[j] > max ? p[j] : max;
            }
            for (int32_t j = first; j <= t; j++) {
                p[j] = exp(p[j] - max);
                sum += p[j];
            }
            for (int32_t i = 0; i < hd; i++) {
                double expected = 0.0;
                for (int32_t j = first; j <= t; j++) {
                    expected += p[j] * (double)stored(d->v[(j * s->kv_heads + kv) * hd + i], s->dtype);
                }
                CHECK(close_to(out[(t * s->heads + h) * hd + i], expected / sum, 2e-5));
            }
        }
    }
    free(p);
}

static void test_attention(void)
{
    static const attention_case cases[] = {
        {14, 2, 64, 32, 70, 0, QF_DTYPE_BF16},    {14, 2, 64, 32, 70, 7, QF_DTYPE_F32},
        {4, 4, 128, 16, 50, 0, QF_DTYPE_F32},     {4, 1, 2, 16, 33, 1, QF_DTYPE_BF16},
        {10, 1, 80, 64, 41, 20, QF_DTYPE_BF16},   {9, 1, 10, 128, 130, 0, QF_DTYPE_F32},
        {2, 1, 256, 16, 40, 16, QF_DTYPE_BF16},   {5, 1, 64, 32, 1200, 0, QF_DTYPE_BF16},
        {6, 2, 16, 128, 1100, 600, QF_DTYPE_F32}, {1, 1, 18, 16, 1, 0, QF_DTYPE_F32},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const attention_case *s = &cases[i];
        const size_t row = (size_t)s->heads * (size_t)s->head_dim, count = (size_t)s->length * row;
        attention_data d;
        attention_init(&d, s);
        float *expected = test_floats(count), *out = test_floats(count);
        poison(expected, count);
        attend(&d, machine.contexts[0][0], 0, 0, s->length, expected);
        check_attention(&d, expected);
        for (int isa = 0; isa < machine.num_isas; isa++) {
            for (int p = 0; p < 2; p++) {
                qf_cpu_context *ctx = machine.contexts[isa][p];
                poison(out, count); /* in one chunk, other blocks */
                attend(&d, ctx, 1, 0, s->length, out);
                CHECK(same_bits(out, expected, count));
                poison(out, count); /* in uneven chunks */
                for (int32_t begin = 0, size = 1; begin < s->length; begin += size, size = size * 3 % 97 + 1) {
                    size = s->length - begin < size ? s->length - begin : size;
                    attend(&d, ctx, 0, begin, begin + size, out);
                }
                CHECK(same_bits(out, expected, count));
                poison(out, count); /* one by one: decode */
                for (int32_t t = s->length > 100 ? s->length - 20 : 0; t < s->length; t++) {
                    attend(&d, ctx, 1, t, t + 1, out);
                    CHECK(same_bits(out + (size_t)t * row, expected + (size_t)t * row, row));
                }
            }
        }
        free(expected);
        free(out);
        attention_free(&d);
    }
}

/* Several sequences in one call give what each gives alone; a sequence may bring no rows at all. */
static void test_attention_batch(void)
{
    static const attention_case shape = {14, 2, 64, 32, 600, 0, QF_DTYPE_BF16};
    enum { SEQS = 5, ROW = 14 * 64 };
    static const int32_t lens[SEQS] = {600, 33, 1, 20, 515};
    static const int32_t rows[SEQS] = {1, 5, 1, 0, 3};
    int32_t starts[SEQS + 1] = {0};
    attention_data d;
    attention_init(&d, &shape);
    int32_t *tables = test_alloc((size_t)(SEQS * d.num_blocks) * sizeof *tables);
    float *alone = test_floats(600 * ROW), q[10 * ROW], out[10 * ROW];
    attend(&d, machine.contexts[0][0], 0, 0, 600, alone);
    for (int s = 0; s < SEQS; s++) {
        starts[s + 1] = starts[s] + rows[s];
        memcpy(tables + s * d.num_blocks, d.tables[0], (size_t)d.num_blocks * sizeof *tables);
        memcpy(q + starts[s] * ROW, d.q + (lens[s] - rows[s]) * ROW, (size_t)(rows[s] * ROW) * sizeof *q);
    }
    for (int isa = 0; isa < machine.num_isas; isa++) {
        for (int p = 0; p < 2; p++) {
            poison(out, 10 * ROW);
            qf_attention_args args = {.q = q, .out = out, .cache = d.caches[0].kv, .query_start_loc = starts,
                                      .seq_lens = lens, .block_tables = tables, .block_table_stride = d.num_blocks,
                                      .num_seqs = SEQS, .num_heads = 14, .scale = 0.125f};
            qf_cpu_attention(machine.contexts[isa][p], &args);
            for (int s = 0; s < SEQS; s++) {
                CHECK(same_bits(out + starts[s] * ROW, alone + (lens[s] - rows[s]) * ROW, (size_t)(rows[s] * ROW)));
            }
        }
    }
    free(alone);
    free(tables);
    attention_free(&d);
}

/* --- instruction sets ----------------------------------------------------------------------------------- */

static void test_isa(void)
{
    qf_error err;
    qf_isa isa;
    for (int i = 0; i < QF_ISA_COUNT; i++) {
        CHECK(qf_isa_parse(qf_isa_name((qf_isa)i), &isa));
        CHECK_INT(isa, i);
    }
    CHECK(!qf_isa_parse("avx9", &isa));
    CHECK(!qf_isa_parse(NULL, &isa));
    qf_cpu_context *ctx = NULL;
    if (qf_isa_detect() < QF_ISA_AVX512_VNNI) {
        CHECK_INT(qf_cpu_context_create(QF_ISA_AVX512_VNNI, machine.pools[0], 1, 1, &ctx, &err),
                  QF_ERROR_INVALID_ARGUMENT);
    }
    CHECK_INT(qf_cpu_context_create(QF_ISA_SCALAR, machine.pools[0], 0, 1, &ctx, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(ctx == NULL);
}

int main(void)
{
    machine_init(&machine);
    RUN(test_isa);
    RUN(test_embedding);
    RUN(test_rmsnorm);
    RUN(test_silu_mul);
    RUN(test_rope);
    RUN(test_attention);
    RUN(test_attention_batch);
    machine_deinit(&machine);
    return check_report();
}
