/* sources: base/json.c base/status.c base/alloc.c base/dtype.c model/config.c model/quant_config.c model/fields.c
 *          model/rope.c */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"

/* libFuzzer's contract: a finding is an abort. */
static void require(int ok)
{
    if (!ok) {
        abort();
    }
}

static void check_accepted(const qf_model_config *c)
{
    float inv_freq[128]; /* (head_dim / 2) */
    require(c->vocab_size > 0 && c->hidden_size > 0 && c->intermediate_size > 0 && c->num_layers > 0);
    require(c->num_heads > 0 && c->num_kv_heads > 0 && c->num_heads % c->num_kv_heads == 0);
    require(c->head_dim >= 2 && c->head_dim <= 256 && c->head_dim % 2 == 0);
    require(c->max_position_embeddings > 0 && c->rms_norm_eps > 0.0f && c->sliding_window >= 0);
    require(c->quant.num_ignore >= 0 && c->quant.num_ignore <= QF_QUANT_MAX_IGNORE);
    require(c->quant.method == QF_QUANT_NONE || c->quant.bits == 4 || c->quant.bits == 8);
    require(c->rope.attention_factor > 0.0);
    qf_rope_inv_freq(&c->rope, c->head_dim, inv_freq);
    for (int32_t j = 0; j < c->head_dim / 2; j++) {
        require(isfinite(inv_freq[j]) && inv_freq[j] >= 0.0f && inv_freq[j] <= 1.0f);
    }
    for (int32_t layer = 0; layer < c->num_layers; layer++) {
        require(!qf_model_config_layer_slides(c, layer) || c->sliding_window > 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The input is config.json; with a NUL byte in it, what follows is the overrides. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    qf_error err;
    qf_json *file = NULL;
    qf_json *overrides = NULL;
    qf_model_config config;
    qf_json_limits limits = {.max_bytes = 1 << 16, .max_depth = 16, .max_values = 10000};
    const uint8_t *end = size > 0 ? memchr(data, 0, size) : NULL;
    size_t file_size = end != NULL ? (size_t)(end - data) : size;
    qf_status status = qf_json_parse((const char *)data, file_size, &limits, "fuzz", &file, &err);
    if (status == QF_OK && end != NULL) {
        status = qf_json_parse((const char *)end + 1, size - file_size - 1, &limits, "fuzz", &overrides, &err);
    }
    if (status == QF_OK) {
        const qf_json_value *more = overrides != NULL ? qf_json_root(overrides) : NULL;
        status = qf_model_config_parse(qf_json_root(file), more, &config, &err);
        if (status == QF_OK) {
            check_accepted(&config);
        } else {
            require(status == QF_ERROR_MODEL || status == QF_ERROR_INVALID_ARGUMENT);
            require(err.message[0] != '\0');
        }
    }
    qf_json_destroy(overrides);
    qf_json_destroy(file);
    return 0;
}
