/* sources: base/status.c base/alloc.c sample/params.c sample/philox.c sample/state.c sample/select.c
 *          sample/sampler.c */
/* The device's sampler against the host's: tokens, counts and logprobs of thousands of rows. A token may differ only
 * where, by a reference in double, the draw or the nucleus ends within 1e-7 of a threshold: such rows are counted. */
#include "check_cuda.cuh"

extern "C" {
#include "sample/params.h"
#include "sample/sampler.h"
#include "sample/select.h"
#include "sample/state.h"
}

static int num_draws, num_near, num_compared_logprobs;

/* --- one sequence, as the host and as the device know it ------------------------------------------------------ */

struct Sequence {
    qf_sampling_params params;
    std::vector<qf_logit_bias> logit_bias;
    std::vector<int32_t> allowed, stop, prompt;
    std::vector<uint32_t> bitmask; /* empty: none */
    qf_sample_state *state = nullptr;
    int32_t vocab_size, real_vocab_size;
    int32_t target_id = -1, num_target_logprobs = 0;
    bool draws = true;
    bool diverged = false; /* after a near miss the host's counts are other than the device's */
    ~Sequence() { qf_sample_state_destroy(state); }
    void create()
    {
        params.logit_bias = logit_bias.data();
        params.num_logit_bias = (int32_t)logit_bias.size();
        params.allowed_token_ids = allowed.empty() ? NULL : allowed.data();
        params.num_allowed_token_ids = (int32_t)allowed.size();
        params.stop_token_ids = stop.data();
        params.num_stop_token_ids = (int32_t)stop.size();
        CHECK_OK(qf_sample_state_create(&params, prompt.data(), (int32_t)prompt.size(), 64, vocab_size,
                                        real_vocab_size, &state, &check_error));
    }
    bool penalises() const
    {
        return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
               params.frequency_penalty != 0.0f;
    }
};

/* What one launch needs on the device. */
struct Batch {
    std::vector<qf_cuda_sample_row> rows;
    std::vector<uint32_t> bitmasks;
    std::vector<qf_cuda_logit_bias> biases;
    int32_t num_logprobs = 0;
};

static void add_row(Batch *batch, const Sequence *q, int32_t slot)
{
    qf_cuda_sample_row r = {};
    const qf_sampling_params &p = q->params;
    r.slot = q->draws ? slot : -1;
    r.real_vocab_size = q->real_vocab_size;
    r.temperature = p.temperature > 0.0f && p.temperature < 0.01f ? 0.01f : p.temperature;
    r.top_p = p.top_p;
    r.min_p = p.min_p;
    r.top_k = p.top_k < 0 ? 0 : p.top_k;
    r.repetition_penalty = p.repetition_penalty;
    r.presence_penalty = p.presence_penalty;
    r.frequency_penalty = p.frequency_penalty;
    r.uses_counts = q->penalises();
    r.seed_low = (uint32_t)p.seed;
    r.seed_high = (uint32_t)(p.seed >> 32);
    r.sample_index = p.sample_index;
    r.position = (uint32_t)qf_sample_state_num_output_tokens(q->state);
    r.bitmask_offset = -1;
    if (!q->bitmask.empty() || !q->allowed.empty()) {
        size_t words = ((size_t)q->vocab_size + 31) / 32;
        std::vector<uint32_t> mask(words, q->allowed.empty() ? 0xffffffffu : 0u);
        for (int32_t id : q->allowed) {
            mask[(size_t)id / 32] |= 1u << id % 32;
        }
        for (size_t i = 0; i < q->bitmask.size(); i++) {
            mask[i] &= q->bitmask[i];
        }
        r.bitmask_offset = (int32_t)batch->bitmasks.size();
        batch->bitmasks.insert(batch->bitmasks.end(), mask.begin(), mask.end());
    }
    r.bias_offset = (int32_t)batch->biases.size();
    if (r.position < (uint32_t)p.min_tokens) {
        for (int32_t id : q->stop) {
            batch->biases.push_back({id, -INFINITY});
        }
    }
    for (const qf_logit_bias &b : q->logit_bias) {
        batch->biases.push_back({b.token_id, b.bias});
    }
    r.num_bias = (int32_t)batch->biases.size() - r.bias_offset;
    r.num_logprobs = p.num_logprobs;
    r.logprobs_offset = batch->num_logprobs;
    batch->num_logprobs += p.num_logprobs >= 0 ? 1 + p.num_logprobs : 0;
    r.target_id = q->target_id;
    r.num_target_logprobs = q->num_target_logprobs;
    r.target_logprobs_offset = batch->num_logprobs;
    batch->num_logprobs += q->target_id >= 0 ? 1 + q->num_target_logprobs : 0;
    batch->rows.push_back(r);
}

/* --- how near a decision is ----------------------------------------------------------------------------------- */

struct Candidate {
    float x;
    int32_t id;
    double w;
};

/* The least relative distance of a running sum from the nucleus' limit or from the draw's target. x: edited logits. */
static double margin(const Sequence *q, const std::vector<float> &x, double u)
{
    const qf_sampling_params &p = q->params;
    float max = *std::max_element(x.begin(), x.end());
    float temperature = p.temperature < 0.01f ? 0.01f : p.temperature;
    std::vector<Candidate> c;
    double total = 0.0, least = INFINITY;
    for (size_t i = 0; i < x.size(); i++) {
        if (x[i] > -INFINITY) {
            c.push_back({x[i], (int32_t)i, (double)qf_weight(x[i], max, 1.0f / temperature, p.min_p)});
        }
    }
    bool filters_k = p.top_k > 0 && p.top_k < (int32_t)x.size();
    if (filters_k || p.top_p < 1.0f) {
        std::sort(c.begin(), c.end(),
                  [](const Candidate &a, const Candidate &b) { return a.x > b.x || (a.x == b.x && a.id < b.id); });
    }
    if (filters_k && (size_t)p.top_k < c.size()) {
        c.resize((size_t)p.top_k);
    }
    for (const Candidate &a : c) {
        total += a.w;
    }
    if (p.top_p < 1.0f) {
        double limit = total * (double)p.top_p, sum = 0.0;
        size_t kept = 0;
        while (kept < c.size() && (kept == 0 || sum < limit)) {
            sum += c[kept++].w;
            least = std::min(least, fabs(sum - limit) / limit);
        }
        c.resize(kept);
        total = sum;
    }
    double sum = 0.0;
    for (const Candidate &a : c) {
        sum += a.w;
        least = std::min(least, fabs(sum - u * total) / total);
    }
    return least;
}

/* --- comparison ----------------------------------------------------------------------------------------------- */

static bool same_logprobs(const qf_cuda_logprob *device, const qf_logprob *host, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        float a = device[i].logprob, b = host[i].logprob;
        bool same = (a != a && b != b) || a == b || fabsf(a - b) <= 1e-5f * fmaxf(1.0f, fabsf(b));
        if (device[i].token_id != host[i].token_id || device[i].rank != host[i].rank || !same) {
            fprintf(stderr, "entry %d: token %d rank %d logprob %.9g, expected %d %d %.9g\n", i, device[i].token_id,
                    device[i].rank, a, host[i].token_id, host[i].rank, b);
            return false;
        }
    }
    num_compared_logprobs += count;
    return true;
}

static void describe(const Sequence *q)
{
    const qf_sampling_params &p = q->params;
    fprintf(stderr, "vocab %d (%d), temperature %g top_k %d top_p %.9g min_p %g penalties %g %g %g, %zu biases\n",
            q->vocab_size, q->real_vocab_size, p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty,
            p.presence_penalty, p.frequency_penalty, q->logit_bias.size());
}

/* The host draws too; token: the device's. Returns false if they differ beyond doubt. */
static bool compare_draw(qf_sampler *sampler, Sequence *q, const float *logits, int32_t token, bool *differs,
                         std::vector<qf_logprob> *logprobs)
{
    const uint32_t *bitmask = q->bitmask.empty() ? NULL : q->bitmask.data();
    std::vector<float> x((size_t)q->real_vocab_size);
    bool finite = true;
    for (int32_t i = 0; i < q->vocab_size; i++) {
        finite = finite && logits[i] < INFINITY;
    }
    if (finite) {
        qf_sample_state_apply(q->state, bitmask, logits, x.data());
    }
    uint32_t words[4];
    qf_philox4x32(q->params.seed, q->params.sample_index, (uint32_t)qf_sample_state_num_output_tokens(q->state), words);
    double u = (double)(((uint64_t)words[0] << 32 | words[1]) >> 11 | 1u) * 0x1p-53;
    int32_t expected = -2;
    logprobs->resize((size_t)std::max(1 + q->params.num_logprobs, 1));
    qf_sample(sampler, q->state, logits, bitmask, &expected, logprobs->data());
    *differs = token != expected;
    num_draws++;
    if (!*differs) {
        return true;
    }
    double m = expected >= 0 && token >= 0 && q->params.temperature > 0.0f ? margin(q, x, u) : 1.0;
    if (m <= 1e-7) {
        num_near++;
        return true;
    }
    fprintf(stderr, "token %d, expected %d (margin %g): ", token, expected, m);
    describe(q);
    return false;
}

/* --- random rows and parameters ------------------------------------------------------------------------------- */

static void fill_logits(Random *random, float *x, int32_t size, int kind)
{
    float level = random->normal();
    for (int32_t i = 0; i < size; i++) {
        switch (kind) {
        case 0: x[i] = 2.5f * random->normal(); break;
        case 1: x[i] = 1e-3f * random->normal(); break;           /* flat */
        case 2: x[i] = floorf(3.0f * random->normal()) * 0.5f; break; /* ties */
        case 3: x[i] = level; break;                              /* all tied */
        case 4: x[i] = random->below(2) ? -INFINITY : 4.0f * random->normal(); break;
        case 5: x[i] = 1e30f * random->normal(); break;           /* huge */
        case 6: x[i] = -50.0f + random->normal(); break;
        default: x[i] = random->normal(); break;
        }
    }
    if (kind == 6 || kind == 7) { /* peaked: few far above */
        for (int i = 0; i < 4; i++) {
            x[random->below(size)] = 12.0f + 2.0f * random->normal();
        }
    }
    if (random->below(12) == 0) {
        x[random->below(size)] = -0.0f;
        x[random->below(size)] = 0.0f;
    }
    if (random->below(40) == 0) {
        x[random->below(size)] = random->below(2) ? NAN : INFINITY;
    }
    if (random->below(60) == 0) {
        std::fill(x, x + size, -INFINITY);
    }
}

static void choose_filters(Random *random, Sequence *q)
{
    static const float temperatures[] = {0.0f, 0.005f, 0.01f, 0.7f, 0.7f, 1.0f, 1.0f, 2.0f, 100.0f};
    static const float top_ps[] = {1.0f, 1.0f, 0.95f, 0.8f, 0.5f, 1e-30f, 0.99999994f};
    static const float min_ps[] = {0.0f, 0.0f, 0.0f, 0.05f, 1e-6f, 1.0f};
    qf_sampling_params &p = q->params;
    p.temperature = temperatures[random->below(9)];
    p.top_p = top_ps[random->below(7)];
    p.min_p = min_ps[random->below(6)];
    const int32_t top_ks[] = {0, 0, -1, 1, 2, 20, 50, 300, 1024, 1025, 1500, 4000, q->vocab_size - 1, q->vocab_size,
                              q->vocab_size + 7, 20, 64};
    p.top_k = std::max(top_ks[random->below(17)], -1);
    p.seed = (uint64_t)random->bits() << 32 | random->bits();
    p.sample_index = random->bits() % 7;
}

static void choose_edits(Random *random, Sequence *q)
{
    qf_sampling_params &p = q->params;
    int32_t real = q->real_vocab_size;
    if (random->below(2)) {
        const float repetition[] = {1.0f, 1.05f, 0.5f + 2.0f * random->uniform()};
        p.repetition_penalty = repetition[random->below(3)];
        p.presence_penalty = random->below(2) ? 0.0f : 4.0f * random->uniform() - 2.0f;
        p.frequency_penalty = random->below(2) ? 0.0f : 4.0f * random->uniform() - 2.0f;
        for (int i = random->below(200); i > 0; i--) {
            q->prompt.push_back(random->below(q->vocab_size));
        }
    }
    if (random->below(4) == 0) {
        q->bitmask.assign(((size_t)q->vocab_size + 31) / 32, 0);
        for (uint32_t &word : q->bitmask) {
            word = random->below(3) == 0 ? 0xffffffffu : random->bits() & random->bits();
        }
    }
    if (random->below(6) == 0) {
        for (int i = 1 + random->below(30); i > 0; i--) {
            q->allowed.push_back(random->below(q->vocab_size));
        }
    }
    if (random->below(3) == 0) {
        for (int i = 1 + random->below(300); i > 0; i--) {
            int32_t id = i % 5 == 0 && !q->logit_bias.empty() ? q->logit_bias.back().token_id : random->below(real);
            q->logit_bias.push_back({id, 200.0f * random->uniform() - 100.0f});
        }
    }
    if (random->below(3) == 0) {
        p.min_tokens = 2;
        for (int i = 1 + random->below(5); i > 0; i--) {
            q->stop.push_back(random->below(q->vocab_size));
        }
    }
}

static Sequence *choose_sequence(Random *random, int32_t vocab_size)
{
    Sequence *q = new Sequence;
    qf_sampling_params_init(&q->params);
    q->vocab_size = vocab_size;
    q->real_vocab_size = vocab_size - (random->below(3) == 0 ? random->below(std::min(vocab_size, 300)) : 0);
    choose_filters(random, q);
    if (random->below(2)) {
        choose_edits(random, q);
    }
    static const int num_tops[] = {0, 1, 5, 20, 64};
    if (random->below(4) == 0) {
        q->params.num_logprobs = std::min(num_tops[random->below(5)], vocab_size);
    }
    if (random->below(5) == 0) {
        q->target_id = random->below(vocab_size);
        q->num_target_logprobs = std::min(num_tops[random->below(5)], vocab_size);
        q->draws = random->below(2) == 0;
    }
    q->create();
    return q;
}

/* --- the device's side of a batch of sequences ---------------------------------------------------------------- */

struct Pool {
    int32_t vocab_size, stride, num_rows;
    Device<float> logits;
    Device<uint16_t> counts;
    Device<int32_t> last_token, token_ids;
    Device<char> workspace;
    Pool(int32_t vocab_size_, int32_t stride_, int32_t num_rows_)
        : vocab_size(vocab_size_), stride(stride_), num_rows(num_rows_), logits((size_t)num_rows_ * stride_),
          counts((size_t)num_rows_ * vocab_size_), last_token(num_rows_), token_ids(num_rows_),
          workspace(qf_cuda_sample_workspace_bytes(vocab_size_, num_rows_))
    {
        CHECK_CUDA(cudaMemset(workspace.data, 0, QF_CUDA_SAMPLE_ZEROED_BYTES)); /* once: kernels leave it so */
    }
    void poison_workspace()
    {
        CHECK_CUDA(cudaMemset(workspace.data + QF_CUDA_SAMPLE_ZEROED_BYTES, 0xff,
                              workspace.size - QF_CUDA_SAMPLE_ZEROED_BYTES));
    }
};

/* Runs rows [first, first + count) of the batch; returns tokens and logprobs. */
static void launch(Pool *pool, const Batch &batch, int32_t first, int32_t count, bool all_greedy,
                   const qf_cuda_device *device, std::vector<int32_t> *tokens, std::vector<qf_cuda_logprob> *logprobs)
{
    Device<qf_cuda_sample_row> rows(batch.rows);
    std::vector<uint32_t> mask_words = batch.bitmasks;
    std::vector<qf_cuda_logit_bias> bias_words = batch.biases;
    mask_words.push_back(0);
    bias_words.push_back({0, 0.0f});
    Device<uint32_t> bitmasks(mask_words);
    Device<qf_cuda_logit_bias> biases(bias_words);
    Device<qf_cuda_logprob> out((size_t)batch.num_logprobs + 1);
    pool->poison_workspace();
    pool->token_ids.poison();
    qf_cuda_sample_args args = {};
    args.logits = pool->logits.data + (size_t)first * pool->stride;
    args.logits_stride = pool->stride;
    args.vocab_size = pool->vocab_size;
    args.num_rows = count;
    args.rows = rows.data + first;
    args.bitmasks = bitmasks.data;
    args.biases = biases.data;
    args.counts = pool->counts.data;
    args.last_token = pool->last_token.data;
    args.token_ids = pool->token_ids.data;
    args.logprobs = out.data;
    args.workspace = pool->workspace.data;
    args.all_greedy = all_greedy;
    CHECK_OK(qf_cuda_sample(&args, device, 0, &check_error));
    CHECK_CUDA(cudaDeviceSynchronize());
    *tokens = pool->token_ids.get();
    *logprobs = out.get();
}

static void reset_counts(Pool *pool, const Sequence *q, int32_t slot)
{
    std::vector<int32_t> ids = q->prompt;
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    std::vector<qf_cuda_token_count> list;
    for (int32_t id : ids) {
        list.push_back({id, 0x8000u});
    }
    list.push_back({0, 0});
    Device<qf_cuda_token_count> device_list(list);
    CHECK_OK(qf_cuda_reset_counts(pool->counts.data, slot, pool->vocab_size, device_list.data, (int32_t)ids.size(), 0,
                                  &check_error));
    CHECK_CUDA(cudaDeviceSynchronize());
}

/* Counts as they have to be after the tokens drawn so far. */
static void check_counts(Pool *pool, const std::vector<Sequence *> &all, const std::vector<std::vector<int32_t>> &drawn)
{
    std::vector<uint16_t> counts = pool->counts.get();
    for (size_t i = 0; i < all.size(); i++) {
        if (!all[i]->draws) {
            continue;
        }
        std::vector<uint16_t> expected((size_t)pool->vocab_size, 0);
        for (int32_t id : all[i]->prompt) {
            expected[(size_t)id] = 0x8000;
        }
        for (int32_t id : drawn[i]) {
            if (all[i]->penalises() && id >= 0) {
                expected[(size_t)id] = (uint16_t)((expected[(size_t)id] + 1) | 0x8000);
            }
        }
        CHECK(memcmp(expected.data(), counts.data() + i * (size_t)pool->vocab_size, expected.size() * 2) == 0);
    }
}

static bool same_bits(const std::vector<qf_cuda_logprob> &a, const std::vector<qf_cuda_logprob> &b)
{
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
}

/* Sequences of several draws each: device against host, twice, and row by row. */
static void check_batch(const qf_cuda_device *device, Random *random, int32_t vocab_size, int32_t stride,
                        int32_t num_rows, int num_steps, bool row_by_row)
{
    Pool pool(vocab_size, stride, num_rows);
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(vocab_size, &sampler, &check_error));
    std::vector<Sequence *> all;
    std::vector<std::vector<int32_t>> drawn((size_t)num_rows);
    for (int32_t i = 0; i < num_rows; i++) {
        all.push_back(choose_sequence(random, vocab_size));
        reset_counts(&pool, all.back(), i);
    }
    std::vector<float> logits((size_t)num_rows * stride);
    std::vector<qf_logprob> expected;
    for (int step = 0; step < num_steps; step++) {
        Batch batch;
        for (int32_t i = 0; i < num_rows; i++) {
            fill_logits(random, logits.data() + (size_t)i * stride, vocab_size, random->below(8));
            std::fill(logits.begin() + (ptrdiff_t)i * stride + vocab_size, logits.begin() + (ptrdiff_t)(i + 1) * stride,
                      NAN); /* beyond the vocabulary: never looked at */
            add_row(&batch, all[(size_t)i], i);
        }
        pool.logits.put(logits);
        std::vector<uint16_t> before = pool.counts.get();
        std::vector<int32_t> tokens, again;
        std::vector<qf_cuda_logprob> logprobs, logprobs_again;
        launch(&pool, batch, 0, num_rows, false, device, &tokens, &logprobs);
        std::vector<int32_t> last = pool.last_token.get();
        std::vector<uint16_t> after = pool.counts.get();
        pool.counts.put(before);
        launch(&pool, batch, 0, num_rows, false, device, &again, &logprobs_again);
        CHECK(tokens == again);
        CHECK(same_bits(logprobs, logprobs_again));
        CHECK(after == pool.counts.get());
        if (row_by_row && step == 0) { /* other chunks, the same bits */
            pool.counts.put(before);
            for (int32_t i = 0; i < num_rows; i++) {
                launch(&pool, batch, i, 1, false, device, &again, &logprobs_again);
                CHECK(again[0] == tokens[(size_t)i]);
                const qf_cuda_sample_row &r = batch.rows[(size_t)i];
                if (r.target_id >= 0) {
                    CHECK(memcmp(&logprobs_again[(size_t)r.target_logprobs_offset],
                                 &logprobs[(size_t)r.target_logprobs_offset], sizeof(qf_cuda_logprob)) == 0);
                }
            }
            CHECK(after == pool.counts.get());
        }
        for (int32_t i = 0; i < num_rows; i++) {
            Sequence *q = all[(size_t)i];
            const qf_cuda_sample_row &r = batch.rows[(size_t)i];
            const float *x = logits.data() + (size_t)i * stride;
            if (q->target_id >= 0) {
                expected.resize(1 + (size_t)q->num_target_logprobs);
                qf_logprobs(sampler, x, q->target_id, q->num_target_logprobs, expected.data());
                CHECK(same_logprobs(&logprobs[(size_t)r.target_logprobs_offset], expected.data(),
                                    1 + q->num_target_logprobs));
            }
            if (!q->draws) {
                CHECK(tokens[(size_t)i] == -1);
                continue;
            }
            CHECK(last[(size_t)i] == tokens[(size_t)i]);
            drawn[(size_t)i].push_back(tokens[(size_t)i]);
            bool differs;
            if (!q->diverged) {
                CHECK(compare_draw(sampler, q, x, tokens[(size_t)i], &differs, &expected));
                q->diverged = differs;
                if (!differs && tokens[(size_t)i] >= 0 && q->params.num_logprobs >= 0) {
                    CHECK(same_logprobs(&logprobs[(size_t)r.logprobs_offset], expected.data(),
                                        1 + q->params.num_logprobs));
                }
            }
        }
    }
    check_counts(&pool, all, drawn);
    for (Sequence *q : all) {
        delete q;
    }
    qf_sampler_destroy(sampler);
}

/* The path of rows that are all greedy, captured and replayed, against the host and the general path. */
static void check_greedy(const qf_cuda_device *device, Random *random, int32_t vocab_size, int32_t stride,
                         int32_t num_rows)
{
    Pool pool(vocab_size, stride, num_rows);
    qf_sampler *sampler = NULL;
    CHECK_OK(qf_sampler_create(vocab_size, &sampler, &check_error));
    std::vector<float> logits((size_t)num_rows * stride, NAN);
    std::vector<Sequence *> all;
    Batch batch;
    pool.counts.zero();
    for (int32_t i = 0; i < num_rows; i++) {
        Sequence *q = new Sequence;
        qf_sampling_params_init(&q->params);
        q->params.temperature = 0.0f;
        q->vocab_size = vocab_size;
        q->real_vocab_size = vocab_size - (i % 3 == 0 ? random->below(std::min(vocab_size, 300)) : 0);
        q->create();
        all.push_back(q);
        fill_logits(random, logits.data() + (size_t)i * stride, vocab_size, random->below(8));
        add_row(&batch, q, i);
    }
    pool.logits.put(logits);
    std::vector<int32_t> tokens, general;
    std::vector<qf_cuda_logprob> logprobs;
    launch(&pool, batch, 0, num_rows, true, device, &tokens, &logprobs);
    CHECK(pool.last_token.get() == tokens);
    launch(&pool, batch, 0, num_rows, false, device, &general, &logprobs);
    CHECK(tokens == general);
    for (int32_t i = 0; i < num_rows; i++) {
        bool differs;
        std::vector<qf_logprob> none;
        CHECK(compare_draw(sampler, all[(size_t)i], logits.data() + (size_t)i * stride, tokens[(size_t)i], &differs,
                           &none));
        delete all[(size_t)i];
    }
    qf_sampler_destroy(sampler);
}

static void check_arguments(const qf_cuda_device *device)
{
    qf_error err;
    qf_cuda_sample_args args = {};
    args.vocab_size = 512;
    args.logits_stride = 511;
    args.num_rows = 1;
    CHECK(qf_cuda_sample(&args, device, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    args.logits_stride = 512;
    CHECK(qf_cuda_sample(&args, device, 0, &err) == QF_ERROR_INVALID_ARGUMENT); /* NULL */
    args.num_rows = 0;
    CHECK(qf_cuda_sample(&args, device, 0, &err) == QF_OK);
    CHECK(qf_cuda_reset_counts(NULL, 0, 512, NULL, 0, 0, &err) == QF_ERROR_INVALID_ARGUMENT);
    CHECK(qf_cuda_sample_workspace_bytes(151936, 1) > 151936 * sizeof(float));
    CHECK(qf_cuda_sample_workspace_bytes(0, 1) == 0);
}

/* --- timing --------------------------------------------------------------------------------------------------- */

static void bench_row(qf_cuda_sample_row *r, int mode)
{
    r->temperature = mode == 0 || mode == 4 ? 0.0f : mode == 1 ? 0.7f : 1.0f;
    r->top_p = mode == 1 ? 0.8f : mode == 3 ? 0.95f : 1.0f;
    r->top_k = mode == 1 ? 20 : 0;
    r->repetition_penalty = mode == 1 ? 1.05f : 1.0f;
    r->uses_counts = mode == 1;
    r->num_logprobs = mode == 4 ? 5 : -1;
}

static void bench(const qf_cuda_device *device)
{
    static const char *const names[] = {"greedy", "Qwen2.5 default", "temperature 1", "top_p 0.95", "logprobs 5"};
    const int32_t vocab = 151936, pool_rows = 512, most = 256;
    Pool pool(vocab, vocab, pool_rows);
    Random random(77);
    std::vector<float> logits((size_t)16 * vocab); /* 16 different rows, 32 times: the addresses matter */
    for (size_t i = 0; i < logits.size(); i++) {
        logits[i] = 2.5f * random.normal() + (random.below(20000) == 0 ? 9.0f * random.uniform() : 0.0f);
    }
    for (int32_t i = 0; i < pool_rows; i += 16) {
        CHECK_CUDA(cudaMemcpy(pool.logits.data + (size_t)i * vocab, logits.data(), logits.size() * sizeof(float),
                              cudaMemcpyHostToDevice));
    }
    pool.counts.zero();
    Device<qf_cuda_logprob> out((size_t)pool_rows * 8);
    printf("%-18s %5s %9s %7s %6s\n", "vocab 151936", "rows", "us", "GB/s", "share");
    for (int mode = 0; mode < 5; mode++) {
        std::vector<qf_cuda_sample_row> rows((size_t)pool_rows);
        for (int32_t i = 0; i < pool_rows; i++) {
            qf_cuda_sample_row r = {};
            r.slot = i;
            r.real_vocab_size = 151665;
            bench_row(&r, mode);
            r.seed_low = (uint32_t)i;
            r.bitmask_offset = -1;
            r.target_id = -1;
            r.logprobs_offset = 8 * i;
            rows[(size_t)i] = r;
        }
        Device<qf_cuda_sample_row> device_rows(rows);
        for (int32_t num_rows : {1, 16, 64, most}) {
            int places = (pool_rows - num_rows) / num_rows + 1;
            auto call = [&](cudaStream_t stream, int i) {
                int32_t first = i % places * num_rows;
                qf_cuda_sample_args args = {};
                args.logits = pool.logits.data + (size_t)first * vocab;
                args.logits_stride = vocab;
                args.vocab_size = vocab;
                args.num_rows = num_rows;
                args.rows = device_rows.data + first;
                args.counts = pool.counts.data;
                args.last_token = pool.last_token.data;
                args.token_ids = pool.token_ids.data;
                args.logprobs = out.data;
                args.workspace = pool.workspace.data;
                args.all_greedy = mode == 0;
                CHECK_OK(qf_cuda_sample(&args, device, stream, &check_error));
            };
            double us = time_us(call, std::max(20, std::min(places, 400)), num_rows > 16 ? 5 : 9);
            double bytes = (double)num_rows * vocab * (mode == 1 ? 6.0 : 4.0);
            printf("%-18s %5d %9.2f %7.0f %5.1f%%\n", names[mode], num_rows, us, bytes / us * 1e-3,
                   bytes / us * 1e-3 / 44.0);
        }
    }
}

int main(int argc, char **argv)
{
    Options options = check_options(argc, argv);
    const qf_cuda_device *device = &options.device;
    Random random(12);
    check_arguments(device);
    static const int32_t small[] = {1, 2, 33, 512, 8192};
    for (int32_t vocab : small) {
        for (int round = 0; round < (check_brief ? 2 : vocab == 8192 ? 4 : 8); round++) {
            int32_t stride = vocab + (round % 2 == 0 ? 0 : (16 - vocab % 16));
            check_batch(device, &random, vocab, stride, check_brief ? 24 : 64, check_brief ? 2 : 5, round == 1);
        }
        check_greedy(device, &random, vocab, vocab, 96);
    }
    check_batch(device, &random, 4999, 5008, check_brief ? 12 : 40, check_brief ? 1 : 3, true);
    if (!check_brief) {
        check_batch(device, &random, 151936, 151936, 24, 2, true);
        check_batch(device, &random, 152064, 152064, 9, 1, false);
    }
    check_greedy(device, &random, 151936, 151936, check_brief ? 3 : 33);
    printf("%d draws compared, %d near a threshold; %d logprobs\n", num_draws, num_near, num_compared_logprobs);
    CHECK(check_brief || (num_draws > 5000 && num_compared_logprobs > 5000));
    CHECK(num_near * 500 < num_draws);
    if (options.bench && check_failures == 0) {
        bench(device);
    }
    return check_report("sample");
}
