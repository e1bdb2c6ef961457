/* sources: base/status.c base/alloc.c sample/params.c sample/philox.c sample/state.c sample/select.c sample/sampler.c */
/* sanitizers: address */
/* alloc-faults: yes */
#include <math.h>
#include <stdlib.h>

#include "base/math.h"
#include "check.h"
#include "sample/philox.h"
#include "sample/sampler.h"

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

static qf_sample_state *make_state(const qf_sampling_params *params, int32_t vocab_size, int32_t real_vocab_size)
{
    qf_error err;
    qf_sample_state *state = NULL;
    CHECK_OK(qf_sample_state_create(params, NULL, 0, 1 << 20, vocab_size, real_vocab_size, &state, &err));
    return state;
}

/* The token of a fresh state. */
static int32_t sample_once(const qf_sampling_params *params, int32_t vocab_size, int32_t real_vocab_size,
                           const float *logits, const uint32_t *bitmask)
{
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(vocab_size, &sampler, &err));
    qf_sample_state *state = make_state(params, vocab_size, real_vocab_size);
    int32_t token_id = -2;
    qf_sample(sampler, state, logits, bitmask, &token_id, NULL);
    CHECK_INT(qf_sample_state_num_output_tokens(state), token_id >= 0 ? 1 : 0);
    qf_sample_state_destroy(state);
    qf_sampler_destroy(sampler);
    return token_id;
}

static qf_sampling_params greedy(void)
{
    qf_sampling_params params;
    qf_sampling_params_init(&params);
    params.temperature = 0.0f;
    return params;
}

/* The known answers that were published with the generator (Random123, kat_vectors). */
static void test_philox(void)
{
    const struct {
        uint32_t counter[4], key[2], expected[4];
    } vectors[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
        uint32_t out[4];
        qf_philox4x32_10(vectors[i].counter, vectors[i].key, out);
        for (int j = 0; j < 4; j++) {
            CHECK_INT(out[j], vectors[i].expected[j]);
        }
    }
    const uint32_t counter[4] = {7, 3, 0, 0}, key[2] = {0x89abcdef, 0x01234567};
    uint32_t a[4], b[4];
    qf_philox4x32_10(counter, key, a);
    qf_philox4x32(0x0123456789abcdefULL, 3, 7, b);
    CHECK(memcmp(a, b, sizeof a) == 0);
    const uint32_t lowest[4] = {0, 0, 0, 0}, highest[4] = {0xffffffff, 0xffffffff, 0, 0};
    CHECK(qf_uniform_from_words(lowest) > 0.0);
    CHECK(qf_uniform_from_words(highest) < 1.0);
}

static void test_math(void)
{
    double worst = 0.0;
    for (uint32_t bits = 0x80000000u; bits <= 0xc2ae0000u; bits += 1021) { /* -0 to -87 */
        float x = qf_bits_f32(bits);
        double exact = exp((double)x);
        int exponent;
        (void)frexp(exact, &exponent);
        worst = fmax(worst, fabs((double)qf_expf_nonpositive(x) - exact) / ldexp(1.0, exponent - 24));
    }
    CHECK(worst <= 1.0);
    CHECK(qf_expf_nonpositive(-INFINITY) == 0.0f && qf_expf_nonpositive(-88.0f) == 0.0f);
    CHECK(qf_expf_nonpositive(0.0f) == 1.0f && isnan(qf_expf_nonpositive(NAN)));
    CHECK(qf_log(1.0) == 0.0);
    for (double x = 1.5; x < 1e12; x *= 1.01) {
        CHECK(fabs(qf_log(x) - log(x)) <= 4e-16 * log(x));
    }
}

static void test_greedy(void)
{
    /* Every length around the blocks, the maximum everywhere, twice: the first wins. */
    static float logits[1100];
    qf_sampling_params params = greedy();
    const int32_t sizes[] = {1, 2, 3, 17, 63, 64, 65, 118, 128, 1024, 1025, 1100};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        int32_t size = sizes[s];
        for (int32_t at = 0; at < size; at += 1 + size / 40) {
            for (int32_t i = 0; i < size; i++) {
                logits[i] = -1.0f - (float)(i % 7);
            }
            logits[size - 1] = 2.0f;
            logits[at] = 2.0f;
            CHECK_INT(sample_once(&params, size, size, logits, NULL), at);
        }
    }
    const float zeros[4] = {-1.0f, -0.0f, 0.0f, -2.0f};
    CHECK_INT(sample_once(&params, 4, 4, zeros, NULL), 1);
    params.temperature = 1.0f;
    params.top_k = 1;
    CHECK_INT(sample_once(&params, 4, 4, zeros, NULL), 1);
}

static void test_masks(void)
{
    float logits[70];
    for (int i = 0; i < 70; i++) {
        logits[i] = (float)i;
    }
    for (int mode = 0; mode < 4; mode++) {
        qf_sampling_params params = greedy();
        params.temperature = mode == 0 ? 0.0f : 0.01f;
        params.top_k = mode == 2 ? 3 : 0;
        params.top_p = mode == 3 ? 0.5f : 1.0f;
        CHECK_INT(sample_once(&params, 70, 70, logits, NULL), 69);
        CHECK_INT(sample_once(&params, 70, 66, logits, NULL), 65);
        uint32_t bitmask[3] = {0xffffffffu, 0xffffffffu, 0x7};
        CHECK_INT(sample_once(&params, 70, 70, logits, bitmask), 66);
        bitmask[1] = 1u << 4;
        bitmask[2] = 0;
        CHECK_INT(sample_once(&params, 70, 70, logits, bitmask), 36);
        bitmask[0] = bitmask[1] = 0;
        CHECK_INT(sample_once(&params, 70, 70, logits, bitmask), -1);
        bitmask[2] = 0x20; /* a padding row alone */
        CHECK_INT(sample_once(&params, 70, 69, logits, bitmask), -1);
        const int32_t allowed[] = {3, 69, 11};
        params.allowed_token_ids = allowed;
        params.num_allowed_token_ids = 3;
        CHECK_INT(sample_once(&params, 70, 69, logits, NULL), 11);
        const qf_logit_bias bias[] = {{69, 100.0f}, {3, 100.0f}, {20, 100.0f}};
        params.logit_bias = bias;
        params.num_logit_bias = 3;
        CHECK_INT(sample_once(&params, 70, 69, logits, NULL), 3); /* a bias does not lift a mask */
    }
}

static void test_bad_logits(void)
{
    float logits[200];
    for (int mode = 0; mode < 3; mode++) {
        qf_sampling_params params = greedy();
        params.temperature = mode == 0 ? 0.0f : 1.0f;
        params.top_k = mode == 2 ? 5 : 0;
        for (int at = 0; at < 200; at++) {
            for (int i = 0; i < 200; i++) {
                logits[i] = -(float)i;
            }
            logits[at] = NAN;
            CHECK_INT(sample_once(&params, 200, 190, logits, NULL), -1); /* padding rows too */
            logits[at] = INFINITY;
            CHECK_INT(sample_once(&params, 200, 190, logits, NULL), -1);
            logits[at] = -INFINITY;
            CHECK(sample_once(&params, 200, 190, logits, NULL) >= 0);
        }
        for (int i = 0; i < 200; i++) {
            logits[i] = -INFINITY;
        }
        CHECK_INT(sample_once(&params, 200, 200, logits, NULL), -1);
        logits[131] = -3e38f;
        CHECK_INT(sample_once(&params, 200, 200, logits, NULL), 131);
    }
}

/* Penalties by hand: prompt 0 and 1; output grows by what is drawn. */
static void test_penalties(void)
{
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(4, &sampler, &err));
    const int32_t prompt[] = {0, 1, 1};
    const float logits[4] = {3.0f, -0.5f, 2.0f, -0.8f};
    int32_t token_id;

    qf_sampling_params params = greedy();
    params.repetition_penalty = 2.0f; /* 1.5, -1.0, 2.0, -0.8 then 1.5, -1.0, 1.0, -0.8 */
    qf_sample_state *state = NULL;
    CHECK_OK(qf_sample_state_create(&params, prompt, 3, 10, 4, 4, &state, &err));
    qf_sample(sampler, state, logits, NULL, &token_id, NULL);
    CHECK_INT(token_id, 2);
    qf_sample(sampler, state, logits, NULL, &token_id, NULL);
    CHECK_INT(token_id, 0);
    qf_sample_state_destroy(state);

    params = greedy();
    params.presence_penalty = 1.5f;   /* the prompt does not count */
    params.frequency_penalty = 0.25f; /* 3 | 1.25 2 | 1.25 .25 | 1.0 .25 | .75 .25 | .5 .25 | .25 .25 | 0 .25 */
    const int32_t expected[] = {0, 2, 0, 0, 0, 0, 0, 2};
    CHECK_OK(qf_sample_state_create(&params, prompt, 3, 10, 4, 4, &state, &err));
    for (int i = 0; i < 8; i++) {
        qf_sample(sampler, state, logits, NULL, &token_id, NULL);
        CHECK_INT(token_id, expected[i]);
    }
    CHECK_INT(qf_sample_state_num_output_tokens(state), 8);
    qf_sample_state_destroy(state);

    params = greedy();
    params.repetition_penalty = 1e-38f; /* the quotient overflows: still the largest, never NaN */
    CHECK_OK(qf_sample_state_create(&params, prompt, 3, 10, 4, 4, &state, &err));
    qf_sample(sampler, state, logits, NULL, &token_id, NULL);
    CHECK_INT(token_id, 0);
    qf_sample_state_destroy(state);
    qf_sampler_destroy(sampler);
}

static void test_min_tokens_and_bad_words(void)
{
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(5, &sampler, &err));
    const float logits[5] = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f};
    const int32_t stop[] = {4, 3};
    qf_sampling_params params = greedy();
    params.stop_token_ids = stop;
    params.num_stop_token_ids = 2;
    params.min_tokens = 2;
    qf_sample_state *state = make_state(&params, 5, 5);
    const int32_t expected_min[] = {2, 2, 4};
    int32_t token_id;
    for (int i = 0; i < 3; i++) {
        qf_sample(sampler, state, logits, NULL, &token_id, NULL);
        CHECK_INT(token_id, expected_min[i]);
    }
    qf_sample_state_destroy(state);

    /* 4 never; 3 not after 3 3; 2 not after 3 3 2. */
    const int32_t one[] = {4}, two[] = {3, 3, 3}, three[] = {3, 3, 2, 2};
    const qf_bad_words bad_words[] = {{one, 1}, {two, 3}, {three, 4}};
    params = greedy();
    params.bad_words = bad_words;
    params.num_bad_words = 3;
    state = make_state(&params, 5, 5);
    const int32_t expected_words[] = {3, 3, 2, 3, 3, 2, 3};
    for (int i = 0; i < 7; i++) {
        qf_sample(sampler, state, logits, NULL, &token_id, NULL);
        CHECK_INT(token_id, expected_words[i]);
    }
    const float flat[5] = {0.0f, 0.0f, 9.0f, 0.0f, 10.0f};
    qf_sample_state_append(state, 3); /* ... 3 3: 2 is allowed, then it is not */
    qf_sample(sampler, state, flat, NULL, &token_id, NULL);
    CHECK_INT(token_id, 2);
    qf_sample(sampler, state, flat, NULL, &token_id, NULL);
    CHECK_INT(token_id, 0);
    qf_sample_state_destroy(state);
    qf_sampler_destroy(sampler);
}

/* The lists are copied: the caller's may change after creation. */
static void test_params_are_copied(void)
{
    int32_t allowed[] = {1}, stop[] = {2}, word[] = {0};
    qf_logit_bias bias[] = {{1, 1.0f}};
    qf_bad_words words[] = {{word, 1}};
    qf_sampling_params params = greedy();
    params.allowed_token_ids = allowed;
    params.num_allowed_token_ids = 1;
    params.stop_token_ids = stop;
    params.num_stop_token_ids = 1;
    params.min_tokens = 1;
    params.logit_bias = bias;
    params.num_logit_bias = 1;
    params.bad_words = words;
    params.num_bad_words = 1;
    qf_sample_state *state = make_state(&params, 3, 3);
    allowed[0] = 2;
    stop[0] = word[0] = bias[0].token_id = 1;
    words[0].token_ids = NULL;
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(3, &sampler, &err));
    const float logits[3] = {0.0f, 0.0f, 0.0f};
    int32_t token_id;
    qf_sample(sampler, state, logits, NULL, &token_id, NULL);
    CHECK_INT(token_id, 1);
    qf_sample_state_destroy(state);
    qf_sampler_destroy(sampler);
}

#define CHI_SIZE 12
#define CHI_DRAWS 20000

/* Draws at positions 0 .. CHI_DRAWS - 1 against exact probabilities; those of 0 never come. */
static void check_distribution(const qf_sampling_params *params, const float *logits, const double *probabilities)
{
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(CHI_SIZE, &sampler, &err));
    qf_sample_state *state = make_state(params, CHI_SIZE, CHI_SIZE);
    int counts[CHI_SIZE] = {0};
    for (int i = 0; i < CHI_DRAWS; i++) {
        int32_t token_id;
        qf_sample(sampler, state, logits, NULL, &token_id, NULL);
        counts[token_id]++;
    }
    double chi2 = 0.0;
    int degrees = -1;
    for (int i = 0; i < CHI_SIZE; i++) {
        double expected = probabilities[i] * CHI_DRAWS;
        if (probabilities[i] == 0.0) {
            CHECK_INT(counts[i], 0);
        } else {
            chi2 += (counts[i] - expected) * (counts[i] - expected) / expected;
            degrees++;
        }
    }
    /* Five standard deviations and some: a fixed seed that passes, and a bias of 2 percent that does not. */
    CHECK(chi2 < degrees + 5.0 * sqrt(2.0 * (degrees + 1)));
    qf_sample_state_destroy(state);
    qf_sampler_destroy(sampler);
}

static void test_distribution(void)
{
    /* Descending by rank[]: 4 7 1 0 9 2 11 3 5 6 8 10 */
    const int order[CHI_SIZE] = {4, 7, 1, 0, 9, 2, 11, 3, 5, 6, 8, 10};
    float logits[CHI_SIZE];
    for (int i = 0; i < CHI_SIZE; i++) {
        logits[order[i]] = 2.0f - 0.3f * (float)i;
    }
    const struct {
        float temperature, top_p, min_p;
        int top_k;
    } cases[] = {{1.0f, 1.0f, 0.0f, 0},  {0.5f, 1.0f, 0.0f, 0},  {2.0f, 1.0f, 0.0f, -1}, {1.0f, 1.0f, 0.0f, 3},
                 {1.0f, 0.7f, 0.0f, 0},  {1.0f, 1.0f, 0.2f, 0},  {0.7f, 0.8f, 0.0f, 5},  {1.5f, 0.9f, 0.15f, 8},
                 {1.0f, 1e-6f, 0.0f, 0}, {1.0f, 1.0f, 1.0f, 0}, {100.0f, 1.0f, 0.0f, 12}, {1.0f, 0.5f, 0.3f, 0}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        double w[CHI_SIZE], total = 0.0, kept = 0.0, probabilities[CHI_SIZE] = {0};
        int limit = cases[c].top_k > 0 ? cases[c].top_k : CHI_SIZE;
        for (int i = 0; i < limit; i++) {
            w[i] = exp(-0.3 * i / (double)cases[c].temperature);
            w[i] = w[i] < (double)cases[c].min_p ? 0.0 : w[i];
            total += w[i];
        }
        int n = 0;
        while (n < limit && (n == 0 || kept < total * (double)cases[c].top_p)) {
            kept += w[n++];
        }
        for (int i = 0; i < n; i++) {
            probabilities[order[i]] = w[i] / kept;
        }
        qf_sampling_params params;
        qf_sampling_params_init(&params);
        params.temperature = cases[c].temperature;
        params.top_k = cases[c].top_k;
        params.top_p = cases[c].top_p;
        params.min_p = cases[c].min_p;
        params.seed = 1234 + c;
        check_distribution(&params, logits, probabilities);
    }
}

/* Ties at the edge of top_k and of top_p go to the lower ids. */
static void test_ties(void)
{
    static float logits[3000];
    for (int i = 0; i < 3000; i++) {
        logits[i] = i % 3 == 1 ? 1.0f : -50.0f;
    }
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(3000, &sampler, &err));
    for (int mode = 0; mode < 2; mode++) {
        qf_sampling_params params;
        qf_sampling_params_init(&params);
        params.top_k = mode == 0 ? 10 : 0;
        params.top_p = mode == 0 ? 1.0f : 0.0095f; /* 9.5 of 1000 equal weights: ten tokens */
        qf_sample_state *state = make_state(&params, 3000, 3000);
        int counts[10] = {0};
        for (int i = 0; i < 300; i++) {
            int32_t token_id;
            qf_sample(sampler, state, logits, NULL, &token_id, NULL);
            CHECK(token_id % 3 == 1 && token_id < 30);
            counts[token_id / 3 % 10]++;
        }
        for (int i = 0; i < 10; i++) {
            CHECK(counts[i] > 0);
        }
        qf_sample_state_destroy(state);
    }
    qf_sampler_destroy(sampler);
}

static int compare_logits(const void *a, const void *b)
{
    const qf_logprob *x = a, *y = b;
    if (x->logprob != y->logprob) {
        return x->logprob > y->logprob ? -1 : 1;
    }
    return x->token_id < y->token_id ? -1 : 1;
}

static void test_logprobs(void)
{
    enum { SIZE = 5000, TOP = 64 };
    static float logits[SIZE];
    static qf_logprob all[SIZE];
    qf_logprob out[1 + TOP];
    uint32_t random = 5;
    for (int i = 0; i < SIZE; i++) {
        logits[i] = (float)(next_random(&random) >> 16) / 8192.0f; /* many ties */
        all[i] = (qf_logprob){.token_id = i, .logprob = logits[i]};
    }
    double total = 0.0;
    for (int i = 0; i < SIZE; i++) {
        total += exp((double)logits[i]);
    }
    qsort(all, SIZE, sizeof all[0], compare_logits);
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(SIZE, &sampler, &err));
    for (int at = 0; at < SIZE; at += 97) {
        qf_logprobs(sampler, logits, all[at].token_id, TOP, out);
        CHECK_INT(out[0].token_id, all[at].token_id);
        CHECK_INT(out[0].rank, at + 1);
        CHECK(fabs((double)out[0].logprob - ((double)all[at].logprob - log(total))) < 2e-6);
        for (int i = 0; i < TOP; i++) {
            CHECK_INT(out[1 + i].token_id, all[i].token_id);
            CHECK_INT(out[1 + i].rank, i + 1);
        }
    }
    for (int i = 0; i < SIZE; i++) {
        logits[i] = i == 77 ? 1.0f : -INFINITY;
    }
    qf_logprobs(sampler, logits, 5, 2, out);
    CHECK(out[0].logprob == -INFINITY && out[0].rank == 7 && out[1].logprob == 0.0f);
    CHECK(out[1].token_id == 77 && out[2].token_id == -1 && out[2].logprob == -INFINITY && out[2].rank == 0);
    logits[4999] = NAN;
    qf_logprobs(sampler, logits, 5, 1, out);
    CHECK(isnan(out[0].logprob) && isnan(out[1].logprob) && out[0].rank == 0 && out[1].token_id == -1);
    qf_sampler_destroy(sampler);
}

/* Reported logprobs are of the raw logits, whatever the sampling does; -1 leaves the array alone. */
static void test_sampled_logprobs(void)
{
    qf_error err;
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(4, &sampler, &err));
    const float logits[4] = {0.0f, 1.0f, 2.0f, 3.0f};
    double total = 1.0 + exp(1.0) + exp(2.0) + exp(3.0);
    const int32_t allowed[] = {1};
    qf_sampling_params params;
    qf_sampling_params_init(&params);
    params.temperature = 5.0f;
    params.allowed_token_ids = allowed;
    params.num_allowed_token_ids = 1;
    for (int num = -1; num <= 3; num++) {
        params.num_logprobs = num;
        qf_sample_state *state = make_state(&params, 4, 4);
        qf_logprob out[5];
        memset(out, 0x55, sizeof out);
        int32_t token_id;
        qf_sample(sampler, state, logits, NULL, &token_id, out);
        CHECK_INT(token_id, 1);
        if (num >= 0) {
            CHECK(out[0].token_id == 1 && out[0].rank == 3 && fabs((double)out[0].logprob - (1.0 - log(total))) < 1e-6);
        }
        for (int i = 1; i <= num; i++) {
            CHECK(out[i].token_id == 4 - i && out[i].rank == i);
        }
        CHECK_INT(out[1 + num].token_id, 0x55555555);
        qf_sample_state_destroy(state);
    }
    qf_sampler_destroy(sampler);
}

static void test_params_check(void)
{
    qf_error err;
    qf_sampling_params p, good;
    qf_sampling_params_init(&good);
    CHECK_OK(qf_sampling_params_check(&good, 10, &err));
    const int32_t outside[] = {10};
    const qf_logit_bias bias_id[] = {{-1, 0.0f}}, bias_value[] = {{1, 100.5f}}, bias_nan[] = {{1, NAN}};
    const qf_bad_words empty[] = {{outside, 0}}, bad_id[] = {{outside, 1}};
#define REFUSED(field, value)                                                              \
    do {                                                                                   \
        p = good;                                                                          \
        p.field = (value);                                                                 \
        CHECK_STATUS(qf_sampling_params_check(&p, 10, &err), QF_ERROR_INVALID_ARGUMENT);   \
        CHECK(strstr(err.message, #field) != NULL);                                        \
    } while (0)
    const float not_finite[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        REFUSED(temperature, not_finite[i]);
        REFUSED(top_p, not_finite[i]);
        REFUSED(min_p, not_finite[i]);
        REFUSED(repetition_penalty, not_finite[i]);
        REFUSED(presence_penalty, not_finite[i]);
        REFUSED(frequency_penalty, not_finite[i]);
    }
    REFUSED(temperature, -0.1f);
    REFUSED(temperature, 100.5f);
    REFUSED(top_k, -2);
    REFUSED(top_p, 0.0f);
    REFUSED(top_p, 1.5f);
    REFUSED(min_p, -0.5f);
    REFUSED(min_p, 1.5f);
    REFUSED(repetition_penalty, 0.0f);
    REFUSED(presence_penalty, 2.5f);
    REFUSED(frequency_penalty, -2.5f);
    REFUSED(min_tokens, -1);
    REFUSED(num_logprobs, -2);
    REFUSED(num_logprobs, QF_MAX_LOGPROBS + 1);
    REFUSED(num_logprobs, 11);
    REFUSED(num_logit_bias, -1);
    REFUSED(num_logit_bias, 1);
    REFUSED(allowed_token_ids, outside); /* an empty list */
    good.num_logit_bias = good.num_bad_words = good.num_stop_token_ids = good.num_allowed_token_ids = 1;
    const int32_t inside[] = {9};
    const qf_logit_bias bias_good[] = {{9, -100.0f}};
    const qf_bad_words words_good[] = {{inside, 1}};
    good.logit_bias = bias_good;
    good.bad_words = words_good;
    good.stop_token_ids = good.allowed_token_ids = inside;
    CHECK_OK(qf_sampling_params_check(&good, 10, &err));
    REFUSED(logit_bias, bias_id);
    REFUSED(logit_bias, bias_value);
    REFUSED(logit_bias, bias_nan);
    REFUSED(bad_words, empty);
    REFUSED(bad_words, bad_id);
    REFUSED(stop_token_ids, outside);
    REFUSED(allowed_token_ids, outside);
#undef REFUSED
    qf_sample_state *state;
    const int32_t prompt[] = {0, 10};
    CHECK_STATUS(qf_sample_state_create(&good, prompt, 2, 1, 10, 10, &state, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(qf_sample_state_create(&good, prompt, 1, -1, 10, 10, &state, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(qf_sample_state_create(&good, prompt, 1, 1, 10, 11, &state, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(state == NULL);
}

#ifdef CHECK_ALLOC_FAULTS
static qf_status create_everything(void)
{
    const int32_t ids[] = {1, 2, 3}, prompt[] = {5, 5, 6};
    const qf_logit_bias bias[] = {{1, 1.0f}};
    const qf_bad_words words[] = {{ids, 3}};
    qf_sampling_params params;
    qf_sampling_params_init(&params);
    params.repetition_penalty = 1.1f;
    params.allowed_token_ids = params.stop_token_ids = ids;
    params.num_allowed_token_ids = params.num_stop_token_ids = 3;
    params.logit_bias = bias;
    params.bad_words = words;
    params.num_logit_bias = params.num_bad_words = 1;
    qf_error err;
    qf_sampler *sampler = NULL;
    qf_sample_state *state = NULL;
    qf_status status = qf_sampler_create(100, &sampler, &err);
    if (status == QF_OK) {
        status = qf_sample_state_create(&params, prompt, 3, 4, 100, 100, &state, &err);
    }
    CHECK(status == QF_OK || state == NULL);
    qf_sample_state_destroy(state);
    qf_sampler_destroy(sampler);
    return status;
}

static void test_alloc_faults(void)
{
    for (int64_t n = 1;; n++) {
        check_fail_alloc(n);
        qf_status status = create_everything();
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        if (!failed) {
            CHECK(n > 15);
            break;
        }
    }
}
#endif

int main(void)
{
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    RUN(test_philox);
    RUN(test_math);
    RUN(test_greedy);
    RUN(test_masks);
    RUN(test_bad_logits);
    RUN(test_penalties);
    RUN(test_min_tokens_and_bad_words);
    RUN(test_params_are_copied);
    RUN(test_distribution);
    RUN(test_ties);
    RUN(test_logprobs);
    RUN(test_sampled_logprobs);
    RUN(test_params_check);
    return check_report();
}
