/* A checkpoint's weights on the device: planned to the byte, loaded in parallel, repacked there.
 *
 * One region of the device arena holds everything that stays on the device: embedding | layer 0 | layer 1 | ... | head.
 * A layer's tensors form one contiguous blob with the same layout for each layer that has the same formats, so that a
 * blob can also live in pinned host memory and be copied into a slot on the device before it is used. */
#ifndef QF_BACKEND_CUDA_WEIGHTS_H
#define QF_BACKEND_CUDA_WEIGHTS_H

#include "backend/backend.h"
#include "base/threads.h"
#include "qf_kernels.h"

/* One fused linear: how it is packed, and where its parts stand in the layer's blob (or in the head's). 256-byte
 * aligned offsets; SIZE_MAX: none. */
typedef struct qf_cuda_linear_layout {
    int32_t n, k;               /* as packed */
    int32_t real_n, real_k;     /* the model's */
    int32_t bits, group_size;   /* 4, 8, 16; 32: float32 rows (real_n, real_k), for dtype="float32" */
    int32_t quantize_bits, quantize_group_size; /* 4, 8: rounded while loading; 16 bits then hold what that gives */
    float scale_multiplier;     /* filled at load */
    size_t data, scales, bias, perm;
} qf_cuda_linear_layout;

typedef struct qf_cuda_layer_layout {
    qf_cuda_linear_layout qkv, o, gate_up, down; /* float32: gate_up is gate's rows, then up's */
    size_t input_norm, post_attention_norm;      /* (hidden_size) float32 each */
    size_t k_bias; /* (num_kv_heads * head_dim) float32: of a low-bit cache, whose keys are stored without it: the part
                      of qkv.bias is zero. SIZE_MAX: none */
    size_t size_bytes;                           /* a multiple of 256 */
} qf_cuda_layer_layout;

typedef struct qf_cuda_weights_layout {
    int32_t num_layers;
    qf_cuda_layer_layout *layers; /* (num_layers) owned */
    qf_cuda_linear_layout head;   /* offsets from head_offset */
    size_t final_norm;            /* offset from head_offset */
    bool head_is_embedding;       /* tied, 16-bit head: the embedding is read from the head's fragments (or float32
                                     rows), and takes no bytes of its own */
    bool embedding_on_host;       /* cpu_offload="embeddings" */
    int32_t embedding_bits;       /* 16, 32; -16: the head's fragments: see qf_cuda_embedding_args */
    int32_t num_host_layers;      /* the last ones: their blobs stay in pinned host memory */
    size_t embedding_offset, layers_offset, head_offset; /* into the device region */
    size_t device_bytes;          /* the whole device region: embedding, layers that stay, head */
    size_t embedding_bytes, layers_bytes, head_bytes; /* its parts; a part on the host counts 0 here */
    size_t host_bytes;            /* pinned: the embedding, then host layers' blobs */
    size_t slot_bytes;            /* the largest host layer's blob; 0: none. The device holds two slots (elsewhere) */
    int32_t num_widened;          /* linears of 16 bits only because a rank's columns cut their groups or their order */
    size_t raw_bytes;             /* while loading: raw tensors on the device, twice, then one blob of slot_bytes */
} qf_cuda_weights_layout;

/* What the layer's KV cache holds: QF_KV_F32, QF_KV_BF16, or a low-bit format. */
static inline qf_kv_format qf_cuda_layer_kv_format(const qf_backend_options *options, int32_t layer)
{
    if (!qf_kv_is_low_bit(options->kv_format)) {
        return options->float32 ? QF_KV_F32 : QF_KV_BF16;
    }
    return options->kv_16bit_layers != NULL && options->kv_16bit_layers[layer] != 0 ? QF_KV_BF16 : options->kv_format;
}

qf_status qf_cuda_weights_plan(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                               qf_cuda_weights_layout *out, qf_error *err);
void qf_cuda_weights_layout_deinit(qf_cuda_weights_layout *self); /* NULL-safe in its parts */

typedef struct qf_cuda_layer {
    qf_cuda_weight qkv, o, gate_up, down; /* float32: bits 32, data (n, k) float32 */
    const float *input_norm, *post_attention_norm;
    const float *k_bias;   /* (num_kv_heads, head_dim): see qf_cuda_layer_layout; NULL: none */
    const void *host_blob; /* NULL: on the device; else all pointers above are relative to a slot: see rebase */
} qf_cuda_layer;

typedef struct qf_cuda_weights {
    const void *embedding; /* as the device sees it */
    qf_cuda_layer *layers; /* (num_layers) owned, host memory */
    int32_t num_layers;
    qf_cuda_weight head;
    const float *final_norm;
} qf_cuda_weights;

/* Reads and repacks everything. device: layout->device_bytes; host: layout->host_bytes of pinned memory (NULL if 0).
 * Uses its own stream and staging memory, freed before it returns; staging on the device is taken from `scratch`
 * (scratch_bytes >= qf_cuda_weights_scratch_bytes), which the caller has no other use for yet. */
qf_status qf_cuda_weights_load(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                               qf_cuda_weights_layout *layout, const qf_cuda_device *device, void *device_memory,
                               void *host_memory, void *scratch, size_t scratch_bytes, qf_thread_pool *pool,
                               qf_progress_fn progress, void *progress_arg, qf_cuda_weights *out, qf_error *err);
size_t qf_cuda_weights_scratch_bytes(const qf_cuda_weights_layout *layout);
void qf_cuda_weights_deinit(qf_cuda_weights *self);

/* The layer's pointers with its blob at `base` (a slot on the device). */
void qf_cuda_layer_at(const qf_cuda_layer_layout *layout, void *base, qf_cuda_layer *out);

#endif
