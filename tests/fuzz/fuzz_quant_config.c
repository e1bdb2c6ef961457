/* sources: base/json.c base/status.c base/alloc.c base/dtype.c model/quant_config.c model/fields.c */
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

static void check_accepted(const qf_quant_config *c)
{
    require(c->method >= QF_QUANT_AWQ && c->method <= QF_QUANT_COMPRESSED_TENSORS);
    require(c->bits == 4 || (c->bits == 8 && c->method != QF_QUANT_AWQ));
    require(c->group_size == -1 || c->group_size == 32 || c->group_size == 64 || c->group_size == 128);
    require(c->num_ignore >= 0 && c->num_ignore <= QF_QUANT_MAX_IGNORE);
    require(!c->gptq_v2 || c->method == QF_QUANT_GPTQ);
    for (int32_t i = 0; i < c->num_ignore; i++) {
        require(memchr(c->ignore[i], 0, sizeof c->ignore[i]) != NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    qf_error err;
    qf_json *document = NULL;
    qf_quant_config config;
    qf_json_limits limits = {.max_bytes = 1 << 16, .max_depth = 16, .max_values = 10000};
    if (qf_json_parse((const char *)data, size, &limits, "fuzz", &document, &err) != QF_OK) {
        return 0;
    }
    qf_status status = qf_quant_config_parse(qf_json_root(document), &config, &err);
    if (status == QF_OK) {
        check_accepted(&config);
    } else {
        require(status == QF_ERROR_MODEL && err.message[0] != '\0');
    }
    qf_json_destroy(document);
    return 0;
}
