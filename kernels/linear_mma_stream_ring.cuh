/* "stream" of linear_mma.cu for 4 bits and up to 4 tokens on Hopper: its weights are in flight to shared memory instead
 * of registers.
 *
 * Loads into registers land in L1, of which little is left where shared memory is as large as the linears ask for, so
 * few of them are in flight at once. Copies into shared memory need none of it: what a warp has asked for before the
 * wait for the kernel before this one comes while that ends.
 *
 *   a warp's ring:  slots of a piece of 1 KB as its lanes will read it, 16 bytes a lane twice, and its scales behind
 *
 * x comes in one bulk copy, whose barrier is apart from the count of the weights' copies.
 *
 * One token, groups of 128: x is multiplied by integers that are not unpacked (decode_units.cuh), after all threads have
 * put it in the order, and the size, that this takes: 118 instructions a unit instead of 158.
 *
 * Measured, H200, us a layer's four linears in turn, cold L2, this | registers: 7B 1 token 39.4 | 41.9, 4 tokens 41.9 |
 * 44.2, 8 tokens 45.2 | 46.9; half of 7B 27.0 | 27.8; 0.5B 8.0 | 10.0, 4 tokens 8.7 | 10.5, 8 tokens 11.0 | 9.8. At 8
 * and 16 bits no better (7B 72.2 | 72.2, 115.2 | 113.3). Rings of 4 slots: 40.3, 0.5B 12.0; of 8: 40.7, 0.5B 9.7.
 * One token without unpacking | unpacked, 7B, one after the other with cold L2: gate_up 18.8 | 19.1, down 11.8 | 12.3, qkv
 * 4.8 | 4.8, o 4.6 | 4.3. */
#ifndef QF_LINEAR_MMA_STREAM_RING_CUH
#define QF_LINEAR_MMA_STREAM_RING_CUH

#include "decode_units.cuh"
#include "linear_mma_stream.cuh"

#define QF_STREAM_RING_DEPTH 6

/* Bytes of a slot; groups: scale groups in a piece. */
__host__ __device__ constexpr int qf_stream_slot_bytes(int groups) { return QF_STREAM_PIECE_BYTES + 64 * groups; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* Where a warp's copies stand. */
template <int groups> struct qf_stream_feed {
    const uint8_t *data, *scales; /* of the next piece, at this lane's bytes */
    int32_t column, columns;      /* as in qf_stream_cursor */
    int32_t jump;

    /* Asks for the next piece. slot: a shared address at this lane's bytes. */
    __device__ __forceinline__ void ask(uint32_t slot, int lane)
    {
        qf_copy_16_stream(slot, data);
        qf_copy_16_stream(slot + 512, data + 512);
        if (lane < 4 * groups) {
            qf_copy_16_stream(slot + QF_STREAM_PIECE_BYTES, scales);
        }
        data += QF_STREAM_PIECE_BYTES;
        scales += 64 * groups;
        if (++column == columns) { /* over to the same columns of the next row tile */
            column = 0;
            data += (int64_t)jump * QF_STREAM_PIECE_BYTES;
            scales += (int64_t)jump * (64 * groups);
        }
    }
};

/* A piece from its slot, as qf_stream_load leaves it in registers. */
template <int groups>
__device__ __forceinline__ void qf_stream_take(qf_stream_piece &piece, uint32_t slot, int lane)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 v = qf_shared_load_16(slot + 512 * i);
        piece.words[4 * i] = v.x;
        piece.words[4 * i + 1] = v.y;
        piece.words[4 * i + 2] = v.z;
        piece.words[4 * i + 3] = v.w;
    }
    const uint32_t scales = slot + QF_STREAM_PIECE_BYTES + (lane % groups * 64 + lane / 4 * 4 - lane * 16);
    piece.scales[0] = qf_shared_load_4(scales);
    piece.scales[1] = qf_shared_load_4(scales + 32);
}

#define QF_STREAM_X_SCALE 0x6f806f80u                   /* 2^96, a pair of bf16 */
#define QF_STREAM_SUM_SCALE 7.2759576141834259e-12f /* 2^-37: of that and of integers as bits, 2^-133 */

/* x of one token, for qf_decode_load_x: within 64 bytes (two k16 steps) the words of a lane beside each other, times 2^96;
 * and the sums of x over blocks of k, times 2^-37. All threads, which then meet. */
__device__ __forceinline__ void qf_stream_arrange(uint32_t x, uint32_t sums, int blocks)
{
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = threadIdx.x - lane; first < blocks * 16; first += blockDim.x) {
        const int i = first + lane;
        const bool real = i < blocks * 16;
        uint32_t w[4] = {};
        float sum = 0.0f;
        if (real) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                w[j] = qf_shared_load_4(x + (i >> 2) * 64 + (i & 3) * 4 + j * 16);
                sum += qf_bf16_low(w[j]) + qf_bf16_high(w[j]);
                w[j] = qf_mul_bf16(w[j], QF_STREAM_X_SCALE);
            }
        }
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) { /* and all lanes have read */
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if (real) {
            asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(x + i * 16), "r"(w[0]), "r"(w[1]), "r"(w[2]),
                         "r"(w[3])
                         : "memory");
            if (lane % 16 == 0) {
                qf_sts_32(sums + (i >> 4) * 4, sum * QF_STREAM_SUM_SCALE);
            }
        }
    }
    __syncthreads();
}

/* acc[0] += row g of piece * x, acc[2] += 16 times row g + 8: of lanes 0, 4, 8, .. */
__device__ __forceinline__ void qf_stream_multiply_one(float (&acc)[4], const qf_stream_piece &piece, uint4 (&b)[4],
                                                       uint32_t x, float sum)
{
    float c[4][4];
    qf_decode_load_x<4>(x, b);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t a0[4], a1[4];
        qf_raw_4(piece.words[2 * j], a0);
        qf_raw_4(piece.words[2 * j + 1], a1);
        if (j < 2) {
            qf_mma_bf16_first(c[2 * j], a0, b[j].x, b[j].y);
            qf_mma_bf16_first(c[2 * j + 1], a1, b[j].z, b[j].w);
        } else {
            qf_mma_bf16(c[2 * j - 4], a0, b[j].x, b[j].y);
            qf_mma_bf16(c[2 * j - 3], a1, b[j].z, b[j].w);
        }
    }
    float sums[2] = {acc[0], acc[2]};
    qf_apply_scales<4>(piece.scales[0], piece.scales[1], sum, qf_decode_unit_sum<4>(c, 0), qf_decode_unit_sum<4>(c, 2),
                       sums);
    acc[0] = sums[0];
    acc[2] = sums[1];
}

#endif

/* As qf_linear_stream_kernel. one: of one token, in groups of 128, whose products are made of integers that are not
 * unpacked (decode_units.cuh). */
template <int groups, bool one>
static __global__ void __launch_bounds__(groups == 1 && !one ? 1024 : QF_STREAM_MAX_WARPS * 32, 1)
    qf_linear_stream_ring_kernel(const __grid_constant__ qf_linear_mma_params p)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int depth = QF_STREAM_RING_DEPTH, slot_bytes = qf_stream_slot_bytes(groups);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    qf_grid_launch_dependents();

    const int first_block = p.share_begin[blockIdx.y], share_blocks = p.share_begin[blockIdx.y + 1] - first_block;
    const int first_tile = blockIdx.x * p.group_tiles + min((int)blockIdx.x, p.larger_groups);
    const int tiles = p.group_tiles + ((int)blockIdx.x < p.larger_groups);
    const int columns = share_blocks, units = tiles * columns;
    const int warps = min((int)blockDim.x / 32, units), each = qf_divide_small(units, warps);
    const qf_stream_split split = {columns, each, units - each * warps};
    const int begin = warp < warps ? warp * each + min(warp, split.more) : units;
    const int end = warp < warps ? begin + each + (warp < split.more) : units;
    int row = qf_divide_small(begin, columns), column = begin - row * columns; /* of the piece to multiply next */

    const int64_t index = (int64_t)(first_tile + row) * p.blocks + first_block + column;
    qf_stream_feed<groups> feed;
    feed.data = p.data + index * QF_STREAM_PIECE_BYTES + lane * 16;
    feed.scales = reinterpret_cast<const uint8_t *>(p.scales) + index * (64 * groups) + lane * 16;
    feed.column = column;
    feed.columns = columns;
    feed.jump = p.blocks - share_blocks;
    const uint32_t base = qf_shared_address(shared);
    const uint32_t ring = base + p.ring_offset + warp * (depth * slot_bytes) + lane * 16; /* at this lane's bytes */
#pragma unroll 1
    for (int i = 0; i < depth; i++) {
        if (begin + i < end) {
            feed.ask(ring + i * slot_bytes, lane);
        }
        if (i < depth - 1) {
            qf_cp_async_commit();
        }
    }
    /* x in shared memory as it is in global memory. Lanes of ldmatrix whose token is beyond the tile point at zeros. */
    const int x_bytes = share_blocks * 256 * p.tile_tokens;
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared + x_bytes + 16);
    if (threadIdx.x == 0) {
        *reinterpret_cast<uint4 *>(shared + x_bytes) = make_uint4(0, 0, 0, 0);
        qf_mbarrier_init(barrier, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    const bool real = lane % 8 < p.tile_tokens;
    const uint32_t x_start = base + (real ? lane / 8 * 16 * p.tile_tokens + lane % 8 * 16 : x_bytes);
    const uint32_t x_stride = real ? 64 * p.tile_tokens : 0;
    uint32_t x_row = one ? base + (lane & 3) * 16 + column * 256 : x_start + column * 4 * x_stride;
    const uint32_t sums = base + x_bytes + 32; /* one: of x over blocks */
    qf_stream_tables tables;
    tables.bias = reinterpret_cast<float *>(shared + p.table_offset);
    tables.ranges = reinterpret_cast<int *>(tables.bias + (p.group_tiles + 1) * 16);
    qf_stream_make_tables(p, tables, split, first_tile, tiles);
    const qf_stream_norm norm = qf_stream_norm_begin(p, shared, first_tile, tiles);
    qf_cp_async_commit(); /* the biases with the ring's last */
    __syncthreads();
    qf_grid_dependency_wait();
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(qf_shared_address(barrier)),
                     "r"(x_bytes)
                     : "memory");
        qf_bulk_copy(shared, p.x + (int64_t)first_block * 256 * p.tile_tokens, x_bytes, barrier);
    }
    qf_stream_squares squares;
    squares.load(p, warp, lane);
    qf_stream_norm_load(p, norm, first_tile, tiles); /* with the next piece */
    __syncwarp();
    qf_barrier_wait(qf_shared_address(barrier), 0);
    squares.put(p, norm, lane); /* they came as x did */
    if constexpr (one) {
        qf_stream_arrange(base, sums, share_blocks);
    }
    uint4 b[4] = {};

    float *slots = reinterpret_cast<float *>(shared + p.slot_offset);
    const int slot_stride = p.num_tokens * QF_STREAM_TOKEN_STRIDE;
    float acc[4] = {0, 0, 0, 0};
    uint32_t slot = ring;
#pragma unroll 1
    for (int unit = begin; unit < end; unit++) {
        qf_stream_piece piece;
        qf_cp_async_wait<depth - 1>();
        __syncwarp();
        qf_stream_take<groups>(piece, slot, lane);
        if constexpr (one) {
            qf_stream_multiply_one(acc, piece, b, x_row, __uint_as_float(qf_shared_load_4(sums + column * 4)));
            x_row += 256;
        } else {
            qf_stream_multiply<4, groups>(acc, piece, x_row, x_stride, lane);
        }
        __syncwarp();
        if (unit + depth < end) {
            feed.ask(slot, lane);
        }
        qf_cp_async_commit();
        slot = slot == ring + (depth - 1) * slot_bytes ? ring : slot + slot_bytes;
        if (++column == columns || unit + 1 == end) {
            acc[2] *= one ? 0.0625f : 1.0f;
            qf_stream_put(slots + (row + warp) * slot_stride, acc, p.num_tokens, lane);
            column = 0;
            row++;
            x_row = one ? base + (lane & 3) * 16 : x_start;
        }
    }
    qf_cp_async_wait<0>(); /* the biases of a short run, the residual */
    __syncthreads();
    qf_stream_finish(p, tables, norm, slots, first_tile, tiles);
#endif
}

#endif
