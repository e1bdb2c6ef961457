/* sources: base/ model/ kv/ sched/ sample/ engine/batch.c engine/commands.c engine/detokenizer.c engine/driver.c engine/engine.c */
/* sources: engine/options.c engine/output.c engine/request.c engine/utf8.c */
/* sanitizers: address thread */
/* The meter in the engine: requests from several threads, cancelled, preempted and released at any moment, on a backend
 * with an energy counter that is made up; whatever happens, the accounts add up. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"
#include "engine/engine.h"
#include "fake_backend.c" /* one program, one harness */

#define VOCAB_SIZE 97

static void write_config(char *dir, size_t size)
{
    (void)snprintf(dir, size, "/tmp/qf_test_meter_XXXXXX");
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

/* --- a fake device with a clock, traffic and an energy counter ----------------------------------------------- */

static qf_status metered_create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                                qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err);

static void metered_traffic(const qf_backend *self, int32_t num_tokens, int32_t num_rows, qf_step_traffic *out)
{
    (void)self;
    *out = (qf_step_traffic){.layers_bytes = 1000003,
                             .head_bytes = num_rows > 0 ? 5557 : 0,
                             .embedding_bytes = (uint64_t)num_tokens * 256,
                             .activation_bytes = (uint64_t)num_tokens * 1021 + 7,
                             .logit_bytes = (uint64_t)num_rows * 97};
}

/* 100 W, in jumps of a millijoule as NVML has them. */
static bool metered_energy(qf_backend *self, uint64_t *energy_uj, char *note, size_t note_bytes)
{
    (void)self;
    (void)snprintf(note, note_bytes, "made up");
    *energy_uj = qf_now_ns() / 10 / 1000 * 1000;
    return true;
}

static bool broken_energy(qf_backend *self, uint64_t *energy_uj, char *note, size_t note_bytes)
{
    (void)self;
    (void)energy_uj;
    (void)snprintf(note, note_bytes, "the counter is broken");
    return false;
}

static qf_status metered_collect(qf_backend *base, uint64_t *device_time_ns, qf_error *err)
{
    QF_TRY(fake_collect(base, device_time_ns, err));
    if (device_time_ns != NULL) {
        *device_time_ns = 20001; /* no step of the fake takes less */
    }
    return QF_OK;
}

static qf_backend_vtable make_vtable(bool broken)
{
    qf_backend_vtable vtable = *fake_backend_vtable();
    vtable.create = metered_create;
    vtable.collect = metered_collect;
    vtable.traffic = metered_traffic;
    vtable.energy = broken ? broken_energy : metered_energy;
    return vtable;
}

static qf_backend_vtable working, failing;

static qf_status metered_create(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t num_blocks,
                                qf_progress_fn progress, void *progress_arg, qf_backend **out, qf_error *err)
{
    QF_TRY(fake_create(checkpoint, options, num_blocks, progress, progress_arg, out, err));
    (*out)->vtable = options->max_num_seqs == 8 ? &failing : &working; /* as the test asks */
    return QF_OK;
}

static qf_engine *start(char dir[64], int32_t depth, bool broken, bool meter)
{
    qf_error err;
    qf_engine *engine = NULL;
    write_config(dir, 64);
    qf_engine_options options;
    qf_engine_options_init(&options);
    options.model_dir = dir;
    options.load_format = "dummy";
    options.block_size = 16;
    options.kv_cache_tokens = 22 * 16; /* so few that requests are preempted */
    options.max_model_len = 300;
    options.max_num_seqs = broken ? 8 : 9;
    options.max_num_batched_tokens = 50;
    options.max_steps_in_flight = depth;
    options.num_threads = 1;
    options.meter = meter;
    CHECK_OK(qf_engine_create_with(&options, broken ? &failing : &working, &engine, &err));
    return engine;
}

static void stop(const char *dir, qf_engine *engine)
{
    qf_engine_destroy(engine);
    remove_config(dir);
}

/* --- sums ------------------------------------------------------------------------------------------------ */

#define AMOUNT_BYTES offsetof(qf_usage, energy_uj)

static void add_usage(qf_usage *sum, const qf_usage *one)
{
    uint64_t *to = &sum->prompt_tokens;
    const uint64_t *from = &one->prompt_tokens;
    for (size_t i = 0; i < AMOUNT_BYTES / sizeof *to; i++) {
        to[i] += from[i];
    }
    for (int i = 0; i < QF_MAX_ENERGY_SOURCES; i++) {
        sum->energy_uj[i] += one->energy_uj[i];
    }
}

static void check_snapshot(const qf_meter_stats *stats)
{
    CHECK(memcmp(&stats->total, &stats->requests, AMOUNT_BYTES) == 0);
    CHECK(stats->total.device_ns == stats->total.prefill_device_ns + stats->total.decode_device_ns);
    CHECK(stats->busy_ns == stats->total.device_ns);
    for (int32_t k = 0; k < stats->num_sources; k++) {
        const qf_energy_source *source = &stats->sources[k];
        CHECK(source->total_uj == source->requests_uj + source->idle_uj + source->unsettled_uj);
    }
}

static void sleep_ms(long milliseconds)
{
    struct timespec delay = {.tv_nsec = milliseconds * 1000000};
    (void)nanosleep(&delay, NULL);
}

/* Until nothing runs and every counter has been read since. */
static void wait_until_settled(qf_engine *engine, qf_request *const *requests, int32_t count)
{
    qf_usage usage;
    qf_energy_source sources[QF_MAX_ENERGY_SOURCES];
    int32_t num_sources;
    for (int32_t i = 0; i < count; i++) {
        int attempts = 0;
        while (!qf_request_usage(requests[i], &usage, sources, &num_sources) && attempts++ < 5000) {
            sleep_ms(1);
        }
        CHECK(attempts < 5000);
    }
    (void)engine;
}

/* --- a soak ---------------------------------------------------------------------------------------------- */

enum { NUM_CLIENTS = 6, NUM_REQUESTS = 30 };

typedef struct client {
    qf_engine *engine;
    uint64_t seed;
    bool release_early;
    qf_request *kept[NUM_REQUESTS];
    int32_t num_kept;
} client;

static uint32_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static qf_request *submit(qf_engine *engine, uint64_t *random, int32_t num_prompt, int32_t max_tokens)
{
    qf_error err;
    int32_t prompt[200];
    for (int32_t i = 0; i < num_prompt; i++) { /* some share prefixes */
        prompt[i] = i < 40 ? i % 7 : (int32_t)(next_random(random) % VOCAB_SIZE);
    }
    int32_t end = 96;
    qf_request_options o;
    qf_request_options_init(&o);
    o.prompt_token_ids = prompt;
    o.num_prompt_tokens = num_prompt;
    o.max_tokens = max_tokens;
    o.eos_token_ids = &end; /* ends while a step with one more token is in flight */
    o.num_eos_token_ids = 1;
    o.num_prompt_logprobs = next_random(random) % 8 == 0 ? 0 : -1;
    qf_request *r = NULL;
    CHECK_OK(qf_engine_submit(engine, &o, &r, &err));
    return r;
}

static void *client_main(void *arg)
{
    client *c = arg;
    qf_error err;
    for (int i = 0; i < NUM_REQUESTS; i++) {
        int32_t num_prompt = 1 + (int32_t)(next_random(&c->seed) % 120);
        qf_request *r = submit(c->engine, &c->seed, num_prompt, (int32_t)(next_random(&c->seed) % 100));
        uint32_t fate = next_random(&c->seed) % 6;
        bool ended = false;
        while (!ended && r != NULL) {
            qf_output out;
            (void)qf_request_wait(r, 10 * 1000000);
            CHECK_OK(qf_request_read(r, &out, &err));
            ended = out.finished;
            CHECK(!ended || out.finish_reason != QF_FINISH_ERROR);
            qf_output_deinit(&out);
            if (fate == 0) {
                qf_request_cancel(r);
            } else if (fate == 1 && c->release_early) {
                break;
            }
        }
        if (c->release_early) {
            qf_request_release(r);
        } else {
            c->kept[c->num_kept++] = r;
        }
    }
    return NULL;
}

static void soak(int32_t depth, bool release_early)
{
    char dir[64];
    qf_engine *engine = start(dir, depth, false, true);
    if (engine == NULL) {
        return;
    }
    static client clients[NUM_CLIENTS];
    pthread_t threads[NUM_CLIENTS];
    uint64_t random = 5;
    qf_meter_stats stats;
    for (int i = 0; i < NUM_CLIENTS; i++) {
        clients[i] = (client){.engine = engine, .seed = (uint64_t)(i + 1) * 7919u, .release_early = release_early};
        CHECK(pthread_create(&threads[i], NULL, client_main, &clients[i]) == 0);
    }
    for (int i = 0; i < 100; i++) { /* looked at while they work */
        qf_engine_get_meter(engine, &stats);
        check_snapshot(&stats);
        sleep_ms(1);
    }
    qf_usage sum = {0};
    for (int i = 0; i < NUM_CLIENTS; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    qf_request *last = submit(engine, &random, 3, 1); /* of any length of run: something to wait for */
    (void)qf_request_wait(last, 10 * 1000000);
    wait_until_settled(engine, &last, 1);
    for (int i = 0; i < NUM_CLIENTS; i++) {
        wait_until_settled(engine, clients[i].kept, clients[i].num_kept);
        for (int32_t j = 0; j < clients[i].num_kept; j++) {
            qf_usage usage;
            qf_energy_source sources[QF_MAX_ENERGY_SOURCES];
            int32_t num_sources;
            CHECK(qf_request_usage(clients[i].kept[j], &usage, sources, &num_sources));
            add_usage(&sum, &usage);
            qf_request_release(clients[i].kept[j]);
        }
    }
    qf_usage usage;
    qf_energy_source sources[QF_MAX_ENERGY_SOURCES];
    int32_t num_sources;
    CHECK(qf_request_usage(last, &usage, sources, &num_sources));
    add_usage(&sum, &usage);
    qf_engine_get_meter(engine, &stats);
    check_snapshot(&stats);
    qf_engine_stats engine_stats;
    qf_engine_get_stats(engine, &engine_stats);
    CHECK(engine_stats.num_preemptions > 0 && engine_stats.prefix_hit_tokens > 0);
    CHECK(stats.total.output_tokens == engine_stats.num_generated_tokens);
    CHECK(stats.total.cached_tokens == engine_stats.prefix_hit_tokens);
    CHECK(stats.total.prompt_tokens >= engine_stats.prefix_queried_tokens);
    CHECK(stats.total.computed_prompt_tokens >= engine_stats.num_prompt_tokens); /* and outputs computed again */
    CHECK_INT(stats.num_steps, engine_stats.num_steps);
    CHECK_INT(stats.total.weight_bytes, stats.num_steps * 1000003);
    CHECK_INT(stats.total.device_ns, stats.num_steps * 20001);
    CHECK(stats.peak_kv_bytes > 0 && stats.peak_kv_bytes <= engine_stats.memory.kv_cache_bytes);
    CHECK(stats.sources[0].measured && stats.sources[0].requests_uj > 0 && stats.sources[0].idle_uj > 0);
    if (!release_early) {
        CHECK(memcmp(&sum, &stats.requests, AMOUNT_BYTES) == 0);
        CHECK(sum.energy_uj[0] == stats.sources[0].requests_uj);
    }
    qf_request_release(last);
    stop(dir, engine);
}

static void test_soak_one_step_in_flight(void) { soak(1, false); }

static void test_soak_two_steps_in_flight(void) { soak(2, false); }

static void test_soak_with_requests_that_go_early(void) { soak(2, true); }

/* --- the rest -------------------------------------------------------------------------------------------- */

static void test_a_broken_counter_is_not_measured(void)
{
    char dir[64];
    uint64_t random = 1;
    qf_engine *engine = start(dir, 1, true, true);
    qf_request *r = submit(engine, &random, 20, 5);
    qf_usage usage;
    qf_energy_source sources[QF_MAX_ENERGY_SOURCES];
    int32_t num_sources = 0;
    wait_until_settled(engine, &r, 1);
    CHECK(qf_request_usage(r, &usage, sources, &num_sources));
    CHECK(num_sources >= 1);
    CHECK_STRING(sources[0].name, "gpu0");
    CHECK_STRING(sources[0].kind, "none");
    CHECK_STRING(sources[0].note, "the counter is broken");
    CHECK(!sources[0].measured);
    CHECK_INT(usage.energy_uj[0], 0);
    CHECK(usage.device_ns > 0 && usage.weight_bytes > 0);
    qf_request_release(r);
    stop(dir, engine);
}

static void test_off(void)
{
    char dir[64];
    uint64_t random = 1;
    qf_engine *engine = start(dir, 2, false, false);
    qf_request *r = submit(engine, &random, 20, 5);
    qf_meter_stats stats;
    wait_until_settled(engine, &r, 1);
    qf_engine_get_meter(engine, &stats);
    CHECK(!stats.enabled);
    CHECK_INT(stats.num_sources, 0);
    CHECK_INT(stats.num_steps, 0);
    CHECK_INT(stats.total.weight_bytes, 0);
    CHECK_INT(stats.total.device_ns, 0);
    CHECK_INT(stats.total.prompt_tokens, 20);
    CHECK(stats.total.output_tokens >= 1 && stats.total.output_tokens <= 5);
    qf_request_release(r);
    stop(dir, engine);
}

static void test_a_request_under_a_destroyed_engine(void)
{
    char dir[64];
    uint64_t random = 1;
    qf_engine *engine = start(dir, 2, false, true);
    qf_request *r = submit(engine, &random, 100, 200);
    (void)qf_request_wait(r, 1000000);
    qf_engine_destroy(engine);
    qf_usage usage;
    qf_energy_source sources[QF_MAX_ENERGY_SOURCES];
    int32_t num_sources;
    (void)qf_request_usage(r, &usage, sources, &num_sources);
    CHECK_INT(usage.prompt_tokens, 100);
    CHECK(usage.weight_bytes > 0);
    qf_request_release(r);
    remove_config(dir);
}

int main(void)
{
    working = make_vtable(false);
    failing = make_vtable(true);
    RUN(test_soak_one_step_in_flight);
    RUN(test_soak_two_steps_in_flight);
    RUN(test_soak_with_requests_that_go_early);
    RUN(test_a_broken_counter_is_not_measured);
    RUN(test_off);
    RUN(test_a_request_under_a_destroyed_engine);
    return check_report();
}
