/* A step's metadata in, its results out.
 *
 *   begin:    device_meta = staging[n % 2], spread out;  n counts the steps of this backend, on device and host alike
 *             cos_sin[t] = row of position t;  residual[t] = table[id(t)]    (rope_table.cuh, embedding.cuh)
 *   publish:  host results[n % 2] = token ids, log-probabilities, times;  n += 1;  then the host is told
 *
 * Shapes: metadata starts with a qf_cuda_step_header; sizes are multiples of 16 bytes. The host has it copied to the
 * staging buffer by the copy engine, beside the step before. A captured kernel finds it at addresses that do not change,
 * so it is copied once more, from device memory to device memory:
 *
 *   staging:      fixed | items | sliding items | block tables, bitmasks, biases          as much as is in use
 *   device_meta:  fixed | items       room     | sliding items       room | block tables, bitmasks, biases
 *
 * Roofline: latency. Some KB in L2; the longest chain is counter and token id, last token, row: three trips to memory,
 * about 2 us with the launch. 2,048 tokens of 3,584 in bf16 move 44 MB: 10 us at 4.4 TB/s. The way out is a store over
 * PCIe and its fence, about 1 us.
 *
 * Plan of begin: blocks of 256 threads with one of three roles.
 *
 *   | copy: all of them stride over the metadata | rope: an angle a thread | tokens: a 16-byte piece of a row a thread |
 *
 * Only the copy needs to know first whose turn it is: the others read their token id or position of both staging buffers
 * while the counter is on its way, and take the right one. The table may be in pinned host memory.
 *
 * Begin is an ordinary launch: everything of the steps before has ended when it starts. Its copying blocks let the next
 * kernel start only when the metadata is in place, so every later kernel may read metadata before it waits for what it
 * depends on.
 *
 * Publish: each block sends its share and makes sure that the host sees it; the last one tells the host. The samplers
 * do the same in their last block where they are a step's last kernel (step_publish.cuh).
 *
 * Measured: see PERF.md.
 * Tried and lost: begin reading pinned host memory itself: 26 us for one sequence, 155 us for 64, mostly translations of
 * host addresses that the weights had driven out of the TLB, waited for with the device idle. */
#include "embedding.cuh"
#include "rope_table.cuh"
#include "step_publish.cuh"

#define THREADS 256
#define MAX_COPY_BLOCKS 32
#define MAX_PUBLISH_BLOCKS 64

/* --- begin ----------------------------------------------------------------------------------------------------- */

typedef struct begin_work {
    qf_cuda_step_begin_args args;
    const int32_t *token_ids[2], *positions[2]; /* in the staging buffers */
    int32_t fixed, items, sliding;              /* vectors of 16 bytes: args' sizes */
    int32_t num_pieces;                         /* of a row of the table */
    int32_t copy_blocks, rope_blocks, row_blocks; /* row_blocks: for each token */
} begin_work;

static __device__ __forceinline__ void copy_metadata(const begin_work &w)
{
    const qf_cuda_step_io &io = w.args.io;
    const bool odd = __ldcg(&io.state->counter) & 1u;
    const uint4 *from = static_cast<const uint4 *>(odd ? io.staging[1] : io.staging[0]);
    uint4 *to = static_cast<uint4 *>(io.device_meta);
    const int32_t first = blockIdx.x * THREADS + threadIdx.x, stride = w.copy_blocks * THREADS;
    const uint4 header = __ldcg(from);
    const int32_t total = (int32_t)header.x / 16, items_end = (int32_t)header.y / 16;
    const int32_t sliding_end = (int32_t)header.z / 16;
    for (int32_t i = first; i < w.fixed; i += stride) {
        to[i] = __ldcg(from + i);
    }
    const int32_t sliding_shift = w.fixed + w.items - items_end;
    const int32_t rest_shift = w.fixed + w.items + w.sliding - sliding_end;
#pragma unroll 4
    for (int32_t i = w.fixed + first; i < total; i += stride) {
        to[i + (i < items_end ? 0 : i < sliding_end ? sliding_shift : rest_shift)] = __ldcg(from + i);
    }
}

/* This step's word i of an array that is in both staging buffers. */
static __device__ __forceinline__ int32_t staged_word(const qf_cuda_step_state *state, const int32_t *even,
                                                      const int32_t *odd, int32_t i)
{
    const uint32_t counter = __ldcg(&state->counter);
    const int32_t a = __ldcg(even + i), b = __ldcg(odd + i);
    return counter & 1u ? b : a;
}

template <qf_table_form form>
static __global__ void __launch_bounds__(THREADS) qf_step_begin_kernel(const __grid_constant__ begin_work w)
{
    const qf_cuda_step_begin_args &a = w.args;
    int32_t block = blockIdx.x;
    if (block < w.copy_blocks) {
        qf_grid_dependency_wait();
        if (block == 0 && threadIdx.x == 0) {
            a.io.state->begin_ns = qf_step_clock();
        }
        copy_metadata(w);
        __threadfence();
        __syncthreads(); /* a block's first thread to say so speaks for all */
        qf_grid_launch_dependents();
        return;
    }
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    block -= w.copy_blocks;
    if (block < w.rope_blocks) {
        const int32_t half = a.head_dim / 2;
        const int64_t index = (int64_t)block * THREADS + threadIdx.x;
        const int32_t token = (int32_t)(index / half), j = (int32_t)(index - (int64_t)token * half);
        if (token < a.num_tokens) {
            const float inv_freq = __ldg(a.inv_freq + j);
            const int32_t position = staged_word(a.io.state, w.positions[0], w.positions[1], token);
            qf_rope_table_entry(position, inv_freq, a.factor, a.cos_sin + (int64_t)token * a.head_dim, j, half);
        }
        return;
    }
    block -= w.rope_blocks;
    const int32_t token = block / w.row_blocks, piece = (block - token * w.row_blocks) * THREADS + (int32_t)threadIdx.x;
    if (piece < w.num_pieces) {
        int32_t id = staged_word(a.io.state, w.token_ids[0], w.token_ids[1], token);
        if (id < 0) {
            id = __ldcg(a.embedding.last_token - 1 - id);
        }
        id = max(id, 0) - a.embedding.first_id;
        float *out = a.embedding.out + (int64_t)token * a.embedding.hidden_size;
        if (a.embedding.num_ids > 0 && (id < 0 || id >= a.embedding.num_ids)) {
            qf_clear_piece<form>(a.embedding, piece, out);
        } else {
            qf_copy_piece<form>(a.embedding, id, piece, out);
        }
    }
}

/* --- publish --------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(THREADS) qf_publish_kernel(const __grid_constant__ qf_cuda_step_io io)
{
    qf_grid_launch_dependents();
    const qf_cuda_step_header header = qf_step_load_header(io);
    qf_grid_dependency_wait();
    qf_step_send(io, header, (int32_t)(blockIdx.x * THREADS + threadIdx.x), (int32_t)gridDim.x * THREADS);
    if (qf_step_is_last(&io.state->arrivals, gridDim.x) && threadIdx.x == 0) {
        qf_step_finish(io, header);
    }
}

/* --- launchers ------------------------------------------------------------------------------------------------- */

typedef void (*begin_kernel_fn)(begin_work);

static const begin_kernel_fn begin_kernels[] = {
    qf_step_begin_kernel<QF_ROWS_F32>,     qf_step_begin_kernel<QF_ROWS_BF16>,     qf_step_begin_kernel<QF_FRAGMENTS>,
    qf_step_begin_kernel<QF_ELEMENTS_F32>, qf_step_begin_kernel<QF_ELEMENTS_BF16>,
};

static int32_t blocks_for(int64_t threads, int32_t most)
{
    int64_t blocks = (threads + THREADS - 1) / THREADS;
    return blocks < 1 ? 1 : blocks > most ? most : (int32_t)blocks;
}

/* Where an array of the fixed part stands in the two staging buffers. */
static qf_status find_staged(const qf_cuda_step_begin_args *a, const char *name, const int32_t *words,
                             const int32_t **out, qf_error *err)
{
    const uintptr_t offset = (uintptr_t)words - (uintptr_t)a->io.device_meta;
    if (words == NULL || offset < sizeof(qf_cuda_step_header) || offset > a->fixed_bytes ||
        a->fixed_bytes - offset < (size_t)a->num_tokens * sizeof(int32_t)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "begin: %s of %d tokens at %p are not in the fixed %zu bytes of metadata at %p", name,
                       a->num_tokens, (const void *)words, a->fixed_bytes, a->io.device_meta);
    }
    for (int i = 0; i < 2; i++) {
        out[i] = (const int32_t *)((const char *)a->io.staging[i] + offset);
    }
    return QF_OK;
}

static qf_status check_begin(const qf_cuda_step_begin_args *a, qf_error *err)
{
    const uintptr_t places = (uintptr_t)a->io.staging[0] | (uintptr_t)a->io.staging[1] | (uintptr_t)a->io.device_meta;
    if (a->io.staging[0] == NULL || a->io.staging[1] == NULL || a->io.device_meta == NULL || a->io.state == NULL ||
        a->inv_freq == NULL || a->cos_sin == NULL || places % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "begin: staging, device_meta, state, inv_freq or cos_sin is null or not aligned to 16 bytes");
    }
    if (a->fixed_bytes < sizeof(qf_cuda_step_header) || a->fixed_bytes > INT32_MAX || a->items_bytes > INT32_MAX ||
        a->sliding_bytes > INT32_MAX || (a->fixed_bytes | a->items_bytes | a->sliding_bytes) % 16 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "begin: %zu bytes, %zu and %zu of items: must be multiples of 16, the first at least %zu",
                       a->fixed_bytes, a->items_bytes, a->sliding_bytes, sizeof(qf_cuda_step_header));
    }
    if (a->num_tokens < 1 || a->head_dim < 2 || a->head_dim % 2 != 0 ||
        (a->embedding.table != NULL && a->embedding.num_tokens != a->num_tokens)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "begin: %d tokens, %d to embed, head_dim %d (must be positive, the two the same, head_dim even)",
                       a->num_tokens, a->embedding.num_tokens, a->head_dim);
    }
    return QF_OK;
}

extern "C" qf_status qf_cuda_step_begin(const qf_cuda_step_begin_args *args, cudaStream_t stream, qf_error *err)
{
    QF_TRY(check_begin(args, err));
    begin_work work = {};
    work.args = *args;
    work.fixed = (int32_t)(args->fixed_bytes / 16);
    work.items = (int32_t)(args->items_bytes / 16);
    work.sliding = (int32_t)(args->sliding_bytes / 16);
    QF_TRY(find_staged(args, "positions", args->positions, work.positions, err));
    /* As many as the fixed part and all items would keep busy once: tables and masks take what items leave. */
    work.copy_blocks = blocks_for((int64_t)work.fixed + work.items + work.sliding, MAX_COPY_BLOCKS);
    work.rope_blocks = blocks_for((int64_t)args->num_tokens * (args->head_dim / 2), INT32_MAX);
    work.row_blocks = 1;
    qf_table_form form = QF_ROWS_F32;
    int64_t token_blocks = 0;
    if (args->embedding.table != NULL) {
        QF_TRY(qf_embedding_check(&args->embedding, err));
        QF_TRY(find_staged(args, "token_ids", args->embedding.token_ids, work.token_ids, err));
        form = qf_embedding_form(&args->embedding, &work.num_pieces);
        work.row_blocks = blocks_for(work.num_pieces, INT32_MAX);
        token_blocks = (int64_t)args->num_tokens * work.row_blocks;
    }
    const int64_t blocks = work.copy_blocks + work.rope_blocks + token_blocks;
    return qf_launch("begin", begin_kernels[form], dim3((unsigned)blocks), dim3(THREADS), 0, false, stream, err, work);
}

extern "C" qf_status qf_cuda_step_publish(const qf_cuda_step_io *io, int32_t max_results, int32_t max_logprobs,
                                          const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    if (max_results < 0 || max_logprobs < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "publish: %d results and %d logprobs: must be at least 0",
                       max_results, max_logprobs);
    }
    const int32_t blocks = blocks_for((int64_t)max_results + 3 * (int64_t)max_logprobs, MAX_PUBLISH_BLOCKS);
    return qf_launch("publish", qf_publish_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, device->dependent_launch,
                     stream, err, *io);
}
