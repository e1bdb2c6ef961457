/* What the decode kernel puts into shared memory before it starts: barriers, its parts of the linears, its share of the
 * attention, the table of layers, and which pieces of which row tile exist. */
#ifndef QF_DECODE_SETUP_CUH
#define QF_DECODE_SETUP_CUH

#include "decode_exchange.cuh"

static __device__ __forceinline__ void qf_decode_make_phase(const qf_decode_params &p, int kind, qf_decode_phase *ph)
{
    const qf_decode_linear &l = p.linear[kind];
    *ph = qf_decode_phase{};
    int index = (int)blockIdx.x - l.rotation;
    if (index < 0) {
        index += (int)gridDim.x;
    }
    if (index >= l.splits * l.parts) {
        ph->kbs = 1;
        return;
    }
    int split = index / l.parts, part = index % l.parts, begin, end;
    ph->ks0 = qf_decode_range_begin(l, split);
    ph->kbs = qf_decode_range_begin(l, split + 1) - ph->ks0;
    if (l.by_tile) {
        begin = (int)((int64_t)l.tiles * part / l.parts) * ph->kbs;
        end = (int)((int64_t)l.tiles * (part + 1) / l.parts) * ph->kbs;
    } else {
        int64_t blocks = (int64_t)l.tiles * ph->kbs;
        begin = (int)(blocks * part / l.parts);
        end = (int)(blocks * (part + 1) / l.parts);
    }
    ph->blocks = end - begin;
    ph->tile0 = begin / ph->kbs;
    ph->offset = begin % ph->kbs;
    ph->local_tiles = ph->blocks == 0 ? 0 : (end - 1) / ph->kbs - ph->tile0 + 1;
    ph->reciprocal = (uint32_t)(0x100000000ull / (uint32_t)ph->kbs + 1);
    ph->slot = p.first_slot[kind] + split * l.max_pieces;
    ph->first_slot = ph->slot;
    if (ph->offset != 0) {
        ph->first_slot += part - qf_decode_part_of(ph->tile0 * ph->kbs, l.parts, l.tiles * ph->kbs);
    }
    ph->n = l.n;
    ph->out = kind == QF_DECODE_QKV       ? p.ll.qkv
              : kind == QF_DECODE_O       ? p.ll.o
              : kind == QF_DECODE_GATE_UP ? p.ll.act
                                          : p.ll.down;
    ph->turn = (int)blockIdx.x % ph->kbs * 32;
}

/* For one sliding window. The splits depend on the length alone: at least four tiles each. Attention starts behind
 * qkv's parts. */
static __device__ __forceinline__ void qf_decode_make_item(const qf_decode_params &p, int window, int head_dim,
                                                           qf_decode_item *item)
{
    const int rows = 8192 / head_dim, length = p.seq_lens[0], slot = p.slot_mapping[0];
    const int start = window > 0 ? max(0, length - window) : 0, first = start / rows;
    const int tiles = length > 0 ? (length - 1) / rows - first + 1 : 0;
    const int per_split = max(4, (tiles + p.max_splits - 1) / p.max_splits);
    int index = (int)blockIdx.x - p.linear[QF_DECODE_O].rotation;
    if (index < 0) {
        index += (int)gridDim.x;
    }
    *item = qf_decode_item{};
    item->num_splits = max(1, (tiles + per_split - 1) / per_split);
    item->head = -1;
    if (index >= item->num_splits * p.num_kv_heads) {
        return;
    }
    item->split = index / p.num_kv_heads;
    item->head = index % p.num_kv_heads;
    item->tile_begin = first + item->split * per_split;
    item->tile_end = min(item->tile_begin + per_split, first + tiles);
    item->start = start;
    item->length = length;
    item->fresh = -(1 << 30);
    item->place = -1;
    if (item->split == item->num_splits - 1 && length > 0) {
        item->fresh = length - 1;
        if (slot >= 0) {
            item->place = (((int64_t)(slot / p.block_size) * p.num_kv_heads + item->head) * p.block_size +
                           slot % p.block_size) * (head_dim * 2);
        }
    }
}

/* Undoes the scales of x and of integers. */
static __device__ __forceinline__ float qf_decode_unscale(const qf_decode_linear &l)
{
    return l.bits == 16 ? 1.0f / QF_DECODE_X_SCALE : 0x1p37f;
}

static __device__ __forceinline__ void qf_decode_make_entry(const qf_decode_params &p, int layer,
                                                            qf_decode_layer_entry *e)
{
    *e = qf_decode_layer_entry{};
    if (layer == p.num_layers) {
        e->data[0] = p.head_data;
        e->scales[0] = p.head_scales;
        e->multiplier[0] = p.head_multiplier * qf_decode_unscale(p.linear[QF_DECODE_HEAD]);
        e->norm[0] = p.final_norm;
        return;
    }
    const qf_cuda_decode_layer *from = p.layers + layer;
    const qf_cuda_weight *weights[4] = {&from->qkv, &from->o, &from->gate_up, &from->down};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        e->data[i] = (const char *)weights[i]->data;
        e->scales[i] = (const char *)weights[i]->scales;
        e->multiplier[i] = weights[i]->scale_multiplier * qf_decode_unscale(p.linear[i]);
    }
    e->norm[0] = from->input_norm;
    e->norm[1] = from->post_attention_norm;
    e->bias = from->qkv.bias;
    e->k = (char *)from->k;
    e->v = (char *)from->v;
    e->other_window = from->sliding_window != p.layers[0].sliding_window;
}

/* Which results each row tile of qkv, o and down has: a byte a tile and four slots, (kind, four slots, tile). */
template <bool ranks> static __device__ __forceinline__ void qf_decode_make_masks(const qf_decode_params &p)
{
    uint8_t *masks = reinterpret_cast<uint8_t *>(qf_decode_shared + p.map.masks);
    const int n0 = p.linear[QF_DECODE_QKV].tiles, n1 = n0 + p.linear[QF_DECODE_O].tiles;
#pragma unroll 1
    for (int i = threadIdx.x; i < n1 + p.linear[QF_DECODE_DOWN].tiles; i += blockDim.x) {
        const int kind = i < n0 ? QF_DECODE_QKV : i < n1 ? QF_DECODE_O : QF_DECODE_DOWN;
        const int tile = i - (i < n0 ? 0 : i < n1 ? n0 : n1), tiles = p.linear[kind].tiles;
        if (!ranks || kind == QF_DECODE_QKV) {
            masks[i] = (uint8_t)qf_decode_slot_mask(p.linear[kind], tiles, tile);
            continue;
        }
        const qf_decode_rows &rows = p.rows[kind == QF_DECODE_O ? 0 : 1];
        const uint32_t mask = qf_ranks_mask(rows, p.peers.num_ranks, tiles, tile);
        uint8_t *to = masks + n0 + (kind == QF_DECODE_O ? 0 : p.rows[0].groups * tiles) + tile;
#pragma unroll 1
        for (int g = 0; g < rows.groups; g++) {
            to[g * tiles] = (uint8_t)(mask >> (4 * g) & 15u);
        }
    }
}

/* All threads; ends with a barrier of the block. */
template <int head_dim, bool ranks> static __device__ __noinline__ void qf_decode_set_up(const qf_decode_params &p)
{
    qf_decode_fixed *fixed = &qf_fixed();
    qf_decode_layer_entry *layers = reinterpret_cast<qf_decode_layer_entry *>(qf_decode_shared + p.map.layers);
    const int id = threadIdx.x, threads = blockDim.x;
    if (id == 0) {
        for (int i = 0; i < p.map.stages; i++) {
            qf_mbarrier_init(&fixed->full[i], 32);
            qf_mbarrier_init(&fixed->empty[i], QF_DECODE_WARPS);
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); /* the copy engine sees them too */
#endif
    } else if (id == 32) {
        fixed->failed = ranks ? qf_ranks_failed(p) : p.header[QF_DECODE_ERROR] != 0;
        fixed->epoch = 2 + p.header[QF_DECODE_EPOCH];
        fixed->patience = QF_DECODE_PATIENCE_CLOCKS + (long long)p.peers.limit_ns * QF_DECODE_CLOCKS_PER_NS;
        fixed->deadline = 0;
        for (int i = 0; ranks && i < p.peers.num_ranks - 1; i++) {
            const int other = p.peers.rank + 1 + i, r = other < p.peers.num_ranks ? other : other - p.peers.num_ranks;
            fixed->away[i] = p.peers.regions[r] - p.peers.regions[p.peers.rank];
        }
    } else if (id == 64 || id == 96) { /* the first layer's window, and the other if there is another */
        int window = p.layers[0].sliding_window;
        if (id == 96) {
            int l = 0;
            while (l < p.num_layers - 1 && p.layers[l].sliding_window == window) {
                l++;
            }
            window = p.layers[l].sliding_window;
        }
        qf_decode_make_item(p, window, head_dim, &fixed->items[id / 96]);
    } else if (id >= 128 && id < 128 + 32 * QF_DECODE_KINDS && id % 32 == 0) {
        qf_decode_make_phase(p, id / 32 - 4, &fixed->phase[id / 32 - 4]);
    }
#pragma unroll 1
    for (int i = id; i <= p.num_layers; i += threads) {
        qf_decode_make_entry(p, i, layers + i);
    }
    qf_decode_make_masks<ranks>(p);
    for (int i = id; i < head_dim; i += threads) {
        reinterpret_cast<float *>(qf_decode_shared + p.map.rope)[i] = p.cos_sin[i];
    }
    for (int i = id; i < p.map.red_tiles * QF_DECODE_TILE_FLOATS; i += threads) {
        reinterpret_cast<float *>(qf_decode_shared + p.map.red)[i] = 0.0f;
    }
    __syncthreads();
}

#endif
