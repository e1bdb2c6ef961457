/* sources: base/status.c */
/* RMSNorm and the tiled layout against plain host loops. */
#include "check_cuda.cuh"

static const int num_tokens_cases[] = {1, 2, 3, 4, 5, 7, 8, 9, 17, 64, 118, 130};

static std::vector<float> random_floats(Random &random, size_t size, float scale = 1.0f)
{
    std::vector<float> values(size);
    for (float &v : values) {
        v = random.normal() * scale;
    }
    return values;
}

template <typename T> static bool same_bits(const std::vector<T> &a, const std::vector<T> &b)
{
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

static std::vector<int32_t> random_permutation(Random &random, int size)
{
    std::vector<int32_t> perm((size_t)size);
    for (int i = 0; i < size; i++) {
        int j = random.below(i + 1);
        perm[(size_t)i] = perm[(size_t)j];
        perm[(size_t)j] = i;
    }
    return perm;
}

/* --- layout --------------------------------------------------------------------------------------------------- */

static void check_tile(Random &random, int width, int k, int num_tokens)
{
    std::vector<float> rows = random_floats(random, (size_t)num_tokens * width);
    Device<float> device_rows(rows), back((size_t)num_tokens * width);
    Device<uint16_t> x((size_t)qf_cuda_tiled_size(k, num_tokens));
    CHECK_OK(qf_cuda_tile(device_rows.data, x.data, width, k, num_tokens, 0, &check_error));
    CHECK_OK(qf_cuda_untile(x.data, back.data, width, k, num_tokens, 0, &check_error));
    std::vector<uint16_t> tiled = x.get();
    std::vector<float> untiled = back.get();
    int wrong = 0;
    for (int t = 0; t < num_tokens; t++) {
        for (int i = 0; i < k; i++) {
            float value = i < width ? rows[(size_t)t * width + i] : 0.0f;
            wrong += tiled[tiled_index(i, t, num_tokens)] != bf16_bits(value);
            wrong += i < width && untiled[(size_t)t * width + i] != bf16_round(value);
        }
    }
    CHECK(wrong == 0);
}

static void check_permute(Random &random, int k, int num_tokens)
{
    std::vector<uint16_t> x((size_t)qf_cuda_tiled_size(k, num_tokens));
    for (uint16_t &v : x) {
        v = (uint16_t)random.bits();
    }
    std::vector<int32_t> perm = random_permutation(random, k);
    Device<uint16_t> device_x(x), out(x.size());
    Device<int32_t> device_perm(perm);
    CHECK_OK(qf_cuda_permute(device_x.data, device_perm.data, out.data, k, num_tokens, 0, &check_error));
    std::vector<uint16_t> permuted = out.get();
    int wrong = 0;
    for (int t = 0; t < num_tokens; t++) {
        for (int i = 0; i < k; i++) {
            wrong += permuted[tiled_index(i, t, num_tokens)] != x[tiled_index(perm[(size_t)i], t, num_tokens)];
        }
    }
    CHECK(wrong == 0);
}

static void test_layout()
{
    Random random(1);
    for (int num_tokens : num_tokens_cases) {
        if (check_brief && num_tokens != 3 && num_tokens != 17) {
            continue;
        }
        for (int k : {128, 384, 1024}) {
            for (int width : {1, k - 128 + 1, k - 3, k}) {
                check_tile(random, width, k, num_tokens);
            }
            check_permute(random, k, num_tokens);
        }
    }
    check_tile(random, 896, 896, 300);
    check_permute(random, 18944, 17);
}

/* --- rmsnorm -------------------------------------------------------------------------------------------------- */

struct Norm {
    int num_tokens, hidden_size, k_padded, num_splits, delta_stride;
    std::vector<float> residual, delta, weight;
    std::vector<int32_t> rows; /* empty: all */
    float eps;
    int num_rows() const { return rows.empty() ? num_tokens : (int)rows.size(); }
};

static Norm make_norm(Random &random, int num_tokens, int hidden_size, int num_splits, int num_rows)
{
    Norm n = {num_tokens, hidden_size, (hidden_size + 127) / 128 * 128, num_splits, hidden_size, {}, {}, {}, {}, 1e-6f};
    if (random.below(2) == 0) {
        n.delta_stride += 4 * random.below(20);
        n.k_padded += 128 * random.below(2);
    }
    n.residual = random_floats(random, (size_t)num_tokens * hidden_size, 3.0f);
    n.delta = random_floats(random, (size_t)std::max(num_splits, 1) * num_tokens * n.delta_stride, 0.5f);
    n.weight = random_floats(random, (size_t)hidden_size);
    for (int t = 0; t < num_tokens; t += 3) { /* outliers, as Qwen2.5 has */
        n.residual[(size_t)t * hidden_size + (size_t)random.below(hidden_size)] = 15000.0f;
    }
    for (int r = 0; r < num_rows; r++) {
        n.rows.push_back(random.below(num_tokens));
    }
    return n;
}

/* The row with its deltas, in float32 and in order: exactly what the device must make. */
static std::vector<float> host_sum(const Norm &n, int row)
{
    std::vector<float> h(n.residual.begin() + (size_t)row * n.hidden_size,
                         n.residual.begin() + (size_t)(row + 1) * n.hidden_size);
    for (int s = 0; s < n.num_splits; s++) {
        const float *delta = &n.delta[((size_t)s * n.num_tokens + row) * n.delta_stride];
        for (int i = 0; i < n.hidden_size; i++) {
            h[(size_t)i] += delta[i];
        }
    }
    return h;
}

struct NormResult {
    std::vector<float> residual;
    std::vector<uint16_t> out;
};

static NormResult run_norm(const Norm &n, const qf_cuda_device *device, bool with_out = true)
{
    Device<float> residual(n.residual), weight(n.weight), delta(n.delta);
    Device<int32_t> rows(n.rows.empty() ? std::vector<int32_t>{0} : n.rows);
    Device<uint16_t> out((size_t)qf_cuda_tiled_size(n.k_padded, n.num_rows()));
    qf_cuda_rmsnorm_args args = {};
    args.residual = residual.data;
    args.delta = n.num_splits > 0 ? delta.data : nullptr;
    args.num_splits = n.num_splits;
    args.delta_stride = n.num_splits > 0 ? n.delta_stride : 0;
    args.weight = with_out ? weight.data : nullptr;
    args.out = with_out ? out.data : nullptr;
    args.rows = n.rows.empty() ? nullptr : rows.data;
    args.num_tokens = n.num_tokens;
    args.num_rows = n.num_rows();
    args.hidden_size = n.hidden_size;
    args.k_padded = n.k_padded;
    args.eps = n.eps;
    CHECK_OK(qf_cuda_rmsnorm(&args, device, 0, &check_error));
    return {residual.get(), out.get()};
}

static void check_norm_row(const Norm &n, const NormResult &result, int r)
{
    int row = n.rows.empty() ? r : n.rows[(size_t)r];
    std::vector<float> h = host_sum(n, row);
    const float *written = &result.residual[(size_t)row * n.hidden_size];
    CHECK(memcmp(written, n.rows.empty() ? h.data() : &n.residual[(size_t)row * n.hidden_size], h.size() * 4) == 0);
    double squares = 0;
    for (float v : h) {
        squares += (double)v * v;
    }
    double inverse = 1.0 / sqrt(squares / n.hidden_size + (double)n.eps);
    int wrong = 0, other_neighbour = 0;
    for (int i = 0; i < n.k_padded; i++) {
        uint16_t bits = result.out[tiled_index(i, r, n.num_rows())];
        if (i >= n.hidden_size) {
            wrong += bits != 0;
            continue;
        }
        double expected = h[(size_t)i] * inverse * n.weight[(size_t)i];
        /* Half a unit of bf16, and the float32 arithmetic before it. */
        wrong += !(fabs(bf16_value(bits) - expected) <= fabs(expected) * (1.0 / 256 + 1e-5) + 1e-38);
        other_neighbour += bits != bf16_bits((float)expected);
    }
    CHECK(wrong == 0);
    CHECK(other_neighbour <= 2 + n.hidden_size / 100);
}

/* One row of it alone: the same bits, whatever kernel the number of rows chose. */
static void check_norm_alone(const Norm &n, const NormResult &result, const qf_cuda_device *device, int r)
{
    int row = n.rows.empty() ? r : n.rows[(size_t)r];
    Norm one = n;
    one.num_tokens = 1;
    one.rows.clear();
    one.residual.assign(n.residual.begin() + (size_t)row * n.hidden_size,
                        n.residual.begin() + (size_t)(row + 1) * n.hidden_size);
    one.delta.clear();
    for (int s = 0; s < n.num_splits; s++) {
        auto from = n.delta.begin() + ((size_t)s * n.num_tokens + row) * n.delta_stride;
        one.delta.insert(one.delta.end(), from, from + n.delta_stride);
    }
    NormResult alone = run_norm(one, device);
    int wrong = 0;
    for (int i = 0; i < n.k_padded; i++) {
        wrong += alone.out[tiled_index(i, 0, 1)] != result.out[tiled_index(i, r, n.num_rows())];
    }
    CHECK(wrong == 0);
}

static void check_norm(Random &random, const qf_cuda_device *device, int num_tokens, int hidden_size, int num_splits,
                       int num_rows)
{
    Norm n = make_norm(random, num_tokens, hidden_size, num_splits, num_rows);
    NormResult result = run_norm(n, device);
    for (int r = 0; r < n.num_rows(); r += n.num_rows() > 20 ? 7 : 1) {
        check_norm_row(n, result, r);
    }
    check_norm_row(n, result, n.num_rows() - 1);
    check_norm_alone(n, result, device, random.below(n.num_rows()));
    NormResult again = run_norm(n, device);
    CHECK(same_bits(again.residual, result.residual));
    CHECK(same_bits(again.out, result.out)); /* both were poisoned: so are tokens beyond num_rows */
    if (num_splits > 0 && num_rows == 0) {
        NormResult only_sum = run_norm(n, device, false);
        CHECK(same_bits(only_sum.residual, result.residual));
    }
}

static void test_rmsnorm(const qf_cuda_device *device)
{
    Random random(3);
    for (int num_tokens : num_tokens_cases) {
        if (check_brief && num_tokens != 3 && num_tokens != 17) {
            continue;
        }
        check_norm(random, device, num_tokens, 384, num_tokens % 4, 0);
        check_norm(random, device, num_tokens, 896, 1 + num_tokens % 8, 0);
        check_norm(random, device, num_tokens, 3584, num_tokens % 3, 0);
        check_norm(random, device, num_tokens, 896, num_tokens % 3, 1 + num_tokens % 9);
    }
    for (int hidden_size : {4, 100, 1536, 2048, 2052, 4096, 4100, 5120, 8192}) {
        check_norm(random, device, 5, hidden_size, 5, 0);
        check_norm(random, device, 3, hidden_size, 8, 17);
        check_norm(random, device, check_brief ? 9 : 150, hidden_size, 3, 0);
    }
    check_norm(random, device, check_brief ? 70 : 700, 896, 1, 0);
    check_norm(random, device, 300, 3584, 2, 290);
}

/* --- a captured chain ----------------------------------------------------------------------------------------- */

#define CHAIN_NORMS 24

/* Norms that each read what the one before has just written: with dependent launch a missing wait shows as a wrong
 * sum. Each launch of the graph begins with other rows. */
static void test_chain(const qf_cuda_device *device, int num_tokens, int hidden_size)
{
    Random random(4);
    Norm n = make_norm(random, num_tokens, hidden_size, 2, 0);
    int k_padded = n.k_padded;
    Device<float> rows(n.residual), residual(n.residual.size()), delta(n.delta), weight(n.weight);
    Device<float> back((size_t)num_tokens * hidden_size);
    Device<uint16_t> x((size_t)qf_cuda_tiled_size(k_padded, num_tokens)), permuted(x.size);
    std::vector<int32_t> identity((size_t)k_padded);
    for (int i = 0; i < k_padded; i++) {
        identity[(size_t)i] = i;
    }
    Device<int32_t> perm(identity);
    qf_cuda_rmsnorm_args norm = {residual.data, delta.data, 2,          n.delta_stride, weight.data, x.data,
                                 nullptr,       num_tokens, num_tokens, hidden_size,    k_padded,    n.eps};

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK_CUDA(cudaStreamCreate(&stream));
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK_CUDA(cudaMemcpyAsync(residual.data, rows.data, n.residual.size() * 4, cudaMemcpyDeviceToDevice, stream));
    for (int i = 0; i < CHAIN_NORMS; i++) {
        CHECK_OK(qf_cuda_rmsnorm(&norm, device, stream, &check_error));
    }
    CHECK_OK(qf_cuda_permute(x.data, perm.data, permuted.data, k_padded, num_tokens, stream, &check_error));
    CHECK_OK(qf_cuda_untile(permuted.data, back.data, hidden_size, k_padded, num_tokens, stream, &check_error));
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int launch = 0; launch < 4; launch++) {
        Norm last = n;
        last.residual = random_floats(random, n.residual.size());
        rows.put(last.residual);
        CHECK_CUDA(cudaGraphLaunch(exec, stream));
        CHECK_CUDA(cudaStreamSynchronize(stream));
        for (int i = 0; i < CHAIN_NORMS - 1; i++) {
            for (int t = 0; t < num_tokens; t++) {
                std::vector<float> h = host_sum(last, t);
                memcpy(&last.residual[(size_t)t * hidden_size], h.data(), h.size() * 4);
            }
        }
        NormResult result = {residual.get(), x.get()};
        std::vector<float> untiled = back.get();
        for (int t = 0; t < num_tokens; t++) {
            check_norm_row(last, result, t);
            for (int i = 0; i < hidden_size; i += 5) {
                CHECK(untiled[(size_t)t * hidden_size + i] == bf16_value(result.out[tiled_index(i, t, num_tokens)]));
            }
        }
    }
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
    CHECK_CUDA(cudaStreamDestroy(stream));
}

/* --- errors --------------------------------------------------------------------------------------------------- */

#define CHECK_REFUSED(call)                                  \
    do {                                                     \
        qf_error check_error = {};                           \
        CHECK((call) == QF_ERROR_INVALID_ARGUMENT);          \
        CHECK(check_error.message[0] != '\0');               \
    } while (0)

/* A copy of `args` with one field changed must be refused. */
#define CHECK_REFUSED_WITH(function, args, field, value)          \
    do {                                                          \
        auto changed = args;                                      \
        changed.field = value;                                    \
        CHECK_REFUSED(function(&changed, device, 0, &check_error)); \
    } while (0)

static void test_errors(const qf_cuda_device *device)
{
    Device<float> f(4096), g(4096), w(4096);
    Device<uint16_t> x(4096), y(4096);
    Device<int32_t> ids(128);
    qf_cuda_rmsnorm_args n = {f.data, g.data, 1, 128, w.data, x.data, nullptr, 1, 1, 128, 128, 1e-6f};
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, residual, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, residual, f.data + 2);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, delta, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, delta, g.data + 1);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, weight, nullptr);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, out, x.data + 4);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, num_splits, 0);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, num_splits, QF_CUDA_MAX_SPLITS + 1);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, delta_stride, 124);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, delta_stride, 130);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, hidden_size, 126);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, hidden_size, 8196);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, k_padded, 64);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, k_padded, 192);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, num_rows, 0);
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, num_tokens, 2);
    n.rows = ids.data;
    CHECK_REFUSED_WITH(qf_cuda_rmsnorm, n, out, nullptr);

    CHECK_REFUSED(qf_cuda_tile(nullptr, x.data, 128, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_tile(f.data, x.data, 129, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_tile(f.data, x.data, 64, 64, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_tile(f.data, x.data + 1, 128, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_untile(x.data, f.data, 0, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_untile(x.data + 1, f.data, 128, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_untile(x.data, f.data, 128, 128, 0, 0, &check_error));
    CHECK_REFUSED(qf_cuda_permute(x.data, nullptr, y.data, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_permute(x.data, ids.data, x.data, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_permute(x.data, ids.data + 1, y.data, 128, 1, 0, &check_error));
    CHECK_REFUSED(qf_cuda_permute(x.data, ids.data, y.data, 130, 1, 0, &check_error));
}

/* --- times ---------------------------------------------------------------------------------------------------- */

#define BENCH_COUNT 20

static void print_time(const char *what, int num_tokens, int hidden_size, double us, double bytes)
{
    double gb_per_s = bytes / us / 1e3;
    printf("%-34s %5d x %4d  %8.2f us  %6.0f GB/s  %3.0f %% of 4.4 TB/s\n", what, num_tokens, hidden_size, us, gb_per_s,
           gb_per_s / 44.0);
}

/* Sets of buffers to go round: more than 200 MB of them, but no more than there are calls. Few rows are timed with
 * residual and delta in L2, where the kernels before leave them. */
static int num_sets(double bytes) { return (int)std::min(20.0, 200e6 / bytes + 2); }

static void bench_norm(const qf_cuda_device *device, int num_tokens, int hidden_size, int num_splits, bool dependent)
{
    qf_cuda_device chosen = *device;
    chosen.dependent_launch = dependent;
    double bytes = (double)num_tokens * hidden_size * (4.0 * (2 + num_splits) + 2) + 4.0 * hidden_size;
    int sets = num_sets(bytes);
    size_t size = (size_t)num_tokens * hidden_size, x_size = (size_t)qf_cuda_tiled_size(hidden_size, num_tokens);
    Device<float> residual(size * sets), delta(size * sets * num_splits), weight((size_t)hidden_size * sets);
    Device<uint16_t> x(x_size * sets);
    residual.zero();
    delta.zero();
    weight.zero();
    double us = time_us([&](cudaStream_t stream, int i) {
        int set = i % sets;
        qf_cuda_rmsnorm_args args = {residual.data + set * size,
                                     delta.data + set * size * num_splits,
                                     num_splits,
                                     hidden_size,
                                     weight.data + (size_t)set * hidden_size,
                                     x.data + set * x_size,
                                     nullptr,
                                     num_tokens,
                                     num_tokens,
                                     hidden_size,
                                     hidden_size,
                                     1e-6f};
        CHECK_OK(qf_cuda_rmsnorm(&args, &chosen, stream, &check_error));
    }, BENCH_COUNT);
    char what[64];
    snprintf(what, sizeof what, "rmsnorm, %d split%s%s", num_splits, num_splits == 1 ? "" : "s",
             dependent ? ", dependent" : "");
    print_time(what, num_tokens, hidden_size, us, bytes);
}

static void bench_permute(int num_tokens, int k)
{
    Random random(6);
    std::vector<int32_t> perm = random_permutation(random, k);
    size_t size = (size_t)qf_cuda_tiled_size(k, num_tokens);
    int sets = num_sets((double)size * 4);
    Device<int32_t> device_perm(perm);
    Device<uint16_t> x(size * sets), out(size * sets);
    x.zero();
    double us = time_us([&](cudaStream_t stream, int i) {
        CHECK_OK(qf_cuda_permute(x.data + i % sets * size, device_perm.data, out.data + i % sets * size, k, num_tokens,
                                 stream, &check_error));
    }, BENCH_COUNT);
    print_time("permute", num_tokens, k, us, (double)size * 4);
}

static void bench(const qf_cuda_device *device)
{
    for (int hidden_size : {896, 3584, 8192}) {
        for (int num_tokens : {1, 8, 64, 512, 2048}) {
            bench_norm(device, num_tokens, hidden_size, 1, false);
            bench_norm(device, num_tokens, hidden_size, 1, device->dependent_launch);
        }
        bench_norm(device, 1, hidden_size, 4, device->dependent_launch);
        bench_norm(device, 1, hidden_size, 8, device->dependent_launch);
    }
    bench_permute(1, 3584);
    bench_permute(2048, 3584);
}

int main(int argc, char **argv)
{
    Options options = check_options(argc, argv);
    test_layout();
    test_rmsnorm(&options.device);
    for (int num_tokens : {1, 7, 140}) {
        test_chain(&options.device, num_tokens, 896);
    }
    test_chain(&options.device, 3, 3584);
    test_errors(&options.device);
    if (options.bench && check_failures == 0) {
        bench(&options.device);
    }
    return check_report("elementwise");
}
