/* sources: base/ model/ */
/* sanitizers: address */
/* alloc-faults: yes */
/* The parts of a checkpoint that ranks hold: together they are the whole, bit for bit, in every format. */
#include <math.h>
#include <stdlib.h>

#include "checkpoint_fixture.h"
#include "model/parallel.h"

enum { MAX_RANKS = 8, MAX_FILE = 1 << 20 };

/* --- ranges --------------------------------------------------------------------------------------------- */

typedef struct shape {
    int32_t heads, kv_heads, intermediate, vocab, group_size; /* group_size 0: not quantised */
} shape;

static qf_model_config config_of(const shape *s)
{
    qf_model_config config = {.num_heads = s->heads,
                              .num_kv_heads = s->kv_heads,
                              .intermediate_size = s->intermediate,
                              .vocab_size = s->vocab,
                              .head_dim = 64};
    config.quant.method = s->group_size != 0 ? QF_QUANT_GPTQ : QF_QUANT_NONE;
    config.quant.group_size = s->group_size;
    return config;
}

static int32_t length(qf_range range) { return range.end - range.begin; }

static void check_heads(const shape *s, const qf_shard *shard)
{
    int32_t group = s->heads / s->kv_heads;
    CHECK(length(shard->heads) > 0 && length(shard->kv_heads) > 0);
    CHECK_INT(length(shard->heads) % length(shard->kv_heads), 0);
    int32_t local_group = length(shard->heads) / length(shard->kv_heads);
    for (int32_t i = 0; i < length(shard->heads); i++) { /* a local head finds its kv head as kernels look for it */
        CHECK_INT(shard->kv_heads.begin + i / local_group, (shard->heads.begin + i) / group);
    }
}

static int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

/* Every size at which the model can be cut: parts in order, none missing, none twice, none empty, shares about even. */
static void check_shape(const shape *s)
{
    qf_model_config config = config_of(s);
    qf_error err;
    for (int32_t size = 1; size <= s->heads && size <= 64; size++) {
        qf_shard before = {0}, shard;
        int32_t largest = 0, smallest = INT32_MAX;
        for (int32_t rank = 0; rank < size; rank++, before = shard) {
            CHECK_OK(qf_shard_plan(&config, rank, size, &shard, &err));
            CHECK(shard.rank == rank && shard.size == size);
            check_heads(s, &shard);
            CHECK_INT(shard.heads.begin, before.heads.end);
            CHECK_INT(shard.intermediate.begin, before.intermediate.end);
            CHECK_INT(shard.vocab.begin, before.vocab.end);
            CHECK(length(shard.intermediate) > 0 && length(shard.vocab) > 0);
            largest = most(largest, length(shard.intermediate));
            smallest = -most(-smallest, -length(shard.intermediate));
            int32_t group = s->group_size > 0 ? s->group_size : 128;
            if (s->intermediate >= most(group, 128) * size) { /* no group is cut */
                CHECK_INT(shard.intermediate.begin % group, 0);
            }
            if (s->vocab >= 64 * size) {
                CHECK_INT(shard.vocab.begin % 64, 0);
            }
        }
        CHECK_INT(before.heads.end, s->heads);
        CHECK_INT(before.kv_heads.end, s->kv_heads);
        CHECK_INT(before.intermediate.end, s->intermediate);
        CHECK_INT(before.vocab.end, s->vocab);
        CHECK(largest - smallest < 2 * most(s->group_size, 128));
    }
}

static void test_ranges(void)
{
    static const shape shapes[] = {{14, 2, 4864, 151936, 128}, {12, 2, 8960, 151936, 128},  {16, 2, 11008, 151936, 0},
                                   {28, 4, 18944, 152064, 128}, {40, 8, 13824, 152064, 128}, {40, 8, 27648, 152064, 64},
                                   {64, 8, 29568, 152064, 128}, {64, 8, 29568, 152064, -1},  {5, 1, 96, 24, 32},
                                   {9, 3, 1000, 203, 256},      {6, 6, 131, 67, 100},        {1, 1, 1, 1, 0},
                                   {21, 7, 640, 999, 40}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_shape(&shapes[i]);
    }
}

static void test_known_ranges(void)
{
    static const shape half_b = {14, 2, 4864, 151936, 128}, big = {64, 8, 29568, 152064, 128};
    static const int32_t heads[4] = {4, 3, 4, 3}, kv[4] = {0, 0, 1, 1};
    qf_model_config config = config_of(&half_b);
    qf_shard shard;
    qf_error err;
    for (int32_t rank = 0; rank < 4; rank++) {
        CHECK_OK(qf_shard_plan(&config, rank, 4, &shard, &err));
        CHECK_INT(length(shard.heads), heads[rank]);
        CHECK_INT(shard.kv_heads.begin, kv[rank]);
        CHECK_INT(length(shard.kv_heads), 1);
        CHECK_INT(length(shard.intermediate), 128 * (rank < 2 ? 10 : 9)); /* 38 groups */
    }
    config = config_of(&big);
    for (int32_t rank = 0; rank < 8; rank++) {
        CHECK_OK(qf_shard_plan(&config, rank, 8, &shard, &err));
        CHECK_INT(length(shard.intermediate), 128 * (rank < 7 ? 29 : 28)); /* 231 groups */
        CHECK_INT(length(shard.vocab), 64 * 297);
    }
}

static void test_refusals(void)
{
    static const shape s = {14, 2, 4864, 151936, 128}, narrow = {8, 2, 5, 64, 0}, few = {8, 2, 64, 5, 0};
    qf_shard shard;
    qf_error err;
    qf_model_config config = config_of(&s);
    CHECK_INT(qf_shard_plan(&config, 0, 15, &shard, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(strstr(err.message, "15") != NULL && strstr(err.message, "14 attention heads") != NULL);
    CHECK_INT(qf_shard_plan(&config, 0, 0, &shard, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_INT(qf_shard_plan(&config, 2, 2, &shard, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_INT(qf_shard_plan(&config, -1, 2, &shard, &err), QF_ERROR_INVALID_ARGUMENT);
    config = config_of(&narrow);
    CHECK_INT(qf_shard_plan(&config, 0, 6, &shard, &err), QF_ERROR_INVALID_ARGUMENT);
    config = config_of(&few);
    CHECK_INT(qf_shard_plan(&config, 0, 6, &shard, &err), QF_ERROR_INVALID_ARGUMENT);
}

/* --- checkpoints of random bits ------------------------------------------------------------------------- */

/* Heads of 8: the parts' columns begin at odd multiples of 8; the last group of both row lengths is cut short. */
enum { HEADS = 6, KV_HEADS = 2, HEAD_DIM = 8, TEST_INTER = 296, TEST_VOCAB = 208, GROUP = 32 };

typedef enum layout {
    BF16 = 0,
    AWQ,
    GPTQ4,
    GPTQ8,
    GPTQ_ORDER,
    CT4,
    CT4_SYMMETRIC,
    CT8,
    CT_ORDER,
    CT_CHANNEL,
    NUM_KINDS
} layout;

static const char *const quant_json[NUM_KINDS] = {
    "",
    "\"quant_method\":\"awq\",\"bits\":4,\"group_size\":32,\"zero_point\":true,\"version\":\"gemm\"",
    "\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32,\"sym\":false,\"desc_act\":false",
    "\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":32,\"sym\":false,\"desc_act\":false",
    "\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32,\"sym\":false,\"desc_act\":true",
#define CT(bits, symmetric, strategy) \
    "\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":{" \
    "\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":" bits ",\"type\":\"int\",\"symmetric\":" symmetric "," strategy "}}}"
    CT("4", "false", "\"strategy\":\"group\",\"group_size\":32"),
    CT("4", "true", "\"strategy\":\"group\",\"group_size\":32"),
    CT("8", "true", "\"strategy\":\"group\",\"group_size\":32"),
    CT("4", "true", "\"strategy\":\"group\",\"group_size\":32,\"actorder\":\"group\""),
    CT("4", "true", "\"strategy\":\"channel\""),
};

typedef struct store {
    char header[1 << 14];
    uint8_t data[MAX_FILE];
    size_t header_bytes, data_bytes;
    uint32_t random;
} store;

static uint32_t next_random(store *s)
{
    s->random = s->random * 1664525u + 1013904223u;
    return s->random >> 8;
}

static uint8_t *put(store *s, const char *name, const char *suffix, const char *dtype, int32_t rows, int32_t cols,
                    size_t value_bytes)
{
    size_t bytes = (size_t)rows * (size_t)(cols > 0 ? cols : 1) * value_bytes;
    int n = snprintf(s->header + s->header_bytes, sizeof s->header - s->header_bytes,
                     "%s\"%s%s\":{\"dtype\":\"%s\",\"shape\":[%d", s->header_bytes == 0 ? "{" : ",", name, suffix,
                     dtype, rows);
    s->header_bytes += (size_t)n;
    n = snprintf(s->header + s->header_bytes, sizeof s->header - s->header_bytes, cols > 0 ? ",%d" : "", cols);
    s->header_bytes += (size_t)n;
    n = snprintf(s->header + s->header_bytes, sizeof s->header - s->header_bytes, "],\"data_offsets\":[%zu,%zu]}",
                 s->data_bytes, s->data_bytes + bytes);
    s->header_bytes += (size_t)n;
    uint8_t *at = s->data + s->data_bytes;
    s->data_bytes += bytes;
    CHECK(s->data_bytes <= sizeof s->data && s->header_bytes < sizeof s->header);
    return at;
}

static void put_words(store *s, const char *name, const char *suffix, int32_t rows, int32_t cols)
{
    uint8_t *at = put(s, name, suffix, "I32", rows, cols, 4);
    for (int32_t i = 0; i < rows * cols; i++) {
        uint32_t word = next_random(s) ^ (next_random(s) << 16);
        memcpy(at + 4 * (size_t)i, &word, 4);
    }
}

/* 16-bit floats of either kind, none infinite: from 0.008 to 1 as F16. */
static void put_halves(store *s, const char *name, const char *suffix, const char *dtype, int32_t rows, int32_t cols)
{
    uint8_t *at = put(s, name, suffix, dtype, rows, cols, 2);
    for (int32_t i = 0; i < rows * (cols > 0 ? cols : 1); i++) {
        uint16_t half = (uint16_t)(0x2000u + next_random(s) % 0x1c00u + ((next_random(s) & 1u) << 15));
        memcpy(at + 2 * (size_t)i, &half, 2);
    }
}

/* Columns dealt to groups in turn where their order is not plain. */
static void put_groups(store *s, const char *name, const char *suffix, int32_t k, bool act_order)
{
    uint8_t *at = put(s, name, suffix, "I32", k, 0, 4);
    int32_t num_groups = (k + GROUP - 1) / GROUP, counts[64] = {0};
    for (int32_t i = 0; i < k; i++) {
        int32_t group = i / GROUP;
        if (act_order) {
            group = (7 * i) % num_groups;
            while (counts[group] == (group == num_groups - 1 ? k - group * GROUP : GROUP)) {
                group = (group + 1) % num_groups;
            }
            counts[group]++;
        }
        memcpy(at + 4 * (size_t)i, &group, 4);
    }
}

static void put_linear(store *s, const char *name, layout kind, int32_t n, int32_t k)
{
    int32_t bits = kind == GPTQ8 || kind == CT8 ? 8 : 4, per_word = 32 / bits, groups = (k + GROUP - 1) / GROUP;
    if (kind == BF16) {
        put_halves(s, name, ".weight", "BF16", n, k);
    } else if (kind == AWQ) {
        put_words(s, name, ".qweight", k, n / 8);
        put_words(s, name, ".qzeros", groups, n / 8);
        put_halves(s, name, ".scales", "F16", groups, n);
    } else if (kind <= GPTQ_ORDER) {
        put_words(s, name, ".qweight", k / per_word, n);
        put_words(s, name, ".qzeros", groups, n / per_word);
        put_halves(s, name, ".scales", "F16", groups, n);
        put_groups(s, name, ".g_idx", k, kind == GPTQ_ORDER);
    } else {
        groups = kind == CT_CHANNEL ? 1 : groups;
        put_words(s, name, ".weight_packed", n, k / per_word);
        put_halves(s, name, ".weight_scale", "F16", n, groups);
        if (kind == CT4) {
            put_words(s, name, ".weight_zero_point", n / per_word, groups);
        }
        if (kind == CT_ORDER) {
            put_groups(s, name, ".weight_g_idx", k, true);
        }
    }
}

static void make_checkpoint(layout kind, bool tied)
{
    enum { Q = HEADS * HEAD_DIM, K = KV_HEADS * HEAD_DIM };
    static const struct {
        const char *name;
        int32_t n, k;
    } table[7] = {{"self_attn.q_proj", Q, HIDDEN}, {"self_attn.k_proj", K, HIDDEN}, {"self_attn.v_proj", K, HIDDEN},
                  {"self_attn.o_proj", HIDDEN, Q}, {"mlp.gate_proj", TEST_INTER, HIDDEN},
                  {"mlp.up_proj", TEST_INTER, HIDDEN}, {"mlp.down_proj", HIDDEN, TEST_INTER}};
    static store s;
    s.header_bytes = s.data_bytes = 0;
    s.random = 17 + (uint32_t)kind;
    put_halves(&s, "model.embed_tokens", ".weight", "BF16", TEST_VOCAB, HIDDEN);
    put_halves(&s, "model.norm", ".weight", "BF16", HIDDEN, 0);
    put_halves(&s, "model.layers.0.input_layernorm", ".weight", "BF16", HIDDEN, 0);
    put_halves(&s, "model.layers.0.post_attention_layernorm", ".weight", "BF16", HIDDEN, 0);
    if (!tied) {
        put_linear(&s, "lm_head", kind == CT8 ? CT8 : BF16, TEST_VOCAB, HIDDEN);
    }
    for (int i = 0; i < 7; i++) {
        char name[96];
        (void)snprintf(name, sizeof name, "model.layers.0.%s", table[i].name);
        put_linear(&s, name, kind, table[i].n, table[i].k);
        if (i < 3 || (kind == GPTQ4 && i == 3)) { /* a bias on o_proj: AutoGPTQ writes them */
            put_halves(&s, name, ".bias", "F16", table[i].n, 0);
        }
    }
    static uint8_t bytes[8 + sizeof s.header + sizeof s.data];
    uint64_t header_bytes = s.header_bytes + 1;
    memcpy(bytes, &header_bytes, 8);
    memcpy(bytes + 8, s.header, s.header_bytes);
    bytes[8 + s.header_bytes] = '}';
    memcpy(bytes + 8 + header_bytes, s.data, s.data_bytes);
    write_text("model.safetensors", (const char *)bytes, 8 + header_bytes + s.data_bytes);
    char config[2048];
    int n = snprintf(config, sizeof config,
                     "{\"model_type\":\"qwen2\",\"vocab_size\":%d,\"hidden_size\":%d,\"intermediate_size\":%d,"
                     "\"num_hidden_layers\":1,\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,"
                     "\"max_position_embeddings\":64,\"rope_theta\":1e4,\"tie_word_embeddings\":%s,"
                     "\"torch_dtype\":\"bfloat16\"%s%s%s}",
                     TEST_VOCAB, HIDDEN, TEST_INTER, HEADS, KV_HEADS, HEAD_DIM, tied ? "true" : "false",
                     kind == BF16 ? "" : ",\"quantization_config\":{", quant_json[kind], kind == BF16 ? "" : "}");
    write_text("config.json", config, (size_t)n);
}

/* --- parts of linears ----------------------------------------------------------------------------------- */

enum { MAX_N = TEST_INTER, MAX_K = TEST_INTER };

/* part (part->n, part->k) as floats, read in pieces of odd sizes. */
static void read_all(const qf_linear_source *source, float *out)
{
    for (int32_t n = 0; n < source->n;) {
        int32_t count = n % 2 == 0 ? 67 : 5;
        count = count < source->n - n ? count : source->n - n;
        qf_linear_source_read_f32(source, n, count, out + (size_t)n * (size_t)source->k);
        n += count;
    }
}

/* The integers, scales and zero points give the same floats. */
static void check_quantized(const qf_linear_source *part, const float *values)
{
    static uint8_t q[MAX_N * MAX_K], zeros[MAX_N * MAX_K];
    static float scales[MAX_N * MAX_K];
    int32_t wrong = 0;
    if (part->bits > 8) {
        return;
    }
    CHECK_INT(part->num_groups, (part->k + part->group_size - 1) / part->group_size);
    memset(q, 0xee, sizeof q);
    qf_linear_source_read_quantized(part, 0, part->n, q, scales, zeros);
    for (int32_t n = 0; n < part->n; n++) {
        for (int32_t i = 0; i < part->k; i++) {
            size_t at = (size_t)n * (size_t)part->num_groups + (size_t)(i / part->group_size);
            int32_t column = part->perm != NULL ? part->perm[i] : i;
            float value = scales[at] * (float)(q[(size_t)n * (size_t)part->k + (size_t)i] - zeros[at]);
            wrong += memcmp(&value, &values[(size_t)n * (size_t)part->k + (size_t)column], sizeof value) != 0;
        }
    }
    CHECK_INT(wrong, 0);
}

static void check_part(const qf_linear_source *whole, const qf_linear_source *part, qf_range rows, qf_range columns)
{
    static float all[MAX_N * MAX_K], values[MAX_N * MAX_K];
    int32_t wrong = 0;
    CHECK_INT(part->n, length(rows));
    CHECK_INT(part->k, length(columns));
    CHECK(part->bits == whole->bits && part->whole == whole);
    memset(values, 0xee, sizeof values);
    read_all(whole, all);
    read_all(part, values);
    for (int32_t n = 0; n < part->n; n++) {
        const float *expected = all + (size_t)(rows.begin + n) * (size_t)whole->k + (size_t)columns.begin;
        wrong += memcmp(values + (size_t)n * (size_t)part->k, expected, (size_t)part->k * sizeof *values) != 0;
    }
    CHECK_INT(wrong, 0);
    check_quantized(part, values);
}

static void check_bias(const qf_linear_source *whole, const qf_linear_source *part, qf_range rows, bool has_bias)
{
    CHECK_INT(part->bias != NULL, has_bias);
    if (has_bias && part->bias != NULL) {
        CHECK(memcmp(part->bias, whole->bias + rows.begin, (size_t)length(rows) * sizeof *part->bias) == 0);
    }
}

static qf_range times(qf_range range, int32_t factor) { return (qf_range){range.begin * factor, range.end * factor}; }

static void check_linears(const qf_checkpoint *whole, const qf_checkpoint *view)
{
    const qf_shard *shard = qf_checkpoint_get_shard(view);
    int32_t head_dim = qf_checkpoint_config(whole)->head_dim;
    qf_range heads = times(shard->heads, head_dim), kv_heads = times(shard->kv_heads, head_dim);
    qf_range rows[8] = {heads, kv_heads, kv_heads, {0, 0}, shard->intermediate, shard->intermediate, {0, 0}, shard->vocab};
    for (int32_t layer = 0; layer < qf_checkpoint_config(whole)->num_layers; layer++) {
        for (int32_t id = 0; id <= QF_LM_HEAD; id++) {
            const qf_linear_source *all = qf_checkpoint_linear(whole, layer, (qf_linear_id)id);
            const qf_linear_source *part = qf_checkpoint_linear(view, layer, (qf_linear_id)id);
            qf_range columns = {0, all->k};
            bool by_columns = id == QF_O_PROJ || id == QF_DOWN_PROJ;
            if (by_columns) {
                rows[id] = (qf_range){0, all->n};
                columns = id == QF_O_PROJ ? heads : shard->intermediate;
            }
            check_part(all, part, rows[id], columns);
            check_bias(all, part, rows[id], all->bias != NULL && (!by_columns || shard->rank == 0));
        }
    }
}

static void check_rest(const qf_checkpoint *whole, const qf_checkpoint *view)
{
    static uint8_t all[TEST_VOCAB * HIDDEN * 2], rows[TEST_VOCAB * HIDDEN * 2];
    const qf_shard *shard = qf_checkpoint_get_shard(view);
    const qf_model_config *config = qf_checkpoint_config(view);
    size_t row_bytes = HIDDEN * qf_dtype_size(qf_checkpoint_embedding_dtype(whole));
    CHECK_INT(qf_checkpoint_embedding_dtype(view), qf_checkpoint_embedding_dtype(whole));
    CHECK_INT(config->num_heads, length(shard->heads));
    CHECK_INT(config->num_kv_heads, length(shard->kv_heads));
    CHECK_INT(config->intermediate_size, length(shard->intermediate));
    CHECK_INT(config->vocab_size, length(shard->vocab));
    CHECK_INT(config->hidden_size, HIDDEN);
    qf_checkpoint_read_embedding(whole, 0, TEST_VOCAB, all);
    qf_checkpoint_read_embedding(view, 1, config->vocab_size - 1, rows);
    CHECK(memcmp(rows, all + (size_t)(shard->vocab.begin + 1) * row_bytes,
                 (size_t)(config->vocab_size - 1) * row_bytes) == 0);
    for (int id = 0; id < 3; id++) {
        float a[HIDDEN], b[HIDDEN];
        qf_checkpoint_read_norm(whole, 0, (qf_norm_id)id, a);
        qf_checkpoint_read_norm(view, 0, (qf_norm_id)id, b);
        CHECK(memcmp(a, b, sizeof a) == 0);
    }
}

static void check_all_sizes(const qf_checkpoint *whole)
{
    qf_error err;
    for (int32_t size = 1; size <= HEADS; size++) {
        for (int32_t rank = 0; rank < size; rank++) {
            qf_checkpoint *view = NULL;
            CHECK_OK(qf_checkpoint_shard(whole, rank, size, &view, &err));
            if (view != NULL) {
                check_linears(whole, view);
                check_rest(whole, view);
            }
            qf_checkpoint_close(view);
        }
    }
}

static void test_every_format(void)
{
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        for (int tied = 0; tied < 2; tied++) {
            qf_checkpoint *whole = NULL;
            qf_error err;
            make_dir();
            make_checkpoint((layout)kind, tied != 0);
            CHECK_OK(open_dir(&whole, &err));
            if (whole != NULL) {
                check_all_sizes(whole);
            }
            qf_checkpoint_close(whole);
            remove_dir();
        }
    }
}

static void test_dummy(void)
{
    static const int32_t bits[2] = {16, 4};
    for (int i = 0; i < 2; i++) {
        make_dir();
        make_checkpoint(BF16, i == 0);
        qf_checkpoint_options options = {.dir = dir, .dummy = true, .dummy_seed = 5, .dummy_bits = bits[i]};
        qf_checkpoint *whole = NULL;
        qf_error err;
        CHECK_OK(qf_checkpoint_open(&options, &whole, &err));
        if (whole != NULL) {
            check_all_sizes(whole);
        }
        qf_checkpoint_close(whole);
        remove_dir();
    }
}

/* What backends see of cuts that fall inside groups, and of act-order. */
static void test_groups_of_parts(void)
{
    qf_checkpoint *whole = NULL, *view = NULL;
    qf_error err;
    make_dir();
    make_checkpoint(AWQ, true);
    CHECK_OK(open_dir(&whole, &err));
    CHECK_OK(qf_checkpoint_shard(whole, 1, 2, &view, &err)); /* o_proj: columns 24 to 47 of groups of 32 */
    CHECK_INT(qf_checkpoint_linear(view, 0, QF_O_PROJ)->group_size, 8);
    CHECK_INT(qf_checkpoint_linear(view, 0, QF_DOWN_PROJ)->group_size, GROUP); /* cut between groups: 256 of 296 */
    CHECK_INT(qf_checkpoint_linear(view, 0, QF_DOWN_PROJ)->first_column, 256);
    qf_checkpoint *again = NULL;
    CHECK_INT(qf_checkpoint_shard(view, 0, 2, &again, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(again == NULL);
    CHECK_INT(qf_checkpoint_shard(whole, 0, HEADS + 1, &again, &err), QF_ERROR_INVALID_ARGUMENT);
    qf_checkpoint_close(view);
    qf_checkpoint_close(whole);
    make_checkpoint(GPTQ_ORDER, true);
    CHECK_OK(open_dir(&whole, &err));
    CHECK_OK(qf_checkpoint_shard(whole, 1, 2, &view, &err));
    const qf_linear_source *down = qf_checkpoint_linear(view, 0, QF_DOWN_PROJ);
    CHECK(down->perm == NULL && down->column_groups != NULL && down->group_size == 1);
    const qf_linear_source *gate = qf_checkpoint_linear(view, 0, QF_GATE_PROJ);
    CHECK(gate->perm != NULL && gate->column_groups == NULL && gate->group_size == GROUP);
    qf_checkpoint_close(view);
    qf_checkpoint_close(whole);
    remove_dir();
}

#ifdef CHECK_ALLOC_FAULTS
static void test_out_of_memory(void)
{
    qf_checkpoint *whole = NULL;
    qf_error err;
    make_dir();
    make_checkpoint(GPTQ_ORDER, true);
    CHECK_OK(open_dir(&whole, &err));
    for (int64_t n = 1;; n++) {
        qf_checkpoint *view;
        check_fail_alloc(n);
        qf_status status = qf_checkpoint_shard(whole, 1, 3, &view, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        CHECK((view != NULL) == (status == QF_OK));
        qf_checkpoint_close(view);
        if (!failed) {
            CHECK_INT(n, 5); /* the view, its layers, the column groups of o and down */
            break;
        }
    }
    qf_checkpoint_close(whole);
    remove_dir();
}
#endif

int main(void)
{
    RUN(test_ranges);
    RUN(test_known_ranges);
    RUN(test_refusals);
    RUN(test_every_format);
    RUN(test_dummy);
    RUN(test_groups_of_parts);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_out_of_memory);
#endif
    return check_report();
}
