/* Opening a checkpoint: config, shards, and one bound source per linear. What a module's tensors are decides how it
 * is read, so that modules left in 16 bits need no list: `weight` is dense, `qweight` and `weight_packed` are not. */
#include "model/checkpoint.h"

#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/json.h"
#include "model/checkpoint_state.h"
#include "model/linear_formats.h"

#define MAX_CONFIG_BYTES ((size_t)16 << 20)
#define DUMMY_GROUP_SIZE 128
#define LM_HEAD "lm_head"

/* The name table. Sizes are named, so that one row says all about a linear. */
typedef enum size_name { SIZE_HIDDEN, SIZE_INTERMEDIATE, SIZE_HEADS, SIZE_KV_HEADS } size_name;

static const struct {
    const char *name;
    size_name n, k;
    bool has_bias;
} linear_table[QF_LINEARS_PER_LAYER] = {
    [QF_Q_PROJ] = {"self_attn.q_proj", SIZE_HEADS, SIZE_HIDDEN, true},
    [QF_K_PROJ] = {"self_attn.k_proj", SIZE_KV_HEADS, SIZE_HIDDEN, true},
    [QF_V_PROJ] = {"self_attn.v_proj", SIZE_KV_HEADS, SIZE_HIDDEN, true},
    [QF_O_PROJ] = {"self_attn.o_proj", SIZE_HIDDEN, SIZE_HEADS, false},
    [QF_GATE_PROJ] = {"mlp.gate_proj", SIZE_INTERMEDIATE, SIZE_HIDDEN, false},
    [QF_UP_PROJ] = {"mlp.up_proj", SIZE_INTERMEDIATE, SIZE_HIDDEN, false},
    [QF_DOWN_PROJ] = {"mlp.down_proj", SIZE_HIDDEN, SIZE_INTERMEDIATE, false},
};

static const char *const norm_names[2] = {
    [QF_INPUT_NORM] = "input_layernorm",
    [QF_POST_ATTENTION_NORM] = "post_attention_layernorm",
};

/* Numbers that set the random streams of a dummy checkpoint apart; linears use their ids. */
enum { DUMMY_EMBEDDING = 100, DUMMY_BIAS = 200 };

static int32_t size_of(const qf_model_config *config, size_name name)
{
    switch (name) {
    case SIZE_HIDDEN: return config->hidden_size;
    case SIZE_INTERMEDIATE: return config->intermediate_size;
    case SIZE_HEADS: return config->num_heads * config->head_dim;
    case SIZE_KV_HEADS: return config->num_kv_heads * config->head_dim;
    }
    return 0;
}

static qf_status parse_json_file(const char *dir, const char *name, bool optional, qf_json **out, qf_error *err)
{
    char *text;
    size_t size_bytes;
    qf_json_limits limits = qf_json_default_limits();
    *out = NULL;
    QF_TRY(qf_model_read_file(dir, name, MAX_CONFIG_BYTES, optional, &text, &size_bytes, err));
    if (text == NULL) {
        return QF_OK;
    }
    qf_status status = qf_json_parse(text, size_bytes, &limits, name, out, err);
    qf_free(text);
    return status;
}

/* What the overrides alone get wrong is the caller's mistake, not the file's. */
static qf_status parse_config(const qf_json_value *root, const qf_json_value *overrides, qf_model_config *out,
                              qf_error *err)
{
    qf_status status = qf_model_config_parse(root, overrides, out, err);
    if (status != QF_ERROR_MODEL || overrides == NULL) {
        return status;
    }
    qf_model_config without;
    if (qf_model_config_parse(root, NULL, &without, NULL) != QF_OK) {
        return status;
    }
    char message[sizeof err->message];
    (void)snprintf(message, sizeof message, "%s", err != NULL ? err->message : "");
    return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "with hf_overrides, %.480s", message);
}

static qf_status read_config(qf_checkpoint *self, const qf_checkpoint_options *options, qf_error *err)
{
    qf_status status = QF_OK;
    qf_json *root = NULL;
    qf_json *overrides = NULL;
    const char *text = options->hf_overrides_json;
    QF_TRY_GOTO(parse_json_file(options->dir, "config.json", false, &root, err), done);
    if (text != NULL) {
        qf_json_limits limits = qf_json_default_limits();
        status = qf_json_parse(text, strlen(text), &limits, "hf_overrides", &overrides, err);
        if (status == QF_ERROR_MODEL) {
            status = QF_ERROR_INVALID_ARGUMENT;
            if (err != NULL) {
                err->status = status;
            }
        }
        if (status != QF_OK) {
            goto done;
        }
    }
    QF_TRY_GOTO(parse_config(qf_json_root(root), text != NULL ? qf_json_root(overrides) : NULL, &self->config, err),
                done);
done:
    qf_json_destroy(overrides);
    qf_json_destroy(root);
    return status;
}

static bool has_qweight(const qf_shards *shards)
{
    static const char suffix[] = ".qweight";
    for (size_t i = 0; i < shards->num_tensors; i++) {
        const char *name = shards->tensors[i].tensor->name;
        size_t length = strlen(name);
        if (length >= sizeof suffix - 1 && strcmp(name + length - (sizeof suffix - 1), suffix) == 0) {
            return true;
        }
    }
    return false;
}

/* The first AutoGPTQ and AutoAWQ versions described their weights in files of their own. */
static qf_status find_old_quant_config(qf_checkpoint *self, const char *dir, qf_error *err)
{
    static const char *const names[2] = {"quantize_config.json", "quant_config.json"};
    if (self->config.quant.method != QF_QUANT_NONE || !has_qweight(&self->shards)) {
        return QF_OK;
    }
    for (int i = 0; i < 2; i++) {
        qf_json *json;
        QF_TRY(parse_json_file(dir, names[i], true, &json, err));
        if (json != NULL) {
            qf_status status = qf_quant_config_parse(qf_json_root(json), &self->config.quant, err);
            qf_json_destroy(json);
            return status;
        }
    }
    return QF_FAIL(err, QF_ERROR_MODEL, "the checkpoint has qweight tensors, but config.json has no "
                   "\"quantization_config\" and there is no %s or %s", names[0], names[1]);
}

static qf_status bind_dense(const qf_shards *shards, qf_linear_source *self, qf_error *err)
{
    qf_tensor_spec weight = {self->name, ".weight", QF_FLOAT_DTYPES, self->n, self->k};
    QF_TRY(qf_find_tensor(shards, &weight, true, &self->weight, err));
    self->format = QF_LINEAR_DENSE;
    self->bits = 8 * (int32_t)qf_dtype_size(self->weight.dtype);
    qf_set_groups(self, -1);
    return QF_OK;
}

static qf_status bind_weight(const qf_shards *shards, const qf_quant_config *quant, qf_linear_source *self,
                             qf_error *err)
{
    bool head = strcmp(self->name, LM_HEAD) == 0; /* dense, unless it is there in packed form */
    bool compressed = quant->method == QF_QUANT_COMPRESSED_TENSORS;
    bool has_dense = qf_has_tensor(shards, self->name, ".weight");
    bool has_packed = qf_has_tensor(shards, self->name, compressed ? ".weight_packed" : ".qweight");
    if (quant->method == QF_QUANT_NONE || (!has_packed && (has_dense || head))) {
        return bind_dense(shards, self, err);
    }
    if (has_dense) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s has both a dense and a quantised weight; expected one", self->name);
    }
    switch (quant->method) {
    case QF_QUANT_AWQ: return qf_awq_bind(shards, quant, self, err);
    case QF_QUANT_GPTQ: return qf_gptq_bind(shards, quant, self, err);
    default: return qf_compressed_tensors_bind(shards, quant, self, err);
    }
}

/* q, k and v have a bias. Quantised files may store one on the others, too (AutoGPTQ wrote zeros there). */
static qf_status bind_bias(const qf_shards *shards, bool required, qf_linear_source *self, qf_error *err)
{
    qf_tensor_spec spec = {self->name, ".bias", QF_FLOAT_DTYPES, self->n, -1};
    qf_tensor bias;
    float *values = NULL;
    if (!required && self->format == QF_LINEAR_DENSE) {
        return QF_OK;
    }
    QF_TRY(qf_find_tensor(shards, &spec, required, &bias, err));
    if (bias.data == NULL) {
        return QF_OK;
    }
    QF_TRY(qf_alloc((void **)&values, (size_t)self->n, sizeof *values, "bias", err));
    qf_tensor_read_f32(&bias, 0, (size_t)self->n, values);
    bool zero = true;
    for (int32_t i = 0; i < self->n && zero; i++) {
        zero = values[i] == 0.0f;
    }
    if (zero && !required) {
        qf_free(values);
        return QF_OK;
    }
    self->bias = values;
    return QF_OK;
}

static qf_status bind_dummy(const qf_checkpoint *self, int32_t layer, int32_t id, bool has_bias,
                            qf_linear_source *source, qf_error *err)
{
    float *values = NULL;
    source->format = QF_LINEAR_DUMMY;
    source->bits = id == QF_LM_HEAD ? 16 : self->dummy_bits;
    source->symmetric = true;
    source->dummy_seed = qf_dummy_seed(self->dummy_seed, layer, id);
    if (id == QF_LM_HEAD && self->config.tie_word_embeddings) {
        source->dummy_seed = qf_dummy_seed(self->dummy_seed, 0, DUMMY_EMBEDDING);
    }
    qf_set_groups(source, source->bits == 4 ? DUMMY_GROUP_SIZE : -1);
    if (!has_bias) {
        return QF_OK;
    }
    QF_TRY(qf_alloc((void **)&values, (size_t)source->n, sizeof *values, "bias", err));
    qf_dummy_f32(qf_dummy_seed(self->dummy_seed, layer, DUMMY_BIAS + id), 0, 0, source->n, values);
    source->bias = values;
    return QF_OK;
}

static qf_status bind_layer(qf_checkpoint *self, int32_t layer, qf_error *err)
{
    const qf_model_config *config = &self->config;
    qf_layer_sources *out = &self->layers[layer];
    for (int32_t id = 0; id < QF_LINEARS_PER_LAYER; id++) {
        qf_linear_source *source = &out->linears[id];
        (void)snprintf(source->name, sizeof source->name, "model.layers.%d.%s", layer, linear_table[id].name);
        source->n = size_of(config, linear_table[id].n);
        source->k = size_of(config, linear_table[id].k);
        if (self->dummy) {
            QF_TRY(bind_dummy(self, layer, id, linear_table[id].has_bias, source, err));
        } else {
            QF_TRY(bind_weight(&self->shards, &config->quant, source, err));
            QF_TRY(bind_bias(&self->shards, linear_table[id].has_bias, source, err));
        }
    }
    for (int32_t i = 0; i < 2 && !self->dummy; i++) {
        char name[96];
        (void)snprintf(name, sizeof name, "model.layers.%d.%s", layer, norm_names[i]);
        qf_tensor_spec spec = {name, ".weight", QF_FLOAT_DTYPES, config->hidden_size, -1};
        QF_TRY(qf_find_tensor(&self->shards, &spec, true, &out->norms[i], err));
    }
    return QF_OK;
}

/* With tied embeddings the head is the embedding matrix, unless the file has a head of its own that fits: some
 * quantised checkpoints of tied models do. */
static qf_status bind_lm_head(qf_checkpoint *self, qf_error *err)
{
    const qf_model_config *config = &self->config;
    qf_linear_source *head = &self->lm_head;
    (void)snprintf(head->name, sizeof head->name, LM_HEAD);
    head->n = config->vocab_size;
    head->k = config->hidden_size;
    if (self->dummy) {
        return bind_dummy(self, 0, QF_LM_HEAD, false, head, err);
    }
    if (!config->tie_word_embeddings) {
        qf_quant_config quant = config->quant;
        if (quant.head.bits != 0) {
            quant.bits = quant.head.bits;
            quant.group_size = quant.head.group_size;
            quant.symmetric = quant.head.symmetric;
            quant.desc_act = quant.head.desc_act;
        }
        QF_TRY(bind_weight(&self->shards, &quant, head, err));
        return bind_bias(&self->shards, false, head, err);
    }
    qf_tensor_spec own = {LM_HEAD, ".weight", QF_FLOAT_DTYPES, head->n, head->k};
    if (qf_find_tensor(&self->shards, &own, true, &head->weight, NULL) != QF_OK) {
        head->weight = self->embedding;
    }
    head->format = QF_LINEAR_DENSE;
    head->bits = 8 * (int32_t)qf_dtype_size(head->weight.dtype);
    qf_set_groups(head, -1);
    return QF_OK;
}

static qf_status bind_all(qf_checkpoint *self, qf_error *err)
{
    const qf_model_config *config = &self->config;
    if (!self->dummy) {
        qf_tensor_spec embedding = {"model.embed_tokens", ".weight", QF_FLOAT_DTYPES, config->vocab_size,
                                    config->hidden_size};
        qf_tensor_spec norm = {"model.norm", ".weight", QF_FLOAT_DTYPES, config->hidden_size, -1};
        QF_TRY(qf_find_tensor(&self->shards, &embedding, true, &self->embedding, err));
        QF_TRY(qf_find_tensor(&self->shards, &norm, true, &self->final_norm, err));
    }
    QF_TRY(qf_alloc((void **)&self->layers, (size_t)config->num_layers, sizeof *self->layers, "layer table", err));
    for (int32_t layer = 0; layer < config->num_layers; layer++) {
        QF_TRY(bind_layer(self, layer, err));
    }
    return bind_lm_head(self, err);
}

static qf_status open_checkpoint(qf_checkpoint *self, const qf_checkpoint_options *options, qf_error *err)
{
    self->dummy = options->dummy;
    self->dummy_seed = options->dummy_seed;
    self->dummy_bits = options->dummy_bits;
    if (self->dummy && self->dummy_bits != 4 && self->dummy_bits != 16) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "dummy_bits is %d; expected 4 or 16", self->dummy_bits);
    }
    QF_TRY(read_config(self, options, err));
    if (!self->dummy) {
        QF_TRY(qf_shards_open(options->dir, &self->shards, err));
        QF_TRY(find_old_quant_config(self, options->dir, err));
    }
    return bind_all(self, err);
}

qf_status qf_checkpoint_open(const qf_checkpoint_options *options, qf_checkpoint **out, qf_error *err)
{
    *out = NULL;
    qf_checkpoint *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "checkpoint", err));
    qf_status status = open_checkpoint(self, options, err);
    if (status == QF_OK) {
        status = qf_shard_plan(&self->config, 0, 1, &self->shard, err);
    }
    if (status != QF_OK) {
        qf_checkpoint_close(self);
        return status;
    }
    *out = self;
    return QF_OK;
}

/* const for readers; the checkpoint owns them */
static void free_source(qf_linear_source *source)
{
    qf_free((void *)(uintptr_t)source->column_groups);
    if (source->whole == NULL) {
        qf_free((void *)(uintptr_t)source->bias);
        qf_free((void *)(uintptr_t)source->perm);
    }
}

void qf_checkpoint_close(qf_checkpoint *self)
{
    if (self == NULL) {
        return;
    }
    for (int32_t layer = 0; self->layers != NULL && layer < self->config.num_layers; layer++) {
        for (int32_t id = 0; id < QF_LINEARS_PER_LAYER; id++) {
            free_source(&self->layers[layer].linears[id]);
        }
    }
    free_source(&self->lm_head);
    qf_free(self->layers);
    qf_shards_close(&self->shards);
    qf_free(self);
}

const qf_model_config *qf_checkpoint_config(const qf_checkpoint *self) { return &self->config; }

const qf_shard *qf_checkpoint_get_shard(const qf_checkpoint *self) { return &self->shard; }

const qf_linear_source *qf_checkpoint_linear(const qf_checkpoint *self, int32_t layer, qf_linear_id id)
{
    return id == QF_LM_HEAD ? &self->lm_head : &self->layers[layer].linears[id];
}

qf_dtype qf_checkpoint_embedding_dtype(const qf_checkpoint *self)
{
    return self->dummy ? QF_DTYPE_BF16 : self->embedding.dtype;
}

void qf_checkpoint_read_embedding(const qf_checkpoint *self, int32_t row0, int32_t count, void *out)
{
    size_t width = (size_t)self->config.hidden_size;
    row0 += self->shard.vocab.begin;
    if (self->dummy) {
        uint64_t seed = qf_dummy_seed(self->dummy_seed, 0, DUMMY_EMBEDDING);
        for (int32_t r = 0; r < count; r++) {
            qf_dummy_bf16(seed, row0 + r, self->config.hidden_size, (uint16_t *)out + (size_t)r * width);
        }
        return;
    }
    size_t row_bytes = width * qf_dtype_size(self->embedding.dtype);
    memcpy(out, (const uint8_t *)self->embedding.data + (size_t)row0 * row_bytes, (size_t)count * row_bytes);
}

void qf_checkpoint_read_norm(const qf_checkpoint *self, int32_t layer, qf_norm_id id, float *out)
{
    if (self->dummy) {
        for (int32_t i = 0; i < self->config.hidden_size; i++) {
            out[i] = 1.0f;
        }
        return;
    }
    const qf_tensor *norm = id == QF_FINAL_NORM ? &self->final_norm : &self->layers[layer].norms[id];
    qf_tensor_read_f32(norm, 0, (size_t)self->config.hidden_size, out);
}
