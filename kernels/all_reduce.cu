/* The sum over ranks of what a row-parallel linear made, with the residual and RMSNorm.
 *
 *   c[r] = delta[0][row] + ... of rank r;   h = residual[row] + c[0] + c[1] + ... + c[num_ranks - 1]     (in this order)
 *   residual[row] = h                                                         (unless `rows` chooses the rows)
 *   out(., row) = bf16(h / sqrt(mean(h^2) + eps) * weight), 0 from hidden_size to k_padded
 *
 * Shapes and layouts: qf_cuda_rmsnorm's; delta is this rank's, residual and out are the same on all ranks. Shares travel
 * as float32, so nothing is rounded that one GPU would not round; kernels/peers.cuh says how words travel.
 *
 * Roofline: latency. A store to another GPU is visible there after about 1 us; loading the deltas, the last poll and the
 * norm take about another: target 2.5 us for one row, where NCCL's all-reduce alone takes 6.6 (2 GPUs) to 10.5 us (4 GPUs).
 * The link takes 390 GB/s out of a GPU: with R ranks and 4 n bytes of shares one shot sends 4 n (R - 1), two
 * shots 6 n (R - 1) / R: 73 rows of 3,584 on 4 GPUs, 8.0 and 3.0 us.
 *
 * Plan: a cluster of C = 1, 2 or 4 CTAs a row, as few rows would otherwise leave the link to few multiprocessors; the row
 * stands in registers, `vectors` float4s a thread, T threads in the cluster:
 *
 *     | CTA 0: threads 0 .. T/C - 1 | CTA 1 | ... |  then once more from float4 T on       one float4 each
 *
 * One shot:   load own deltas -> store to every other rank -> poll theirs in our region -> add -> norm -> store
 * Two shots:  the row's owner:  poll the others' shares -> add -> norm -> store x here and to every other rank
 *             all others:       store own share to the owner -> poll x -> store
 *
 *     exchange buffer, one shot:   shares (row, from rank, hidden_size) float32
 *     two shots:                   shares (own row, from rank, hidden_size) float32 | x (row, hidden_size) bf16
 *
 * The sum of squares has one order whatever C and `vectors` are: of a warp's 32 float4s a butterfly; of up to 64 warps
 * (0 for those that are not there), exchanged through the cluster's shared memory, another. So neither form nor number of
 * rows changes a row's bits.
 *
 * Every CTA stores its share before it waits, and CTAs start in order: of all unfinished rows the lowest is running on
 * every rank, so somebody always gets on, however many rows there are. Weights are fetched before the dependency wait.
 *
 * Measured: see PERF.md. */
#include "all_reduce_row.cuh"

/* --- between ranks ---------------------------------------------------------------------------------------------- */

/* The rank i after this one: each starts with another, so that not all send to the same at first. */
static __device__ __forceinline__ int32_t rank_after(const qf_cuda_peers &p, int32_t i)
{
    return p.rank + i < p.num_ranks ? p.rank + i : p.rank + i - p.num_ranks;
}

static __device__ __forceinline__ char *exchange_of(const all_reduce_params &p, int32_t rank)
{
    return p.peers.regions[rank] + p.exchange;
}

/* Where the share of a row's slot that comes from rank `from` stands in rank `in`'s region. */
static __device__ __forceinline__ uint4 *share_at(const all_reduce_params &p, int32_t in, int32_t slot, int32_t from)
{
    const int64_t index = (int64_t)slot * p.peers.num_ranks + from;
    return reinterpret_cast<uint4 *>(exchange_of(p, in)) + index * (p.norm.hidden_size / 4);
}

/* x of a row of this launch. */
static __device__ __forceinline__ uint2 *x_at(const all_reduce_params &p, int32_t in, int32_t row)
{
    return reinterpret_cast<uint2 *>(exchange_of(p, in) + p.rows_at) + (int64_t)row * (p.norm.hidden_size / 4);
}

template <int vectors>
static __device__ __forceinline__ void send_share(const all_reduce_params &p, int32_t to, int32_t slot,
                                                  const float4 (&share)[vectors])
{
    uint4 *there = share_at(p, to, slot, p.peers.rank);
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        if (is_inside(p.norm, v)) {
            qf_peer_store(there + vector_index(v), make_uint4(__float_as_uint(share[v].x), __float_as_uint(share[v].y),
                                                              __float_as_uint(share[v].z), __float_as_uint(share[v].w)));
        }
    }
}

/* Polls the places base[at[i]] whose bits are set in `wanted`, all that are missing at once, until none is empty. The first
 * `vectors` of them come from rank `source`, the next from the rank after it. */
template <int vectors, int count, typename T>
static __device__ __forceinline__ void poll(const all_reduce_params &p, T *base, const int32_t (&at)[count],
                                            T (&value)[count], uint32_t wanted, int32_t source)
{
    qf_peer_wait wait;
#pragma unroll 1
    while (wanted != 0) {
#pragma unroll
        for (int i = 0; i < count; i++) {
            if (wanted >> i & 1) {
                value[i] = qf_peer_load(base + at[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < count; i++) {
            if (qf_peer_is_full(value[i])) {
                wanted &= ~(1u << i);
            }
        }
        if (wanted != 0 && wait.give_up(p.peers, source + (__ffs((int)wanted) - 1) / vectors)) {
            break;
        }
    }
}

/* h += all shares in order of rank, `batch` ranks' in flight at once. */
template <int batch, int vectors>
static __device__ __forceinline__ void add_shares(const all_reduce_params &p, int32_t slot,
                                                  const float4 (&share)[vectors], float4 (&h)[vectors])
{
    const int32_t rank = p.peers.rank, num_ranks = p.peers.num_ranks;
#pragma unroll 1
    for (int32_t first = 0; first < num_ranks; first += batch) {
        uint4 *base = share_at(p, rank, slot, first);
        int32_t at[batch * vectors];
        uint4 value[batch * vectors];
        uint32_t wanted = 0;
#pragma unroll
        for (int i = 0; i < batch * vectors; i++) {
            const int32_t from = first + i / vectors;
            at[i] = i / vectors * (p.norm.hidden_size / 4) + vector_index(i % vectors);
            value[i] = make_uint4(0, 0, 0, 0);
            wanted |= from < num_ranks && from != rank && is_inside(p.norm, i % vectors) ? 1u << i : 0u;
        }
        poll<vectors>(p, base, at, value, wanted, first);
#pragma unroll
        for (int i = 0; i < batch * vectors; i++) {
            const int32_t from = first + i / vectors;
            if (from == rank) {
                add(h[i % vectors], share[i % vectors]);
            } else if (from < num_ranks) {
                add(h[i % vectors], make_float4(__uint_as_float(value[i].x), __uint_as_float(value[i].y),
                                                __uint_as_float(value[i].z), __uint_as_float(value[i].w)));
            }
            if (wanted >> i & 1) {
                qf_peer_clear(base + at[i]);
            }
        }
    }
}

/* --- kernels -------------------------------------------------------------------------------------------------------- */

/* Everything from the complete row on. */
template <int vectors, bool two_shot>
static __device__ __forceinline__ void finish_row(const all_reduce_params &p, int32_t row, const float4 (&h)[vectors],
                                                  const float4 (&weight)[vectors], row_sums *sums)
{
    const qf_cuda_rmsnorm_args &a = p.norm;
    const int32_t out_row = p.first_row + (int32_t)blockIdx.y;
    if (a.rows == NULL) {
#pragma unroll
        for (int v = 0; v < vectors; v++) {
            if (is_inside(a, v)) {
                reinterpret_cast<float4 *>(a.residual + (int64_t)row * a.hidden_size)[vector_index(v)] = h[v];
            }
        }
    }
    if (a.out == NULL) {
        return;
    }
    const float inverse = rsqrtf(fmaf(sum_of_squares(a, h, sums), p.inverse_size, a.eps));
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        const uint2 packed = pack_normed(h[v], inverse, weight[v]);
        if (is_inside(a, v)) {
            if (two_shot) {
#pragma unroll 1
                for (int32_t i = 1; i < p.peers.num_ranks; i++) {
                    uint2 *there = x_at(p, rank_after(p.peers, i), (int32_t)blockIdx.y);
                    qf_peer_store(there + vector_index(v), packed);
                }
            }
            store_out(a, out_row, vector_index(v), packed);
        }
    }
    store_padding(a, out_row);
}

/* Two shots: x of a row that another rank does. */
template <int vectors>
static __device__ __forceinline__ void receive_row(const all_reduce_params &p, int32_t owner)
{
    const qf_cuda_rmsnorm_args &a = p.norm;
    const int32_t out_row = p.first_row + (int32_t)blockIdx.y;
    uint2 *base = x_at(p, p.peers.rank, (int32_t)blockIdx.y);
    int32_t at[vectors];
    uint2 value[vectors];
    uint32_t wanted = 0;
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        at[v] = vector_index(v);
        value[v] = make_uint2(0, 0);
        wanted |= is_inside(a, v) ? 1u << v : 0u;
    }
    store_padding(a, out_row);
    poll<vectors>(p, base, at, value, wanted, owner);
#pragma unroll
    for (int v = 0; v < vectors; v++) {
        if (wanted >> v & 1) {
            qf_peer_clear(base + at[v]);
            store_out(a, out_row, vector_index(v), value[v]);
        }
    }
}

template <int vectors, bool two_shot>
static __global__ void __launch_bounds__(MAX_THREADS, two_shot && vectors < 4 ? 2 : 1)
    qf_all_reduce_kernel(const __grid_constant__ all_reduce_params p)
{
    constexpr int batch = (two_shot ? 4 : 8) / vectors; /* loads in flight, so that two CTAs of two shots share an SM */
    __shared__ row_sums sums;
    const qf_cuda_rmsnorm_args &a = p.norm;
    qf_grid_launch_dependents();
    if (gridDim.x > 1) {
        cluster_prepare(&sums, warps_of_row<vectors>());
    }
    float4 weight[vectors], share[vectors], h[vectors];
    if (a.out != NULL) {
        load_weights(a, weight);
    }
    qf_grid_dependency_wait();
    const int32_t out_row = p.first_row + (int32_t)blockIdx.y;
    const int32_t row = a.rows != NULL ? a.rows[out_row] : out_row;
    const int32_t owner = two_shot ? row % p.peers.num_ranks : p.peers.rank;
    const int32_t slot = two_shot ? (int32_t)blockIdx.y / p.spread : (int32_t)blockIdx.y;
    load_share<batch>(a, row, share);
    if (owner == p.peers.rank) {
        load_residual(p, row, h);
    }
    if (!two_shot) {
#pragma unroll 1
        for (int32_t i = 1; i < p.peers.num_ranks; i++) {
            send_share(p, rank_after(p.peers, i), slot, share);
        }
    } else if (owner != p.peers.rank) {
        send_share(p, owner, slot, share);
    }
    if (gridDim.x > 1) {
        cluster_wait();
    }
    if (owner != p.peers.rank) {
        receive_row<vectors>(p, owner);
        return;
    }
    add_shares<batch>(p, slot, share, h);
    finish_row<vectors, two_shot>(p, row, h, weight, &sums);
}

/* --- dispatch and launcher ------------------------------------------------------------------------------------------ */

typedef void (*all_reduce_kernel_fn)(all_reduce_params);

/* By log2 of `vectors`, and by form. */
static const all_reduce_kernel_fn kernels[3][2] = {
    {qf_all_reduce_kernel<1, false>, qf_all_reduce_kernel<1, true>},
    {qf_all_reduce_kernel<2, false>, qf_all_reduce_kernel<2, true>},
    {qf_all_reduce_kernel<4, false>, qf_all_reduce_kernel<4, true>},
};

extern "C" qf_status qf_cuda_all_reduce_load(qf_error *err)
{
    for (int i = 0; i < 6; i++) {
        cudaFuncAttributes attributes;
        QF_CUDA_TRY(cudaFuncGetAttributes(&attributes, kernels[i / 2][i % 2]));
    }
    return QF_OK;
}

/* Rows of one launch. Two shots: shares of a rank's own rows and x of all; a list's rows may all be of one rank. */
static int32_t rows_of_launch(const qf_cuda_all_reduce_args *a, const qf_cuda_peers *p)
{
    const int64_t share = 4 * (int64_t)a->norm.hidden_size, bytes = (int64_t)p->exchange_bytes;
    const int64_t all_shares = share * p->num_ranks;
    int64_t rows = a->form == QF_CUDA_ONE_SHOT ? bytes / all_shares
                   : a->norm.rows != NULL      ? bytes / (all_shares + share / 2)
                                               : bytes / (share + share / 2) / p->num_ranks * p->num_ranks;
    return rows > 65535 / QF_CUDA_MAX_RANKS * QF_CUDA_MAX_RANKS ? 65535 / QF_CUDA_MAX_RANKS * QF_CUDA_MAX_RANKS
                                                                : (int32_t)rows;
}

extern "C" size_t qf_cuda_all_reduce_bytes(int32_t num_ranks, int32_t rows, int32_t hidden_size)
{
    const size_t all_shares = 4 * (size_t)hidden_size * (size_t)num_ranks;
    const size_t up = ((size_t)rows + (size_t)num_ranks - 1) / (size_t)num_ranks;
    const size_t one_row = all_shares + 2 * (size_t)hidden_size; /* a list's */
    const size_t bytes = up * (all_shares + 2 * (size_t)hidden_size * (size_t)num_ranks);
    return ((bytes > one_row ? bytes : one_row) + 255) / 256 * 256;
}

extern "C" qf_cuda_all_reduce_form qf_cuda_all_reduce_choose(int32_t num_ranks, int32_t num_tokens, int32_t hidden_size)
{
    /* Measured with 2 GPUs: both take 5.5 us for 18 rows of 3,584 and 5.9 us for 8 of 8,192. What one shot stores and polls
     * grows with the other ranks' number. */
    return (int64_t)num_tokens * hidden_size * (num_ranks - 1) >= 65536 ? QF_CUDA_TWO_SHOT : QF_CUDA_ONE_SHOT;
}

static qf_status check_shape(const qf_cuda_all_reduce_args *args, qf_error *err)
{
    const qf_cuda_rmsnorm_args *a = &args->norm;
    if (a->hidden_size < 4 || a->hidden_size > MAX_HIDDEN_SIZE || a->hidden_size % 4 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "all_reduce: hidden_size %d; expected a multiple of 4 up to %d",
                       a->hidden_size, MAX_HIDDEN_SIZE);
    }
    if (a->num_tokens < 1 || a->num_rows < 1 || (a->rows == NULL && a->num_rows != a->num_tokens)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "all_reduce: %d rows of %d tokens; expected at least 1, and all tokens where `rows` is null",
                       a->num_rows, a->num_tokens);
    }
    if (a->out != NULL && (a->k_padded < a->hidden_size || a->k_padded % 128 != 0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "all_reduce: k_padded %d; expected a multiple of 128 that is at least hidden_size, %d",
                       a->k_padded, a->hidden_size);
    }
    if (a->num_splits < 1 || a->num_splits > QF_CUDA_MAX_SPLITS || a->delta_stride < a->hidden_size ||
        a->delta_stride % 4 != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "all_reduce: %d splits of stride %d; expected 1 to %d, and a multiple of 4 from hidden_size %d on",
                       a->num_splits, a->delta_stride, QF_CUDA_MAX_SPLITS, a->hidden_size);
    }
    if (a->out == NULL && (a->rows != NULL || args->form != QF_CUDA_ONE_SHOT)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "all_reduce: without out, with %s: only one shot of all rows is",
                       a->rows != NULL ? "`rows`" : "two shots");
    }
    return QF_OK;
}

static qf_status check_pointers(const qf_cuda_all_reduce_args *args, qf_error *err)
{
    const qf_cuda_rmsnorm_args *a = &args->norm;
    const void *pointers[] = {a->residual, a->delta, a->weight, a->out};
    if (a->residual == NULL || a->delta == NULL || (a->out != NULL && a->weight == NULL) || args->calls == NULL) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "all_reduce: residual, delta, weight or calls is null");
    }
    for (int i = 0; i < 4; i++) {
        if ((uintptr_t)pointers[i] % 16 != 0) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "all_reduce: a pointer is at %p; expected a multiple of 16",
                           pointers[i]);
        }
    }
    return QF_OK;
}

/* CTAs a row: as many as leave the launch in one wave, if each has four warps or more. */
static int32_t cluster_size(const qf_cuda_all_reduce_args *args, const qf_cuda_device *device, int32_t rows, int32_t warps)
{
    if (!device->dependent_launch || warps < 16) { /* clusters came with sm_90 as well */
        return 1;
    }
    const int32_t twice = args->form == QF_CUDA_TWO_SHOT ? 2 : 1; /* two CTAs on a multiprocessor */
    return 4 * rows <= device->sm_count ? 4 : 2 * rows <= twice * device->sm_count ? 2 : 1;
}

static qf_status launch(const qf_cuda_all_reduce_args *args, const all_reduce_params *params, int32_t rows,
                        const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    const int32_t warps = (args->norm.hidden_size + 127) / 128;
    const int32_t cluster = cluster_size(args, device, rows, warps);
    int32_t log2_vectors = 0;
    while (warps > (MAX_THREADS / 32 * cluster) << log2_vectors) {
        log2_vectors++;
    }
    const int32_t share = cluster << log2_vectors;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = (unsigned)cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)cluster, (unsigned)rows);
    config.blockDim = dim3((unsigned)((warps + share - 1) / share * 32));
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = !device->dependent_launch ? 0 : cluster > 1 ? 2 : 1;
    cudaError_t status = cudaLaunchKernelEx(&config, kernels[log2_vectors][args->form], *params);
    if (status == cudaSuccess) {
        status = cudaPeekAtLastError();
    }
    if (status != cudaSuccess) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_BACKEND, "all_reduce: launch of %d x %d blocks of %u threads: %s", cluster, rows,
                       config.blockDim.x, cudaGetErrorString(status));
    }
    return QF_OK;
}

extern "C" qf_status qf_cuda_all_reduce(const qf_cuda_all_reduce_args *args, const qf_cuda_peers *peers,
                                        const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    QF_TRY(qf_peer_check("all_reduce", peers, err));
    QF_TRY(check_shape(args, err));
    QF_TRY(check_pointers(args, err));
    const int32_t most = rows_of_launch(args, peers);
    if (most < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "all_reduce: %zu bytes of exchange have no room for a row of %d elements of %d ranks",
                       peers->exchange_bytes, args->norm.hidden_size, peers->num_ranks);
    }
    for (int32_t first = 0; first < args->norm.num_rows; first += most) {
        const int32_t left = args->norm.num_rows - first, rows = left < most ? left : most;
        const uint32_t call = (*args->calls)++;
        const int32_t buffer = call == 0 ? QF_PEER_BUFFERS - 1 : (int32_t)((call - 1) & 1);
        const int32_t spread = args->norm.rows != NULL ? 1 : peers->num_ranks;
        const int64_t slots = (rows + spread - 1) / spread;
        const all_reduce_params params = {
            .norm = args->norm,
            .peers = *peers,
            .exchange = QF_PEER_EXCHANGE + (int64_t)buffer * (int64_t)peers->exchange_bytes,
            .rows_at = 4 * (int64_t)args->norm.hidden_size * peers->num_ranks * slots,
            .first_row = first,
            .spread = spread,
            .fresh = args->fresh,
            .inverse_size = 1.0f / (float)args->norm.hidden_size};
        QF_TRY(launch(args, &params, rows, device, stream, err));
    }
    return QF_OK;
}
