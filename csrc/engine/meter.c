/* Counting a step, and adding it to the requests' accounts. */
/* needs: engine/meter_share.c engine/energy.c kv/format.c */
#include "engine/meter.h"

#include <string.h>

#include "base/alloc.h"

enum {
    PROMPT_TOKENS = 0,
    CACHED_TOKENS,
    OUTPUT_TOKENS,
    COMPUTED_PROMPT_TOKENS,
    WEIGHT_BYTES,
    HEAD_BYTES,
    EMBEDDING_BYTES,
    KV_READ_BYTES,
    KV_WRITE_BYTES,
    ACTIVATION_BYTES,
    HOST_BYTES,
    FLOPS
};

_Static_assert(offsetof(qf_usage, prompt_tokens) == PROMPT_TOKENS * sizeof(uint64_t), "the order of amounts");
_Static_assert(offsetof(qf_usage, weight_bytes) == WEIGHT_BYTES * sizeof(uint64_t), "the order of amounts");
_Static_assert(offsetof(qf_usage, host_bytes) == HOST_BYTES * sizeof(uint64_t), "the order of amounts");
_Static_assert(offsetof(qf_usage, flops) == FLOPS * sizeof(uint64_t) && FLOPS + 1 == QF_METER_AMOUNTS,
               "the order of amounts");
_Static_assert(sizeof((qf_meter_stats){0}.total_high) == QF_METER_AMOUNTS * sizeof(uint64_t), "the public size");

/* --- creation -------------------------------------------------------------------------------------------- */

void qf_meter_init(qf_meter *self, bool enabled, const qf_model_config *config, const qf_memory_plan *plan,
                   int32_t block_size, uint64_t now_ns)
{
    uint64_t hidden = (uint64_t)config->hidden_size, inter = (uint64_t)config->intermediate_size;
    uint64_t q = (uint64_t)config->num_heads * (uint64_t)config->head_dim;
    uint64_t kv = (uint64_t)config->num_kv_heads * (uint64_t)config->head_dim;
    uint64_t layers = (uint64_t)config->num_layers, sliding = 0;
    for (int32_t i = 0; i < config->num_layers; i++) {
        sliding += qf_model_config_layer_slides(config, i);
    }
    /* Of several devices: what all of them hold of a token. */
    uint64_t block_bytes = plan->all_kv_block_bytes != 0 ? plan->all_kv_block_bytes : plan->kv_block_bytes;
    uint64_t layer_token_bytes = block_bytes / (uint64_t)block_size / layers;
    *self = (qf_meter){.enabled = enabled,
                       .kv_full_bytes = (layers - sliding) * layer_token_bytes,
                       .kv_sliding_bytes = sliding * layer_token_bytes,
                       .sliding_window = config->sliding_window,
                       .linear_flops = 2 * layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * inter),
                       .head_flops = 2 * hidden * (uint64_t)config->vocab_size,
                       .full_flops = 4 * q * (layers - sliding),
                       .sliding_flops = 4 * q * sliding,
                       .start_ns = now_ns};
}

void qf_meter_set_kv(qf_meter *self, const qf_model_config *config, const qf_backend_options *options)
{
    /* Of more ranks than kv heads each holds one: some are there more than once. */
    const int32_t ranks = options->tensor_parallel_size, heads = config->num_kv_heads;
    const uint64_t rows = 2 * (uint64_t)(ranks > heads ? ranks : heads); /* of a token and layer */
    const uint64_t low = rows * qf_kv_row_bytes(options->kv_format, config->head_dim);
    const uint64_t wide = rows * qf_kv_row_bytes(QF_KV_BF16, config->head_dim);
    self->kv_full_bytes = self->kv_sliding_bytes = 0;
    self->window_tokens = options->kv_window_tokens;
    for (int32_t i = 0; i < config->num_layers; i++) {
        const bool sixteen = options->kv_16bit_layers != NULL && options->kv_16bit_layers[i] != 0;
        const bool slides = qf_model_config_layer_slides(config, i);
        *(slides ? &self->kv_sliding_bytes : &self->kv_full_bytes) += sixteen ? wide : low;
        if (self->window_tokens > 0 && !sixteen) {
            *(slides ? &self->window_sliding_bytes : &self->window_full_bytes) += wide;
            *(slides ? &self->low_sliding_bytes : &self->low_full_bytes) += low;
        }
    }
}

void qf_meter_deinit(qf_meter *self) { qf_share_scratch_deinit(&self->scratch); }

size_t qf_meter_step_bytes(int32_t max_num_seqs)
{
    return (size_t)max_num_seqs * sizeof(qf_meter_entry) + qf_share_scratch_bytes(max_num_seqs);
}

qf_status qf_meter_step_init(qf_meter_step *self, int32_t max_num_seqs, qf_error *err)
{
    *self = (qf_meter_step){0};
    QF_TRY(qf_alloc((void **)&self->entries, (size_t)max_num_seqs, sizeof *self->entries, "a step's meter", err));
    return qf_share_scratch_grow(&self->scratch, max_num_seqs, err);
}

void qf_meter_step_deinit(qf_meter_step *self)
{
    qf_free(self->entries);
    qf_share_scratch_deinit(&self->scratch);
    *self = (qf_meter_step){0};
}

/* --- accounts -------------------------------------------------------------------------------------------- */

/* words[i] += amounts[i]; what goes beyond 64 bits is in `high`. */
static void add_amounts(qf_usage *usage, uint64_t *high, const uint64_t *amounts)
{
    uint64_t *words = (uint64_t *)(void *)usage; /* QF_METER_AMOUNTS of them: asserted above */
    for (int i = 0; i < QF_METER_AMOUNTS; i++) {
        if (__builtin_add_overflow(words[i], amounts[i], &words[i]) && high != NULL) {
            high[i]++;
        }
    }
}

qf_status qf_meter_open(qf_meter *self, qf_account *account, int32_t num_prompt_tokens, qf_error *err)
{
    int32_t wanted = self->num_accounts + 2;
    if (wanted > self->scratch.capacity) {
        QF_TRY(qf_share_scratch_grow(&self->scratch, wanted > 16 ? 2 * wanted : 32, err));
    }
    *account = (qf_account){.known = true};
    self->num_accounts++;
    account->usage.prompt_tokens = (uint64_t)num_prompt_tokens;
    self->total.prompt_tokens += (uint64_t)num_prompt_tokens;
    self->requests.prompt_tokens += (uint64_t)num_prompt_tokens;
    return QF_OK;
}

static void unlist(qf_meter *self, qf_account *account)
{
    if (account->listed) {
        account->listed = false;
        *(account->previous != NULL ? &account->previous->next : &self->listed_head) = account->next;
        if (account->next != NULL) {
            account->next->previous = account->previous;
        }
    }
}

static void list(qf_meter *self, qf_account *account)
{
    if (!account->listed && self->num_sources > 0) {
        account->listed = true;
        account->previous = NULL;
        account->next = self->listed_head;
        if (account->next != NULL) {
            account->next->previous = account;
        }
        self->listed_head = account;
    }
}

void qf_meter_close(qf_meter *self, qf_account *account)
{
    if (!account->known) {
        return;
    }
    for (int32_t k = 0; k < self->num_sources; k++) {
        self->sources[k].gone_ns += account->usage.device_ns - account->settled_ns[k];
    }
    unlist(self, account);
    account->known = false;
    self->num_accounts--;
}

void qf_meter_add_cached(qf_meter *self, qf_account *account, int32_t num_tokens)
{
    account->usage.cached_tokens += (uint64_t)num_tokens;
    self->total.cached_tokens += (uint64_t)num_tokens;
    self->requests.cached_tokens += (uint64_t)num_tokens;
}

void qf_meter_add_output(qf_meter *self, qf_account *account)
{
    account->usage.output_tokens++;
    self->total.output_tokens++;
    self->requests.output_tokens++;
}

bool qf_meter_is_final(const qf_meter *self, const qf_account *account)
{
    bool final = account->steps_in_flight == 0;
    for (int32_t k = 0; k < self->num_sources; k++) {
        bool measured = self->sources[k].source.measured;
        final = final && (!measured || account->settled_ns[k] == account->usage.device_ns);
    }
    return final;
}

/* --- a step ---------------------------------------------------------------------------------------------- */

void qf_meter_step_begun(qf_meter *self, qf_meter_step *step)
{
    self->steps_in_flight++;
    for (int32_t i = 0; i < step->num_entries; i++) {
        step->entries[i].account->steps_in_flight++;
    }
}

/* Bytes of the cache that tokens start .. start + count - 1 read, every position once, and operations on it. */
static void count_attention(const qf_meter *self, qf_meter_entry *entry)
{
    uint64_t start = (uint64_t)entry->start, count = (uint64_t)entry->num_tokens, context = start + count;
    uint64_t attended = count * start + count * (count + 1) / 2; /* sum over tokens of what each sees */
    entry->amounts[KV_READ_BYTES] = context * self->kv_full_bytes;
    entry->amounts[KV_WRITE_BYTES] = count * (self->kv_full_bytes + self->kv_sliding_bytes);
    entry->amounts[FLOPS] += attended * self->full_flops;
    if (self->sliding_flops > 0) {
        uint64_t window = (uint64_t)self->sliding_window;
        uint64_t reach = window + count - 1; /* the first token's window begins there */
        uint64_t growing = window > start ? window - start : 0; /* tokens that see less than a whole window */
        growing = growing < count ? growing : count;
        attended = growing * start + growing * (growing + 1) / 2 + (count - growing) * window;
        entry->amounts[KV_READ_BYTES] += (context < reach ? context : reach) * self->kv_sliding_bytes;
        entry->amounts[FLOPS] += attended * self->sliding_flops;
    }
}

/* What a 16-bit window adds for tokens start .. start + count - 1, and what it spares: the newest positions are read from it,
 * and the low-bit form of those that every token reads there is not. `reach`: positions back from the end that are seen. */
static void count_window(const qf_meter *self, qf_meter_entry *entry, uint64_t reach, uint64_t low_bytes,
                         uint64_t window_bytes)
{
    const uint64_t count = (uint64_t)entry->num_tokens, context = (uint64_t)entry->start + count;
    const uint64_t window = (uint64_t)self->window_tokens;
    const uint64_t seen = context < reach ? context : reach;
    const uint64_t copies = seen < window - 1 + count ? seen : window - 1 + count;
    const uint64_t spared = seen < window ? seen : window;
    entry->amounts[KV_READ_BYTES] += copies * window_bytes;
    entry->amounts[KV_READ_BYTES] -= spared * low_bytes;
    entry->amounts[KV_WRITE_BYTES] += count * window_bytes;
}

/* Adds parts of `total` to amount `which`, in proportion to the scratch's weights. */
static void share_amount(qf_meter_step *step, int which, uint64_t total)
{
    if (total == 0) {
        return;
    }
    if (step->num_entries == 1) {
        step->entries[0].amounts[which] += total;
        return;
    }
    qf_share(&step->scratch, step->num_entries, total);
    for (int32_t i = 0; i < step->num_entries; i++) {
        step->entries[i].amounts[which] += step->scratch.shares[i];
    }
}

void qf_meter_step_count(const qf_meter *self, qf_meter_step *step, const qf_step_traffic *traffic)
{
    memset(step->totals, 0, sizeof step->totals);
    for (int32_t i = 0; i < step->num_entries; i++) {
        qf_meter_entry *entry = &step->entries[i];
        memset(entry->amounts, 0, sizeof entry->amounts);
        entry->amounts[COMPUTED_PROMPT_TOKENS] = (uint64_t)entry->num_prefill_tokens;
        entry->amounts[FLOPS] = (uint64_t)entry->num_tokens * self->linear_flops +
                                (uint64_t)entry->num_rows * self->head_flops;
        count_attention(self, entry);
        if (self->window_full_bytes > 0) {
            count_window(self, entry, UINT64_MAX, self->low_full_bytes, self->window_full_bytes);
        }
        if (self->window_sliding_bytes > 0) {
            count_window(self, entry, (uint64_t)self->sliding_window + (uint64_t)entry->num_tokens - 1,
                         self->low_sliding_bytes, self->window_sliding_bytes);
        }
        step->scratch.weights[i] = (uint64_t)entry->num_tokens;
        const int own[] = {COMPUTED_PROMPT_TOKENS, KV_READ_BYTES, KV_WRITE_BYTES, FLOPS};
        for (size_t j = 0; j < sizeof own / sizeof own[0]; j++) {
            step->totals[own[j]] += entry->amounts[own[j]];
        }
    }
    share_amount(step, WEIGHT_BYTES, traffic->layers_bytes);
    share_amount(step, EMBEDDING_BYTES, traffic->embedding_bytes);
    share_amount(step, ACTIVATION_BYTES, traffic->activation_bytes);
    share_amount(step, HOST_BYTES, traffic->host_bytes + traffic->host_embedding_bytes);
    for (int32_t i = 0; i < step->num_entries; i++) {
        step->scratch.weights[i] = (uint64_t)step->entries[i].num_rows;
    }
    share_amount(step, HEAD_BYTES, traffic->head_bytes);
    share_amount(step, ACTIVATION_BYTES, traffic->logit_bytes);
    step->totals[WEIGHT_BYTES] = traffic->layers_bytes;
    step->totals[EMBEDDING_BYTES] = traffic->embedding_bytes;
    step->totals[ACTIVATION_BYTES] = traffic->activation_bytes + traffic->logit_bytes;
    step->totals[HOST_BYTES] = traffic->host_bytes + traffic->host_embedding_bytes;
    step->totals[HEAD_BYTES] = traffic->head_bytes;
}

void qf_meter_step_share_time(qf_meter_step *step, uint64_t device_ns)
{
    for (int32_t i = 0; i < step->num_entries; i++) {
        const uint64_t *amounts = step->entries[i].amounts;
        uint64_t bytes = 0;
        for (int j = WEIGHT_BYTES; j <= HOST_BYTES; j++) {
            bytes += amounts[j];
        }
        step->scratch.weights[i] = bytes;
    }
    qf_share(&step->scratch, step->num_entries, device_ns);
    for (int32_t i = 0; i < step->num_entries; i++) {
        step->entries[i].device_ns = step->scratch.shares[i];
        step->entries[i].given_ns = 0;
    }
}

/* Of an entry's device time the part up to `numerator / denominator` of the step is on its account. */
static void give_time(qf_meter *self, qf_meter_step *step, uint64_t numerator, uint64_t denominator)
{
    for (int32_t i = 0; i < step->num_entries; i++) {
        qf_meter_entry *entry = &step->entries[i];
        uint64_t upto = numerator == denominator
                            ? entry->device_ns
                            : (uint64_t)((unsigned __int128)entry->device_ns * numerator / denominator);
        uint64_t part = upto - entry->given_ns;
        entry->given_ns = upto;
        entry->account->usage.device_ns += part;
        self->requests.device_ns += part;
        if (part > 0) {
            list(self, entry->account);
        }
    }
}

/* Prefill and decode of an entry that has both, a recomputed sequence's end, by tokens; a half goes to prefill. */
static void split_time(qf_meter *self, const qf_meter_entry *entry)
{
    uint64_t tokens = (uint64_t)entry->num_tokens;
    uint64_t product = entry->device_ns * (uint64_t)entry->num_prefill_tokens;
    uint64_t prefill = product / tokens + (2 * (product % tokens) >= tokens && product % tokens > 0);
    entry->account->usage.prefill_device_ns += prefill;
    entry->account->usage.decode_device_ns += entry->device_ns - prefill;
    self->requests.prefill_device_ns += prefill;
    self->requests.decode_device_ns += entry->device_ns - prefill;
    self->total.prefill_device_ns += prefill;
    self->total.decode_device_ns += entry->device_ns - prefill;
}

void qf_meter_step_ended(qf_meter *self, qf_meter_step *step, uint64_t device_ns, uint64_t end_ns)
{
    uint64_t sums[QF_METER_AMOUNTS] = {0};
    self->steps_in_flight--;
    self->num_steps++;
    add_amounts(&self->total, self->total_high, step->totals);
    self->total.device_ns += device_ns;
    for (int32_t i = 0; i < step->num_entries; i++) {
        qf_meter_entry *entry = &step->entries[i];
        entry->account->steps_in_flight--;
        add_amounts(&entry->account->usage, NULL, entry->amounts);
        for (int j = COMPUTED_PROMPT_TOKENS; j < QF_METER_AMOUNTS; j++) {
            sums[j] += entry->amounts[j];
        }
        split_time(self, entry);
    }
    add_amounts(&self->requests, self->requests_high, sums);
    uint64_t begin_ns = end_ns - device_ns;
    for (uint64_t cut = qf_meter_next_window(self); cut < end_ns; cut = qf_meter_next_window(self)) {
        if (cut > begin_ns) {
            give_time(self, step, cut - begin_ns, device_ns);
        }
        qf_meter_settle(self, cut);
    }
    give_time(self, step, 1, 1);
    if (self->steps_in_flight == 0) {
        qf_meter_settle(self, UINT64_MAX);
    }
}

void qf_meter_step_lost(qf_meter *self, qf_meter_step *step)
{
    self->steps_in_flight--;
    for (int32_t i = 0; i < step->num_entries; i++) {
        step->entries[i].account->steps_in_flight--;
    }
}

/* --- statistics ------------------------------------------------------------------------------------------ */

void qf_meter_get_stats(const qf_meter *self, uint64_t now_ns, qf_meter_stats *out)
{
    *out = (qf_meter_stats){.enabled = self->enabled,
                            .total = self->total,
                            .requests = self->requests,
                            .num_steps = self->num_steps,
                            .busy_ns = self->total.device_ns,
                            .wall_ns = now_ns - self->start_ns,
                            .peak_kv_bytes = self->peak_kv_bytes,
                            .num_sources = self->num_sources};
    memcpy(out->total_high, self->total_high, sizeof out->total_high);
    memcpy(out->requests_high, self->requests_high, sizeof out->requests_high);
    for (int32_t k = 0; k < self->num_sources; k++) {
        out->sources[k] = self->sources[k].source;
        out->total.energy_uj[k] = out->sources[k].total_uj;
        out->requests.energy_uj[k] = out->sources[k].requests_uj;
    }
}
