/* One decode step of 1 to 8 sequences in one launch: residual in, logits out.
 *
 *   for each layer:  x = norm(h);  q, k, v = Wqkv x + b;  rope;  a = attention;  h += Wo a
 *                    x = norm(h);  g, u = Wgu x;  h += Wd (silu(g) u)
 *   logits = Whead norm(h)
 *
 * Bound: memory. Weights are read once: W4 of group 128 moves 0.53 bytes a weight, 4.48 GB for Qwen2.5-7B with a 16-bit
 * head (1.02 ms at 4.4 TB/s), 0.46 GB for 0.5B (0.10 ms); the latter is bound by its 121 dependencies instead.
 *
 * Plan. One CTA on each SM, all resident (cooperative launch). In each, one producer warp streams this CTA's share of all
 * weights, in program order, through a ring that fills most of shared memory (decode_ring.cuh), and never waits for
 * activations; the other warps consume (decode_linear.cuh, decode_attention.cuh). CTAs hand each other results in words
 * that carry their own flags (decode_exchange.cuh), so a dependency costs one store, one trip through L2, one load.
 *
 *   phase      parts                            reads                   writes
 *   qkv        row tiles x k, evenly cut        residual or down's      partial sums, bias
 *   attention  (sequence, kv head, positions)   qkv's sums, K, V        bf16, or (m, l, O), then merged
 *   o          as qkv                           attention's bf16        partial sums, + residual
 *   gate_up    row tiles                        o's sums                bf16 of silu(gate) up
 *   down       k ranges, row tiles x k          its range of act        partial sums, + residual
 *   head       row tiles                        down's sums             logits
 *
 * The residual stream h lives nowhere: it travels in the first piece of o's and down's sums. The CTA that makes that
 * piece has seen h of those rows when it gathered all of h to norm it, and has kept them.
 *
 *   shared memory:  barriers, partition | layer table | norm sums | slot masks | kept rows | red | x, attention | ring
 *
 * Measured: see PERF.md.
 * Tried and lost: nothing yet; before this, a chain of five kernels a layer with dependent launch (2.9 us a kernel). */
#include "decode_attention.cuh"
#include "decode_setup.cuh"
#include "decode_step.cuh"

/* ---- the kernel ------------------------------------------------------------------------------------------------ */

/* r = 1 / root mean square of each token: warp w's token is warps - 1 - w, so that the warps with the fewest units do
 * it. Read behind the next barrier. */
template <int tokens> __device__ __forceinline__ void qf_decode_make_r(const qf_decode_params &p, int kind)
{
    const float *sums = qf_norm_sums<tokens>(p, kind);
    const int lane = threadIdx.x & 31, token = QF_DECODE_WARPS - 1 - (int)(threadIdx.x >> 5), blocks = p.hidden_size / 128;
    if (token >= tokens || token >= p.num_seqs) {
        return;
    }
    float sum = 0.0f;
    for (int i = lane; i < blocks; i += 32) {
        sum += sums[token * blocks + i];
    }
#pragma unroll
    for (int mask = 16; mask != 0; mask >>= 1) {
        sum += __shfl_xor_sync(~0u, sum, mask);
    }
    if (lane == 0) {
        qf_norm_factors<tokens>(p, kind)[token] = rsqrtf(sum / (float)p.hidden_size + p.eps);
    }
}

/* The consumer warps. Barriers: each phase in which this CTA has a part has one when x is complete and those of
 * qf_decode_linear_part; attention has its own. All depend on the CTA and the phase alone, so every warp meets them
 * all. The last barrier of a part comes when no warp reads x any more, so the next phase may write x at once; what the
 * adding threads still read behind it (r, kept rows) is not written again before the words that they then store have
 * come back as complete results of later phases. */
template <int tokens, int head_dim>
static __device__ __forceinline__ void qf_decode_consume_all(const qf_decode_params &p)
{
    constexpr int threads = QF_DECODE_WARPS * 32;
    qf_decode_ring ring = {0, 0};
    const uint32_t first_epoch = qf_fixed().region_epoch;
    int half = 0;
    for (int step = 0; step <= 4 * p.num_layers; step++) {
        const int layer = step >> 2, kind = layer == p.num_layers ? (int)QF_DECODE_HEAD : step & 3;
        const uint32_t epoch = first_epoch + layer;
        const bool part = qf_fixed().phase[kind].blocks > 0, normed = kind != QF_DECODE_O && kind != QF_DECODE_DOWN;
        qf_decode_stamp(p, step, QF_STAMP_START);
        if (kind == QF_DECODE_O) {
            qf_decode_attention<head_dim>(p, layer, epoch, ring);
        }
        qf_decode_walk walk = {};
        if (part) {
            walk = qf_decode_begin<tokens>(p, kind, layer, ring);
        }
        if (normed) {
            qf_gather_residual<tokens, threads>(p, kind, layer, epoch);
        } else if (part) {
            qf_gather_words<tokens, threads>(p, kind, epoch);
        }
        qf_decode_stamp(p, step, QF_STAMP_GATHERED);
        if (part) {
            qf_consumer_barrier();
            qf_decode_stamp(p, step, QF_STAMP_X);
            if (normed) {
                qf_decode_make_r<tokens>(p, kind);
            }
            qf_decode_linear_part<tokens>(p, kind, step, epoch, ring, half, walk);
            qf_decode_stamp(p, step, QF_STAMP_END);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) { /* everybody has read these: see decode_exchange.cuh */
        p.header[QF_DECODE_EPOCH] = qf_fixed().epoch + p.num_layers;
        p.header[QF_DECODE_REGION_EPOCH + p.num_seqs] = first_epoch - 2 + p.num_layers;
    }
}

template <int tokens, int head_dim>
__global__ void __launch_bounds__((QF_DECODE_WARPS + 1) * 32, 1) qf_decode_kernel(const __grid_constant__ qf_decode_params p)
{
    qf_decode_set_up(p, 2 * qf_decode_half_tiles(tokens) * qf_decode_tile_floats(tokens));
    if (threadIdx.x < QF_DECODE_WARPS * 32) {
        qf_decode_consume_all<tokens, head_dim>(p);
    } else {
        qf_decode_produce<head_dim>(p);
    }
}

/* ---- dispatch -------------------------------------------------------------------------------------------------- */

typedef void (*qf_decode_kernel_fn)(const qf_decode_params);

template <int head_dim> static qf_decode_kernel_fn qf_decode_kernel_for(int tokens)
{
    return tokens == 1   ? qf_decode_kernel<1, head_dim>
           : tokens == 2 ? qf_decode_kernel<2, head_dim>
                         : qf_decode_kernel<4, head_dim>;
}

static qf_decode_kernel_fn qf_decode_kernel_of(int tokens, int head_dim)
{
    return head_dim == 64 ? qf_decode_kernel_for<64>(tokens) : qf_decode_kernel_for<128>(tokens);
}

/* ---- host ------------------------------------------------------------------------------------------------------ */

static int qf_decode_grid(const qf_decode_params *p) { return p->linear[QF_DECODE_HEAD].parts; }

extern "C" bool qf_cuda_decode_supported(const qf_cuda_decode_args *args, const qf_cuda_device *device)
{
    qf_decode_params p;
    return args != nullptr && device != nullptr && device->compute_capability >= 80 && qf_decode_shapes_ok(args) &&
           qf_decode_plan(args, device, args->num_seqs, 0, &p);
}

/* Header, attention's partials, then an exchange buffer for each num_seqs. */
#define QF_DECODE_HEADER_BYTES 256

static size_t qf_decode_exchange_offset(const qf_cuda_decode_args *args, const qf_cuda_device *device, int num_seqs,
                                        int splits)
{
    qf_decode_params p;
    size_t bytes = QF_DECODE_HEADER_BYTES;
    for (int i = 1; i < num_seqs; i++) {
        qf_decode_plan(args, device, i, splits, &p);
        bytes += (size_t)p.ll.words * 8;
    }
    qf_decode_plan(args, device, 1, splits, &p);
    return bytes + (size_t)p.partials_half * 16;
}

extern "C" size_t qf_cuda_decode_workspace_bytes(const qf_cuda_decode_args *args, const qf_cuda_device *device,
                                                 int32_t max_model_len)
{
    (void)max_model_len; /* a sequence's splits are as many as there are CTAs, whatever its length */
    size_t most = 0;
    for (int splits = 0; splits <= 4; splits++) {
        size_t bytes = qf_decode_exchange_offset(args, device, QF_DECODE_MAX_SEQS + 1, splits);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static qf_status qf_decode_pointers(const qf_cuda_decode_args *args, const qf_cuda_device *device,
                                    const qf_cuda_decode_options *options, qf_decode_params *p, qf_error *err)
{
    const struct {
        const void *pointer;
        const char *name;
    } needed[] = {{args->residual, "residual"},   {args->logits, "logits"},
                  {args->cos_sin, "cos_sin"},     {args->slot_mapping, "slot_mapping"},
                  {args->seq_lens, "seq_lens"},   {args->block_tables, "block_tables"},
                  {args->workspace, "workspace"}, {args->block_table_start, "block_table_start"}};
    for (const auto &n : needed) {
        if (n.pointer == nullptr) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "decode: %s is NULL", n.name);
        }
    }
    if (((uintptr_t)args->residual | (uintptr_t)args->cos_sin) % 16 != 0 || (uintptr_t)args->workspace % 256 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "decode: residual %p and cos_sin %p must be aligned to 16 bytes, workspace %p to 256",
                       (void *)args->residual, (const void *)args->cos_sin, args->workspace);
    }
    p->layers = args->layers;
    p->head_data = (const char *)args->head.data;
    p->head_scales = (const char *)args->head.scales;
    p->head_multiplier = args->head.scale_multiplier;
    p->final_norm = args->final_norm;
    p->residual = args->residual;
    p->logits = args->logits;
    p->cos_sin = args->cos_sin;
    p->slot_mapping = args->slot_mapping;
    p->seq_lens = args->seq_lens;
    p->block_tables = args->block_tables;
    p->block_table_start = args->block_table_start;
    p->header = (uint32_t *)args->workspace;
    p->partials = (uint2 *)((char *)args->workspace + QF_DECODE_HEADER_BYTES);
    p->exchange = (uint32_t *)((char *)args->workspace +
                               qf_decode_exchange_offset(args, device, args->num_seqs, options->splits));
    p->bulk = device->hopper;
    p->stamps = options->stamps;
    p->backoff_ns = (uint32_t)options->backoff_ns;
    return QF_OK;
}

qf_status qf_cuda_decode_with(const qf_cuda_decode_args *args, const qf_cuda_decode_options *options,
                              const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    if (args == nullptr || device == nullptr || args->num_seqs < 1 || args->num_seqs > QF_DECODE_MAX_SEQS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "decode: num_seqs is %d, must be 1 to %d",
                       args ? args->num_seqs : 0, QF_DECODE_MAX_SEQS);
    }
    qf_decode_params p;
    if (!qf_decode_shapes_ok(args) || !qf_decode_plan(args, device, args->num_seqs, options->splits, &p)) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "decode: no plan for hidden size %d, %d heads of %d, %d sequences in %d bytes of shared memory",
                       args->hidden_size, args->num_heads, args->head_dim, args->num_seqs, device->max_shared_bytes);
    }
    QF_TRY(qf_decode_pointers(args, device, options, &p, err));
    if (options->max_stages >= 2 && options->max_stages < p.map.stages) {
        p.map.total -= (p.map.stages - options->max_stages) * p.map.stage_bytes;
        p.map.stages = options->max_stages;
    }
    qf_decode_kernel_fn kernel = qf_decode_kernel_of(qf_cuda_tile_tokens(args->num_seqs), args->head_dim);
    QF_TRY(qf_allow_shared("decode", kernel, (size_t)p.map.total, err));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)qf_decode_grid(&p));
    config.blockDim = dim3((QF_DECODE_WARPS + 1) * 32);
    config.dynamicSmemBytes = (size_t)p.map.total;
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeCooperative; /* all CTAs are resident, or the launch fails */
    attribute[0].val.cooperative = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
    QF_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, p));
    return QF_OK;
}

extern "C" qf_status qf_cuda_decode(const qf_cuda_decode_args *args, const qf_cuda_device *device, cudaStream_t stream,
                                    qf_error *err)
{
    const qf_cuda_decode_options options = {0, 0, 0, nullptr};
    return qf_cuda_decode_with(args, &options, device, stream, err);
}
