/* Which rank holds what, and the view of a checkpoint that shows it. */
#include "model/parallel.h"

#include "base/alloc.h"
#include "model/checkpoint_state.h"
#include "model/linear_formats.h"

#define INTERMEDIATE_UNIT 128
#define VOCAB_UNIT 64

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

static int32_t gcd(int32_t a, int32_t b)
{
    while (b != 0) {
        int32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* --- who holds what ------------------------------------------------------------------------------------ */

/* Share `index` of `total` things over `parts`: contiguous, in order, the first ones larger by one. */
static qf_range share(int32_t total, int32_t parts, int32_t index)
{
    int32_t least = total / parts, more = total % parts;
    int32_t begin = index * least + min_i32(index, more);
    return (qf_range){begin, begin + least + (index < more ? 1 : 0)};
}

/* The same in units; the last unit may be cut short. Units are halved until there is one for every rank. */
static qf_range share_units(int32_t total, int32_t unit, int32_t parts, int32_t index)
{
    while (unit > 1 && (total - 1) / unit + 1 < parts) {
        unit = unit % 2 == 0 ? unit / 2 : 1;
    }
    qf_range units = share((total - 1) / unit + 1, parts, index);
    return (qf_range){units.begin * unit, units.end > (total - 1) / unit ? total : units.end * unit};
}

/* Features that stay together: whole groups of down_proj, about as many as kernels like. */
static int32_t intermediate_unit(const qf_quant_config *quant)
{
    int32_t group = quant->method == QF_QUANT_NONE ? -1 : quant->group_size;
    if (group <= 0) {
        return INTERMEDIATE_UNIT;
    }
    return group > INTERMEDIATE_UNIT ? group : INTERMEDIATE_UNIT / group * group;
}

/* Whole kv heads with their query heads, or, with more ranks than kv heads, part of one's query heads. */
static void share_heads(const qf_model_config *config, qf_shard *out)
{
    int32_t group = config->num_heads / config->num_kv_heads;
    if (out->size <= config->num_kv_heads) {
        out->kv_heads = share(config->num_kv_heads, out->size, out->rank);
        out->heads = (qf_range){out->kv_heads.begin * group, out->kv_heads.end * group};
        return;
    }
    int32_t kv_head = 0;
    qf_range ranks = share(out->size, config->num_kv_heads, 0);
    while (ranks.end <= out->rank) {
        ranks = share(out->size, config->num_kv_heads, ++kv_head);
    }
    qf_range part = share(group, ranks.end - ranks.begin, out->rank - ranks.begin);
    out->kv_heads = (qf_range){kv_head, kv_head + 1};
    out->heads = (qf_range){kv_head * group + part.begin, kv_head * group + part.end};
}

qf_status qf_shard_plan(const qf_model_config *config, int32_t rank, int32_t size, qf_shard *out, qf_error *err)
{
    const struct {
        const char *name;
        int32_t count;
    } limits[3] = {{"attention heads", config->num_heads},
                   {"intermediate features", config->intermediate_size},
                   {"vocabulary rows", config->vocab_size}};
    for (int i = 0; i < 3; i++) {
        if (size > limits[i].count) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "tensor_parallel_size is %d; the model has only %d %s",
                           size, limits[i].count, limits[i].name);
        }
    }
    if (size < 1 || rank < 0 || rank >= size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "rank %d of %d; expected 0 to %d", rank, size, size - 1);
    }
    *out = (qf_shard){.rank = rank, .size = size, .vocab_size = config->vocab_size};
    share_heads(config, out);
    out->intermediate = share_units(config->intermediate_size, intermediate_unit(&config->quant), size, rank);
    out->vocab = share_units(config->vocab_size, VOCAB_UNIT, size, rank);
    return QF_OK;
}

/* --- the view ------------------------------------------------------------------------------------------ */

static void cut_rows(const qf_linear_source *whole, qf_range rows, qf_linear_source *out)
{
    *out = *whole;
    out->whole = whole;
    out->first_row = rows.begin;
    out->n = rows.end - rows.begin;
    out->bias = whole->bias != NULL ? whole->bias + rows.begin : NULL;
}

/* Sorted by group, a rank's columns are no whole groups: they go back to the model's order, each with its own scale. */
static qf_status find_column_groups(const qf_linear_source *whole, qf_linear_source *out, qf_error *err)
{
    int32_t *groups;
    QF_TRY(qf_alloc((void **)&groups, (size_t)out->k, sizeof *groups, "groups of columns", err));
    for (int32_t i = 0; i < whole->k; i++) {
        int32_t column = whole->perm[i] - out->first_column;
        if (column >= 0 && column < out->k) {
            groups[column] = i / whole->group_size;
        }
    }
    out->perm = NULL;
    out->column_groups = groups;
    qf_set_groups(out, 1);
    return QF_OK;
}

static qf_status cut_columns(const qf_linear_source *whole, qf_range columns, int32_t rank, qf_linear_source *out,
                             qf_error *err)
{
    *out = *whole;
    out->whole = whole;
    out->bias = rank == 0 ? whole->bias : NULL;
    if (columns.end - columns.begin == whole->k) {
        return QF_OK;
    }
    out->first_column = columns.begin;
    out->k = columns.end - columns.begin;
    if (whole->perm != NULL) {
        return find_column_groups(whole, out, err);
    }
    qf_set_groups(out, whole->num_groups > 1 ? gcd(whole->group_size, columns.begin) : -1);
    return QF_OK;
}

static qf_range times(qf_range range, int32_t factor) { return (qf_range){range.begin * factor, range.end * factor}; }

static qf_status cut_layer(const qf_checkpoint *whole, int32_t layer, qf_checkpoint *self, qf_error *err)
{
    const qf_layer_sources *in = &whole->layers[layer];
    qf_layer_sources *out = &self->layers[layer];
    const qf_shard *shard = &self->shard;
    qf_range heads = times(shard->heads, self->config.head_dim), kv_heads = times(shard->kv_heads, self->config.head_dim);
    memcpy(out->norms, in->norms, sizeof out->norms);
    cut_rows(&in->linears[QF_Q_PROJ], heads, &out->linears[QF_Q_PROJ]);
    cut_rows(&in->linears[QF_K_PROJ], kv_heads, &out->linears[QF_K_PROJ]);
    cut_rows(&in->linears[QF_V_PROJ], kv_heads, &out->linears[QF_V_PROJ]);
    cut_rows(&in->linears[QF_GATE_PROJ], shard->intermediate, &out->linears[QF_GATE_PROJ]);
    cut_rows(&in->linears[QF_UP_PROJ], shard->intermediate, &out->linears[QF_UP_PROJ]);
    QF_TRY(cut_columns(&in->linears[QF_O_PROJ], heads, shard->rank, &out->linears[QF_O_PROJ], err));
    return cut_columns(&in->linears[QF_DOWN_PROJ], shard->intermediate, shard->rank, &out->linears[QF_DOWN_PROJ], err);
}

static qf_status cut_all(const qf_checkpoint *whole, qf_checkpoint *self, qf_error *err)
{
    const qf_shard *shard = &self->shard;
    self->config = whole->config;
    self->config.num_heads = shard->heads.end - shard->heads.begin;
    self->config.num_kv_heads = shard->kv_heads.end - shard->kv_heads.begin;
    self->config.intermediate_size = shard->intermediate.end - shard->intermediate.begin;
    self->config.vocab_size = shard->vocab.end - shard->vocab.begin;
    self->dummy = whole->dummy;
    self->dummy_seed = whole->dummy_seed;
    self->dummy_bits = whole->dummy_bits;
    self->embedding = whole->embedding;
    self->final_norm = whole->final_norm;
    size_t num_layers = (size_t)self->config.num_layers;
    QF_TRY(qf_alloc((void **)&self->layers, num_layers, sizeof *self->layers, "layer table", err));
    for (int32_t layer = 0; layer < self->config.num_layers; layer++) {
        QF_TRY(cut_layer(whole, layer, self, err));
    }
    cut_rows(&whole->lm_head, shard->vocab, &self->lm_head);
    return QF_OK;
}

qf_status qf_checkpoint_shard(const qf_checkpoint *whole, int32_t rank, int32_t size, qf_checkpoint **out,
                              qf_error *err)
{
    *out = NULL;
    if (whole->shard.size != 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "this is rank %d's part of a checkpoint; only a whole one can be "
                       "cut", whole->shard.rank);
    }
    qf_checkpoint *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "a rank's checkpoint", err));
    qf_status status = qf_shard_plan(&whole->config, rank, size, &self->shard, err);
    if (status == QF_OK) {
        status = cut_all(whole, self, err);
    }
    if (status != QF_OK) {
        qf_checkpoint_close(self);
        return status;
    }
    *out = self;
    return QF_OK;
}
