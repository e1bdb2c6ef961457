/* Checkpoint tools behind qf.h that need no engine. */
#include <string.h>

#include "base/alloc.h"
#include "engine/engine.h"
#include "model/quantize.h"

/* "lm_head" or "model.layers.<i>.<block>.<name>" as the sources spell it. */
static const qf_linear_source *find_linear(const qf_checkpoint *checkpoint, const char *module)
{
    for (int32_t i = 0; i < qf_checkpoint_config(checkpoint)->num_layers; i++) {
        for (int32_t id = 0; id <= QF_LM_HEAD; id++) {
            const qf_linear_source *source = qf_checkpoint_linear(checkpoint, i, (qf_linear_id)id);
            if (strcmp(source->name, module) == 0) {
                return source;
            }
        }
    }
    return NULL;
}

qf_status qf_checkpoint_dequantize(const char *model_dir, const char *module, float **out, int32_t *n, int32_t *k,
                                   qf_error *err)
{
    qf_checkpoint_options options = {.dir = model_dir};
    qf_checkpoint *checkpoint;
    QF_TRY(qf_checkpoint_open(&options, &checkpoint, err));
    const qf_linear_source *source = find_linear(checkpoint, module);
    qf_status status;
    if (source == NULL) {
        status = QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "the model has no linear layer called \"%.96s\"", module);
    } else {
        *n = source->n;
        *k = source->k;
        status = qf_alloc((void **)out, (size_t)source->n * (size_t)source->k, sizeof(float), "dequantised weights",
                          err);
        if (status == QF_OK) {
            qf_linear_source_read_f32(source, 0, source->n, *out);
        }
    }
    qf_checkpoint_close(checkpoint);
    return status;
}

qf_status qf_quantize_rtn(const float *w, int32_t count, int32_t k, int32_t bits, int32_t group_size, uint8_t *q,
                          float *scales, uint8_t *zeros, qf_error *err)
{
    if (count < 1 || k < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "weights must have at least one row and column; got (%d, %d)",
                       count, k);
    }
    if (bits != 4 && bits != 8) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "bits must be 4 or 8; got %d", bits);
    }
    if (group_size < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "group_size must be at least 1; got %d", group_size);
    }
    qf_quantize_rows(w, count, k, bits, group_size, q, scales, zeros);
    return QF_OK;
}

void qf_buffer_free(void *memory) { qf_free(memory); }
