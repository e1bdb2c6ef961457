/* The inside of a checkpoint; internal to csrc/model. */
#ifndef QF_MODEL_CHECKPOINT_STATE_H
#define QF_MODEL_CHECKPOINT_STATE_H

#include "model/parallel.h"
#include "model/shards.h"

typedef struct qf_layer_sources {
    qf_tensor norms[2]; /* (hidden_size) by qf_norm_id */
    qf_linear_source linears[QF_LINEARS_PER_LAYER];
} qf_layer_sources;

struct qf_checkpoint {
    qf_model_config config;
    qf_shard shard;   /* of a part: config and sources are the part's, and the shards are another's */
    qf_shards shards;
    bool dummy;
    uint64_t dummy_seed;
    int32_t dummy_bits;
    qf_tensor embedding;  /* (vocab_size, hidden_size) of the whole */
    qf_tensor final_norm; /* (hidden_size) */
    qf_layer_sources *layers; /* (num_layers) */
    qf_linear_source lm_head;
};

#endif
