/* Ranks for tests: one thread each, on a device each, or all on one. */
#ifndef MULTI_GPU_WORLD_CUH
#define MULTI_GPU_WORLD_CUH

#include <pthread.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <thread>

#include "check_cuda.cuh"

extern "C" {
#include "backend/cuda/peers.h"
#include "comm/comm_nccl.h"
}

struct Rank {
    int rank;
    qf_cuda_device device;
    cudaStream_t stream;
    uint32_t calls = 0; /* of the step */
};

/* The ranks, and a barrier among their threads. */
struct World {
    std::vector<Rank> ranks;
    std::vector<int32_t> ordinals;
    bool shared_device; /* ranks on one device: kernels must all fit there at once */
    pthread_barrier_t barrier;

    World(int num_ranks, bool one_device, bool sm80)
    {
        int devices = 0;
        CHECK_CUDA(cudaGetDeviceCount(&devices));
        shared_device = one_device;
        if (!one_device && devices < num_ranks) {
            fprintf(stderr, "%d ranks, but only %d devices; --one-device puts all on one\n", num_ranks, devices);
            exit(2);
        }
        pthread_barrier_init(&barrier, nullptr, (unsigned)num_ranks);
        ranks.resize(num_ranks);
        for (int r = 0; r < num_ranks; r++) {
            ordinals.push_back(one_device ? 0 : r);
            ranks[r].rank = r;
            CHECK_OK(qf_cuda_device_get(ordinals[r], &ranks[r].device, &check_error));
            if (sm80) {
                ranks[r].device.hopper = ranks[r].device.dependent_launch = false;
            }
            if (one_device) {
                ranks[r].device.sm_count /= num_ranks; /* clusters and CTAs for its share of the device */
            }
            CHECK_CUDA(cudaStreamCreateWithFlags(&ranks[r].stream, cudaStreamNonBlocking));
        }
        char note[256] = "";
        if (!qf_cuda_peers_enable(ordinals.data(), num_ranks, note, sizeof note)) {
            fprintf(stderr, "no peer access: %s\n", note);
            exit(2);
        }
    }
    int size() const { return (int)ranks.size(); }
    void use(int r) const { CHECK_CUDA(cudaSetDevice(ordinals[r])); }
    void wait() { pthread_barrier_wait(&barrier); }

    /* body(rank) in a thread for each rank, on its device; waits for the threads. */
    void each(const std::function<void(Rank &)> &body)
    {
        std::vector<std::thread> threads;
        for (Rank &rank : ranks) {
            threads.emplace_back([&, this] {
                use(rank.rank);
                body(rank);
            });
        }
        for (std::thread &thread : threads) {
            thread.join();
        }
    }
    void synchronize()
    {
        for (Rank &rank : ranks) {
            use(rank.rank);
            CHECK_CUDA(cudaStreamSynchronize(rank.stream));
        }
    }
};

/* An array for each rank, on its device. */
template <typename T> struct Arrays {
    World &world;
    std::vector<std::unique_ptr<Device<T>>> of;
    Arrays(World &w, size_t count) : world(w)
    {
        for (int r = 0; r < w.size(); r++) {
            w.use(r);
            of.emplace_back(new Device<T>(count));
        }
    }
    void put(int r, const std::vector<T> &values)
    {
        world.use(r);
        of[r]->put(values);
    }
    void put(const std::vector<T> &values)
    {
        for (int r = 0; r < world.size(); r++) {
            put(r, values);
        }
    }
    std::vector<T> get(int r) const
    {
        world.use(r);
        return of[r]->get();
    }
    T *operator[](int r) const { return of[r]->data; }
    ~Arrays()
    {
        for (int r = 0; r < world.size(); r++) {
            world.use(r);
            of[r].reset();
        }
    }
};

struct Group {
    qf_cuda_group *group = nullptr;
    Group(World &world, size_t exchange_bytes, double limit_s)
    {
        CHECK_OK(qf_cuda_group_create(world.ordinals.data(), world.size(), exchange_bytes, (uint64_t)(limit_s * 1e9),
                                      &group, &check_error));
        if (group == nullptr) {
            exit(1);
        }
    }
    Group(const Group &) = delete;
    ~Group() { qf_cuda_group_destroy(group); }
    const qf_cuda_peers *peers(int r) const { return &group->peers[r]; }
    void check(World &world)
    {
        for (int r = 0; r < world.size(); r++) {
            CHECK_OK(qf_cuda_group_check(group, r, &check_error));
        }
    }
};

static __global__ void delay_kernel(uint32_t ns)
{
    uint64_t start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - start < ns);
}

/* Microseconds of one of `count` calls in a graph: of each launch the slowest rank's, of 15 launches the median. */
static double time_ranks(World &world, int count, const std::function<void(Rank &, int)> &enqueue)
{
    const int repeats = 15, warm = 3;
    std::vector<std::vector<float>> times(world.size());
    world.each([&](Rank &rank) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        cudaEvent_t start, stop;
        CHECK_CUDA(cudaEventCreate(&start));
        CHECK_CUDA(cudaEventCreate(&stop));
        rank.calls = 0;
        world.wait();
        CHECK_CUDA(cudaStreamBeginCapture(rank.stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < count; i++) {
            enqueue(rank, i);
        }
        CHECK_CUDA(cudaStreamEndCapture(rank.stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CHECK_CUDA(cudaGraphUpload(exec, rank.stream));
        CHECK_CUDA(cudaStreamSynchronize(rank.stream));
        for (int i = 0; i < repeats + warm; i++) {
            float ms;
            world.wait();
            CHECK_CUDA(cudaEventRecord(start, rank.stream));
            CHECK_CUDA(cudaGraphLaunch(exec, rank.stream));
            CHECK_CUDA(cudaEventRecord(stop, rank.stream));
            CHECK_CUDA(cudaEventSynchronize(stop));
            CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
            times[rank.rank].push_back(ms);
        }
        world.wait();
        CHECK_CUDA(cudaGraphExecDestroy(exec));
        CHECK_CUDA(cudaGraphDestroy(graph));
        CHECK_CUDA(cudaEventDestroy(start));
        CHECK_CUDA(cudaEventDestroy(stop));
    });
    std::vector<float> slowest;
    for (int i = warm; i < repeats + warm; i++) {
        float most = 0;
        for (int r = 0; r < world.size(); r++) {
            most = std::max(most, times[r][i]);
        }
        slowest.push_back(most);
    }
    std::sort(slowest.begin(), slowest.end());
    return slowest[slowest.size() / 2] * 1000.0 / count;
}

static inline double seconds()
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

#endif
