/* Our all-reduce against NCCL's, in the same run, both in captured graphs; and that what stands in for peer memory where
 * there is none does the same. */
#ifndef MULTI_GPU_BENCH_CUH
#define MULTI_GPU_BENCH_CUH

#include "world.cuh"

/* NCCL's communicators, or none of them. */
struct Nccl {
    qf_nccl *library = nullptr;
    std::vector<qf_nccl_comm *> comms;
    Nccl(World &world, const char *path) : comms((size_t)world.size())
    {
        qf_error error;
        qf_nccl_id id;
        if (world.shared_device) {
            printf("NCCL does not run several ranks on one device: only ours is timed\n");
            return;
        }
        if (qf_nccl_open(path, &library, &error) != QF_OK) {
            printf("%s\n", error.message);
            return;
        }
        printf("NCCL %d\n", qf_nccl_version(library));
        CHECK_OK(qf_nccl_make_id(library, &id, &check_error));
        world.each([&](Rank &rank) {
            CHECK_OK(qf_nccl_comm_create(library, &id, rank.rank, world.size(), 60000, &comms[rank.rank], &check_error));
        });
    }
    bool is_there() const { return library != nullptr && std::count(comms.begin(), comms.end(), nullptr) == 0; }
    void all_reduce(Rank &rank, const void *in, void *out, size_t count, qf_dtype dtype)
    {
        CHECK_OK(qf_nccl_all_reduce(comms[rank.rank], in, out, count, dtype, rank.stream, &check_error));
    }
    void destroy(World &world)
    {
        if (is_there()) {
            world.each([&](Rank &rank) { qf_nccl_comm_destroy(comms[rank.rank]); });
        }
        qf_nccl_close(library);
    }
};

/* Sum, columns to rank 0, and words from it, by NCCL; then a rank that stays away, and an abort. */
static void check_nccl(World &world, Nccl &nccl)
{
    const int size = world.size(), rows = 5, width = 7 * size + 3, count = 1000;
    Arrays<float> in(world, count), out(world, count), part(world, rows * 16), whole(world, rows * width);
    Arrays<int32_t> words(world, 64);
    std::vector<size_t> first(size), bytes(size);
    for (int r = 0; r < size; r++) {
        const int columns = r == size - 1 ? 10 : 7;
        first[r] = sizeof(float) * 7 * (size_t)r;
        bytes[r] = sizeof(float) * (size_t)columns;
        std::vector<float> values(count, (float)(r + 1)), matrix(rows * 16);
        for (int i = 0; i < rows * columns; i++) {
            matrix[(size_t)(i / columns * 16 + i % columns)] = (float)(1000 * r + 100 * (i / columns) + i % columns);
        }
        in.put(r, values);
        part.put(r, matrix);
        words.put(r, std::vector<int32_t>(64, r + 5));
    }
    world.each([&](Rank &rank) {
        const int r = rank.rank;
        nccl.all_reduce(rank, in[r], out[r], count, QF_DTYPE_F32);
        qf_nccl_columns columns = {};
        columns.num_rows = rows;
        columns.in = (const char *)part[r];
        columns.out = (char *)whole[r];
        columns.in_row_bytes = 16 * sizeof(float);
        columns.out_row_bytes = (size_t)width * sizeof(float);
        columns.first_byte = first.data();
        columns.size_bytes = bytes.data();
        CHECK_OK(qf_nccl_gather(nccl.comms[r], &columns, rank.stream, &check_error));
        CHECK_OK(qf_nccl_broadcast(nccl.comms[r], 0, words[r], 64 * sizeof(int32_t), rank.stream, &check_error));
        CHECK_CUDA(cudaStreamSynchronize(rank.stream));
        CHECK_OK(qf_nccl_comm_check(nccl.comms[r], &check_error));
    });
    std::vector<float> gathered = whole.get(0);
    int wrong = 0;
    for (int r = 0; r < size; r++) {
        wrong += words.get(r)[63] != 5;
        wrong += out.get(r)[count - 1] != (float)(size * (size + 1) / 2);
        for (int i = 0; r > 0 && i < rows * (int)(bytes[r] / 4); i++) {
            const int columns = (int)(bytes[r] / 4), row = i / columns, column = i % columns;
            wrong += gathered[(size_t)(row * width + 7 * r + column)] != (float)(1000 * r + 100 * row + column);
        }
    }
    CHECK(wrong == 0);
}

/* The last call with this library: one rank does not come. */
static void check_nccl_abort(World &world, Nccl &nccl)
{
    Arrays<float> data(world, 1024);
    const double begin = seconds();
    world.each([&](Rank &rank) {
        if (rank.rank > 0) {
            nccl.all_reduce(rank, data[rank.rank], data[rank.rank], 1024, QF_DTYPE_F32);
        }
        usleep(100000);
        qf_nccl_comm_abort(nccl.comms[rank.rank]);
        qf_error error;
        CHECK(qf_nccl_comm_check(nccl.comms[rank.rank], &error) == QF_ERROR_BACKEND);
        CHECK_CUDA(cudaStreamSynchronize(rank.stream));
    });
    printf("NCCL: an all-reduce that one rank stays away from ends %.2f s after it began, by abort after 0.1 s\n",
           seconds() - begin);
    CHECK(seconds() - begin < 5);
}

struct BenchData {
    int rows, hidden;
    Arrays<float> residual, delta, reduced, weight;
    Arrays<uint16_t> out, half;
    BenchData(World &world, int num_rows, int hidden_size)
        : rows(num_rows), hidden(hidden_size), residual(world, (size_t)rows * hidden), delta(world, (size_t)rows * hidden),
          reduced(world, (size_t)rows * hidden),
          weight(world, hidden), out(world, qf_cuda_tiled_size(hidden, rows)), half(world, (size_t)rows * hidden)
    {
        Random random(3);
        std::vector<float> values((size_t)rows * hidden), weights(hidden, 1.0f);
        std::vector<uint16_t> halves(values.size());
        for (size_t i = 0; i < values.size(); i++) {
            values[i] = 4.0f * random.uniform() - 2.0f;
            halves[i] = bf16_bits(values[i]);
        }
        residual.put(values);
        delta.put(values);
        weight.put(weights);
        half.put(halves);
    }
    qf_cuda_rmsnorm_args norm(int r) const
    {
        qf_cuda_rmsnorm_args a = {};
        a.residual = residual[r];
        a.delta = delta[r];
        a.num_splits = 1;
        a.delta_stride = hidden;
        a.weight = weight[r];
        a.out = out[r];
        a.num_tokens = a.num_rows = rows;
        a.hidden_size = a.k_padded = hidden;
        a.eps = 1e-6f;
        return a;
    }
};

static double time_ours(World &world, Group &group, const BenchData &data, qf_cuda_all_reduce_form form, bool norm,
                        int count)
{
    return time_ranks(world, count, [&](Rank &rank, int) {
        qf_cuda_all_reduce_args args = {};
        args.norm = data.norm(rank.rank);
        args.norm.out = norm ? args.norm.out : nullptr;
        args.fresh = true;
        args.form = form;
        args.calls = &rank.calls;
        CHECK_OK(qf_cuda_all_reduce(&args, group.peers(rank.rank), &rank.device, rank.stream, &check_error));
    });
}

/* NCCL's sum, alone or with the norm that would follow. */
static double time_nccl(World &world, Nccl &nccl, const BenchData &data, qf_dtype dtype, bool norm, int count)
{
    const size_t size = (size_t)data.rows * data.hidden;
    auto sum = [&](Rank &rank) {
        const int r = rank.rank;
        if (dtype == QF_DTYPE_F32) {
            nccl.all_reduce(rank, data.delta[r], data.reduced[r], size, dtype);
        } else {
            nccl.all_reduce(rank, data.half[r], data.out[r], size, dtype);
        }
    };
    world.each([&](Rank &rank) { /* connects */
        sum(rank);
        CHECK_CUDA(cudaStreamSynchronize(rank.stream));
    });
    return time_ranks(world, count, [&](Rank &rank, int) {
        sum(rank);
        if (norm) {
            qf_cuda_rmsnorm_args args = data.norm(rank.rank);
            args.delta = data.reduced[rank.rank];
            CHECK_OK(qf_cuda_rmsnorm(&args, &rank.device, rank.stream, &check_error));
        }
    });
}

static void bench_shape(World &world, Group &group, Nccl &nccl, int rows, int hidden)
{
    const int count = rows > 500 ? 20 : 100;
    BenchData data(world, rows, hidden);
    const double plain = time_ours(world, group, data, QF_CUDA_ONE_SHOT, false, count);
    const double one = time_ours(world, group, data, QF_CUDA_ONE_SHOT, true, count);
    const double two = time_ours(world, group, data, QF_CUDA_TWO_SHOT, true, count);
    printf("%5d x %5d %8.1f KB  one shot %7.2f, with norm %7.2f; two shots with norm %7.2f; chosen %s", rows, hidden,
           rows * hidden * 2 / 1024.0, plain, one, two,
           qf_cuda_all_reduce_choose(world.size(), rows, hidden) == QF_CUDA_ONE_SHOT ? "one" : "two");
    if (nccl.is_there()) {
        const double half = time_nccl(world, nccl, data, QF_DTYPE_BF16, false, count);
        const double full = time_nccl(world, nccl, data, QF_DTYPE_F32, false, count);
        const double both = time_nccl(world, nccl, data, QF_DTYPE_F32, true, count);
        printf("; NCCL bf16 %7.2f, float32 %7.2f, float32 then norm %7.2f; NCCL bf16 / ours with norm %.2f", half, full,
               both, half / std::min(one, two));
    }
    printf("\n");
}

/* One row or a few by clusters of 1, 2 and 4 CTAs: the launcher chooses by the number of multiprocessors that it is told. */
static void bench_clusters(World &world, Group &group, int rows, int hidden)
{
    BenchData data(world, rows, hidden);
    printf("%5d x %5d one shot with norm, by clusters of", rows, hidden);
    for (int cluster : {1, 2, 4}) {
        std::vector<int> counts;
        for (Rank &rank : world.ranks) {
            counts.push_back(rank.device.sm_count);
            rank.device.sm_count = cluster == 1 ? 1 : cluster * rows;
        }
        printf(" %d: %.2f", cluster, time_ours(world, group, data, QF_CUDA_ONE_SHOT, true, 100));
        for (Rank &rank : world.ranks) {
            rank.device.sm_count = counts[rank.rank];
        }
    }
    printf("\n");
}

static void bench_gather(World &world, Group &group, int rows, int width)
{
    const int columns = width / world.size();
    Arrays<float> part(world, (size_t)rows * columns), out(world, (size_t)rows * width);
    BenchData data(world, 1, 896);
    const double with = time_ranks(world, 50, [&](Rank &rank, int) {
        const int r = rank.rank;
        qf_cuda_all_reduce_args args = {};
        args.norm = data.norm(r);
        args.fresh = true;
        args.calls = &rank.calls;
        CHECK_OK(qf_cuda_all_reduce(&args, group.peers(r), &rank.device, rank.stream, &check_error));
        qf_cuda_gather_args gather = {part[r], out[0], rows, columns, width, r * columns, columns};
        CHECK_OK(qf_cuda_gather(&gather, group.peers(r), &rank.device, rank.stream, &check_error));
    });
    const double without = time_ours(world, group, data, QF_CUDA_ONE_SHOT, true, 50);
    printf("logits of %3d rows of %d to rank 0: %.2f us (an all-reduce of %.2f us taken off)\n", rows, width,
           with - without, without);
}

static void run_bench(World &world, Group &group, const char *nccl_path)
{
    Nccl nccl(world, nccl_path);
    if (nccl.is_there()) {
        check_nccl(world, nccl);
    }
    printf("microseconds a call, in graphs; bytes are those of bf16, ours sends float32\n");
    for (int rows : {1, 2, 4, 9, 18, 36, 73, 146, 256, 2048}) {
        if (!world.shared_device || rows <= 9) {
            bench_shape(world, group, nccl, rows, 3584);
        }
    }
    for (int rows : {1, 8, 32, 64, 2048}) {
        if (!world.shared_device || rows <= 8) {
            bench_shape(world, group, nccl, rows, 8192);
        }
    }
    bench_shape(world, group, nccl, 1, 896);
    for (int rows : {1, 4, 8}) {
        bench_clusters(world, group, rows, 3584);
        bench_clusters(world, group, rows, 8192);
    }
    for (int rows : {1, 8, 64}) {
        bench_gather(world, group, rows, 152064);
    }
    group.check(world);
    if (nccl.is_there()) {
        check_nccl_abort(world, nccl);
    }
    nccl.destroy(world);
}

#endif
