/* Low-bit caches and the 16-bit window on the CPU: written, read back by the scalar codec, and attended to, against double
 * precision over exactly the values that the codec gives. */
/* sources: backend/cpu/isa.c backend/cpu/context.c backend/cpu/elementwise.c backend/cpu/attention.c backend/cpu/kernels_scalar.c backend/cpu/kernels_avx2.c backend/cpu/kernels_avx512.c backend/cpu/kernels_avx512_vnni.c base/threads.c base/cpu_count.c base/status.c base/alloc.c base/dtype.c */
/* sanitizers: address thread */
#include "cpu_ops.h"

#include "backend/cpu/kernels.h"

static test_machine machine;

typedef struct kv_case {
    qf_kv_format format;
    int32_t heads, kv_heads, head_dim, block_size, length, sliding, window;
    int32_t window_first; /* blocks before it have no copies */
    float bias;           /* its size */
} kv_case;

typedef struct kv_data {
    kv_case shape;
    float *q, *k, *v, *bias; /* q (length, heads, head_dim) rotated; k without bias, not rotated */
    float *cos_sin, *tile_turn, *step_turn;
    qf_kv_cache cache, window;
    int32_t *table, *window_table;
    double *low_k, *low_v;   /* (length, kv_heads, head_dim) what the low-bit form stands for, bias included */
    float *wide_k, *wide_v;  /* the same of the window's copy */
    int32_t num_blocks;
} kv_data;

static float inv_freq(int32_t j, int32_t head_dim) { return powf(10000.0f, -2.0f * (float)j / (float)head_dim); }

static qf_kv_cache make_cache(const kv_case *s, int32_t num_blocks, qf_kv_format format)
{
    const size_t bytes = qf_cpu_kv_cache_bytes(num_blocks, s->block_size, s->kv_heads, s->head_dim, format);
    qf_kv_cache cache = {.k = test_alloc(bytes), .v = test_alloc(bytes), .dtype = QF_DTYPE_BF16,
                         .num_blocks = num_blocks, .block_size = s->block_size, .num_kv_heads = s->kv_heads,
                         .head_dim = s->head_dim, .format = qf_kv_is_low_bit(format) ? format : QF_KV_AUTO};
    memset(cache.k, 0xff, bytes); /* scales that are NaN: what is not written must not be read */
    memset(cache.v, 0xff, bytes);
    return cache;
}

static void rotate(const double *x, double angle_scale, int32_t head_dim, double *out)
{
    for (int32_t j = 0; j < head_dim / 2; j++) {
        const double angle = angle_scale * (double)inv_freq(j, head_dim), c = cos(angle), s = sin(angle);
        out[j] = x[j] * c - x[j + head_dim / 2] * s;
        out[j + head_dim / 2] = x[j + head_dim / 2] * c + x[j] * s;
    }
}

/* The two forms of position t and head h, by the scalar codec over what the backend's rotation gives. */
static void expect_forms(kv_data *d, int32_t t, int32_t h)
{
    const kv_case *s = &d->shape;
    const size_t hd = (size_t)s->head_dim, at = ((size_t)t * (size_t)s->kv_heads + (size_t)h) * hd;
    float rotated[QF_MAX_HEAD_DIM], back[QF_MAX_HEAD_DIM], biased[QF_MAX_HEAD_DIM];
    double bias[QF_MAX_HEAD_DIM], turned[QF_MAX_HEAD_DIM];
    uint8_t codes[QF_MAX_HEAD_DIM];
    uint16_t scales[QF_MAX_HEAD_DIM];
    const qf_cpu_kernels *kernels = machine.contexts[0][0]->kernels;
    kernels->rope_head(d->k + at, d->cos_sin + (size_t)t * hd, rotated, s->head_dim);
    qf_kv_encode_row(s->format, rotated, s->head_dim, codes, scales);
    qf_kv_decode_row(s->format, codes, scales, s->head_dim, back);
    for (size_t i = 0; i < hd; i++) {
        bias[i] = (double)d->bias[(size_t)h * hd + i];
        biased[i] = d->k[at + i] + d->bias[(size_t)h * hd + i];
    }
    rotate(bias, t, s->head_dim, turned);
    kernels->rope_head(biased, d->cos_sin + (size_t)t * hd, rotated, s->head_dim);
    for (size_t i = 0; i < hd; i++) {
        d->low_k[at + i] = (double)back[i] + turned[i];
        d->wide_k[at + i] = qf_bf16_to_f32(qf_f32_to_bf16(rotated[i]));
        d->wide_v[at + i] = qf_bf16_to_f32(qf_f32_to_bf16(d->v[at + i]));
    }
    qf_kv_encode_row(s->format, d->v + at, s->head_dim, codes, scales);
    qf_kv_decode_row(s->format, codes, scales, s->head_dim, back);
    for (size_t i = 0; i < hd; i++) {
        d->low_v[at + i] = (double)back[i];
    }
}

static void kv_init(kv_data *d, const kv_case *shape)
{
    const kv_case *s = &d->shape;
    d->shape = *shape;
    const size_t hd = (size_t)s->head_dim, length = (size_t)s->length;
    const size_t kv_count = length * (size_t)s->kv_heads * hd, q_count = length * (size_t)s->heads * hd;
    d->q = test_floats(q_count);
    d->k = test_floats(kv_count);
    d->v = test_floats(kv_count);
    d->bias = test_floats((size_t)s->kv_heads * hd);
    d->cos_sin = test_floats(length * hd);
    d->low_k = test_alloc(kv_count * sizeof(double));
    d->low_v = test_alloc(kv_count * sizeof(double));
    d->wide_k = test_floats(kv_count);
    d->wide_v = test_floats(kv_count);
    d->tile_turn = test_floats(qf_cpu_tile_turn_floats(s->head_dim, s->length));
    d->step_turn = test_floats(qf_cpu_step_turn_floats(s->head_dim));
    float frequencies[QF_MAX_HEAD_DIM / 2];
    for (int32_t j = 0; j < s->head_dim / 2; j++) {
        frequencies[j] = inv_freq(j, s->head_dim);
        for (size_t t = 0; t < length; t++) {
            d->cos_sin[t * hd + (size_t)j] = (float)cos((double)t * (double)frequencies[j]);
            d->cos_sin[t * hd + hd / 2 + (size_t)j] = (float)sin((double)t * (double)frequencies[j]);
        }
    }
    qf_cpu_fill_turns(frequencies, 1.0f, s->head_dim, s->length, d->tile_turn, d->step_turn);
    for (size_t i = 0; i < q_count; i++) {
        d->q[i] = random_normal();
    }
    for (size_t i = 0; i < kv_count; i++) {
        d->k[i] = random_heavy();
        d->v[i] = random_normal();
    }
    for (size_t i = 0; i < (size_t)s->kv_heads * hd; i++) {
        d->bias[i] = random_normal() * s->bias;
    }
    d->num_blocks = (s->length + s->block_size - 1) / s->block_size;
    d->cache = make_cache(s, d->num_blocks + 1, s->format);
    d->window = s->window > 0 ? make_cache(s, d->num_blocks + 1, QF_KV_BF16) : (qf_kv_cache){0};
    d->table = test_alloc((size_t)d->num_blocks * sizeof(int32_t));
    d->window_table = test_alloc((size_t)d->num_blocks * sizeof(int32_t));
    for (int32_t b = 0; b < d->num_blocks; b++) {
        d->table[b] = d->num_blocks - b; /* block 0 stays unused */
        d->window_table[b] = b;
    }
    for (int32_t t = 0; t < s->length; t++) {
        for (int32_t h = 0; h < s->kv_heads; h++) {
            expect_forms(d, t, h);
        }
    }
}

static void kv_free(kv_data *d)
{
    void *all[] = {d->q, d->k, d->v, d->bias, d->cos_sin, d->tile_turn, d->step_turn, d->low_k, d->low_v, d->wide_k,
                   d->wide_v, d->cache.k, d->cache.v, d->window.k, d->window.v, d->table, d->window_table};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
}

/* Writes all positions in uneven chunks. */
static void write_all(kv_data *d, qf_cpu_context *ctx)
{
    const kv_case *s = &d->shape;
    const size_t hd = (size_t)s->head_dim;
    float *q = test_floats((size_t)s->length * (size_t)s->heads * hd);
    int32_t *slots = test_alloc((size_t)s->length * sizeof *slots), *copies = test_alloc((size_t)s->length * sizeof *copies);
    for (int32_t t = 0; t < s->length; t++) {
        slots[t] = d->table[t / s->block_size] * s->block_size + t % s->block_size;
        copies[t] = d->window_table[t / s->block_size] * s->block_size + t % s->block_size;
    }
    for (int32_t begin = 0, count = 1; begin < s->length; begin += count, count = count * 3 % 29 + 1) {
        count = s->length - begin < count ? s->length - begin : count;
        const size_t at = (size_t)begin * (size_t)s->kv_heads * hd;
        qf_rope_kv_write_args args = {.q = q, .k = d->k + at, .v = d->v + at, .cos_sin = d->cos_sin + (size_t)begin * hd,
                                      .slot_mapping = slots + begin, .cache = d->cache, .num_tokens = count,
                                      .num_heads = s->heads, .k_bias = d->bias, .window = d->window,
                                      .window_slot_mapping = copies + begin};
        qf_cpu_rope_kv_write(ctx, &args);
    }
    free(q);
    free(slots);
    free(copies);
}

/* Rows [begin, end) of the sequence as one chunk; out is the whole sequence's. */
static void attend(const kv_data *d, qf_cpu_context *ctx, int32_t begin, int32_t end, float *out)
{
    const kv_case *s = &d->shape;
    const size_t row = (size_t)s->heads * (size_t)s->head_dim;
    const int32_t starts[2] = {0, end - begin};
    qf_attention_args args = {
        .q = d->q + (size_t)begin * row, .out = out + (size_t)begin * row, .cache = d->cache, .query_start_loc = starts,
        .seq_lens = &end, .block_tables = d->table, .block_table_stride = d->num_blocks, .num_seqs = 1,
        .num_heads = s->heads, .sliding_window = s->sliding, .scale = 1.0f / sqrtf((float)s->head_dim),
        .key_bias = {.bias = d->bias, .tile_turn = d->tile_turn, .step_turn = d->step_turn}, .window = d->window,
        .window_tables = d->window_table + s->window_first, .window_first_block = &s->window_first,
        .window_table_stride = d->num_blocks, .window_tokens = s->window};
    qf_cpu_attention(ctx, &args);
}

static bool reads_copy(const kv_case *s, int32_t query, int32_t key)
{
    return s->window > 0 && query - key < s->window && key >= s->window_first * s->block_size;
}

static void check_rows(const kv_data *d, const float *out)
{
    const kv_case *s = &d->shape;
    const int32_t hd = s->head_dim, group = s->heads / s->kv_heads;
    /* float32 keys of the bias's size: their rounding is what remains of it in the scores */
    const double tolerance = 3e-5 + 2e-6 * (double)s->bias;
    double *p = test_alloc((size_t)s->length * sizeof *p);
    for (int32_t t = 0; t < s->length; t += t < 20 ? 1 : 31) {
        const int32_t first = s->sliding > 0 && t + 1 > s->sliding ? t + 1 - s->sliding : 0;
        for (int32_t h = 0; h < s->heads; h++) {
            double max = -INFINITY, sum = 0.0;
            for (int32_t j = first; j <= t; j++) {
                const int32_t at = (j * s->kv_heads + h / group) * hd;
                p[j] = 0.0;
                for (int32_t i = 0; i < hd; i++) {
                    const double key = reads_copy(s, t, j) ? (double)d->wide_k[at + i] : d->low_k[at + i];
                    p[j] += (double)d->q[(t * s->heads + h) * hd + i] * key;
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
                    const int32_t at = (j * s->kv_heads + h / group) * hd + i;
                    expected += p[j] * (reads_copy(s, t, j) ? (double)d->wide_v[at] : d->low_v[at]);
                }
                CHECK(fabs((double)out[(t * s->heads + h) * hd + i] - expected / sum) <= tolerance);
            }
        }
    }
    free(p);
}

static void test_case(const kv_case *shape)
{
    kv_data d;
    kv_init(&d, shape);
    const kv_case *s = &d.shape;
    const size_t row = (size_t)s->heads * (size_t)s->head_dim, count = (size_t)s->length * row;
    const size_t bytes = qf_cpu_kv_cache_bytes(d.num_blocks + 1, s->block_size, s->kv_heads, s->head_dim, s->format);
    float *expected = test_floats(count), *out = test_floats(count);
    uint8_t *stored = test_alloc(2 * bytes);
    write_all(&d, machine.contexts[0][0]);
    memcpy(stored, d.cache.k, bytes);
    memcpy(stored + bytes, d.cache.v, bytes);
    poison(expected, count);
    attend(&d, machine.contexts[0][0], 0, s->length, expected);
    check_rows(&d, expected);
    for (int isa = 0; isa < machine.num_isas; isa++) {
        for (int p = 0; p < 2; p++) {
            qf_cpu_context *ctx = machine.contexts[isa][p];
            memset(d.cache.k, 0xff, bytes);
            memset(d.cache.v, 0xff, bytes);
            write_all(&d, ctx);
            CHECK(memcmp(stored, d.cache.k, bytes) == 0 && memcmp(stored + bytes, d.cache.v, bytes) == 0);
            poison(out, count);
            attend(&d, ctx, 0, s->length, out);
            CHECK(same_bits(out, expected, count));
            poison(out, count); /* in uneven chunks */
            for (int32_t begin = 0, size = 1; begin < s->length; begin += size, size = size * 3 % 97 + 1) {
                size = s->length - begin < size ? s->length - begin : size;
                attend(&d, ctx, begin, begin + size, out);
            }
            CHECK(same_bits(out, expected, count));
            for (int32_t t = s->length > 30 ? s->length - 5 : 0; t < s->length; t++) { /* decode */
                poison(out + (size_t)t * row, row);
                attend(&d, ctx, t, t + 1, out);
                CHECK(same_bits(out + (size_t)t * row, expected + (size_t)t * row, row));
            }
        }
    }
    free(expected);
    free(out);
    free(stored);
    kv_free(&d);
}

static void test_low_bit(void)
{
    static const kv_case cases[] = {
        {QF_KV_FP8_E4M3, 14, 2, 64, 32, 70, 0, 0, 0, 5.0f}, {QF_KV_INT8, 14, 2, 64, 16, 118, 33, 0, 0, 60.0f},
        {QF_KV_INT4, 7, 1, 64, 32, 70, 0, 0, 0, 60.0f},     {QF_KV_NF4, 4, 4, 128, 16, 50, 0, 0, 0, 5.0f},
        {QF_KV_INT4, 3, 1, 32, 16, 17, 0, 0, 0, 0.0f},      {QF_KV_FP8_E4M3, 2, 1, 96, 64, 41, 20, 0, 0, 1.0f},
        {QF_KV_NF4, 10, 2, 96, 128, 130, 0, 0, 0, 20.0f},   {QF_KV_INT4, 2, 1, 256, 16, 40, 16, 0, 0, 1.0f},
        {QF_KV_INT8, 1, 1, 160, 16, 1, 0, 0, 0, 1.0f},      {QF_KV_INT4, 5, 1, 64, 32, 560, 0, 0, 0, 10.0f},
        {QF_KV_INT8, 9, 1, 32, 128, 560, 300, 0, 0, 10.0f}, {QF_KV_FP8_E4M3, 1, 1, 32, 16, 2, 0, 0, 0, 600.0f},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_case(&cases[i]);
    }
}

static void test_window(void)
{
    static const kv_case cases[] = {
        {QF_KV_INT4, 7, 1, 64, 32, 118, 0, 1, 0, 5.0f},      {QF_KV_FP8_E4M3, 14, 2, 64, 16, 118, 0, 17, 0, 5.0f},
        {QF_KV_INT8, 4, 2, 32, 32, 70, 0, 1000, 0, 5.0f},    {QF_KV_NF4, 3, 1, 96, 16, 100, 40, 23, 0, 5.0f},
        {QF_KV_INT4, 3, 1, 64, 16, 100, 20, 50, 0, 5.0f},    {QF_KV_INT4, 5, 1, 64, 32, 560, 0, 530, 0, 5.0f},
        {QF_KV_INT4, 7, 1, 64, 16, 100, 0, 40, 3, 5.0f},     {QF_KV_INT8, 2, 1, 128, 16, 3, 0, 2, 0, 5.0f},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_case(&cases[i]);
    }
}

/* A slot of -1 leaves the cache as it is, and the copy is written all the same. */
static void test_no_slot(void)
{
    const kv_case shape = {QF_KV_INT4, 2, 1, 64, 16, 16, 0, 4, 0, 5.0f};
    kv_data d;
    kv_init(&d, &shape);
    const size_t bytes = qf_cpu_kv_cache_bytes(2, 16, 1, 64, QF_KV_INT4);
    float q[2 * 64] = {0};
    int32_t slot = -1, copy = 5;
    qf_rope_kv_write_args args = {.q = q, .k = d.k, .v = d.v, .cos_sin = d.cos_sin, .slot_mapping = &slot,
                                  .cache = d.cache, .num_tokens = 1, .num_heads = 2, .k_bias = d.bias,
                                  .window = d.window, .window_slot_mapping = &copy};
    qf_cpu_rope_kv_write(machine.contexts[0][0], &args);
    for (size_t i = 0; i < bytes; i++) {
        CHECK(((uint8_t *)d.cache.k)[i] == 0xff && ((uint8_t *)d.cache.v)[i] == 0xff);
    }
    for (int32_t i = 0; i < 64; i++) {
        CHECK(qf_bf16_to_f32(((uint16_t *)d.window.v)[5 * 64 + i]) == d.wide_v[i]);
        CHECK(qf_bf16_to_f32(((uint16_t *)d.window.k)[i * 16 + 5]) == d.wide_k[i]);
    }
    kv_free(&d);
}

/* A NaN key poisons the rows that see it, and no others. */
static void test_not_finite(void)
{
    const kv_case shape = {QF_KV_INT8, 2, 1, 32, 16, 20, 0, 0, 0, 1.0f};
    kv_data d;
    kv_init(&d, &shape);
    d.k[12 * 32 + 3] = NAN;
    float out[20 * 2 * 32];
    for (int isa = 0; isa < machine.num_isas; isa++) {
        write_all(&d, machine.contexts[isa][0]);
        attend(&d, machine.contexts[isa][0], 0, 20, out);
        for (int32_t t = 0; t < 20; t++) {
            CHECK(isnan(out[t * 64]) == (t >= 12));
        }
    }
    kv_free(&d);
}

int main(void)
{
    machine_init(&machine);
    RUN(test_low_bit);
    RUN(test_window);
    RUN(test_no_slot);
    RUN(test_not_finite);
    machine_deinit(&machine);
    return check_report();
}
