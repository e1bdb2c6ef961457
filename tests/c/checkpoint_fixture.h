/* Checkpoints in a temporary folder, for the tests of csrc/model: a model of one layer, dense or GPTQ. */
#ifndef QF_TESTS_CHECKPOINT_FIXTURE_H
#define QF_TESTS_CHECKPOINT_FIXTURE_H

#include <dirent.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"
#include "model/checkpoint.h"

#define HIDDEN 64
#define INTER 96
#define KV 16
#define VOCAB 24

#define CONFIG                                                                                                  \
    "{\"model_type\":\"qwen2\",\"vocab_size\":24,\"hidden_size\":64,\"intermediate_size\":96,"                    \
    "\"num_hidden_layers\":1,\"num_attention_heads\":4,\"num_key_value_heads\":1,"                                \
    "\"max_position_embeddings\":128,\"rope_theta\":1e4,\"tie_word_embeddings\":true,\"torch_dtype\":\"float32\"" \
    "%s}"
#define GPTQ \
    ",\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32,\"sym\":false,\"desc_act\":true}"

/* A safetensors file in the making. */
typedef struct maker {
    char header[8192];
    uint8_t data[1 << 18];
    size_t header_bytes, data_bytes;
} maker;

static char dir[128]; /* the checkpoint of the current test */

static inline void add(maker *m, const char *name, const char *dtype, const char *shape, const void *values,
                       size_t bytes)
{
    int n = snprintf(m->header + m->header_bytes, sizeof m->header - m->header_bytes,
                     "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                     m->header_bytes == 0 ? "{" : ",", name, dtype, shape, m->data_bytes, m->data_bytes + bytes);
    m->header_bytes += (size_t)n;
    memcpy(m->data + m->data_bytes, values, bytes);
    m->data_bytes += bytes;
}

/* float32 values f(i) = ((i * 7 + salt) % 64 - 32) / 64 */
static inline float value_of(int32_t i, int32_t salt) { return (float)((i * 7 + salt) % 64 - 32) / 64.0f; }

static inline void add_f32(maker *m, const char *name, int32_t rows, int32_t cols, int32_t salt)
{
    static float values[INTER * HIDDEN];
    char shape[64];
    for (int32_t i = 0; i < rows * cols; i++) {
        values[i] = value_of(i, salt);
    }
    (void)snprintf(shape, sizeof shape, rows == 1 ? "[%d]" : "[%d,%d]", rows == 1 ? cols : rows, cols);
    add(m, name, "F32", shape, values, sizeof(float) * (size_t)(rows * cols));
}

static const struct {
    const char *name;
    int32_t n, k;
} linears[7] = {
    {"self_attn.q_proj", HIDDEN, HIDDEN}, {"self_attn.k_proj", KV, HIDDEN}, {"self_attn.v_proj", KV, HIDDEN},
    {"self_attn.o_proj", HIDDEN, HIDDEN}, {"mlp.gate_proj", INTER, HIDDEN}, {"mlp.up_proj", INTER, HIDDEN},
    {"mlp.down_proj", HIDDEN, INTER},
};

/* Column i belongs to group 1 - i % 2 where k is 64, so that act-order has something to sort. */
static inline int32_t group_of(int32_t k, int32_t i) { return k == 64 ? 1 - i % 2 : i / 32; }

static inline void add_gptq(maker *m, const char *name, int32_t n, int32_t k)
{
    static uint32_t words[INTER * HIDDEN / 8];
    static uint16_t scales[3 * INTER];
    int32_t g_idx[INTER];
    char full[112], shape[32];
    int32_t groups = k / 32;
    memset(words, 0, sizeof words);
    for (int32_t i = 0; i < k * n; i++) {
        int32_t col = i / n, row = i % n;
        words[col / 8 * n + row] |= (uint32_t)((col + row) % 16) << (4 * (col % 8));
    }
    (void)snprintf(full, sizeof full, "%s.qweight", name);
    (void)snprintf(shape, sizeof shape, "[%d,%d]", k / 8, n);
    add(m, full, "I32", shape, words, sizeof(uint32_t) * (size_t)(k / 8 * n));
    memset(words, 0, sizeof words);
    for (int32_t i = 0; i < groups * n; i++) {
        int32_t g = i / n, row = i % n;
        uint32_t stored = (uint32_t)(row + g - 1) & 15u; /* version 1: one less */
        words[g * (n / 8) + row / 8] |= stored << (4 * (row % 8));
        scales[i] = qf_f32_to_f16(0.25f * (float)(g + 1));
    }
    (void)snprintf(full, sizeof full, "%s.qzeros", name);
    (void)snprintf(shape, sizeof shape, "[%d,%d]", groups, n / 8);
    add(m, full, "I32", shape, words, sizeof(uint32_t) * (size_t)(groups * n / 8));
    (void)snprintf(full, sizeof full, "%s.scales", name);
    (void)snprintf(shape, sizeof shape, "[%d,%d]", groups, n);
    add(m, full, "F16", shape, scales, sizeof(uint16_t) * (size_t)(groups * n));
    for (int32_t i = 0; i < k; i++) {
        g_idx[i] = group_of(k, i);
    }
    (void)snprintf(full, sizeof full, "%s.g_idx", name);
    (void)snprintf(shape, sizeof shape, "[%d]", k);
    add(m, full, "I32", shape, g_idx, sizeof(int32_t) * (size_t)k);
}

static inline void fill(maker *m, bool gptq)
{
    memset(m, 0, sizeof *m);
    add_f32(m, "model.embed_tokens.weight", VOCAB, HIDDEN, 1);
    add_f32(m, "model.norm.weight", 1, HIDDEN, 2);
    add_f32(m, "model.layers.0.input_layernorm.weight", 1, HIDDEN, 3);
    add_f32(m, "model.layers.0.post_attention_layernorm.weight", 1, HIDDEN, 4);
    for (int32_t i = 0; i < 7; i++) {
        char name[96], full[128];
        (void)snprintf(name, sizeof name, "model.layers.0.%s", linears[i].name);
        (void)snprintf(full, sizeof full, "%s.weight", name);
        if (gptq) {
            add_gptq(m, name, linears[i].n, linears[i].k);
        } else {
            add_f32(m, full, linears[i].n, linears[i].k, 10 + i);
        }
        if (i < 3) {
            (void)snprintf(full, sizeof full, "%s.bias", name);
            add_f32(m, full, 1, linears[i].n, 20 + i);
        }
    }
}

static inline void write_text(const char *name, const char *text, size_t bytes)
{
    char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL && fwrite(text, 1, bytes, file) == bytes && fclose(file) == 0);
}

static inline void write_file(const maker *m, const char *name)
{
    static uint8_t bytes[8 + sizeof m->header + sizeof m->data];
    size_t header_bytes = m->header_bytes + 1;
    memset(bytes, 0, 8);
    bytes[0] = (uint8_t)header_bytes;
    bytes[1] = (uint8_t)(header_bytes >> 8);
    memcpy(bytes + 8, m->header, m->header_bytes);
    bytes[8 + m->header_bytes] = '}';
    memcpy(bytes + 8 + header_bytes, m->data, m->data_bytes);
    write_text(name, (const char *)bytes, 8 + header_bytes + m->data_bytes);
}

static inline void write_config(const char *more)
{
    char text[2048];
    int n = snprintf(text, sizeof text, CONFIG, more);
    write_text("config.json", text, (size_t)n);
}

static inline void make_dir(void)
{
    (void)snprintf(dir, sizeof dir, "/tmp/qf_test_model_XXXXXX");
    CHECK(mkdtemp(dir) != NULL);
}

static inline void remove_dir(void)
{
    DIR *listing = opendir(dir);
    CHECK(listing != NULL);
    for (const struct dirent *entry; listing != NULL && (entry = readdir(listing)) != NULL;) {
        char path[512];
        (void)snprintf(path, sizeof path, "%s/%s", dir, entry->d_name);
        CHECK(strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 || remove(path) == 0);
    }
    CHECK(listing == NULL || closedir(listing) == 0);
    CHECK(rmdir(dir) == 0);
}

static inline qf_status open_dir(qf_checkpoint **out, qf_error *err)
{
    qf_checkpoint_options options = {.dir = dir};
    return qf_checkpoint_open(&options, out, err);
}

#endif
