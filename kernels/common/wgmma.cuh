/* Wrappers of what only sm_90a has: wgmma with the A operand in registers, and copies to all blocks of a cluster.
 *
 * B is an (N tokens, 16 k) matrix in shared memory, k fastest within core matrices of 8 tokens x 8 k = 128 contiguous
 * bytes, no swizzle. The descriptor's "leading" offset leads from a core matrix to the one of the next 8 k, its
 * "stride" offset to the one of the next 8 tokens. D (64 rows x N tokens): a warp of the warpgroup holds 16 rows;
 * d[4 j + 0, 1] are row lane / 4 at tokens 8 j + 2 (lane % 4) and the next, d[4 j + 2, 3] the same at row + 8. */
#ifndef QF_COMMON_WGMMA_CUH
#define QF_COMMON_WGMMA_CUH

#include "common/ptx.cuh"

#ifdef QF_SM90A

/* Registers written by ordinary instructions are seen by the wgmma that follow. */
__device__ __forceinline__ void qf_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void qf_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Waits until no more than `pending` of the newest groups run. */
template <int pending> __device__ __forceinline__ void qf_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* The tiled layout of qf_kernels.h: the next 8 k 128 bytes on, the next 8 tokens 1,024. */
#define QF_WGMMA_STEP (256 >> 4) /* from the descriptor of 16 k to that of the next */
__device__ __forceinline__ uint64_t qf_wgmma_descriptor(uint32_t shared_address)
{
    const uint64_t leading = 128 >> 4, stride = 1024 >> 4;
    return ((shared_address & 0x3ffffu) >> 4) | leading << 16 | stride << 32;
}

/* Keeps the compiler from moving reads of the results before the wait that makes them valid. */
template <int size> __device__ __forceinline__ void qf_wgmma_pin(float (&d)[size])
{
#pragma unroll
    for (int i = 0; i < size; i++) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

/* Operand lists. QF_D8(i) names eight results; QF_P8.. are their places in the instruction. */
#define QF_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QF_D8(i) QF_D4(i), QF_D4(i + 4)
#define QF_D16(i) QF_D8(i), QF_D8(i + 8)
#define QF_D32(i) QF_D16(i), QF_D16(i + 16)
#define QF_P4 "%0,%1,%2,%3"
#define QF_P8 QF_P4 ",%4,%5,%6,%7"
#define QF_P16 QF_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QF_P32 QF_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QF_P64                                                                                                    \
    QF_P32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                                     \
           ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QF_P96                                                                                                    \
    QF_P64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"                                     \
           ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define QF_P116                                                                                                   \
    QF_P96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115"
#define QF_P128                                                                                                   \
    QF_P96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"                         \
           ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

/* d (64 x N) += a (64 x 16, registers) b (16 x N, descriptor); set: d is what is added, not added to. */
template <int tokens> struct qf_wgmma;
#define QF_WGMMA(N, PLACES, A0, A1, A2, A3, B, ...)                                                               \
    template <> struct qf_wgmma<N> {                                                                              \
        static __device__ __forceinline__ void add(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b)         \
        {                                                                                                         \
            asm volatile("{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PLACES "}, "                \
                         "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", accumulate, 1, 1, 0;\n}"                \
                         : __VA_ARGS__                                                                            \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
        }                                                                                                         \
        static __device__ __forceinline__ void set(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b)         \
        {                                                                                                         \
            asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, 0, 0;\n"                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" PLACES "}, "                \
                         "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", accumulate, 1, 1, 0;\n}"                \
                         : __VA_ARGS__                                                                            \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
        }                                                                                                         \
    }
QF_WGMMA(8, QF_P4, 4, 5, 6, 7, 8, QF_D4(0));
QF_WGMMA(16, QF_P8, 8, 9, 10, 11, 12, QF_D8(0));
QF_WGMMA(32, QF_P16, 16, 17, 18, 19, 20, QF_D16(0));
QF_WGMMA(64, QF_P32, 32, 33, 34, 35, 36, QF_D32(0));
QF_WGMMA(128, QF_P64, 64, 65, 66, 67, 68, QF_D32(0), QF_D32(32));
QF_WGMMA(192, QF_P96, 96, 97, 98, 99, 100, QF_D32(0), QF_D32(32), QF_D32(64));
QF_WGMMA(232, QF_P116, 116, 117, 118, 119, 120, QF_D32(0), QF_D32(32), QF_D32(64), QF_D16(96), QF_D4(112));
QF_WGMMA(256, QF_P128, 128, 129, 130, 131, 132, QF_D32(0), QF_D32(32), QF_D32(64), QF_D32(96));

/* A warpgroup gives registers back, or takes them: `number` for each of its threads from here on. */
template <int number> __device__ __forceinline__ void qf_release_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(number));
}
template <int number> __device__ __forceinline__ void qf_take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(number));
}

/* Copies 16 bytes of weights, bringing what stands beside them into L2. */
__device__ __forceinline__ void qf_cp_async_16_stream(void *shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(qf_shared_address(shared)), "l"(global)
                 : "memory");
}

/* --- clusters ---------------------------------------------------------------------------------------------- */

__device__ __forceinline__ uint32_t qf_cluster_rank()
{
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

/* Barriers of this block that were initialised before are seen by the cluster and by the copy engine. */
__device__ __forceinline__ void qf_mbarrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* A barrier of all threads of the cluster. */
__device__ __forceinline__ void qf_cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Arrives at the barrier that stands at this address in block `rank` of the cluster. For "I have read": no write of
 * this thread is to be seen by the other block, so no fence of the cluster's scope is asked for. */
__device__ __forceinline__ void qf_mbarrier_arrive_remote(uint64_t *barrier, uint32_t rank)
{
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(
                     qf_shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}

/* qf_bulk_copy to the same place in every block of `mask`; completes on the barrier of each. */
__device__ __forceinline__ void qf_bulk_copy_multicast(void *shared, const void *global, uint32_t bytes,
                                                       uint64_t *barrier, uint16_t mask)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(qf_shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(qf_shared_address(barrier)), "h"(mask)
                 : "memory");
}

/* As qf_barrier_wait. */
__device__ __forceinline__ void qf_mbarrier_wait_bounded(uint64_t *barrier, uint32_t parity)
{
    qf_barrier_wait(qf_shared_address(barrier), parity);
}

#endif /* QF_SM90A */
#endif
