/* sources: base/status.c */
/* The wgmma linear kernel, and the choice between it and the mma one. --layers: after the checks, the times of the four
 * linears of a layer as the choice makes them, for programs to read. */
#include "common/ptx.cuh"
#include "weights.cuh"

/* The weight as the kernel multiplies it: bf16 scale, and the product rounded to bf16; at 4 bits zero times scale is
 * rounded too, and q scale less that. scale_multiplier is outside. */
static float rounded_value(const PackedWeight &w, int row, int column)
{
    if (w.bits == 16) {
        return w.value(row, column);
    }
    uint32_t word = w.scales[w.scale_index(row, column)];
    float scale = bf16_round(fp16_value((uint16_t)word)), zero = bf16_value((uint16_t)(word >> 16));
    float q = (float)w.quantised(row, column);
    return bf16_round(w.bits == 4 ? q * scale - bf16_round(zero * scale) : scale * (q - zero));
}

/* Sums of `rows` rows for `tokens` tokens: with the exact weights and with those that the kernel multiplies. */
struct Reference {
    std::vector<int> rows, tokens;
    std::vector<double> exact, rounded; /* (rows, tokens) */
    Reference(const PackedWeight &w, const Activations &x, std::vector<int> some_rows, std::vector<int> some_tokens)
        : rows(some_rows), tokens(some_tokens)
    {
        std::vector<float> values(x.real_k), rounded_values(x.real_k);
        for (int row : rows) {
            for (int i = 0; i < x.real_k; i++) {
                values[i] = w.value(row, i);
                rounded_values[i] = w.bits == 16 ? values[i] : w.scale_multiplier * rounded_value(w, row, i);
            }
            double bias = w.bias.empty() ? 0.0 : w.bias[row];
            for (int token : tokens) {
                const float *in = &x.rows[(size_t)token * x.real_k];
                double a = 0, b = 0;
                for (int i = 0; i < x.real_k; i++) {
                    a += (double)values[i] * in[i];
                    b += (double)rounded_values[i] * in[i];
                }
                exact.push_back(a + bias);
                rounded.push_back(b + bias);
            }
        }
    }
};

/* All if there are at most `limit`, otherwise the first, the last and some between. */
static std::vector<int> sample(int count, int limit, Random &random)
{
    std::vector<int> chosen;
    for (int i = 0; i < count && i < limit; i++) {
        chosen.push_back(count <= limit ? i : i == 0 ? 0 : i == 1 ? count - 1 : random.below(count));
    }
    return chosen;
}

static qf_cuda_linear_args make_args(const DeviceWeight &w, const Device<uint16_t> &x, int num_tokens, int splits)
{
    qf_cuda_linear_args args = {};
    args.weight = w.view;
    args.x = x.data;
    args.epilogue = QF_CUDA_STORE;
    args.num_tokens = num_tokens;
    args.num_splits = splits;
    return args;
}

typedef qf_status Linear(const qf_cuda_linear_args *, const qf_cuda_device *, cudaStream_t, qf_error *);

static void report(const char *what, const PackedWeight &w, int num_tokens, int splits, double tight, double loose)
{
    fprintf(stderr, "%s n %d k %d bits %d group %d tokens %d splits %d: error %.2e, %.2e\n", what, w.n, w.k, w.bits,
            w.group_size, num_tokens, splits, tight, loose);
}

static void check_store(Linear linear, const qf_cuda_device &device, const PackedWeight &w, int real_n, int real_k,
                        int num_tokens, int splits, double tight_limit, uint64_t seed)
{
    Random random(seed);
    Activations x(num_tokens, real_k, seed + 1);
    DeviceWeight weight(w);
    Device<uint16_t> device_x(x.tiled);
    Device<float> out((size_t)splits * num_tokens * w.n);
    qf_cuda_linear_args args = make_args(weight, device_x, num_tokens, splits);
    args.out = out.data;
    std::vector<float> first;
    for (int run = 0; run < 2; run++) {
        out.poison();
        CHECK_OK(linear(&args, &device, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
        std::vector<float> now = out.get();
        CHECK(run == 0 || memcmp(first.data(), now.data(), now.size() * sizeof(float)) == 0);
        first = now;
    }
    size_t unwritten = 0;
    for (float v : first) {
        unwritten += !(v == v);
    }
    Reference reference(w, x, sample(real_n, 40, random), sample(num_tokens, 24, random));
    std::vector<double> got;
    for (int row : reference.rows) {
        for (int token : reference.tokens) {
            double sum = 0;
            for (int s = 0; s < splits; s++) {
                sum += first[((size_t)s * num_tokens + token) * w.n + row];
            }
            got.push_back(sum);
        }
    }
    double tight = relative_error(got, reference.rounded, got.size());
    double loose = relative_error(got, reference.exact, got.size());
    bool good = unwritten == 0 && tight < tight_limit && loose < 6e-3;
    CHECK(good);
    if (!good) {
        fprintf(stderr, "%zu of %zu not written\n", unwritten, first.size());
        report("store", w, num_tokens, splits, tight, loose);
    }
}

/* rounded_weights: the kernel is known to be wgmma's. */
static void check_silu(Linear linear, const qf_cuda_device &device, const PackedWeight &w, int real_k, int num_tokens,
                       uint64_t seed, bool rounded_weights = true)
{
    Random random(seed);
    const int features = w.n / 2, act_k = (features + 127) / 128 * 128;
    Activations x(num_tokens, real_k, seed + 1);
    DeviceWeight weight(w);
    Device<uint16_t> device_x(x.tiled);
    Device<uint16_t> act(qf_cuda_tiled_size(act_k, num_tokens));
    qf_cuda_linear_args args = make_args(weight, device_x, num_tokens, 1);
    args.epilogue = QF_CUDA_SILU_MUL;
    args.act = act.data;
    std::vector<uint16_t> first;
    for (int run = 0; run < 2; run++) {
        act.poison();
        CHECK_OK(linear(&args, &device, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
        std::vector<uint16_t> now = act.get();
        if (run == 1) {
            for (int t = 0; t < num_tokens; t++) { /* rows beyond num_tokens are undefined */
                for (int i = 0; i < act_k; i++) {
                    size_t at = tiled_index(i, t, num_tokens);
                    if (first[at] != now[at]) {
                        CHECK(first[at] == now[at]);
                        return;
                    }
                }
            }
        }
        first = now;
    }
    size_t bad = 0;
    for (int t = 0; t < num_tokens; t++) {
        for (int i = 0; i < act_k; i++) {
            float v = bf16_value(first[tiled_index(i, t, num_tokens)]);
            bad += i < features ? !(v == v) : first[tiled_index(i, t, num_tokens)] != 0;
        }
    }
    CHECK(bad == 0);
    std::vector<int> chosen = sample(features, 24, random), rows, tokens = sample(num_tokens, 16, random);
    for (int j : chosen) {
        rows.push_back(interleaved_row(j, 0));
        rows.push_back(interleaved_row(j, 1));
    }
    Reference reference(w, x, rows, tokens);
    std::vector<double> got, tight_want, loose_want;
    for (size_t j = 0; j < chosen.size(); j++) {
        for (size_t t = 0; t < tokens.size(); t++) {
            size_t gate = 2 * j * tokens.size() + t, up = gate + tokens.size();
            got.push_back(bf16_value(first[tiled_index(chosen[j], tokens[t], num_tokens)]));
            tight_want.push_back(reference.rounded[gate] / (1 + exp(-reference.rounded[gate])) *
                                 reference.rounded[up]);
            loose_want.push_back(reference.exact[gate] / (1 + exp(-reference.exact[gate])) * reference.exact[up]);
        }
    }
    double tight = relative_error(got, tight_want, got.size()), loose = relative_error(got, loose_want, got.size());
    /* Rounding the output to bf16 alone is 2^-9 at most, about 1.7e-3 of the norm. Weights that are rounded (wgmma) or
     * exact (mma) differ by 2^-9 each of scale and product, in gate and in up: 4e-3 to 6e-3 together; at 4 bits by 2^-9
     * of zero times scale too, alike for a whole group: with zero points of 0 to 15 up to twice that. */
    bool good = (rounded_weights ? tight : fmin(tight, loose)) < 3e-3 && fmax(tight, loose) < (w.bits == 4 ? 1.8e-2 : 9e-3);
    CHECK(good);
    if (!good) {
        report("silu", w, num_tokens, 1, tight, loose);
    }
}

static void check_shapes(const qf_cuda_device &device)
{
    static const struct {
        int n, k;
    } shapes[] = {{16, 128}, {48, 250}, {144, 384}, {640, 384}, {272, 1024}, {896, 896}, {1152, 896}};
    static const int tokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65, 118, 130, 193, 300};
    static const int groups[] = {128, 64, 32};
    uint64_t seed = 1;
    for (auto s : shapes) {
        for (int bits : {4, 8, 16}) {
            for (int group : groups) {
                if (bits == 16 && group != 128) {
                    continue;
                }
                seed++;
                PackedWeight w = random_weight(s.n, s.k, bits, group, seed, seed % 2 == 0);
                w.scale_multiplier = bits == 16 ? 1.0f : 0.5f;
                for (int i = 0; i < (check_brief ? 1 : 4); i++) {
                    int num_tokens = tokens[(seed * 5 + i * 7) % (sizeof tokens / sizeof tokens[0])];
                    int splits = i == 0 ? 1 : 1 + (int)((seed + i) % QF_CUDA_MAX_SPLITS);
                    check_store(qf_cuda_linear_wgmma, device, w, s.n, s.k, num_tokens, splits, 2e-4, seed++);
                    check_silu(qf_cuda_linear_wgmma, device, w, s.k, tokens[seed % 18], seed + 1);
                    seed++;
                }
            }
        }
    }
    if (check_brief) {
        return;
    }
    for (int num_tokens : tokens) { /* every count, with the shapes of the demo model's gate_up and of 0.5B's o_proj */
        PackedWeight w = random_weight(2048, 384, 4, 128, seed++);
        check_silu(qf_cuda_linear_wgmma, device, w, 384, num_tokens, seed++);
        PackedWeight o = random_weight(896, 896, 8, 64, seed++, true);
        check_store(qf_cuda_linear_wgmma, device, o, 896, 896, num_tokens, 1, 2e-4, seed++);
    }
    for (int bits : {4, 8, 16}) { /* tiles of 128 to 256 tokens, several a block */
        PackedWeight qkv = random_weight(4608, 3584, bits, 128, seed++, true);
        for (int num_tokens : {64, 257, 520, 1100, 2048}) {
            check_store(qf_cuda_linear_wgmma, device, qkv, 4608, 3584, num_tokens, num_tokens == 520 ? 2 : 1, 3e-4,
                        seed++);
        }
        PackedWeight fine = random_weight(3584, 640, bits, bits == 16 ? 128 : 32, seed++, true);
        for (int num_tokens : {300, 1100, 2040}) {
            check_store(qf_cuda_linear_wgmma, device, fine, 3584, 640, num_tokens, 1, 2e-4, seed++);
        }
        PackedWeight down = random_weight(272, 18944, bits, 128, seed++);
        check_store(qf_cuda_linear_wgmma, device, down, 272, 18944, 130, 4, 1e-3, seed++);
        PackedWeight gate_up = random_weight(9728, 896, bits, 128, seed++);
        check_silu(qf_cuda_linear_wgmma, device, gate_up, 896, 1030, seed++);
        for (int k : {128, 256, 384}) { /* units as long as a ring of stages, and shorter ones */
            PackedWeight small = random_weight(9728, k, bits, 128, seed++);
            check_silu(qf_cuda_linear_wgmma, device, small, k, 1030, seed++);
        }
    }
}

/* Row `token` of x alone, and the first rows of it, have the same bits as among 300. */
static void check_invariance(Linear linear, const qf_cuda_device &device, int n, int k, int bits, qf_cuda_epilogue epilogue)
{
    const int all = 300;
    const bool silu = epilogue == QF_CUDA_SILU_MUL;
    PackedWeight w = random_weight(n, k, bits, 128, 77 + bits);
    DeviceWeight weight(w);
    Activations x(all, k, 78);
    const int act_k = (w.n / 2 + 127) / 128 * 128, width = silu ? w.n / 2 : w.n;
    std::vector<float> want;
    static const struct {
        int first, count;
    } parts[] = {{0, 300}, {0, 1}, {5, 1}, {299, 1}, {7, 2}, {8, 3}, {1, 5}, {0, 8}, {0, 17}, {11, 33}, {3, 64}, {0, 130}, {40, 257}};
    for (auto part : parts) {
        std::vector<uint16_t> tiled(qf_cuda_tiled_size(w.k, part.count), 0xffff);
        for (int t = 0; t < part.count; t++) {
            for (int i = 0; i < w.k; i++) {
                tiled[tiled_index(i, t, part.count)] = x.tiled[tiled_index(i, part.first + t, all)];
            }
        }
        int splits = qf_cuda_linear_splits(&device, w.n, w.k, bits, part.count, epilogue, true);
        Device<uint16_t> device_x(tiled);
        Device<float> out((size_t)splits * part.count * w.n);
        Device<uint16_t> act(qf_cuda_tiled_size(act_k, part.count));
        qf_cuda_linear_args args = make_args(weight, device_x, part.count, splits);
        args.epilogue = epilogue;
        args.out = out.data;
        args.act = act.data;
        args.batch_invariant = true;
        CHECK_OK(linear(&args, &device, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
        std::vector<float> sums = out.get(), got((size_t)part.count * width * splits);
        std::vector<uint16_t> features = act.get();
        for (int s = 0; s < splits; s++) {
            for (int t = 0; t < part.count; t++) {
                for (int i = 0; i < width; i++) {
                    got[((size_t)t * splits + s) * width + i] =
                        silu ? bf16_value(features[tiled_index(i, t, part.count)])
                             : sums[((size_t)s * part.count + t) * w.n + i];
                }
            }
        }
        if (part.count == all) {
            want = got;
        } else {
            bool same = memcmp(got.data(), &want[(size_t)part.first * splits * width],
                               got.size() * sizeof(float)) == 0;
            CHECK(same);
            if (!same) {
                fprintf(stderr, "tokens %d .. of %d differ from those among %d: n %d k %d bits %d\n", part.first,
                        part.count, all, n, k, bits);
            }
        }
    }
}

/* A warp's mma.sync over k in ascending order: 16 rows x 8 tokens, 16-bit weights. */
static __global__ void mma_in_order(const uint4 *weights, const uint32_t *x, float *out, int n, int k, int num_tokens)
{
    const int lane = threadIdx.x, row_tile = blockIdx.x, tile = blockIdx.y, tiles = (num_tokens + 7) / 8;
    float c[4] = {0, 0, 0, 0};
    for (int step = 0; step < k / 16; step++) {
        uint4 w = weights[((size_t)row_tile * (k / 16) + step) * 32 + lane];
        uint32_t a[4] = {w.x, w.y, w.z, w.w};
        const uint32_t *core = x + (((size_t)(step / 4) * tiles + tile) * 8 + step % 4 * 2) * 32;
        qf_mma_bf16(c, a, core[lane], core[32 + lane]);
    }
    for (int i = 0; i < 4; i++) {
        int token = tile * 8 + lane % 4 * 2 + i % 2, row = row_tile * 16 + lane / 4 + i / 2 * 8;
        if (token < num_tokens) {
            out[(size_t)token * n + row] = c[i];
        }
    }
}

static void compare_with_mma(const qf_cuda_device &device)
{
    const int n = 512, num_tokens = 64;
    for (int k : {128, 896, 3584}) {
        PackedWeight w = random_weight(n, k, 16, 128, 5);
        DeviceWeight weight(w);
        Activations x(num_tokens, k, 6);
        Device<uint16_t> device_x(x.tiled);
        Device<float> out((size_t)num_tokens * n), other((size_t)num_tokens * n);
        qf_cuda_linear_args args = make_args(weight, device_x, num_tokens, 1);
        args.out = out.data;
        CHECK_OK(qf_cuda_linear_wgmma(&args, &device, 0, &check_error));
        mma_in_order<<<dim3(n / 16, num_tokens / 8), 32>>>((const uint4 *)weight.data.data,
                                                           (const uint32_t *)device_x.data, other.data, n, k,
                                                           num_tokens);
        CHECK_CUDA(cudaDeviceSynchronize());
        std::vector<float> a = out.get(), b = other.get();
        size_t different = 0;
        for (size_t i = 0; i < a.size(); i++) {
            different += memcmp(&a[i], &b[i], 4) != 0;
        }
        double error = relative_error(a, b, a.size());
        CHECK(error < 1e-4);
        printf("wgmma and mma.sync in the same order of k, k = %d: %zu of %zu sums differ, relative error %.1e\n", k,
               different, a.size(), error);
    }
}

static void check_refusals(const qf_cuda_device &device)
{
    PackedWeight w = random_weight(32, 256, 4, 64, 9);
    DeviceWeight weight(w);
    Activations x(8, 256, 10);
    Device<uint16_t> device_x(x.tiled);
    Device<float> out(8 * 32 * 8);
    qf_error err;
    const qf_cuda_linear_args good = [&] {
        qf_cuda_linear_args a = make_args(weight, device_x, 8, 1);
        a.out = out.data;
        return a;
    }();
    if (!device.hopper) {
        CHECK(qf_cuda_linear_wgmma(&good, &device, 0, &err) == QF_ERROR_BACKEND);
        return;
    }
    CHECK(qf_cuda_linear_wgmma(&good, &device, 0, &err) == QF_OK);
    qf_cuda_linear_args a = good;
    a.weight.bits = 5;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.weight.group_size = 16;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.weight.n = 24;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.weight.k = 192;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.num_tokens = 0;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.num_splits = QF_CUDA_MAX_SPLITS + 1;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.out = nullptr;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.x = device_x.data + 1;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    a = good, a.epilogue = QF_CUDA_SILU_MUL, a.act = device_x.data, a.num_splits = 2;
    CHECK(qf_cuda_linear_wgmma(&a, &device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
}

/* The chooser: right on both sides of its threshold, with the splits that it names itself. */
static void check_choice(const qf_cuda_device &device)
{
    uint64_t seed = 1000;
    for (int bits : {4, 8, 16}) {
        PackedWeight w = random_weight(896, 1024, bits, 128, seed++, true);
        PackedWeight gate_up = random_weight(2048, 384, bits, 128, seed++);
        for (int num_tokens : {1, 8, 9, 16, 17, 33, 64, 300}) {
            int splits = qf_cuda_linear_splits(&device, 896, 1024, bits, num_tokens, QF_CUDA_STORE, false);
            CHECK(splits >= 1 && splits <= QF_CUDA_MAX_SPLITS);
            check_store(qf_cuda_linear, device, w, 896, 1024, num_tokens, splits, 6e-3, seed++);
            CHECK(qf_cuda_linear_splits(&device, 2048, 384, bits, num_tokens, QF_CUDA_SILU_MUL, false) == 1);
            check_silu(qf_cuda_linear, device, gate_up, 384, num_tokens, seed++, false);
        }
    }
    for (bool invariant : {false, true}) {
        int first = qf_cuda_linear_splits(&device, 3584, 18944, 4, 1, QF_CUDA_STORE, invariant);
        for (int num_tokens = 2; invariant && num_tokens < 20000; num_tokens *= 3) {
            CHECK(qf_cuda_linear_splits(&device, 3584, 18944, 4, num_tokens, QF_CUDA_STORE, true) == first);
        }
    }
}

/* --- times ---------------------------------------------------------------------------------------------------- */

/* kind 0: any bits; 1: bf16 pairs of random sign and mantissa; 2: scales with zero point 8 */
static __global__ void fill(uint32_t *words, size_t count, int kind, uint32_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t u = (uint32_t)i * 2654435761u + seed;
        u ^= u >> 15, u *= 2246822519u, u ^= u >> 13, u *= 3266489917u, u ^= u >> 16;
        words[i] = kind == 0 ? u : kind == 1 ? (u & 0x80ff80ffu) | 0x3c003c00u : 0x41001c00u + (u & 0x1ffu);
    }
}

struct Bench {
    const qf_cuda_device &device;
    char *pool = nullptr; /* weights, then scales */
    size_t pool_bytes = (size_t)640 << 20, scales_bytes = (size_t)64 << 20;
    uint16_t *x = nullptr, *act = nullptr;
    float *out = nullptr;
    explicit Bench(const qf_cuda_device &d) : device(d)
    {
        CHECK_CUDA(cudaMalloc((void **)&pool, pool_bytes + scales_bytes));
        CHECK_CUDA(cudaMalloc((void **)&x, (size_t)8192 * 18944 * 2));
        CHECK_CUDA(cudaMalloc((void **)&act, (size_t)8192 * 18944 * 2));
        CHECK_CUDA(cudaMalloc((void **)&out, (size_t)2048 << 20));
        fill<<<1024, 256>>>((uint32_t *)(pool + pool_bytes), scales_bytes / 4, 2, 1);
        fill<<<1024, 256>>>((uint32_t *)x, (size_t)8192 * 18944 / 2, 1, 2);
    }
    ~Bench() { cudaFree(pool), cudaFree(x), cudaFree(act), cudaFree(out); }

    /* Calls of a graph that take about 1.5 ms. */
    static int calls_for(int n, int k, int bits, int num_tokens)
    {
        double estimate_us = std::max((double)n * k * bits / 8 / 3e6, 2.0 * n * k * num_tokens / 5e8) + 3;
        return (int)std::min(256.0, std::max(3.0, 1500.0 / estimate_us));
    }

    double time(Linear linear, int n, int k, int bits, int num_tokens, bool silu, int splits)
    {
        return time(linear, n, k, bits, num_tokens, silu, splits, calls_for(n, k, bits, num_tokens), 3);
    }

    double time(Linear linear, int n, int k, int bits, int num_tokens, bool silu, int splits, int count, int repeats)
    {
        size_t bytes = (size_t)n * k * bits / 8, scales = bits == 16 ? 0 : (size_t)n * (k / 128) * 4;
        size_t copies = std::max<size_t>(1, pool_bytes / bytes);
        copies = scales > 0 ? std::min(copies, scales_bytes / scales) : copies;
        return time_us(
            [&](cudaStream_t stream, int i) {
                qf_cuda_linear_args args = {};
                args.weight.data = pool + (i % copies) * bytes;
                args.weight.scales = bits == 16 ? nullptr : (uint32_t *)(pool + pool_bytes + (i % copies) * scales);
                args.weight.n = n, args.weight.k = k, args.weight.bits = bits;
                args.weight.group_size = 128, args.weight.scale_multiplier = 1;
                args.x = x, args.out = out, args.act = act;
                args.epilogue = silu ? QF_CUDA_SILU_MUL : QF_CUDA_STORE;
                args.num_tokens = num_tokens, args.num_splits = splits;
                CHECK_OK(linear(&args, &device, stream, &check_error));
            },
            count, repeats);
    }
};

static void bench(const qf_cuda_device &device)
{
    static const struct {
        int n, k;
        bool silu;
    } shapes[] = {{37888, 3584, true}, {3584, 18944, false}, {4608, 3584, false}, {3584, 3584, false},
                  {9728, 896, true},   {896, 4864, false},   {1152, 896, false},  {896, 896, false}};
    static const int counts[] = {8, 16, 32, 64, 128, 256, 512, 2048, 8192};
    const int num_counts = sizeof counts / sizeof counts[0], num_shapes = sizeof shapes / sizeof shapes[0];
    std::vector<double> wgmma(3 * num_shapes * num_counts), best = wgmma;
    Bench b(device);
    printf("tokens: us, TFLOP/s, GB/s of weights, best share of 4.4 TB/s or 770 TFLOP/s, splits; us of mma and its splits\n");
    for (int f = 0; f < 3; f++) {
        const int bits = 4 << f;
        fill<<<1024, 256>>>((uint32_t *)b.pool, b.pool_bytes / 4, bits == 16 ? 1 : 0, 3);
        for (int i = 0; i < num_shapes; i++) {
            auto s = shapes[i];
            printf("%dx%d w%d\n", s.n, s.k, bits);
            for (int c = 0; c < num_counts; c++) {
                const int num_tokens = counts[c];
                qf_cuda_epilogue epilogue = s.silu ? QF_CUDA_SILU_MUL : QF_CUDA_STORE;
                int splits = qf_cuda_linear_wgmma_splits(&device, s.n, s.k, bits, num_tokens, epilogue, false);
                double us = b.time(qf_cuda_linear_wgmma, s.n, s.k, bits, num_tokens, s.silu, splits);
                double tflops = 2.0 * s.n * s.k * num_tokens / us / 1e6;
                double gbs = ((double)s.n * s.k * bits / 8 + (bits < 16 ? s.n * (s.k / 128) * 4.0 : 0)) / us / 1e3;
                const size_t at = (f * num_shapes + i) * num_counts + c;
                wgmma[at] = best[at] = us;
                printf("  %4d: %7.1f %4.0f %5.0f %3.0f%% s%d", num_tokens, us, tflops, gbs,
                       100 * std::max(tflops / 770, gbs / 4400), splits);
                if (num_tokens <= 128) {
                    int mma = qf_cuda_linear_mma_splits(&device, s.n, s.k, bits, num_tokens, epilogue, false);
                    double mma_us = b.time(qf_cuda_linear_mma, s.n, s.k, bits, num_tokens, s.silu, mma);
                    printf("; mma %7.1f s%d", mma_us, mma);
                    best[at] = std::min(us, mma_us);
                }
                printf("\n");
                fflush(stdout);
            }
        }
    }
    printf("us of 16 bits / us of 4 bits by tokens: the four linears of a layer, wgmma | the better kernel\n");
    for (int model = 0; model < 2; model++) {
        printf(model == 0 ? "7B  " : "0.5B");
        for (int c = 0; c < num_counts; c++) {
            double sums[4] = {0, 0, 0, 0};
            for (int i = 4 * model; i < 4 * model + 4; i++) {
                for (int f = 0; f < 2; f++) {
                    const size_t at = ((f == 0 ? 2 : 0) * num_shapes + i) * num_counts + c;
                    sums[f] += wgmma[at];
                    sums[2 + f] += best[at];
                }
            }
            printf(" %d: %.2f | %.2f (%.1f us);", counts[c], sums[0] / sums[1], sums[2] / sums[3], sums[3]);
        }
        printf("\n");
    }
}

/* One line a case: "layer", model, linear, n, k, bits, tokens, us, shares of k. The graph's calls read more than 200 MB of
 * weights, so that none of them is in the L2 when its turn comes again. */
static void bench_layers(const qf_cuda_device &device)
{
    static const struct {
        const char *model, *linear;
        int n, k;
    } linears[] = {{"7B", "qkv", 4608, 3584},         {"7B", "o", 3584, 3584},    {"7B", "gate_up", 37888, 3584},
                   {"7B", "down", 3584, 18944},       {"0.5B", "qkv", 1152, 896}, {"0.5B", "o", 896, 896},
                   {"0.5B", "gate_up", 9728, 896},    {"0.5B", "down", 896, 4864}};
    static const int counts[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};
    Bench b(device);
    for (int bits : {4, 8, 16}) {
        fill<<<1024, 256>>>((uint32_t *)b.pool, b.pool_bytes / 4, bits == 16 ? 1 : 0, 3);
        for (auto l : linears) {
            const bool silu = strcmp(l.linear, "gate_up") == 0;
            qf_cuda_epilogue epilogue = silu ? QF_CUDA_SILU_MUL : QF_CUDA_STORE;
            int cold = (int)((size_t)220000000 / ((size_t)l.n * l.k * bits / 8)) + 1;
            for (int num_tokens : counts) {
                int calls = std::max(cold, Bench::calls_for(l.n, l.k, bits, num_tokens));
                int splits = qf_cuda_linear_splits(&device, l.n, l.k, bits, num_tokens, epilogue, false);
                double us = b.time(qf_cuda_linear, l.n, l.k, bits, num_tokens, silu, splits, calls, 7);
                printf("layer %s %s %d %d %d %d %.3f %d\n", l.model, l.linear, l.n, l.k, bits, num_tokens, us, splits);
            }
        }
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    Options options = check_options(argc, argv);
    check_refusals(options.device);
    if (options.device.hopper) {
        check_shapes(options.device);
        for (int bits : {4, 8, 16}) {
            if (check_brief) {
                continue;
            }
            check_invariance(qf_cuda_linear_wgmma, options.device, 896, 896, bits, QF_CUDA_STORE);
            check_invariance(qf_cuda_linear, options.device, 272, 3584, bits, QF_CUDA_STORE);
            check_invariance(qf_cuda_linear, options.device, 2048, 384, bits, QF_CUDA_SILU_MUL);
        }
        compare_with_mma(options.device);
    }
    check_choice(options.device);
    if (options.bench && options.device.hopper) {
        bench(options.device);
    }
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--layers") == 0 && check_failures == 0) {
            bench_layers(options.device);
        }
    }
    return check_report(options.device.hopper ? "linear_wgmma" : "linear_wgmma --sm80");
}
