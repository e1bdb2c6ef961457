/* sources: base/status.c base/alloc.c base/dtype.c base/json.c model/ */
/* sanitizers: address thread */
/* alloc-faults: yes */
/* Whole checkpoints in a temporary folder: formats, the errors of opening, dummy weights, reading from threads. */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"
#include "model/checkpoint.h"

#define MAX_TENSORS 64
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

static void add(maker *m, const char *name, const char *dtype, const char *shape, const void *values, size_t bytes)
{
    int n = snprintf(m->header + m->header_bytes, sizeof m->header - m->header_bytes,
                     "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                     m->header_bytes == 0 ? "{" : ",", name, dtype, shape, m->data_bytes, m->data_bytes + bytes);
    m->header_bytes += (size_t)n;
    memcpy(m->data + m->data_bytes, values, bytes);
    m->data_bytes += bytes;
}

/* float32 values f(i) = ((i * 7 + salt) % 64 - 32) / 64 */
static float value_of(int32_t i, int32_t salt) { return (float)((i * 7 + salt) % 64 - 32) / 64.0f; }

static void add_f32(maker *m, const char *name, int32_t rows, int32_t cols, int32_t salt)
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
static int32_t group_of(int32_t k, int32_t i) { return k == 64 ? 1 - i % 2 : i / 32; }

static float gptq_value(int32_t k, int32_t row, int32_t col)
{
    int32_t g = group_of(k, col);
    return (0.25f * (float)(g + 1)) * (float)((col + row) % 16 - (row + g) % 16);
}

static void add_gptq(maker *m, const char *name, int32_t n, int32_t k)
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

static void fill(maker *m, bool gptq)
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

static void write_text(const char *name, const char *text, size_t bytes)
{
    char path[256];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL && fwrite(text, 1, bytes, file) == bytes && fclose(file) == 0);
}

static void write_file(const maker *m, const char *name)
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

static void write_config(const char *more)
{
    char text[2048];
    int n = snprintf(text, sizeof text, CONFIG, more);
    write_text("config.json", text, (size_t)n);
}

static void make_dir(void)
{
    (void)snprintf(dir, sizeof dir, "/tmp/qf_test_model_XXXXXX");
    CHECK(mkdtemp(dir) != NULL);
}

static void remove_dir(void)
{
    static const char *const names[] = {"config.json", "model.safetensors", "model.safetensors.index.json",
                                        "a.safetensors", "b.safetensors", "quantize_config.json"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[256];
        (void)snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        (void)unlink(path);
    }
    CHECK(rmdir(dir) == 0);
}

static qf_status open_dir(qf_checkpoint **out, qf_error *err)
{
    qf_checkpoint_options options = {.dir = dir};
    return qf_checkpoint_open(&options, out, err);
}

/* Opening must fail with these words; *out stays NULL. */
static void refuse(qf_status expected, const char *words)
{
    qf_error err = {0};
    qf_checkpoint *checkpoint;
    CHECK_STATUS(open_dir(&checkpoint, &err), expected);
    CHECK(checkpoint == NULL);
    if (strstr(err.message, words) == NULL) {
        (void)fprintf(stderr, "\"%s\" without \"%s\"\n", err.message, words);
    }
    CHECK(strstr(err.message, words) != NULL);
}

static void refuse_file(const maker *m, const char *words)
{
    write_file(m, "model.safetensors");
    refuse(QF_ERROR_MODEL, words);
}

static void test_dense(void)
{
    static maker m;
    qf_error err;
    qf_checkpoint *checkpoint;
    make_dir();
    write_config("");
    fill(&m, false);
    add_f32(&m, "model.layers.0.self_attn.rotary_emb.inv_freq", 1, 8, 9); /* not read */
    write_file(&m, "model.safetensors");
    CHECK_OK(open_dir(&checkpoint, &err));
    float row[INTER]; /* (k) */
    for (int32_t id = 0; id < 7; id++) {
        const qf_linear_source *source = qf_checkpoint_linear(checkpoint, 0, (qf_linear_id)id);
        CHECK_INT(source->format, QF_LINEAR_DENSE);
        CHECK_INT(source->n, linears[id].n);
        qf_linear_source_read_f32(source, source->n - 1, 1, row);
        bool same = true;
        for (int32_t i = 0; i < source->k; i++) {
            same = same && row[i] == value_of((source->n - 1) * source->k + i, 10 + id);
        }
        CHECK(same);
        CHECK((source->bias != NULL) == (id < 3));
        CHECK(source->bias == NULL || source->bias[5] == value_of(5, 20 + id));
    }
    /* Tied: the head is the embedding. */
    const qf_linear_source *head = qf_checkpoint_linear(checkpoint, 0, QF_LM_HEAD);
    qf_linear_source_read_f32(head, 3, 1, row);
    CHECK(head->n == VOCAB && row[1] == value_of(3 * HIDDEN + 1, 1));
    CHECK_INT(qf_checkpoint_embedding_dtype(checkpoint), QF_DTYPE_F32);
    qf_checkpoint_read_embedding(checkpoint, 3, 1, row);
    CHECK(row[1] == value_of(3 * HIDDEN + 1, 1));
    qf_checkpoint_read_norm(checkpoint, 0, QF_POST_ATTENTION_NORM, row);
    CHECK(row[7] == value_of(7, 4));
    qf_checkpoint_read_norm(checkpoint, 0, QF_FINAL_NORM, row);
    CHECK(row[7] == value_of(7, 2));
    qf_checkpoint_close(checkpoint);
    /* ... unless there is a head of its own that fits. */
    add_f32(&m, "lm_head.weight", VOCAB, HIDDEN, 33);
    write_file(&m, "model.safetensors");
    CHECK_OK(open_dir(&checkpoint, &err));
    qf_linear_source_read_f32(qf_checkpoint_linear(checkpoint, 0, QF_LM_HEAD), 3, 1, row);
    CHECK(row[1] == value_of(3 * HIDDEN + 1, 33));
    qf_checkpoint_close(checkpoint);
    remove_dir();
}

static void check_gptq(const qf_checkpoint *checkpoint)
{
    float *rows = malloc(sizeof *rows * INTER * INTER);
    float *scales = malloc(sizeof *scales * INTER * 3);
    uint8_t *q = malloc(INTER * INTER);
    uint8_t *zeros = malloc(INTER * 3);
    for (int32_t id = 0; id < 7; id++) {
        const qf_linear_source *source = qf_checkpoint_linear(checkpoint, 0, (qf_linear_id)id);
        CHECK_INT(source->format, QF_LINEAR_GPTQ);
        CHECK((source->perm != NULL) == (source->k == 64));
        qf_linear_source_read_f32(source, 0, source->n, rows);
        qf_linear_source_read_quantized(source, 0, source->n, q, scales, zeros);
        bool same = true;
        for (int32_t i = 0; i < source->n * source->k; i++) {
            int32_t row = i / source->k, col = i % source->k;
            int32_t group = row * source->num_groups + col / source->group_size;
            int32_t from = source->perm != NULL ? source->perm[col] : col;
            same = same && rows[i] == gptq_value(source->k, row, col);
            same = same && scales[group] * (float)(q[i] - zeros[group]) == rows[row * source->k + from];
        }
        CHECK(same);
    }
    free(rows);
    free(scales);
    free(q);
    free(zeros);
}

static void test_gptq(void)
{
    static maker m;
    static const char old[] = "{\"bits\":4,\"group_size\":32,\"desc_act\":true,\"sym\":false}";
    qf_error err;
    qf_checkpoint *checkpoint;
    make_dir();
    write_config(GPTQ);
    fill(&m, true);
    write_file(&m, "model.safetensors");
    CHECK_OK(open_dir(&checkpoint, &err));
    check_gptq(checkpoint);
    qf_checkpoint_close(checkpoint);
    /* The old way: the settings in a file of their own. */
    write_config("");
    refuse(QF_ERROR_MODEL, "quantize_config.json");
    write_text("quantize_config.json", old, sizeof old - 1);
    CHECK_OK(open_dir(&checkpoint, &err));
    check_gptq(checkpoint);
    qf_checkpoint_close(checkpoint);
    remove_dir();
}

/* The place of a tensor's bytes, by its data_offsets. */
static uint8_t *find_data(maker *m, const char *name)
{
    char quoted[112];
    (void)snprintf(quoted, sizeof quoted, "\"%s\":", name);
    const char *entry = strstr(m->header, quoted);
    const char *offsets = entry != NULL ? strstr(entry, "offsets\":[") : NULL;
    CHECK(offsets != NULL);
    return m->data + (offsets != NULL ? strtoul(offsets + strlen("offsets\":["), NULL, 10) : 0);
}

static void replace(maker *m, const char *from, const char *to)
{
    char *at = strstr(m->header, from);
    CHECK(at != NULL && strlen(from) == strlen(to));
    if (at != NULL) {
        memcpy(at, to, strlen(to));
    }
}

static void test_broken(void)
{
    static maker m;
    make_dir();
    refuse(QF_ERROR_IO, "config.json");
    write_config("");
    refuse(QF_ERROR_IO, "model.safetensors");
    fill(&m, false);
    replace(&m, "layers.0.self_attn.k_proj.bias", "layers.0.self_attn.k_proj.bjas");
    refuse_file(&m, "\"model.layers.0.self_attn.k_proj.bias\" is missing");
    fill(&m, false);
    replace(&m, "[96,64]", "[64,96]");
    refuse_file(&m, "gate_proj.weight\" has shape (64, 96); expected (96, 64)");
    fill(&m, false);
    replace(&m, "\"model.norm.weight\":{\"dtype\":\"F32\"", "\"model.norm.weight\":{\"dtype\":\"I32\"");
    refuse_file(&m, "model.norm.weight\" has dtype I32; expected F32 or BF16 or F16");
    write_config(GPTQ);
    fill(&m, true);
    int32_t bad_group = 2;
    memcpy(find_data(&m, "model.layers.0.mlp.up_proj.g_idx") + 8, &bad_group, sizeof bad_group);
    refuse_file(&m, "up_proj.g_idx\" has group 2 at column 2; expected 0 to 1");
    bad_group = 0;
    memcpy(find_data(&m, "model.layers.0.mlp.up_proj.g_idx") + 8, &bad_group, sizeof bad_group);
    refuse_file(&m, "up_proj.g_idx\" gives group 0 33 columns; expected 32");
    fill(&m, true);
    uint16_t infinity = 0xfc00;
    memcpy(find_data(&m, "model.layers.0.self_attn.o_proj.scales") + 6, &infinity, sizeof infinity);
    refuse_file(&m, "o_proj.scales\" holds an infinite scale");
    fill(&m, true);
    replace(&m, "layers.0.mlp.down_proj.qzeros", "layers.0.mlp.down_proj.qzeroz");
    refuse_file(&m, "down_proj.qzeros\" is missing");
    remove_dir();
}

static void test_shards(void)
{
    static maker a, b;
    static const char *const bad[][2] = {
        {"../a.safetensors", "../a.safetensors"}, {"/a.safetensors", "/a.safetensors"},
        {".a.safetensors", ".a.safetensors"},     {"a.bin", "a.bin"},
        {"b.safetensors", "is not in b.safetensors"},
    };
    qf_error err;
    qf_checkpoint *checkpoint;
    make_dir();
    write_config("");
    fill(&a, false);
    replace(&a, "\"model.norm.weight\"", "\"model.norm.weighs\"");
    memset(&b, 0, sizeof b);
    add_f32(&b, "model.norm.weight", 1, HIDDEN, 50);
    write_file(&a, "a.safetensors");
    write_file(&b, "b.safetensors");
    char index[8192];
    for (int32_t wrong = -1; wrong < 5; wrong++) {
        int n = snprintf(index, sizeof index, "{\"weight_map\":{\"model.norm.weight\":\"b.safetensors\"");
        for (const char *at = strstr(a.header, "\"model."); at != NULL; at = strstr(at + 1, "\"model.")) {
            bool first = at == strstr(a.header, "\"model.");
            n += snprintf(index + n, sizeof index - (size_t)n, ",%.*s:\"%s\"", (int)(strchr(at + 1, '"') + 1 - at), at,
                          first && wrong >= 0 ? bad[wrong][0] : "a.safetensors");
        }
        n += snprintf(index + n, sizeof index - (size_t)n, "}}");
        write_text("model.safetensors.index.json", index, (size_t)n);
        if (wrong >= 0) {
            refuse(QF_ERROR_MODEL, bad[wrong][1]);
            continue;
        }
        float norm[HIDDEN];
        CHECK_OK(open_dir(&checkpoint, &err));
        qf_checkpoint_read_norm(checkpoint, 0, QF_FINAL_NORM, norm);
        CHECK(norm[3] == value_of(3, 50));
        qf_checkpoint_close(checkpoint);
    }
    add_f32(&b, "model.embed_tokens.weight", VOCAB, HIDDEN, 1);
    write_file(&b, "b.safetensors");
    refuse(QF_ERROR_MODEL, "\"model.embed_tokens.weight\" is in two shards");
    remove_dir();
}

/* Overrides that spoil a good file are the caller's mistake; a file that is bad by itself stays a bad file. */
static void test_overrides(void)
{
    static const struct {
        const char *overrides;
        qf_status status;
    } cases[] = {
        {"{\"max_position_embeddings\":64}", QF_OK},
        {"{", QF_ERROR_INVALID_ARGUMENT},
        {"[]", QF_ERROR_INVALID_ARGUMENT},
        {"{\"num_attention_heads\":7}", QF_ERROR_INVALID_ARGUMENT},
    };
    make_dir();
    write_config("");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qf_error err;
        qf_checkpoint *checkpoint;
        qf_checkpoint_options options = {.dir = dir, .dummy = true, .dummy_bits = 4,
                                         .hf_overrides_json = cases[i].overrides};
        CHECK_STATUS(qf_checkpoint_open(&options, &checkpoint, &err), cases[i].status);
        CHECK((checkpoint != NULL) == (cases[i].status == QF_OK));
        CHECK(checkpoint == NULL || qf_checkpoint_config(checkpoint)->max_position_embeddings == 64);
        qf_checkpoint_close(checkpoint);
    }
    remove_dir();
}

static void check_dummy(int32_t bits)
{
    static float rows[INTER * INTER], again[INTER], scales[INTER];
    static uint8_t q[INTER * INTER], zeros[INTER];
    qf_error err;
    qf_checkpoint *checkpoint;
    qf_checkpoint_options options = {.dir = dir, .dummy = true, .dummy_seed = 5, .dummy_bits = bits};
    CHECK_OK(qf_checkpoint_open(&options, &checkpoint, &err));
    const qf_linear_source *source = qf_checkpoint_linear(checkpoint, 0, QF_DOWN_PROJ);
    CHECK_INT(source->format, QF_LINEAR_DUMMY);
    CHECK_INT(source->bits, bits);
    qf_linear_source_read_f32(source, 0, source->n, rows);
    qf_linear_source_read_f32(source, 17, 1, again);
    CHECK(memcmp(again, rows + 17 * INTER, sizeof(float) * INTER) == 0); /* any row can be had alone */
    double sum = 0.0, squares = 0.0;
    int32_t count = source->n * source->k;
    for (int32_t i = 0; i < count; i++) {
        sum += (double)rows[i];
        squares += (double)rows[i] * (double)rows[i];
    }
    double deviation = sqrt(squares / count);
    CHECK(deviation > 0.012 && deviation < 0.03);
    CHECK(fabs(sum / count) < 5 * deviation / sqrt(count));
    if (bits == 4) {
        qf_linear_source_read_quantized(source, 0, source->n, q, scales, zeros);
        bool same = true;
        for (int32_t i = 0; i < count; i++) {
            same = same && scales[i / INTER] * (float)(q[i] - zeros[i / INTER]) == rows[i];
        }
        CHECK(same);
    }
    /* Tied: head and embedding agree. */
    uint16_t embedding[HIDDEN];
    qf_checkpoint_read_embedding(checkpoint, 9, 1, embedding);
    qf_linear_source_read_f32(qf_checkpoint_linear(checkpoint, 0, QF_LM_HEAD), 9, 1, again);
    CHECK(qf_bf16_to_f32(embedding[HIDDEN - 1]) == again[HIDDEN - 1]);
    CHECK(qf_checkpoint_linear(checkpoint, 0, QF_Q_PROJ)->bias != NULL);
    qf_checkpoint_close(checkpoint);
}

static void test_dummy(void)
{
    qf_error err;
    qf_checkpoint *checkpoint;
    make_dir();
    write_config("");
    check_dummy(16);
    check_dummy(4);
    qf_checkpoint_options options = {.dir = dir, .dummy = true, .dummy_bits = 8};
    CHECK_STATUS(qf_checkpoint_open(&options, &checkpoint, &err), QF_ERROR_INVALID_ARGUMENT);
    remove_dir();
}

static void *read_in_thread(void *arg)
{
    check_gptq(arg);
    return NULL;
}

/* Opened once, read by all. */
static void test_threads(void)
{
    static maker m;
    qf_error err;
    qf_checkpoint *checkpoint;
    pthread_t threads[4];
    make_dir();
    write_config(GPTQ);
    fill(&m, true);
    write_file(&m, "model.safetensors");
    CHECK_OK(open_dir(&checkpoint, &err));
    for (int i = 0; i < 4; i++) {
        CHECK_INT(pthread_create(&threads[i], NULL, read_in_thread, checkpoint), 0);
    }
    for (int i = 0; i < 4; i++) {
        CHECK_INT(pthread_join(threads[i], NULL), 0);
    }
    qf_checkpoint_close(checkpoint);
    remove_dir();
}

#ifdef CHECK_ALLOC_FAULTS
static void fail_each(qf_checkpoint_options options)
{
    for (int64_t n = 1;; n++) {
        qf_error err;
        qf_checkpoint *checkpoint;
        check_fail_alloc(n);
        qf_status status = qf_checkpoint_open(&options, &checkpoint, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        CHECK((checkpoint == NULL) == failed);
        qf_checkpoint_close(checkpoint);
        if (!failed) {
            break;
        }
    }
}

static void test_alloc_faults(void)
{
    static maker m;
    static const char index[] = "{\"weight_map\":{\"model.norm.weight\":\"model.safetensors\"}}";
    make_dir();
    write_config(GPTQ);
    fill(&m, true);
    write_file(&m, "model.safetensors");
    fail_each((qf_checkpoint_options){.dir = dir, .hf_overrides_json = "{\"rope_theta\":5}"});
    fail_each((qf_checkpoint_options){.dir = dir, .dummy = true, .dummy_bits = 4});
    /* Through an index that leaves tensors out: these are then missing, unless memory was. */
    write_text("model.safetensors.index.json", index, sizeof index - 1);
    for (int64_t n = 1;; n++) {
        qf_error err;
        qf_checkpoint *checkpoint;
        check_fail_alloc(n);
        qf_status status = open_dir(&checkpoint, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_ERROR_MODEL);
        if (!failed) {
            break;
        }
    }
    remove_dir();
}
#endif

int main(void)
{
    RUN(test_dense);
    RUN(test_gptq);
    RUN(test_broken);
    RUN(test_shards);
    RUN(test_overrides);
    RUN(test_dummy);
    RUN(test_threads);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    return check_report();
}
