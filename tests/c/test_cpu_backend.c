/* sources: base/ model/ sample/ backend/cpu/ */
/* sanitizers: address */
/* alloc-faults: yes */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "backend/backend.h"
#include "check.h"

enum { HIDDEN = 128, LAYERS = 3, TOKENS = 21, BLOCK_SIZE = 16, VOCAB = 96 };

static qf_checkpoint *open_dummy(qf_error *err)
{
    char dir[] = "/tmp/qf_test_backend_XXXXXX";
    char path[64];
    CHECK(mkdtemp(dir) != NULL);
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *file = fopen(path, "w");
    (void)fprintf(file,
                  "{\"model_type\": \"qwen2\", \"hidden_act\": \"silu\", \"vocab_size\": %d, \"hidden_size\": %d,"
                  " \"intermediate_size\": 192, \"num_hidden_layers\": %d, \"num_attention_heads\": 2,"
                  " \"num_key_value_heads\": 1, \"max_position_embeddings\": 128, \"rms_norm_eps\": 1e-6,"
                  " \"rope_theta\": 10000.0, \"tie_word_embeddings\": true, \"torch_dtype\": \"float32\"}",
                  VOCAB, HIDDEN, LAYERS);
    (void)fclose(file);
    qf_checkpoint_options options = {.dir = dir, .dummy = true, .dummy_seed = 5, .dummy_bits = 16};
    qf_checkpoint *checkpoint = NULL;
    qf_status status = qf_checkpoint_open(&options, &checkpoint, err);
    (void)unlink(path);
    (void)rmdir(dir);
    return status == QF_OK ? checkpoint : NULL;
}

static qf_backend_options backend_options(void)
{
    return (qf_backend_options){.float32 = true,
                                .quantize_group_size = 128,
                                .head_bits = 16,
                                .block_size = BLOCK_SIZE,
                                .max_num_seqs = 2,
                                .max_num_batched_tokens = 32,
                                .max_model_len = 64,
                                .num_threads = 2};
}

/* One sequence of TOKENS tokens in blocks 3 and 1. */
typedef struct one_batch {
    int32_t token_ids[TOKENS], positions[TOKENS], slot_mapping[TOKENS];
    int32_t query_start_loc[2], seq_lens[1], block_table[2];
    qf_batch batch;
} one_batch;

static void fill_batch(one_batch *b)
{
    b->block_table[0] = 3;
    b->block_table[1] = 1;
    for (int32_t t = 0; t < TOKENS; t++) {
        b->token_ids[t] = (t * 37 + 11) % VOCAB;
        b->positions[t] = t;
        b->slot_mapping[t] = b->block_table[t / BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE;
    }
    b->query_start_loc[0] = 0;
    b->query_start_loc[1] = TOKENS;
    b->seq_lens[0] = TOKENS;
    b->batch = (qf_batch){.num_tokens = TOKENS,
                          .num_seqs = 1,
                          .token_ids = b->token_ids,
                          .positions = b->positions,
                          .slot_mapping = b->slot_mapping,
                          .query_start_loc = b->query_start_loc,
                          .seq_lens = b->seq_lens,
                          .block_tables = b->block_table,
                          .block_table_stride = 2};
}

typedef struct tap_log {
    int32_t calls[LAYERS][QF_LINEARS_PER_LAYER];
    int32_t num_tokens;
    bool sizes_right, finite;
} tap_log;

static void on_tap(void *arg, int32_t layer, qf_linear_id id, const float *x, int32_t num_tokens, int32_t k)
{
    tap_log *log = arg;
    log->calls[layer][id]++;
    log->num_tokens = num_tokens;
    log->sizes_right = log->sizes_right && k == (id == QF_DOWN_PROJ ? 192 : HIDDEN);
    for (int32_t i = 0; i < num_tokens * k; i++) {
        log->finite = log->finite && isfinite(x[i]);
    }
}

/* Layers in one go, and one after the other with a tap: the same bits. */
static void test_forward_layers(void)
{
    qf_error err;
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable();
    qf_backend_options options = backend_options();
    qf_checkpoint *checkpoint = open_dummy(&err);
    CHECK(checkpoint != NULL);
    qf_backend *backend = NULL;
    CHECK_OK(cpu->create(checkpoint, &options, 4, NULL, NULL, &backend, &err));
    one_batch b;
    fill_batch(&b);
    float embedding[TOKENS][HIDDEN], whole[TOKENS][HIDDEN], parts[TOKENS][HIDDEN];
    for (int32_t t = 0; t < TOKENS; t++) {
        qf_checkpoint_read_embedding(checkpoint, b.token_ids[t], 1, embedding[t]);
    }
    memcpy(whole, embedding, sizeof whole);
    memcpy(parts, embedding, sizeof parts);
    qf_checkpoint_close(checkpoint); /* not needed after create */

    CHECK_OK(cpu->forward_layers(backend, 0, LAYERS, &b.batch, &whole[0][0], NULL, NULL, &err));
    tap_log log = {.sizes_right = true, .finite = true};
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        CHECK_OK(cpu->forward_layers(backend, layer, layer + 1, &b.batch, &parts[0][0], on_tap, &log, &err));
    }
    CHECK(memcmp(whole, parts, sizeof whole) == 0);
    CHECK(memcmp(whole, embedding, sizeof whole) != 0);
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        for (int32_t id = 0; id < QF_LINEARS_PER_LAYER; id++) {
            CHECK_INT(log.calls[layer][id], 1);
        }
    }
    CHECK(log.sizes_right && log.finite);
    CHECK_INT(log.num_tokens, TOKENS);

    CHECK_OK(cpu->forward_layers(backend, 1, 1, &b.batch, &parts[0][0], NULL, NULL, &err)); /* no layer: nothing */
    CHECK(memcmp(whole, parts, sizeof whole) == 0);
    CHECK_STATUS(cpu->forward_layers(backend, 0, LAYERS + 1, &b.batch, &parts[0][0], NULL, NULL, &err),
                 QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(cpu->forward_layers(backend, 2, 1, &b.batch, &parts[0][0], NULL, NULL, &err),
                 QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(cpu->collect(backend, NULL, &err), QF_ERROR_INTERNAL); /* nothing was submitted */
    cpu->destroy(backend);
}

/* A step gives the logits of its own layers' output, and greedy sampling their maximum. */
static void test_step(void)
{
    qf_error err;
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable();
    qf_backend_options options = backend_options();
    qf_checkpoint *checkpoint = open_dummy(&err);
    qf_backend *backend = NULL;
    CHECK_OK(cpu->create(checkpoint, &options, 4, NULL, NULL, &backend, &err));
    qf_checkpoint_close(checkpoint);
    one_batch b;
    fill_batch(&b);
    qf_sampling_params params;
    qf_sampling_params_init(&params);
    params.temperature = 0.0f;
    qf_sample_state *state = NULL;
    CHECK_OK(qf_sample_state_create(&params, b.token_ids, TOKENS, 4, VOCAB, VOCAB, &state, &err));
    float logits[VOCAB];
    int32_t token_id = -7;
    qf_logit_task task = {.row = TOKENS - 1,
                          .state = state,
                          .slot = 1,
                          .target_token_id = -1,
                          .logits_out = logits,
                          .token_id = &token_id};
    b.batch.num_logit_tasks = 1;
    b.batch.logit_tasks = &task;
    uint64_t step_ns = 0;
    CHECK_OK(cpu->submit(backend, &b.batch, &err));
    CHECK_OK(cpu->collect(backend, &step_ns, &err));
    CHECK(step_ns > 0);
    int32_t best = 0;
    for (int32_t i = 1; i < VOCAB; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    CHECK_INT(token_id, best);
    qf_sample_state_destroy(state);
    cpu->destroy(backend);
}

static bool stop_at_once(void *arg, size_t done_bytes, size_t total_bytes)
{
    int32_t *calls = arg;
    (*calls)++;
    CHECK(done_bytes > 0 && done_bytes <= total_bytes);
    return false;
}

static void test_progress_can_stop_a_load(void)
{
    qf_error err;
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable();
    qf_backend_options options = backend_options();
    qf_checkpoint *checkpoint = open_dummy(&err);
    qf_backend *backend = NULL;
    int32_t calls = 0;
    CHECK_STATUS(cpu->create(checkpoint, &options, 4, stop_at_once, &calls, &backend, &err), QF_ERROR_STATE);
    CHECK(backend == NULL);
    CHECK_INT(calls, 1);
    options.isa = "sse9";
    CHECK_STATUS(cpu->create(checkpoint, &options, 4, NULL, NULL, &backend, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(strstr(err.message, "sse9") != NULL);
    qf_checkpoint_close(checkpoint);
}

#ifdef CHECK_ALLOC_FAULTS
static void fail_every_allocation(qf_backend_options options)
{
    qf_error err;
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable();
    qf_checkpoint *checkpoint = open_dummy(&err);
    for (int64_t n = 1;; n++) {
        qf_backend *backend = NULL;
        check_fail_alloc(n);
        qf_status status = cpu->create(checkpoint, &options, 4, NULL, NULL, &backend, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_STATUS(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        cpu->destroy(backend);
        if (!failed) {
            break;
        }
    }
    qf_checkpoint_close(checkpoint);
}

static void test_every_allocation_of_a_load_fails_once(void)
{
    static const uint8_t wide[LAYERS] = {0, 1, 0};
    qf_backend_options options = backend_options();
    fail_every_allocation(options);
    options.kv_format = QF_KV_INT4;
    options.kv_16bit_layers = wide;
    options.kv_window_tokens = 20;
    fail_every_allocation(options);
}
#endif

int main(void)
{
    RUN(test_forward_layers);
    RUN(test_step);
    RUN(test_progress_can_stop_a_load);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_every_allocation_of_a_load_fails_once);
#endif
    return check_report();
}
