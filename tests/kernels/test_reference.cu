/* sources: base/status.c base/alloc.c base/dtype.c base/threads.c model/quantize.c */
/* sources: backend/cpu/isa.c backend/cpu/context.c backend/cpu/elementwise.c backend/cpu/attention.c */
/* sources: backend/cpu/linear.c backend/cpu/linear_pack.c backend/cpu/kernels_scalar.c */
/* sources: backend/cpu/kernels_avx2.c backend/cpu/kernels_avx512.c backend/cpu/kernels_avx512_vnni.c */
/* The float32 reference kernels against float64 on the host, and against the CPU backend's scalar reference. */
#include "check_cuda.cuh"
#include "qf_attention.h"

extern "C" {
#include "backend/cpu/cpu.h"
}

/* Dense sources in memory: weight.data is (n, k) float32. */
extern "C" void qf_linear_source_read_f32(const qf_linear_source *self, int32_t n0, int32_t count, float *out)
{
    memcpy(out, (const float *)self->weight.data + (size_t)n0 * self->k, (size_t)count * self->k * sizeof(float));
}

extern "C" void qf_linear_source_read_quantized(const qf_linear_source *, int32_t, int32_t, uint8_t *, float *,
                                                uint8_t *)
{
    CHECK(!"a dense layer was read as a quantised one");
}

static std::vector<float> random_floats(Random &random, size_t size, float scale = 1.0f)
{
    std::vector<float> values(size);
    for (float &v : values) {
        v = random.normal() * scale;
    }
    return values;
}

static bool same_bits(const std::vector<float> &a, const std::vector<float> &b)
{
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

struct Cpu {
    qf_thread_pool *pool;
    qf_cpu_context *context;
};

/* --- linear --------------------------------------------------------------------------------------------------- */

static std::vector<float> run_linear(const std::vector<float> &x, const std::vector<float> &w,
                                     const std::vector<float> &bias, int num_tokens, int n, int k)
{
    Device<float> device_x(x), device_w(w), device_bias((size_t)n), out((size_t)num_tokens * n);
    if (!bias.empty()) {
        device_bias.put(bias);
    }
    qf_cuda_linear_f32_args args = {device_x.data, device_w.data, bias.empty() ? nullptr : device_bias.data,
                                    out.data,      num_tokens,    n,
                                    k};
    CHECK_OK(qf_cuda_linear_f32(&args, 0, &check_error));
    return out.get();
}

static std::vector<float> cpu_linear(const Cpu &cpu, const std::vector<float> &x, const std::vector<float> &w,
                                     const std::vector<float> &bias, int num_tokens, int n, int k)
{
    qf_linear_source source = {};
    source.format = QF_LINEAR_DENSE;
    snprintf(source.name, sizeof source.name, "test");
    source.n = n;
    source.k = k;
    source.bits = 32;
    source.group_size = k;
    source.num_groups = 1;
    source.weight.data = w.data();
    source.weight.dtype = QF_DTYPE_F32;
    source.bias = bias.empty() ? nullptr : bias.data();
    qf_cpu_linear_options options = {};
    qf_cpu_linear *linear = nullptr;
    std::vector<float> out((size_t)num_tokens * n);
    CHECK_OK(qf_cpu_linear_create(&source, &options, cpu.pool, &linear, &check_error));
    qf_cpu_linear_args args = {};
    args.x = x.data();
    args.linears[0] = linear;
    args.outs[0] = out.data();
    args.num_linears = 1;
    args.num_tokens = num_tokens;
    qf_cpu_linear_run(cpu.context, &args);
    qf_cpu_linear_destroy(linear);
    return out;
}

static void check_linear(const Cpu &cpu, Random &random, int num_tokens, int n, int k, bool with_bias)
{
    std::vector<float> x = random_floats(random, (size_t)num_tokens * k), w = random_floats(random, (size_t)n * k);
    std::vector<float> bias = random_floats(random, with_bias ? (size_t)n : 0, 5.0f);
    std::vector<float> out = run_linear(x, w, bias, num_tokens, n, k);
    CHECK(same_bits(out, cpu_linear(cpu, x, w, bias, num_tokens, n, k)));
    CHECK(same_bits(out, run_linear(x, w, bias, num_tokens, n, k)));
    std::vector<double> expected, actual;
    for (int t = 0; t < num_tokens; t++) {
        for (int j = t % 5; j < n; j += 1 + n / 40) {
            double sum = with_bias ? bias[(size_t)j] : 0.0;
            for (int i = 0; i < k; i++) {
                sum += (double)x[(size_t)t * k + i] * w[(size_t)j * k + i];
            }
            expected.push_back(sum);
            actual.push_back(out[(size_t)t * n + j]);
        }
    }
    CHECK(relative_error(actual, expected, expected.size()) < 3e-6);
}

static void test_linear(const Cpu &cpu)
{
    Random random(1);
    for (int num_tokens : {1, 2, 3, 7, 8, 9, 17, 64, 65, 118, 130}) {
        if (check_brief && num_tokens > 17 && num_tokens != 65) {
            continue;
        }
        check_linear(cpu, random, num_tokens, 384, 384, num_tokens % 2 == 0);
    }
    check_linear(cpu, random, 1, 1, 1, true);
    check_linear(cpu, random, 3, 17, 5, true);
    check_linear(cpu, random, 65, 63, 33, false);
    check_linear(cpu, random, 5, 130, 100, true);
    check_linear(cpu, random, 17, 2048, 384, false);
    check_linear(cpu, random, 17, 384, 1024, true);
    if (!check_brief) {
        check_linear(cpu, random, 1, 8192, 384, false);
        check_linear(cpu, random, 2, 896, 4864, false);
    }
}

/* --- rmsnorm -------------------------------------------------------------------------------------------------- */

static void check_rmsnorm(const Cpu &cpu, Random &random, int num_tokens, int hidden_size, bool with_delta)
{
    const float eps = 1e-6f;
    std::vector<float> residual = random_floats(random, (size_t)num_tokens * hidden_size, 2.0f);
    std::vector<float> delta = random_floats(random, residual.size(), 0.5f);
    std::vector<float> weight = random_floats(random, (size_t)hidden_size);
    residual[residual.size() / 2] = 15000.0f;
    Device<float> device_residual(residual), device_delta(delta), device_weight(weight), out(residual.size());
    qf_cuda_rmsnorm_f32_args args = {};
    args.residual = device_residual.data;
    args.delta = with_delta ? device_delta.data : nullptr;
    args.weight = device_weight.data;
    args.out = out.data;
    args.num_rows = num_tokens;
    args.hidden_size = hidden_size;
    args.eps = eps;

    /* Rows by index first: the residual stays. The last row twice. */
    std::vector<int32_t> rows = {num_tokens - 1, 0, num_tokens - 1};
    Device<int32_t> device_rows(rows);
    Device<float> gathered(rows.size() * hidden_size);
    qf_cuda_rmsnorm_f32_args some = args;
    some.rows = device_rows.data;
    some.num_rows = (int)rows.size();
    some.out = gathered.data;
    CHECK_OK(qf_cuda_rmsnorm_f32(&some, 0, &check_error));
    CHECK(same_bits(device_residual.get(), residual));

    CHECK_OK(qf_cuda_rmsnorm_f32(&args, 0, &check_error));
    std::vector<float> result = out.get(), sums = device_residual.get(), taken = gathered.get();
    for (size_t r = 0; r < rows.size(); r++) {
        CHECK(memcmp(&taken[r * hidden_size], &result[(size_t)rows[r] * hidden_size], (size_t)hidden_size * 4) == 0);
    }

    std::vector<float> cpu_residual = residual, cpu_out(residual.size());
    qf_rmsnorm_args cpu_args = {cpu_residual.data(), with_delta ? delta.data() : nullptr, weight.data(), cpu_out.data(),
                                num_tokens,          hidden_size,                         eps};
    qf_cpu_rmsnorm(cpu.context, &cpu_args);
    CHECK(same_bits(sums, cpu_residual));
    CHECK(relative_error(result, cpu_out, result.size()) < 2e-6);
    for (int t = 0; t < num_tokens; t++) {
        const float *h = &sums[(size_t)t * hidden_size];
        double squares = 0;
        for (int i = 0; i < hidden_size; i++) {
            squares += (double)h[i] * h[i];
        }
        std::vector<double> expected((size_t)hidden_size);
        for (int i = 0; i < hidden_size; i++) {
            expected[(size_t)i] = h[i] / sqrt(squares / hidden_size + (double)eps) * weight[(size_t)i];
        }
        CHECK(relative_error(&result[(size_t)t * hidden_size], expected, expected.size()) < 2e-6);
    }

    if (with_delta) { /* only the addition */
        device_residual.put(residual);
        args.out = nullptr;
        args.weight = nullptr;
        CHECK_OK(qf_cuda_rmsnorm_f32(&args, 0, &check_error));
        CHECK(same_bits(device_residual.get(), sums));
    }
}

static void test_rmsnorm(const Cpu &cpu)
{
    Random random(2);
    for (int num_tokens : {1, 2, 3, 7, 17, 118, 130}) {
        check_rmsnorm(cpu, random, num_tokens, 384, num_tokens % 2 == 1);
        check_rmsnorm(cpu, random, num_tokens, 100, true);
    }
    check_rmsnorm(cpu, random, 5, 1, true);
    check_rmsnorm(cpu, random, 5, 33, false);
    check_rmsnorm(cpu, random, 9, 3584, true);
}

/* --- silu_mul ------------------------------------------------------------------------------------------------- */

static void test_silu_mul(const Cpu &cpu)
{
    Random random(3);
    for (int size : {1, 2, 255, 256, 257, 118 * 1024}) {
        std::vector<float> gate = random_floats(random, (size_t)size, 6.0f);
        std::vector<float> up = random_floats(random, (size_t)size, 3.0f);
        if (size > 4) { /* exp overflows: silu is -0 */
            gate[0] = -200.0f;
            gate[1] = 200.0f;
            gate[2] = 0.0f;
        }
        Device<float> device_gate(gate), device_up(up);
        CHECK_OK(qf_cuda_silu_mul_f32(device_gate.data, device_up.data, size, 0, &check_error));
        std::vector<float> result = device_gate.get(), cpu_out((size_t)size);
        qf_silu_mul_args args = {gate.data(), up.data(), cpu_out.data(), 1, size};
        qf_cpu_silu_mul(cpu.context, &args);
        int wrong = 0;
        for (size_t i = 0; i < (size_t)size; i++) {
            double expected = gate[i] / (1.0 + exp(-(double)gate[i])) * up[i];
            wrong += !(fabs(result[i] - expected) <= fabs(expected) * 1e-6 + 1e-37);
            wrong += !(fabsf(result[i] - cpu_out[i]) <= fabsf(cpu_out[i]) * 1e-6f + 1e-37f);
        }
        CHECK(wrong == 0);
    }
}

/* --- attention ------------------------------------------------------------------------------------------------ */

/* Sequences with their keys and values by position, and the paged cache made of them. */
struct Batch {
    int num_heads, num_kv_heads, head_dim, block_size, window;
    std::vector<int> query_lens, seq_lens;
    std::vector<float> q;                /* (num_tokens, num_heads, head_dim) */
    std::vector<std::vector<float>> k, v; /* by sequence: (seq_len, num_kv_heads, head_dim) */
    std::vector<int32_t> query_start_loc, block_tables, block_table_start;
    int num_blocks;
    int num_tokens() const { return query_start_loc.back(); }
    float scale() const { return (float)(1.0 / sqrt((double)head_dim)); }
};

static Batch make_batch(Random &random, int num_heads, int num_kv_heads, int head_dim, int block_size, int window,
                        std::vector<int> query_lens, std::vector<int> seq_lens)
{
    Batch b = {num_heads, num_kv_heads, head_dim, block_size, window, query_lens, seq_lens, {}, {}, {}, {0}, {}, {}, 0};
    for (size_t s = 0; s < seq_lens.size(); s++) {
        b.query_start_loc.push_back(b.query_start_loc.back() + query_lens[s]);
        b.k.push_back(random_floats(random, (size_t)seq_lens[s] * num_kv_heads * head_dim, 2.0f));
        b.v.push_back(random_floats(random, b.k.back().size()));
        b.block_table_start.push_back((int32_t)b.block_tables.size());
        for (int i = 0; i < seq_lens[s]; i += block_size) {
            b.block_tables.push_back(b.num_blocks++);
        }
    }
    b.num_blocks += 2; /* some stay unused */
    for (size_t i = b.block_tables.size(); i-- > 1;) { /* blocks in any order */
        std::swap(b.block_tables[i], b.block_tables[(size_t)random.below((int)i + 1)]);
    }
    b.q = random_floats(random, (size_t)b.num_tokens() * num_heads * head_dim, 2.0f);
    return b;
}

static int slot_of(const Batch &b, size_t seq, int position)
{
    int block = b.block_tables[(size_t)(b.block_table_start[seq] + position / b.block_size)];
    return block * b.block_size + position % b.block_size;
}

/* The device's cache; NaN where no position is. */
static std::vector<float> paged(const Batch &b, const std::vector<std::vector<float>> &by_position)
{
    std::vector<float> cache((size_t)b.num_blocks * b.num_kv_heads * b.block_size * b.head_dim, NAN);
    for (size_t s = 0; s < by_position.size(); s++) {
        for (int p = 0; p < b.seq_lens[s]; p++) {
            int slot = slot_of(b, s, p), block = slot / b.block_size, offset = slot % b.block_size;
            for (int h = 0; h < b.num_kv_heads; h++) {
                size_t row = ((size_t)block * b.num_kv_heads + h) * b.block_size + offset;
                memcpy(&cache[row * b.head_dim], &by_position[s][((size_t)p * b.num_kv_heads + h) * b.head_dim],
                       (size_t)b.head_dim * 4);
            }
        }
    }
    return cache;
}

static std::vector<float> run_attention(const Batch &b)
{
    Device<float> k(paged(b, b.k)), v(paged(b, b.v)), q(b.q), out(b.q.size());
    Device<int32_t> query_start_loc(b.query_start_loc), seq_lens(b.seq_lens), tables(b.block_tables),
        table_start(b.block_table_start);
    qf_cuda_attention_f32_args args = {};
    args.shape = {b.num_heads, b.num_kv_heads, b.head_dim, b.block_size, b.window};
    args.kv = {k.data, v.data, b.block_size, b.num_kv_heads, b.head_dim, true};
    args.q = q.data;
    args.out = out.data;
    args.query_start_loc = query_start_loc.data;
    args.seq_lens = seq_lens.data;
    args.block_tables = tables.data;
    args.block_table_start = table_start.data;
    args.num_seqs = (int)b.seq_lens.size();
    args.num_tokens = b.num_tokens();
    args.scale = b.scale();
    CHECK_OK(qf_cuda_attention_f32(&args, 0, &check_error));
    return out.get();
}

/* softmax(scale q k^T) v of one row and head, in float64. */
static std::vector<double> host_attention(const Batch &b, size_t seq, int row_of_seq, int head)
{
    int position = b.seq_lens[seq] - b.query_lens[seq] + row_of_seq;
    int begin = b.window > 0 ? std::max(0, position + 1 - b.window) : 0;
    int kv_head = head / (b.num_heads / b.num_kv_heads);
    const float *q = &b.q[((size_t)(b.query_start_loc[seq] + row_of_seq) * b.num_heads + head) * b.head_dim];
    std::vector<double> scores, out((size_t)b.head_dim);
    double largest = -INFINITY, total = 0;
    for (int p = begin; p <= position; p++) {
        const float *k = &b.k[seq][((size_t)p * b.num_kv_heads + kv_head) * b.head_dim];
        double score = 0;
        for (int d = 0; d < b.head_dim; d++) {
            score += (double)q[d] * k[d];
        }
        scores.push_back(score * (double)b.scale());
        largest = std::max(largest, scores.back());
    }
    for (int p = begin; p <= position; p++) {
        const float *v = &b.v[seq][((size_t)p * b.num_kv_heads + kv_head) * b.head_dim];
        double weight = exp(scores[(size_t)(p - begin)] - largest);
        total += weight;
        for (int d = 0; d < b.head_dim; d++) {
            out[(size_t)d] += weight * v[d];
        }
    }
    for (double &o : out) {
        o /= total;
    }
    return out;
}

static std::vector<float> cpu_attention(const Cpu &cpu, const Batch &b)
{
    size_t bytes = qf_cpu_kv_cache_bytes(b.num_blocks, b.block_size, b.num_kv_heads, b.head_dim, QF_KV_F32);
    std::vector<float> k(bytes / 4), v(bytes / 4), out(b.q.size());
    qf_kv_cache cache = {k.data(), v.data(), QF_DTYPE_F32, b.num_blocks, b.block_size, b.num_kv_heads, b.head_dim};
    std::vector<int32_t> tables;
    int stride = 0;
    for (int len : b.seq_lens) {
        stride = std::max(stride, (len + b.block_size - 1) / b.block_size);
    }
    for (size_t s = 0; s < b.seq_lens.size(); s++) {
        for (int p = 0; p < b.seq_lens[s]; p++) { /* no rotation: cosine 1, sine 0 */
            std::vector<float> q((size_t)b.num_heads * b.head_dim), cos_sin((size_t)b.head_dim);
            std::fill(cos_sin.begin(), cos_sin.begin() + b.head_dim / 2, 1.0f);
            int32_t slot = slot_of(b, s, p);
            size_t at = (size_t)p * b.num_kv_heads * b.head_dim;
            qf_rope_kv_write_args write = {q.data(), &b.k[s][at], &b.v[s][at],  cos_sin.data(),
                                           &slot,    cache,       1,            b.num_heads};
            qf_cpu_rope_kv_write(cpu.context, &write);
        }
        for (int i = 0; i < stride; i++) {
            bool used = i * b.block_size < b.seq_lens[s];
            tables.push_back(used ? b.block_tables[(size_t)(b.block_table_start[s] + i)] : -1);
        }
    }
    qf_attention_args args = {b.q.data(), out.data(), cache,  b.query_start_loc.data(),  b.seq_lens.data(),
                              tables.data(), stride,  (int)b.seq_lens.size(), b.num_heads, b.window,
                              b.scale()};
    qf_cpu_attention(cpu.context, &args);
    return out;
}

/* The last row of each sequence as a step of its own: the same bits as within its chunk. */
static void check_last_rows_alone(const Batch &b, const std::vector<float> &out)
{
    Batch last = b;
    size_t row_size = (size_t)b.num_heads * b.head_dim;
    std::vector<float> expected;
    last.q.clear();
    last.query_start_loc = {0};
    for (size_t s = 0; s < b.seq_lens.size(); s++) {
        size_t row = (size_t)b.query_start_loc[s + 1] - 1;
        last.q.insert(last.q.end(), b.q.begin() + row * row_size, b.q.begin() + (row + 1) * row_size);
        expected.insert(expected.end(), out.begin() + row * row_size, out.begin() + (row + 1) * row_size);
        last.query_lens[s] = 1;
        last.query_start_loc.push_back((int32_t)s + 1);
    }
    CHECK(same_bits(run_attention(last), expected));
}

static void check_attention(const Cpu &cpu, Random &random, int num_heads, int num_kv_heads, int head_dim,
                            int block_size, int window, std::vector<int> query_lens, std::vector<int> seq_lens)
{
    Batch b = make_batch(random, num_heads, num_kv_heads, head_dim, block_size, window, query_lens, seq_lens);
    std::vector<float> out = run_attention(b);
    CHECK(same_bits(out, run_attention(b)));
    check_last_rows_alone(b, out);
    for (size_t s = 0; s < seq_lens.size(); s++) {
        for (int r = 0; r < query_lens[s]; r++) {
            if (r % 11 != 0 && r >= 3 && r + 1 < query_lens[s]) {
                continue;
            }
            int head = random.below(num_heads);
            std::vector<double> expected = host_attention(b, s, r, head);
            size_t at = ((size_t)(b.query_start_loc[s] + r) * num_heads + head) * head_dim;
            CHECK(relative_error(&out[at], expected, expected.size()) < 1e-5);
        }
    }
    if (block_size % 16 == 0 && head_dim % 2 == 0) { /* what the CPU backend takes */
        CHECK(relative_error(out, cpu_attention(cpu, b), out.size()) < 1e-5);
    }
}

static void test_attention(const Cpu &cpu)
{
    Random random(4);
    check_attention(cpu, random, 6, 2, 64, 16, 0, {1}, {1});
    check_attention(cpu, random, 6, 2, 64, 16, 0, {118}, {118});
    check_attention(cpu, random, 6, 2, 64, 16, 0, {1, 2, 3, 17, 9}, {33, 2, 130, 64, 9});
    check_attention(cpu, random, 14, 2, 64, 32, 0, {7, 1}, {check_brief ? 107 : 1007, check_brief ? 60 : 600});
    check_attention(cpu, random, 28, 4, 128, 16, 0, {1, 31}, {300, 31});
    check_attention(cpu, random, 5, 5, 256, 16, 0, {8}, {65});
    check_attention(cpu, random, 6, 2, 64, 16, 1, {40}, {50});
    check_attention(cpu, random, 6, 2, 64, 16, 31, {64, 1}, {64, 500});
    check_attention(cpu, random, 6, 2, 64, 16, 33, {130}, {200});
    check_attention(cpu, random, 6, 2, 64, 16, 4096, {20}, {300});
    check_attention(cpu, random, 4, 2, 80, 16, 0, {17}, {40});
    check_attention(cpu, random, 3, 1, 33, 5, 7, {17, 2}, {40, 2});
    check_attention(cpu, random, 2, 2, 2, 1, 0, {3}, {67});
    check_attention(cpu, random, 6, 2, 64, 16, 0, {1}, {check_brief ? 900 : 9000});
}

/* --- errors --------------------------------------------------------------------------------------------------- */

#define CHECK_REFUSED(call)                         \
    do {                                            \
        qf_error check_error = {};                  \
        CHECK((call) == QF_ERROR_INVALID_ARGUMENT); \
        CHECK(check_error.message[0] != '\0');      \
    } while (0)

#define CHECK_REFUSED_WITH(function, args, field, value)    \
    do {                                                    \
        auto changed = args;                                \
        changed.field = value;                              \
        CHECK_REFUSED(function(&changed, 0, &check_error)); \
    } while (0)

static void test_errors()
{
    Device<float> f(4096);
    Device<int32_t> i(128);
    qf_cuda_linear_f32_args linear = {f.data, f.data, nullptr, f.data, 1, 1, 1};
    CHECK_REFUSED_WITH(qf_cuda_linear_f32, linear, x, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_linear_f32, linear, w, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_linear_f32, linear, out, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_linear_f32, linear, num_tokens, 0);
    CHECK_REFUSED_WITH(qf_cuda_linear_f32, linear, num_tokens, 65535 * 64 + 1);
    CHECK_REFUSED_WITH(qf_cuda_linear_f32, linear, n, 0);
    CHECK_REFUSED_WITH(qf_cuda_linear_f32, linear, k, -1);
    qf_cuda_rmsnorm_f32_args norm = {f.data, f.data, f.data, f.data, nullptr, 1, 8, 1e-6f};
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm_f32, norm, residual, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm_f32, norm, weight, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm_f32, norm, num_rows, 0);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm_f32, norm, hidden_size, 0);
    norm.out = nullptr;
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm_f32, norm, delta, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm_f32, norm, rows, i.data);
    CHECK_REFUSED(qf_cuda_silu_mul_f32(nullptr, f.data, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_silu_mul_f32(f.data, nullptr, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_silu_mul_f32(f.data, f.data, 0, 0, &check_error));
    qf_cuda_attention_f32_args attention = {};
    attention.shape = {6, 2, 64, 16, 0};
    attention.kv = {f.data, f.data, 16, 2, 64, true};
    attention.q = attention.out = f.data;
    attention.query_start_loc = attention.seq_lens = attention.block_tables = attention.block_table_start = i.data;
    attention.num_seqs = attention.num_tokens = 1;
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, q, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, kv.v, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, block_tables, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, kv.float32, false);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, kv.head_dim, 128);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, shape.head_dim, 257);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, shape.num_kv_heads, 4);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, shape.sliding_window, -1);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, num_seqs, 0);
    CHECK_REFUSED_WITH(qf_cuda_attention_f32, attention, num_tokens, 0);
}

/* --- times ---------------------------------------------------------------------------------------------------- */

static void bench_linear(int num_tokens, int n, int k)
{
    Device<float> x((size_t)num_tokens * k), w((size_t)n * k), out((size_t)num_tokens * n);
    qf_cuda_linear_f32_args args = {x.data, w.data, nullptr, out.data, num_tokens, n, k};
    double us = time_us([&](cudaStream_t stream, int) { CHECK_OK(qf_cuda_linear_f32(&args, stream, &check_error)); });
    printf("linear_f32 %4d x %4d x %5d  %8.2f us  %6.2f TFLOP/s\n", num_tokens, k, n, us,
           2e-6 * num_tokens * n * k / us);
}

static void bench_attention(int num_tokens, int seq_len)
{
    const int block_size = 16, num_blocks = (seq_len + block_size - 1) / block_size;
    Device<float> k((size_t)num_blocks * block_size * 2 * 64), v(k.size), q((size_t)num_tokens * 384), out(q.size);
    std::vector<int32_t> tables((size_t)num_blocks);
    for (int i = 0; i < num_blocks; i++) {
        tables[(size_t)i] = i;
    }
    k.zero();
    v.zero();
    q.zero();
    Device<int32_t> loc({0, num_tokens}), len(std::vector<int32_t>(1, seq_len)), block_tables(tables),
        start(std::vector<int32_t>(1, 0));
    qf_cuda_attention_f32_args args = {{6, 2, 64, block_size, 0},
                                       {k.data, v.data, block_size, 2, 64, true},
                                       q.data,
                                       out.data,
                                       loc.data,
                                       len.data,
                                       block_tables.data,
                                       start.data,
                                       1,
                                       num_tokens,
                                       0.125f};
    double us = time_us(
        [&](cudaStream_t stream, int) { CHECK_OK(qf_cuda_attention_f32(&args, stream, &check_error)); });
    printf("attention_f32 %4d tokens of 6/2 heads, %5d positions  %8.2f us\n", num_tokens, seq_len, us);
}

static void bench()
{
    for (int num_tokens : {1, 300}) {
        bench_linear(num_tokens, 512, 384);
        bench_linear(num_tokens, 2048, 384);
        bench_linear(num_tokens, 384, 1024);
        bench_linear(num_tokens, 8192, 384);
    }
    bench_linear(1, 151936, 896);
    bench_attention(1, 300);
    bench_attention(300, 300);
    bench_attention(1, 4096);
}

int main(int argc, char **argv)
{
    Options options = check_options(argc, argv);
    Cpu cpu = {nullptr, nullptr};
    CHECK_OK(qf_thread_pool_create(4, &cpu.pool, &check_error));
    CHECK_OK(qf_cpu_context_create(QF_ISA_SCALAR, cpu.pool, 256, 8192, &cpu.context, &check_error));
    if (check_failures == 0) {
        test_linear(cpu);
        test_rmsnorm(cpu);
        test_silu_mul(cpu);
        test_attention(cpu);
        test_errors();
    }
    qf_cpu_context_destroy(cpu.context);
    qf_thread_pool_destroy(cpu.pool);
    if (options.bench && check_failures == 0) {
        bench();
    }
    return check_report("reference");
}
