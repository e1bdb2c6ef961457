/* From a step plan to the flattened batch that a backend runs. */
#include <string.h>

#include "base/alloc.h"
#include "engine/engine.h"
#include "kv/window.h"

static size_t table_stride(const qf_backend_options *o)
{
    return ((size_t)o->max_model_len + (size_t)o->block_size - 1) / (size_t)o->block_size;
}

/* Window blocks of a sequence, at most; 0: no window. */
static size_t window_stride(const qf_backend_options *o)
{
    return o->kv_window_tokens <= 0
               ? 0
               : (size_t)qf_kv_window_seq_blocks(o->kv_window_tokens, o->block_size, o->max_model_len,
                                                 QF_KV_WINDOW_STEPS * (int64_t)o->max_num_batched_tokens);
}

size_t qf_step_bytes(const qf_backend_options *o)
{
    size_t tokens = (size_t)o->max_num_batched_tokens;
    size_t seqs = (size_t)o->max_num_seqs;
    size_t window = window_stride(o) > 0 ? tokens + seqs + seqs * window_stride(o) : 0;
    return (3 * tokens + seqs + 1 + seqs + seqs * table_stride(o) + window) * sizeof(int32_t) +
           tokens * sizeof(qf_logit_task) + qf_meter_step_bytes(o->max_num_seqs);
}

qf_status qf_step_init(qf_step *step, const qf_resolved_options *resolved, qf_error *err)
{
    const qf_backend_options *o = &resolved->backend;
    size_t tokens = (size_t)o->max_num_batched_tokens;
    size_t seqs = (size_t)o->max_num_seqs;
    size_t stride = table_stride(o), window = window_stride(o);
    *step = (qf_step){0};
    step->batch.block_table_stride = (int32_t)stride;
    step->batch.window_table_stride = (int32_t)window;
    QF_TRY(qf_step_plan_init(&step->plan, o->max_num_seqs, err));
    QF_TRY(qf_meter_step_init(&step->meter, o->max_num_seqs, err));
    QF_TRY(qf_alloc((void **)&step->token_ids, tokens, sizeof(int32_t), "step token ids", err));
    QF_TRY(qf_alloc((void **)&step->positions, tokens, sizeof(int32_t), "step positions", err));
    QF_TRY(qf_alloc((void **)&step->slot_mapping, tokens, sizeof(int32_t), "step slot mapping", err));
    QF_TRY(qf_alloc((void **)&step->query_start_loc, seqs + 1, sizeof(int32_t), "step query starts", err));
    QF_TRY(qf_alloc((void **)&step->seq_lens, seqs, sizeof(int32_t), "step sequence lengths", err));
    QF_TRY(qf_alloc((void **)&step->block_tables, seqs * stride, sizeof(int32_t), "step block tables", err));
    if (window > 0) {
        QF_TRY(qf_alloc((void **)&step->window_slot_mapping, tokens, sizeof(int32_t), "step window slots", err));
        QF_TRY(qf_alloc((void **)&step->window_tables, seqs * window, sizeof(int32_t), "step window tables", err));
        QF_TRY(qf_alloc((void **)&step->window_first_block, seqs, sizeof(int32_t), "step window starts", err));
    }
    return qf_alloc((void **)&step->logit_tasks, tokens, sizeof(qf_logit_task), "step logit tasks", err);
}

void qf_step_deinit(qf_step *step)
{
    qf_step_plan_deinit(&step->plan);
    qf_meter_step_deinit(&step->meter);
    qf_free(step->token_ids);
    qf_free(step->positions);
    qf_free(step->slot_mapping);
    qf_free(step->query_start_loc);
    qf_free(step->seq_lens);
    qf_free(step->block_tables);
    qf_free(step->window_slot_mapping);
    qf_free(step->window_tables);
    qf_free(step->window_first_block);
    qf_free(step->logit_tasks);
    *step = (qf_step){0};
}

/* The prompt position whose logits predict position + 1: does the request want them? */
static bool wants_prompt_logprob(const qf_request *request, int32_t position)
{
    return request->prompt_logprobs != NULL && position + 1 < request->seq.num_prompt_tokens;
}

static bool wants_logits(const qf_request *request, int32_t position)
{
    return position >= request->logits_start && position < request->logits_stop;
}

static void add_logit_tasks(qf_step *step, const qf_step_entry *entry, int32_t first_row, int32_t vocab_size,
                            int32_t parity)
{
    qf_request *request = entry->seq->owner;
    for (int32_t i = 0; i < entry->num_tokens; i++) {
        int32_t position = entry->start + i;
        bool samples = entry->samples && i == entry->num_tokens - 1;
        bool target = wants_prompt_logprob(request, position);
        bool logits = wants_logits(request, position);
        if (!samples && !target && !logits) {
            continue;
        }
        qf_logit_task task = {.row = first_row + i, .target_token_id = -1};
        if (target) {
            task.target_token_id = request->seq.token_ids[position + 1];
            task.num_target_logprobs = request->num_prompt_logprobs;
            task.target_logprobs =
                request->prompt_logprobs + (int64_t)(position + 1) * (1 + request->num_prompt_logprobs);
        }
        if (logits) {
            task.logits_out = request->logits + (int64_t)(position - request->logits_start) * vocab_size;
        }
        if (samples) {
            task.state = request->sample;
            task.bitmask = request->mask;
            task.slot = entry->slot;
            task.logprobs = request->step_logprobs[parity];
            task.token_id = &request->step_token[parity];
        }
        step->logit_tasks[step->batch.num_logit_tasks++] = task;
    }
}

/* The entry's window blocks, where there is a window. */
static void add_window(qf_step *step, int32_t e, int32_t row, int32_t block_size)
{
    const qf_step_entry *entry = &step->plan.entries[e];
    const qf_seq *seq = entry->seq;
    if (step->window_slot_mapping == NULL) {
        return;
    }
    for (int32_t i = 0; i < entry->num_tokens; i++) {
        int32_t position = entry->start + i;
        step->window_slot_mapping[row + i] =
            seq->window_table[position / block_size] * block_size + position % block_size;
    }
    step->window_first_block[e] = seq->window_first;
    memcpy(step->window_tables + (size_t)e * (size_t)step->batch.window_table_stride,
           seq->window_table + seq->window_first, (size_t)(seq->window_end - seq->window_first) * sizeof(int32_t));
}

void qf_step_build(qf_step *step, const qf_engine *engine, int32_t parity)
{
    qf_batch *batch = &step->batch;
    int32_t block_size = engine->resolved.backend.block_size;
    batch->num_tokens = 0;
    batch->num_seqs = step->plan.num_entries;
    batch->num_logit_tasks = 0;
    for (int32_t e = 0; e < step->plan.num_entries; e++) {
        const qf_step_entry *entry = &step->plan.entries[e];
        const qf_seq *seq = entry->seq;
        int32_t row = batch->num_tokens;
        step->query_start_loc[e] = row;
        step->seq_lens[e] = entry->start + entry->num_tokens;
        for (int32_t i = 0; i < entry->num_tokens; i++) {
            int32_t position = entry->start + i;
            step->token_ids[row + i] = position < seq->num_tokens ? seq->token_ids[position] : -1 - entry->slot;
            step->positions[row + i] = position;
            step->slot_mapping[row + i] =
                position < seq->num_shared_tokens
                    ? -1
                    : seq->block_table[position / block_size] * block_size + position % block_size;
        }
        memcpy(step->block_tables + (size_t)e * (size_t)batch->block_table_stride, seq->block_table,
               (size_t)seq->num_blocks * sizeof(int32_t));
        add_window(step, e, row, block_size);
        int32_t first_task = batch->num_logit_tasks;
        add_logit_tasks(step, entry, row, engine->config.vocab_size, parity);
        step->meter.entries[e].num_rows = batch->num_logit_tasks - first_task;
        batch->num_tokens += entry->num_tokens;
    }
    step->query_start_loc[batch->num_seqs] = batch->num_tokens;
    batch->token_ids = step->token_ids;
    batch->positions = step->positions;
    batch->slot_mapping = step->slot_mapping;
    batch->query_start_loc = step->query_start_loc;
    batch->seq_lens = step->seq_lens;
    batch->block_tables = step->block_tables;
    batch->window_slot_mapping = step->window_slot_mapping;
    batch->window_block_tables = step->window_tables;
    batch->window_first_block = step->window_first_block;
    batch->logit_tasks = step->logit_tasks;
}
