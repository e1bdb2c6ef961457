/* sources: base/ model/ kv/ sched/ sample/ backend/cpu/ engine/batch.c engine/commands.c engine/detokenizer.c */
/* sources: engine/driver.c engine/engine.c engine/options.c engine/output.c engine/request.c engine/utf8.c */
/* sanitizers: address thread */
/* The engine over several ranks: a rank that fails ends every request at once, with its error; one that hangs does after the
 * time that a step may take, and what it may still write stays; a new engine can be made in the same process. */
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "engine/engine.h"
#include "faulty_ranks.h"

enum { NUM_REQUESTS = 6, MAX_TOKENS = 150, RANKS = 3, LIMIT_US = 5000000 };

static char dir[64];
static double watchdog_seconds = -1.0;

static void write_config(void)
{
    char path[128];
    (void)snprintf(dir, sizeof dir, "/tmp/qf_test_parallel_XXXXXX");
    CHECK(mkdtemp(dir) != NULL);
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *file = fopen(path, "w");
    (void)fprintf(file,
                  "{\"model_type\": \"qwen2\", \"hidden_act\": \"silu\", \"vocab_size\": 203, \"hidden_size\": 48,"
                  " \"intermediate_size\": 100, \"num_hidden_layers\": 2, \"num_attention_heads\": 6,"
                  " \"num_key_value_heads\": 2, \"max_position_embeddings\": 256, \"rms_norm_eps\": 1e-6,"
                  " \"rope_theta\": 10000.0, \"tie_word_embeddings\": true, \"torch_dtype\": \"float32\"}");
    (void)fclose(file);
}

static void remove_config(void)
{
    char path[128];
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    CHECK(unlink(path) == 0 && rmdir(dir) == 0);
}

static qf_engine *start(const qf_backend_vtable *backend, int32_t ranks, int32_t depth)
{
    qf_engine_options options;
    qf_engine *engine = NULL;
    qf_error err;
    qf_engine_options_init(&options);
    options.model_dir = dir;
    options.load_format = "dummy";
    options.block_size = 16;
    options.kv_cache_tokens = 64 * 16;
    options.max_num_seqs = NUM_REQUESTS;
    options.max_num_batched_tokens = 32;
    options.max_steps_in_flight = depth;
    options.tensor_parallel_size = ranks;
    options.num_threads = 2;
    options.watchdog_seconds = watchdog_seconds;
    CHECK_OK(qf_engine_create_with(&options, backend, &engine, &err));
    return engine;
}

static qf_request *submit(qf_engine *engine, int32_t index)
{
    int32_t ids[20];
    qf_request_options options;
    qf_request *request = NULL;
    qf_error err;
    for (int32_t i = 0; i < 20; i++) {
        ids[i] = (7 * i + 13 * index) % 203;
    }
    qf_request_options_init(&options);
    options.prompt_token_ids = ids;
    options.num_prompt_tokens = 3 + 2 * index;
    options.sampling.temperature = 0.0f;
    options.sampling.num_logprobs = index % 3 - 1;
    options.max_tokens = MAX_TOKENS;
    CHECK_OK(qf_engine_submit(engine, &options, &request, &err));
    return request;
}

/* Reads to the end; each wait has five seconds. tokens: (MAX_TOKENS) or NULL. */
static void drain(qf_request *request, int32_t *tokens, qf_output *last)
{
    int32_t num_tokens = 0;
    for (;;) {
        qf_error err;
        CHECK(qf_request_wait(request, LIMIT_US));
        CHECK_OK(qf_request_read(request, last, &err));
        for (int32_t i = 0; i < last->num_tokens && tokens != NULL; i++) {
            tokens[num_tokens++] = last->token_ids[i];
        }
        if (last->finished) {
            return;
        }
        qf_output_deinit(last);
    }
}

static void run_all(qf_engine *engine, int32_t tokens[NUM_REQUESTS][MAX_TOKENS])
{
    qf_request *requests[NUM_REQUESTS];
    for (int32_t i = 0; i < NUM_REQUESTS; i++) {
        requests[i] = submit(engine, i);
    }
    for (int32_t i = 0; i < NUM_REQUESTS; i++) {
        qf_output last;
        drain(requests[i], tokens[i], &last);
        CHECK_INT(last.finish_reason, QF_FINISH_LENGTH);
        qf_output_deinit(&last);
        qf_request_release(requests[i]);
    }
}

static void test_same_tokens(void)
{
    static int32_t one[NUM_REQUESTS][MAX_TOKENS], several[NUM_REQUESTS][MAX_TOKENS];
    qf_engine *engine = start(qf_cpu_backend_vtable(), 1, 1);
    run_all(engine, one);
    qf_engine_destroy(engine);
    for (int32_t depth = 1; depth <= 2; depth++) {
        engine = start(qf_cpu_backend_vtable(), RANKS, depth);
        qf_engine_info info;
        qf_engine_get_info(engine, &info);
        CHECK_INT(info.tensor_parallel_size, RANKS);
        CHECK(strcmp(info.backend, "cpu") == 0);
        run_all(engine, several);
        CHECK(memcmp(one, several, sizeof one) == 0);
        qf_engine_destroy(engine);
    }
}

/* The fault comes when all requests are there, a few steps later. */
static void check_failed(qf_engine *engine, atomic_int *steps_left, const char *message)
{
    qf_request *requests[NUM_REQUESTS];
    qf_engine_stats stats;
    qf_error err;
    for (int32_t i = 0; i < NUM_REQUESTS; i++) {
        requests[i] = submit(engine, i);
    }
    atomic_store(steps_left, 5);
    for (int32_t i = 0; i < NUM_REQUESTS; i++) {
        qf_output last;
        drain(requests[i], NULL, &last);
        CHECK_INT(last.finish_reason, QF_FINISH_ERROR);
        CHECK(strcmp(last.error.message, message) == 0);
        qf_output_deinit(&last);
    }
    qf_engine_get_stats(engine, &stats);
    CHECK(stats.failed);
    qf_request_options options;
    qf_request *late = NULL;
    int32_t id = 1;
    qf_request_options_init(&options);
    options.prompt_token_ids = &id;
    options.num_prompt_tokens = 1;
    CHECK_STATUS(qf_engine_submit(engine, &options, &late, &err), QF_ERROR_STATE);
    for (int32_t i = 0; i < NUM_REQUESTS; i++) {
        qf_request_release(requests[i]);
    }
}

static void test_a_rank_fails(void)
{
    static int32_t tokens[NUM_REQUESTS][MAX_TOKENS];
    for (int32_t bad_rank = 0; bad_rank < RANKS; bad_rank++) {
        for (int32_t depth = 1; depth <= 2; depth++) {
            char message[64];
            qf_backend_vtable faulty = faulty_vtable(bad_rank, -1, -1);
            (void)snprintf(message, sizeof message, "rank %d lost its device", bad_rank);
            qf_engine *engine = start(&faulty, RANKS, depth);
            check_failed(engine, depth == 1 ? &fault.submits_left : &fault.collects_left, message);
            qf_engine_destroy(engine);
            engine = start(qf_cpu_backend_vtable(), RANKS, depth); /* the next one is not concerned */
            run_all(engine, tokens);
            qf_engine_destroy(engine);
        }
    }
}

/* Rank 0 samples: when it is given up it knows where the requests' results go, and it may write them long after they and
 * the engine are gone. */
static void test_rank_0_hangs(void)
{
    static int32_t tokens[NUM_REQUESTS][MAX_TOKENS];
    static qf_backend_vtable faulty; /* the rank that hangs keeps what it was given */
    faulty = faulty_vtable(0, -1, -1);
    fault.hangs = true;
    fault.goes_on = true;
    watchdog_seconds = 0.3;
    __lsan_disable();
    qf_engine *engine = start(&faulty, RANKS, 1);
    check_failed(engine, &fault.submits_left, "3 of 3 ranks have not finished their step within 300 ms");
    __lsan_enable();
    qf_engine_destroy(engine);
    atomic_store(&hang_released, true);
    for (int32_t i = 0; i < LIMIT_US / 1000 && !atomic_load(&hang_over); i++) {
        struct timespec time = {.tv_nsec = 1000000};
        (void)nanosleep(&time, NULL);
    }
    CHECK(atomic_load(&hang_over));
    watchdog_seconds = 60.0;
    engine = start(qf_cpu_backend_vtable(), RANKS, 2);
    run_all(engine, tokens);
    qf_engine_destroy(engine);
}

/* Not for the CPU, nor for one device. */
static void test_comm_is_refused(void)
{
    static const struct {
        const char *comm;
        int32_t ranks;
        const char *message;
    } cases[] = {
        {"nccl", 1, "tensor_parallel_comm=\"nccl\" is for a model over several GPUs; device is cpu, tensor_parallel_size 1"},
        {"peer", 2, "tensor_parallel_comm=\"peer\" is for a model over several GPUs; device is cpu, tensor_parallel_size 2"},
        {"mpi", 2, "tensor_parallel_comm must be"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qf_engine_options options;
        qf_engine *engine = NULL;
        qf_error err;
        qf_engine_options_init(&options);
        options.model_dir = dir;
        options.load_format = "dummy";
        options.tensor_parallel_size = cases[i].ranks;
        options.tensor_parallel_comm = cases[i].comm;
        CHECK_STATUS(qf_engine_create_with(&options, qf_cpu_backend_vtable(), &engine, &err), QF_ERROR_INVALID_ARGUMENT);
        CHECK(strncmp(err.message, cases[i].message, strlen(cases[i].message)) == 0);
        options.tensor_parallel_comm = "auto";
        options.watchdog_seconds = 86401.0;
        CHECK_STATUS(qf_engine_create_with(&options, qf_cpu_backend_vtable(), &engine, &err), QF_ERROR_INVALID_ARGUMENT);
        CHECK(strstr(err.message, "watchdog_seconds must be at most 86400") != NULL);
    }
}

int main(void)
{
    write_config();
    RUN(test_same_tokens);
    RUN(test_a_rank_fails);
    RUN(test_rank_0_hangs);
    RUN(test_comm_is_refused);
    remove_config();
    return check_report();
}
