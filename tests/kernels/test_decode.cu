/* sources: base/status.c */
/* The decode step in one launch against plain kernels that compute the same step one op at a time. */
#include "decode_model.cuh"

static const double tolerance = 6e-3;

/* Real rows against the reference. */
static double worst_error(const Step &step, const std::vector<float> &mine, const std::vector<float> &theirs)
{
    double worst = 0;
    for (size_t t = 0; t < step.lengths.size(); t++) {
        size_t at = t * (size_t)step.m.s.vocab;
        worst = std::max(worst, relative_error(&mine[at], &theirs[at], (size_t)step.m.s.vocab));
    }
    return worst;
}

static void run_checked(Step &step, const qf_cuda_decode_options &options, const Options &o, const char *what)
{
    CHECK(qf_cuda_decode_supported(&step.args, &o.device));
    CHECK_CUDA(cudaMemset(step.logits, 0xff, step.size() * 4));
    CHECK_OK(qf_cuda_decode_with(&step.args, &options, &o.device, 0, &check_error));
    CHECK_CUDA(cudaDeviceSynchronize());
    uint32_t error;
    CHECK_CUDA(cudaMemcpy(&error, step.args.workspace, 4, cudaMemcpyDeviceToHost));
    std::vector<float> first = step.get(), expected = reference({&step})[0];
    double worst = worst_error(step, first, expected);
    if (!(worst < tolerance) || error != 0) {
        fprintf(stderr, "%s: relative error %.2e, error word %u\n", what, worst, error);
        check_failures++;
    }
    if (error != 0) {
        fprintf(stderr, "a wait gave up; the rest would tell nothing\n");
        exit(1);
    }
    CHECK_OK(qf_cuda_decode_with(&step.args, &options, &o.device, 0, &check_error));
    std::vector<float> second = step.get();
    CHECK(memcmp(first.data(), second.data(), first.size() * 4) == 0);
}

static const qf_cuda_decode_options plain = {0, 0, nullptr};

static const std::vector<std::vector<int>> batches = {
    {1}, {5}, {64}, {65}, {128}, {300}, {1000}, {257}, {129}, {0}, {256}, {600}};

static void test_shape(const Shape &shape, int head_bits, int block, bool window, const Options &o,
                       size_t first = 0, size_t step_size = 1)
{
    char what[256];
    {
        Model m(shape, 4, 128, head_bits, 1, 1000, block, o.device);
        if (window) {
            m.layers[m.layers.size() - 1].sliding_window = 100;
            m.put_layers();
        }
        for (size_t i = first; i < batches.size(); i += step_size) {
            snprintf(what, sizeof what, "%s head %d block %d window %d length %d", shape.name, head_bits, block, window,
                     batches[i][0]);
            Step step(m, batches[i]);
            run_checked(step, plain, o, what);
        }
    }
    free_all();
}

/* Many steps in a row in graphs, of several lengths by turns, which share a workspace: always the same bits. */
static void test_many_steps(const Shape &shape, const Options &o)
{
    Model m(shape, 4, 128, 16, 24, 1000, 32, o.device);
    std::vector<Step> steps;
    int seqs = 0;
    std::vector<std::vector<float>> expected;
    for (size_t i : {(size_t)5, batches.size() - 2, (size_t)9, (size_t)0, batches.size() - 1, (size_t)6}) {
        steps.emplace_back(m, batches[i], seqs);
        seqs += (int)batches[i].size();
        CHECK_OK(qf_cuda_decode(&steps.back().args, &o.device, 0, &check_error));
        expected.push_back(steps.back().get());
    }
    CHECK(seqs <= 24);
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreate(&stream));
    std::vector<cudaGraphExec_t> graphs;
    for (Step &s : steps) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < 3; i++) {
            CHECK_OK(qf_cuda_decode(&s.args, &o.device, stream, &check_error));
        }
        CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CHECK_CUDA(cudaGraphDestroy(graph));
        graphs.push_back(exec);
    }
    int different = 0;
    for (int round = 0; round < 40; round++) {
        size_t i = (size_t)round * 5 % steps.size(), repeats = 1 + (size_t)round % 7;
        CHECK_CUDA(cudaMemsetAsync(steps[i].logits, 0xff, steps[i].size() * 4, stream));
        for (size_t k = 0; k < repeats; k++) {
            CHECK_CUDA(cudaGraphLaunch(graphs[i], stream));
        }
        CHECK_CUDA(cudaStreamSynchronize(stream));
        std::vector<float> v = steps[i].get();
        different += memcmp(v.data(), expected[i].data(), v.size() * 4) != 0;
    }
    CHECK(different == 0);
    for (cudaGraphExec_t g : graphs) {
        cudaGraphExecDestroy(g);
    }
    cudaStreamDestroy(stream);
    steps.clear();
    free_all();
}

/* Each must be refused, or it would hang or read astray. */
static void test_unsupported(const Shape &shape, const Options &o)
{
    Model m(shape, 4, 128, 16, 1, 64, 32, o.device);
    Step step(m, {5});
    CHECK(qf_cuda_decode_supported(&step.args, &o.device));
    qf_cuda_decode_args bad = step.args;
    bad.num_seqs = 2;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    bad = step.args;
    bad.head_dim = 96;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    std::vector<qf_cuda_decode_layer> layers = m.layers;
    bad = step.args;
    bad.host_layers = layers.data();
    layers[1].down.data = nullptr;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    layers = m.layers;
    layers[1].down.perm = (const int32_t *)step.args.seq_lens;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    layers = m.layers;
    layers[0].gate_up.bits = 8;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    layers = m.layers;
    layers[0].gate_up.group_size = 64;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    qf_cuda_device small = o.device;
    small.max_shared_bytes = 48 * 1024;
    CHECK(!qf_cuda_decode_supported(&step.args, &small));
    qf_error error;
    CHECK(qf_cuda_decode(&step.args, &small, 0, &error) == QF_ERROR_NOT_IMPLEMENTED);
    bad = step.args;
    bad.logits = nullptr;
    CHECK(qf_cuda_decode(&bad, &o.device, 0, &error) == QF_ERROR_INVALID_ARGUMENT);
    free_all();
}

/* ---- timing ----------------------------------------------------------------------------------------------------- */

static double bench_step(Step &step, const qf_cuda_decode_options &options, const Options &o)
{
    double us = time_us(
        [&](cudaStream_t stream, int) {
            CHECK_OK(qf_cuda_decode_with(&step.args, &options, &o.device, stream, &check_error));
        },
        8, 9);
    uint32_t error;
    CHECK_CUDA(cudaMemcpy(&error, step.args.workspace, 4, cudaMemcpyDeviceToHost));
    if (error != 0) {
        fprintf(stderr, "a wait gave up; the rest would tell nothing\n");
        exit(1);
    }
    return us;
}

static void bench_line(Model &m, const char *what, const std::vector<int> &lengths, const qf_cuda_decode_options &options,
                       const Options &o, bool with_timeline)
{
    Step step(m, lengths);
    if (!qf_cuda_decode_supported(&step.args, &o.device)) {
        printf("  %-34s batch %zu: not supported\n", what, lengths.size());
        return;
    }
    double bytes = (double)m.weight_bytes, us = bench_step(step, options, o);
    for (int length : lengths) {
        bytes += 4.0 * length * m.s.kv_heads * m.s.head_dim * m.s.layers;
    }
    printf("  %-34s batch %zu context %5d: %8.1f us, %7.0f tok/s, %.3f GB, %.2f TB/s (%.0f %% of 4.4)\n", what,
           lengths.size(), lengths[0], us, 1e6 * (double)lengths.size() / us, bytes / 1e9, bytes / us / 1e6,
           bytes / us / 1e6 / 4.4 * 100);
    if (with_timeline) {
        timeline(step, o.device, [&](long long *stamps) {
            qf_cuda_decode_options stamped = options;
            stamped.stamps = stamps;
            CHECK_OK(qf_cuda_decode_with(&step.args, &stamped, &o.device, 0, &check_error));
        });
    }
    fflush(stdout);
}

static void bench_model(const Shape &shape, int head_bits, int max_len, bool variants, const Options &o)
{
    char what[64];
    Model m(shape, 4, 128, head_bits, max_len > 8192 ? 1 : 4, max_len, 32, o.device);
    CHECK_CUDA(cudaDeviceSynchronize());
    snprintf(what, sizeof what, "%s head %d", shape.name, head_bits);
    if (max_len > 8192) {
        bench_line(m, what, {max_len}, plain, o, true);
    } else {
        bench_line(m, what, {256}, plain, o, true);
    }
    if (variants) {
        struct {
            const char *name;
            qf_cuda_decode_options options;
        } list[] = {{"  2 stages", {2, 0, nullptr}}, {"  3 stages", {3, 0, nullptr}}, {"  down in 1 range", {0, 1, nullptr}},
                    {"  down in 2 ranges", {0, 2, nullptr}}};
        for (auto &v : list) {
            bench_line(m, v.name, {256}, v.options, o, false);
        }
    }
    free_all();
}

int main(int argc, char **argv)
{
    Options o = check_options(argc, argv);
    const Shape demo = {"demo", 384, 1024, 6, 2, 64, 3, 512}, demo_wide = {"demo", 384, 1024, 6, 2, 64, 3, 8192};
    const Shape small = {"0.5B", 896, 4864, 14, 2, 64, 2, 151936}, middle = {"1.5B", 1536, 8960, 12, 2, 128, 2, 8192};
    const Shape large = {"7B", 3584, 18944, 28, 4, 128, 2, 8192};
    test_unsupported(demo, o);
    if (check_brief) {
        test_shape(demo, 8, 32, false, o, 1, 3);
        return check_report("decode");
    }
    test_shape(demo, 16, 16, false, o);
    test_shape(demo_wide, 16, 32, true, o);
    test_shape(demo, 8, 32, false, o, 1, 3);
    test_shape(demo, 4, 128, true, o, 2, 3);
    test_many_steps(demo_wide, o);
    test_shape(small, 16, 32, false, o, 3, 4);
    test_shape(small, 8, 32, false, o, 5, 6);
    test_shape(middle, 16, 16, true, o, 1, 4);
    test_shape(large, 16, 32, false, o, 2, 4);
    test_many_steps(large, o);
    if (o.bench && check_failures == 0) {
        printf("decode: one launch a step\n");
        const Shape full_small = {"0.5B", 896, 4864, 14, 2, 64, 24, 151936};
        const Shape full_large = {"7B", 3584, 18944, 28, 4, 128, 28, 152064};
        bench_model(full_small, 16, 256, true, o);
        bench_model(full_small, 8, 256, false, o);
        bench_model(full_large, 16, 256, true, o);
        bench_model(full_large, 16, 32768, false, o);
    }
    return check_report("decode");
}
