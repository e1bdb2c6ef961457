/* sources: base/ model/ engine/meter.c */
/* sanitizers: address */
/* The meter without an engine: times and readings are made up, and every account must add up after each of them.
 * `test_meter --bench` prints what a step's accounting takes. */
#include <stdlib.h>
#include <time.h>

#include "check.h"
#include "engine/meter.h"

#define MAX_SEQS 64
#define NUM_ACCOUNTS 200
#define NUM_AMOUNTS QF_METER_AMOUNTS

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    uint64_t x = *state;
    return (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u >> 7;
}

static uint64_t below(uint64_t *state, uint64_t limit) { return next_random(state) % limit; }

/* --- shares ---------------------------------------------------------------------------------------------- */

static void check_shares(const qf_share_scratch *s, int32_t count, uint64_t total)
{
    unsigned __int128 sum = 0;
    uint64_t given = 0;
    for (int32_t i = 0; i < count; i++) {
        sum += s->weights[i];
        given += s->shares[i];
    }
    CHECK(given == total);
    uint64_t least_up = UINT64_MAX, most_down = 0; /* remainders of those that were rounded up, and down */
    int32_t last_up = -1, first_down = count;      /* of those with that remainder */
    bool near = true;
    for (int32_t i = 0; i < count; i++) {
        unsigned __int128 product = (unsigned __int128)total * (sum > 0 ? s->weights[i] : 1);
        unsigned __int128 divisor = sum > 0 ? sum : (unsigned __int128)count;
        uint64_t floor = (uint64_t)(product / divisor), remainder = (uint64_t)(product % divisor);
        near = near && (s->shares[i] == floor || (s->shares[i] == floor + 1 && remainder > 0));
        if (s->shares[i] == floor + 1) {
            last_up = remainder < least_up || (remainder == least_up && i > last_up) ? i : last_up;
            least_up = remainder < least_up ? remainder : least_up;
        } else {
            first_down = remainder > most_down || (remainder == most_down && i < first_down) ? i : first_down;
            most_down = remainder > most_down ? remainder : most_down;
        }
    }
    CHECK(near);
    CHECK(least_up > most_down || (least_up == most_down && last_up < first_down));
}

static void test_shares_are_by_largest_remainder(void)
{
    qf_error err;
    qf_share_scratch s = {0};
    CHECK_OK(qf_share_scratch_grow(&s, 100, &err));
    uint64_t random = 1;
    for (int round = 0; round < 20000; round++) {
        int32_t count = 1 + (int32_t)below(&random, round % 10 == 0 ? 100 : 6);
        uint64_t limit = (uint64_t)1 << below(&random, 50);
        for (int32_t i = 0; i < count; i++) {
            s.weights[i] = below(&random, 4) == 0 ? 0 : below(&random, limit);
        }
        uint64_t total = below(&random, (uint64_t)1 << below(&random, 57));
        qf_share(&s, count, total);
        check_shares(&s, count, total);
    }
    s.weights[0] = s.weights[2] = 1; /* ties by order */
    s.weights[1] = 2;
    qf_share(&s, 3, 5);
    CHECK(s.shares[0] == 1 && s.shares[1] == 3 && s.shares[2] == 1);
    s.weights[1] = 1;
    qf_share(&s, 3, 5);
    CHECK(s.shares[0] == 2 && s.shares[1] == 2 && s.shares[2] == 1);
    qf_share_scratch_deinit(&s);
}

/* --- counting -------------------------------------------------------------------------------------------- */

/* 5 layers, the last 2 of which see 7 tokens. */
static qf_model_config config(void)
{
    return (qf_model_config){.vocab_size = 50,
                             .hidden_size = 12,
                             .intermediate_size = 20,
                             .num_layers = 5,
                             .num_heads = 4,
                             .num_kv_heads = 2,
                             .head_dim = 6,
                             .sliding_window = 7,
                             .max_window_layers = 3};
}

enum { BLOCK_SIZE = 16, LAYER_TOKEN_BYTES = 2 * 2 * 6 * 2 }; /* K and V, 2 heads of 6, 2 bytes */

static void init_meter(qf_meter *meter)
{
    qf_model_config c = config();
    qf_memory_plan plan = {.kv_block_bytes = (size_t)BLOCK_SIZE * LAYER_TOKEN_BYTES * (size_t)c.num_layers};
    qf_meter_init(meter, true, &c, &plan, BLOCK_SIZE, 0);
}

static void test_a_step_is_counted_as_a_loop_counts_it(void)
{
    qf_error err;
    qf_meter meter;
    qf_meter_step step;
    qf_model_config c = config();
    init_meter(&meter);
    CHECK_OK(qf_meter_step_init(&step, MAX_SEQS, &err));
    for (int32_t start = 0; start < 20; start++) {
        for (int32_t tokens = 1; tokens < 20; tokens++) {
            for (int32_t rows = 0; rows <= tokens; rows += 1 + tokens / 2) {
                uint64_t read = 0, flops = 0;
                for (int32_t layer = 0; layer < c.num_layers; layer++) {
                    int32_t window = layer < 3 ? 1000 : 7;
                    int32_t first = start - window + 1 > 0 ? start - window + 1 : 0;
                    read += (uint64_t)(start + tokens - first) * LAYER_TOKEN_BYTES;
                    for (int32_t p = start; p < start + tokens; p++) {
                        int32_t seen = p + 1 < window ? p + 1 : window;
                        flops += (uint64_t)(2 * 2 * 4 * 6 * seen);
                        flops += 2 * (12 * 24 + 2 * 12 * 12 + 24 * 12 + 3 * 12 * 20);
                    }
                }
                flops += (uint64_t)rows * 2 * 12 * 50;
                qf_account account = {0};
                step.num_entries = 1;
                step.entries[0] = (qf_meter_entry){.account = &account, .start = start, .num_tokens = tokens,
                                                   .num_prefill_tokens = tokens, .num_rows = rows};
                qf_step_traffic traffic = {.layers_bytes = 1000, .head_bytes = 70, .embedding_bytes = 3,
                                           .activation_bytes = 11, .logit_bytes = 5, .host_bytes = 2,
                                           .host_embedding_bytes = 1};
                qf_meter_step_begun(&meter, &step);
                qf_meter_step_count(&meter, &step, &traffic);
                qf_meter_step_share_time(&step, 12345);
                qf_meter_step_ended(&meter, &step, 12345, 1000000);
                CHECK(account.usage.kv_read_bytes == read);
                CHECK(account.usage.flops == flops);
                CHECK(account.usage.kv_write_bytes == (uint64_t)tokens * 5 * LAYER_TOKEN_BYTES);
                CHECK(account.usage.computed_prompt_tokens == (uint64_t)tokens);
                CHECK(account.usage.weight_bytes == 1000 && account.usage.head_bytes == 70);
                CHECK(account.usage.embedding_bytes == 3 && account.usage.activation_bytes == 16);
                CHECK(account.usage.host_bytes == 3 && account.usage.device_ns == 12345);
                CHECK(account.usage.prefill_device_ns == 12345 && account.usage.decode_device_ns == 0);
            }
        }
    }
    qf_meter_step_deinit(&step);
    qf_meter_deinit(&meter);
}

static void test_time_goes_by_bytes_and_is_split_by_tokens(void)
{
    qf_error err;
    qf_meter meter;
    qf_meter_step step;
    init_meter(&meter);
    meter.kv_full_bytes = meter.kv_sliding_bytes = 0; /* bytes are the weights' alone */
    CHECK_OK(qf_meter_step_init(&step, MAX_SEQS, &err));
    qf_account a = {0}, b = {0};
    step.num_entries = 2;
    step.entries[0] = (qf_meter_entry){.account = &a, .num_tokens = 3, .num_prefill_tokens = 2, .num_rows = 1};
    step.entries[1] = (qf_meter_entry){.account = &b, .start = 9, .num_tokens = 1, .num_rows = 1};
    qf_meter_step_begun(&meter, &step);
    qf_meter_step_count(&meter, &step, &(qf_step_traffic){.layers_bytes = 400, .head_bytes = 7});
    CHECK(!qf_meter_is_final(&meter, &a));
    qf_meter_step_share_time(&step, 1000);
    qf_meter_step_ended(&meter, &step, 1000, 5000);
    CHECK(qf_meter_is_final(&meter, &a));
    CHECK_INT(a.usage.weight_bytes, 300);
    CHECK_INT(b.usage.weight_bytes, 100);
    CHECK_INT(a.usage.head_bytes, 4); /* a tie */
    CHECK_INT(b.usage.head_bytes, 3);
    CHECK_INT(a.usage.device_ns, 747); /* 304 of 407 */
    CHECK_INT(b.usage.device_ns, 253);
    CHECK_INT(a.usage.prefill_device_ns, 498);
    CHECK_INT(a.usage.decode_device_ns, 249);
    CHECK_INT(b.usage.decode_device_ns, 253);
    step.num_entries = 1; /* half prefill, an odd time: the half of a nanosecond too */
    step.entries[0] = (qf_meter_entry){.account = &b, .start = 10, .num_tokens = 2, .num_prefill_tokens = 1};
    qf_meter_step_begun(&meter, &step);
    qf_meter_step_count(&meter, &step, &(qf_step_traffic){.layers_bytes = 400});
    qf_meter_step_share_time(&step, 7);
    qf_meter_step_ended(&meter, &step, 7, 6000);
    CHECK_INT(b.usage.prefill_device_ns, 4);
    CHECK_INT(b.usage.decode_device_ns, 253 + 3);
    meter.total.weight_bytes = UINT64_MAX; /* goes on beyond 64 bits */
    qf_meter_step_begun(&meter, &step);
    qf_meter_step_ended(&meter, &step, 1000, 9000);
    CHECK(meter.total.weight_bytes == 399 && meter.total_high[4] == 1);
    qf_meter_step_deinit(&step);
    qf_meter_deinit(&meter);
}

/* --- energy ---------------------------------------------------------------------------------------------- */

#define S 1000000000u

typedef struct energy_case {
    qf_meter meter;
    qf_meter_step step;
    qf_account account;
    qf_energy_source *source;
} energy_case;

static void open_case(energy_case *c)
{
    qf_error err;
    init_meter(&c->meter);
    CHECK_OK(qf_meter_step_init(&c->step, MAX_SEQS, &err));
    c->source = &qf_meter_add_source(&c->meter, "gpu0", "nvml")->source;
    c->source->measured = true;
    CHECK_OK(qf_meter_open(&c->meter, &c->account, 10, &err));
    qf_meter_reading(&c->meter, 0, 10ull * S, 777);
}

static void close_case(energy_case *c)
{
    qf_meter_close(&c->meter, &c->account);
    qf_meter_step_deinit(&c->step);
    qf_meter_deinit(&c->meter);
}

static void begin_step(energy_case *c)
{
    c->step.num_entries = 1;
    c->step.entries[0] = (qf_meter_entry){.account = &c->account, .num_tokens = 1, .num_rows = 1};
    qf_meter_step_begun(&c->meter, &c->step);
    qf_meter_step_count(&c->meter, &c->step, &(qf_step_traffic){.layers_bytes = 100});
}

static void end_step(energy_case *c, uint64_t device_ns, uint64_t end_ns)
{
    qf_meter_step_share_time(&c->step, device_ns);
    qf_meter_step_ended(&c->meter, &c->step, device_ns, end_ns);
}

static void check_energy(const energy_case *c, uint64_t requests, uint64_t idle, uint64_t unsettled)
{
    CHECK_INT(c->source->requests_uj, requests);
    CHECK_INT(c->account.usage.energy_uj[0], requests);
    CHECK_INT(c->source->idle_uj, idle);
    CHECK_INT(c->source->unsettled_uj, unsettled);
    CHECK_INT(c->source->total_uj, requests + idle + unsettled);
}

static void test_idle_power_is_taken_off(void)
{
    energy_case c;
    open_case(&c);
    qf_meter_reading(&c.meter, 0, 11ull * S, 777 + 50 * 1000000);
    check_energy(&c, 0, 50 * 1000000, 0);
    CHECK(c.source->has_idle_watts && c.source->idle_watts == 50.0);
    begin_step(&c);
    end_step(&c, 400000000, 11ull * S + 500000000);
    CHECK(!qf_meter_is_final(&c.meter, &c.account)); /* until the counter is read again */
    qf_meter_reading(&c.meter, 0, 12ull * S, 777 + 170 * 1000000);
    check_energy(&c, 90 * 1000000, 80 * 1000000, 0); /* 0.6 s of 50 W are idle */
    CHECK(qf_meter_is_final(&c.meter, &c.account));
    begin_step(&c);
    end_step(&c, 100000000, 12ull * S + 500000000);
    qf_meter_reading(&c.meter, 0, 13ull * S, 777 + 175 * 1000000); /* less than it takes without a step: all idle */
    check_energy(&c, 90 * 1000000, 85 * 1000000, 0);
    close_case(&c);
}

static void test_idle_power_follows_what_is_new(void)
{
    energy_case c;
    open_case(&c);
    qf_meter_reading(&c.meter, 0, 10ull * S + 300000000, 777 + 15 * 1000000);
    CHECK(!c.source->has_idle_watts); /* too short to tell */
    qf_meter_reading(&c.meter, 0, 11ull * S, 777 + 50 * 1000000);
    CHECK(c.source->has_idle_watts);
    CHECK(c.source->idle_watts > 49.999 && c.source->idle_watts < 50.001);
    qf_meter_reading(&c.meter, 0, 13ull * S, 777 + 250 * 1000000); /* 2 s of 100 W: of the first 20 % fade */
    double memory_ns = (0.3 * 0.93 + 0.7) * 0.8, memory = 50.0 * memory_ns + 200.0;
    CHECK(c.source->idle_watts > memory / (memory_ns + 2.0) - 1e-6);
    CHECK(c.source->idle_watts < memory / (memory_ns + 2.0) + 1e-6);
    qf_meter_reading(&c.meter, 0, 40ull * S, 777 + 520 * 1000000); /* 27 s of 10 W: nothing else is left */
    CHECK(c.source->idle_watts == 10.0);
    close_case(&c);
}

static void test_without_a_baseline_energy_goes_by_time(void)
{
    energy_case c;
    open_case(&c);
    begin_step(&c);
    end_step(&c, 250000000, 10ull * S + 600000000);
    qf_meter_reading(&c.meter, 0, 11ull * S, 777 + 1003);
    check_energy(&c, 251, 752, 0); /* 1003 x 0.75, rounded down */
    CHECK(!c.source->has_idle_watts);
    close_case(&c);
}

static void test_a_step_over_two_windows(void)
{
    energy_case c;
    open_case(&c);
    begin_step(&c);
    qf_meter_reading(&c.meter, 0, 11ull * S, 777 + 1000);
    check_energy(&c, 0, 0, 1000); /* who it was is not known while the step runs */
    end_step(&c, 1ull * S, 11ull * S + 500000000);
    check_energy(&c, 500, 500, 0);
    CHECK_INT(c.account.settled_ns[0], 500000000);
    qf_meter_reading(&c.meter, 0, 12ull * S, 777 + 3000);
    check_energy(&c, 1500, 1500, 0);
    close_case(&c);
}

static void test_a_very_long_step(void)
{
    energy_case c;
    open_case(&c);
    begin_step(&c);
    for (uint64_t i = 1; i <= 40; i++) {
        qf_meter_reading(&c.meter, 0, (10 + i) * S, 777 + 100 * i);
    }
    check_energy(&c, 0, 0, 4000);
    end_step(&c, 40ull * S, 50ull * S);
    check_energy(&c, 4000, 0, 0);
    close_case(&c);
}

static void test_a_counter_that_does_not_move(void)
{
    energy_case c;
    open_case(&c);
    begin_step(&c);
    end_step(&c, 1ull * S, 11ull * S);
    qf_meter_reading(&c.meter, 0, 12ull * S, 777);
    check_energy(&c, 0, 0, 0);
    CHECK(!qf_meter_is_final(&c.meter, &c.account));
    qf_meter_reading(&c.meter, 0, 10ull * S, 777 + 300); /* of the moment of the first: waits for the next */
    check_energy(&c, 0, 0, 0);
    qf_meter_reading(&c.meter, 0, 14ull * S, 777 + 400); /* one window of 4 s */
    check_energy(&c, 100, 300, 0);
    CHECK(qf_meter_is_final(&c.meter, &c.account));
    close_case(&c);
}

static void test_a_request_that_is_gone_is_charged_with_all(void)
{
    energy_case c;
    open_case(&c);
    begin_step(&c);
    end_step(&c, 1ull * S, 11ull * S);
    qf_meter_close(&c.meter, &c.account);
    qf_meter_reading(&c.meter, 0, 12ull * S, 777 + 400);
    CHECK_INT(c.account.usage.energy_uj[0], 0);
    CHECK_INT(c.source->requests_uj, 200);
    CHECK_INT(c.source->idle_uj, 200);
    CHECK_INT(c.source->unsettled_uj, 0);
    close_case(&c);
}

static void test_what_is_gone_takes_its_part(void)
{
    qf_error err;
    energy_case c;
    qf_account gone = {0};
    open_case(&c);
    CHECK_OK(qf_meter_open(&c.meter, &gone, 10, &err));
    c.step.num_entries = 2;
    c.step.entries[0] = (qf_meter_entry){.account = &gone, .num_tokens = 3};
    c.step.entries[1] = (qf_meter_entry){.account = &c.account, .num_tokens = 1};
    c.meter.kv_full_bytes = c.meter.kv_sliding_bytes = 0;
    qf_meter_step_begun(&c.meter, &c.step);
    qf_meter_step_count(&c.meter, &c.step, &(qf_step_traffic){.layers_bytes = 100});
    end_step(&c, 1ull * S, 11ull * S);
    qf_meter_close(&c.meter, &gone);
    qf_meter_reading(&c.meter, 0, 11ull * S, 777 + 400);
    CHECK_INT(c.account.usage.energy_uj[0], 100);
    CHECK_INT(c.source->requests_uj, 400);
    begin_step(&c);
    end_step(&c, 1ull * S, 12ull * S);
    qf_meter_reading(&c.meter, 0, 12ull * S, 777 + 1000); /* who is gone has no part in this */
    CHECK_INT(c.account.usage.energy_uj[0], 700);
    CHECK_INT(c.source->requests_uj, 1000);
    close_case(&c);
}

/* --- everything at once ---------------------------------------------------------------------------------- */

typedef struct world {
    uint64_t random, now_ns;
    qf_meter meter;
    qf_meter_step steps[2];
    int32_t num_begun, num_ended;
    qf_account accounts[NUM_ACCOUNTS];
    qf_usage closed; /* sums over accounts that were closed */
    uint64_t readings[2];
    bool closed_early;
} world;

static void add_usage(qf_usage *sum, const qf_usage *one)
{
    uint64_t *to = &sum->prompt_tokens;
    const uint64_t *from = &one->prompt_tokens;
    for (size_t i = 0; i < offsetof(qf_usage, energy_uj) / sizeof *to; i++) {
        to[i] += from[i];
    }
    for (int i = 0; i < QF_MAX_ENERGY_SOURCES; i++) {
        sum->energy_uj[i] += one->energy_uj[i];
    }
}

static void check_world(const world *w)
{
    qf_meter_stats stats;
    qf_usage sum = w->closed;
    qf_meter_get_stats(&w->meter, w->now_ns, &stats);
    for (int32_t i = 0; i < NUM_ACCOUNTS; i++) {
        if (w->accounts[i].known) {
            add_usage(&sum, &w->accounts[i].usage);
        }
    }
    CHECK(memcmp(&sum, &stats.requests, offsetof(qf_usage, energy_uj)) == 0);
    CHECK(memcmp(&sum, &stats.total, offsetof(qf_usage, energy_uj)) == 0);
    CHECK(sum.device_ns == sum.prefill_device_ns + sum.decode_device_ns);
    for (int32_t k = 0; k < stats.num_sources; k++) {
        const qf_energy_source *source = &stats.sources[k];
        CHECK(source->total_uj == source->requests_uj + source->idle_uj + source->unsettled_uj);
        CHECK(source->total_uj == w->readings[k] - 1000);
        CHECK(w->closed_early ? sum.energy_uj[k] <= source->requests_uj : sum.energy_uj[k] == source->requests_uj);
    }
}

static void plan_step(world *w, qf_meter_step *step)
{
    step->num_entries = 0;
    bool single = below(&w->random, 2) == 0; /* decode: a token each */
    int32_t wanted = 1 + (int32_t)below(&w->random, below(&w->random, 5) == 0 ? MAX_SEQS : 5);
    for (int32_t i = 0; i < NUM_ACCOUNTS && step->num_entries < wanted; i++) {
        if (w->accounts[i].known && below(&w->random, 4) > 0) {
            int32_t tokens = single ? 1 : 1 + (int32_t)below(&w->random, 40);
            int32_t prefill = (int32_t)below(&w->random, (uint64_t)tokens + 1);
            step->entries[step->num_entries++] =
                (qf_meter_entry){.account = &w->accounts[i], .start = (int32_t)below(&w->random, 5000),
                                 .num_tokens = tokens, .num_prefill_tokens = prefill,
                                 .num_rows = (int32_t)below(&w->random, single ? 2 : 3)};
        }
    }
}

static void begin_random_step(world *w)
{
    qf_meter_step *step = &w->steps[w->num_begun % 2];
    plan_step(w, step);
    if (step->num_entries == 0) {
        return;
    }
    int32_t rows = 0;
    for (int32_t i = 0; i < step->num_entries; i++) {
        rows += step->entries[i].num_rows;
    }
    uint64_t scale = (uint64_t)1 << below(&w->random, 40);
    qf_step_traffic traffic = {.layers_bytes = below(&w->random, scale),
                               .head_bytes = rows > 0 ? below(&w->random, scale) : 0,
                               .embedding_bytes = below(&w->random, 100000),
                               .activation_bytes = below(&w->random, scale),
                               .logit_bytes = rows > 0 ? below(&w->random, scale) : 0,
                               .host_bytes = below(&w->random, 3) == 0 ? below(&w->random, scale) : 0,
                               .host_embedding_bytes = below(&w->random, 1000)};
    qf_meter_step_begun(&w->meter, step);
    qf_meter_step_count(&w->meter, step, &traffic);
    w->num_begun++;
}

static void end_random_step(world *w)
{
    qf_meter_step *step = &w->steps[w->num_ended++ % 2];
    uint64_t device_ns = below(&w->random, (uint64_t)1 << below(&w->random, 29));
    w->now_ns += device_ns; /* steps do not overlap */
    if (below(&w->random, 20) == 0) {
        qf_meter_step_lost(&w->meter, step);
        return;
    }
    qf_meter_step_share_time(step, device_ns);
    qf_meter_step_ended(&w->meter, step, device_ns, w->now_ns);
}

static void read_random_counter(world *w)
{
    int32_t k = (int32_t)below(&w->random, 2);
    w->readings[k] += below(&w->random, 3) == 0 ? 0 : below(&w->random, 40000000);
    if (below(&w->random, 10) > 0) { /* sometimes twice in a moment */
        w->now_ns += 1 + below(&w->random, 60000000);
    }
    const qf_energy_meter *meter = &w->meter.sources[k];
    uint64_t last = meter->num_pending > 0 ? meter->pending[meter->num_pending - 1].end_ns : meter->window_start_ns;
    if (w->now_ns <= last) {
        w->now_ns = last + 1;
    }
    qf_meter_reading(&w->meter, k, w->now_ns, w->readings[k]);
}

static void open_or_close(world *w, bool early)
{
    qf_error err;
    qf_account *account = &w->accounts[below(&w->random, NUM_ACCOUNTS)];
    if (!account->known) {
        CHECK_OK(qf_meter_open(&w->meter, account, (int32_t)below(&w->random, 900), &err));
        qf_meter_add_cached(&w->meter, account, (int32_t)below(&w->random, 90));
    } else if (account->steps_in_flight == 0 && (early || qf_meter_is_final(&w->meter, account))) {
        w->closed_early = w->closed_early || !qf_meter_is_final(&w->meter, account);
        add_usage(&w->closed, &account->usage);
        qf_meter_close(&w->meter, account);
    } else {
        qf_meter_add_output(&w->meter, account);
    }
}

static void run_world(uint64_t seed, bool early)
{
    qf_error err;
    static world w; /* some 100 KB */
    w = (world){.random = seed, .now_ns = 1000ull * S};
    init_meter(&w.meter);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(qf_meter_step_init(&w.steps[i], MAX_SEQS, &err));
        qf_meter_add_source(&w.meter, i == 0 ? "gpu0" : "cpu0", i == 0 ? "nvml" : "rapl")->source.measured = true;
        w.readings[i] = 1000;
        qf_meter_reading(&w.meter, i, w.now_ns, 1000);
    }
    for (int event = 0; event < 4000; event++) {
        uint64_t what = below(&w.random, 10);
        if (what < 4) {
            open_or_close(&w, early);
        } else if (what < 6) {
            read_random_counter(&w);
        } else if (w.num_begun - w.num_ended < (what < 8 ? 2 : 1)) {
            begin_random_step(&w);
        } else {
            end_random_step(&w);
        }
        check_world(&w);
    }
    while (w.num_ended < w.num_begun) {
        end_random_step(&w);
    }
    for (int k = 0; k < 2; k++) { /* a last movement settles all */
        w.readings[k] += 5;
        qf_meter_reading(&w.meter, k, ++w.now_ns, w.readings[k]);
        CHECK_INT(w.meter.sources[k].source.unsettled_uj, 0);
    }
    check_world(&w);
    CHECK(w.meter.requests.device_ns > 0 && w.meter.sources[0].source.requests_uj > 0);
    CHECK(w.meter.sources[0].source.idle_uj > 0);
    for (int32_t i = 0; i < NUM_ACCOUNTS; i++) {
        CHECK(!w.accounts[i].known || qf_meter_is_final(&w.meter, &w.accounts[i]));
        qf_meter_close(&w.meter, &w.accounts[i]);
    }
    CHECK(w.meter.num_accounts == 0 && w.meter.listed_head == NULL);
    for (int i = 0; i < 2; i++) {
        qf_meter_step_deinit(&w.steps[i]);
    }
    qf_meter_deinit(&w.meter);
}

static void test_everything_adds_up(void)
{
    for (uint64_t seed = 1; seed <= 8; seed++) {
        run_world(seed * 77, false);
    }
}

static void test_everything_adds_up_when_requests_go_early(void)
{
    for (uint64_t seed = 1; seed <= 8; seed++) {
        run_world(seed * 78, true);
    }
}

/* --- what it takes --------------------------------------------------------------------------------------- */

static double seconds(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int bench(void)
{
    enum { ROUNDS = 20000 };
    qf_error err;
    static qf_account accounts[256];
    static const int32_t sizes[] = {1, 8, 64, 256};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (int mixed = 0; mixed < 2; mixed++) {
            qf_meter meter;
            qf_meter_step step;
            init_meter(&meter);
            qf_meter_add_source(&meter, "gpu0", "nvml")->source.measured = true;
            qf_meter_reading(&meter, 0, 1, 0);
            if (qf_meter_step_init(&step, 256, &err) != QF_OK) {
                return 1;
            }
            double least[2] = {1e9, 1e9};
            for (int round = 0; round < ROUNDS / sizes[s] + 50; round++) {
                step.num_entries = sizes[s];
                for (int32_t i = 0; i < sizes[s]; i++) {
                    step.entries[i] = (qf_meter_entry){.account = &accounts[i], .start = 100 + 7 * i, .num_rows = 1,
                                                       .num_tokens = mixed == 0 ? 1 : 1 + i % 5};
                }
                double begin = seconds();
                qf_meter_step_begun(&meter, &step);
                qf_meter_step_count(&meter, &step,
                                    &(qf_step_traffic){.layers_bytes = 3555555555, .head_bytes = 999999999,
                                                       .embedding_bytes = 12345, .activation_bytes = 98765432,
                                                       .logit_bytes = 7654321});
                double middle = seconds();
                qf_meter_step_share_time(&step, 1234567);
                qf_meter_step_ended(&meter, &step, 1234567, (uint64_t)(round + 2) * 2000000);
                double end = seconds();
                least[0] = middle - begin < least[0] ? middle - begin : least[0];
                least[1] = end - middle < least[1] ? end - middle : least[1];
            }
            (void)printf("%3d sequences, %s: %6.0f ns to count, %6.0f ns when the step has ended\n", sizes[s],
                         mixed == 0 ? "a token each " : "1 to 5 tokens", 1e9 * least[0], 1e9 * least[1]);
            qf_meter_step_deinit(&step);
            qf_meter_deinit(&meter);
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--bench") == 0) {
        return bench();
    }
    RUN(test_shares_are_by_largest_remainder);
    RUN(test_a_step_is_counted_as_a_loop_counts_it);
    RUN(test_time_goes_by_bytes_and_is_split_by_tokens);
    RUN(test_idle_power_is_taken_off);
    RUN(test_idle_power_follows_what_is_new);
    RUN(test_without_a_baseline_energy_goes_by_time);
    RUN(test_a_step_over_two_windows);
    RUN(test_a_very_long_step);
    RUN(test_a_counter_that_does_not_move);
    RUN(test_a_request_that_is_gone_is_charged_with_all);
    RUN(test_what_is_gone_takes_its_part);
    RUN(test_everything_adds_up);
    RUN(test_everything_adds_up_when_requests_go_early);
    return check_report();
}
