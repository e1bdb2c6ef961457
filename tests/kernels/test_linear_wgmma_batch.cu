/* sources: base/status.c */
/* qf_cuda_linear_wgmma_batch against float64 sums over the dequantised weights: 4 and 8 bits, ugly shapes and token
 * counts, both epilogues, any number of shares, bit-equal reruns, chains of dependent launches. --bench: a table of
 * times beside those of the other kernels. */
#include "weights.cuh"

/* The products of sampled pairs of rows (g, g + 8) with every token, in float64. */
struct Reference {
    std::vector<int> rows; /* packed rows */
    std::vector<double> sums; /* (rows, num_tokens) */
    int num_tokens;
    Reference(const PackedWeight &w, const Activations &x, int max_rows, uint64_t seed) : num_tokens(x.num_tokens)
    {
        Random random(seed);
        for (int i = 0; i < std::min(max_rows, w.n) / 2; i++) { /* the first, the last, any between */
            int pair = max_rows >= w.n ? i : i < 8 ? i : i < 16 ? w.n / 2 - 16 + i : random.below(w.n / 2);
            rows.push_back(interleaved_row(pair, 0));
            rows.push_back(interleaved_row(pair, 1));
        }
        for (int row : rows) {
            std::vector<float> values = w.row(row);
            for (int t = 0; t < num_tokens; t++) {
                double sum = w.bias.empty() ? 0.0 : w.bias[row];
                for (int i = 0; i < x.real_k; i++) {
                    sum += (double)values[i] * (double)x.rows[(size_t)t * x.real_k + i];
                }
                sums.push_back(sum);
            }
        }
    }
    double at(size_t row, int token) const { return sums[row * num_tokens + token]; }
};

static qf_cuda_linear_args make_args(const qf_cuda_weight &weight, const Device<uint16_t> &x, int num_tokens,
                                     int splits)
{
    qf_cuda_linear_args args = {};
    args.weight = weight;
    args.x = x.data;
    args.num_tokens = num_tokens;
    args.num_splits = splits;
    return args;
}

static void check_store(const Options &o, const PackedWeight &w, const DeviceWeight &weight,
                        const Reference &reference, const Device<uint16_t> &x, int num_tokens, int splits)
{
    Device<float> out((size_t)splits * num_tokens * w.n);
    qf_cuda_linear_args args = make_args(weight.view, x, num_tokens, splits);
    args.out = out.data;
    CHECK_OK(qf_cuda_linear_wgmma_batch(&args, &o.device, nullptr, &check_error));
    std::vector<float> first = out.get();
    out.poison();
    CHECK_OK(qf_cuda_linear_wgmma_batch(&args, &o.device, nullptr, &check_error));
    std::vector<float> second = out.get();
    CHECK(memcmp(first.data(), second.data(), first.size() * 4) == 0);
    bool finite = true;
    for (float v : first) {
        finite = finite && v - v == 0;
    }
    std::vector<double> got, want;
    for (size_t i = 0; i < reference.rows.size(); i++) {
        for (int t = 0; t < num_tokens; t++) {
            double sum = 0;
            for (int s = 0; s < splits; s++) {
                sum += first[((size_t)s * num_tokens + t) * w.n + reference.rows[i]];
            }
            got.push_back(sum);
            want.push_back(reference.at(i, t));
        }
    }
    double error = relative_error(got, want, got.size());
    if (!finite || !(error < 2e-5)) {
        fprintf(stderr, "n %d k %d bits %d tokens %d splits %d: error %.3g%s\n", w.n, w.k, w.bits, num_tokens, splits,
                error, finite ? "" : ", not finite");
        CHECK(!"STORE");
    }
}

static void check_silu(const Options &o, const PackedWeight &w, const DeviceWeight &weight,
                       const Reference &reference, const Device<uint16_t> &x, int num_tokens)
{
    const int act_k = (w.n / 2 + 127) / 128 * 128;
    Device<uint16_t> act((size_t)qf_cuda_tiled_size(act_k, num_tokens));
    qf_cuda_linear_args args = make_args(weight.view, x, num_tokens, 1);
    args.epilogue = QF_CUDA_SILU_MUL;
    args.act = act.data;
    CHECK_OK(qf_cuda_linear_wgmma_batch(&args, &o.device, nullptr, &check_error));
    std::vector<uint16_t> first = act.get();
    act.poison();
    CHECK_OK(qf_cuda_linear_wgmma_batch(&args, &o.device, nullptr, &check_error));
    std::vector<uint16_t> second = act.get();
    bool same = true, complete = true;
    for (int t = 0; t < num_tokens; t++) { /* rows beyond num_tokens are undefined */
        for (int j = 0; j < act_k; j++) {
            size_t at = tiled_index(j, t, num_tokens);
            float v = bf16_value(first[at]);
            same = same && first[at] == second[at];
            complete = complete && (j < w.n / 2 ? v - v == 0 : v == 0);
        }
    }
    CHECK(same);
    double error = 0, norm = 0;
    for (size_t i = 0; i < reference.rows.size(); i += 2) {
        for (int t = 0; t < num_tokens; t++) {
            double gate = reference.at(i, t), want = gate / (1 + exp(-gate)) * reference.at(i + 1, t);
            int feature = reference.rows[i] / 16 * 8 + reference.rows[i] % 16;
            double got = bf16_value(first[tiled_index(feature, t, num_tokens)]);
            error += (got - want) * (got - want);
            norm += want * want;
        }
    }
    error = sqrt(error / norm);
    if (!complete || !(error < 3e-3)) { /* rounding the output to bf16 is 1.7e-3 */
        fprintf(stderr, "silu n %d k %d bits %d tokens %d: error %.3g%s\n", w.n, w.k, w.bits, num_tokens, error,
                complete ? "" : ", padding or holes");
        CHECK(!"SILU_MUL");
    }
}

/* One matrix with all the token counts; the rows of fewer tokens are the first rows of more. */
static void check_shape(const Options &o, int bits, int n, int k, bool silu, const std::vector<int> &tokens,
                        int max_rows, bool all_splits)
{
    uint64_t seed = (uint64_t)n * 31 + k + bits;
    PackedWeight w = random_weight(n, k, bits, 128, seed, !silu || n % 32 == 16);
    w.scale_multiplier = 0.5f;
    DeviceWeight weight(w);
    Activations all(*std::max_element(tokens.begin(), tokens.end()), k, seed + 1);
    Reference reference(w, all, max_rows, seed + 2);
    for (int num_tokens : tokens) {
        Activations some(num_tokens, k, seed + 1);
        Device<uint16_t> x(some.tiled);
        if (silu) {
            check_silu(o, w, weight, reference, x, num_tokens);
            continue;
        }
        int chosen = qf_cuda_linear_wgmma_batch_splits(&o.device, w.n, w.k, bits, num_tokens, QF_CUDA_STORE);
        CHECK(chosen >= 1 && chosen <= QF_CUDA_MAX_SPLITS && chosen <= w.k / 128);
        for (int s = 1; s <= std::min(QF_CUDA_MAX_SPLITS, w.k / 128); s++) {
            if (all_splits || s == chosen || s == 1) {
                check_store(o, w, weight, reference, x, num_tokens, s);
            }
        }
    }
}

/* gate_up then down, many times over one buffer between them without waiting: the same bits as one by one. */
static void check_chain(const Options &o, int bits, int num_tokens)
{
    const int hidden = 896, intermediate = 1024, steps = 12;
    DeviceWeight gate_up(random_weight(2 * intermediate, hidden, bits, 128, 71));
    DeviceWeight down(random_weight(hidden, intermediate, bits, 128, 72));
    const int splits =
        qf_cuda_linear_wgmma_batch_splits(&o.device, hidden, intermediate, bits, num_tokens, QF_CUDA_STORE);
    const size_t out_size = (size_t)splits * num_tokens * hidden;
    Device<uint16_t> act((size_t)qf_cuda_tiled_size(intermediate, num_tokens));
    std::vector<std::vector<uint16_t>> inputs;
    for (int i = 0; i < steps; i++) {
        inputs.push_back(Activations(num_tokens, hidden, 100 + i).tiled);
    }
    const size_t x_size = inputs[0].size();
    std::vector<uint16_t> together;
    for (auto &one : inputs) {
        together.insert(together.end(), one.begin(), one.end());
    }
    Device<uint16_t> x(together);
    Device<float> out(steps * out_size);
    std::vector<float> results[2];
    for (int overlapped = 0; overlapped < 2; overlapped++) {
        out.poison();
        CHECK_CUDA(cudaDeviceSynchronize());
        for (int i = 0; i < steps; i++) {
            qf_cuda_linear_args args = make_args(gate_up.view, x, num_tokens, 1);
            args.x = x.data + i * x_size;
            args.act = act.data;
            args.epilogue = QF_CUDA_SILU_MUL;
            CHECK_OK(qf_cuda_linear_wgmma_batch(&args, &o.device, nullptr, &check_error));
            if (!overlapped) {
                CHECK_CUDA(cudaDeviceSynchronize());
            }
            args = make_args(down.view, act, num_tokens, splits);
            args.out = out.data + i * out_size;
            CHECK_OK(qf_cuda_linear_wgmma_batch(&args, &o.device, nullptr, &check_error));
            if (!overlapped) {
                CHECK_CUDA(cudaDeviceSynchronize());
            }
        }
        results[overlapped] = out.get();
    }
    CHECK(memcmp(results[0].data(), results[1].data(), results[0].size() * 4) == 0);
    for (float v : results[1]) {
        if (!(v - v == 0)) {
            CHECK(!"a chain's result is not finite");
            break;
        }
    }
}

static void check_refusals(const Options &o)
{
    DeviceWeight weight(random_weight(64, 256, 4, 128, 5));
    Activations some(12, 256, 6);
    Device<uint16_t> x(some.tiled);
    Device<float> out(12 * 64);
    qf_error error;
    auto status = [&](const qf_cuda_linear_args &args) {
        return qf_cuda_linear_wgmma_batch(&args, &o.device, nullptr, &error);
    };
    qf_cuda_linear_args good = make_args(weight.view, x, 12, 1);
    good.out = out.data;
    if (!o.device.hopper) {
        CHECK(status(good) == QF_ERROR_BACKEND);
        return;
    }
    CHECK(status(good) == QF_OK);
    qf_cuda_linear_args bad = good;
    bad.weight.bits = 16;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.weight.group_size = 64;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.weight.n = 60;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.num_splits = 3; /* of two blocks */
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.num_tokens = 4;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.num_tokens = 65;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.batch_invariant = true;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.x = x.data + 1;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.out = nullptr;
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
    bad = good, bad.epilogue = QF_CUDA_SILU_MUL; /* without act */
    CHECK(status(bad) == QF_ERROR_INVALID_ARGUMENT);
}

/* --- times ---------------------------------------------------------------------------------------------------- */

static __global__ void fill_kernel(uint32_t *words, size_t size, uint32_t keep, uint32_t set)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 2654435761u;
        h ^= h >> 15;
        h *= 2246822519u;
        words[i] = ((h ^ h >> 13) & keep) | set;
    }
}

static void bench(const Options &o)
{
    typedef qf_status Linear(const qf_cuda_linear_args *, const qf_cuda_device *, cudaStream_t, qf_error *);
    static const struct {
        const char *name;
        int n, k;
        bool silu;
    } shapes[] = {{"7B qkv", 4608, 3584, false},       {"7B o", 3584, 3584, false},   {"7B gate_up", 37888, 3584, true},
                  {"7B down", 3584, 18944, false},     {"0.5B qkv", 1152, 896, false}, {"0.5B o", 896, 896, false},
                  {"0.5B gate_up", 9728, 896, true},   {"0.5B down", 896, 4864, false}};
    const size_t buffer_bytes = (size_t)600 << 20, scales_bytes = (size_t)64 << 20;
    Device<uint8_t> data(buffer_bytes);
    Device<uint32_t> scales(scales_bytes / 4);
    Device<uint16_t> x((size_t)18944 * 64), act((size_t)18944 * 64);
    Device<float> out((size_t)QF_CUDA_MAX_SPLITS * 64 * 4608);
    fill_kernel<<<1024, 256>>>(scales.data, scales.size, 0x000700ff, 0x41001800); /* zero point 8 ..; about 2^-9 */
    fill_kernel<<<1024, 256>>>((uint32_t *)x.data, x.size / 2, 0x80ff80ff, 0x3f003f00);
    fill_kernel<<<1024, 256>>>((uint32_t *)data.data, buffer_bytes / 4, 0xffffffffu, 0);
    printf("us (share of bytes / 4.4 TB/s), shares of k; mma; wgmma; cold L2\n");
    for (int bits : {4, 8}) {
        for (int num_tokens : {9, 16, 17, 24, 32, 33, 48, 64}) {
            double sums[2] = {0, 0};
            for (int i = 0; i < 8; i++) {
                auto &s = shapes[i];
                const size_t bytes = (size_t)s.n * s.k * bits / 8, group_bytes = (size_t)s.n * (s.k / 128) * 4;
                const size_t copies = std::min(buffer_bytes / bytes, scales_bytes / group_bytes);
                const int count = (int)std::min((size_t)250, std::max((size_t)8, ((size_t)256 << 20) / bytes + 1));
                const qf_cuda_epilogue epilogue = s.silu ? QF_CUDA_SILU_MUL : QF_CUDA_STORE;
                auto time = [&](Linear linear, int splits) {
                    return time_us(
                        [&](cudaStream_t stream, int call) {
                            qf_cuda_linear_args args = {};
                            args.weight.data = data.data + (size_t)(call % copies) * bytes;
                            args.weight.scales = scales.data + (size_t)(call % copies) * (group_bytes / 4);
                            args.weight.n = s.n, args.weight.k = s.k, args.weight.bits = bits;
                            args.weight.group_size = 128, args.weight.scale_multiplier = 1;
                            args.x = x.data, args.out = out.data, args.act = act.data;
                            args.epilogue = epilogue;
                            args.num_tokens = num_tokens, args.num_splits = splits;
                            CHECK_OK(linear(&args, &o.device, stream, &check_error));
                        },
                        count, 5);
                };
                const int splits =
                    qf_cuda_linear_wgmma_batch_splits(&o.device, s.n, s.k, bits, num_tokens, epilogue);
                const int mma =
                    qf_cuda_linear_mma_splits(&o.device, s.n, s.k, bits, num_tokens, epilogue, false);
                const int wgmma =
                    qf_cuda_linear_wgmma_splits(&o.device, s.n, s.k, bits, num_tokens, epilogue, false);
                const double us = time(qf_cuda_linear_wgmma_batch, splits);
                sums[i / 4] += us;
                printf("%-12s %d bits %2d tokens %6.1f %3.0f%% %d; %6.1f; %6.1f\n", s.name, bits, num_tokens, us,
                       100 * (bytes + group_bytes) / 4.4e6 / us, splits, time(qf_cuda_linear_mma, mma),
                       time(qf_cuda_linear_wgmma, wgmma));
            }
            printf("a layer, %d bits, %d tokens: 7B %.1f, 0.5B %.1f\n", bits, num_tokens, sums[0], sums[1]);
            fflush(stdout);
        }
    }
}

int main(int argc, char **argv)
{
    Options o = check_options(argc, argv);
    check_refusals(o);
    if (!o.device.hopper) {
        return check_report("linear_wgmma_batch");
    }
    const std::vector<int> many = {5, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 40, 41, 48, 57, 63, 64};
    const std::vector<int> tokens = check_brief ? std::vector<int>{9, 33} : many;
    for (int bits : {4, 8}) {
        check_shape(o, bits, 640, 384, false, tokens, 640, true);
        check_shape(o, bits, 384, 1024, false, tokens, 384, true);
        check_shape(o, bits, 2048, 384, true, tokens, 256, true);
        check_shape(o, bits, 40, 200, false, {9, 33}, 48, true);
        check_shape(o, bits, 16 * 21, 300, true, {9, 24, 33, 64}, 64, true);
        check_shape(o, bits, 16, 128, false, {9, 64}, 16, true);
        if (check_brief) {
            continue;
        }
        check_shape(o, bits, 1152, 896, false, {11, 32, 33, 64}, 64, true);
        check_shape(o, bits, 9728, 896, true, {11, 17, 32, 33, 64}, 64, true);
        check_shape(o, bits, 896, 4864, false, {11, 32, 33, 64}, 32, true);
        check_shape(o, bits, 4608, 3584, false, {11, 32, 49, 64}, 32, true);
        check_shape(o, bits, 151936, 896, false, {12, 40}, 32, false);
        for (int num_tokens : {12, 20, 50}) {
            check_chain(o, bits, num_tokens);
        }
    }
    if (!check_brief) {
        check_shape(o, 4, 37888, 3584, true, {11, 32, 64}, 32, true);
        check_shape(o, 4, 3584, 18944, false, {11, 32, 64}, 16, true);
        check_shape(o, 4, 16 * 1717, 1152, true, {17, 32}, 32, true); /* no even number of tiles a CTA */
    }
    if (o.bench && check_failures == 0) {
        bench(o);
    }
    return check_report("linear_wgmma_batch");
}
