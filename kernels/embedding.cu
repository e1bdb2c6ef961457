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
#include "embedding.cuh"

#define MAX_THREADS 1024

static __device__ __forceinline__ int32_t resolve_token(const qf_cuda_embedding_args &a, int32_t t)
{
    int32_t id = a.token_ids[t];
    if (id < 0) {
        id = a.last_token[-1 - id];
    }
    return id < 0 ? 0 : id;
}

template <qf_table_form form>
static __global__ void __launch_bounds__(MAX_THREADS) embedding_kernel(qf_cuda_embedding_args a, int32_t num_pieces)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int32_t id = resolve_token(a, blockIdx.x);
    float *out = a.out + (int64_t)blockIdx.x * a.hidden_size;
#pragma unroll 2
    for (int32_t i = threadIdx.x; i < num_pieces; i += blockDim.x) {
        qf_copy_piece<form>(a, id, i, out);
    }
}

/* --- dispatch and launcher ------------------------------------------------------------------------------------ */

typedef void (*embedding_kernel_fn)(qf_cuda_embedding_args, int32_t);

static const embedding_kernel_fn kernels[] = {
    embedding_kernel<QF_ROWS_F32>,     embedding_kernel<QF_ROWS_BF16>,     embedding_kernel<QF_FRAGMENTS>,
    embedding_kernel<QF_ELEMENTS_F32>, embedding_kernel<QF_ELEMENTS_BF16>,
};

extern "C" qf_status qf_cuda_embedding(const qf_cuda_embedding_args *args, const qf_cuda_device *device,
                                       cudaStream_t stream, qf_error *err)
{
    (void)device; /* one path serves all */
    QF_TRY(qf_embedding_check(args, err));
    int32_t num_pieces;
    const qf_table_form form = qf_embedding_form(args, &num_pieces);
    const int32_t threads = num_pieces < MAX_THREADS ? (num_pieces + 31) / 32 * 32 : MAX_THREADS;
    return qf_launch("embedding", kernels[form], dim3((unsigned)args->num_tokens), dim3((unsigned)threads), 0, false,
                     stream, err, *args, num_pieces);
}
