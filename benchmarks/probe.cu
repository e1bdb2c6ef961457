/* How fast can this GPU read its memory? Streams a buffer once per run with 16-byte loads that skip the L1 cache, eight
 * in flight a thread, every block a contiguous run; prints {"gpu": name, "read_gbs": {"bytes": best of the runs}} with a
 * line for each size. Buffers of up to the L2's size would be read from there: sizes begin well above it.
 *
 *     nvcc -O3 -arch=native benchmarks/probe.cu -o probe && ./probe */
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call)                                                                  \
    do {                                                                             \
        cudaError_t status_ = (call);                                                \
        if (status_ != cudaSuccess) {                                                \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status_));         \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

#define THREADS 512
#define LOADS 8

static __device__ uint4 load(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* data: (size) of 16 bytes, a multiple of gridDim.x * THREADS * LOADS. The sum is stored only where it has a value that
 * the zeroed buffer cannot give, so that the loads cannot be left out. */
__global__ void __launch_bounds__(THREADS) read_all(const uint4 *data, size_t size, uint32_t *out)
{
    size_t share = size / gridDim.x;
    const uint4 *at = data + blockIdx.x * share + threadIdx.x;
    uint32_t sum = 0;
    for (size_t i = 0; i < share; i += THREADS * LOADS) {
        uint4 v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            v[j] = load(at + i + j * THREADS);
        }
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            sum |= v[j].x | v[j].y | v[j].z | v[j].w;
        }
    }
    if (sum != 0) {
        *out = sum;
    }
}

static double read_gbs(const uint4 *data, size_t bytes, int blocks, uint32_t *out)
{
    size_t unit = (size_t)blocks * THREADS * LOADS * sizeof(uint4);
    size_t size = bytes / unit * unit / sizeof(uint4);
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    float best = 1e30f;
    for (int i = 0; i < 20; i++) {
        float ms;
        CHECK(cudaEventRecord(start));
        read_all<<<blocks, THREADS>>>(data, size, out);
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(stop));
        CHECK(cudaEventSynchronize(stop));
        CHECK(cudaEventElapsedTime(&ms, start, stop));
        best = i >= 3 && ms < best ? ms : best;
    }
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(stop));
    return (double)(size * sizeof(uint4)) / best / 1e6;
}

int main(void)
{
    static const size_t sizes[] = {(size_t)256 << 20, (size_t)1 << 30, (size_t)4 << 30};
    cudaDeviceProp device;
    uint4 *data;
    uint32_t *out;
    CHECK(cudaGetDeviceProperties(&device, 0));
    CHECK(cudaMalloc((void **)&data, sizes[2]));
    CHECK(cudaMemset(data, 0, sizes[2]));
    CHECK(cudaMalloc((void **)&out, sizeof *out));
    printf("{\"gpu\": \"%s\", \"read_gbs\": {", device.name);
    for (int i = 0; i < 3; i++) {
        double most = 0;
        for (int per_sm = 1; per_sm <= 4; per_sm *= 2) {
            double gbs = read_gbs(data, sizes[i], device.multiProcessorCount * per_sm, out);
            most = gbs > most ? gbs : most;
        }
        printf("%s\"%zu\": %.1f", i > 0 ? ", " : "", sizes[i], most);
    }
    printf("}}\n");
    return 0;
}
