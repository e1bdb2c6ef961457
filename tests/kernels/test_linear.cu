/* sources: base/status.c */
/* qf_cuda_linear_mma against float64 sums over the dequantised weights: every format, ugly shapes and token counts,
 * both epilogues, any number of shares, bit-equal reruns, batch invariance, chains of dependent launches. --bench. */
#include "weights.cuh"

/* n and k before padding. silu: n counts gate and up. */
struct Shape {
    const char *name;
    int n, k;
    bool silu;
};

/* The products of sampled rows with every token, in float64. */
struct Reference {
    std::vector<int> rows; /* packed rows */
    std::vector<double> sums; /* (rows, num_tokens) */
    int num_tokens;
    Reference(const PackedWeight &w, const Activations &x, int max_rows, uint64_t seed) : num_tokens(x.num_tokens)
    {
        Random random(seed);
        for (int i = 0; i < std::min(max_rows, w.n); i++) {
            int pair = i / 2 < 8 ? i / 2 : random.below(w.n / 16) * 8 + random.below(8); /* gate row and its up row */
            rows.push_back(max_rows >= w.n ? i : pair / 8 * 16 + pair % 8 + i % 2 * 8);
            if (max_rows < w.n && i % 2 == 1) {
                rows[i] = rows[i - 1] + 8;
            }
        }
        for (int row : rows) {
            std::vector<float> values = w.row(row);
            for (int t = 0; t < num_tokens; t++) {
                double sum = 0;
                for (int i = 0; i < x.real_k; i++) {
                    sum += (double)values[i] * (double)x.rows[(size_t)t * x.real_k + i];
                }
                sums.push_back(w.bias.empty() ? sum : sum + (double)w.bias[row]);
            }
        }
    }
    double at(size_t row, int token) const { return sums[row * num_tokens + token]; }
};

static int act_k_of(int n) { return (n / 2 + 127) / 128 * 128; }

/* STORE: num_splits * num_tokens * n floats. */
static std::vector<float> run_store(const Options &o, const DeviceWeight &w, const Device<uint16_t> &x, int num_tokens,
                                    int num_splits, bool invariant)
{
    Device<float> out((size_t)num_splits * num_tokens * w.view.n);
    qf_cuda_linear_args args = {};
    args.weight = w.view;
    args.x = x.data;
    args.out = out.data;
    args.num_tokens = num_tokens;
    args.num_splits = num_splits;
    args.batch_invariant = invariant;
    CHECK_OK(qf_cuda_linear_mma(&args, &o.device, nullptr, &check_error));
    std::vector<float> first = out.get();
    out.poison();
    CHECK_OK(qf_cuda_linear_mma(&args, &o.device, nullptr, &check_error));
    std::vector<float> second = out.get();
    CHECK(memcmp(first.data(), second.data(), first.size() * 4) == 0);
    return first;
}

static std::vector<uint16_t> run_silu(const Options &o, const DeviceWeight &w, const Device<uint16_t> &x,
                                      int num_tokens, bool invariant)
{
    Device<uint16_t> act((size_t)qf_cuda_tiled_size(act_k_of(w.view.n), num_tokens));
    qf_cuda_linear_args args = {};
    args.weight = w.view;
    args.x = x.data;
    args.act = act.data;
    args.epilogue = QF_CUDA_SILU_MUL;
    args.num_tokens = num_tokens;
    args.num_splits = 1;
    args.batch_invariant = invariant;
    CHECK_OK(qf_cuda_linear_mma(&args, &o.device, nullptr, &check_error));
    std::vector<uint16_t> first = act.get();
    act.poison();
    CHECK_OK(qf_cuda_linear_mma(&args, &o.device, nullptr, &check_error));
    std::vector<uint16_t> second = act.get();
    for (int t = 0; t < num_tokens; t++) {
        for (int j = 0; j < act_k_of(w.view.n); j++) {
            size_t at = tiled_index(j, t, num_tokens);
            if (first[at] != second[at]) {
                CHECK(!"a rerun gave other bits");
                return first;
            }
        }
    }
    return first;
}

static void check_store(const char *name, const PackedWeight &w, const Reference &reference,
                        const std::vector<float> &out, int num_tokens, int num_splits)
{
    std::vector<double> got, expected;
    bool finite = true;
    for (float v : out) {
        finite = finite && v - v == 0;
    }
    double worst = 0, scale = 0;
    for (size_t i = 0; i < reference.rows.size(); i++) {
        for (int t = 0; t < num_tokens; t++) {
            double sum = 0;
            for (int s = 0; s < num_splits; s++) {
                sum += out[((size_t)s * num_tokens + t) * w.n + reference.rows[i]];
            }
            got.push_back(sum);
            expected.push_back(reference.at(i, t));
            worst = std::max(worst, fabs(sum - reference.at(i, t)));
            scale = std::max(scale, fabs(reference.at(i, t)));
        }
    }
    double error = relative_error(got, expected, got.size());
    if (!finite || !(error < 2e-5) || !(worst < 1e-4 * scale)) {
        fprintf(stderr, "%s n %d k %d bits %d group %d tokens %d splits %d: error %.3g, worst %.3g of %.3g%s\n", name,
                w.n, w.k, w.bits, w.group_size, num_tokens, num_splits, error, worst, scale,
                finite ? "" : ", not finite");
        CHECK(!"linear_mma, STORE");
    }
}

static void check_silu(const char *name, const PackedWeight &w, const Reference &reference,
                       const std::vector<uint16_t> &act, int num_tokens)
{
    double worst = 0, error = 0, norm = 0;
    bool complete = true;
    for (size_t i = 0; i < reference.rows.size(); i++) {
        int gate_row = reference.rows[i];
        auto up = std::find(reference.rows.begin(), reference.rows.end(), gate_row + 8);
        if (gate_row % 16 >= 8 || up == reference.rows.end()) {
            continue;
        }
        for (int t = 0; t < num_tokens; t++) {
            double gate = reference.at(i, t);
            double expected = gate / (1 + exp(-gate)) * reference.at(up - reference.rows.begin(), t);
            double got = bf16_value(act[tiled_index(gate_row / 16 * 8 + gate_row % 16, t, num_tokens)]);
            double difference = fabs(got - expected) - 0.0042 * fabs(expected);
            worst = difference > worst || !(difference == difference) ? difference : worst;
            error += (got - expected) * (got - expected);
            norm += expected * expected;
        }
    }
    for (int t = 0; t < num_tokens; t++) {
        for (int j = 0; j < act_k_of(w.n); j++) {
            float v = bf16_value(act[tiled_index(j, t, num_tokens)]);
            complete = complete && (j < w.n / 2 ? v - v == 0 : v == 0);
        }
    }
    error = sqrt(error / norm);
    if (!complete || !(worst < 1e-5) || !(error < 4e-3)) {
        fprintf(stderr, "%s n %d k %d bits %d group %d tokens %d: error %.3g, worst %.3g%s\n", name, w.n, w.k, w.bits,
                w.group_size, num_tokens, error, worst, complete ? "" : ", padding or holes");
        CHECK(!"linear_mma, SILU_MUL");
    }
}

/* One matrix with all the token counts; the rows of fewer tokens are the first rows of more. */
static void check_shape(const Options &o, const Shape &shape, int bits, int group_size, const std::vector<int> &tokens,
                        int max_rows, bool all_splits)
{
    uint64_t seed = (uint64_t)shape.n * 31 + shape.k + bits * 7 + group_size;
    PackedWeight w = random_weight(shape.n, shape.k, bits, group_size, seed, !shape.silu || shape.n % 32 == 16);
    w.scale_multiplier = bits == 16 ? 1.0f : 0.5f;
    DeviceWeight device_weight(w);
    Activations all(*std::max_element(tokens.begin(), tokens.end()), shape.k, seed + 1);
    Reference reference(w, all, max_rows, seed + 2);
    std::vector<float> invariant_rows; /* STORE: of the first token; all shares */
    std::vector<uint16_t> invariant_act;
    int invariant_splits = qf_cuda_linear_mma_splits(&o.device, w.n, w.k, bits, 1, QF_CUDA_STORE, true);
    for (int num_tokens : tokens) {
        Activations one(num_tokens, shape.k, seed + 1);
        Device<uint16_t> x(one.tiled);
        if (shape.silu) {
            check_silu(shape.name, w, reference, run_silu(o, device_weight, x, num_tokens, false), num_tokens);
            std::vector<uint16_t> act = run_silu(o, device_weight, x, num_tokens, true), row;
            check_silu(shape.name, w, reference, act, num_tokens);
            for (int j = 0; j < w.n / 2; j++) {
                row.push_back(act[tiled_index(j, 0, num_tokens)]);
            }
            CHECK(invariant_act.empty() || invariant_act == row);
            invariant_act = row;
            continue;
        }
        int splits = qf_cuda_linear_mma_splits(&o.device, w.n, w.k, bits, num_tokens, QF_CUDA_STORE, false);
        CHECK(splits >= 1 && splits <= QF_CUDA_MAX_SPLITS && splits <= w.k / 128);
        check_store(shape.name, w, reference, run_store(o, device_weight, x, num_tokens, splits, false), num_tokens,
                    splits);
        for (int s = 1; all_splits && s <= std::min(QF_CUDA_MAX_SPLITS, w.k / 128); s++) {
            check_store(shape.name, w, reference, run_store(o, device_weight, x, num_tokens, s, false), num_tokens, s);
        }
        CHECK(invariant_splits ==
              qf_cuda_linear_mma_splits(&o.device, w.n, w.k, bits, num_tokens, QF_CUDA_STORE, true));
        std::vector<float> out = run_store(o, device_weight, x, num_tokens, invariant_splits, true), row;
        check_store(shape.name, w, reference, out, num_tokens, invariant_splits);
        for (int s = 0; s < invariant_splits; s++) {
            const float *first = &out[(size_t)s * num_tokens * w.n];
            row.insert(row.end(), first, first + w.n);
        }
        CHECK(invariant_rows.empty() || memcmp(invariant_rows.data(), row.data(), row.size() * 4) == 0);
        invariant_rows = row;
    }
}

/* gate_up then down, many times over one intermediate buffer without waiting in between: the same bits as one by one.
 * With dependent launch a kernel starts before the one before it ends; it must not read or overwrite too early. */
static void check_chain(const Options &o, int bits, int num_tokens)
{
    const int hidden = 896, intermediate = 1024, steps = 12;
    DeviceWeight gate_up(random_weight(2 * intermediate, hidden, bits, 128, 71));
    DeviceWeight down(random_weight(hidden, intermediate, bits, 128, 72));
    int splits = qf_cuda_linear_mma_splits(&o.device, hidden, intermediate, bits, num_tokens, QF_CUDA_STORE, false);
    size_t x_size = (size_t)qf_cuda_tiled_size(hidden, num_tokens), out_size = (size_t)splits * num_tokens * hidden;
    std::vector<uint16_t> inputs;
    for (int i = 0; i < steps; i++) {
        Activations x(num_tokens, hidden, 100 + i);
        inputs.insert(inputs.end(), x.tiled.begin(), x.tiled.end());
    }
    Device<uint16_t> x(inputs), act((size_t)qf_cuda_tiled_size(intermediate, num_tokens));
    Device<float> out(steps * out_size);
    std::vector<float> results[2];
    for (int overlapped = 0; overlapped < 2; overlapped++) {
        out.poison();
        CHECK_CUDA(cudaDeviceSynchronize());
        for (int i = 0; i < steps; i++) {
            qf_cuda_linear_args args = {};
            args.weight = gate_up.view;
            args.x = x.data + i * x_size;
            args.act = act.data;
            args.epilogue = QF_CUDA_SILU_MUL;
            args.num_tokens = num_tokens;
            args.num_splits = 1;
            CHECK_OK(qf_cuda_linear_mma(&args, &o.device, nullptr, &check_error));
            args.weight = down.view;
            args.x = act.data;
            args.act = nullptr;
            args.out = out.data + i * out_size;
            args.epilogue = QF_CUDA_STORE;
            args.num_splits = splits;
            if (!overlapped) {
                CHECK_CUDA(cudaDeviceSynchronize());
            }
            CHECK_OK(qf_cuda_linear_mma(&args, &o.device, nullptr, &check_error));
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
    DeviceWeight w(random_weight(64, 256, 4, 128, 5));
    Device<uint16_t> x(256);
    Device<float> out(64);
    qf_cuda_linear_args good = {};
    good.weight = w.view;
    good.x = x.data;
    good.out = out.data;
    good.num_tokens = 1;
    good.num_splits = 1;
    qf_error error;
    auto refused = [&](qf_cuda_linear_args args) {
        return qf_cuda_linear_mma(&args, &o.device, nullptr, &error) == QF_ERROR_INVALID_ARGUMENT;
    };
    CHECK(!refused(good));
    qf_cuda_linear_args bad = good;
    bad.weight.bits = 5;
    CHECK(refused(bad));
    bad = good;
    bad.weight.group_size = 48;
    CHECK(refused(bad));
    bad = good;
    bad.weight.n = 60;
    CHECK(refused(bad));
    bad = good;
    bad.weight.k = 192;
    CHECK(refused(bad));
    bad = good;
    bad.num_splits = 3; /* of two blocks */
    CHECK(refused(bad));
    bad = good;
    bad.num_tokens = 0;
    CHECK(refused(bad));
    bad = good;
    bad.x = x.data + 1;
    CHECK(refused(bad));
    bad = good;
    bad.out = nullptr;
    CHECK(refused(bad));
    bad = good;
    bad.weight.scales = nullptr;
    CHECK(refused(bad));
    bad = good;
    bad.epilogue = QF_CUDA_SILU_MUL; /* without act */
    CHECK(refused(bad));
}

/* Fills the benchmark's weights: codes, or bf16 numbers of ordinary size. */
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
    const Shape shapes[] = {
        {"0.5B qkv", 1152, 896, false},     {"0.5B o", 896, 896, false},     {"0.5B gate_up", 9728, 896, true},
        {"0.5B down", 896, 4864, false},    {"0.5B head", 151936, 896, false}, {"7B qkv", 4608, 3584, false},
        {"7B o", 3584, 3584, false},        {"7B gate_up", 37888, 3584, true}, {"7B down", 3584, 18944, false},
        {"7B head", 152064, 3584, false},
    };
    const int tokens[] = {1, 4, 8, 16, 32, 64, 128, 512};
    const size_t buffer_bytes = (size_t)1200 << 20, scales_bytes = (size_t)128 << 20;
    Device<uint8_t> data(buffer_bytes);
    Device<uint32_t> scales(scales_bytes / 4);
    Device<uint16_t> x((size_t)18944 * 512), act((size_t)18944 * 512);
    Device<float> out((size_t)152064 * 512);
    fill_kernel<<<1024, 256>>>(scales.data, scales.size, 0x000700ff, 0x41001800); /* zero point 8 ..; about 2^-9 */
    fill_kernel<<<1024, 256>>>((uint32_t *)x.data, x.size / 2, 0x80ff80ff, 0x3f003f00);
    printf("us a call (share of the larger of bytes / 4.4 TB/s and operations / 770 TFLOP/s), shares of k; cold "
           "L2\n%-14s bits", "");
    for (int t : tokens) {
        printf("  %9d tok", t);
    }
    printf("\n");
    for (int bits : {4, 8, 16}) {
        uint32_t keep = bits == 16 ? 0x80ff80ffu : 0xffffffffu, set = bits == 16 ? 0x3c003c00u : 0;
        fill_kernel<<<1024, 256>>>((uint32_t *)data.data, buffer_bytes / 4, keep, set);
        for (const Shape &shape : shapes) {
            size_t bytes = (size_t)shape.n * shape.k * bits / 8, group_bytes = (size_t)shape.n * (shape.k / 128) * 4;
            size_t copies = std::min(buffer_bytes / bytes, scales_bytes / group_bytes);
            int count = (int)std::min((size_t)400, std::max((size_t)16, ((size_t)256 << 20) / bytes + 1));
            printf("%-14s %4d", shape.name, bits);
            for (int num_tokens : tokens) {
                qf_cuda_epilogue epilogue = shape.silu ? QF_CUDA_SILU_MUL : QF_CUDA_STORE;
                int splits =
                    qf_cuda_linear_mma_splits(&o.device, shape.n, shape.k, bits, num_tokens, epilogue, false);
                if ((size_t)splits * num_tokens * shape.n > out.size) {
                    CHECK(!"the benchmark's output is too small");
                    continue;
                }
                double us = time_us(
                    [&](cudaStream_t stream, int i) {
                        qf_cuda_linear_args args = {};
                        args.weight.data = data.data + (size_t)(i % copies) * bytes;
                        args.weight.scales = scales.data + (size_t)(i % copies) * (group_bytes / 4);
                        args.weight.n = shape.n;
                        args.weight.k = shape.k;
                        args.weight.bits = bits;
                        args.weight.group_size = 128;
                        args.weight.scale_multiplier = 1;
                        args.x = x.data;
                        args.out = out.data;
                        args.act = act.data;
                        args.epilogue = epilogue;
                        args.num_tokens = num_tokens;
                        args.num_splits = splits;
                        CHECK_OK(qf_cuda_linear_mma(&args, &o.device, stream, &check_error));
                    },
                    count);
                double least = std::max((bytes + (bits == 16 ? 0 : group_bytes)) / 4.4e6,
                                        2.0 * shape.n * shape.k * num_tokens / 770e6);
                printf(" %8.1f %2.0f%% %d", us, 100 * least / us, splits);
            }
            printf("\n");
            fflush(stdout);
        }
    }
}

int main(int argc, char **argv)
{
    Options o = check_options(argc, argv);
    const std::vector<int> tokens = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 26, 32, 33, 64, 65, 118, 130};
    const Shape demo[] = {{"demo qkv", 640, 384, false},
                          {"demo down", 384, 1024, false},
                          {"demo gate_up", 2048, 384, true},
                          {"odd", 40, 200, false},
                          {"odd gate_up", 16 * 21, 300, true}};
    const int formats[][2] = {{4, 128}, {4, 64}, {4, 32}, {8, 128}, {8, 64}, {8, 32}, {16, 128}};
    for (const Shape &shape : demo) {
        for (auto &format : formats) {
            check_shape(o, shape, format[0], format[1], check_brief ? std::vector<int>{1, 3, 9, 33} : tokens,
                        format[1] == 128 ? 2048 : 64, format[1] == 32);
        }
    }
    if (check_brief) {
        return check_report("linear");
    }
    const Shape large[] = {{"0.5B qkv", 1152, 896, false},        {"0.5B o", 896, 896, false},
                           {"0.5B gate_up", 9728, 896, true},     {"0.5B down", 896, 4864, false},
                           {"7B qkv", 4608, 3584, false},         {"7B gate_up", 37888, 3584, true},
                           {"7B down", 3584, 18944, false}};
    for (const Shape &shape : large) {
        for (int bits : {4, 8, 16}) {
            if (bits != 4 && (size_t)shape.n * shape.k > 20000000) {
                continue; /* the host is slow */
            }
            check_shape(o, shape, bits, 128, {1, 3, 8, 11, 17, 31, 70}, 32, false);
        }
    }
    check_shape(o, {"0.5B head", 151936, 896, false}, 16, 128, {1, 8, 9, 32}, 48, false);
    for (int bits : {4, 8, 16}) {
        for (int num_tokens : {1, 6, 12, 20, 100}) {
            check_chain(o, bits, num_tokens);
        }
    }
    check_refusals(o);
    if (o.bench && check_failures == 0) {
        bench(o);
    }
    return check_report("linear");
}
