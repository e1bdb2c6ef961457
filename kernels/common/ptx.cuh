/* Thin wrappers of PTX instructions. Each says what it is for; none hides a loop. */
#ifndef QF_COMMON_PTX_CUH
#define QF_COMMON_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QF_SM90A 1 /* wgmma is there */
#endif

/* --- dependent launch: no-ops before sm_90 ----------------------------------------------------------------- */

/* Waits until the kernel before this one in the stream has ended and its writes are visible. */
__device__ __forceinline__ void qf_grid_dependency_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Lets the kernel after this one start (it still waits for this one's end where it says so). */
__device__ __forceinline__ void qf_grid_launch_dependents()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* --- tensor cores ------------------------------------------------------------------------------------------- */

/* c (16 x 8, float32) += a (16 x 16, row) b (16 x 8, column), bf16. */
__device__ __forceinline__ void qf_mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t qf_shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void qf_ldmatrix_x4(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(qf_shared_address(row)));
}

__device__ __forceinline__ void qf_ldmatrix_x4_trans(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(qf_shared_address(row)));
}

/* Transposes an 8 x 8 matrix of 16-bit elements held one word a lane (row lane / 4, columns 2 (lane % 4) and next). */
__device__ __forceinline__ uint32_t qf_movmatrix_trans(uint32_t a)
{
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}

/* --- asynchronous copies (sm_80) ----------------------------------------------------------------------------- */

__device__ __forceinline__ void qf_cp_async_16(void *shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(qf_shared_address(shared)), "l"(global) : "memory");
}

/* Copies 16 bytes, or writes zeros if `valid` is false. */
__device__ __forceinline__ void qf_cp_async_16_or_zero(void *shared, const void *global, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(qf_shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void qf_cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending> __device__ __forceinline__ void qf_cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* 16 and 4 bytes from a shared address; volatile: they stay where they are written. */
__device__ __forceinline__ uint4 qf_shared_load_16(uint32_t address)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint32_t qf_shared_load_4(uint32_t address)
{
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

/* --- barriers in shared memory, bulk copies (sm_90) ---------------------------------------------------------- */

__device__ __forceinline__ void qf_mbarrier_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(qf_shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void qf_mbarrier_arrive(uint64_t *barrier)
{
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                     qf_shared_address(barrier))
                 : "memory");
}

/* Waits for the end of the phase with this parity. */
__device__ __forceinline__ void qf_mbarrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "QF_WAIT:\n"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#endif
                 "@done bra QF_DONE;\n"
                 "bra QF_WAIT;\n"
                 "QF_DONE:\n"
                 "}" ::"r"(qf_shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* By shared addresses: for kernels of sm_90 alone, whose bodies other devices leave out. */

/* Waits for the end of the phase with this parity; a wait without end is an error of the kernel's, and traps rather
 * than hang the device. */
__device__ __forceinline__ void qf_barrier_wait(uint32_t barrier, uint32_t parity)
{
    for (uint32_t tries = 0;; tries++) {
        uint32_t done;
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
        if (done) {
            return;
        }
        if (tries > (1u << 24)) {
            __trap();
        }
    }
}

/* One arrival, and `bytes` more to come from bulk copies. */
__device__ __forceinline__ void qf_barrier_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Contiguous copy, 16-byte aligned, a multiple of 16 bytes; completes on the barrier. */
__device__ __forceinline__ void qf_bulk_copy_to(uint32_t shared, const void *global, uint32_t bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* True in one lane of the warp. */
__device__ __forceinline__ bool qf_elected()
{
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

/* Orders this thread's ordinary accesses to shared memory before later ones by wgmma and the copy engine. */
__device__ __forceinline__ void qf_fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/* One arrival, and `bytes` more to come from bulk copies. */
__device__ __forceinline__ void qf_mbarrier_arrive_expect(uint64_t *barrier, uint32_t bytes)
{
    qf_barrier_expect(qf_shared_address(barrier), bytes);
}

/* Contiguous copy, 16-byte aligned, a multiple of 16 bytes; completes on the barrier. */
__device__ __forceinline__ void qf_bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *barrier)
{
    qf_bulk_copy_to(qf_shared_address(shared), global, bytes, qf_shared_address(barrier));
}
#endif

/* A barrier of `threads` threads of the block, by number (1 .. 15; 0 is __syncthreads). */
__device__ __forceinline__ void qf_named_barrier(int number, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* --- loads ---------------------------------------------------------------------------------------------------- */

/* Streams weights: read once, not kept in L1. Never for data that a running kernel may write. */
__device__ __forceinline__ uint4 qf_load_stream(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t qf_load_stream_32(const void *p)
{
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t qf_pack_bf16(float low, float high)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

__device__ __forceinline__ float qf_bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float qf_bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

#endif
