/* sources: base/ model/ kv/ sched/ sample/ engine/batch.c engine/commands.c engine/detokenizer.c engine/driver.c engine/engine.c */
/* sources: engine/options.c engine/output.c engine/request.c engine/utf8.c */
/* sanitizers: address thread */
/* alloc-faults: yes */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"
#include "engine/engine.h"
#include "fake_backend.c" /* one program, one harness */

#define VOCAB_SIZE 97
#define END_TOKEN 96 /* the hash never gives it often: about one token in 97 */

static void write_config(char *dir, size_t size)
{
    (void)snprintf(dir, size, "/tmp/qf_test_engine_XXXXXX");
    CHECK(mkdtemp(dir) != NULL);
    char path[256];
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *file = fopen(path, "w");
    (void)fprintf(file,
                  "{\"model_type\": \"qwen2\", \"architectures\": [\"Qwen2ForCausalLM\"], \"hidden_act\": \"silu\","
                  " \"vocab_size\": %d, \"hidden_size\": 128, \"intermediate_size\": 128, \"num_hidden_layers\": 1,"
                  " \"num_attention_heads\": 2, \"num_key_value_heads\": 2, \"max_position_embeddings\": 512,"
                  " \"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0, \"tie_word_embeddings\": true,"
                  " \"torch_dtype\": \"bfloat16\"}",
                  VOCAB_SIZE);
    (void)fclose(file);
}

static void remove_config(const char *dir)
{
    char path[256];
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    (void)unlink(path);
    (void)rmdir(dir);
}

static qf_engine_options engine_options(const char *dir, int32_t depth)
{
    qf_engine_options options;
    qf_engine_options_init(&options);
    options.model_dir = dir;
    options.load_format = "dummy";
    options.block_size = 16;
    options.kv_cache_tokens = 40 * 16;
    options.max_model_len = 300;
    options.max_num_seqs = 9;
    options.max_num_batched_tokens = 50;
    options.max_steps_in_flight = depth;
    options.num_threads = 1;
    return options;
}

static uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* An engine over the fake backend, and the end of it. */
static qf_engine *start(char dir[64], const qf_backend_vtable *backend, int32_t depth)
{
    qf_error err;
    qf_engine *engine = NULL;
    write_config(dir, 64);
    qf_engine_options options = engine_options(dir, depth);
    CHECK_OK(qf_engine_create_with(&options, backend, &engine, &err));
    return engine;
}

static void stop(const char *dir, qf_engine *engine)
{
    qf_engine_destroy(engine);
    remove_config(dir);
}

/* --- a soak from several threads ----------------------------------------------------------------------- */

typedef struct client {
    qf_engine *engine;
    uint64_t seed;
    int32_t num_requests;
    int32_t num_complete, num_cancelled;
} client;

static void check_against_model(const int32_t *ids, int32_t num_prompt, int32_t num_output, const qf_output *last,
                                int32_t max_tokens)
{
    bool right = true;
    for (int32_t i = 0; i < num_output; i++) {
        right = right && ids[num_prompt + i] == fake_next_token(ids, num_prompt + i, VOCAB_SIZE);
    }
    CHECK(right);
    CHECK_INT(last->num_output_tokens, num_output);
    if (last->finish_reason == QF_FINISH_STOP) {
        CHECK_INT(ids[num_prompt + num_output - 1], END_TOKEN);
    } else if (last->finish_reason == QF_FINISH_LENGTH) {
        CHECK_INT(num_output, max_tokens);
    } else {
        CHECK_INT(last->finish_reason, QF_FINISH_ABORT);
    }
}

/* Allows the one token that comes: the fake backend answers -1 if a mask is missing, late or of another position. */
static void answer_mask(qf_request *r, const int32_t *ids, int32_t num_prompt, int32_t position)
{
    qf_error err;
    uint32_t words[(VOCAB_SIZE + 31) / 32] = {0};
    int32_t token_id = fake_next_token(ids, num_prompt + position, VOCAB_SIZE);
    words[token_id / 32] = 1u << (token_id % 32);
    CHECK_OK(qf_request_set_mask(r, position, words, (VOCAB_SIZE + 31) / 32, &err));
}

static void one_request(client *c, uint64_t *random)
{
    qf_error err;
    int32_t ids[300];
    qf_request_options o;
    qf_request_options_init(&o);
    int32_t end_token = END_TOKEN;
    int32_t num_prompt = 1 + (int32_t)(next_random(random) % 120);
    int32_t shared = next_random(random) % 2 == 0 ? num_prompt : 0; /* half of them share prefixes */
    for (int32_t i = 0; i < num_prompt; i++) {
        ids[i] = i < shared ? i % 7 : (int32_t)(next_random(random) % VOCAB_SIZE);
    }
    int32_t max_tokens = 1 + (int32_t)(next_random(random) % 60);
    o.prompt_token_ids = ids;
    o.num_prompt_tokens = num_prompt;
    o.max_tokens = max_tokens;
    o.eos_token_ids = &end_token;
    o.num_eos_token_ids = 1;
    o.priority = (int32_t)(next_random(random) % 3);
    o.guided = next_random(random) % 5 == 0;
    o.max_unread_tokens = next_random(random) % 4 == 0 ? 2 : 0;
    int32_t cancel_after = next_random(random) % 3 == 0 ? (int32_t)(next_random(random) % 20) : INT32_MAX;
    qf_request *r;
    CHECK_OK(qf_engine_submit(c->engine, &o, &r, &err));
    int32_t num_output = 0;
    bool finished = false;
    while (!finished) {
        if (num_output >= cancel_after) {
            if (next_random(random) % 2 == 0) {
                qf_request_release(r); /* without a word */
                c->num_cancelled++;
                return;
            }
            qf_request_cancel(r);
            cancel_after = INT32_MAX;
        }
        (void)qf_request_wait(r, (int64_t)(next_random(random) % 2000));
        qf_output out;
        CHECK_OK(qf_request_read(r, &out, &err));
        for (int32_t i = 0; i < out.num_tokens; i++) {
            ids[num_prompt + num_output++] = out.token_ids[i];
        }
        if (out.mask_position >= 0 && !out.finished) {
            CHECK_INT(out.mask_position, num_output);
            answer_mask(r, ids, num_prompt, out.mask_position);
        }
        if (out.finished) {
            finished = true;
            check_against_model(ids, num_prompt, num_output, &out, max_tokens);
            c->num_complete += out.finish_reason != QF_FINISH_ABORT;
            c->num_cancelled += out.finish_reason == QF_FINISH_ABORT;
        }
        qf_output_deinit(&out);
    }
    qf_request_release(r);
}

static void *client_main(void *arg)
{
    client *c = arg;
    uint64_t random = c->seed;
    for (int32_t i = 0; i < c->num_requests; i++) {
        one_request(c, &random);
    }
    return NULL;
}

static void wait_until_idle(qf_engine *engine, qf_engine_stats *stats)
{
    for (int i = 0; i < 2000; i++) {
        qf_engine_get_stats(engine, stats);
        if (stats->num_free_blocks == stats->memory.num_blocks && stats->num_running + stats->num_waiting == 0) {
            return;
        }
        struct timespec delay = {.tv_nsec = 1000000};
        (void)nanosleep(&delay, NULL);
    }
}

static void soak(int32_t depth)
{
    enum { NUM_CLIENTS = 12, NUM_REQUESTS = 25 };
    char dir[64];
    qf_engine *engine = start(dir, fake_backend_vtable(), depth);
    if (engine == NULL) {
        return;
    }
    client clients[NUM_CLIENTS];
    pthread_t threads[NUM_CLIENTS];
    for (int i = 0; i < NUM_CLIENTS; i++) {
        clients[i] = (client){.engine = engine, .seed = (uint64_t)(i + 1) * 7919u, .num_requests = NUM_REQUESTS};
        CHECK(pthread_create(&threads[i], NULL, client_main, &clients[i]) == 0);
    }
    int32_t num_complete = 0;
    for (int i = 0; i < NUM_CLIENTS; i++) {
        (void)pthread_join(threads[i], NULL);
        num_complete += clients[i].num_complete;
    }
    qf_engine_stats stats;
    wait_until_idle(engine, &stats);
    CHECK_INT(stats.num_free_blocks, stats.memory.num_blocks);
    CHECK_INT(stats.num_finished_error, 0);
    CHECK_INT((int)(stats.num_finished_stop + stats.num_finished_length + stats.num_finished_abort),
              NUM_CLIENTS * NUM_REQUESTS);
    CHECK(num_complete > NUM_CLIENTS * NUM_REQUESTS / 3);
    CHECK(stats.num_preemptions > 0);
    CHECK(stats.prefix_hit_tokens > 0);
    stop(dir, engine);
}

static void test_soak_one_step_in_flight(void) { soak(1); }

static void test_soak_two_steps_in_flight(void) { soak(2); }

/* --- ends ---------------------------------------------------------------------------------------------- */

static qf_request *submit_simple(qf_engine *engine, int32_t max_tokens, qf_request *leader)
{
    static const int32_t prompt[40] = {1, 2, 3};
    qf_error err;
    qf_request_options o;
    qf_request_options_init(&o);
    o.prompt_token_ids = prompt;
    o.num_prompt_tokens = 40;
    o.max_tokens = max_tokens;
    o.leader = leader;
    o.notify = true;
    o.tag = 7;
    qf_request *r = NULL;
    CHECK_OK(qf_engine_submit(engine, &o, &r, &err));
    return r;
}

static void drain(qf_request *r, qf_output *last)
{
    qf_error err;
    for (;;) {
        CHECK(qf_request_wait(r, 10 * 1000000));
        CHECK_OK(qf_request_read(r, last, &err));
        if (last->finished) {
            return;
        }
        qf_output_deinit(last);
    }
}

static void test_engine_destroyed_under_requests(void)
{
    char dir[64];
    qf_engine *engine = start(dir, fake_backend_vtable(), 2);
    qf_request *a = submit_simple(engine, 250, NULL);
    qf_request *b = submit_simple(engine, 250, a);
    (void)qf_request_wait(a, 1000000);
    qf_engine_destroy(engine);
    qf_output out;
    drain(a, &out);
    CHECK_INT(out.finish_reason, QF_FINISH_ABORT);
    qf_output_deinit(&out);
    drain(b, &out);
    CHECK_INT(out.finish_reason, QF_FINISH_ABORT);
    qf_output_deinit(&out);
    CHECK(!qf_request_wait(b, -1)); /* nothing will ever come: returns at once */
    qf_request_release(a);
    qf_request_release(b);
    remove_config(dir);
}

static void test_backend_failure_ends_every_request(void)
{
    qf_error err;
    char dir[64];
    qf_engine *engine = start(dir, failing_backend_vtable(), 2);
    qf_request *a = submit_simple(engine, 100, NULL);
    qf_request *b = submit_simple(engine, 100, NULL);
    qf_output out;
    drain(a, &out);
    CHECK_INT(out.finish_reason, QF_FINISH_ERROR);
    CHECK(strstr(out.error.message, "fake device failed") != NULL);
    qf_output_deinit(&out);
    drain(b, &out);
    CHECK_INT(out.finish_reason, QF_FINISH_ERROR);
    qf_output_deinit(&out);
    qf_request_options o;
    qf_request_options_init(&o);
    int32_t id = 1;
    o.prompt_token_ids = &id;
    o.num_prompt_tokens = 1;
    qf_request *c = NULL;
    CHECK_STATUS(qf_engine_submit(engine, &o, &c, &err), QF_ERROR_STATE);
    qf_request_release(a);
    qf_request_release(b);
    stop(dir, engine);
}

static void test_notification(void)
{
    qf_error err;
    char dir[64];
    qf_engine *engine = start(dir, fake_backend_vtable(), 1);
    qf_request *r = submit_simple(engine, 5, NULL);
    qf_output out;
    bool finished = false;
    int32_t num_tokens = 0;
    while (!finished) {
        uint64_t tag = 0;
        CHECK(qf_request_wait(r, 10 * 1000000));
        CHECK_INT(qf_engine_take_ready(engine, &tag, 1), 1);
        CHECK_INT((int)tag, 7);
        CHECK_INT(qf_engine_take_ready(engine, &tag, 1), 0); /* once until it is read */
        CHECK_OK(qf_request_read(r, &out, &err));
        num_tokens += out.num_tokens;
        finished = out.finished;
        qf_output_deinit(&out);
    }
    CHECK_INT(num_tokens, 5);
    qf_request_release(r);
    stop(dir, engine);
}

/* What was read before take_ready is no news, and must not keep later news from being told. */
static void test_notification_of_what_was_read(void)
{
    qf_error err;
    char dir[64];
    qf_engine *engine = start(dir, fake_backend_vtable(), 1);
    int32_t ids[3] = {1};
    qf_request_options o;
    qf_request_options_init(&o);
    o.prompt_token_ids = ids;
    o.num_prompt_tokens = 1;
    o.max_tokens = 2;
    o.guided = true;
    o.notify = true;
    qf_request *r = NULL;
    CHECK_OK(qf_engine_submit(engine, &o, &r, &err));
    qf_output out;
    CHECK_OK(qf_request_read(r, &out, &err));
    CHECK_INT(out.mask_position, 0);
    qf_output_deinit(&out);
    uint64_t tag = 0;
    CHECK_INT(qf_engine_take_ready(engine, &tag, 1), 0);
    answer_mask(r, ids, 1, 0);
    CHECK(qf_request_wait(r, 10 * 1000000));
    CHECK_INT(qf_engine_take_ready(engine, &tag, 1), 1);
    qf_request_release(r);
    stop(dir, engine);
}

static void test_late_mask_fails_its_request_alone(void)
{
    qf_error err;
    char dir[64];
    qf_engine *engine = start(dir, fake_backend_vtable(), 2);
    int32_t id = 1;
    qf_request_options o;
    qf_request_options_init(&o);
    o.prompt_token_ids = &id;
    o.num_prompt_tokens = 1;
    o.max_tokens = 4;
    o.guided = true;
    o.mask_timeout_us = 30000;
    qf_request *guided = NULL;
    CHECK_OK(qf_engine_submit(engine, &o, &guided, &err));
    qf_request *free_one = submit_simple(engine, 30, NULL);
    qf_output out;
    drain(free_one, &out);
    CHECK_INT(out.finish_reason, QF_FINISH_LENGTH);
    qf_output_deinit(&out);
    drain(guided, &out);
    CHECK_INT(out.finish_reason, QF_FINISH_ERROR);
    CHECK(strstr(out.error.message, "mask") != NULL);
    qf_output_deinit(&out);
    qf_request_release(guided);
    qf_request_release(free_one);
    stop(dir, engine);
}

static void test_refusals(void)
{
    qf_error err;
    char dir[64];
    write_config(dir, sizeof dir);
    qf_engine_options options = engine_options(dir, 1);
    options.max_waiting_requests = 1;
    qf_engine *engine = NULL;
    CHECK_OK(qf_engine_create_with(&options, fake_backend_vtable(), &engine, &err));
    int32_t ids[301] = {0};
    qf_request_options o;
    qf_request_options_init(&o);
    qf_request *r = NULL;
    CHECK_STATUS(qf_engine_submit(engine, &o, &r, &err), QF_ERROR_INVALID_ARGUMENT); /* no prompt */
    o.prompt_token_ids = ids;
    o.num_prompt_tokens = 301;
    CHECK_STATUS(qf_engine_submit(engine, &o, &r, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(strstr(err.message, "301") != NULL && strstr(err.message, "300") != NULL);
    o.num_prompt_tokens = 10;
    o.max_tokens = 291;
    CHECK_STATUS(qf_engine_submit(engine, &o, &r, &err), QF_ERROR_INVALID_ARGUMENT);
    ids[3] = VOCAB_SIZE;
    o.max_tokens = 5;
    CHECK_STATUS(qf_engine_submit(engine, &o, &r, &err), QF_ERROR_INVALID_ARGUMENT);
    ids[3] = 0;
    o.guided = true; /* waits for its mask, so that the queue stays full */
    CHECK_OK(qf_engine_submit(engine, &o, &r, &err));
    qf_request *second = NULL;
    CHECK_STATUS(qf_engine_submit(engine, &o, &second, &err), QF_ERROR_STATE);
    CHECK(strstr(err.message, "max_waiting_requests is 1") != NULL);
    qf_request_release(r);
    stop(dir, engine);
}

#ifdef CHECK_ALLOC_FAULTS
static qf_status create_and_run(const char *dir, qf_error *err)
{
    qf_engine_options options = engine_options(dir, 2);
    qf_engine *engine = NULL;
    QF_TRY(qf_engine_create_with(&options, fake_backend_vtable(), &engine, err));
    int32_t ids[3] = {1, 2, 3};
    qf_request_options o;
    qf_request_options_init(&o);
    o.prompt_token_ids = ids;
    o.num_prompt_tokens = 3;
    o.max_tokens = 20;
    o.sampling.num_logprobs = 2;
    o.num_prompt_logprobs = 1;
    qf_request *r = NULL;
    qf_status status = qf_engine_submit(engine, &o, &r, err);
    while (status == QF_OK) {
        qf_output out;
        (void)qf_request_wait(r, -1);
        status = qf_request_read(r, &out, err);
        if (status == QF_OK) {
            bool finished = out.finished;
            if (out.finish_reason == QF_FINISH_ERROR) {
                *err = out.error;
                status = out.error.status;
            }
            qf_output_deinit(&out);
            if (finished) {
                break;
            }
        }
    }
    qf_request_release(r);
    qf_engine_destroy(engine);
    return status;
}

static void test_every_allocation_fails_once(void)
{
    qf_error err;
    char dir[64];
    write_config(dir, sizeof dir);
    for (int64_t n = 1;; n++) {
        check_fail_alloc(n);
        qf_status status = create_and_run(dir, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_STATUS(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        if (!failed) {
            break;
        }
    }
    remove_config(dir);
}
#endif

int main(void)
{
    RUN(test_soak_one_step_in_flight);
    RUN(test_soak_two_steps_in_flight);
    RUN(test_engine_destroyed_under_requests);
    RUN(test_backend_failure_ends_every_request);
    RUN(test_notification);
    RUN(test_notification_of_what_was_read);
    RUN(test_late_mask_fails_its_request_alone);
    RUN(test_refusals);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_every_allocation_fails_once);
#endif
    return check_report();
}
