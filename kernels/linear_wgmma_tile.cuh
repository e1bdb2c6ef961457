/* The consumers of linear_wgmma.cu's kernel: unpacking, the sums, the epilogues. */
#ifndef QF_LINEAR_WGMMA_TILE_CUH
#define QF_LINEAR_WGMMA_TILE_CUH

#include "linear_wgmma_feed.cuh"

#ifdef QF_SM90A

/* --- consumers: two warpgroups -------------------------------------------------------------------------------- */

/* The A registers of `steps` steps of 16 k, `k` into the stage. */
template <int bits, int tokens, int steps>
__device__ __forceinline__ void qf_wg_load(uint32_t (&a)[steps][4], const uint8_t *stage, int k, int group_shift)
{
    typedef qf_wg_shape<bits, tokens> shape;
    const int lane = threadIdx.x % 32, row_tile = threadIdx.x / 32;
    const uint8_t *weights = stage + shape::x_bytes + row_tile * shape::slot_bytes;
    if constexpr (bits == 16) {
#pragma unroll
        for (int s = 0; s < steps; s++) {
            uint4 w = reinterpret_cast<const uint4 *>(weights + (k + 16 * s) * 32)[lane];
            a[s][0] = w.x, a[s][1] = w.y, a[s][2] = w.z, a[s][3] = w.w;
        }
    } else {
        /* 4 bits: 64 k are 32 lanes x 16 bytes; 8 bits: 32 k are. */
        uint32_t word[steps * bits / 4];
        if constexpr (bits == 4 && steps == 2) {
            uint2 w = *reinterpret_cast<const uint2 *>(weights + k / 64 * 512 + lane * 16 + k % 64 / 4);
            word[0] = w.x, word[1] = w.y;
        } else {
#pragma unroll
            for (int i = 0; i < steps * bits / 16; i++) {
                uint4 w = reinterpret_cast<const uint4 *>(weights + k * 2 * bits + i * 512)[lane];
                word[4 * i] = w.x, word[4 * i + 1] = w.y, word[4 * i + 2] = w.z, word[4 * i + 3] = w.w;
            }
        }
        const uint32_t *scales = reinterpret_cast<const uint32_t *>(weights + shape::weight_bytes) +
                                 (k >> group_shift) * 16 + lane / 4;
        qf_row_scales r = qf_unpack_scales<bits>(scales[0], scales[8]);
        uint32_t scale[2] = {qf_pack_bf16(r.scale[0], r.scale[0]), qf_pack_bf16(r.scale[1], r.scale[1])};
#pragma unroll
        for (int s = 0; s < steps; s++) {
            if (s == 2 && group_shift == 5) {
                r = qf_unpack_scales<bits>(scales[16], scales[24]);
                scale[0] = qf_pack_bf16(r.scale[0], r.scale[0]);
                scale[1] = qf_pack_bf16(r.scale[1], r.scale[1]);
            }
            if constexpr (bits == 4) {
                qf_dequant_4(word[s], r, a[s]);
            } else {
                qf_dequant_8(word[2 * s], word[2 * s + 1], r, a[s]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[s][i] = qf_mul_bf16(a[s][i], scale[i & 1]);
            }
        }
    }
}

/* The words of a stage of 64 k as they stand in shared memory, and their scales; 16 bits are A registers there. */
template <int bits, int tokens> struct qf_wg_words {
    typedef qf_wg_shape<bits, tokens> shape;
    const uint8_t *slot;
    uint32_t word[bits < 16 ? bits : 1], scale[2];
    qf_row_scales rows;

    __device__ __forceinline__ void load_scales(int group)
    {
        const uint32_t *scales = reinterpret_cast<const uint32_t *>(slot + shape::weight_bytes) + group * 16;
        rows = qf_unpack_scales<bits>(scales[threadIdx.x % 32 / 4], scales[threadIdx.x % 32 / 4 + 8]);
        scale[0] = qf_pack_bf16(rows.scale[0], rows.scale[0]);
        scale[1] = qf_pack_bf16(rows.scale[1], rows.scale[1]);
    }
    __device__ __forceinline__ void load(const uint8_t *stage)
    {
        slot = stage + shape::x_bytes + threadIdx.x / 32 * shape::slot_bytes;
        if constexpr (bits < 16) {
#pragma unroll
            for (int i = 0; i < bits / 4; i++) {
                uint4 w = reinterpret_cast<const uint4 *>(slot + i * 512)[threadIdx.x % 32];
                word[4 * i] = w.x, word[4 * i + 1] = w.y, word[4 * i + 2] = w.z, word[4 * i + 3] = w.w;
            }
            load_scales(0);
        }
    }
    /* The A registers of a step of 16 k; steps in ascending order. */
    __device__ __forceinline__ void unpack(int step, int group_shift, uint32_t (&a)[4])
    {
        if constexpr (bits == 16) {
            uint4 w = reinterpret_cast<const uint4 *>(slot + step * 512)[threadIdx.x % 32];
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        } else {
            if (step == 2 && group_shift == 5) {
                load_scales(1);
            }
            if constexpr (bits == 4) {
                qf_dequant_4(word[step], rows, a);
            } else {
                qf_dequant_8(word[2 * step], word[2 * step + 1], rows, a);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = qf_mul_bf16(a[i], scale[i & 1]);
            }
        }
    }
};

/* d += a batch: starts its steps as one group, and waits until no more than `pending` groups run. */
template <int tokens, int steps, int pending>
__device__ __forceinline__ void qf_wg_multiply(float (&d)[tokens / 2], const uint32_t (&a)[steps][4], uint64_t x)
{
    qf_wgmma_fence();
#pragma unroll
    for (int s = 0; s < steps; s++) {
        qf_wgmma<tokens>::add(d, a[s], x + s * QF_WGMMA_STEP);
    }
    qf_wgmma_commit();
    qf_wgmma_wait<pending>();
}

/* Tells every block whose copies write this stage that this warp has read it. */
template <int cluster> __device__ __forceinline__ void qf_wg_release(uint64_t *empty)
{
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (cluster == 1) {
        if (lane == 0) {
            qf_mbarrier_arrive(empty);
        }
    } else if (lane < cluster) {
        qf_mbarrier_arrive_remote(empty, lane);
    }
}

/* d = the products of `blocks` blocks of 128 k, from the stages on from `stage`, in tiles whose SM has other blocks
 * too. While one batch is multiplied the next is unpacked into the other set of A registers. */
template <int bits, int tokens>
__device__ __forceinline__ void qf_wg_sum(float (&d)[tokens / 2], const qf_wg_params &p, qf_wg_feed<bits, tokens> &feed,
                                          uint8_t *shared, uint64_t *full, uint64_t *empty, int &stage,
                                          uint32_t &phase, int blocks)
{
    typedef qf_wg_shape<bits, tokens> shape;
    constexpr int steps = shape::steps, batches = 8 / steps;
    uint32_t a[2][steps][4];
    int previous = 0; /* the stage of the batch before */
    const uint32_t x = qf_shared_address(shared);
#pragma unroll
    for (int i = 0; i < tokens / 2; i++) {
        d[i] = 0.0f;
    }
    if (blocks == 0) {
        return;
    }
    feed.wait();
    qf_wg_load<bits, tokens, steps>(a[0], shared + stage * shape::stage_bytes, 0, p.group_shift);
    qf_mbarrier_wait_bounded(&full[stage], phase);
    for (int block = 0; block < blocks; block++) {
#pragma unroll
        for (int i = 0; i < batches; i++) {
            const int k = i * 16 * steps % shape::stage_k, next_k = (k + 16 * steps) % shape::stage_k;
            const uint32_t batch = x + stage * shape::stage_bytes + k / 64 * shape::slice_bytes + k % 64 * 16;
            qf_wg_multiply<tokens, steps, 1>(d, a[i & 1], qf_wgmma_descriptor(batch));
            if (k == 0 && (i > 0 || block > 0)) {
                qf_wg_release<shape::cluster>(&empty[previous]);
            }
            previous = stage;
            if (next_k == 0) {
                feed.fetch(p, shared + stage * shape::stage_bytes);
                if (++stage == shape::stages) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            if (i + 1 < batches || block + 1 < blocks) {
                if (next_k == 0) {
                    feed.wait();
                }
                qf_wg_load<bits, tokens, steps>(a[(i + 1) & 1], shared + stage * shape::stage_bytes, next_k,
                                                p.group_shift);
                if (next_k == 0) {
                    qf_mbarrier_wait_bounded(&full[stage], phase);
                }
            }
        }
    }
    qf_wgmma_wait<0>();
    qf_wgmma_pin(d);
    qf_wg_release<shape::cluster>(&empty[previous]);
}

/* The same in wide tiles, which have the SM to themselves: step i + 2 is unpacked between the starts of i and i + 1,
 * while i - 1 and i run. */
template <int bits, int tokens>
__device__ __forceinline__ void qf_wg_sum_wide(float (&d)[tokens / 2], const qf_wg_params &p,
                                               qf_wg_feed<bits, tokens> &feed, uint8_t *shared, uint64_t *full,
                                               uint64_t *empty, int &stage, uint32_t &phase, int blocks)
{
    typedef qf_wg_shape<bits, tokens> shape;
    static_assert(shape::stage_k == 64, "four steps a stage");
    uint32_t a[4][1][4];
    qf_wg_words<bits, tokens> words;
#pragma unroll
    for (int i = 0; i < tokens / 2; i++) {
        d[i] = 0.0f;
    }
    if (blocks == 0) {
        return;
    }
    feed.wait();
    words.load(shared + stage * shape::stage_bytes);
    words.unpack(0, p.group_shift, a[0][0]);
    words.unpack(1, p.group_shift, a[1][0]);
    qf_mbarrier_wait_bounded(&full[stage], phase);
    int previous = stage;
#pragma unroll 1
    for (int left = 2 * blocks; left > 0; left--) {
        const uint64_t x = qf_wgmma_descriptor(qf_shared_address(shared) + stage * shape::stage_bytes);
        qf_wg_multiply<tokens, 1, 2>(d, a[0], x);
        words.unpack(2, p.group_shift, a[2][0]);
        qf_wg_multiply<tokens, 1, 2>(d, a[1], x + QF_WGMMA_STEP);
        if (left < 2 * blocks) {
            qf_wg_release<shape::cluster>(&empty[previous]);
        }
        words.unpack(3, p.group_shift, a[3][0]);
        feed.fetch(p, shared + stage * shape::stage_bytes);
        previous = stage;
        if (++stage == shape::stages) {
            stage = 0;
            phase ^= 1;
        }
        /* After the last stage these words are not those of this sum, or none at all; they are not multiplied. */
        feed.wait();
        words.load(shared + stage * shape::stage_bytes);
        qf_wg_multiply<tokens, 1, 2>(d, a[2], x + 2 * QF_WGMMA_STEP);
        words.unpack(0, p.group_shift, a[0][0]);
        qf_wg_multiply<tokens, 1, 2>(d, a[3], x + 3 * QF_WGMMA_STEP);
        words.unpack(1, p.group_shift, a[1][0]);
        if (left > 1) {
            qf_mbarrier_wait_bounded(&full[stage], phase);
        }
    }
    qf_wgmma_wait<0>();
    qf_wgmma_pin(d);
    qf_wg_release<shape::cluster>(&empty[previous]);
}

/* --- epilogues ------------------------------------------------------------------------------------------------- */

/* out[split][token][row] for 16 rows of this warp. */
template <int tokens>
__device__ __forceinline__ void qf_wg_store(const qf_wg_params &p, const qf_wg_unit &u, const float (&d)[tokens / 2])
{
    const int lane = threadIdx.x % 32, row_tile = u.row_tile + threadIdx.x / 32;
    if (row_tile >= p.n / 16) {
        return;
    }
    const int row = row_tile * 16 + lane / 4;
    const int left = p.num_tokens - u.token_tile * 8 - 2 * (lane % 4); /* tokens from this lane's first on */
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr && u.split == 0) {
        bias[0] = p.bias[row];
        bias[1] = p.bias[row + 8];
    }
    float *out = p.out + ((int64_t)u.split * p.num_tokens + u.token_tile * 8 + 2 * (lane % 4)) * p.n + row;
#pragma unroll
    for (int j = 0; j < tokens / 8; j++) {
        if (8 * j < left) {
            out[0] = fmaf(d[4 * j], p.scale_multiplier, bias[0]);
            out[8] = fmaf(d[4 * j + 2], p.scale_multiplier, bias[1]);
        }
        if (8 * j + 1 < left) {
            out[p.n] = fmaf(d[4 * j + 1], p.scale_multiplier, bias[0]);
            out[p.n + 8] = fmaf(d[4 * j + 3], p.scale_multiplier, bias[1]);
        }
        out += 8 * (int64_t)p.n;
    }
}

/* A division by the reciprocal, right to 2 units of 2^-23, has no branch, so that many run side by side. */
__device__ __forceinline__ float qf_wg_silu_mul(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

/* Rows g and g + 8 are gate and up of feature 8 row_tile + g; a core matrix of `act` is stored by one warp at once. */
template <int tokens>
__device__ __forceinline__ void qf_wg_silu_store(const qf_wg_params &p, const qf_wg_unit &u,
                                                 const float (&d)[tokens / 2])
{
    const int lane = threadIdx.x % 32, row_tile = u.row_tile + threadIdx.x / 32;
    const int row_tiles = p.n / 16;
    if (row_tile >= (row_tiles + 15) / 16 * 16) {
        return;
    }
    const bool real = row_tile < row_tiles; /* or padding up to act_k */
    const int tiles = (p.num_tokens + 7) / 8;
    const int width = p.num_tokens > 4 ? 8 : p.num_tokens > 2 ? 4 : p.num_tokens;
    float bias[2] = {0.0f, 0.0f};
    if (p.bias != nullptr && real) {
        bias[0] = p.bias[row_tile * 16 + lane / 4];
        bias[1] = p.bias[row_tile * 16 + lane / 4 + 8];
    }
    uint32_t *act = reinterpret_cast<uint32_t *>(p.act) +
                    (((int64_t)(row_tile / 8) * tiles + u.token_tile) * 8 + row_tile % 8) * (width * 4) + lane;
#pragma unroll
    for (int j = 0; j < tokens / 8; j++) {
        float low = qf_wg_silu_mul(fmaf(d[4 * j], p.scale_multiplier, bias[0]),
                                   fmaf(d[4 * j + 2], p.scale_multiplier, bias[1]));
        float high = qf_wg_silu_mul(fmaf(d[4 * j + 1], p.scale_multiplier, bias[0]),
                                    fmaf(d[4 * j + 3], p.scale_multiplier, bias[1]));
        uint32_t word = qf_movmatrix_trans(qf_pack_bf16(low, high));
        if (u.token_tile + j < tiles && lane / 4 < width) {
            act[j * 256] = real ? word : 0u;
        }
    }
}

#endif /* QF_SM90A */
#endif
