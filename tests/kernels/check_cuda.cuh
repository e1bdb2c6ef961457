/* What every kernel test needs: device arrays with guards and poison, random data, comparison, timing.
 *
 * A test is one program, tests/kernels/test_<name>.cu, linked with all kernels and the CPU sources named in its first
 * comment. It checks always; with --bench it then times, and prints a table. --sm80 forces the code path of sm_80; --brief
 * leaves out repetitions and the largest shapes, for tools that slow a kernel down a thousand times. */
#ifndef CHECK_CUDA_CUH
#define CHECK_CUDA_CUH

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "qf_kernels.h"

static int check_failures;
static bool check_brief; /* --brief */

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);      \
            check_failures++;                                                            \
        }                                                                                \
    } while (0)

#define CHECK_CUDA(call)                                                                              \
    do {                                                                                              \
        cudaError_t check_status = (call);                                                            \
        if (check_status != cudaSuccess) {                                                            \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                             \
                    cudaGetErrorString(check_status));                                                \
            exit(1); /* nothing after a failed device can be trusted */                               \
        }                                                                                             \
    } while (0)

/* A call that takes `&check_error` last. */
#define CHECK_OK(call)                                                                                \
    do {                                                                                              \
        qf_error check_error;                                                                         \
        if ((call) != QF_OK) {                                                                        \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, check_error.message);       \
            check_failures++;                                                                         \
        }                                                                                             \
    } while (0)

/* Deterministic random numbers (xorshift64*). */
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 1) {}
    uint32_t bits()
    {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return (uint32_t)((state * 0x2545F4914F6CDD1Dull) >> 32);
    }
    int below(int limit) { return (int)(bits() % (uint32_t)limit); }
    float uniform() { return (float)(bits() >> 8) * (1.0f / 16777216.0f); }
    float normal() /* sum of uniforms: near enough */
    {
        float s = 0;
        for (int i = 0; i < 4; i++) {
            s += uniform();
        }
        return (s - 2.0f) * 1.7320508f;
    }
};

static inline float bf16_round(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    memcpy(&x, &u, 4);
    return x;
}
static inline uint16_t bf16_bits(float x)
{
    x = bf16_round(x);
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)(u >> 16);
}
static inline float bf16_value(uint16_t x)
{
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* An array on the device, filled with 0xff bytes (NaN) at first, between guards that are checked at the end. */
template <typename T> struct Device {
    static const size_t guard_bytes = 1024;
    char *base = nullptr;
    T *data = nullptr;
    size_t size = 0;
    explicit Device(size_t count) : size(count)
    {
        CHECK_CUDA(cudaMalloc((void **)&base, bytes() + 2 * guard_bytes));
        CHECK_CUDA(cudaMemset(base, 0xff, bytes() + 2 * guard_bytes));
        CHECK_CUDA(cudaMemset(base, 0xa5, guard_bytes));
        CHECK_CUDA(cudaMemset(base + guard_bytes + bytes(), 0xa5, guard_bytes));
        data = (T *)(base + guard_bytes);
    }
    explicit Device(const std::vector<T> &values) : Device(values.size()) { put(values); }
    Device(const Device &) = delete;
    size_t bytes() const { return (size * sizeof(T) + 255) / 256 * 256; }
    void poison() { CHECK_CUDA(cudaMemset(data, 0xff, size * sizeof(T))); }
    void zero() { CHECK_CUDA(cudaMemset(data, 0, size * sizeof(T))); }
    void put(const std::vector<T> &values)
    {
        CHECK_CUDA(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get() const
    {
        std::vector<T> values(size);
        CHECK_CUDA(cudaMemcpy(values.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
    ~Device()
    {
        std::vector<unsigned char> guard(guard_bytes);
        for (size_t at : {(size_t)0, guard_bytes + bytes()}) {
            CHECK_CUDA(cudaMemcpy(guard.data(), base + at, guard_bytes, cudaMemcpyDeviceToHost));
            CHECK(std::count(guard.begin(), guard.end(), (unsigned char)0xa5) == (long)guard_bytes);
        }
        cudaFree(base);
    }
};

/* ||a - b|| / ||b||; infinite if a holds a NaN. */
template <typename A, typename B> static double relative_error(const A &a, const B &b, size_t size)
{
    double difference = 0, norm = 0;
    for (size_t i = 0; i < size; i++) {
        double d = (double)a[i] - (double)b[i];
        if (!(d == d)) {
            return INFINITY;
        }
        difference += d * d;
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / (norm > 0 ? norm : 1));
}

/* Host index into the tiled layout. */
static inline size_t tiled_index(int k, int t, int num_tokens)
{
    int tiles = qf_cuda_num_tiles(num_tokens), width = qf_cuda_tile_tokens(num_tokens);
    return ((((size_t)(k / 64) * tiles + t / 8) * 8 + (k / 8) % 8) * width + t % 8) * 8 + k % 8;
}

/* Median microseconds of one of `count` calls in a graph, over `repeats` launches of the graph. */
template <typename F> static double time_us(F enqueue, int count = 20, int repeats = 15)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t start, stop;
    CHECK_CUDA(cudaStreamCreate(&stream));
    CHECK_CUDA(cudaEventCreate(&start));
    CHECK_CUDA(cudaEventCreate(&stop));
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < count; i++) {
        enqueue(stream, i);
    }
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < repeats + 3; i++) {
        CHECK_CUDA(cudaEventRecord(start, stream));
        CHECK_CUDA(cudaGraphLaunch(exec, stream));
        CHECK_CUDA(cudaEventRecord(stop, stream));
        CHECK_CUDA(cudaEventSynchronize(stop));
        float ms;
        CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
        if (i >= 3) {
            times.push_back(ms);
        }
    }
    std::sort(times.begin(), times.end());
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    cudaStreamDestroy(stream);
    return times[times.size() / 2] * 1000.0 / count;
}

struct Options {
    bool bench = false;
    qf_cuda_device device;
};

static inline Options check_options(int argc, char **argv)
{
    Options o;
    CHECK_OK(qf_cuda_device_get(0, &o.device, &check_error));
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--bench") == 0) {
            o.bench = true;
        } else if (strcmp(argv[i], "--brief") == 0) {
            check_brief = true;
        } else if (strcmp(argv[i], "--sm80") == 0) {
            o.device.hopper = false;
            o.device.dependent_launch = false;
        }
    }
    return o;
}

static inline int check_report(const char *name)
{
    CHECK_CUDA(cudaDeviceSynchronize());
    printf("%s: %s\n", name, check_failures == 0 ? "passed" : "FAILED");
    return check_failures == 0 ? 0 : 1;
}

#endif
