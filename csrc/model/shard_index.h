/* model.safetensors.index.json: which shard holds which tensor.
 *
 *   {"metadata": ..., "weight_map": {tensor name: shard name, ...}}
 *
 * The parser is a pure function over bytes; whether the shards exist and hold these tensors is for shards.c. */
#ifndef QF_MODEL_SHARD_INDEX_H
#define QF_MODEL_SHARD_INDEX_H

#include <stddef.h>
#include <stdint.h>

#include "base/json.h"
#include "base/status.h"

#define QF_SHARD_INDEX_NAME "model.safetensors.index.json"
#define QF_MAX_SHARDS 4096

typedef struct qf_shard_index {
    qf_json *json;
    const qf_json_value *map; /* the weight_map: an object with members, each the name of a shard */
    const char **names;       /* (count) those names, sorted, none twice; an index here is the number of a shard */
    int32_t count;
} qf_shard_index;

/* Errors are QF_ERROR_MODEL and begin with the name of the index file. Every shard name that is accepted is a plain
 * file name, printable, with the ending .safetensors: nothing that leads out of the directory. */
qf_status qf_shard_index_parse(const char *text, size_t size_bytes, qf_shard_index *out, qf_error *err);
void qf_shard_index_deinit(qf_shard_index *self); /* for a zeroed one, too */

#endif
