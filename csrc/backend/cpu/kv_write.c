/* The rotary embedding, and the write of keys and values into the paged cache: the layout of 16 and 32 bits is at the top
 * of attention_body.h, that of a low-bit cache in kernels.h. */
/* needs: kv/format.c */
#include <math.h>
#include <string.h>

#include "backend/cpu/kernels.h"

/* Where component 0 of a token's key and value lies, in elements; keys are strided by 16. */
static size_t key_index(const qf_kv_cache *cache, int32_t slot, int32_t kv_head)
{
    const size_t block = (size_t)(slot / cache->block_size), offset = (size_t)(slot % cache->block_size);
    const size_t tiles = (size_t)cache->block_size / 16;
    const size_t tile = (block * (size_t)cache->num_kv_heads + (size_t)kv_head) * tiles + offset / 16;
    return tile * (size_t)cache->head_dim * 16 + offset % 16;
}

static size_t value_index(const qf_kv_cache *cache, int32_t slot, int32_t kv_head)
{
    const size_t block = (size_t)(slot / cache->block_size), offset = (size_t)(slot % cache->block_size);
    const size_t row = (block * (size_t)cache->num_kv_heads + (size_t)kv_head) * (size_t)cache->block_size + offset;
    return row * (size_t)cache->head_dim;
}

static void write_strided(void *cache, qf_dtype dtype, size_t index, size_t stride, const float *x, int32_t n)
{
    if (dtype == QF_DTYPE_F32) {
        float *out = (float *)cache + index;
        for (int32_t i = 0; i < n; i++) {
            out[(size_t)i * stride] = x[i];
        }
        return;
    }
    uint16_t *out = (uint16_t *)cache + index;
    for (int32_t i = 0; i < n; i++) {
        out[(size_t)i * stride] = qf_f32_to_bf16(x[i]);
    }
}

/* A key or value of a low-bit cache, rounded and scattered into its record. */
static void write_packed(void *store, const qf_kv_cache *cache, int32_t slot, int32_t kv_head, const float *x, bool is_key)
{
    uint8_t codes[QF_MAX_HEAD_DIM];
    uint16_t scales[QF_MAX_HEAD_DIM / QF_KV_GROUP];
    const int32_t head_dim = cache->head_dim, half = head_dim / 2;
    const int32_t offset = slot % cache->block_size, i = offset % 16;
    uint8_t *record = (uint8_t *)store + qf_cpu_kv_record(cache, slot / cache->block_size, kv_head, offset);
    const bool narrow = qf_kv_bits(cache->format) == 4;
    qf_kv_encode_row(cache->format, x, head_dim, codes, scales);
    if (is_key && narrow) {
        for (int32_t j = 0; j < half; j++) {
            record[j * 16 + i] = (uint8_t)(codes[j] | codes[j + half] << 4);
        }
    } else if (is_key) {
        for (int32_t d = 0; d < head_dim; d++) {
            record[d * 16 + i] = codes[d];
        }
    } else if (narrow) {
        for (int32_t j = 0; j < half; j++) {
            const int32_t low = j / 16 * 32 + j % 16;
            record[i * half + j] = (uint8_t)(codes[low] | codes[low + 16] << 4);
        }
    } else {
        memcpy(record + (size_t)i * (size_t)head_dim, codes, (size_t)head_dim);
    }
    uint16_t *words = (uint16_t *)(void *)(record + (size_t)(narrow ? half : head_dim) * 16);
    for (int32_t g = 0; g < qf_kv_scales_per_row(cache->format, head_dim); g++) {
        words[g * 16 + i] = scales[g];
    }
}

static void write_key(const qf_kv_cache *cache, int32_t slot, int32_t kv_head, const float *x)
{
    if (qf_kv_is_low_bit(cache->format)) {
        write_packed(cache->k, cache, slot, kv_head, x, true);
    } else {
        write_strided(cache->k, cache->dtype, key_index(cache, slot, kv_head), 16, x, cache->head_dim);
    }
}

static void write_value(const qf_kv_cache *cache, int32_t slot, int32_t kv_head, const float *x)
{
    if (qf_kv_is_low_bit(cache->format)) {
        write_packed(cache->v, cache, slot, kv_head, x, false);
    } else {
        write_strided(cache->v, cache->dtype, value_index(cache, slot, kv_head), 1, x, cache->head_dim);
    }
}

typedef struct write_task {
    const qf_cpu_kernels *kernels;
    const qf_rope_kv_write_args *args;
} write_task;

/* One token's key and value of one KV head. */
static void write_head(const write_task *task, int64_t t, int32_t h)
{
    const qf_rope_kv_write_args *a = task->args;
    const int32_t head_dim = a->cache.head_dim;
    const size_t at = ((size_t)t * (size_t)a->cache.num_kv_heads + (size_t)h) * (size_t)head_dim;
    const float *cos_sin = a->cos_sin + (size_t)t * (size_t)head_dim;
    float rotated[QF_MAX_HEAD_DIM], biased[QF_MAX_HEAD_DIM];
    const int32_t slot = a->slot_mapping[t];
    if (slot >= 0) {
        task->kernels->rope_head(a->k + at, cos_sin, rotated, head_dim);
        write_key(&a->cache, slot, h, rotated);
        write_value(&a->cache, slot, h, a->v + at);
    }
    if (a->window.k != NULL) {
        memcpy(biased, a->k + at, (size_t)head_dim * sizeof(float));
        for (int32_t d = 0; a->k_bias != NULL && d < head_dim; d++) {
            biased[d] += a->k_bias[h * head_dim + d]; /* as the linear layer would have added it */
        }
        task->kernels->rope_head(biased, cos_sin, rotated, head_dim);
        write_key(&a->window, a->window_slot_mapping[t], h, rotated);
        write_value(&a->window, a->window_slot_mapping[t], h, a->v + at);
    }
}

static void rope_task(void *arg, int64_t begin, int64_t end, int32_t worker)
{
    (void)worker;
    const write_task *task = arg;
    const qf_rope_kv_write_args *a = task->args;
    const size_t head_dim = (size_t)a->cache.head_dim;
    for (int64_t t = begin; t < end; t++) {
        const float *cos_sin = a->cos_sin + (size_t)t * head_dim;
        float *q = a->q + (size_t)t * (size_t)a->num_heads * head_dim;
        for (int32_t h = 0; h < a->num_heads; h++) {
            task->kernels->rope_head(q + (size_t)h * head_dim, cos_sin, q + (size_t)h * head_dim, a->cache.head_dim);
        }
        for (int32_t h = 0; h < a->cache.num_kv_heads; h++) {
            write_head(task, t, h);
        }
    }
}

void qf_cpu_rope_kv_write(qf_cpu_context *ctx, const qf_rope_kv_write_args *args)
{
    write_task task = {ctx->kernels, args};
    qf_cpu_for_rows(ctx, rope_task, &task, args->num_tokens,
                    (args->num_heads + 2 * args->cache.num_kv_heads) * args->cache.head_dim);
}

size_t qf_cpu_kv_cache_bytes(int32_t num_blocks, int32_t block_size, int32_t num_kv_heads, int32_t head_dim,
                             qf_kv_format format)
{
    return (size_t)num_blocks * (size_t)block_size * (size_t)num_kv_heads * qf_kv_row_bytes(format, head_dim);
}

/* --- the turns of a key's bias ----------------------------------------------------------------------------- */

size_t qf_cpu_tile_turn_floats(int32_t head_dim, int32_t max_model_len)
{
    return ((size_t)max_model_len + QF_BIAS_TILE - 1) / QF_BIAS_TILE * (size_t)head_dim;
}

size_t qf_cpu_step_turn_floats(int32_t head_dim) { return (size_t)head_dim * QF_BIAS_TILE; }

/* Angles in double, cosine and sine rounded once. rope_table in forward.c rounds the angle to float32 as the reference
 * does; these tables do not, and the two differ by what that rounding costs: 1e-3 rad at position 32,000 in the fastest
 * pair, where a trained bias is small, and nothing where it is large. */
void qf_cpu_fill_turns(const float *inv_freq, float attention_factor, int32_t head_dim, int32_t max_model_len,
                       float *tile_turn, float *step_turn)
{
    const int32_t half = head_dim / 2;
    const size_t num_tiles = qf_cpu_tile_turn_floats(head_dim, max_model_len) / (size_t)head_dim;
    for (int32_t j = 0; j < half; j++) {
        const double frequency = (double)inv_freq[j];
        for (size_t tile = 0; tile < num_tiles; tile++) {
            const double angle = (double)(tile * QF_BIAS_TILE) * frequency;
            tile_turn[tile * (size_t)head_dim + (size_t)j] = (float)(cos(angle) * (double)attention_factor);
            tile_turn[tile * (size_t)head_dim + (size_t)(half + j)] = (float)(sin(angle) * (double)attention_factor);
        }
        for (int32_t i = 0; i < QF_BIAS_TILE; i++) {
            step_turn[2 * j * QF_BIAS_TILE + i] = (float)cos((double)i * frequency);
            step_turn[(2 * j + 1) * QF_BIAS_TILE + i] = (float)sin((double)i * frequency);
        }
    }
}
