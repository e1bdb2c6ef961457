/* Layers alone: a backend over a checkpoint without driver, scheduler or sampling, for tools that look inside. A call is
 * one batch of whole sequences, each from position 0, with the KV cache as scratch. */
#include <stdio.h>

#include "base/alloc.h"
#include "engine/engine.h"

#define MAX_SEQS 256 /* in a call */
#define BLOCK_SIZE 32

struct qf_layers {
    qf_backend *backend;
    qf_model_config config;
    qf_resolved_options resolved; /* the backend's options may point into it */
    const char *backend_name;
    int32_t max_tokens, max_seq_len;
    int32_t block_table_stride;
    int32_t *token_ids, *positions, *slot_mapping; /* (max_tokens); the ids are never read: zeros */
    int32_t *query_start_loc; /* (MAX_SEQS + 1) */
    int32_t *block_tables;    /* (MAX_SEQS, block_table_stride) */
};

void qf_layers_options_init(qf_layers_options *options)
{
    *options = (qf_layers_options){.device = "auto", .dtype = "auto", .max_tokens = 2048, .tensor_parallel_size = 1,
                                   .isa = "auto"};
}

void qf_layers_destroy(qf_layers *self)
{
    if (self == NULL) {
        return;
    }
    if (self->backend != NULL) {
        self->backend->vtable->destroy(self->backend);
    }
    qf_free(self->token_ids);
    qf_free(self->positions);
    qf_free(self->slot_mapping);
    qf_free(self->query_start_loc);
    qf_free(self->block_tables);
    qf_free(self);
}

static qf_status alloc_batch(qf_layers *self, qf_error *err)
{
    size_t tokens = (size_t)self->max_tokens;
    size_t entries = (size_t)MAX_SEQS * (size_t)self->block_table_stride;
    QF_TRY(qf_alloc((void **)&self->token_ids, tokens, sizeof(int32_t), "token ids", err));
    QF_TRY(qf_alloc((void **)&self->positions, tokens, sizeof(int32_t), "positions", err));
    QF_TRY(qf_alloc((void **)&self->slot_mapping, tokens, sizeof(int32_t), "slot mapping", err));
    QF_TRY(qf_alloc((void **)&self->query_start_loc, MAX_SEQS + 1, sizeof(int32_t), "query starts", err));
    return qf_alloc((void **)&self->block_tables, entries, sizeof(int32_t), "block tables", err);
}

static qf_status layers_init(qf_layers *self, const qf_layers_options *options, qf_error *err)
{
    const qf_backend_vtable *vtable;
    qf_checkpoint *checkpoint;
    qf_resolved_options *resolved = &self->resolved;
    qf_engine_options o;
    if (options->tensor_parallel_size != 1) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "tensor_parallel_size=%d for layers alone: only 1, as a tap sees the whole input of a linear and a rank "
                       "has its part of those of o_proj and down_proj", options->tensor_parallel_size);
    }
    qf_engine_options_init(&o);
    o.model_dir = options->model_dir;
    o.device = options->device;
    o.dtype = options->dtype;
    o.num_threads = options->num_threads;
    o.isa = options->isa;
    o.lm_head_dtype = "model";
    o.block_size = BLOCK_SIZE;
    o.max_num_seqs = MAX_SEQS;
    o.max_num_batched_tokens = options->max_tokens;
    o.kv_cache_tokens = (int64_t)options->max_tokens + (int64_t)MAX_SEQS * BLOCK_SIZE; /* each may part-fill a block */
    o.enforce_eager = true;
    QF_TRY(qf_engine_choose_backend(&o, &vtable, err));
    if (!vtable->has_own_memory) {
        o.activation_dtype = "float32"; /* a device has float activations anyway */
    }
    QF_TRY(qf_options_resolve(&o, vtable, &checkpoint, resolved, err));
    self->config = *qf_checkpoint_config(checkpoint);
    self->backend_name = vtable->name;
    self->max_tokens = options->max_tokens;
    self->max_seq_len = resolved->backend.max_model_len;
    self->block_table_stride = (self->max_seq_len + BLOCK_SIZE - 1) / BLOCK_SIZE;
    qf_status status = alloc_batch(self, err);
    if (status == QF_OK) {
        status = vtable->create(checkpoint, &resolved->backend, resolved->num_blocks, NULL, NULL, &self->backend, err);
    }
    qf_checkpoint_close(checkpoint);
    return status;
}

qf_status qf_layers_create(const qf_layers_options *options, qf_layers **out, qf_error *err)
{
    qf_layers *self;
    *out = NULL;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "layers", err));
    qf_status status = layers_init(self, options, err);
    if (status != QF_OK) {
        qf_layers_destroy(self);
        return status;
    }
    *out = self;
    return QF_OK;
}

void qf_layers_get_info(const qf_layers *self, qf_layers_info *out)
{
    *out = (qf_layers_info){.backend = self->backend_name,
                            .description = self->backend->vtable->describe(self->backend),
                            .dtype = self->resolved.dtype,
                            .num_layers = self->config.num_layers,
                            .hidden_size = self->config.hidden_size,
                            .intermediate_size = self->config.intermediate_size,
                            .max_tokens = self->max_tokens,
                            .max_seqs = MAX_SEQS,
                            .max_seq_len = self->max_seq_len};
}

/* The sequences one after the other, in blocks one after the other. */
static qf_status build_batch(qf_layers *self, const int32_t *seq_lens, int32_t num_seqs, qf_batch *out, qf_error *err)
{
    int32_t token = 0;
    int32_t block = 0;
    if (num_seqs < 1 || num_seqs > MAX_SEQS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "seq_lens has %d entries; expected 1 to %d", num_seqs, MAX_SEQS);
    }
    self->query_start_loc[0] = 0;
    for (int32_t i = 0; i < num_seqs; i++) {
        if (seq_lens[i] < 1 || seq_lens[i] > self->max_seq_len || seq_lens[i] > self->max_tokens - token) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "seq_lens[%d] is %d after %d tokens; expected 1 to %d, and at most %d tokens in a call", i,
                           seq_lens[i], token, self->max_seq_len, self->max_tokens);
        }
        int32_t *table = self->block_tables + (int64_t)i * self->block_table_stride;
        for (int32_t position = 0; position < seq_lens[i]; position++, token++) {
            int32_t offset = position % BLOCK_SIZE;
            if (offset == 0) {
                table[position / BLOCK_SIZE] = block++;
            }
            self->positions[token] = position;
            self->slot_mapping[token] = (block - 1) * BLOCK_SIZE + offset;
        }
        self->query_start_loc[i + 1] = token;
    }
    *out = (qf_batch){.num_tokens = token,
                      .num_seqs = num_seqs,
                      .token_ids = self->token_ids,
                      .positions = self->positions,
                      .slot_mapping = self->slot_mapping,
                      .query_start_loc = self->query_start_loc,
                      .seq_lens = seq_lens,
                      .block_tables = self->block_tables,
                      .block_table_stride = self->block_table_stride};
    return QF_OK;
}

typedef struct tap_context {
    qf_layers_tap_fn fn;
    void *arg;
    uint32_t linears;
    bool stopped;
} tap_context;

static void on_tap(void *arg, int32_t layer, qf_linear_id id, const float *x, int32_t num_tokens, int32_t k)
{
    static const char *const names[QF_LINEARS_PER_LAYER] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                            "gate_proj", "up_proj", "down_proj"};
    tap_context *context = arg;
    if (!context->stopped && (context->linears >> id & 1u) != 0) {
        context->stopped = !context->fn(context->arg, layer, names[id], x, num_tokens, k);
    }
}

qf_status qf_layers_forward(qf_layers *self, int32_t first, int32_t last, float *hidden, int32_t num_tokens,
                            const int32_t *seq_lens, int32_t num_seqs, uint32_t linears, qf_layers_tap_fn tap,
                            void *tap_arg, qf_error *err)
{
    qf_batch batch;
    QF_TRY(build_batch(self, seq_lens, num_seqs, &batch, err));
    if (batch.num_tokens != num_tokens) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "seq_lens add up to %d; hidden has %d rows", batch.num_tokens,
                       num_tokens);
    }
    tap_context context = {.fn = tap, .arg = tap_arg, .linears = linears};
    bool taps = tap != NULL && linears != 0;
    QF_TRY(self->backend->vtable->forward_layers(self->backend, first, last, &batch, hidden, taps ? on_tap : NULL,
                                                 taps ? &context : NULL, err));
    if (context.stopped) {
        return QF_FAIL(err, QF_ERROR_STATE, "the tap stopped the forward pass");
    }
    return QF_OK;
}
