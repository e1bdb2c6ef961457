/* Attention over the paged cache: which thread does which rows and splits. The arithmetic and the cache layout are
 * in attention_body.h.
 *
 * An item is up to 8 (token, head) rows of one sequence and one KV head; heads of a token come first, so that a
 * group of query heads shares each load of K and V. Where the items are fewer than the threads could use (decode of
 * few, long sequences), each 512-position split of an item becomes its own task and the partials are merged in a
 * second pass, in the same order as one thread would have merged them. */
#include "backend/cpu/kernels.h"

#include <string.h>

typedef struct attention_task {
    qf_cpu_context *ctx;
    const qf_attention_args *args;
    int32_t group;        /* query heads per KV head */
    int32_t num_splits;   /* of the longest sequence; only for the split form */
} attention_task;

typedef struct attention_item {
    int32_t seq, kv_head, row; /* row: first one, in (token, head of the group) order */
    int32_t num_rows;
} attention_item;

static int32_t items_of_seq(const attention_task *task, int32_t seq)
{
    const int32_t tokens = task->args->query_start_loc[seq + 1] - task->args->query_start_loc[seq];
    const int32_t blocks = (tokens * task->group + QF_ATTENTION_ROWS - 1) / QF_ATTENTION_ROWS;
    return blocks * task->args->cache.num_kv_heads;
}

/* The long items of a prompt come first, so that no thread is left with the longest at the end. */
static attention_item find_item(const attention_task *task, int64_t index)
{
    attention_item item = {0, 0, 0, 0};
    while (index >= items_of_seq(task, item.seq)) {
        index -= items_of_seq(task, item.seq);
        item.seq++;
    }
    const int32_t kv_heads = task->args->cache.num_kv_heads;
    const int32_t blocks = items_of_seq(task, item.seq) / kv_heads;
    const int32_t tokens = task->args->query_start_loc[item.seq + 1] - task->args->query_start_loc[item.seq];
    item.kv_head = (int32_t)(index % kv_heads);
    item.row = (blocks - 1 - (int32_t)(index / kv_heads)) * QF_ATTENTION_ROWS;
    const int32_t left = tokens * task->group - item.row;
    item.num_rows = left < QF_ATTENTION_ROWS ? left : QF_ATTENTION_ROWS;
    return item;
}

/* Element offset of row r of the item in q and out. */
static size_t row_offset(const attention_task *task, const attention_item *item, int32_t r)
{
    const qf_attention_args *a = task->args;
    const int32_t token = a->query_start_loc[item->seq] + (item->row + r) / task->group;
    const int32_t head = item->kv_head * task->group + (item->row + r) % task->group;
    return ((size_t)token * (size_t)a->num_heads + (size_t)head) * (size_t)a->cache.head_dim;
}

/* Gathers the item's scaled queries as (head_dim, num_rows) and each row's range of positions. */
static void load_rows(const attention_task *task, const attention_item *item, qf_attention_rows *rows,
                      qf_attention_scratch *scratch)
{
    const qf_attention_args *a = task->args;
    const int32_t tokens = a->query_start_loc[item->seq + 1] - a->query_start_loc[item->seq];
    rows->num_rows = item->num_rows;
    rows->kv_head = item->kv_head;
    rows->block_table = a->block_tables + (size_t)item->seq * (size_t)a->block_table_stride;
    rows->first_block = 0;
    rows->window_table = NULL;
    rows->window_first_block = 0;
    if (a->window.k != NULL) {
        rows->window_table = a->window_tables + (size_t)item->seq * (size_t)a->window_table_stride;
        rows->window_first_block = a->window_first_block[item->seq];
    }
    const int32_t window_start = rows->window_first_block * a->cache.block_size;
    for (int32_t r = 0; r < item->num_rows; r++) {
        const float *q = a->q + row_offset(task, item, r);
        for (int32_t d = 0; d < a->cache.head_dim; d++) {
            scratch->q[d * item->num_rows + r] = q[d] * a->scale;
        }
        rows->end[r] = a->seq_lens[item->seq] - tokens + (item->row + r) / task->group + 1;
        const int32_t window = a->sliding_window;
        rows->first[r] = window > 0 && rows->end[r] > window ? rows->end[r] - window : 0;
        rows->recent[r] = rows->end[r];
        if (rows->window_table != NULL) {
            const int32_t recent = rows->end[r] - a->window_tokens;
            rows->recent[r] = recent > window_start ? recent : window_start;
        }
    }
}

static void positions_seen(const qf_attention_rows *rows, int32_t *first, int32_t *end)
{
    *first = rows->first[0];
    *end = rows->end[0];
    for (int32_t r = 1; r < rows->num_rows; r++) {
        *first = rows->first[r] < *first ? rows->first[r] : *first;
        *end = rows->end[r] > *end ? rows->end[r] : *end;
    }
}

static bool row_sees(const qf_attention_rows *rows, int32_t r, int32_t begin, int32_t end)
{
    return rows->first[r] < end && rows->end[r] > begin;
}

static void copy_partial(qf_attention_partial *to, const qf_attention_partial *from, int32_t head_dim)
{
    to->max = from->max;
    to->sum = from->sum;
    memcpy(to->acc, from->acc, (size_t)head_dim * sizeof(float));
}

static void whole_items(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    const attention_task *task = arg;
    const qf_attention_args *a = task->args;
    const qf_cpu_kernels *kernels = task->ctx->kernels;
    const int32_t head_dim = a->cache.head_dim;
    qf_attention_scratch *scratch = &task->ctx->attention_scratch[worker];
    qf_attention_rows rows;
    for (int64_t index = begin; index < end; index++) {
        const attention_item item = find_item(task, index);
        load_rows(task, &item, &rows, scratch);
        int32_t first, last;
        bool started[QF_ATTENTION_ROWS] = {false};
        positions_seen(&rows, &first, &last);
        for (int32_t split = first / QF_SPLIT_TOKENS * QF_SPLIT_TOKENS; split < last; split += QF_SPLIT_TOKENS) {
            kernels->attention_split(a, &rows, scratch, split, split + QF_SPLIT_TOKENS);
            for (int32_t r = 0; r < rows.num_rows; r++) {
                if (!row_sees(&rows, r, split, split + QF_SPLIT_TOKENS)) {
                    continue;
                }
                if (started[r]) {
                    kernels->attention_merge(&scratch->total[r], &scratch->part[r], head_dim);
                } else {
                    copy_partial(&scratch->total[r], &scratch->part[r], head_dim);
                    started[r] = true;
                }
            }
        }
        for (int32_t r = 0; r < rows.num_rows; r++) {
            kernels->attention_finish(&scratch->total[r], a->out + row_offset(task, &item, r), head_dim);
        }
    }
}

/* --- the split form: partials (item, split, row) --------------------------------------------------------- */

static qf_attention_partial *partial_at(const attention_task *task, int64_t item, int32_t split)
{
    return task->ctx->attention_partials + ((size_t)item * (size_t)task->num_splits + (size_t)split) * QF_ATTENTION_ROWS;
}

static void split_items(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    const attention_task *task = arg;
    const qf_attention_args *a = task->args;
    qf_attention_scratch *scratch = &task->ctx->attention_scratch[worker];
    qf_attention_rows rows;
    for (int64_t index = begin; index < end; index++) {
        const int64_t item_index = index / task->num_splits;
        const int32_t split = (int32_t)(index % task->num_splits);
        const int32_t from = split * QF_SPLIT_TOKENS;
        const attention_item item = find_item(task, item_index);
        load_rows(task, &item, &rows, scratch);
        task->ctx->kernels->attention_split(a, &rows, scratch, from, from + QF_SPLIT_TOKENS);
        for (int32_t r = 0; r < rows.num_rows; r++) {
            if (row_sees(&rows, r, from, from + QF_SPLIT_TOKENS)) {
                copy_partial(partial_at(task, item_index, split) + r, &scratch->part[r], a->cache.head_dim);
            }
        }
    }
}

static void merge_items(const attention_task *task, int64_t num_items)
{
    const qf_attention_args *a = task->args;
    const qf_cpu_kernels *kernels = task->ctx->kernels;
    qf_attention_rows rows;
    for (int64_t index = 0; index < num_items; index++) {
        const attention_item item = find_item(task, index);
        load_rows(task, &item, &rows, &task->ctx->attention_scratch[0]);
        for (int32_t r = 0; r < rows.num_rows; r++) {
            const int32_t first = rows.first[r] / QF_SPLIT_TOKENS;
            qf_attention_partial *total = partial_at(task, index, first) + r;
            for (int32_t split = first + 1; split * QF_SPLIT_TOKENS < rows.end[r]; split++) {
                kernels->attention_merge(total, partial_at(task, index, split) + r, a->cache.head_dim);
            }
            kernels->attention_finish(total, a->out + row_offset(task, &item, r), a->cache.head_dim);
        }
    }
}

void qf_cpu_attention(qf_cpu_context *ctx, const qf_attention_args *args)
{
    attention_task task = {ctx, args, args->num_heads / args->cache.num_kv_heads, 0};
    int64_t num_items = 0, positions = 0;
    int32_t longest = 0;
    for (int32_t seq = 0; seq < args->num_seqs; seq++) {
        const int32_t items = items_of_seq(&task, seq);
        num_items += items;
        positions += (int64_t)items * args->seq_lens[seq];
        longest = args->seq_lens[seq] > longest ? args->seq_lens[seq] : longest;
    }
    task.num_splits = (longest + QF_SPLIT_TOKENS - 1) / QF_SPLIT_TOKENS;
    if (ctx->num_threads == 1 || positions * args->cache.head_dim <= QF_INLINE_ELEMENTS) {
        whole_items(&task, 0, num_items, 0);
    } else if (task.num_splits > 1 && num_items < 4 * (int64_t)ctx->num_threads &&
               num_items * task.num_splits * QF_ATTENTION_ROWS <= ctx->max_partials) {
        qf_thread_pool_run(ctx->pool, split_items, &task, num_items * task.num_splits, 1);
        merge_items(&task, num_items);
    } else {
        const int64_t grain = num_items / (16 * (int64_t)ctx->num_threads);
        qf_thread_pool_run(ctx->pool, whole_items, &task, num_items, grain > 1 ? grain : 1);
    }
}
