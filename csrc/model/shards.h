/* All tensors of a checkpoint directory: model.safetensors, or the shards that model.safetensors.index.json names. */
#ifndef QF_MODEL_SHARDS_H
#define QF_MODEL_SHARDS_H

#include "model/safetensors.h"

typedef struct qf_shard_tensor {
    const qf_tensor *tensor;
    int32_t shard;
} qf_shard_tensor;

typedef struct qf_shards {
    qf_safetensors_file *files; /* (num_files) */
    int32_t num_files;
    qf_shard_tensor *tensors; /* (num_tensors) sorted by name, no name twice */
    size_t num_tensors;
} qf_shards;

qf_status qf_shards_open(const char *dir, qf_shards *out, qf_error *err);
void qf_shards_close(qf_shards *self); /* for a zeroed one, too */
const qf_tensor *qf_shards_find(const qf_shards *self, const char *name); /* NULL if there is none */

#endif
