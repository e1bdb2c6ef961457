/* Cuts a batch's attention into items: pure, host only.
 *
 * A row tile is one decode row, or up to qf_attention_tile_tokens() rows of one sequence. It sees the positions from
 * the first row's window to its last row, and is one item; or, where the batch alone gives the device too little to do,
 * one item for each chunk of positions, whose partial results take rows x chunks units of the workspace. Chunks start
 * at multiples of their size, a multiple of QF_CUDA_SPLIT_TOKENS (prefill) or QF_ATTENTION_DECODE_TOKENS (decode rows).
 *
 * batch_invariant: every row is a row of a prefill tile, and each QF_CUDA_SPLIT_TOKENS positions of it are computed
 * from scratch and merged in order: by the kernel, in one item, or by the last of several items, which is the same
 * arithmetic. So how a tile is cut does not show in its results.
 *
 * Bounds, with n sequences (d of them decode rows), t tokens, S = ceil(max_model_len / QF_ATTENTION_DECODE_TOKENS):
 *   tiles        <= min(t, t / tile + n):  ceil(r / tile) <= r, and < r / tile + 1, summed over sequences
 *   decode items <= 2 d + wave / num_kv_heads + 1:  the chunk grows until that holds; d is always reached
 *   prefill items <= tiles + MAX_SPLIT_ITEMS:  tiles left whole, and the items of cut ones, counted down
 *   items        <= tiles * S as well
 *   units        <= units_bound(n), counted down: decode items are at most 2 d + MAX_WAVE + 1 of them, and what is
 *                   left is given to prefill tiles as long as it suffices; and <= t * S.
 *
 * With a 16-bit window over a low-bit cache the positions that a decode row reads in 16 bits are one split more, the last,
 * in a list of its own; d more units. */
#include <stddef.h>

#include "attention_limits.h"
#include "qf_attention.h"

#define WORK_ITEMS 264      /* CTAs that keep a large device busy: two on each of 132 multiprocessors */
#define MAX_WAVE 768        /* bound of decode_ctas: SPARE_UNITS holds that many items and more */
#define SPARE_UNITS 1024    /* of the workspace, besides two for each sequence */
#define MAX_SPLIT_ITEMS 512 /* of prefill tiles */
/* What an item costs besides its positions, in positions: a CTA with a multiprocessor to itself, and one of two. */
#define WHOLE_SM_ITEM 384
#define HALF_SM_ITEM 64
#define MIN_BUSY_CHUNK (4 * QF_CUDA_SPLIT_TOKENS)    /* decode, where the rows alone are enough work */
#define MIN_PREFILL_CHUNK (2 * QF_CUDA_SPLIT_TOKENS) /* what pays for writing and merging partial results */
#define ROUND_TOKENS 512 /* a stage of 4-bit keys and values for each of 16 warps, two of 8-bit ones */
#define NUM_BUCKETS 64

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }
static int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
static int32_t ceil_div(int32_t a, int32_t b) { return (int32_t)(((int64_t)a + b - 1) / b); }
static int32_t round_up(int32_t a, int32_t unit) { return ceil_div(a, unit) * unit; }

static int64_t units_bound(const qf_cuda_attention_shape *shape, int32_t num_seqs)
{
    return SPARE_UNITS + (shape->kv_window > 0 ? 3 : 2) * (int64_t)num_seqs;
}

/* CTAs of decode items that make one wave. */
static int32_t decode_wave(const qf_cuda_attention_shape *shape)
{
    return shape->decode_ctas > 0 ? min_i32(shape->decode_ctas, MAX_WAVE) : WORK_ITEMS;
}

static int64_t decode_items_bound(const qf_cuda_attention_shape *shape, int32_t num_rows)
{
    return 2 * (int64_t)num_rows + decode_wave(shape) / shape->num_kv_heads + 1;
}

typedef struct planner {
    const qf_cuda_attention_shape *shape;
    int32_t num_seqs;
    const int32_t *query_start_loc, *seq_lens;
    bool batch_invariant;
    int32_t tile_tokens;
    int32_t decode_chunk, prefill_chunk; /* prefill_chunk 0: no tile is cut */
    int32_t longest_decode, longest_prefill; /* positions of an item, at most */
    /* The items are made twice: to count how many are how long, and to put them in order, long ones first. */
    qf_cuda_attention_item *items; /* NULL: count */
    int32_t decode_at[NUM_BUCKETS], prefill_at[NUM_BUCKETS];
    int32_t partials, counters, split_items;
    const int32_t *window_first;          /* (num_seqs), or NULL: no items of a window */
    qf_cuda_attention_item *window_items; /* (num_seqs) */
    int32_t num_window_items;
} planner;

static bool is_decode(const planner *p, int32_t seq)
{
    return !p->batch_invariant && p->shape->decode_ctas >= 0 && (p->shape->kv_window == 0 || p->window_first != NULL) &&
           p->query_start_loc[seq + 1] - p->query_start_loc[seq] == 1;
}

/* Rows first .. first + num - 1 of the sequence, counted within the batch's rows of it. */
static qf_cuda_attention_item tile_of(const planner *p, int32_t seq, int32_t first, int32_t num)
{
    int32_t start = p->query_start_loc[seq];
    int32_t position = p->seq_lens[seq] - (p->query_start_loc[seq + 1] - start) + first;
    int32_t window = p->shape->sliding_window;
    return (qf_cuda_attention_item){.seq = seq,
                                    .first_row = start + first,
                                    .num_rows = num,
                                    .first_position = position,
                                    .kv_begin = window > 0 ? max_i32(position - window + 1, 0) : 0,
                                    .kv_end = position + num,
                                    .num_splits = 1};
}

/* The tile of a decode row; of a row with a window, what it reads in 16 bits is left out: perhaps nothing remains. */
static qf_cuda_attention_item decode_tile(const planner *p, int32_t seq)
{
    qf_cuda_attention_item tile = tile_of(p, seq, 0, 1);
    if (p->window_first != NULL) {
        int32_t border = max_i32(tile.kv_end - p->shape->kv_window, p->window_first[seq]);
        tile.kv_end = max_i32(tile.kv_begin, min_i32(border, tile.kv_end - 1));
    }
    return tile;
}

static int32_t num_chunks(const qf_cuda_attention_item *tile, int32_t chunk)
{
    return ceil_div(tile->kv_end, chunk) - tile->kv_begin / chunk;
}

static void emit(planner *p, const qf_cuda_attention_item *item, bool decode)
{
    int32_t longest = decode ? p->longest_decode : p->longest_prefill;
    int64_t length = item->kv_end - item->kv_begin;
    int32_t bucket = NUM_BUCKETS - 1 - (int32_t)((length - 1) * NUM_BUCKETS / longest);
    int32_t *at = decode ? p->decode_at : p->prefill_at;
    if (p->items != NULL) {
        p->items[at[bucket]] = *item;
    }
    at[bucket]++;
}

static void emit_tile(planner *p, const qf_cuda_attention_item *tile, int32_t chunk, bool decode)
{
    int32_t count = chunk > 0 ? num_chunks(tile, chunk) : 1;
    int64_t left = units_bound(p->shape, p->num_seqs) - p->partials;
    bool cut = count > 1 && (int64_t)count * tile->num_rows <= left &&
               (decode || p->split_items + count <= MAX_SPLIT_ITEMS);
    if (!cut) {
        emit(p, tile, decode);
        return;
    }
    int32_t first = tile->kv_begin / chunk;
    for (int32_t i = 0; i < count; i++) {
        qf_cuda_attention_item item = *tile;
        item.split = i;
        item.num_splits = count;
        item.partial = p->partials;
        item.counter = p->partials;
        item.kv_begin = max_i32(tile->kv_begin, (first + i) * chunk);
        item.kv_end = (int32_t)min_i64(tile->kv_end, (int64_t)(first + i + 1) * chunk);
        emit(p, &item, decode);
    }
    p->partials += count * tile->num_rows;
    p->counters++;
    p->split_items += decode ? 0 : count;
}

/* A decode row with a window: its splits of the low-bit cache, and the last one, of the 16-bit one. */
static void emit_with_window(planner *p, const qf_cuda_attention_item *low, const qf_cuda_attention_item *all)
{
    int32_t count = low->kv_begin < low->kv_end ? num_chunks(low, p->decode_chunk) : 0;
    int32_t first = low->kv_begin / p->decode_chunk;
    qf_cuda_attention_item item = *all;
    item.num_splits = count + 1;
    item.partial = item.counter = p->partials;
    for (int32_t i = 0; i < count; i++) {
        item.split = i;
        item.kv_begin = max_i32(low->kv_begin, (first + i) * p->decode_chunk);
        item.kv_end = (int32_t)min_i64(low->kv_end, (int64_t)(first + i + 1) * p->decode_chunk);
        emit(p, &item, true);
    }
    item.split = count;
    item.kv_begin = low->kv_end;
    item.kv_end = all->kv_end;
    p->window_items[p->num_window_items++] = item;
    if (count > 0) {
        p->partials += count + 1;
        p->counters++;
    }
}

static void emit_all(planner *p)
{
    p->partials = p->counters = p->split_items = p->num_window_items = 0;
    for (int32_t seq = 0; seq < p->num_seqs; seq++) { /* decode first: their units are set aside */
        if (!is_decode(p, seq)) {
            continue;
        }
        qf_cuda_attention_item tile = decode_tile(p, seq);
        if (p->window_first != NULL) {
            qf_cuda_attention_item all = tile_of(p, seq, 0, 1);
            emit_with_window(p, &tile, &all);
        } else {
            emit_tile(p, &tile, p->decode_chunk, true);
        }
    }
    for (int32_t seq = 0; seq < p->num_seqs; seq++) {
        int32_t rows = p->query_start_loc[seq + 1] - p->query_start_loc[seq];
        for (int32_t first = 0; !is_decode(p, seq) && first < rows; first += p->tile_tokens) {
            qf_cuda_attention_item tile = tile_of(p, seq, first, min_i32(rows - first, p->tile_tokens));
            emit_tile(p, &tile, p->prefill_chunk, false);
        }
    }
}

/* Into how many equal items is a row of `length` positions best cut? So that the waves of CTAs that all rows' items make
 * are over soonest, an item taking as long as its positions and what starting and ending it costs. */
static int32_t chunk_of_waves(int64_t length, int64_t ctas, int64_t wave, int64_t most)
{
    int64_t fixed = wave < WORK_ITEMS ? WHOLE_SM_ITEM : HALF_SM_ITEM, best = 1, best_cost = INT64_MAX;
    for (int64_t splits = 1; splits <= most && (splits - 1) * QF_ATTENTION_DECODE_TOKENS < length; splits++) {
        int64_t waves = (ctas * splits + wave - 1) / wave;
        int64_t cost = waves * (length / splits + fixed);
        if (cost < best_cost) {
            best = splits;
            best_cost = cost;
        }
    }
    /* A little more than equal, so that rows of about that length are cut into no more. */
    return round_up((int32_t)(length * 33 / (32 * best) + 1), QF_ATTENTION_DECODE_TOKENS);
}

/* Decode items of chunks of this size. */
static int64_t count_decode_items(const planner *p, int32_t chunk)
{
    int64_t items = 0;
    for (int32_t seq = 0; seq < p->num_seqs; seq++) {
        if (is_decode(p, seq)) {
            qf_cuda_attention_item tile = decode_tile(p, seq);
            items += tile.kv_begin < tile.kv_end ? num_chunks(&tile, chunk) : 0;
        }
    }
    return items;
}

/* The smallest chunk that makes no more decode items than the bound, or the one that ends soonest. */
static void choose_decode_chunk(planner *p)
{
    int64_t positions = 0;
    int32_t rows = 0;
    for (int32_t seq = 0; seq < p->num_seqs; seq++) {
        if (is_decode(p, seq)) {
            qf_cuda_attention_item tile = decode_tile(p, seq);
            positions += tile.kv_end - tile.kv_begin;
            p->longest_decode = max_i32(p->longest_decode, tile.kv_end - tile.kv_begin);
            rows++;
        }
    }
    if (rows == 0) {
        return;
    }
    int64_t bound = decode_items_bound(p->shape, rows);
    int64_t ctas = (int64_t)rows * p->shape->num_kv_heads, wave = decode_wave(p->shape);
    int32_t chunk = ctas < wave ? MIN_BUSY_CHUNK / 2 : MIN_BUSY_CHUNK;
    if (p->shape->decode_ctas > 0) {
        chunk = chunk_of_waves(positions / rows + 1, ctas, wave, bound / rows);
        /* The warps of a CTA as large as a multiprocessor have a share of a chunk each: whole rounds of their stages. */
        int32_t whole = chunk / ROUND_TOKENS * ROUND_TOKENS;
        if (wave < WORK_ITEMS && whole >= 2 * ROUND_TOKENS &&
            count_decode_items(p, whole) * p->shape->num_kv_heads <= wave) {
            chunk = whole;
        }
    } else if (2 * ctas <= wave) {
        chunk = QF_ATTENTION_DECODE_TOKENS;
        bound = min_i64(bound, max_i64(wave / p->shape->num_kv_heads, rows));
    }
    chunk = max_i32(chunk, round_up((int32_t)(positions / bound), QF_ATTENTION_DECODE_TOKENS));
    while (count_decode_items(p, chunk) > bound) {
        chunk = round_up(chunk + chunk / 16 + 1, QF_ATTENTION_DECODE_TOKENS);
    }
    p->decode_chunk = chunk;
}

static void choose_prefill_chunk(planner *p)
{
    int64_t tiles = 0, total = 0;
    for (int32_t seq = 0; seq < p->num_seqs; seq++) {
        int32_t rows = p->query_start_loc[seq + 1] - p->query_start_loc[seq];
        for (int32_t first = 0; !is_decode(p, seq) && first < rows; first += p->tile_tokens) {
            qf_cuda_attention_item tile = tile_of(p, seq, first, min_i32(rows - first, p->tile_tokens));
            p->longest_prefill = max_i32(p->longest_prefill, tile.kv_end - tile.kv_begin);
            tiles++;
            total += tile.num_rows;
        }
    }
    p->prefill_chunk = 0;
    if (tiles == 0 || tiles * p->shape->num_kv_heads * 2 > WORK_ITEMS) {
        return;
    }
    /* Items of a tile: 2 or more for the device; and all tiles are cut, for one left whole takes longer than all. */
    int64_t wanted = WORK_ITEMS / (tiles * p->shape->num_kv_heads), units = SPARE_UNITS / 2 / total;
    wanted = wanted < units ? wanted : units;
    int32_t chunk = round_up(ceil_div(p->longest_prefill, wanted > 0 ? (int32_t)wanted : 1), QF_CUDA_SPLIT_TOKENS);
    p->prefill_chunk = p->batch_invariant ? QF_CUDA_SPLIT_TOKENS : max_i32(chunk, MIN_PREFILL_CHUNK);
}

/* Counts become places, from `first` on. Returns the place after the last. */
static int32_t place(int32_t *at, int32_t first)
{
    for (int32_t i = 0; i < NUM_BUCKETS; i++) {
        int32_t count = at[i];
        at[i] = first;
        first += count;
    }
    return first;
}

static void make(planner *p, qf_cuda_attention_item *items, qf_cuda_attention_plan *plan)
{
    const qf_cuda_attention_shape *shape = p->shape;
    p->tile_tokens = qf_attention_tile_tokens(shape->num_heads, shape->num_kv_heads, p->batch_invariant);
    choose_decode_chunk(p);
    choose_prefill_chunk(p);
    emit_all(p);
    plan->num_decode_items = place(p->decode_at, 0);
    plan->num_prefill_items = place(p->prefill_at, plan->num_decode_items) - plan->num_decode_items;
    p->items = items;
    emit_all(p);
    plan->num_partials = p->partials;
    plan->num_counters = p->counters;
    plan->num_window_items = p->num_window_items;
}

void qf_cuda_attention_plan_make(const qf_cuda_attention_shape *shape, int32_t num_seqs,
                                 const int32_t *query_start_loc, const int32_t *seq_lens, bool batch_invariant,
                                 qf_cuda_attention_item *items, qf_cuda_attention_plan *plan)
{
    planner p = {.shape = shape,
                 .num_seqs = num_seqs,
                 .query_start_loc = query_start_loc,
                 .seq_lens = seq_lens,
                 .batch_invariant = batch_invariant};
    make(&p, items, plan);
}

void qf_cuda_attention_plan_make_window(const qf_cuda_attention_shape *shape, int32_t num_seqs,
                                        const int32_t *query_start_loc, const int32_t *seq_lens,
                                        const int32_t *window_first, qf_cuda_attention_item *items,
                                        qf_cuda_attention_item *window_items, qf_cuda_attention_plan *plan)
{
    planner p = {.shape = shape,
                 .num_seqs = num_seqs,
                 .query_start_loc = query_start_loc,
                 .seq_lens = seq_lens,
                 .window_first = window_first,
                 .window_items = window_items};
    make(&p, items, plan);
}

static int64_t max_tiles(const qf_cuda_attention_shape *shape, int32_t max_num_seqs, int32_t max_num_batched_tokens)
{
    int32_t tile = qf_attention_tile_tokens(shape->num_heads, shape->num_kv_heads, true);
    return min_i64(max_num_batched_tokens, max_num_batched_tokens / tile + (int64_t)max_num_seqs);
}

int32_t qf_cuda_attention_max_items(const qf_cuda_attention_shape *shape, int32_t max_num_seqs,
                                    int32_t max_num_batched_tokens, int32_t max_model_len)
{
    int64_t tiles = max_tiles(shape, max_num_seqs, max_num_batched_tokens);
    int64_t cut = decode_items_bound(shape, max_num_seqs) + MAX_SPLIT_ITEMS;
    return (int32_t)min_i64(tiles + cut, tiles * ceil_div(max_model_len, QF_ATTENTION_DECODE_TOKENS));
}

size_t qf_cuda_attention_workspace_bytes(const qf_cuda_attention_shape *shape, int32_t max_num_seqs,
                                         int32_t max_num_batched_tokens, int32_t max_model_len)
{
    int64_t splits = ceil_div(max_model_len, QF_ATTENTION_DECODE_TOKENS);
    int64_t units = min_i64(units_bound(shape, max_num_seqs),
                            max_num_batched_tokens * (splits + (shape->kv_window > 0 ? 1 : 0)));
    return (size_t)units * sizeof(float) *
           (size_t)qf_attention_unit_words(shape->num_heads, shape->num_kv_heads, shape->head_dim);
}
