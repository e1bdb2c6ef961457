/* The GEMV of 1 to 8 tokens of linear_mma.cu: see "stream" there. */
#ifndef QF_LINEAR_MMA_STREAM_CUH
#define QF_LINEAR_MMA_STREAM_CUH

#include "linear_mma_stream_norm.cuh"

#define QF_STREAM_MAX_WARPS 24
#define QF_STREAM_PIECE_BYTES 1024
#define QF_STREAM_TOKEN_STRIDE 20 /* floats a token of 16 rows takes in a slot: a warp's writes meet no bank twice */

/* Pieces in flight a warp: what 80 registers hold. */
__device__ constexpr int qf_stream_depth(int bits, int groups)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return groups > 1 || bits == 8 ? 3 : 4;
#else
    (void)bits;
    return groups > 1 ? 3 : 4;
#endif
}

struct qf_stream_piece {
    uint32_t words[8];  /* two 16-byte loads */
    uint32_t scales[2]; /* rows lane / 4 and lane / 4 + 8, of group lane % groups of the piece */
};

/* Where a warp stands in its run of pieces. */
struct qf_stream_cursor {
    const uint8_t *data;    /* of the matrix's first piece, at this lane's bytes */
    const uint32_t *scales; /* of the matrix's first group, at this lane's rows */
    int32_t index;          /* counts from the matrix's first piece */
    int32_t column, columns; /* piece of the row tile's share of k, and how many it has */
    int32_t jump;           /* from the end of that share to the next row tile's */
};

/* Piece `index` of the matrix. data and scales are at this lane's bytes of the first piece and group. */
template <int bits, int groups>
__device__ __forceinline__ void qf_stream_load(qf_stream_piece &piece, const uint8_t *data, const uint32_t *scales,
                                               int index, int group_size)
{
    data += (int64_t)index * QF_STREAM_PIECE_BYTES;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 v = qf_load_stream(data + 512 * i);
        piece.words[4 * i] = v.x;
        piece.words[4 * i + 1] = v.y;
        piece.words[4 * i + 2] = v.z;
        piece.words[4 * i + 3] = v.w;
    }
    if constexpr (bits != 16) {
        int group = bits == 8 && group_size == 128 ? index >> 1 : index; /* 64 columns may be half a group */
        scales += (int64_t)group * (groups * 16);
        piece.scales[0] = qf_load_stream_32(scales);
        piece.scales[1] = qf_load_stream_32(scales + 8);
    }
}

template <int bits, int groups>
__device__ __forceinline__ void qf_stream_fetch(qf_stream_piece &piece, qf_stream_cursor &at, int group_size)
{
    qf_stream_load<bits, groups>(piece, at.data, at.scales, at.index, group_size);
    at.index++;
    if (++at.column == at.columns) { /* over to the same columns of the next row tile */
        at.column = 0;
        at.index += at.jump;
    }
}

/* The scales of a piece's group. */
template <int bits, int groups>
__device__ __forceinline__ qf_row_scales qf_stream_scales(const qf_stream_piece &piece, int group, int lane)
{
    uint32_t low = piece.scales[0], high = piece.scales[1];
    if (groups > 1) {
        low = __shfl_sync(0xffffffffu, low, (lane & 28) + group);
        high = __shfl_sync(0xffffffffu, high, (lane & 28) + group);
    }
    qf_row_scales scales = qf_unpack_scales<bits == 16 ? 4 : bits>(low, high);
    if (bits == 4) {
        qf_quick_scales(scales, high);
    }
    return scales;
}

/* The A fragment of a step, for qf_stream_scales' scales. */
template <int bits>
__device__ __forceinline__ void qf_stream_fragment(uint32_t (&a)[4], const qf_stream_piece &piece, int step,
                                                   const qf_row_scales &scales)
{
    if constexpr (bits == 4) {
        qf_quick_dequant_4(piece.words[step], scales, a);
    } else {
        qf_fragment<bits>(a, piece.words, step, scales);
    }
}

/* acc += piece * x. x_row: this lane's row for ldmatrix, a shared address moved on by x_stride for two k16 steps. */
template <int bits, int groups>
__device__ __forceinline__ void qf_stream_multiply(float (&acc)[4], const qf_stream_piece &piece, uint32_t &x_row,
                                                   uint32_t x_stride, int lane)
{
    constexpr int steps = 32 / bits, group_steps = steps / groups;
    uint32_t b[4];
    float c[4];
    qf_row_scales scales;
#pragma unroll
    for (int step = 0; step < steps; step++) {
        if (step % group_steps == 0 && bits != 16) {
            scales = qf_stream_scales<bits, groups>(piece, step / group_steps, lane);
        }
        if (step % 2 == 0) {
            qf_ldmatrix_x4_at(b, x_row);
            x_row += x_stride;
        }
        uint32_t a[4];
        qf_stream_fragment<bits>(a, piece, step, scales);
        if (bits == 16) {
            qf_mma_bf16(acc, a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
        } else if (step % group_steps == 0) {
            qf_mma_bf16_first(c, a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
        } else {
            qf_mma_bf16(c, a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
        }
        if (step % group_steps == group_steps - 1 && bits != 16) {
            qf_add_scaled(acc, scales.scale, c);
        }
    }
}

/* How a CTA's units (row tiles times columns) are cut: warp w has `each` of them, the first `more` warps one more. */
struct qf_stream_split {
    int columns, each, more;
};

__device__ __forceinline__ int qf_stream_warp_of(const qf_stream_split &split, int unit)
{
    int border = split.more * (split.each + 1);
    return unit < border ? qf_divide_small(unit, split.each + 1)
                         : split.more + qf_divide_small(unit - border, split.each);
}

/* A warp's share of a row tile: (token, 16 rows) floats. */
__device__ __forceinline__ void qf_stream_put(float *slot, float (&acc)[4], int num_tokens, int lane)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int token = lane % 4 * 2 + i % 2;
        if (token < num_tokens) {
            slot[token * QF_STREAM_TOKEN_STRIDE + lane / 4 + i / 2 * 8] = acc[i];
        }
        acc[i] = 0.0f;
    }
}

/* A CTA's tables in shared memory, made before the wait: biases of its rows, and for each row tile the warps that have
 * shares of it, first | last << 16. */
struct qf_stream_tables {
    float *bias;
    int *ranges;
};

/* The biases arrive with the next committed group. */
static __device__ __forceinline__ void qf_stream_make_tables(const qf_linear_mma_params &p,
                                                             const qf_stream_tables &tables,
                                                             const qf_stream_split &split, int first_tile, int tiles)
{
#pragma unroll 1
    for (int r = threadIdx.x; r < tiles; r += blockDim.x) {
        const int first = qf_stream_warp_of(split, r * split.columns);
        tables.ranges[r] = first | qf_stream_warp_of(split, (r + 1) * split.columns - 1) << 16;
    }
    if (p.bias != nullptr && blockIdx.y == 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < tiles * 4; i += blockDim.x) {
            qf_cp_async_16(tables.bias + i * 4, p.bias + first_tile * 16 + i * 4);
        }
    }
}

/* Adds the shares of a row tile in the order of k: `slots` at this lane's element of slot (row tile + 0). */
static __device__ __forceinline__ float qf_stream_sum(const float *slots, int slot_stride, int range)
{
    const int last = range >> 16;
    float sum = 0.0f;
#pragma unroll 1
    for (int w = range & 0xffff; w <= last; w += 4) {
        float share[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            share[i] = w + i <= last ? slots[(w + i) * slot_stride] : 0.0f; /* + 0 changes no sum that began at 0 */
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += share[i];
        }
    }
    return sum;
}

/* A warp has 16 rows of two tokens at a time, one element a lane: this is all latency, so few dependent steps and
 * little code (each warp runs it once: it comes from far). */
static __device__ __forceinline__ void qf_stream_finish(const qf_linear_mma_params &p, const qf_stream_tables &tables,
                                                        const qf_stream_norm &norm, const float *slots, int first_tile,
                                                        int tiles)
{
    const int lane = threadIdx.x % 32, row = lane % 16, stride = p.num_tokens * QF_STREAM_TOKEN_STRIDE;
    const int shift = p.tile_tokens > 4 ? 2 : p.tile_tokens > 2 ? 1 : 0; /* log2 of the pairs of tokens */
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < tiles << shift; i += blockDim.x / 32) {
        const int r = i >> shift, token = (i - (r << shift)) * 2 + lane / 16;
        const bool real = token < p.num_tokens;
        float sum = 0.0f;
        if (real) {
            sum = qf_stream_sum(slots + r * stride + token * QF_STREAM_TOKEN_STRIDE + row, stride, tables.ranges[r]);
        }
        sum = qf_finish(sum, norm.inverse[token % 8], p.bias == nullptr ? nullptr : tables.bias, r * 16 + row,
                        blockIdx.y == 0);
        if (p.norm.residual != nullptr) {
            qf_stream_norm_finish(p, norm, sum, first_tile, tiles, r, token, real);
        } else if (p.act == nullptr) {
            if (real) {
                p.out[((int64_t)blockIdx.y * p.num_tokens + token) * (p.row_tiles * 16) + (first_tile + r) * 16 + row] =
                    sum;
            }
        } else { /* gate in rows 0 .. 7, up in rows 8 .. 15 */
            const float value = qf_silu_mul(sum, __shfl_down_sync(0xffffffffu, sum, 8));
            const float next = __shfl_down_sync(0xffffffffu, value, 1);
            if (real && row < 8 && row % 2 == 0) {
                p.act[((first_tile + r) * p.tile_tokens + token) * 4 + row / 2] = qf_pack_bf16(value, next);
            }
        }
    }
    if (p.act != nullptr && first_tile + tiles == p.row_tiles) { /* act's padding along k */
        int begin = p.row_tiles * p.tile_tokens * 4, end = p.act_tiles * p.tile_tokens * 4;
#pragma unroll 1
        for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
            p.act[i] = 0;
        }
    }
}

/* bits; groups: scale groups in a piece. Grid (row groups, shares of k). */
template <int bits, int groups>
static __global__ void __launch_bounds__(QF_STREAM_MAX_WARPS * 32, 1)
    qf_linear_stream_kernel(const __grid_constant__ qf_linear_mma_params p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int block_pieces = bits / 4, depth = qf_stream_depth(bits, groups);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    qf_grid_launch_dependents();

    const int first_block = p.share_begin[blockIdx.y], share_blocks = p.share_begin[blockIdx.y + 1] - first_block;
    const int first_tile = blockIdx.x * p.group_tiles + min((int)blockIdx.x, p.larger_groups);
    const int tiles = p.group_tiles + ((int)blockIdx.x < p.larger_groups);
    const int columns = share_blocks * block_pieces, units = tiles * columns;
    const int warps = min((int)blockDim.x / 32, units), each = qf_divide_small(units, warps);
    const qf_stream_split split = {columns, each, units - each * warps};
    const int begin = warp < warps ? warp * each + min(warp, split.more) : units;
    const int end = warp < warps ? begin + each + (warp < split.more) : units;
    int row = qf_divide_small(begin, columns), column = begin - row * columns; /* of the piece to multiply next */

    qf_stream_cursor at;
    at.data = p.data + lane * 16;
    at.scales = p.scales + lane % groups * 16 + lane / 4;
    at.index = ((first_tile + row) * p.blocks + first_block) * block_pieces + column;
    at.column = column;
    at.columns = columns;
    at.jump = (p.blocks - share_blocks) * block_pieces;
    qf_stream_piece ring[depth];
#pragma unroll
    for (int i = 0; i < depth; i++) {
        if (begin + i < end) {
            qf_stream_fetch<bits, groups>(ring[i], at, p.group_size);
        }
    }
    /* x in shared memory as it is in global memory. Lanes of ldmatrix whose token is beyond the tile point at zeros. */
    const int x_bytes = share_blocks * 256 * p.tile_tokens;
    if (threadIdx.x == 0) {
        *reinterpret_cast<uint4 *>(shared + x_bytes) = make_uint4(0, 0, 0, 0);
    }
    const bool real = lane % 8 < p.tile_tokens;
    const uint32_t x_start =
        qf_shared_address(shared) + (real ? lane / 8 * 16 * p.tile_tokens + lane % 8 * 16 : x_bytes);
    const uint32_t x_stride = real ? 64 * p.tile_tokens : 0;
    uint32_t x_row = x_start + column * (16 / bits) * x_stride;
    qf_stream_tables tables;
    tables.bias = reinterpret_cast<float *>(shared + p.table_offset);
    tables.ranges = reinterpret_cast<int *>(tables.bias + (p.group_tiles + 1) * 16);
    qf_stream_make_tables(p, tables, split, first_tile, tiles);
    const qf_stream_norm norm = qf_stream_norm_begin(p, shared, first_tile, tiles);
    qf_grid_dependency_wait();
    const uint8_t *x = p.x + (int64_t)first_block * 256 * p.tile_tokens;
#pragma unroll 1
    for (int i = threadIdx.x * 16; i < x_bytes; i += blockDim.x * 16) {
        qf_cp_async_16(shared + i, x + i);
    }
    qf_stream_norm_load(p, norm, first_tile, tiles);
    qf_cp_async_commit();
    qf_cp_async_wait<0>();
    __syncthreads();

    float *slots = reinterpret_cast<float *>(shared + p.slot_offset);
    const int slot_stride = p.num_tokens * QF_STREAM_TOKEN_STRIDE;
    float acc[4] = {0, 0, 0, 0};
    for (int base = begin; base < end; base += depth) {
#pragma unroll
        for (int i = 0; i < depth; i++) {
            int unit = base + i;
            if (unit >= end) {
                break;
            }
            qf_stream_multiply<bits, groups>(acc, ring[i], x_row, x_stride, lane);
            if (unit + depth < end) {
                qf_stream_fetch<bits, groups>(ring[i], at, p.group_size);
            }
            if (++column == columns || unit + 1 == end) {
                qf_stream_put(slots + (row + warp) * slot_stride, acc, p.num_tokens, lane);
                column = 0;
                row++;
                x_row = x_start;
            }
        }
    }
    qf_stream_squares squares; /* late: the ring has the registers until here */
    squares.load(p, warp, lane);
    squares.put(p, norm, lane);
    __syncthreads();
    qf_stream_finish(p, tables, norm, slots, first_tile, tiles);
}

#endif
