/* sources: base/status.c base/alloc.c base/dtype.c base/json.c model/ */
/* sanitizers: address thread */
/* alloc-faults: yes */
/* Whole checkpoints: formats, overrides, dummy weights, reading from threads. Bad ones: test_model_files.c. */
#include <math.h>
#include <pthread.h>

#include "checkpoint_fixture.h"

static float gptq_value(int32_t k, int32_t row, int32_t col)
{
    int32_t g = group_of(k, col);
    return (0.25f * (float)(g + 1)) * (float)((col + row) % 16 - (row + g) % 16);
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
    CHECK_STATUS(open_dir(&checkpoint, &err), QF_ERROR_MODEL);
    CHECK(strstr(err.message, "quantize_config.json") != NULL);
    write_text("quantize_config.json", old, sizeof old - 1);
    CHECK_OK(open_dir(&checkpoint, &err));
    check_gptq(checkpoint);
    qf_checkpoint_close(checkpoint);
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
    RUN(test_overrides);
    RUN(test_dummy);
    RUN(test_threads);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    return check_report();
}
