/* The consumers of linear_wgmma.cu's kernel: unpacking, the sums, the epilogues. */
#ifndef QF_LINEAR_WGMMA_TILE_CUH
#define QF_LINEAR_WGMMA_TILE_CUH

#include "linear_wgmma_feed.cuh"

#ifdef QF_SM90A

/* --- consumers: two or three warpgroups ----------------------------------------------------------------------- */

__device__ __forceinline__ uint32_t qf_wg_fma_bf16(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
__device__ __forceinline__ uint32_t qf_wg_mul_bf16(uint32_t a, uint32_t b)
{
    uint32_t r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

/* Scales and zero points of a lane's rows, g = lane / 4 and g + 8, and the way to A registers. Below 2^-125 bf16 is
 * evenly spaced by 2^-133, so that the bits of an integer q <= 255 are the number q 2^-133.
 * 4 bits: q 2^-133 (row g + 8: 2^-129, its nibbles are 4 bits up) times scale 2^101 (2^97), plus -zero scale 2^-32.
 * 8 bits: q 2^-133 times 2^127, less zero / 64, is exact; then times 64 scale. */
template <int bits> struct qf_wg_rows {
    uint32_t scale[2], zero[2];

    __device__ __forceinline__ void set(uint32_t row0, uint32_t row8)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = i == 0 ? row0 : row8;
            const float s = __half2float(__ushort_as_half((unsigned short)(row & 0xffffu)));
            const uint32_t z = __byte_perm(row, 0, 0x3232);
            if (bits == 4) {
                const float t = s * (i == 0 ? 0x1p101f : 0x1p97f);
                scale[i] = qf_pack_bf16(t, t);
                zero[i] = qf_wg_mul_bf16(scale[i], qf_wg_mul_bf16(z, i == 0 ? 0x80018001u : 0x80108010u));
            } else {
                scale[i] = qf_pack_bf16(64.0f * s, 64.0f * s);
                zero[i] = qf_wg_mul_bf16(z, 0xbc80bc80u); /* -1 / 64 */
            }
        }
    }
    /* The A registers of a step of 16 k: 4 bits have one word of it, 8 bits two. */
    __device__ __forceinline__ void unpack(const uint32_t *word, uint32_t (&a)[4]) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (bits == 4) {
                const uint32_t q = (i < 2 ? word[0] : word[0] >> 8) & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
                a[i] = qf_wg_fma_bf16(q, scale[i % 2], zero[i % 2]);
            } else {
                const uint32_t q = __byte_perm(word[i / 2], 0, i % 2 == 0 ? 0x4140 : 0x4342);
                a[i] = qf_wg_mul_bf16(qf_wg_fma_bf16(q, 0x7f007f00u, zero[i % 2]), scale[i % 2]);
            }
        }
    }
};

/* The A registers of `steps` steps of 16 k, `k` into the stage. */
template <typename shape, int steps>
__device__ __forceinline__ void qf_wg_load(uint32_t (&a)[steps][4], const uint8_t *stage, int k, int group_shift)
{
    const int lane = threadIdx.x % 32, row_tile = threadIdx.x / 32;
    const uint8_t *weights = stage + shape::x_bytes + row_tile * shape::slot_bytes;
    if constexpr (shape::bits == 16) {
#pragma unroll
        for (int s = 0; s < steps; s++) {
            uint4 w = reinterpret_cast<const uint4 *>(weights + (k + 16 * s) * 32)[lane];
            a[s][0] = w.x, a[s][1] = w.y, a[s][2] = w.z, a[s][3] = w.w;
        }
    } else {
        /* 4 bits: 64 k are 32 lanes x 16 bytes; 8 bits: 32 k are. */
        uint32_t word[steps * shape::bits / 4];
        if constexpr (shape::bits == 4 && steps == 2) {
            uint2 w = *reinterpret_cast<const uint2 *>(weights + k / 64 * 512 + lane * 16 + k % 64 / 4);
            word[0] = w.x, word[1] = w.y;
        } else {
#pragma unroll
            for (int i = 0; i < steps * shape::bits / 16; i++) {
                uint4 w = reinterpret_cast<const uint4 *>(weights + k * 2 * shape::bits + i * 512)[lane];
                word[4 * i] = w.x, word[4 * i + 1] = w.y, word[4 * i + 2] = w.z, word[4 * i + 3] = w.w;
            }
        }
        const uint32_t *scales = reinterpret_cast<const uint32_t *>(weights + shape::weight_bytes) +
                                 (k >> group_shift) * 16 + lane / 4;
        qf_wg_rows<shape::bits> rows;
        rows.set(scales[0], scales[8]);
#pragma unroll
        for (int s = 0; s < steps; s++) {
            if (s == 2 && group_shift == 5) {
                rows.set(scales[16], scales[24]);
            }
            rows.unpack(word + s * shape::bits / 4, a[s]);
        }
    }
}

/* A stage of wide tiles as it stands in shared memory: 128 k of 4 and 8 bits in words, with their scales; of 16 bits,
 * 64 k that are A registers there. */
template <typename shape> struct qf_wg_words {
    uint32_t slot, scales; /* shared addresses of this lane's weights and scales */
    uint32_t word[shape::bits < 16 ? 2 * shape::bits : 1], row[2];
    qf_wg_rows<shape::bits> rows;

    __device__ __forceinline__ void load_rows(int group)
    {
        row[0] = qf_shared_load_4(scales + group * 64);
        row[1] = qf_shared_load_4(scales + group * 64 + 32);
    }
    __device__ __forceinline__ void load(uint32_t from_slot, uint32_t from_scales)
    {
        slot = from_slot, scales = from_scales;
        if constexpr (shape::bits < 16) {
#pragma unroll
            for (int i = 0; i < shape::bits / 2; i++) {
                uint4 w = qf_shared_load_16(slot + i * 512);
                word[4 * i] = w.x, word[4 * i + 1] = w.y, word[4 * i + 2] = w.z, word[4 * i + 3] = w.w;
            }
            load_rows(0);
        }
    }
    /* The A registers of a step of 16 k; steps in ascending order. */
    __device__ __forceinline__ void unpack(int step, int group_shift, uint32_t (&a)[4])
    {
        if constexpr (shape::bits == 16) {
            uint4 w = qf_shared_load_16(slot + step * 512);
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        } else {
            if ((step == 2 || step == 6) && group_shift == 5) {
                load_rows(step / 2);
                rows.set(row[0], row[1]);
            } else if (step == 4 && group_shift != 7) {
                load_rows(group_shift == 6 ? 1 : 2);
                rows.set(row[0], row[1]);
            } else if (step == 0) {
                rows.set(row[0], row[1]);
            }
            rows.unpack(word + step * shape::bits / 4, a);
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
template <typename shape>
__device__ __forceinline__ void qf_wg_sum(float (&d)[shape::tokens / 2], const qf_wg_params &p, qf_wg_feed<shape> &feed,
                                          uint8_t *shared, uint64_t *full, uint64_t *empty, int &stage,
                                          uint32_t &phase, int blocks)
{
    constexpr int steps = shape::steps, batches = 8 / steps;
    uint32_t a[2][steps][4];
    int previous = 0; /* the stage of the batch before */
    const uint32_t x = qf_shared_address(shared);
#pragma unroll
    for (int i = 0; i < shape::tokens / 2; i++) {
        d[i] = 0.0f;
    }
    if (blocks == 0) {
        return;
    }
    feed.wait();
    qf_wg_load<shape, steps>(a[0], shared + stage * shape::stage_bytes, 0, p.group_shift);
    qf_mbarrier_wait_bounded(&full[stage], phase);
    for (int block = 0; block < blocks; block++) {
#pragma unroll
        for (int i = 0; i < batches; i++) {
            const int k = i * 16 * steps % shape::stage_k, next_k = (k + 16 * steps) % shape::stage_k;
            const uint32_t batch = x + stage * shape::stage_bytes + k / 64 * shape::slice_bytes + k % 64 * 16;
            qf_wg_multiply<shape::tokens, steps, 1>(d, a[i & 1], qf_wgmma_descriptor(batch));
            if (k == 0 && (i > 0 || block > 0)) {
                qf_wg_release<shape::cluster>(&empty[previous]);
            }
            previous = stage;
            if (next_k == 0) {
                feed.fetch(stage);
                if (++stage == shape::stages) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            if (i + 1 < batches || block + 1 < blocks) {
                if (next_k == 0) {
                    feed.wait();
                }
                qf_wg_load<shape, steps>(a[(i + 1) & 1], shared + stage * shape::stage_bytes, next_k,
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

/* Where a consumer of a wide tile finds things: shared addresses. */
struct qf_wg_place {
    uint32_t stages, full;
    uint32_t empty; /* of the block of the cluster that this lane tells, or 0 */
    uint32_t slot, scales; /* this lane's weights and scales in the first stage */
};

template <typename shape>
__device__ __forceinline__ qf_wg_place qf_wg_place_get(const uint8_t *shared, const uint64_t *full,
                                                       const uint64_t *empty)
{
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    qf_wg_place at;
    at.stages = qf_shared_address(shared);
    at.full = qf_shared_address(full);
    at.empty = 0;
    if (lane < shape::cluster) {
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at.empty) : "r"(qf_shared_address(empty)), "r"(lane));
    }
    at.slot = at.stages + shape::x_bytes + warp * shape::slot_bytes + lane * 16;
    at.scales = at.stages + shape::x_bytes + warp * shape::slot_bytes + shape::weight_bytes + lane / 4 * 4;
    return at;
}

/* Tells the blocks of the cluster that this warp's wgmma have read part `part` of the ring. */
__device__ __forceinline__ void qf_wg_release_part(const qf_wg_place &at, int part)
{
    if (at.empty != 0) {
        asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at.empty + part * 8) : "memory");
    }
}

__device__ __forceinline__ void qf_wg_wait_part(const qf_wg_place &at, int part, uint32_t parity)
{
    qf_barrier_wait(at.full + part * 8, parity);
}

/* The same in wide tiles, which have the SM to themselves: step i + 2 is unpacked between the starts of i and i + 1,
 * while i - 1 and i run. */
template <typename shape>
__device__ __forceinline__ void qf_wg_sum_wide(float (&d)[shape::tokens / 2], const qf_wg_params &p,
                                               qf_wg_feed<shape> &feed, const qf_wg_place &at, int &stage,
                                               uint32_t &phase, int blocks)
{
    constexpr int steps = shape::stage_k / 16, part_steps = steps / shape::parts;
    uint32_t a[4][1][4];
    qf_wg_words<shape> words;
#pragma unroll
    for (int i = 0; i < shape::tokens / 2; i++) {
        d[i] = 0.0f;
    }
    if (blocks == 0) {
        return;
    }
    feed.wait();
    words.load(at.slot + stage * shape::stage_bytes, at.scales + stage * shape::stage_bytes);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        words.unpack(i, p.group_shift, a[i][0]);
    }
    qf_wg_wait_part(at, shape::parts * stage, phase);
    int previous = -1; /* the last part of the stage before */
#pragma unroll 1
    for (int left = blocks * (128 / shape::stage_k); left > 0; left--) {
        const int part = shape::parts * stage;
        const uint64_t x = qf_wgmma_descriptor(at.stages + stage * shape::stage_bytes);
#pragma unroll
        for (int i = 0; i < steps; i++) {
            if (i == part_steps) {
                qf_wg_wait_part(at, part + 1, phase);
            }
            const int offset = i / 4 * (shape::slice_bytes / 16) + i % 4 * QF_WGMMA_STEP;
            qf_wg_multiply<shape::tokens, 1, 2>(d, a[i % 4], x + offset);
            if (i == 1 && previous >= 0) {
                qf_wg_release_part(at, previous);
            }
            if (i == part_steps + 1) {
                qf_wg_release_part(at, part);
            }
            words.unpack((i + 2) % steps, p.group_shift, a[(i + 2) % 4][0]);
            if (i == steps - 3) {
                feed.fetch(stage);
                previous = part + shape::parts - 1;
                if (++stage == shape::stages) {
                    stage = 0;
                    phase ^= 1;
                }
                /* After the last stage these words are not those of this sum, or none at all; not multiplied. */
                feed.wait();
                words.load(at.slot + stage * shape::stage_bytes, at.scales + stage * shape::stage_bytes);
            }
        }
        if (left > 1) {
            qf_wg_wait_part(at, shape::parts * stage, phase);
        }
    }
    qf_wgmma_wait<0>();
    qf_wgmma_pin(d);
    qf_wg_release_part(at, previous);
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
