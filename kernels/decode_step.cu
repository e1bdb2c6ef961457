/* One decode step of one sequence in one launch: residual in, logits out.
 *
 *   for each layer:  x = norm(h);  q, k, v = Wqkv x + b;  rope;  a = attention;  h += Wo a
 *                    x = norm(h);  g, u = Wgu x;  h += Wd (silu(g) u)
 *   logits = Whead norm(h)
 *
 * Layers' weights are of 4 bits and groups of 128, the head's of 4, 8 or 16; formats: qf_kernels.h.
 *
 * Bound: memory. Weights are read once: 0.53 bytes a weight, 4.48 GB for Qwen2.5-7B with a 16-bit head (1.02 ms at
 * 4.4 TB/s), 0.46 GB for 0.5B (0.10 ms); the latter is bound by its 121 dependencies instead.
 *
 * Plan. One CTA on each SM, all resident (cooperative launch). In each, one producer warp streams this CTA's share of
 * all weights, in program order, through a ring that fills most of shared memory (decode_ring.cuh), and never waits for
 * activations; eight warps consume (decode_linear.cuh, decode_attention.cuh). CTAs hand each other results in words
 * that carry their own flags (decode_exchange.cuh), so a dependency costs one store, one trip through L2, one load.
 *
 *   phase      parts                            reads                   writes
 *   qkv        row tiles x k, evenly cut        residual or down's      partial sums, bias
 *   attention  (kv head, positions)             qkv's sums, K, V        bf16, or (m, l, O), then merged
 *   o          as qkv                           attention's bf16        partial sums, + residual
 *   gate_up    row tiles                        o's sums                bf16 of silu(gate) up
 *   down       k ranges, row tiles x k          its range of act        partial sums, + residual
 *   head       row tiles                        down's sums             logits
 *
 * The residual stream h lives nowhere: it travels in the first piece of o's and down's sums. The CTA that makes that
 * piece has seen h of those rows when it gathered all of h to norm it, and has kept them.
 *
 * With several ranks each has its heads, its intermediate features and its rows of the head. Its sums of o and down go to
 * all ranks, which add them up in the same order (decode_exchange.cuh): two trips over the links a layer instead of through
 * L2, and no kernel for it. Only rank 0's first piece has h. The kernel for one GPU is compiled apart.
 *
 * A layer is some 2,000 instructions that every warp runs through once or a few times: what does not fit the
 * instruction caches is fetched from L2 each time, at more than the work itself costs. So there is one code for all
 * four linears of a layer, loops are rolled, and what is rare is not inlined.
 *
 *   shared memory:  barriers, partition | layer table | cos, sin | squares | slot masks | kept rows | x, attention |
 *                   red | ring
 *
 * Measured (H200, context 256, 16-bit head): 0.5B 414 us a step, with an 8-bit head 391 us; 7B 1,594 us, with 32,768
 * positions 2,124 us; 72B 11,070 us. On two, 7B 1,047 us, 72B 6,540 us: between two linears the mean CTA spends as long as
 * on one GPU, so the links do not show. Of a layer of 0.5B, units take 0.5, 0.5, 1.2 and 0.9 us, adding up and storing 0.3 each,
 * attention's tiles 1.1 and what follows 0.6; the rest is five exchanges. In gate_up of 7B (15.5 us) the ring is never
 * empty; of 402 clocks a unit a warp, as sampled, 115 are issue, 111 fixed waits, 74 branches, 35 the other warp's
 * turn.
 * Tried and lost (us for 0.5B, 7B): clusters that share the gather by st.async (of 2: 463, 1,722; of 4: 424, 1,730; of
 * 8: 418, 1,668); a leaner unit loop, two units a turn and no branches (422, 1,597); attention two tiles at a time,
 * with other small changes (7B 90 us more); every thread polling for all its words at once (0.5B 12 % and 7B 4 %
 * slower), or for one of them (0.5B 5 % slower still); pauses between polls (no gain); 12 and 16 consumer warps
 * (spills; 16 in an earlier form: barriers); one kernel for 1 to 8 sequences, all bit widths and groups, its gathers
 * unrolled for all loads at once (210 KB of code: 7B 1,870 us); q - zero on the ALU before the product instead of raw
 * integers and sums of x (7B's gate_up 23 us instead of 17); 2 or 3 ring stages (7B 16 and 5 % slower; 0.5B 3 % and
 * nothing); down in one range of k (7B 3 %); gathers of the residual without qf_gather_await (7B on two GPUs 6 %), or with
 * two vectors in flight where four have room (2 %, alone 0.4 %); before that, a chain of five kernels a layer (2.9 us a kernel). */
#include "decode_attention.cuh"
#include "decode_setup.cuh"
#include "decode_step.cuh"

/* ---- the kernel ------------------------------------------------------------------------------------------------ */

/* What all sums are multiplied by, behind the squares' sums: the multiplier of the weights, divided by the root mean
 * square if x is normed. The last warp's, which has the fewest units. Read behind the next barrier. at: its address. */
__device__ __forceinline__ void qf_decode_make_scale(const qf_decode_params &p, bool normed, float multiplier,
                                                     uint32_t at)
{
    if (threadIdx.x < QF_DECODE_THREADS - 32) {
        return;
    }
    const int lane = threadIdx.x & 31, blocks = p.hidden_size / 128;
    float sum = 0.0f;
    if (normed) {
#pragma unroll 1
        for (int i = lane; i < blocks; i += 32) {
            sum += __uint_as_float(qf_shared_load_4(at - (blocks - i) * 4));
        }
#pragma unroll
        for (int mask = 16; mask != 0; mask >>= 1) {
            sum += __shfl_xor_sync(~0u, sum, mask);
        }
        multiplier *= rsqrtf(__fdividef(sum, (float)p.hidden_size) + p.eps);
    }
    if (lane == 0) {
        qf_sts_32(at, multiplier);
    }
}

/* qkv's bias of this thread's rows, fetched while the residual is awaited. */
__device__ __forceinline__ void qf_decode_take_bias(const qf_decode_phase &ph, const float *bias, int tile,
                                                    qf_decode_result &result)
{
    if (result.adds && bias != nullptr) {
        result.low = __ldg(bias + (ph.tile0 + tile) * 16 + (threadIdx.x & 7));
        result.high = __ldg(bias + (ph.tile0 + tile) * 16 + (threadIdx.x & 7) + 8);
    }
}

/* The layers, by the consumer warps. Barriers: each linear in which this CTA has a part has one when x is complete and
 * one when `red` is; attention and the gathers have their own. All depend on the CTA and the linear alone, so every
 * warp meets them all. Behind the second barrier no warp reads x any more, so the next x may be written at once; what
 * the adding threads still read (r, kept rows) is not written again before the words that they then store have come
 * back as complete results. */
template <int head_dim, bool ranks>
__device__ __forceinline__ void qf_decode_layers(const qf_decode_params &p, qf_decode_ring &ring)
{
    const uint32_t first_epoch = qf_fixed().epoch;
#pragma unroll 1
    for (int step = 0; step < 4 * p.num_layers; step++) {
        const int layer = step >> 2, kind = step & 3;
        const uint32_t epoch = first_epoch + layer;
        const qf_decode_phase &ph = qf_fixed().phase[kind];
        const bool part = ph.blocks > 0;
        const int local_tiles = ph.local_tiles, mine = threadIdx.x >> 3; /* the first tile that this thread adds up */
        qf_decode_run run;
        qf_decode_result result;
        float multiplier = 0.0f;
        qf_decode_stamp(p, step, QF_STAMP_START);
        if (kind == QF_DECODE_O) {
            qf_decode_attention<head_dim, ranks>(p, layer, epoch, ring);
        }
        if (part) {
            multiplier = qf_layer(p, layer)->multiplier[kind];
            qf_decode_begin(p, ph, ring, run);
            qf_decode_place<ranks>(p, ph, kind, mine, epoch, result);
            asm volatile("" : "+r"(result.red), "+r"(result.scale), "+r"(result.saved), "+l"(result.to)); /* now */
        }
        if (kind & 1) {
            if (part) {
                qf_gather_words<ranks>(p, kind, epoch);
            }
        } else {
            if (part && kind == QF_DECODE_QKV) {
                qf_decode_take_bias(ph, qf_layer(p, layer)->bias, mine, result);
            }
            qf_gather_rows<ranks>(p, kind, layer, epoch);
        }
        qf_decode_stamp(p, step, QF_STAMP_GATHERED);
        if (!part) {
            continue;
        }
        qf_consumer_barrier();
        qf_decode_stamp(p, step, QF_STAMP_X);
        qf_decode_make_scale(p, (kind & 1) == 0, multiplier, result.scale);
        if (kind & 1) {
            qf_decode_take_saved(result);
        }
        qf_decode_consume(p, ring, run);
        qf_decode_stamp(p, step, QF_STAMP_UNITS);
        qf_consumer_barrier();
        qf_decode_finish<ranks>(p, kind, local_tiles, epoch, result);
        qf_decode_stamp(p, step, QF_STAMP_END);
    }
}

template <int head_dim, bool ranks>
__global__ void __launch_bounds__((QF_DECODE_WARPS + 1) * 32, 1)
    qf_decode_kernel(const __grid_constant__ qf_decode_params p)
{
    qf_decode_set_up<head_dim, ranks>(p);
    if (threadIdx.x >= QF_DECODE_THREADS) {
        qf_decode_produce<head_dim>(p);
        return;
    }
    qf_decode_ring ring = {0, 0};
    const int step = 4 * p.num_layers;
    qf_decode_layers<head_dim, ranks>(p, ring);
    qf_decode_stamp(p, step, QF_STAMP_START);
    qf_gather_rows<ranks>(p, QF_DECODE_HEAD, p.num_layers, qf_fixed().epoch + p.num_layers);
    qf_decode_stamp(p, step, QF_STAMP_GATHERED);
    qf_consumer_barrier();
    qf_decode_make_scale(p, true, qf_layer(p, p.num_layers)->multiplier[0],
                         qf_shared_address(qf_norm_squares(p, QF_DECODE_HEAD) + p.hidden_size / 128));
    qf_consumer_barrier();
    qf_decode_stamp(p, step, QF_STAMP_X);
    switch (p.linear[QF_DECODE_HEAD].bits) {
    case 4:
        qf_decode_head<4>(p, ring);
        break;
    case 8:
        qf_decode_head<8>(p, ring);
        break;
    default:
        qf_decode_head<16>(p, ring);
    }
    qf_decode_stamp(p, step, QF_STAMP_END);
    if (blockIdx.x == 0 && threadIdx.x == 0) { /* everybody has read it: see decode_exchange.cuh */
        p.header[QF_DECODE_EPOCH] = qf_fixed().epoch - 2 + p.num_layers;
    }
}

/* ---- host ------------------------------------------------------------------------------------------------------ */

static int qf_decode_grid(const qf_decode_params *p) { return p->linear[QF_DECODE_HEAD].parts; }

static bool qf_decode_takes(const qf_cuda_decode_args *args, const qf_cuda_device *device, int splits, bool ranks,
                            qf_decode_params *p)
{
    return device->compute_capability >= 80 && (args->peers == nullptr || args->ranks != nullptr) &&
           qf_decode_shapes_ok(args) && qf_decode_plan(args, device, splits, ranks, p);
}

extern "C" bool qf_cuda_decode_supported(const qf_cuda_decode_args *args, const qf_cuda_device *device)
{
    qf_decode_params p;
    return args != nullptr && device != nullptr && qf_decode_takes(args, device, 0, args->peers != nullptr, &p);
}

extern "C" void qf_cuda_decode_describe(const qf_cuda_decode_args *args, const qf_cuda_device *device,
                                        qf_cuda_decode_rank *out)
{
    qf_decode_params p;
    qf_cuda_decode_args own = *args;
    own.peers = nullptr;
    *out = qf_cuda_decode_rank{};
    out->supported = qf_decode_takes(&own, device, 0, true, &p);
    if (out->supported) {
        out->num_layers = own.num_layers;
        out->hidden_size = own.hidden_size;
        out->o = qf_decode_cut_of(&p.linear[QF_DECODE_O]);
        out->down = qf_decode_cut_of(&p.linear[QF_DECODE_DOWN]);
    }
}

/* Header, attention's partials, then the exchange buffer. */
#define QF_DECODE_HEADER_BYTES 256

extern "C" size_t qf_cuda_decode_workspace_bytes(const qf_cuda_decode_args *args, const qf_cuda_device *device,
                                                 int32_t max_model_len)
{
    (void)max_model_len; /* a sequence's splits are as many as there are CTAs, whatever its length */
    qf_cuda_decode_args alone = *args;
    size_t most = 0;
    alone.peers = nullptr; /* with peers some of it stays unused */
    for (int splits = 0; splits <= 2; splits++) {
        qf_decode_params p;
        qf_decode_plan(&alone, device, splits, false, &p);
        size_t bytes = QF_DECODE_HEADER_BYTES + (size_t)p.partials_half * 16 + (size_t)p.ll.words * 8;
        most = bytes > most ? bytes : most;
    }
    return most;
}

extern "C" qf_status qf_cuda_decode_reset(const qf_cuda_decode_args *args, const qf_cuda_device *device,
                                          cudaStream_t stream, qf_error *err)
{
    QF_CUDA_TRY(cudaMemsetAsync(args->workspace, 0, qf_cuda_decode_workspace_bytes(args, device, 0), stream));
    if (args->peers != nullptr) {
        QF_TRY(qf_peer_check("decode", args->peers, err));
        char *sums = args->peers->regions[args->peers->rank] + qf_peer_decode_at(args->peers->exchange_bytes);
        QF_CUDA_TRY(cudaMemsetAsync(sums, 0, QF_PEER_DECODE_BYTES, stream));
    }
    return QF_OK;
}

typedef void (*qf_decode_kernel_fn)(const qf_decode_params);

/* By head_dim, and by whether there are ranks. */
static const qf_decode_kernel_fn kernels[2][2] = {{qf_decode_kernel<64, false>, qf_decode_kernel<64, true>},
                                                  {qf_decode_kernel<128, false>, qf_decode_kernel<128, true>}};

extern "C" qf_status qf_cuda_decode_load(qf_error *err)
{
    for (int i = 0; i < 4; i++) {
        cudaFuncAttributes attributes;
        QF_CUDA_TRY(cudaFuncGetAttributes(&attributes, kernels[i / 2][i % 2]));
    }
    return QF_OK;
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
    p->exchange = (uint32_t *)(p->partials + 2 * p->partials_half);
    p->bulk = device->hopper;
    p->stamps = options->stamps;
    return QF_OK;
}

qf_status qf_cuda_decode_with(const qf_cuda_decode_args *args, const qf_cuda_decode_options *options,
                              const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    if (args == nullptr || device == nullptr) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "decode: args or device is NULL");
    }
    if (args->peers != nullptr) {
        QF_TRY(qf_peer_check("decode", args->peers, err));
    }
    qf_decode_params p;
    if (!qf_decode_takes(args, device, options->splits, args->peers != nullptr, &p)) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "decode: no plan for hidden size %d, %d heads of %d, %d sequences in %d bytes of shared memory, "
                       "%d ranks",
                       args->hidden_size, args->num_heads, args->head_dim, args->num_seqs, device->max_shared_bytes,
                       args->peers != nullptr ? args->peers->num_ranks : 1);
    }
    QF_TRY(qf_decode_pointers(args, device, options, &p, err));
    if (options->max_stages >= 2 && options->max_stages < p.map.stages) {
        p.map.total -= (p.map.stages - options->max_stages) * p.map.stage_bytes;
        p.map.stages = options->max_stages;
    }
    const qf_decode_kernel_fn kernel = kernels[args->head_dim == 64 ? 0 : 1][args->peers != nullptr ? 1 : 0];
    QF_TRY(qf_allow_shared("decode", kernel, (size_t)device->max_shared_bytes, err)); /* one size: ranks may share a device */
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)qf_decode_grid(&p));
    config.blockDim = dim3((QF_DECODE_WARPS + 1) * 32);
    config.dynamicSmemBytes = (size_t)p.map.total;
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeCooperative; /* all CTAs are resident, or the launch fails */
    attribute[0].val.cooperative = 1;
    config.attrs = attribute;
    config.numAttrs = options->unsafe ? 0 : 1;
    QF_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, p));
    return QF_OK;
}

extern "C" qf_status qf_cuda_decode(const qf_cuda_decode_args *args, const qf_cuda_device *device, cudaStream_t stream,
                                    qf_error *err)
{
    const qf_cuda_decode_options options = {0, 0, nullptr, false};
    return qf_cuda_decode_with(args, &options, device, stream, err);
}
