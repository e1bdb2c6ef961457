/* sources: backend/cpu/isa.c backend/cpu/context.c backend/cpu/linear.c backend/cpu/linear_pack.c backend/cpu/kernels_scalar.c backend/cpu/kernels_avx2.c backend/cpu/kernels_avx512.c backend/cpu/kernels_avx512_vnni.c base/threads.c base/cpu_count.c base/status.c base/alloc.c base/dtype.c model/quantize.c kv/format.c */
/* sanitizers: address thread */
/* alloc-faults: yes */
#include "cpu_ops.h"

#include "backend/cpu/kernels.h"

static test_machine machine;

/* --- sources in memory: these tests need no files --------------------------------------------------------- */

/* Dense: values in weight.data as float32, whatever weight.dtype says. Quantised: weight.data (n, k) one byte per value,
 * scales.data as float32 or bfloat16 by scales.dtype, zeros.data bytes. */
typedef struct test_linear {
    qf_linear_source source;
    float *values; /* (n, k) what the layer means, columns in the model's order */
    uint8_t *q;    /* (n, k) in stored order */
    float *scales; /* (n, num_groups) */
    uint8_t *zeros;
    float *bias;
    int32_t *perm;
} test_linear;

void qf_linear_source_read_f32(const qf_linear_source *self, int32_t n0, int32_t count, float *out)
{
    const size_t k = (size_t)self->k;
    for (int32_t row = 0; row < count; row++) {
        for (int32_t i = 0; i < self->k; i++) {
            const size_t at = (size_t)(n0 + row) * k + (size_t)i;
            if (self->bits > 8) {
                out[(size_t)row * k + (size_t)i] = ((const float *)self->weight.data)[at];
                continue;
            }
            const size_t group = (size_t)(n0 + row) * (size_t)self->num_groups + (size_t)(i / self->group_size);
            const int difference = ((const uint8_t *)self->weight.data)[at] - ((const uint8_t *)self->zeros.data)[group];
            const int32_t column = self->perm != NULL ? self->perm[i] : i;
            out[(size_t)row * k + (size_t)column] = ((const float *)self->scales.data)[group] * (float)difference;
        }
    }
}

void qf_linear_source_read_quantized(const qf_linear_source *self, int32_t n0, int32_t count, uint8_t *q, float *scales,
                                     uint8_t *zeros)
{
    const size_t k = (size_t)self->k, groups = (size_t)self->num_groups;
    memcpy(q, (const uint8_t *)self->weight.data + (size_t)n0 * k, (size_t)count * k);
    memcpy(scales, (const float *)self->scales.data + (size_t)n0 * groups, (size_t)count * groups * sizeof *scales);
    memcpy(zeros, (const uint8_t *)self->zeros.data + (size_t)n0 * groups, (size_t)count * groups);
}

static void test_linear_bias(test_linear *l)
{
    l->bias = test_floats((size_t)l->source.n);
    for (int32_t i = 0; i < l->source.n; i++) {
        l->bias[i] = random_normal();
    }
    l->source.bias = l->bias;
}

static void test_linear_quantized(test_linear *l, int32_t n, int32_t k, int32_t bits, int32_t group_size,
                                         bool permuted, float scale_unit)
{
    memset(l, 0, sizeof *l);
    const int32_t groups = (k + group_size - 1) / group_size;
    const size_t num_scales = (size_t)n * (size_t)groups, num_values = (size_t)n * (size_t)k;
    qf_linear_source *s = &l->source;
    s->format = QF_LINEAR_GPTQ;
    memcpy(s->name, "test", 5);
    s->n = n;
    s->k = k;
    s->bits = bits;
    s->group_size = group_size;
    s->num_groups = groups;
    l->q = test_alloc(num_values);
    l->scales = test_floats(num_scales);
    l->zeros = test_alloc(num_scales);
    l->values = test_floats(num_values);
    for (size_t i = 0; i < num_values; i++) {
        l->q[i] = (uint8_t)(random_u32() & (bits == 4 ? 15u : 255u));
    }
    for (size_t i = 0; i < num_scales; i++) {
        l->scales[i] = (float)(1 + random_u32() % 1000) * scale_unit;
        l->zeros[i] = (uint8_t)(random_u32() & (bits == 4 ? 15u : 255u));
    }
    if (permuted) {
        l->perm = test_alloc((size_t)k * sizeof *l->perm);
        for (int32_t i = 0; i < k; i++) {
            int32_t j = (int32_t)(random_u32() % (uint32_t)(i + 1));
            l->perm[i] = l->perm[j];
            l->perm[j] = i;
        }
        s->perm = l->perm;
    }
    s->weight.data = l->q;
    s->weight.dtype = QF_DTYPE_U8;
    s->scales.data = l->scales;
    s->scales.dtype = QF_DTYPE_F32;
    s->scales.size_bytes = num_scales * sizeof(float);
    s->zeros.data = l->zeros;
    qf_linear_source_read_f32(s, 0, n, l->values);
}

static void test_linear_dense(test_linear *l, int32_t n, int32_t k, qf_dtype dtype, float (*draw)(void))
{
    memset(l, 0, sizeof *l);
    l->values = test_floats((size_t)n * (size_t)k);
    for (size_t i = 0; i < (size_t)n * (size_t)k; i++) {
        float value = draw() * 0.05f;
        l->values[i] = dtype == QF_DTYPE_BF16  ? qf_bf16_to_f32(qf_f32_to_bf16(value))
                       : dtype == QF_DTYPE_F16 ? qf_f16_to_f32(qf_f32_to_f16(value))
                                               : value;
    }
    qf_linear_source *s = &l->source;
    s->format = QF_LINEAR_DENSE;
    memcpy(s->name, "test", 5);
    s->n = n;
    s->k = k;
    s->bits = dtype == QF_DTYPE_F32 ? 32 : 16;
    s->group_size = k;
    s->num_groups = 1;
    s->weight.data = l->values;
    s->weight.dtype = dtype;
}

static void test_linear_free(test_linear *l)
{
    free(l->values);
    free(l->q);
    free(l->scales);
    free(l->zeros);
    free(l->bias);
    free(l->perm);
}

/* --- checks -------------------------------------------------------------------------------------------- */

static void run_linear(qf_cpu_context *ctx, const qf_cpu_linear *w, const float *x, int32_t num_tokens, float *out,
                       qf_activation activation)
{
    qf_cpu_linear_args args = {.x = x, .linears = {w}, .outs = {out}, .num_linears = 1, .num_tokens = num_tokens,
                               .activation = activation};
    qf_cpu_linear_run(ctx, &args);
}

/* x as the int8 path sees it, in the model's order of columns: rounded per packed group of the stored order. */
static void round_activations(const test_linear *l, int32_t group, const float *x, double *out)
{
    const int32_t k = l->source.k;
    for (int32_t begin = 0; begin < k; begin += group) {
        const int32_t end = begin + group < k ? begin + group : k;
        float amax = 0.0f;
        for (int32_t i = begin; i < end; i++) {
            amax = fmaxf(amax, fabsf(x[l->perm != NULL ? l->perm[i] : i]));
        }
        for (int32_t i = begin; i < end; i++) {
            const int32_t column = l->perm != NULL ? l->perm[i] : i;
            out[column] = amax > 0.0f ? (double)rintf(x[column] * (127.0f / amax)) * (double)(amax / 127.0f) : 0.0;
        }
    }
}

/* Compares with a double-precision product over the same values; the bound is relative to the sum of magnitudes. */
static void check_product(const test_linear *l, const float *x, int32_t num_tokens, const float *out, int32_t group)
{
    const int32_t n = l->source.n, k = l->source.k;
    double *rounded = test_alloc((size_t)k * sizeof *rounded);
    for (int32_t m = 0; m < num_tokens; m++) {
        for (int32_t i = 0; i < k; i++) {
            rounded[i] = (double)x[(size_t)m * (size_t)k + (size_t)i];
        }
        if (group > 0) {
            round_activations(l, group, x + (size_t)m * (size_t)k, rounded);
        }
        for (int32_t c = 0; c < n; c++) {
            double sum = l->bias != NULL ? (double)l->bias[c] : 0.0, magnitude = fabs(sum);
            for (int32_t i = 0; i < k; i++) {
                const double term = rounded[i] * (double)l->values[(size_t)c * (size_t)k + (size_t)i];
                sum += term;
                magnitude += fabs(term);
            }
            const double got = (double)out[(size_t)m * (size_t)n + (size_t)c];
            CHECK(fabs(got - sum) <= 2e-6 * magnitude + 1e-30);
        }
    }
    free(rounded);
}

/* Every instruction set, thread count and number of rows gives the bits of the scalar reference on all rows at once. */
static void check_everywhere(const test_linear *l, const qf_cpu_linear_options *options, int32_t group,
                             qf_activation activation)
{
    static const int32_t row_counts[] = {1, 2, 3, 7, 8, 9, 17, 33};
    const size_t n = (size_t)l->source.n, k = (size_t)l->source.k;
    qf_error err;
    qf_cpu_linear *w = NULL;
    CHECK_OK(qf_cpu_linear_create(&l->source, options, machine.pools[1], &w, &err));
    if (w == NULL) {
        return;
    }
    CHECK_INT((long long)w->pages_bytes, (long long)qf_cpu_linear_bytes(&l->source, options));
    float *x = test_floats(33 * k), *expected = test_floats(33 * n), *out = test_floats(33 * n + 16);
    for (size_t i = 0; i < 33 * k; i++) {
        x[i] = random_heavy();
    }
    memset(x + 2 * k, 0, k * sizeof *x); /* a row of zeros */
    poison(expected, 33 * n);
    run_linear(machine.contexts[0][0], w, x, 33, expected, activation);
    check_product(l, x, 33, expected, group);
    for (int isa = 0; isa < machine.num_isas; isa++) {
        for (int p = 0; p < 2; p++) {
            for (size_t c = 0; c < sizeof row_counts / sizeof *row_counts; c++) {
                const size_t rows = (size_t)row_counts[c], from = 33 - rows;
                poison(out, 33 * n + 16);
                run_linear(machine.contexts[isa][p], w, x + from * k, row_counts[c], out, activation);
                CHECK(same_bits(out, expected + from * n, rows * n));
                CHECK(isnan(out[rows * n])); /* nothing past the end */
            }
        }
    }
    free(x);
    free(expected);
    free(out);
    qf_cpu_linear_destroy(w);
}

static void test_quantized(void)
{
    static const struct { int32_t n, k, group, packed; } shapes[] = {
        {17, 72, 72, 128}, {1, 1, 1, 128},    {33, 128, 128, 128}, {40, 896, 128, 128}, {50, 200, 32, 32},
        {16, 256, 64, 64}, {31, 300, 256, 128}, {40, 48, 16, 16},  {5, 40, 8, 8},       {130, 129, 129, 128},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        for (int variant = 0; variant < 8; variant++) {
            test_linear l;
            const int32_t bits = (variant & 1) != 0 ? 8 : 4;
            /* Scales of 2^-14 steps are float16 values; thirds of them are not, and take the wide header. */
            const float unit = (variant & 4) != 0 ? 0x1p-14f / 3.0f : 0x1p-14f;
            test_linear_quantized(&l, shapes[i].n, shapes[i].k, bits, shapes[i].group, (variant & 2) != 0, unit);
            if ((variant & 2) != 0) {
                test_linear_bias(&l);
            }
            check_everywhere(&l, NULL, shapes[i].packed, QF_ACTIVATION_I8);
            check_everywhere(&l, NULL, 0, QF_ACTIVATION_F32);
            test_linear_free(&l);
        }
    }
}

static void test_dense(void)
{
    static const qf_dtype dtypes[] = {QF_DTYPE_F32, QF_DTYPE_BF16, QF_DTYPE_F16};
    static const qf_weight_kind kinds[] = {QF_WEIGHT_F32, QF_WEIGHT_BF16, QF_WEIGHT_F16};
    static const int32_t shapes[][2] = {{1, 1}, {17, 72}, {48, 130}, {130, 33}};
    for (int d = 0; d < 3; d++) {
        for (int i = 0; i < 4; i++) {
            test_linear l;
            qf_error err;
            qf_cpu_linear *w = NULL;
            test_linear_dense(&l, shapes[i][0], shapes[i][1], dtypes[d], random_normal);
            if (i % 2 == 1) {
                test_linear_bias(&l);
            }
            CHECK_OK(qf_cpu_linear_create(&l.source, NULL, machine.pools[0], &w, &err));
            CHECK_INT(qf_cpu_linear_kind(w), kinds[d]);
            qf_cpu_linear_destroy(w);
            check_everywhere(&l, NULL, 0, QF_ACTIVATION_I8); /* int8 activations do not apply */
            test_linear_free(&l);
        }
    }
}

/* A group size that records cannot hold is dequantised to float32. */
static void test_odd_group(void)
{
    test_linear l;
    qf_error err;
    qf_cpu_linear *w = NULL;
    test_linear_quantized(&l, 20, 60, 4, 12, true, 0x1p-14f);
    CHECK_OK(qf_cpu_linear_create(&l.source, NULL, machine.pools[0], &w, &err));
    CHECK_INT(qf_cpu_linear_kind(w), QF_WEIGHT_F32);
    qf_cpu_linear_destroy(w);
    check_everywhere(&l, NULL, 0, QF_ACTIVATION_I8);
    test_linear_free(&l);
}

/* Three linears in one call, of different kinds, groups and permutations, give what each gives alone. */
static void test_fused(void)
{
    test_linear l[4];
    qf_cpu_linear *w[4];
    float *outs[3], *alone = test_floats(9 * 100), *x = test_floats(9 * 256);
    qf_error err;
    test_linear_quantized(&l[0], 70, 256, 4, 128, true, 0x1p-14f);
    test_linear_quantized(&l[1], 33, 256, 8, 128, false, 0x1p-14f);
    test_linear_quantized(&l[2], 16, 256, 4, 32, false, 0x1p-14f);
    test_linear_dense(&l[3], 100, 256, QF_DTYPE_BF16, random_normal);
    for (int i = 0; i < 4; i++) {
        CHECK_OK(qf_cpu_linear_create(&l[i].source, NULL, machine.pools[1], &w[i], &err));
    }
    for (int i = 0; i < 3; i++) {
        outs[i] = test_floats(9 * 100);
    }
    for (int i = 0; i < 9 * 256; i++) {
        x[i] = random_normal();
    }
    for (int isa = 0; isa < machine.num_isas; isa++) {
        for (int first = 0; first < 4; first++) {
            qf_cpu_context *ctx = machine.contexts[isa][1];
            qf_cpu_linear_args args = {.x = x, .num_linears = 3, .num_tokens = 9, .activation = QF_ACTIVATION_I8};
            for (int i = 0; i < 3; i++) {
                args.linears[i] = w[(first + i) % 4];
                args.outs[i] = outs[i];
                poison(outs[i], 9 * 100);
            }
            qf_cpu_linear_run(ctx, &args);
            for (int i = 0; i < 3; i++) {
                const qf_cpu_linear *linear = args.linears[i];
                run_linear(ctx, linear, x, 9, alone, QF_ACTIVATION_I8);
                CHECK(same_bits(alone, outs[i], 9 * (size_t)linear->n));
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        qf_cpu_linear_destroy(w[i]);
        test_linear_free(&l[i]);
    }
    for (int i = 0; i < 3; i++) {
        free(outs[i]);
    }
    free(alone);
    free(x);
}

/* Error of the product with int8 activations against the same rounded weights in double. */
static double i8_nmse(int32_t bits, int32_t group, float (*draw)(void))
{
    enum { N = 96, K = 896, M = 16 };
    test_linear l;
    qf_error err;
    qf_cpu_linear *w = NULL;
    const qf_cpu_linear_options options = {bits, group};
    float *x = test_floats(M * K), *out = test_floats(M * N), *exact = test_floats(M * N);
    test_linear_dense(&l, N, K, QF_DTYPE_BF16, random_normal);
    for (int i = 0; i < M * K; i++) {
        x[i] = draw();
    }
    CHECK_OK(qf_cpu_linear_create(&l.source, &options, machine.pools[0], &w, &err));
    CHECK_INT(qf_cpu_linear_kind(w), bits == 4 ? QF_WEIGHT_W4 : QF_WEIGHT_W8);
    CHECK_INT((long long)w->pages_bytes, (long long)qf_cpu_linear_bytes(&l.source, &options));
    qf_cpu_context *ctx = machine.contexts[machine.num_isas - 1][0];
    run_linear(ctx, w, x, M, out, QF_ACTIVATION_I8);
    run_linear(ctx, w, x, M, exact, QF_ACTIVATION_F32);
    double error = 0.0, power = 0.0;
    for (int i = 0; i < M * N; i++) {
        const double difference = (double)out[i] - (double)exact[i];
        error += difference * difference;
        power += (double)exact[i] * (double)exact[i];
    }
    qf_cpu_linear_destroy(w);
    test_linear_free(&l);
    free(x);
    free(out);
    free(exact);
    return error / power;
}

static void test_accuracy(void)
{
    for (int32_t bits = 4; bits <= 8; bits += 4) {
        for (int32_t group = 32; group <= 128; group *= 2) {
            const double gaussian = i8_nmse(bits, group, random_normal), heavy = i8_nmse(bits, group, random_heavy);
            (void)printf("  w%da8 group %3d: NMSE gaussian %.2e, heavy-tailed %.2e\n", bits, group, gaussian, heavy);
            CHECK(gaussian < 5e-4);
            CHECK(heavy < 5e-4);
        }
    }
}

/* Infinities and NaN in one row show in all of its outputs, and in no other row. Tiny values do no harm. */
static void test_not_finite(void)
{
    test_linear l;
    qf_error err;
    qf_cpu_linear *w = NULL;
    float x[4 * 128], out[4 * 20];
    test_linear_quantized(&l, 20, 128, 4, 64, false, 0x1p-14f);
    CHECK_OK(qf_cpu_linear_create(&l.source, NULL, machine.pools[0], &w, &err));
    for (int isa = 0; isa < machine.num_isas; isa++) {
        for (int i = 0; i < 4 * 128; i++) {
            x[i] = random_normal();
        }
        x[5] = INFINITY;
        x[2 * 128 + 100] = NAN;
        for (int i = 0; i < 128; i++) {
            x[3 * 128 + i] = 1e-40f;
        }
        run_linear(machine.contexts[isa][0], w, x, 4, out, QF_ACTIVATION_I8);
        for (int c = 0; c < 20; c++) {
            CHECK(isnan(out[c]));
            CHECK(isfinite(out[20 + c]));
            CHECK(isnan(out[40 + c]));
            CHECK(fabsf(out[60 + c]) < 1e-30f);
        }
    }
    qf_cpu_linear_destroy(w);
    test_linear_free(&l);
}

static void test_errors(void)
{
    test_linear l;
    qf_error err;
    qf_cpu_linear *w = NULL;
    test_linear_dense(&l, 4, 4, QF_DTYPE_F32, random_normal);
    const qf_cpu_linear_options bits = {5, 128}, group = {4, 48};
    CHECK_INT(qf_cpu_linear_create(&l.source, &bits, machine.pools[0], &w, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(w == NULL);
    CHECK_INT(qf_cpu_linear_create(&l.source, &group, machine.pools[0], &w, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(w == NULL);
    test_linear_free(&l);
    qf_cpu_linear_destroy(NULL);
    qf_cpu_context_destroy(NULL);
}

#ifdef CHECK_ALLOC_FAULTS
/* A context, and a linear rounded from dense rows: whichever allocation fails, the call says so and leaks nothing. */
static qf_status create_both(test_linear *l)
{
    static const qf_cpu_linear_options options = {4, 64};
    qf_error err;
    qf_cpu_context *ctx = NULL;
    qf_cpu_linear *w = NULL;
    qf_status status = qf_cpu_context_create(QF_ISA_SCALAR, machine.pools[1], 3, 70, &ctx, &err);
    CHECK((ctx != NULL) == (status == QF_OK));
    if (status == QF_OK) {
        status = qf_cpu_linear_create(&l->source, &options, machine.pools[1], &w, &err);
        CHECK((w != NULL) == (status == QF_OK));
    }
    qf_cpu_linear_destroy(w);
    qf_cpu_context_destroy(ctx);
    return status;
}

static void test_alloc_faults(void)
{
    test_linear l;
    test_linear_dense(&l, 20, 70, QF_DTYPE_BF16, random_normal);
    for (int64_t n = 1; n < 100; n++) {
        check_fail_alloc(n);
        const qf_status status = create_both(&l);
        const bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        if (!failed) {
            CHECK_INT(n, 6); /* two for the context, three for the layer */
            test_linear_free(&l);
            return;
        }
    }
    CHECK(false);
}
#endif

int main(void)
{
    machine_init(&machine);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    RUN(test_quantized);
    RUN(test_dense);
    RUN(test_odd_group);
    RUN(test_fused);
    RUN(test_accuracy);
    RUN(test_not_finite);
    RUN(test_errors);
    machine_deinit(&machine);
    return check_report();
}
