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
 * Measured, H200, us a layer's four linears in turn, cold L2, this | registers: 7B 1 token 39.4 | 41.9, 4 tokens 41.9 |
 * 44.2, 8 tokens 45.2 | 46.9; half of 7B 27.0 | 27.8; 0.5B 8.0 | 10.0, 4 tokens 8.7 | 10.5, 8 tokens 11.0 | 9.8. At 8
 * and 16 bits no better (7B 72.2 | 72.2, 115.2 | 113.3). Rings of 4 slots: 40.3, 0.5B 12.0; of 8: 40.7, 0.5B 9.7. */
#ifndef QF_LINEAR_MMA_STREAM_RING_CUH
#define QF_LINEAR_MMA_STREAM_RING_CUH

#include "linear_mma_stream.cuh"

#define QF_STREAM_RING_DEPTH 6

/* Bytes of a slot; groups: scale groups in a piece. */
__host__ __device__ constexpr int qf_stream_slot_bytes(int groups) { return QF_STREAM_PIECE_BYTES + 64 * groups; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/* Asks for the next piece, into the slot at shared address `slot`. at.data is at this lane's bytes, at.scales at the
 * matrix's first. */
template <int groups> __device__ __forceinline__ void qf_stream_ask(uint32_t slot, qf_stream_cursor &at, int lane)
{
    const uint8_t *data = at.data + (int64_t)at.index * QF_STREAM_PIECE_BYTES;
    qf_copy_16_stream(slot + lane * 16, data);
    qf_copy_16_stream(slot + lane * 16 + 512, data + 512);
    if (lane < 4 * groups) {
        qf_copy_16_stream(slot + QF_STREAM_PIECE_BYTES + lane * 16,
                          at.scales + (int64_t)at.index * (groups * 16) + lane * 4);
    }
    at.index++;
    if (++at.column == at.columns) { /* over to the same columns of the next row tile */
        at.column = 0;
        at.index += at.jump;
    }
}

/* A piece from its slot, as qf_stream_load leaves it in registers. */
template <int groups>
__device__ __forceinline__ void qf_stream_take(qf_stream_piece &piece, uint32_t slot, int lane)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 v = qf_shared_load_16(slot + lane * 16 + 512 * i);
        piece.words[4 * i] = v.x;
        piece.words[4 * i + 1] = v.y;
        piece.words[4 * i + 2] = v.z;
        piece.words[4 * i + 3] = v.w;
    }
    const uint32_t scales = slot + QF_STREAM_PIECE_BYTES + lane % groups * 64 + lane / 4 * 4;
    piece.scales[0] = qf_shared_load_4(scales);
    piece.scales[1] = qf_shared_load_4(scales + 32);
}

#endif

/* As qf_linear_stream_kernel. */
template <int groups>
static __global__ void __launch_bounds__(QF_STREAM_MAX_WARPS * 32, 1)
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

    qf_stream_cursor at;
    at.data = p.data + lane * 16;
    at.scales = p.scales;
    at.index = (first_tile + row) * p.blocks + first_block + column;
    at.column = column;
    at.columns = columns;
    at.jump = p.blocks - share_blocks;
    const uint32_t base = qf_shared_address(shared), ring = base + p.ring_offset + warp * (depth * slot_bytes);
#pragma unroll
    for (int i = 0; i < depth; i++) {
        if (begin + i < end) {
            qf_stream_ask<groups>(ring + i * slot_bytes, at, lane);
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
    uint32_t x_row = x_start + column * 4 * x_stride;
    qf_stream_tables tables;
    tables.bias = reinterpret_cast<float *>(shared + p.table_offset);
    tables.ranges = reinterpret_cast<int *>(tables.bias + (p.group_tiles + 1) * 16);
    qf_stream_make_tables(p, tables, split, first_tile, tiles);
    qf_cp_async_commit(); /* the biases with the ring's last */
    __syncthreads();
    qf_grid_dependency_wait();
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(qf_shared_address(barrier)),
                     "r"(x_bytes)
                     : "memory");
        qf_bulk_copy(shared, p.x + (int64_t)first_block * 256 * p.tile_tokens, x_bytes, barrier);
    }
    __syncwarp();
    qf_barrier_wait(qf_shared_address(barrier), 0);

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
        qf_stream_multiply<4, groups>(acc, piece, x_row, x_stride, lane);
        __syncwarp();
        if (unit + depth < end) {
            qf_stream_ask<groups>(slot, at, lane);
        }
        qf_cp_async_commit();
        slot = slot == ring + (depth - 1) * slot_bytes ? ring : slot + slot_bytes;
        if (++column == columns || unit + 1 == end) {
            qf_stream_put(slots + (row + warp) * slot_stride, acc, p.num_tokens, lane);
            column = 0;
            row++;
            x_row = x_start;
        }
    }
    qf_cp_async_wait<0>(); /* the biases of a short run */
    __syncthreads();
    qf_stream_finish(p, tables, slots, first_tile, tiles);
#endif
}

#endif
