/* sources: base/status.c base/alloc.c base/dtype.c comm/comm_nccl.c backend/cuda/peers.c */
/* What GPUs of one host hand each other: the all-reduce with its norm, logits to rank 0, tokens from it.
 *
 *     test_all_reduce RANKS [--one-device] [--sm80] [--brief] [--bench] [--nccl LIBRARY]
 *
 * Sums are compared bit by bit with float32 additions in the promised order, norms with float64, ranks with each other. */
#include "bench.cuh"
#include "world.cuh"

struct Case {
    int hidden, tokens, splits;
    int listed;    /* rows chosen by a list; 0: all */
    int extra;     /* delta_stride - hidden */
    bool fresh;
};

/* One case's data on host and devices. */
struct Data {
    World &world;
    Case c;
    int rows, k_padded, stride;
    std::vector<float> residual, weight;
    std::vector<std::vector<float>> delta;
    std::vector<int32_t> list;
    Arrays<float> d_residual, d_weight, d_delta;
    Arrays<uint16_t> d_out;
    Arrays<int32_t> d_list;

    Data(World &w, const Case &one, uint64_t seed)
        : world(w), c(one), rows(one.listed > 0 ? one.listed : one.tokens), k_padded((one.hidden + 127) / 128 * 128),
          stride(one.hidden + one.extra), d_residual(w, (size_t)one.tokens * one.hidden), d_weight(w, one.hidden),
          d_delta(w, (size_t)one.splits * one.tokens * stride), d_out(w, qf_cuda_tiled_size(k_padded, rows)),
          d_list(w, rows)
    {
        Random random(seed);
        residual.resize((size_t)c.tokens * c.hidden);
        weight.resize(c.hidden);
        for (float &v : residual) {
            v = 12.0f * random.uniform() - 6.0f;
        }
        for (float &v : weight) {
            v = 1.0f + 0.5f * random.normal();
        }
        for (int r = 0; r < w.size(); r++) {
            delta.emplace_back((size_t)c.splits * c.tokens * stride);
            for (float &v : delta[r]) {
                v = 4.0f * random.uniform() - 2.0f;
            }
            d_delta.put(r, delta[r]);
        }
        for (int i = 0; i < rows; i++) {
            list.push_back(c.listed > 0 ? random.below(c.tokens) : i);
        }
        d_list.put(list);
        d_weight.put(weight);
    }
    void restore()
    {
        d_residual.put(residual);
        for (int r = 0; r < world.size(); r++) {
            world.use(r);
            d_out.of[r]->poison();
        }
        for (Rank &rank : world.ranks) {
            world.use(rank.rank);
            CHECK_CUDA(cudaDeviceSynchronize());
        }
    }
    qf_cuda_all_reduce_args args(Rank &rank, qf_cuda_all_reduce_form form, bool norm) const
    {
        int r = rank.rank;
        qf_cuda_all_reduce_args a = {};
        a.norm.residual = d_residual[r];
        a.norm.delta = d_delta[r];
        a.norm.num_splits = c.splits;
        a.norm.delta_stride = stride;
        a.norm.weight = d_weight[r];
        a.norm.out = norm ? d_out[r] : nullptr;
        a.norm.rows = c.listed > 0 ? d_list[r] : nullptr;
        a.norm.num_tokens = c.tokens;
        a.norm.num_rows = rows;
        a.norm.hidden_size = c.hidden;
        a.norm.k_padded = k_padded;
        a.norm.eps = 1e-6f;
        a.fresh = c.fresh;
        a.form = form;
        a.calls = &rank.calls;
        return a;
    }
    /* h += what one call adds, in the promised order. */
    void add_once(std::vector<float> &h) const
    {
        for (int t = 0; t < c.tokens; t++) {
            for (int i = 0; i < c.hidden; i++) {
                float &sum = h[(size_t)t * c.hidden + i];
                for (int r = 0; r < world.size(); r++) {
                    float share = -0.0f;
                    for (int s = 0; s < c.splits; s++) {
                        share += delta[r][((size_t)s * c.tokens + t) * stride + i];
                    }
                    sum = r == 0 && c.fresh ? share : sum + share;
                }
            }
        }
    }
    /* Element (k, row) of an output against the norm of a row of h in float64. */
    void check_norms(const std::vector<uint16_t> &out, const std::vector<float> &h) const
    {
        int wrong = 0;
        for (int row = 0; row < rows; row++) {
            const float *v = &h[(size_t)list[row] * c.hidden];
            double squares = 0;
            for (int i = 0; i < c.hidden; i++) {
                squares += (double)v[i] * v[i];
            }
            double inverse = 1.0 / sqrt(squares / c.hidden + 1e-6);
            for (int k = 0; k < k_padded; k++) {
                double expected = k < c.hidden ? v[k] * inverse * weight[k] : 0.0;
                double got = bf16_value(out[tiled_index(k, row, rows)]);
                wrong += !(fabs(got - expected) <= 0.0041 * fabs(expected) + 1e-30);
            }
        }
        CHECK(wrong == 0);
    }
};

/* Elements of tokens that exist; what stands beside them in a tile is undefined. */
static bool same_rows(const Data &data, const std::vector<uint16_t> &a, const std::vector<uint16_t> &b)
{
    for (int row = 0; row < data.rows; row++) {
        for (int k = 0; k < data.k_padded; k++) {
            size_t i = tiled_index(k, row, data.rows);
            if (a[i] != b[i]) {
                return false;
            }
        }
    }
    return true;
}

static bool same_bits(const float *a, const float *b, size_t size) { return memcmp(a, b, size * sizeof(float)) == 0; }

/* The residual that a rank must have after calls of a form. */
static void check_residual(const Data &data, int rank, qf_cuda_all_reduce_form form, const std::vector<float> &expected)
{
    std::vector<float> got = data.d_residual.get(rank);
    int wrong = 0;
    for (int t = 0; t < data.c.tokens; t++) {
        bool changed = data.c.listed == 0 && (form == QF_CUDA_ONE_SHOT || t % data.world.size() == rank);
        const std::vector<float> &from = changed ? expected : data.residual;
        size_t at = (size_t)t * data.c.hidden;
        wrong += !same_bits(&got[at], &from[at], data.c.hidden);
    }
    if (wrong > 0) {
        fprintf(stderr, "rank %d: %d of %d rows of the residual differ\n", rank, wrong, data.c.tokens);
    }
    CHECK(wrong == 0);
}

static void run_case(World &world, Group &group, const Case &c, uint64_t seed)
{
    int failures = check_failures;
    Data data(world, c, seed);
    std::vector<float> expected = data.residual;
    data.add_once(expected);
    std::vector<uint16_t> first;
    for (int pass = 0; pass < 4; pass++) { /* one shot, two shots, one shot again, without a norm */
        qf_cuda_all_reduce_form form = pass == 1 ? QF_CUDA_TWO_SHOT : QF_CUDA_ONE_SHOT;
        bool norm = pass < 3;
        if (!norm && c.listed > 0) {
            continue;
        }
        data.restore();
        world.each([&](Rank &rank) {
            rank.calls = 0; /* everything before has ended on all ranks */
            qf_cuda_all_reduce_args args = data.args(rank, form, norm);
            CHECK_OK(qf_cuda_all_reduce(&args, group.peers(rank.rank), &rank.device, rank.stream, &check_error));
        });
        world.synchronize();
        group.check(world);
        for (int r = 0; r < world.size(); r++) {
            check_residual(data, r, form, expected);
            if (norm) {
                std::vector<uint16_t> out = data.d_out.get(r);
                if (first.empty()) {
                    data.check_norms(out, expected);
                    first = out;
                }
                CHECK(same_rows(data, out, first));
            }
        }
    }
    if (check_failures > failures) {
        fprintf(stderr, "in: hidden %d, tokens %d, splits %d, listed %d, extra %d, fresh %d\n", c.hidden, c.tokens,
                c.splits, c.listed, c.extra, c.fresh);
    }
}

/* A NaN that would look like an empty word, and infinities, come through. */
static void test_nan(World &world, Group &group)
{
    for (int form = 0; form < 2; form++) {
        Data data(world, Case{896, 2 * world.size(), 1, 0, 0, true}, 77);
        uint32_t empty = 0xffffffffu;
        for (int r = 0; r < world.size(); r++) {
            memcpy(&data.delta[r][5], &empty, 4);
            data.delta[r][896 + 7] = INFINITY;
            data.d_delta.put(r, data.delta[r]);
        }
        data.restore();
        world.each([&](Rank &rank) {
            rank.calls = 0;
            qf_cuda_all_reduce_args args = data.args(rank, (qf_cuda_all_reduce_form)form, true);
            CHECK_OK(qf_cuda_all_reduce(&args, group.peers(rank.rank), &rank.device, rank.stream, &check_error));
        });
        world.synchronize();
        group.check(world);
        for (int r = 0; r < world.size(); r++) {
            std::vector<uint16_t> out = data.d_out.get(r);
            CHECK(isnan(bf16_value(out[tiled_index(5, 0, data.rows)])));
            CHECK(isnan(bf16_value(out[tiled_index(0, 0, data.rows)])));
            CHECK(isnan(bf16_value(out[tiled_index(7, 1, data.rows)])));
            CHECK(!isnan(bf16_value(out[tiled_index(7, 2, data.rows)])));
        }
    }
}

static void test_cases(World &world, Group &group, Group &small)
{
    int most = world.shared_device ? 9 : 300;
    for (int hidden : {384, 896, 3584, 8192, 132, 5120}) {
        for (int tokens : {1, 2, 3, 7, 8, 9, 17, 64, 73, 118, 300}) {
            if (tokens > most || (check_brief && tokens > 17) || (hidden == 8192 && tokens > 118)) {
                continue;
            }
            run_case(world, group, Case{hidden, tokens, 1 + (tokens + hidden / 128) % 8, 0, tokens % 2 * 128, tokens == 7},
                     (uint64_t)(hidden * 1000 + tokens));
        }
    }
    run_case(world, group, Case{3584, most, 2, 5, 0, false}, 1);
    run_case(world, group, Case{896, 9, 1, 9, 128, false}, 2);
    /* Cut into launches. */
    run_case(world, small, Case{896, world.shared_device ? 9 : 61, 2, 0, 0, false}, 3);
    run_case(world, small, Case{896, 9, 2, 7, 0, false}, 4);
    run_case(world, small, Case{896, 9, 1, 0, 0, true}, 5);
    test_nan(world, group);
}

/* --- steps in a row ------------------------------------------------------------------------------------------------ */

/* A graph of 5 calls, launched over and over, ranks out of step with each other. */
static void test_replay(World &world, Group &group, qf_cuda_all_reduce_form form, int replays)
{
    Data data(world, Case{896, 3, 2, 0, 0, false}, 99);
    data.restore();
    world.each([&](Rank &rank) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        Random random(1000 + rank.rank);
        rank.calls = 0;
        CHECK_CUDA(cudaStreamBeginCapture(rank.stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < 5; i++) {
            qf_cuda_all_reduce_args args = data.args(rank, form, true);
            CHECK_OK(qf_cuda_all_reduce(&args, group.peers(rank.rank), &rank.device, rank.stream, &check_error));
        }
        CHECK_CUDA(cudaStreamEndCapture(rank.stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CHECK_CUDA(cudaGraphUpload(exec, rank.stream));
        CHECK_CUDA(cudaStreamSynchronize(rank.stream));
        world.wait();
        for (int i = 0; i < replays; i++) {
            if (random.below(20) == 0) {
                usleep((useconds_t)random.below(300));
            }
            CHECK_CUDA(cudaGraphLaunch(exec, rank.stream));
            if (i % 50 == 49) {
                CHECK_CUDA(cudaStreamSynchronize(rank.stream));
            }
        }
        CHECK_CUDA(cudaStreamSynchronize(rank.stream));
        world.wait();
        CHECK_CUDA(cudaGraphExecDestroy(exec));
        CHECK_CUDA(cudaGraphDestroy(graph));
    });
    group.check(world);
    std::vector<float> expected = data.residual;
    for (int i = 0; i < 5 * replays; i++) {
        data.add_once(expected);
    }
    for (int r = 0; r < world.size(); r++) {
        check_residual(data, r, form, expected);
        CHECK(same_rows(data, data.d_out.get(r), data.d_out.get(0)));
        if (r == 0) {
            data.check_norms(data.d_out.get(r), expected);
        }
    }
}

/* Steps as a model makes them: all-reduces, logits, tokens; one rank or another late on its own device. */
struct Step {
    int rows, columns, width; /* of a rank; of all */
    std::vector<int> first;   /* (ranks + 1) */
};

static float logit(int step, int rank, int row, int column) { return (float)(step * 7 + rank * 100 + row * 13 + column); }

static __global__ void fill_kernel(float *part, int rows, int columns, int stride, int step, int rank, int32_t *tokens)
{
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
        part[i / columns * stride + i % columns] = (float)(step * 7 + rank * 100 + i / columns * 13 + i % columns);
    }
    if (rank == 0 && threadIdx.x < rows) {
        tokens[threadIdx.x] = (int)threadIdx.x == rows - 1 ? -1 : step * 1000 + (int)threadIdx.x;
    }
}

static void test_steps(World &world, Group &group, int columns, int uneven, int rows)
{
    const int steps = 60, size = world.size(), stride = columns + uneven + 4, slots = rows + 3;
    const int width = columns * size + uneven;
    Data data(world, Case{384, rows, 1, 0, 0, false}, 5);
    Arrays<float> part(world, (size_t)rows * stride), log(world, (size_t)steps * rows * width), out(world, (size_t)rows * width);
    Arrays<int32_t> tokens(world, rows), last(world, slots), token_log(world, (size_t)steps * (rows + slots));
    Arrays<qf_cuda_sample_row> sample_rows(world, rows);
    std::vector<qf_cuda_sample_row> list(rows);
    for (int i = 0; i < rows; i++) {
        list[i].slot = i == 1 ? -1 : (i + 2) % slots;
    }
    sample_rows.put(list);
    for (int r = 0; r < size; r++) {
        world.use(r);
        last.of[r]->zero();
    }
    data.restore();
    world.each([&](Rank &rank) {
        const int r = rank.rank;
        Random random(50 + r);
        const int own = columns + (r == size - 1 ? uneven : 0);
        for (int s = 0; s < steps; s++) {
            rank.calls = 0;
            for (int i = 0; i < 3; i++) {
                if (random.below(6) == 0) {
                    delay_kernel<<<1, 1, 0, rank.stream>>>((uint32_t)random.below(100000));
                }
                qf_cuda_all_reduce_args args = data.args(rank, QF_CUDA_ONE_SHOT, true);
                CHECK_OK(qf_cuda_all_reduce(&args, group.peers(r), &rank.device, rank.stream, &check_error));
            }
            fill_kernel<<<1, 256, 0, rank.stream>>>(part[r], rows, own, stride, s, r, tokens[r]);
            qf_cuda_gather_args gather = {part[r], out[0], rows, stride, width, r * columns, own};
            CHECK_OK(qf_cuda_gather(&gather, group.peers(r), &rank.device, rank.stream, &check_error));
            qf_cuda_share_tokens_args share = {sample_rows[r], tokens[r], last[r], rows};
            CHECK_OK(qf_cuda_share_tokens(&share, group.peers(r), &rank.device, rank.stream, &check_error));
            if (r == 0) {
                CHECK_CUDA(cudaMemcpyAsync(log[0] + (size_t)s * rows * width, out[0], sizeof(float) * rows * width,
                                           cudaMemcpyDeviceToDevice, rank.stream));
            }
            int32_t *to = token_log[r] + (size_t)s * (rows + slots);
            CHECK_CUDA(cudaMemcpyAsync(to, tokens[r], sizeof(int32_t) * rows, cudaMemcpyDeviceToDevice, rank.stream));
            CHECK_CUDA(cudaMemcpyAsync(to + rows, last[r], sizeof(int32_t) * slots, cudaMemcpyDeviceToDevice, rank.stream));
        }
    });
    world.synchronize();
    group.check(world);
    std::vector<float> logits = log.get(0);
    int wrong = 0;
    for (int s = 0; s < steps; s++) {
        for (int row = 0; row < rows; row++) {
            for (int i = 0; i < width; i++) {
                int r = std::min(i / columns, size - 1);
                wrong += logits[((size_t)s * rows + row) * width + i] != logit(s, r, row, i - r * columns);
            }
        }
    }
    CHECK(wrong == 0);
    for (int r = 0; r < size; r++) {
        std::vector<int32_t> got = token_log.get(r);
        wrong = 0;
        for (int s = 0; s < steps; s++) {
            const int32_t *at = &got[(size_t)s * (rows + slots)];
            for (int i = 0; i < rows; i++) {
                int token = i == rows - 1 ? -1 : s * 1000 + i;
                wrong += at[i] != token;
                wrong += r > 0 && list[i].slot >= 0 && at[rows + list[i].slot] != token;
            }
        }
        CHECK(wrong == 0);
    }
}

/* --- failures ------------------------------------------------------------------------------------------------------- */

/* The last rank makes `made` of 50 calls; all ranks end in time, and say whom they missed. */
static void test_absent(World &world, qf_cuda_all_reduce_form form, int made, bool abort)
{
    const double limit_s = abort ? 60.0 : 0.3;
    Group group(world, (size_t)1 << 20, limit_s);
    Data data(world, Case{896, 4, 1, 0, 0, false}, 8);
    data.restore();
    double begin = seconds();
    world.each([&](Rank &rank) {
        rank.calls = 0;
        int calls = rank.rank == world.size() - 1 ? made : 50;
        for (int i = 0; i < calls; i++) {
            qf_cuda_all_reduce_args args = data.args(rank, form, true);
            CHECK_OK(qf_cuda_all_reduce(&args, group.peers(rank.rank), &rank.device, rank.stream, &check_error));
        }
    });
    if (abort) {
        usleep(100000);
        qf_cuda_group_abort(group.group);
    }
    world.synchronize();
    double took = seconds() - begin;
    printf("  rank %d leaves after %d of 50 calls, %s: all ended after %.2f s\n", world.size() - 1, made,
           abort ? "abort after 0.1 s" : "limit 0.3 s", took);
    CHECK(took < 1.5);
    int missed = 0, told = 0;
    for (int r = 0; r < world.size() - 1; r++) {
        qf_error error = {};
        CHECK(qf_cuda_group_check(group.group, r, &error) == QF_ERROR_BACKEND);
        printf("    %s\n", error.message);
        uint32_t word = group.group->host[r].error;
        missed += word == (QF_CUDA_PEER_LATE << 8 | (uint32_t)(world.size() - 1));
        told += word >> 8 == (abort ? QF_CUDA_PEER_ABORTED : QF_CUDA_PEER_TOLD);
        CHECK(isnan(bf16_value(data.d_out.get(r)[tiled_index(0, 0, data.rows)])));
    }
    CHECK(abort ? told > 0 : form == QF_CUDA_TWO_SHOT || missed > 0);
    CHECK_OK(qf_cuda_group_reset(group.group, &check_error));
    run_case(world, group, Case{896, 5, 2, 0, 0, false}, 9);
}

int main(int argc, char **argv)
{
    int ranks = argc > 1 ? atoi(argv[1]) : 0;
    bool one_device = false, bench = false, sm80 = false;
    const char *nccl = nullptr;
    for (int i = 2; i < argc; i++) {
        one_device |= strcmp(argv[i], "--one-device") == 0;
        bench |= strcmp(argv[i], "--bench") == 0;
        sm80 |= strcmp(argv[i], "--sm80") == 0;
        check_brief |= strcmp(argv[i], "--brief") == 0;
        nccl = strcmp(argv[i], "--nccl") == 0 && i + 1 < argc ? argv[i + 1] : nccl;
    }
    if (ranks < 2 || ranks > QF_CUDA_MAX_RANKS) {
        fprintf(stderr, "usage: test_all_reduce RANKS(2..8) [--one-device] [--sm80] [--brief] [--bench] [--nccl FILE]\n");
        return 2;
    }
    setvbuf(stdout, nullptr, _IOLBF, 0);
    setenv("CUDA_MODULE_LOADING", "EAGER", 1); /* loading may wait for a device on which a kernel waits for us */
    World world(ranks, one_device, sm80);
    {
        Group group(world, qf_cuda_all_reduce_bytes(ranks, 512, 8192), 5.0);
        Group small(world, qf_cuda_all_reduce_bytes(ranks, 2 * ranks, 896), 5.0);
        test_cases(world, group, small);
        printf("cases: %d failures\n", check_failures);
        for (int form = 0; form < 2; form++) {
            test_replay(world, group, (qf_cuda_all_reduce_form)form, check_brief ? 50 : 1000);
        }
        printf("replays: %d failures\n", check_failures);
        test_steps(world, group, 1024, 0, 1);
        test_steps(world, group, 500, 3, 5);
        test_steps(world, group, 160, 4, 17);
        printf("steps: %d failures\n", check_failures);
        test_absent(world, QF_CUDA_ONE_SHOT, 0, false);
        test_absent(world, QF_CUDA_TWO_SHOT, 21, false);
        test_absent(world, QF_CUDA_ONE_SHOT, 7, true);
        printf("absent ranks: %d failures\n", check_failures);
        if (bench && check_failures == 0) {
            run_bench(world, group, nccl);
        }
    }
    for (Rank &rank : world.ranks) {
        world.use(rank.rank);
        CHECK_CUDA(cudaDeviceSynchronize());
        CHECK_CUDA(cudaStreamDestroy(rank.stream));
    }
    printf("all_reduce, %d ranks%s: %s\n", ranks, one_device ? " on one device" : "",
           check_failures == 0 ? "passed" : "FAILED");
    return check_failures == 0 ? 0 : 1;
}
