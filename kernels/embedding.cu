/* Embedding: out[t] = table[id(t)], in float32.
 *
 *   id(t) = token_ids[t], or, where that is -1 - slot, max(last_token[slot], 0): the token that the sampler has just
 *   written, which the host does not know yet.
 *
 * Shapes and layouts: token_ids (num_tokens); out (num_tokens, hidden_size) float32; the table has one of three forms:
 *    32: (vocab_size, hidden_size) float32 rows        16: the same in bf16
 *   -16: the fragments of a tied 16-bit head (qf_kernels.h), k_padded columns. Row r of the table is half of the
 *        words of row tile r / 16: lanes 4 (r % 8) .. + 3 of each k16 step hold rows r % 8 and r % 8 + 8:
 *
 *          16 bytes of lane 4 g + t:  | g: k 2t, 2t+1 | g+8: k 2t, 2t+1 | g: k 2t+8, 2t+9 | g+8: k 2t+8, 2t+9 |
 *
 *        so one 16-byte load a lane brings 4 values of the row, and 4 lanes read 64 contiguous bytes.
 * The table is in device memory, or in pinned host memory: either way it is read by 16-byte loads of neighbouring
 * threads, as wide as the bus takes them.
 *
 * Roofline: memory. 2 to 4 bytes read and 4 written an element: 2,048 tokens of 3,584 from bf16 are 44 MB, 10 us at
 * 4.4 TB/s. One token is three dependent reads (id, last token, row): latency, 2 us; over the host's bus 2 us more.
 *
 * Plan: a CTA a token, as many threads as the row has 16-byte pieces (32 .. 1024), each copying every blockDim-th one.
 * Rows whose pieces would not be aligned (hidden_size odd or the like) are copied one element a thread.
 *
 * It is launched as an ordinary kernel, never as a dependent one: it is a step's first, before it come copies and
 * other steps' graphs, and then everything of the steps before has ended when it starts. It lets its successor start
 * early.
 *
 * Measured: see PERF.md. */
#include "common/launch.cuh"
#include "common/ptx.cuh"

#define MAX_THREADS 1024

/* The table as 16-byte pieces, or element by element. */
enum table_form { ROWS_F32, ROWS_BF16, FRAGMENTS, ELEMENTS_F32, ELEMENTS_BF16 };

static __device__ __forceinline__ int32_t resolve_token(const qf_cuda_embedding_args &a, int32_t t)
{
    int32_t id = a.token_ids[t];
    if (id < 0) {
        id = a.last_token[-1 - id];
    }
    return id < 0 ? 0 : id;
}

/* Piece i of a row of bf16: 8 elements. */
static __device__ __forceinline__ void widen_piece(uint4 piece, float *out)
{
    reinterpret_cast<float4 *>(out)[0] =
        make_float4(qf_bf16_low(piece.x), qf_bf16_high(piece.x), qf_bf16_low(piece.y), qf_bf16_high(piece.y));
    reinterpret_cast<float4 *>(out)[1] =
        make_float4(qf_bf16_low(piece.z), qf_bf16_high(piece.z), qf_bf16_low(piece.w), qf_bf16_high(piece.w));
}

/* Piece i of the row's fragments: elements k, k + 1, k + 8, k + 9. */
static __device__ __forceinline__ void copy_fragment(const qf_cuda_embedding_args &a, int32_t id, int32_t i, float *out)
{
    const int32_t k = i / 4 * 16 + i % 4 * 2; /* step i / 4 of the row, 8 to a block of 128 k */
    if (k >= a.hidden_size) {
        return;
    }
    const int64_t step = (int64_t)(id / 16) * (a.k_padded / 16) + i / 4;
    const uint4 piece = __ldg(static_cast<const uint4 *>(a.table) + step * 32 + id % 8 * 4 + i % 4);
    const bool upper = id % 16 >= 8;
    const uint32_t low = upper ? piece.y : piece.x, high = upper ? piece.w : piece.z;
    *reinterpret_cast<float2 *>(out + k) = make_float2(qf_bf16_low(low), qf_bf16_high(low));
    if (k + 8 < a.hidden_size) {
        *reinterpret_cast<float2 *>(out + k + 8) = make_float2(qf_bf16_low(high), qf_bf16_high(high));
    }
}

template <table_form form>
static __global__ void __launch_bounds__(MAX_THREADS) embedding_kernel(qf_cuda_embedding_args a, int32_t num_pieces)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int32_t id = resolve_token(a, blockIdx.x);
    const int64_t row = (int64_t)id * a.hidden_size;
    float *out = a.out + (int64_t)blockIdx.x * a.hidden_size;
#pragma unroll 2
    for (int32_t i = threadIdx.x; i < num_pieces; i += blockDim.x) {
        if (form == ROWS_F32) {
            const float4 *pieces = reinterpret_cast<const float4 *>(static_cast<const float *>(a.table) + row);
            reinterpret_cast<float4 *>(out)[i] = __ldg(pieces + i);
        } else if (form == ROWS_BF16) {
            const uint4 *pieces = reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(a.table) + row);
            widen_piece(__ldg(pieces + i), out + 8 * i);
        } else if (form == FRAGMENTS) {
            copy_fragment(a, id, i, out);
        } else if (form == ELEMENTS_F32) {
            out[i] = __ldg(static_cast<const float *>(a.table) + row + i);
        } else {
            out[i] = qf_bf16_low(__ldg(static_cast<const uint16_t *>(a.table) + row + i));
        }
    }
}

/* --- dispatch and launcher ------------------------------------------------------------------------------------ */

typedef void (*embedding_kernel_fn)(qf_cuda_embedding_args, int32_t);

static const embedding_kernel_fn kernels[] = {
    embedding_kernel<ROWS_F32>,     embedding_kernel<ROWS_BF16>,     embedding_kernel<FRAGMENTS>,
    embedding_kernel<ELEMENTS_F32>, embedding_kernel<ELEMENTS_BF16>,
};

static qf_status check_arguments(const qf_cuda_embedding_args *a, qf_error *err)
{
    if (a->table == NULL || a->token_ids == NULL || a->last_token == NULL || a->out == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "embedding: table, token_ids, last_token or out is null");
    }
    if (a->num_tokens < 1 || a->hidden_size < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "embedding: %d tokens of %d; expected at least 1", a->num_tokens,
                       a->hidden_size);
    }
    if (a->table_bits != 32 && a->table_bits != 16 && a->table_bits != -16) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "embedding: table_bits %d; expected 32, 16 or -16",
                       a->table_bits);
    }
    if (a->table_bits == -16 &&
        (a->hidden_size % 2 != 0 || a->k_padded % 128 != 0 || a->k_padded < a->hidden_size)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "embedding: fragments of k_padded %d for hidden_size %d; expected a multiple of 128 that is not "
                       "less, and an even hidden_size",
                       a->k_padded, a->hidden_size);
    }
    if ((uintptr_t)a->table % 16 != 0 || (uintptr_t)a->out % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "embedding: table is at %p, out at %p; expected multiples of 16",
                       a->table, (void *)a->out);
    }
    return QF_OK;
}

extern "C" qf_status qf_cuda_embedding(const qf_cuda_embedding_args *args, const qf_cuda_device *device,
                                       cudaStream_t stream, qf_error *err)
{
    (void)device; /* one path serves all */
    QF_TRY(check_arguments(args, err));
    const int32_t hidden_size = args->hidden_size;
    table_form form = FRAGMENTS;
    int32_t num_pieces = args->k_padded / 4;
    if (args->table_bits == 32) {
        form = hidden_size % 4 == 0 ? ROWS_F32 : ELEMENTS_F32;
        num_pieces = form == ROWS_F32 ? hidden_size / 4 : hidden_size;
    } else if (args->table_bits == 16) {
        form = hidden_size % 8 == 0 ? ROWS_BF16 : ELEMENTS_BF16;
        num_pieces = form == ROWS_BF16 ? hidden_size / 8 : hidden_size;
    }
    const int32_t threads = num_pieces < MAX_THREADS ? (num_pieces + 31) / 32 * 32 : MAX_THREADS;
    return qf_launch("embedding", kernels[form], dim3((unsigned)args->num_tokens), dim3((unsigned)threads), 0, false,
                     stream, err, *args, num_pieces);
}
