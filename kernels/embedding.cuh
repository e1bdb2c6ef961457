/* Embedding: out[t] = table[id(t)], in float32: a part of the step's first kernel (step_io.cu).
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
 * 4.4 TB/s. One token is three dependent reads (id, last token, row): latency, 2 us; over the host's bus 2 us more. */
#ifndef QF_EMBEDDING_CUH
#define QF_EMBEDDING_CUH

#include "common/launch.cuh"
#include "common/ptx.cuh"

/* The table as 16-byte pieces, or element by element. */
enum qf_table_form { QF_ROWS_F32, QF_ROWS_BF16, QF_FRAGMENTS, QF_ELEMENTS_F32, QF_ELEMENTS_BF16 };

/* Piece i of a row of bf16: 8 elements. */
static __device__ __forceinline__ void qf_widen_piece(uint4 piece, float *out)
{
    reinterpret_cast<float4 *>(out)[0] =
        make_float4(qf_bf16_low(piece.x), qf_bf16_high(piece.x), qf_bf16_low(piece.y), qf_bf16_high(piece.y));
    reinterpret_cast<float4 *>(out)[1] =
        make_float4(qf_bf16_low(piece.z), qf_bf16_high(piece.z), qf_bf16_low(piece.w), qf_bf16_high(piece.w));
}

/* Piece i of the row's fragments: elements k, k + 1, k + 8, k + 9. */
static __device__ __forceinline__ void qf_copy_fragment(const qf_cuda_embedding_args &a, int32_t id, int32_t i,
                                                        float *out)
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

/* Piece i of row `id` of the table, to the same place of `out`. */
template <qf_table_form form>
static __device__ __forceinline__ void qf_copy_piece(const qf_cuda_embedding_args &a, int32_t id, int32_t i, float *out)
{
    const int64_t row = (int64_t)id * a.hidden_size;
    if (form == QF_ROWS_F32) {
        const float4 *pieces = reinterpret_cast<const float4 *>(static_cast<const float *>(a.table) + row);
        reinterpret_cast<float4 *>(out)[i] = __ldg(pieces + i);
    } else if (form == QF_ROWS_BF16) {
        const uint4 *pieces = reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(a.table) + row);
        qf_widen_piece(__ldg(pieces + i), out + 8 * i);
    } else if (form == QF_FRAGMENTS) {
        qf_copy_fragment(a, id, i, out);
    } else if (form == QF_ELEMENTS_F32) {
        out[i] = __ldg(static_cast<const float *>(a.table) + row + i);
    } else {
        out[i] = qf_bf16_low(__ldg(static_cast<const uint16_t *>(a.table) + row + i));
    }
}

/* Zeros in the place of piece i. */
template <qf_table_form form>
static __device__ __forceinline__ void qf_clear_piece(const qf_cuda_embedding_args &a, int32_t i, float *out)
{
    if (form == QF_FRAGMENTS) {
        const int32_t k = i / 4 * 16 + i % 4 * 2;
        for (int32_t j = k; j < a.hidden_size && j <= k + 8; j += 8) {
            *reinterpret_cast<float2 *>(out + j) = make_float2(0.0f, 0.0f);
        }
        return;
    }
    constexpr int32_t width = form == QF_ROWS_F32 ? 4 : form == QF_ROWS_BF16 ? 8 : 1;
#pragma unroll
    for (int32_t j = 0; j < width; j++) {
        out[i * width + j] = 0.0f;
    }
}

/* Host: how a table is read, and how many pieces a row has. */
static inline qf_table_form qf_embedding_form(const qf_cuda_embedding_args *a, int32_t *num_pieces)
{
    const int32_t hidden_size = a->hidden_size;
    qf_table_form form = QF_FRAGMENTS;
    *num_pieces = a->k_padded / 4;
    if (a->table_bits == 32) {
        form = hidden_size % 4 == 0 ? QF_ROWS_F32 : QF_ELEMENTS_F32;
        *num_pieces = form == QF_ROWS_F32 ? hidden_size / 4 : hidden_size;
    } else if (a->table_bits == 16) {
        form = hidden_size % 8 == 0 ? QF_ROWS_BF16 : QF_ELEMENTS_BF16;
        *num_pieces = form == QF_ROWS_BF16 ? hidden_size / 8 : hidden_size;
    }
    return form;
}

static inline qf_status qf_embedding_check(const qf_cuda_embedding_args *a, qf_error *err)
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

#endif
