/* The kernel of 9 to 32 tokens of linear_mma.cu: see "batch" there. */
#ifndef QF_LINEAR_MMA_BATCH_CUH
#define QF_LINEAR_MMA_BATCH_CUH

#include "linear_mma_stream.cuh"

#define QF_BATCH_STAGES 3 /* chunks of x in shared memory */
#define QF_BATCH_MAX_CHUNKS 32 /* of x that stays in shared memory; a barrier of 8 bytes each */
#define QF_BATCH_MAX_SLICES 8
#define QF_BATCH_MAX_TOKENS 32

/* Row tiles of a warp. At 4 bits and 4 token tiles a second one halves the reads of x from shared memory, which would
 * be the bound; several groups in a piece take too many registers for it. */
__host__ __device__ constexpr int qf_batch_rows(int bits, int group_size, int tokens)
{
    return bits == 4 && group_size == 128 && tokens == 4 ? 2 : 1;
}
/* As many as the registers of an SM hold. */
__host__ __device__ constexpr int qf_batch_max_warps(int bits, int group_size, int tokens)
{
    return bits == 16 ? 20 : tokens == 2 ? (bits == 4 && group_size == 32 ? 16 : 20) : bits == 8 ? 16 : 12;
}
/* Pieces (of every row tile of the warp) in flight a warp. */
__device__ constexpr int qf_batch_depth(int bits, int groups, int tokens, int rows)
{
    return bits == 16 || (bits == 8 && tokens == 4 && groups == 1) ? 4
           : rows == 1 && (groups == 1 || tokens == 4)              ? 3
                                                                    : 2;
}
/* Bytes of x in a k block. */
__host__ __device__ constexpr int qf_batch_x_bytes(int num_tiles) { return num_tiles * 2048; }
/* Shared memory of a warp's partial sums. */
__host__ __device__ constexpr int qf_batch_slot_bytes(int tokens, int rows) { return rows * tokens * 512; }

/* Where a warp finds its weights: a slice's blocks are slice, slice + slices, ... of the share. */
struct qf_batch_place {
    const uint8_t *data;    /* of the matrix's first piece, at this lane's bytes */
    const uint32_t *scales; /* of the matrix's first group, at this lane's rows */
    int first_block; /* of the slice */
};

template <int bits, int groups, int rows>
__device__ __forceinline__ void qf_batch_fetch(qf_stream_piece (&piece)[rows], const qf_linear_mma_params &p,
                                               const qf_batch_place &at, int tile, int unit)
{
    constexpr int block_pieces = bits / 4;
    const int block = at.first_block + unit / block_pieces * p.slices;
#pragma unroll
    for (int r = 0; r < rows; r++) {
        int row = r == 0 ? tile : min(tile + r, p.row_tiles - 1); /* beyond the last: anything, never stored */
        int index = (row * p.blocks + block) * block_pieces + unit % block_pieces;
        qf_stream_load<bits, groups>(piece[r], at.data, at.scales, index, p.group_size);
    }
}

/* acc += piece * x. x: this lane's row for ldmatrix in the first two token tiles of the piece's first 16 columns, a
 * shared address; half: from there to the next 64 columns; others: to the other two token tiles. */
template <int bits, int groups, int tokens, int rows>
__device__ __forceinline__ void qf_batch_multiply(float (&acc)[rows][tokens][4], const qf_stream_piece (&piece)[rows],
                                                  uint32_t x, uint32_t half, uint32_t others, int lane)
{
    constexpr int steps = 32 / bits, group_steps = steps / groups;
    float c[rows][tokens][4];
    qf_row_scales scales[rows];
#pragma unroll
    for (int step = 0; step < steps; step++) {
        uint32_t b[tokens / 2][4];
#pragma unroll
        for (int t = 0; t < tokens / 2; t++) {
            qf_ldmatrix_x4_at(b[t], x + (t == 0 ? 0 : others) + step / 4 * half + step % 4 * 256);
        }
#pragma unroll
        for (int r = 0; r < rows; r++) {
            if (step % group_steps == 0 && bits != 16) {
                scales[r] = qf_stream_scales<bits, groups>(piece[r], step / group_steps, lane);
            }
            uint32_t a[4];
            qf_stream_fragment<bits>(a, piece[r], step, scales[r]);
#pragma unroll
            for (int t = 0; t < tokens; t++) {
                const uint32_t b0 = b[t / 2][t % 2 * 2], b1 = b[t / 2][t % 2 * 2 + 1];
                if (bits == 16) {
                    qf_mma_bf16(acc[r][t], a, b0, b1);
                } else if (step % group_steps == 0) {
                    qf_mma_bf16_first(c[r][t], a, b0, b1);
                } else {
                    qf_mma_bf16(c[r][t], a, b0, b1);
                }
            }
        }
        if (step % group_steps == group_steps - 1 && bits != 16) {
#pragma unroll
            for (int i = 0; i < rows * tokens; i++) {
                qf_add_scaled(acc[i / tokens][i % tokens], scales[i / tokens].scale, c[i / tokens][i % tokens]);
            }
        }
    }
}

/* Brings chunk `chunk` of the share's x into its place in the ring. */
static __device__ __forceinline__ void qf_batch_load_x(const qf_linear_mma_params &p, uint8_t *stage, int first_block,
                                                       int share_blocks, int chunk)
{
    const int block_bytes = qf_batch_x_bytes(p.num_tiles), begin = chunk * p.chunk_blocks;
    const int bytes = min(p.chunk_blocks, share_blocks - begin) * block_bytes;
    const uint8_t *x = p.x + (int64_t)(first_block + begin) * block_bytes;
    for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
        qf_cp_async_16(stage + i, x + i);
    }
}

/* Counts this thread in at the barrier once its copies so far have come. */
static __device__ __forceinline__ void qf_batch_arrive_copied(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(qf_shared_address(barrier)) : "memory");
}

/* Adds the slices' sums in order in the warps of slice 0. */
template <int tokens, int rows>
static __device__ __forceinline__ void qf_batch_add_slices(float (&acc)[rows][tokens][4], float *slots, int slices,
                                                           int slice, int row_warps, int row_warp, int lane)
{
    constexpr int size = rows * tokens * 4;
    if (slice > 0) {
        float *slot = slots + ((slice - 1) * row_warps + row_warp) * (size * 32) + lane;
#pragma unroll
        for (int i = 0; i < size; i++) {
            slot[i * 32] = acc[i / 4 / tokens][i / 4 % tokens][i % 4];
        }
    }
    __syncthreads();
    for (int s = 1; s < slices && slice == 0; s++) {
        const float *slot = slots + ((s - 1) * row_warps + row_warp) * (size * 32) + lane;
#pragma unroll
        for (int i = 0; i < size; i++) {
            acc[i / 4 / tokens][i / 4 % tokens][i % 4] += slot[i * 32];
        }
    }
}

/* A row tile times a token tile: partial sums, or silu(gate) * up with gate in rows 0 .. 7 and up in rows 8 .. 15. */
static __device__ __forceinline__ void qf_batch_store(const qf_linear_mma_params &p, const float (&acc)[4], int row,
                                                      int token_tile, int lane)
{
    const int n = p.row_tiles * 16, share = blockIdx.y;
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        value[i] = qf_finish(acc[i], p.multiplier, p.bias, row * 16 + lane / 4 + i / 2 * 8, share == 0);
    }
    if (p.act == nullptr) {
        const int token = token_tile * 8 + lane % 4 * 2;
        float *out = p.out + ((int64_t)share * p.num_tokens + token) * n + row * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (token + i % 2 < p.num_tokens) {
                out[(int64_t)(i % 2) * n + i / 2 * 8] = value[i];
            }
        }
        return;
    }
    /* Held: (row lane / 4, tokens 2 (lane % 4) and next); a core matrix wants (token lane / 4, two rows). */
    uint32_t word = qf_pack_bf16(qf_silu_mul(value[0], value[2]), qf_silu_mul(value[1], value[3]));
    word = qf_movmatrix_trans(word);
    if (token_tile * 8 + lane / 4 < p.num_tokens) {
        p.act[(((row / 8) * p.num_tiles + token_tile) * 8 + row % 8) * 32 + lane] = word;
    }
}

/* act's padding along k. */
static __device__ __forceinline__ void qf_batch_pad(const qf_linear_mma_params &p)
{
    const int words = p.num_tiles * 32;
    for (int i = threadIdx.x; i < (p.act_tiles - p.row_tiles) * words; i += blockDim.x) {
        int row = p.row_tiles + i / words, token_tile = i % words / 32;
        p.act[(((row / 8) * p.num_tiles + token_tile) * 8 + row % 8) * 32 + i % 32] = 0;
    }
}

/* bits; groups: scale groups in a piece; token tiles; row tiles of a warp. Grid (row groups, shares of k). */
template <int bits, int groups, int tokens, int rows>
static __global__ void __launch_bounds__(qf_batch_max_warps(bits, bits == 4 ? 128 / groups : 128, tokens) * 32, 1)
    qf_linear_batch_kernel(const __grid_constant__ qf_linear_mma_params p)
{
    extern __shared__ __align__(128) uint8_t all_shared[];
    uint64_t *arrived = reinterpret_cast<uint64_t *>(all_shared);
    uint8_t *shared = all_shared + QF_BATCH_MAX_CHUNKS * sizeof(uint64_t);
    constexpr int block_pieces = bits / 4, depth = qf_batch_depth(bits, groups, tokens, rows);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int slice = warp / p.row_warps, row_warp = warp - slice * p.row_warps;
    qf_grid_launch_dependents();

    const int first_block = p.share_begin[blockIdx.y], share_blocks = p.share_begin[blockIdx.y + 1] - first_block;
    const int columns = (share_blocks + p.slices - 1) / p.slices * block_pieces; /* pieces of a row, of slice 0 */
    const int mine = (share_blocks - slice + p.slices - 1) / p.slices * block_pieces;
    const int pass_tiles = gridDim.x * p.row_warps * rows;
    int tile = (blockIdx.x * p.row_warps + row_warp) * rows;
    const qf_batch_place at = {p.data + lane * 16, p.scales + lane % groups * 16 + lane / 4, first_block + slice};
    qf_stream_piece ring[depth][rows];
#pragma unroll
    for (int i = 0; i < depth; i++) {
        if (i < mine && tile < p.row_tiles) {
            qf_batch_fetch<bits, groups, rows>(ring[i], p, at, tile, i);
        }
    }
    /* x comes in chunks, every row's run over k again, or once for all if it has room: then warps wait for x only, not
     * for each other. */
    const int block_bytes = qf_batch_x_bytes(p.num_tiles);
    const int chunks = (share_blocks + p.chunk_blocks - 1) / p.chunk_blocks;
    if (p.resident) {
        if (threadIdx.x < chunks) {
            qf_mbarrier_init(&arrived[threadIdx.x], blockDim.x);
        }
        __syncthreads();
    }
    qf_grid_dependency_wait();
    int left = chunks * p.passes, load_chunk = 0; /* chunks to bring; the next, in its run over k */
    auto bring = [&](int place) {
        if (left > 0) {
            qf_batch_load_x(p, shared + place * p.stage_bytes, first_block, share_blocks, load_chunk);
        }
        qf_cp_async_commit();
        left--;
        load_chunk = load_chunk + 1 == chunks ? 0 : load_chunk + 1;
    };
    for (int i = 0; i < (p.resident ? chunks : QF_BATCH_STAGES - 1); i++) {
        bring(i);
        if (p.resident) {
            qf_batch_arrive_copied(&arrived[i]);
        }
    }
    /* A step of 16 columns of two token tiles is an ldmatrix: two core matrices each. The last of three tiles is read
     * twice. */
    const uint32_t half = p.num_tiles * 1024, others = lane < 16 || p.num_tiles > 3 ? 2048 : 1024;
    const uint32_t x_start = qf_shared_address(shared) + slice * block_bytes + lane / 16 * 1024 + lane % 16 * 16;
    uint32_t x = x_start;
    int slot = QF_BATCH_STAGES - 1;
    for (int pass = 0; pass < p.passes; pass++, tile += pass_tiles) {
        float acc[rows][tokens][4] = {};
        int in_chunk = 0; /* pieces done of this chunk */
        slot = p.resident ? -1 : slot;
        for (int base = 0; base < columns; base += depth) {
#pragma unroll
            for (int i = 0; i < depth; i++) {
                const int unit = base + i;
                if (unit >= columns) {
                    break;
                }
                if (in_chunk == 0 && p.resident) {
                    qf_mbarrier_wait(&arrived[++slot], 0);
                    x = x_start + slot * p.stage_bytes;
                } else if (in_chunk == 0) { /* all have done with the chunk before: its place is free */
                    qf_cp_async_wait<QF_BATCH_STAGES - 2>();
                    __syncthreads();
                    bring(slot);
                    slot = slot + 1 == QF_BATCH_STAGES ? 0 : slot + 1;
                    x = x_start + slot * p.stage_bytes;
                }
                if (unit < mine && tile < p.row_tiles) {
                    uint32_t from = x + in_chunk / block_pieces * p.slices * block_bytes;
                    from += bits == 8    ? in_chunk % 2 * half
                            : bits == 16 ? in_chunk / 2 % 2 * half + in_chunk % 2 * 512
                                         : 0;
                    qf_batch_multiply<bits, groups, tokens, rows>(acc, ring[i], from, half, others, lane);
                }
                /* The ring's place i: this row's piece `depth` further on, or piece i of the next pass's row. */
                const bool over = unit + depth >= columns;
                const int next = over ? i : unit + depth, next_tile = over ? tile + pass_tiles : tile;
                if (next < mine && next_tile < p.row_tiles) {
                    qf_batch_fetch<bits, groups, rows>(ring[i], p, at, next_tile, next);
                }
                in_chunk = in_chunk + 1 == p.chunk_columns ? 0 : in_chunk + 1;
            }
        }
        if (p.slices > 1) {
            qf_batch_add_slices<tokens, rows>(acc, reinterpret_cast<float *>(shared + p.slot_offset), p.slices, slice,
                                              p.row_warps, row_warp, lane);
        }
#pragma unroll
        for (int r = 0; r < rows; r++) {
#pragma unroll
            for (int t = 0; t < tokens; t++) {
                if (slice == 0 && tile + r < p.row_tiles && t < p.num_tiles) {
                    qf_batch_store(p, acc[r][t], tile + r, t, lane);
                }
            }
        }
    }
    if (p.act != nullptr && blockIdx.x == 0) {
        qf_batch_pad(p);
    }
}

#endif
