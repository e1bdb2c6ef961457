/* A step's metadata: one buffer, filled on the host and sent to the device in one piece (kernels/step_io.cu).
 *
 *   header | token_ids | positions | slot_mapping | query_start_loc | seq_lens | block_table_start | num_items | logit_rows |
 *   sample_rows | items | sliding items | block tables, bitmasks, biases as long as they are
 *
 * With a 16-bit window slots, tables and table starts stand there twice.
 *
 * The host's buffer holds what is in use and no more. On the device the lists of items have room for as many as there
 * can be, so that for given capacities a captured graph finds all parts but the last at constant addresses; the last is
 * reached by indices that count from the start of the device's buffer. */
#include <math.h>
#include <string.h>

#include "backend/cuda/cuda_backend.h"
#include "sample/state.h"

#define MAX_ROW_BIASES 128 /* stop tokens and logit biases; rows with more are sampled on the host */

static size_t align_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

static int32_t round_up(int32_t value, int32_t unit) { return (value + unit - 1) / unit * unit; }

static size_t table_stride(const qf_cuda_backend *self)
{
    return ((size_t)self->options.max_model_len + (size_t)self->options.block_size - 1) /
           (size_t)self->options.block_size;
}

static size_t mask_words(const qf_cuda_backend *self) { return ((size_t)self->vocab_size + 31) / 32; }

static int32_t items_bound(const qf_cuda_backend *self, int32_t num_seqs, int32_t num_tokens)
{
    if (self->options.float32) {
        return 0;
    }
    qf_cuda_attention_shape shape = qf_cuda_backend_attention_shape(self, false);
    return qf_cuda_attention_max_items(&shape, num_seqs, num_tokens, self->options.max_model_len);
}

void qf_cuda_meta_layout(const qf_cuda_backend *self, char *buffer, int32_t num_tokens, int32_t num_seqs,
                         int32_t num_rows, int32_t max_items, qf_cuda_meta *out)
{
    size_t at = 0;
    size_t tokens = (size_t)num_tokens, seqs = (size_t)num_seqs, rows = (size_t)num_rows;
    bool window = self->kv_window > 0;
    *out = (qf_cuda_meta){.num_tokens = num_tokens, .num_seqs = num_seqs, .num_rows = num_rows,
                          .max_items = max_items, .words = (int32_t *)(void *)buffer};
    struct {
        void **place;
        size_t bytes;
    } parts[] = {{(void **)&out->header, sizeof(qf_cuda_step_header)},
                 {(void **)&out->token_ids, tokens * sizeof(int32_t)},
                 {(void **)&out->positions, tokens * sizeof(int32_t)},
                 {(void **)&out->slot_mapping, tokens * sizeof(int32_t)},
                 {(void **)&out->window_slot_mapping, window ? tokens * sizeof(int32_t) : 0},
                 {(void **)&out->query_start_loc, (seqs + 1) * sizeof(int32_t)},
                 {(void **)&out->seq_lens, seqs * sizeof(int32_t)},
                 {(void **)&out->block_table_start, seqs * sizeof(int32_t)},
                 {(void **)&out->window_table_start, window ? seqs * sizeof(int32_t) : 0},
                 {(void **)&out->window_first, window ? seqs * sizeof(int32_t) : 0},
                 {(void **)&out->num_items, 6 * sizeof(int32_t)},
                 {(void **)&out->window_items[0], window ? seqs * sizeof(qf_cuda_attention_item) : 0},
                 {(void **)&out->window_items[1],
                  window && self->any_sliding ? seqs * sizeof(qf_cuda_attention_item) : 0},
                 {(void **)&out->logit_rows, rows * sizeof(int32_t)},
                 {(void **)&out->sample_rows, rows * sizeof(qf_cuda_sample_row)}};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].place = buffer + at;
        at = align_up(at + parts[i].bytes, 16);
    }
    out->fixed_bytes = at;
    out->items_bytes = align_up((size_t)max_items * sizeof(qf_cuda_attention_item), 16);
    out->sliding_bytes = self->any_sliding ? out->items_bytes : 0;
    out->items = (qf_cuda_attention_item *)(void *)(buffer + at);
    out->sliding_items = (qf_cuda_attention_item *)(void *)(buffer + at + out->items_bytes);
}

size_t qf_cuda_meta_capacity(const qf_cuda_backend *self)
{
    const qf_backend_options *options = &self->options;
    int32_t seqs = round_up(options->max_num_seqs, 16); /* a graph's padding */
    int32_t tokens = options->max_num_batched_tokens > seqs ? options->max_num_batched_tokens : seqs;
    qf_cuda_meta meta;
    static const char nowhere[1];
    qf_cuda_meta_layout(self, (char *)(uintptr_t)nowhere, tokens, seqs, tokens, items_bound(self, seqs, tokens), &meta);
    size_t words = (size_t)seqs * ((self->kv_window > 0 ? 2 : 1) * table_stride(self) + mask_words(self) + 2 * MAX_ROW_BIASES + 1);
    return align_up(meta.fixed_bytes + meta.items_bytes + meta.sliding_bytes + words * sizeof(int32_t), 256);
}

int32_t qf_cuda_step_max_items(const qf_cuda_backend *self, const qf_batch *batch, int32_t padded_seqs)
{
    return padded_seqs > 0 ? items_bound(self, padded_seqs, padded_seqs)
                           : items_bound(self, batch->num_seqs, batch->num_tokens);
}

/* --- sampling rows --------------------------------------------------------------------------------------- */

static bool masks_stop_tokens(const qf_sample_state *state, int32_t position)
{
    return position < state->params.min_tokens && state->params.num_stop_token_ids > 0;
}

bool qf_cuda_host_row(const qf_logit_task *task)
{
    return task->state != NULL &&
           (task->state->params.num_bad_words > 0 ||
            task->state->params.num_logit_bias + task->state->params.num_stop_token_ids > MAX_ROW_BIASES);
}

typedef struct builder {
    qf_cuda_backend *self;
    const qf_cuda_meta *meta;
    qf_cuda_plan *plan;
    size_t used_words; /* of the host's buffer */
    size_t shift;      /* by how many words what follows the items stands further behind on the device: even */
    int32_t num_logprobs;
} builder;

/* The mask of a row: the grammar's, or the allowed ids', or both. */
static int32_t add_bitmask(builder *b, const qf_logit_task *task)
{
    const qf_sampling_params *p = &task->state->params;
    if (task->bitmask == NULL && p->num_allowed_token_ids == 0) {
        return -1;
    }
    size_t count = mask_words(b->self);
    uint32_t *mask = (uint32_t *)(b->meta->words + b->used_words);
    if (p->num_allowed_token_ids > 0) {
        memset(mask, 0, count * sizeof *mask);
        for (int32_t i = 0; i < p->num_allowed_token_ids; i++) {
            uint32_t id = (uint32_t)p->allowed_token_ids[i];
            mask[id / 32] |= 1u << (id % 32);
        }
        for (size_t i = 0; task->bitmask != NULL && i < count; i++) {
            mask[i] &= task->bitmask[i];
        }
    } else {
        memcpy(mask, task->bitmask, count * sizeof *mask);
    }
    int32_t at = (int32_t)(b->used_words + b->shift);
    b->used_words += count;
    return at;
}

static void add_biases(builder *b, const qf_logit_task *task, int32_t position, qf_cuda_sample_row *row)
{
    const qf_sampling_params *p = &task->state->params;
    int32_t num_stops = masks_stop_tokens(task->state, position) ? p->num_stop_token_ids : 0;
    int32_t count = p->num_logit_bias + num_stops;
    if (count == 0) {
        return;
    }
    size_t first = align_up(b->used_words, 2);
    qf_cuda_logit_bias *out = (qf_cuda_logit_bias *)(void *)(b->meta->words + first);
    for (int32_t i = 0; i < num_stops; i++) {
        *out++ = (qf_cuda_logit_bias){.token_id = p->stop_token_ids[i], .bias = -INFINITY};
    }
    for (int32_t i = 0; i < p->num_logit_bias; i++) {
        *out++ = (qf_cuda_logit_bias){.token_id = p->logit_bias[i].token_id, .bias = p->logit_bias[i].bias};
    }
    row->bias_offset = (int32_t)((first + b->shift) / 2);
    row->num_bias = count;
    b->used_words = first + 2 * (size_t)count;
}

static bool uses_counts(const qf_sampling_params *p)
{
    return p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
}

/* The device's counts of a slot become those of a state. */
static qf_status reset_counts(qf_cuda_backend *self, int32_t slot, const qf_sample_state *state, qf_error *err)
{
    for (int32_t i = 0; i < state->num_counts; i++) {
        uint32_t count = (uint32_t)state->counts[i].num_output;
        self->count_list[i] = (qf_cuda_token_count){.token_id = state->counts[i].token_id,
                                                    .count = 0x8000u | (count < 0x7fffu ? count : 0x7fffu)};
    }
    /* From pageable memory: the list has been read when the call returns. */
    QF_CUDA_CHECK(cudaMemcpyAsync(self->ws.count_list, self->count_list,
                                  (size_t)state->num_counts * sizeof *self->count_list, cudaMemcpyHostToDevice,
                                  self->stream));
    return qf_cuda_reset_counts(self->ws.counts, slot, self->vocab_size, self->ws.count_list,
                                state->num_counts, self->stream, err);
}

static qf_status add_draw(builder *b, const qf_logit_task *task, qf_cuda_result *result, qf_cuda_sample_row *row,
                          qf_error *err)
{
    qf_cuda_backend *self = b->self;
    const qf_sample_state *state = task->state;
    const qf_sampling_params *p = &state->params;
    qf_cuda_slot *slot = &self->slots[task->slot];
    /* A state at the address of one that is gone starts at 0, where no slot that was used stands. */
    bool known = slot->state == state && slot->next_position > 0 &&
                 slot->next_position == state->num_output_tokens + slot->num_in_flight;
    int32_t position = known ? slot->next_position : state->num_output_tokens;
    result->state = task->state;
    result->token_id = task->token_id;
    result->slot = task->slot;
    result->sampled_on_host = qf_cuda_host_row(task);
    slot->state = state;
    slot->next_position = position + 1;
    slot->num_in_flight = (known ? slot->num_in_flight : 0) + (result->sampled_on_host ? 0 : 1);
    if (result->sampled_on_host) {
        return QF_OK;
    }
    add_biases(b, task, position, row);
    row->slot = task->slot;
    row->real_vocab_size = state->real_vocab_size;
    row->temperature = p->temperature;
    row->top_p = p->top_p;
    row->min_p = p->min_p;
    row->top_k = p->top_k > 0 ? p->top_k : 0;
    row->repetition_penalty = p->repetition_penalty;
    row->presence_penalty = p->presence_penalty;
    row->frequency_penalty = p->frequency_penalty;
    row->uses_counts = uses_counts(p);
    row->seed_low = (uint32_t)p->seed;
    row->seed_high = (uint32_t)(p->seed >> 32);
    row->sample_index = p->sample_index;
    row->position = (uint32_t)position;
    row->bitmask_offset = add_bitmask(b, task);
    row->num_logprobs = p->num_logprobs;
    if (p->num_logprobs >= 0) {
        row->logprobs_offset = b->num_logprobs;
        result->logprobs = task->logprobs;
        result->logprobs_offset = b->num_logprobs;
        result->num_logprobs = 1 + p->num_logprobs;
        b->num_logprobs += 1 + p->num_logprobs;
    }
    b->plan->all_greedy = b->plan->all_greedy && p->temperature == 0.0f && !row->uses_counts &&
                          row->bitmask_offset < 0 && row->num_bias == 0 && p->num_logprobs < 0;
    return row->uses_counts && !known ? reset_counts(self, task->slot, state, err) : QF_OK;
}

static qf_status build_rows(builder *b, qf_cuda_step *step, const qf_batch *batch, qf_error *err)
{
    const qf_cuda_meta *meta = b->meta;
    for (int32_t i = 0; i < meta->num_rows; i++) {
        qf_cuda_sample_row *row = &meta->sample_rows[i];
        *row = (qf_cuda_sample_row){.slot = -1, .bitmask_offset = -1, .num_logprobs = -1, .target_id = -1,
                                    .repetition_penalty = 1.0f, .top_p = 1.0f,
                                    .real_vocab_size = b->self->vocab_size};
        if (i >= batch->num_logit_tasks) { /* a graph's padding */
            meta->logit_rows[i] = 0;
            continue;
        }
        const qf_logit_task *task = &batch->logit_tasks[i];
        qf_cuda_result *result = &step->results[i];
        *result = (qf_cuda_result){0};
        meta->logit_rows[i] = task->row;
        if (!qf_cuda_samples(b->self)) {
            row->slot = task->state != NULL ? task->slot : -1; /* the token comes from rank 0 */
            continue;
        }
        if (task->state != NULL) {
            QF_TRY(add_draw(b, task, result, row, err));
        }
        if (task->target_logprobs != NULL) {
            row->target_id = task->target_token_id;
            row->num_target_logprobs = task->num_target_logprobs;
            row->target_logprobs_offset = b->num_logprobs;
            result->target_logprobs = task->target_logprobs;
            result->target_logprobs_offset = b->num_logprobs;
            result->num_target_logprobs = 1 + task->num_target_logprobs;
            b->num_logprobs += 1 + task->num_target_logprobs;
            b->plan->all_greedy = false;
        }
    }
    return QF_OK;
}

static void build_tables(builder *b, const qf_batch *batch)
{
    const qf_cuda_meta *meta = b->meta;
    int32_t block_size = b->self->options.block_size;
    for (int32_t s = 0; s < meta->num_seqs; s++) {
        if (s >= batch->num_seqs) {
            meta->seq_lens[s] = 0;
            meta->block_table_start[s] = (int32_t)(b->used_words + b->shift);
            continue;
        }
        int32_t blocks = (batch->seq_lens[s] + block_size - 1) / block_size;
        meta->seq_lens[s] = batch->seq_lens[s];
        meta->block_table_start[s] = (int32_t)(b->used_words + b->shift);
        memcpy(meta->words + b->used_words, batch->block_tables + (size_t)s * (size_t)batch->block_table_stride,
               (size_t)blocks * sizeof(int32_t));
        b->used_words += (size_t)blocks;
    }
}

static void build_window_first(const builder *b, const qf_batch *batch)
{
    for (int32_t s = 0; s < b->meta->num_seqs; s++) {
        int32_t first = s < batch->num_seqs ? batch->window_first_block[s] : 0;
        b->meta->window_first[s] = first * b->self->options.block_size;
    }
}

/* The 16-bit window's: a start is where the sequence's first block would stand, before the table it may be. */
static void build_window_tables(builder *b, const qf_batch *batch)
{
    const qf_cuda_meta *meta = b->meta;
    int32_t block_size = b->self->options.block_size;
    for (int32_t s = 0; s < meta->num_seqs; s++) {
        int32_t first = s < batch->num_seqs ? batch->window_first_block[s] : 0;
        int32_t end = s < batch->num_seqs ? (batch->seq_lens[s] + block_size - 1) / block_size : 0;
        meta->window_table_start[s] = (int32_t)(b->used_words + b->shift) - first;
        if (first < end) {
            memcpy(meta->words + b->used_words,
                   batch->window_block_tables + (size_t)s * (size_t)batch->window_table_stride,
                   (size_t)(end - first) * sizeof(int32_t));
            b->used_words += (size_t)(end - first);
        }
    }
}

static void build_tokens(const qf_cuda_meta *meta, const qf_batch *batch, bool window)
{
    size_t tokens = (size_t)batch->num_tokens;
    memcpy(meta->token_ids, batch->token_ids, tokens * sizeof(int32_t));
    memcpy(meta->positions, batch->positions, tokens * sizeof(int32_t));
    memcpy(meta->slot_mapping, batch->slot_mapping, tokens * sizeof(int32_t));
    for (int32_t t = batch->num_tokens; t < meta->num_tokens; t++) {
        meta->token_ids[t] = 0;
        meta->positions[t] = 0;
        meta->slot_mapping[t] = -1; /* nothing is written to the cache */
    }
    for (int32_t t = 0; window && t < meta->num_tokens; t++) {
        meta->window_slot_mapping[t] = t < batch->num_tokens ? batch->window_slot_mapping[t] : -1;
    }
    for (int32_t s = 0; s <= meta->num_seqs; s++) {
        meta->query_start_loc[s] = batch->query_start_loc[s < batch->num_seqs ? s : batch->num_seqs];
    }
}

static int32_t num_items(const qf_cuda_attention_plan *plan)
{
    return plan->num_decode_items + plan->num_prefill_items;
}

/* The end of a list of items that starts at `begin`, in bytes of the host's buffer. */
static size_t items_end(size_t begin, const qf_cuda_attention_plan *plan)
{
    return align_up(begin + (size_t)num_items(plan) * sizeof(qf_cuda_attention_item), 16);
}

static void plan_items(const builder *b, const qf_batch *batch, bool sliding, qf_cuda_attention_item *items,
                       qf_cuda_attention_plan *plan)
{
    const qf_cuda_meta *meta = b->meta;
    qf_cuda_attention_shape shape = qf_cuda_backend_attention_shape(b->self, sliding);
    bool invariant = b->self->options.batch_invariant;
    if (shape.kv_window > 0 && !invariant) {
        qf_cuda_attention_plan_make_window(&shape, batch->num_seqs, batch->query_start_loc, batch->seq_lens,
                                           meta->window_first, items, meta->window_items[sliding], plan);
    } else {
        qf_cuda_attention_plan_make(&shape, batch->num_seqs, batch->query_start_loc, batch->seq_lens, invariant, items,
                                    plan);
    }
    meta->num_items[sliding ? 2 : 0] = plan->num_decode_items;
    meta->num_items[sliding ? 3 : 1] = plan->num_prefill_items;
    meta->num_items[sliding ? 5 : 4] = plan->num_window_items;
}

/* Both lists of items, and where they end. */
static void build_items(builder *b, const qf_batch *batch, qf_cuda_step_header *header)
{
    qf_cuda_backend *self = b->self;
    const qf_cuda_meta *meta = b->meta;
    qf_cuda_plan *plan = b->plan;
    size_t end = meta->fixed_bytes;
    header->items_end = header->sliding_end = (uint32_t)end;
    memset(meta->num_items, 0, 6 * sizeof *meta->num_items);
    if (!self->options.float32) {
        plan_items(b, batch, false, meta->items, &plan->full);
        end = items_end(end, &plan->full);
        header->items_end = header->sliding_end = (uint32_t)end;
        if (self->any_sliding) {
            plan_items(b, batch, true, (qf_cuda_attention_item *)(void *)((char *)meta->words + end), &plan->sliding);
            end = items_end(end, &plan->sliding);
            header->sliding_end = (uint32_t)end;
        }
    }
    b->used_words = end / sizeof(int32_t);
    b->shift = (meta->fixed_bytes + meta->items_bytes + meta->sliding_bytes - end) / sizeof(int32_t);
}

qf_status qf_cuda_step_build(qf_cuda_backend *self, qf_cuda_step *step, const qf_batch *batch, const qf_cuda_meta *host,
                             qf_cuda_plan *plan, qf_error *err)
{
    builder b = {.self = self, .meta = host, .plan = plan};
    qf_cuda_step_header header = {.sequence = (uint32_t)self->num_submitted};
    *plan = (qf_cuda_plan){.all_greedy = true,
                           .one_kernel = self->decode_kernel && batch->num_seqs == 1 &&
                                         batch->seq_lens[0] <= QF_CUDA_ONE_KERNEL_POSITIONS};
    if (self->kv_window > 0 && (batch->window_slot_mapping == NULL || batch->window_block_tables == NULL ||
                                batch->window_first_block == NULL)) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "a step without the tables of its 16-bit window of %d", self->kv_window);
    }
    build_tokens(host, batch, self->kv_window > 0);
    if (self->kv_window > 0) {
        build_window_first(&b, batch);
    }
    build_items(&b, batch, &header);
    build_tables(&b, batch);
    if (self->kv_window > 0) {
        build_window_tables(&b, batch);
    }
    QF_TRY(build_rows(&b, step, batch, err));
    plan->meta_bytes = align_up(b.used_words * sizeof(int32_t), 16);
    size_t device_bytes = plan->meta_bytes + b.shift * sizeof(int32_t);
    step->num_results = qf_cuda_samples(self) ? batch->num_logit_tasks : 0; /* rank 0 alone has any */
    step->num_logprobs = b.num_logprobs;
    if (device_bytes > self->meta_bytes || b.num_logprobs > self->logprob_capacity) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "a step's metadata of %zu bytes and %d logprobs exceeds %zu and %d",
                       device_bytes, b.num_logprobs, self->meta_bytes, self->logprob_capacity);
    }
    header.meta_bytes = (uint32_t)plan->meta_bytes;
    header.num_results = (uint32_t)step->num_results;
    header.num_logprobs = (uint32_t)b.num_logprobs;
    *host->header = header;
    return QF_OK;
}
