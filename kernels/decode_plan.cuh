/* What the persistent decode kernel is told, and how its work is divided: host planning, shared by kernel and launcher.
 *
 * A linear of `tiles` row tiles x `kb` k blocks is cut in k into `splits` ranges, and each range, walked tile by tile,
 * into `parts` runs of (nearly) equally many blocks. A part belongs to one CTA. So a row tile has one result per range,
 * and one more wherever a run ends inside it: its "pieces". Part q of a range of N blocks is [q N / parts, (q + 1) N /
 * parts), and the part of block v is ((v + 1) parts - 1) / N. gate_up and the head are cut between row tiles only.
 *
 *   range 0        range 1          part 0 | part 1 | ...
 *   tile 0 [0 0 0 0 0][6 6 6 6 6]
 *   tile 1 [0 1 1 1 1][6 7 7 7 7]   tile 1 has the pieces 0 and 1 of range 0, in slots 0 and 1, and the pieces 0
 *   tile 2 [1 1 2 2 2][7 7 8 8 8]   and 1 of range 1, in slots max_pieces and max_pieces + 1
 *
 * With several ranks each cuts its own k of o and down, and a row tile has the results of all ranks: those of rank r stand
 * behind the splits * max_pieces slots of each rank before. */
#ifndef QF_DECODE_PLAN_CUH
#define QF_DECODE_PLAN_CUH

#include <string.h>

#include "common/launch.cuh"
#include "peers.cuh"
#include "qf_decode.h"

#define QF_DECODE_CHUNK_UNITS 32 /* units of 1,024 bytes a ring stage holds */
#define QF_DECODE_MAX_STAGES 16
#define QF_DECODE_WARPS 8         /* that consume */
#define QF_DECODE_X_SCALE 0x1p96f /* what x is stored times; integers count as times 2^-133: see decode_linear.cuh */
#define QF_DECODE_MAX_SPLITS 32 /* of a sequence's positions */
#define QF_DECODE_MAX_SLOTS 32  /* of a row tile, of all ranks: bits of a mask */

enum { QF_DECODE_QKV, QF_DECODE_O, QF_DECODE_GATE_UP, QF_DECODE_DOWN, QF_DECODE_HEAD, QF_DECODE_KINDS };

/* A linear and its partition. */
struct qf_decode_linear {
    int32_t tiles, kb, n;
    int32_t splits, parts; /* parts of one range */
    int32_t max_pieces;    /* results of a row tile in one range, at most */
    int32_t by_tile;       /* parts end between row tiles */
    int32_t rotation;      /* part p is CTA (p + rotation) % grid's */
    int32_t bits, scale_bytes; /* scale_bytes: of a block */
};

/* What the kernel needs of a layer, in shared memory; entry num_layers is the head's. */
struct qf_decode_layer_entry {
    const char *data[4];
    const char *scales[4];
    const float *norm[2];
    const float *bias; /* of qkv, or NULL */
    char *k, *v;
    float multiplier[4];
    int32_t other_window, pad; /* its sliding window is not that of the first layer */
};

/* Where the ranks' results of o or of down are. */
struct qf_decode_rows {
    qf_cuda_decode_cut cut[QF_CUDA_MAX_RANKS];
    int32_t first_slot[QF_CUDA_MAX_RANKS + 1];
    int32_t groups; /* of four slots */
};

struct qf_decode_shared_map { /* byte offsets into dynamic shared memory */
    int32_t layers, rope, squares, masks, saved_o, saved_down, red, x, sums, ring, total;
    int32_t stages, stage_bytes, red_tiles;
};

/* Word offsets into one of the two halves of the exchange buffer. Of several ranks o and down are not there but in what
 * others can write. */
struct qf_decode_ll_map {
    int32_t qkv, attention, o, act, down, words;
};

struct qf_decode_params {
    const qf_cuda_decode_layer *layers;
    qf_decode_linear linear[QF_DECODE_KINDS];
    qf_decode_shared_map map;
    qf_decode_ll_map ll;
    const char *head_data, *head_scales;
    float head_multiplier;
    const float *final_norm, *residual, *cos_sin;
    float *logits;
    const int32_t *slot_mapping, *seq_lens, *block_tables, *block_table_start;
    uint32_t *header;   /* error, epoch */
    uint32_t *exchange; /* (2, ll.words) */
    uint2 *partials;    /* accumulators (2, num_heads, max_splits, head_dim), then m and l (.., 2) */
    int64_t partials_half, partials_ml; /* pairs */
    int32_t num_layers, hidden_size, act_size, num_heads, num_kv_heads, block_size, max_splits;
    float eps, scale_log2;
    bool bulk;
    long long *stamps; /* see decode_step.cuh, or NULL */
    int32_t q_size;
    int32_t first_slot[QF_DECODE_KINDS]; /* of this rank's results: o's and down's are behind those of the ranks before */
    qf_cuda_peers peers;    /* num_ranks 0: alone, and what follows is not used */
    int64_t rows_at;        /* bytes from a region's start to o's and down's sums: (2, row_words) */
    qf_decode_rows rows[2]; /* o, down */
    int32_t row_words;
    bool few[2]; /* o, down: few enough slots and rows long enough for four vectors of two slots at a time */
};

template <typename cut> static inline __host__ __device__ int qf_decode_range_begin(const cut &l, int split)
{
    return l.kb * split / l.splits;
}
/* Which part of a range has a block. */
static inline __host__ __device__ int qf_decode_part_of(int v, int parts, int blocks)
{
    return ((v + 1) * parts - 1) / blocks;
}

/* Bit `slot` is set where the row tile, of `tiles`, has a result. */
template <typename cut>
static inline __host__ __device__ uint32_t qf_decode_slot_mask(const cut &l, int tiles, int tile)
{
    uint32_t mask = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (int s = 0; s < l.splits; s++) {
        int kbs = qf_decode_range_begin(l, s + 1) - qf_decode_range_begin(l, s), blocks = tiles * kbs;
        int first = qf_decode_part_of(tile * kbs, l.parts, blocks);
        int last = qf_decode_part_of(tile * kbs + kbs - 1, l.parts, blocks);
        mask |= ((1u << (last - first + 1)) - 1u) << (s * l.max_pieces);
    }
    return mask;
}

/* ---- host ------------------------------------------------------------------------------------------------------ */

static inline int qf_decode_max(int a, int b) { return a > b ? a : b; }
static inline int qf_decode_min(int a, int b) { return a < b ? a : b; }

static inline int qf_decode_range_blocks(const qf_decode_linear *l)
{
    return (l->kb + l->splits - 1) / l->splits;
}

/* Row tiles that one part can touch. */
static inline int qf_decode_local_tiles(const qf_decode_linear *l)
{
    int kbs = l->kb / l->splits, run = (l->tiles * qf_decode_range_blocks(l) + l->parts - 1) / l->parts;
    return qf_decode_min(l->tiles, (run + kbs - 2) / kbs + 1);
}

static inline void qf_decode_plan_weight(const qf_cuda_weight *w, qf_decode_linear *l)
{
    *l = qf_decode_linear{};
    l->tiles = w->n / 16;
    l->kb = w->k / 128;
    l->n = w->n;
    l->bits = w->bits;
    l->splits = l->parts = l->max_pieces = 1;
    if (w->bits != 16) {
        l->scale_bytes = 64;
    }
}

/* The most pieces that a row tile has in one range. */
static inline int qf_decode_most_pieces(const qf_decode_linear *l)
{
    int most = 1;
    for (int s = 0; s < l->splits; s++) {
        int k = qf_decode_range_begin(*l, s + 1) - qf_decode_range_begin(*l, s), blocks = l->tiles * k;
        for (int tile = 0; tile < l->tiles; tile++) {
            int pieces = qf_decode_part_of(tile * k + k - 1, l->parts, blocks) -
                         qf_decode_part_of(tile * k, l->parts, blocks) + 1;
            most = qf_decode_max(most, pieces);
        }
    }
    return most;
}

/* Cuts a linear whose results are partial sums. Short runs end at tile boundaries, or at equal shares of tiles, and so
 * does what that makes little longer, so that few pieces arise, and what would else be cut in more than two; others are all
 * equally long. ranks: others' pieces come on top, and a fifth longer is still worth it (7B, down, 2 ranks: 1,047 us a step
 * instead of 1,057). */
static inline void qf_decode_plan_parts(qf_decode_linear *l, int splits, int grid, bool ranks)
{
    l->splits = splits;
    int kbs = l->kb / splits, room = grid / splits;
    int each = (l->tiles + room - 1) / room; /* whole tiles */
    const int even = l->tiles * kbs / room, more = ranks ? qf_decode_max(12, even / 5) : 12;
    if (l->tiles % each == 0 && each * kbs <= even + more) {
        l->parts = l->tiles / each;
    } else if (l->tiles > room || l->tiles * kbs >= 32 * room) {
        l->parts = qf_decode_min(room, l->tiles * kbs);
    } else {
        l->parts = l->tiles * qf_decode_max(1, qf_decode_min(qf_decode_min(room / l->tiles, kbs / 16), 2));
    }
    l->max_pieces = qf_decode_most_pieces(l);
    if (l->max_pieces > 2 && l->tiles <= room) {
        l->parts = l->tiles * qf_decode_min(room / l->tiles, 2);
        l->max_pieces = qf_decode_most_pieces(l);
    }
}

/* Floats of a row tile in `red` (16 more against bank conflicts). */
#define QF_DECODE_TILE_FLOATS (QF_DECODE_WARPS * 16 + 16)

/* Of struct qf_decode_attention_shared. */
static inline __host__ __device__ constexpr int qf_decode_attention_bytes(int head_dim)
{
    return 8 * (head_dim + 8) * 2 + 2 * head_dim * 2 + 512 / head_dim * 8 * (head_dim + 8) * 4 + 8 * 8 * 8;
}

static inline int qf_decode_align(int bytes) { return (bytes + 127) / 128 * 128; }

/* Places everything in shared memory; false if fewer than two ring stages fit. */
static inline bool qf_decode_plan_shared(const qf_decode_params *p, int head_dim, int max_shared,
                                         qf_decode_shared_map *m)
{
    const qf_decode_linear *l = p->linear;
    int at = 1024; /* barriers, phases, attention's items, flags */
    m->layers = at;
    at = qf_decode_align(at + (p->num_layers + 1) * (int)sizeof(qf_decode_layer_entry));
    m->rope = at;
    at += head_dim * 4;
    m->squares = at;
    at = qf_decode_align(at + 2 * (p->hidden_size / 128 + 1) * 4);
    m->masks = at;
    at = qf_decode_align(at + l[QF_DECODE_QKV].tiles + p->rows[0].groups * l[QF_DECODE_O].tiles +
                         p->rows[1].groups * l[QF_DECODE_DOWN].tiles);
    m->saved_o = at;
    at += qf_decode_local_tiles(&l[QF_DECODE_O]) * 64;
    m->saved_down = at;
    at = qf_decode_align(at + qf_decode_local_tiles(&l[QF_DECODE_DOWN]) * 64);
    m->red_tiles = (l[QF_DECODE_GATE_UP].tiles + l[QF_DECODE_GATE_UP].parts - 1) / l[QF_DECODE_GATE_UP].parts;
    m->red_tiles = qf_decode_max(qf_decode_max(m->red_tiles, qf_decode_local_tiles(&l[QF_DECODE_QKV])),
                                 qf_decode_max(qf_decode_local_tiles(&l[QF_DECODE_O]),
                                               qf_decode_local_tiles(&l[QF_DECODE_DOWN])));
    m->x = at;
    int x_blocks = qf_decode_max(l[QF_DECODE_QKV].kb, l[QF_DECODE_O].kb);
    x_blocks = qf_decode_max(x_blocks, qf_decode_range_blocks(&l[QF_DECODE_DOWN]));
    m->sums = m->x + x_blocks * 256;
    at = qf_decode_align(m->x + qf_decode_max(x_blocks * (256 + 4), qf_decode_attention_bytes(head_dim)));
    m->stage_bytes = QF_DECODE_CHUNK_UNITS * (1024 + 64);
    m->red = at; /* and what no stage would fill, for the head */
    at = qf_decode_align(at + m->red_tiles * QF_DECODE_TILE_FLOATS * 4);
    m->stages = qf_decode_min((max_shared - at) / m->stage_bytes, QF_DECODE_MAX_STAGES);
    const int room = max_shared - at - m->stages * m->stage_bytes - 128, tile_bytes = QF_DECODE_TILE_FLOATS * 4;
    const int wanted = qf_decode_local_tiles(&l[QF_DECODE_HEAD]) - m->red_tiles;
    const int more = qf_decode_max(0, qf_decode_min(room / tile_bytes, wanted));
    m->red_tiles += more;
    at = qf_decode_align(at + more * tile_bytes);
    m->ring = at;
    m->total = at + m->stages * m->stage_bytes;
    return m->stages >= 2;
}

/* ---- what is supported ------------------------------------------------------------------------------------------ */

static inline bool qf_decode_weight_ok(const qf_cuda_weight *w, int n, int k, bool layer, bool bias)
{
    return w->data != nullptr && w->perm == nullptr && (bias || w->bias == nullptr) && w->n == n && w->k == k &&
           n % 16 == 0 && k % 128 == 0 && (w->bits == 4 || w->bits == 8 || w->bits == 16) &&
           (w->bits == 16 || (w->scales != nullptr && (uintptr_t)w->scales % 16 == 0 && w->group_size == 128)) &&
           (uintptr_t)w->data % 16 == 0 && (!layer || w->bits == 4);
}

/* Shapes and formats; what the plan cannot do is found by the plan. One sequence, layers of 4 bits, and groups of 128:
 * what gains most, and all that one instruction cache holds (see decode_step.cu). */
static inline bool qf_decode_shapes_ok(const qf_cuda_decode_args *a)
{
    if (a->host_layers == nullptr || a->layers == nullptr || a->num_layers < 1 || a->num_seqs != 1 ||
        (a->head_dim != 64 && a->head_dim != 128) || a->num_kv_heads < 1 ||
        a->num_heads % a->num_kv_heads != 0 || a->num_heads / a->num_kv_heads > 8 || a->hidden_size < 256 ||
        a->hidden_size % 128 != 0 || a->intermediate_size < 1 || a->block_size < 16 || a->block_size > 256 ||
        (a->block_size & (a->block_size - 1)) != 0) {
        return false;
    }
    const qf_cuda_decode_layer *first = a->host_layers;
    int act = (a->intermediate_size + 7) / 8 * 8, other = first->sliding_window;
    for (int i = 0; i < a->num_layers; i++) {
        const qf_cuda_decode_layer *l = a->host_layers + i;
        if (!qf_decode_weight_ok(&l->qkv, (a->num_heads + 2 * a->num_kv_heads) * a->head_dim,
                                 a->hidden_size, true, true) ||
            !qf_decode_weight_ok(&l->o, a->hidden_size, (a->num_heads * a->head_dim + 127) / 128 * 128, true, false) ||
            !qf_decode_weight_ok(&l->gate_up, 2 * act, a->hidden_size, true, false) ||
            !qf_decode_weight_ok(&l->down, a->hidden_size, (act + 127) / 128 * 128, true, false) ||
            l->k == nullptr || l->v == nullptr || l->input_norm == nullptr || l->post_attention_norm == nullptr) {
            return false;
        }
        if (l->sliding_window != first->sliding_window) { /* at most two different ones */
            if (other != first->sliding_window && other != l->sliding_window) {
                return false;
            }
            other = l->sliding_window;
        }
    }
    return a->final_norm != nullptr && qf_decode_weight_ok(&a->head, a->head.n, a->hidden_size, false, false);
}

/* What one rank's sums of o or down are, as others see it. */
static inline qf_cuda_decode_cut qf_decode_cut_of(const qf_decode_linear *l)
{
    return qf_cuda_decode_cut{l->kb, l->splits, l->parts, l->max_pieces};
}

/* The slots of all ranks' sums, in order of rank. False if others take this rank to be cut in another way, or there is not
 * room enough. */
static inline bool qf_decode_plan_ranks(const qf_cuda_decode_args *a, qf_decode_params *p)
{
    p->peers = *a->peers;
    p->rows_at = (int64_t)qf_peer_decode_at(a->peers->exchange_bytes);
    p->row_words = 0;
    for (int which = 0; which < 2; which++) {
        const int kind = which == 0 ? QF_DECODE_O : QF_DECODE_DOWN;
        const qf_cuda_decode_cut own = qf_decode_cut_of(&p->linear[kind]);
        qf_decode_rows *rows = &p->rows[which];
        int slots = 0;
        for (int r = 0; r < a->peers->num_ranks; r++) {
            const qf_cuda_decode_rank *rank = a->ranks + r;
            rows->cut[r] = which == 0 ? rank->o : rank->down;
            rows->first_slot[r] = slots;
            slots += rows->cut[r].splits * rows->cut[r].max_pieces;
            if (!rank->supported || rank->num_layers != a->num_layers || rank->hidden_size != a->hidden_size) {
                return false;
            }
        }
        rows->first_slot[a->peers->num_ranks] = slots;
        rows->groups = (slots + 3) / 4;
        p->first_slot[kind] = rows->first_slot[a->peers->rank];
        if (memcmp(&own, &rows->cut[a->peers->rank], sizeof own) != 0) {
            return false;
        }
        if (slots > QF_DECODE_MAX_SLOTS) {
            return false;
        }
        *(which == 0 ? &p->ll.o : &p->ll.down) = p->row_words;
        p->row_words += slots * a->hidden_size;
    }
    return 2 * sizeof(uint32_t) * (size_t)p->row_words <= QF_PEER_DECODE_BYTES;
}

/* Everything but the pointers. False if it cannot be done. ranks: the GPU is one of several, whose peers may be NULL as
 * yet. */
static inline bool qf_decode_plan(const qf_cuda_decode_args *a, const qf_cuda_device *device, int down_splits, bool ranks,
                                  qf_decode_params *p)
{
    *p = qf_decode_params{};
    const qf_cuda_weight *weights[QF_DECODE_KINDS] = {&a->host_layers->qkv, &a->host_layers->o,
                                                      &a->host_layers->gate_up, &a->host_layers->down, &a->head};
    for (int i = 0; i < QF_DECODE_KINDS; i++) {
        qf_decode_plan_weight(weights[i], &p->linear[i]);
    }
    qf_decode_linear *l = p->linear;
    int grid = qf_decode_min(device->sm_count, qf_decode_min(l[QF_DECODE_GATE_UP].tiles, l[QF_DECODE_HEAD].tiles));
    p->num_layers = a->num_layers;
    p->hidden_size = a->hidden_size;
    p->act_size = l[QF_DECODE_GATE_UP].n / 2;
    p->num_heads = a->num_heads;
    p->num_kv_heads = a->num_kv_heads;
    p->q_size = a->num_heads * a->head_dim;
    p->block_size = a->block_size;
    p->eps = a->eps;
    p->scale_log2 = a->scale * 1.44269504f;
    p->max_splits = qf_decode_min(QF_DECODE_MAX_SPLITS, grid / a->num_kv_heads); /* an item a CTA at most */
    /* Few k ranges make every CTA gather more of act, many make it gather more sums; and x has to fit. */
    int splits = down_splits, kb = l[QF_DECODE_DOWN].kb;
    if (splits == 0) {
        splits = p->act_size > 3 * p->hidden_size ? 2 : 1;
        while (splits < 4 && ((kb + splits - 1) / splits) * 256 > 80 * 1024) {
            splits *= 2;
        }
    }
    if (p->max_splits < 1 || splits > grid || kb < 2 * splits || l[QF_DECODE_O].kb < 2) {
        return false;
    }
    qf_decode_plan_parts(&l[QF_DECODE_QKV], 1, grid, false);
    qf_decode_plan_parts(&l[QF_DECODE_O], 1, grid, ranks);
    qf_decode_plan_parts(&l[QF_DECODE_DOWN], splits, grid, ranks);
    l[QF_DECODE_GATE_UP].parts = l[QF_DECODE_HEAD].parts = grid;
    l[QF_DECODE_GATE_UP].by_tile = l[QF_DECODE_HEAD].by_tile = 1;
    l[QF_DECODE_O].rotation = l[QF_DECODE_QKV].parts % grid;
    l[QF_DECODE_DOWN].rotation = (l[QF_DECODE_QKV].parts + l[QF_DECODE_O].parts) % grid;
    const int slots[3] = {l[QF_DECODE_QKV].max_pieces, l[QF_DECODE_O].max_pieces,
                          splits * l[QF_DECODE_DOWN].max_pieces};
    /* as many as a thread asks for at once, and qkv's biases in one round */
    if (slots[0] > 2 || slots[1] > 4 || slots[2] > 4 ||
        qf_decode_local_tiles(&l[QF_DECODE_QKV]) * 16 > QF_DECODE_WARPS * 32) {
        return false;
    }
    const int sizes[5] = {slots[0] * l[QF_DECODE_QKV].n, a->num_heads * a->head_dim, slots[1] * a->hidden_size,
                          p->act_size, slots[2] * a->hidden_size};
    int32_t *at[5] = {&p->ll.qkv, &p->ll.attention, &p->ll.o, &p->ll.act, &p->ll.down};
    for (int i = 0; i < 5; i++) {
        *at[i] = p->ll.words;
        p->ll.words += (sizes[i] + 31) / 32 * 32;
    }
    p->partials_ml = (int64_t)a->num_heads * p->max_splits * a->head_dim;
    p->partials_half = p->partials_ml + (int64_t)a->num_heads * p->max_splits * 2;
    p->rows[0].groups = p->rows[1].groups = 1;
    if (a->peers != nullptr && !qf_decode_plan_ranks(a, p)) {
        return false;
    }
    for (int which = 0; which < 2; which++) {
        const int all = a->peers != nullptr ? p->rows[which].first_slot[a->peers->num_ranks] : slots[1 + which];
        p->few[which] = all <= 2 && a->hidden_size / 4 > 2 * QF_DECODE_WARPS * 32;
    }
    return qf_decode_plan_shared(p, a->head_dim, device->max_shared_bytes, &p->map);
}

#endif
