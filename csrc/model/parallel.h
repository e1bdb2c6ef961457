/* Tensor parallelism: which part of a model each of several ranks holds, and a checkpoint that shows just that part.
 *
 * q, k, v, gate, up, the head and the embedding are cut by rows (heads, intermediate features, vocabulary), o and down
 * by columns, so a layer takes two sums over the ranks. Query heads go with their kv head. Where there are more ranks
 * than kv heads, ranks share one: each keeps its keys and values, and some of its query heads. Nothing has to divide
 * evenly: shares differ by one unit (a head, 128 intermediate features, 64 rows of vocabulary) at most. */
#ifndef QF_MODEL_PARALLEL_H
#define QF_MODEL_PARALLEL_H

#include "model/checkpoint.h"

typedef struct qf_range {
    int32_t begin, end;
} qf_range;

/* What rank `rank` of `size` holds. */
typedef struct qf_shard {
    int32_t rank, size;
    qf_range heads, kv_heads; /* either whole groups of query heads, or one kv head and some of its query heads */
    qf_range intermediate;    /* features between gate, up and down */
    qf_range vocab;           /* token ids: rows of the embedding and of the head */
    int32_t vocab_size;       /* of all ranks together */
} qf_shard;

/* Pure. QF_ERROR_INVALID_ARGUMENT: more ranks than query heads (or than features, or token ids). */
qf_status qf_shard_plan(const qf_model_config *config, int32_t rank, int32_t size, qf_shard *out, qf_error *err);

/* The part of `whole` that a rank holds, as a checkpoint of its own: its config has the part's num_heads, num_kv_heads,
 * intermediate_size and vocab_size, its linears the part's n, k and bias, and embedding rows count from the part's
 * first. Nothing is copied: it is closed before `whole`, which other threads may read at the same time. A bias of a
 * linear that is cut by columns is rank 0's alone.
 *
 * Where a cut falls inside a group of columns that share a scale, the part's group_size divides the whole's. An
 * act-order layer that is cut by columns has them in the model's order, with column_groups: no kernel packs that, so
 * backends dequantise it. */
qf_status qf_checkpoint_shard(const qf_checkpoint *whole, int32_t rank, int32_t size, qf_checkpoint **out,
                              qf_error *err);

/* Of a whole checkpoint: rank 0 of 1. */
const qf_shard *qf_checkpoint_get_shard(const qf_checkpoint *self);

#endif
