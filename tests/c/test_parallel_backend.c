/* sources: base/ model/ sample/ kv/ backend/cpu/ backend/parallel.c backend/ranks.c comm/comm_threads.c */
/* sanitizers: address thread */
/* alloc-faults: yes */
/* One model over several CPU ranks: the same logits and tokens as on one, whatever does not divide; the same bits from
 * run to run; and the end of it when a rank fails. */
#include <math.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "backend/parallel.h"
#include "check.h"
#include "faulty_ranks.h"

enum { HEADS = 14, KV_HEADS = 2, HEAD_DIM = 8, HIDDEN = 112, INTER = 200, LAYERS = 2, VOCAB = 203 };
enum { PROMPT = 21, BLOCK_SIZE = 16, NUM_BLOCKS = 4 };

static qf_checkpoint *open_dummy(bool tied, int32_t bits)
{
    qf_error err;
    char dir[] = "/tmp/qf_test_parallel_XXXXXX";
    char path[64];
    CHECK(mkdtemp(dir) != NULL);
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *file = fopen(path, "w");
    (void)fprintf(file,
                  "{\"model_type\": \"qwen2\", \"hidden_act\": \"silu\", \"vocab_size\": %d, \"hidden_size\": %d,"
                  " \"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d,"
                  " \"num_key_value_heads\": %d, \"max_position_embeddings\": 128, \"rms_norm_eps\": 1e-6,"
                  " \"rope_theta\": 10000.0, \"tie_word_embeddings\": %s, \"torch_dtype\": \"float32\"}",
                  VOCAB, HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, tied ? "true" : "false");
    (void)fclose(file);
    qf_checkpoint_options options = {.dir = dir, .dummy = true, .dummy_seed = 5, .dummy_bits = bits};
    qf_checkpoint *checkpoint = NULL;
    CHECK_OK(qf_checkpoint_open(&options, &checkpoint, &err));
    (void)unlink(path);
    (void)rmdir(dir);
    return checkpoint;
}

static qf_backend_options backend_options(int32_t size, const qf_backend_vtable *inner)
{
    return (qf_backend_options){.float32 = true,
                                .quantize_group_size = 128,
                                .head_bits = 16,
                                .block_size = BLOCK_SIZE,
                                .max_num_seqs = 2,
                                .max_num_batched_tokens = 32,
                                .max_model_len = 64,
                                .num_threads = 2,
                                .tensor_parallel_size = size,
                                .rank_backend = inner};
}

/* A prompt in blocks 3 and 1 whose rows all give logits, more than one chunk of them, and the step after it, which
 * begins with the token that the first one samples. */
typedef struct two_steps {
    int32_t token_ids[PROMPT + 1], positions[PROMPT + 1], slot_mapping[PROMPT + 1];
    int32_t query_start_loc[2][2], seq_lens[2], block_table[2];
    float logits[PROMPT + 1][VOCAB];
    int32_t sampled[2];
    qf_sample_state *state;
    qf_logit_task tasks[PROMPT + 1];
    qf_batch batches[2];
} two_steps;

static void fill_tasks(two_steps *b)
{
    for (int32_t t = 0; t <= PROMPT; t++) {
        bool samples = t >= PROMPT - 1;
        b->tasks[t] = (qf_logit_task){.row = t < PROMPT ? t : 0,
                                      .state = samples ? b->state : NULL,
                                      .slot = 1,
                                      .target_token_id = -1,
                                      .logits_out = b->logits[t],
                                      .token_id = samples ? &b->sampled[t - PROMPT + 1] : NULL};
    }
}

static void fill_steps(two_steps *b)
{
    qf_sampling_params params;
    qf_error err;
    memset(b, 0, sizeof *b);
    b->block_table[0] = 3;
    b->block_table[1] = 1;
    for (int32_t t = 0; t <= PROMPT; t++) {
        b->token_ids[t] = t < PROMPT ? (t * 37 + 11) % VOCAB : -1 - 1; /* what slot 1 was given */
        b->positions[t] = t;
        b->slot_mapping[t] = b->block_table[t / BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE;
    }
    qf_sampling_params_init(&params);
    params.temperature = 0.0f;
    CHECK_OK(qf_sample_state_create(&params, b->token_ids, PROMPT, 4, VOCAB, VOCAB, &b->state, &err));
    fill_tasks(b);
    for (int32_t i = 0; i < 2; i++) {
        int32_t first = i * PROMPT, count = i == 0 ? PROMPT : 1;
        b->query_start_loc[i][1] = count;
        b->seq_lens[i] = PROMPT + i;
        b->batches[i] = (qf_batch){.num_tokens = count,
                                   .num_seqs = 1,
                                   .num_logit_tasks = count,
                                   .token_ids = b->token_ids + first,
                                   .positions = b->positions + first,
                                   .slot_mapping = b->slot_mapping + first,
                                   .query_start_loc = b->query_start_loc[i],
                                   .seq_lens = &b->seq_lens[i],
                                   .block_tables = b->block_table,
                                   .block_table_stride = 2,
                                   .logit_tasks = b->tasks + first};
    }
}

/* Both steps in flight at once. */
static qf_status run_steps(qf_backend *backend, two_steps *b, qf_error *err)
{
    uint64_t step_ns = 0;
    fill_steps(b);
    qf_status status = backend->vtable->submit(backend, &b->batches[0], err);
    if (status == QF_OK) {
        status = backend->vtable->submit(backend, &b->batches[1], err);
        for (int32_t i = 0; i < 2; i++) {
            qf_status collected = backend->vtable->collect(backend, &step_ns, err);
            status = status != QF_OK ? status : collected;
            CHECK(collected != QF_OK || step_ns > 0);
        }
    }
    qf_sample_state_destroy(b->state);
    return status;
}

static void run_on(const qf_checkpoint *checkpoint, qf_backend_options options, two_steps *out)
{
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable();
    const qf_backend_vtable *vtable = options.tensor_parallel_size > 1 ? qf_parallel_backend_vtable(cpu) : cpu;
    qf_backend *backend = NULL;
    qf_error err;
    CHECK_OK(vtable->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &backend, &err));
    if (backend != NULL) {
        CHECK_OK(run_steps(backend, out, &err));
        CHECK(backend->isa != NULL);
    }
    vtable->destroy(backend);
}

static double largest_difference(const two_steps *a, const two_steps *b)
{
    double most = 0.0;
    for (int32_t t = 0; t <= PROMPT; t++) {
        for (int32_t i = 0; i < VOCAB; i++) {
            double difference = fabs((double)a->logits[t][i] - (double)b->logits[t][i]);
            most = difference > most || isnan(difference) ? difference : most;
        }
    }
    return most;
}

/* tied or not, plain or 4-bit weights, int8 activations, weights rounded while loading */
static void test_same_as_one(void)
{
    static const struct {
        bool tied, int8;
        int32_t dummy_bits, quantize_bits, group_size, head_bits;
        double tolerance;
    } cases[] = {{true, false, 16, 0, 128, 16, 1e-5},
                 {false, false, 16, 0, 128, 8, 1e-5},
                 {true, false, 4, 0, 128, 16, 1e-5},
                 {false, false, 16, 4, 32, 4, 1e-5}, /* o_proj and down_proj are cut inside groups that are rounded whole */
                 {false, true, 4, 0, 128, 16, 2e-2}}; /* inputs are rounded in smaller groups where a cut splits one */
    static const int32_t sizes[] = {2, 3, 4, 7, 14};
    static two_steps one, again, several;
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        qf_checkpoint *checkpoint = open_dummy(cases[c].tied, cases[c].dummy_bits);
        qf_backend_options options = backend_options(1, NULL);
        options.quantize_bits = cases[c].quantize_bits;
        options.quantize_group_size = cases[c].group_size;
        options.head_bits = cases[c].head_bits;
        options.int8_activations = cases[c].int8;
        run_on(checkpoint, options, &one);
        options.rank_backend = qf_cpu_backend_vtable();
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            options.tensor_parallel_size = sizes[i];
            run_on(checkpoint, options, &several);
            double difference = largest_difference(&one, &several);
            if (!(difference <= cases[c].tolerance)) {
                (void)fprintf(stderr, "case %zu, %d ranks: %g\n", c, sizes[i], difference);
            }
            CHECK(difference <= cases[c].tolerance);
            CHECK(cases[c].int8 || (several.sampled[0] == one.sampled[0] && several.sampled[1] == one.sampled[1]));
            options.num_threads = sizes[i] + 3;
            run_on(checkpoint, options, &again);
            CHECK(memcmp(several.logits, again.logits, sizeof again.logits) == 0); /* whatever the threads do */
            options.num_threads = 2;
        }
        qf_checkpoint_close(checkpoint);
    }
}

/* Memory: the CPU's is the sum, and what is planned is what is counted while loading. */
typedef struct progress_log {
    size_t last_done, total;
    int32_t calls, stop_at;
    bool right;
} progress_log;

static bool on_progress(void *arg, size_t done_bytes, size_t total_bytes)
{
    progress_log *log = arg;
    log->right = log->right && done_bytes >= log->last_done && done_bytes <= total_bytes &&
                 (log->total == 0 || log->total == total_bytes);
    log->last_done = done_bytes;
    log->total = total_bytes;
    return ++log->calls != log->stop_at;
}

static void test_plan_and_progress(void)
{
    qf_error err;
    qf_checkpoint *checkpoint = open_dummy(false, 16);
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable(), *ranks = qf_parallel_backend_vtable(cpu);
    qf_backend_options options = backend_options(4, cpu);
    qf_memory_plan one, four;
    CHECK_OK(cpu->plan_memory(checkpoint, &options, &one, &err));
    CHECK_OK(ranks->plan_memory(checkpoint, &options, &four, &err));
    CHECK(four.embedding_bytes == one.embedding_bytes);
    CHECK(four.layers_bytes >= one.layers_bytes && four.head_bytes >= one.head_bytes); /* tiles are filled up */
    CHECK(four.kv_block_bytes == 2 * one.kv_block_bytes && four.all_kv_block_bytes == four.kv_block_bytes);
    progress_log log = {.right = true};
    qf_backend *backend = NULL;
    CHECK_OK(ranks->create(checkpoint, &options, NUM_BLOCKS, on_progress, &log, &backend, &err));
    CHECK(log.right && log.calls > 0);
    CHECK_INT(log.last_done, four.embedding_bytes + four.layers_bytes + four.head_bytes);
    CHECK_INT(log.total, log.last_done);
    CHECK(strncmp(ranks->describe(backend), "4 x CPU, ", 9) == 0);
    qf_step_traffic traffic, alone;
    ranks->traffic(backend, 3, 2, &traffic);
    CHECK(traffic.layers_bytes == four.layers_bytes && traffic.head_bytes == four.head_bytes);
    ranks->destroy(backend);
    CHECK_OK(cpu->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &backend, &err));
    cpu->traffic(backend, 3, 2, &alone);
    CHECK(traffic.activation_bytes > alone.activation_bytes && traffic.logit_bytes > alone.logit_bytes);
    cpu->destroy(backend);
    log = (progress_log){.right = true, .stop_at = 1};
    CHECK_STATUS(ranks->create(checkpoint, &options, NUM_BLOCKS, on_progress, &log, &backend, &err), QF_ERROR_STATE);
    CHECK(backend == NULL && log.calls == 1);
    options.tensor_parallel_size = HEADS + 1;
    CHECK_STATUS(ranks->plan_memory(checkpoint, &options, &four, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(ranks->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &backend, &err),
                 QF_ERROR_INVALID_ARGUMENT);
    CHECK(backend == NULL);
    qf_checkpoint_close(checkpoint);
}

/* --- ranks with memory of their own ----------------------------------------------------------------------- */

static qf_status fake_memory(const qf_backend_options *options, qf_device_memory *out, qf_error *err)
{
    static const qf_device_memory devices[4] = {{500, 1000, 30}, {400, 1200, 10}, {450, 900, 20}, {1, 1, 99}};
    (void)err;
    *out = devices[options->device_ordinal];
    return QF_OK;
}

static bool fake_energy(qf_backend *self, uint64_t *energy_uj, char *note, size_t note_bytes)
{
    int32_t rank = rank_of(self);
    *energy_uj = 100 + (uint64_t)rank;
    (void)snprintf(note, note_bytes, "board %d", rank);
    return rank != fault.bad_rank;
}

/* Each device has to hold its own part: the largest is what counts. */
static void test_devices(void)
{
    qf_error err;
    qf_backend_vtable device = faulty_vtable(-1, -1, -1);
    device.has_own_memory = true;
    device.device_memory = fake_memory;
    device.energy = fake_energy;
    const qf_backend_vtable *ranks = qf_parallel_backend_vtable(&device);
    CHECK(ranks->has_own_memory && strcmp(ranks->name, "cuda") == 0);
    qf_checkpoint *checkpoint = open_dummy(false, 16);
    qf_backend_options options = backend_options(3, &device);
    qf_device_memory memory;
    CHECK_OK(ranks->device_memory(&options, &memory, &err));
    CHECK(memory.available_bytes == 400 && memory.total_bytes == 900 && memory.overhead_bytes == 30);

    qf_memory_plan plan, parts[3];
    size_t largest = 0, block_bytes = 0, all_block_bytes = 0;
    CHECK_OK(ranks->plan_memory(checkpoint, &options, &plan, &err));
    for (int32_t i = 0; i < 3; i++) {
        qf_checkpoint *view;
        qf_backend_options own = options;
        own.num_threads = 1;
        CHECK_OK(qf_checkpoint_shard(checkpoint, i, 3, &view, &err));
        CHECK_OK(device.plan_memory(view, &own, &parts[i], &err));
        qf_checkpoint_close(view);
        size_t bytes = parts[i].embedding_bytes + parts[i].layers_bytes + parts[i].head_bytes + parts[i].workspace_bytes;
        largest = bytes > largest ? bytes : largest;
        block_bytes = parts[i].kv_block_bytes > block_bytes ? parts[i].kv_block_bytes : block_bytes;
        all_block_bytes += parts[i].kv_block_bytes;
    }
    CHECK_INT(plan.embedding_bytes + plan.layers_bytes + plan.head_bytes + plan.workspace_bytes, largest);
    CHECK_INT(plan.kv_block_bytes, block_bytes);
    CHECK_INT(plan.all_kv_block_bytes, all_block_bytes);

    qf_backend *backend = NULL;
    char note[64];
    uint64_t energy_uj = 0;
    CHECK_OK(ranks->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &backend, &err));
    CHECK(ranks->energy(backend, &energy_uj, note, sizeof note));
    CHECK_INT(energy_uj, 303);
    CHECK(strcmp(note, "board 2; 3 devices") == 0);
    fault.bad_rank = 1; /* one device that does not measure: no sum */
    CHECK(!ranks->energy(backend, &energy_uj, note, sizeof note) && strcmp(note, "board 1") == 0);
    ranks->destroy(backend);
    qf_checkpoint_close(checkpoint);
}

static void on_tap(void *arg, int32_t layer, qf_linear_id id, const float *x, int32_t num_tokens, int32_t k)
{
    (void)layer;
    (void)id;
    (void)x;
    (void)num_tokens;
    (void)k;
    (*(int32_t *)arg)++;
}

static void test_forward_layers(void)
{
    static two_steps b;
    static float one[PROMPT][HIDDEN], three[PROMPT][HIDDEN];
    qf_error err;
    int32_t taps = 0;
    qf_checkpoint *checkpoint = open_dummy(true, 16);
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable(), *ranks = qf_parallel_backend_vtable(cpu);
    qf_backend_options options = backend_options(3, cpu);
    qf_backend *single = NULL, *several = NULL;
    CHECK_OK(cpu->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &single, &err));
    CHECK_OK(ranks->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &several, &err));
    fill_steps(&b);
    for (int32_t t = 0; t < PROMPT; t++) {
        qf_checkpoint_read_norm(checkpoint, 0, QF_FINAL_NORM, one[t]);
        one[t][t] = 3.0f;
    }
    memcpy(three, one, sizeof one);
    CHECK_OK(cpu->forward_layers(single, 0, LAYERS, &b.batches[0], one[0], NULL, NULL, &err));
    CHECK_OK(ranks->forward_layers(several, 0, LAYERS, &b.batches[0], three[0], NULL, NULL, &err));
    for (int32_t i = 0; i < PROMPT * HIDDEN; i++) {
        CHECK(fabsf(one[i / HIDDEN][i % HIDDEN] - three[i / HIDDEN][i % HIDDEN]) < 1e-5f);
    }
    CHECK_STATUS(ranks->forward_layers(several, 0, LAYERS, &b.batches[0], three[0], on_tap, &taps, &err),
                 QF_ERROR_NOT_IMPLEMENTED);
    CHECK_INT(taps, 0);
    qf_sample_state_destroy(b.state);
    cpu->destroy(single);
    ranks->destroy(several);
    qf_checkpoint_close(checkpoint);
}

/* --- ranks that fail ------------------------------------------------------------------------------------ */

static void test_rank_fails(void)
{
    static two_steps b;
    qf_error err;
    qf_checkpoint *checkpoint = open_dummy(true, 16);
    for (int32_t i = 0; i < 12; i++) {
        bool in_submit = i % 2 == 0;
        qf_backend_vtable faulty = faulty_vtable(i % 3, in_submit ? i % 4 : -1, in_submit ? -1 : i % 4);
        const qf_backend_vtable *ranks = qf_parallel_backend_vtable(&faulty);
        qf_backend_options options = backend_options(3, &faulty);
        qf_backend *backend = NULL;
        CHECK_OK(ranks->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &backend, &err));
        qf_status status = run_steps(backend, &b, &err); /* two steps; the failure is in the first, to the fourth one */
        status = status != QF_OK ? status : run_steps(backend, &b, &err);
        CHECK_INT(status, QF_ERROR_BACKEND);
        char expected[64];
        (void)snprintf(expected, sizeof expected, "rank %d lost its device", i % 3);
        CHECK(strcmp(err.message, expected) == 0);
        CHECK_INT(run_steps(backend, &b, &err), QF_ERROR_BACKEND); /* and it stays so */
        CHECK(strcmp(err.message, expected) == 0);
        ranks->destroy(backend);
    }
    qf_checkpoint_close(checkpoint);
}

static void test_rank_cannot_load(void)
{
    qf_error err;
    qf_checkpoint *checkpoint = open_dummy(true, 16);
    qf_backend_vtable faulty = faulty_vtable(2, -1, -1);
    qf_backend_options options = backend_options(4, &faulty);
    qf_backend *backend = NULL;
    fault.fails_to_load = true;
    CHECK_STATUS(qf_parallel_backend_vtable(&faulty)->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &backend, &err),
                 QF_ERROR_OUT_OF_MEMORY);
    CHECK(backend == NULL && strcmp(err.message, "rank 2 has no memory") == 0);
    qf_checkpoint_close(checkpoint);
}

/* The step's limit passes; the others, who wait for the sum, are let go. */
static void test_rank_hangs(void)
{
    static two_steps b;
    static qf_backend_vtable faulty; /* the rank that hangs keeps what it was given */
    static qf_backend *kept;
    qf_error err;
    qf_checkpoint *checkpoint = open_dummy(true, 16);
    faulty = faulty_vtable(1, 0, -1);
    fault.hangs = true;
    qf_backend_options options = backend_options(3, &faulty);
    options.step_timeout_ms = 200;
    CHECK_OK(qf_parallel_backend_vtable(&faulty)->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &kept, &err));
    CHECK_INT(run_steps(kept, &b, &err), QF_ERROR_BACKEND);
    CHECK(strstr(err.message, "3 of 3 ranks") != NULL && strstr(err.message, "200 ms") != NULL);
    CHECK(kept->left_behind); /* so the batches are not freed */
    kept->vtable->destroy(kept);
    atomic_store(&hang_released, true); /* sanitizers want no thread to be left */
    struct timespec time = {.tv_nsec = 100000000};
    (void)nanosleep(&time, NULL);
    qf_checkpoint_close(checkpoint);
}

#ifdef CHECK_ALLOC_FAULTS
/* Ranks allocate side by side: the n-th allocation is another one each time, but one of them fails. */
static void test_every_allocation_of_a_load_fails_once(void)
{
    qf_error err;
    const qf_backend_vtable *cpu = qf_cpu_backend_vtable(), *ranks = qf_parallel_backend_vtable(cpu);
    qf_backend_options options = backend_options(2, cpu);
    qf_checkpoint *checkpoint = open_dummy(true, 16);
    for (int64_t n = 1;; n++) {
        qf_backend *backend = NULL;
        check_fail_alloc(n);
        qf_status status = ranks->create(checkpoint, &options, NUM_BLOCKS, NULL, NULL, &backend, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_STATUS(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        ranks->destroy(backend);
        if (!failed) {
            break;
        }
    }
    qf_checkpoint_close(checkpoint);
}
#endif

int main(void)
{
    RUN(test_same_as_one);
    RUN(test_plan_and_progress);
    RUN(test_devices);
    RUN(test_forward_layers);
    RUN(test_rank_fails);
    RUN(test_rank_cannot_load);
    RUN(test_rank_hangs);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_every_allocation_of_a_load_fails_once);
#endif
    return check_report();
}
