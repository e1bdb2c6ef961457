/* sources: base/status.c */
/* A step's way in and out against plain host loops: metadata of many sizes through both staging buffers, spread out to
 * its place; embedding rows and cosines of the right turn's tokens; results to the host, by publish and by the samplers;
 * a captured chain of steps two at a time, with the copies on a stream of their own, as the backend has them. */
#include <math.h>

#include <chrono>

#include "check_cuda.cuh"
#include "qf_attention.h"

#define CAPACITY (1 << 20) /* bytes of a staging buffer */
#define NUM_SLOTS 5

template <typename T> struct Pinned {
    T *data = nullptr;
    size_t size;
    explicit Pinned(size_t count) : size(count)
    {
        CHECK_CUDA(cudaHostAlloc((void **)&data, count * sizeof(T), cudaHostAllocDefault));
        memset((void *)data, 0xee, count * sizeof(T));
    }
    Pinned(const Pinned &) = delete;
    ~Pinned() { cudaFreeHost(data); }
};

/* Capacities of a layout, and a model of one bf16 table. */
struct Shape {
    int num_tokens, max_items, max_sliding, hidden_size, head_dim, table_bits;
};

static size_t up(size_t bytes) { return (bytes + 15) / 16 * 16; }

struct Layout {
    size_t ids, positions, rows, fixed, items, sliding; /* offsets, the last three sizes */
    explicit Layout(const Shape &s)
    {
        ids = sizeof(qf_cuda_step_header);
        positions = up(ids + (size_t)s.num_tokens * 4);
        rows = up(positions + (size_t)s.num_tokens * 4);
        fixed = up(rows + (size_t)s.num_tokens * sizeof(qf_cuda_sample_row));
        items = up((size_t)s.max_items * sizeof(qf_cuda_attention_item));
        sliding = up((size_t)s.max_sliding * sizeof(qf_cuda_attention_item));
    }
};

/* Buffers of a backend. */
struct Io {
    Pinned<char> sent0, sent1;
    Pinned<int32_t> ids0, ids1;
    Pinned<qf_cuda_logprob> logprobs0, logprobs1;
    Pinned<qf_cuda_step_result> result0, result1;
    Device<char> staging0, staging1, meta;
    Device<qf_cuda_step_state> state;
    Device<int32_t> token_ids, last_token;
    Device<qf_cuda_logprob> logprobs;
    qf_cuda_step_io io;
    explicit Io(size_t results)
        : sent0(CAPACITY), sent1(CAPACITY), ids0(results), ids1(results), logprobs0(results), logprobs1(results),
          result0(1), result1(1), staging0(CAPACITY), staging1(CAPACITY), meta(CAPACITY), state(1),
          token_ids(results), last_token(std::vector<int32_t>{3, 99, -1, 0, 50}), logprobs(results)
    {
        state.zero();
        io = {};
        io.staging[0] = staging0.data;
        io.staging[1] = staging1.data;
        io.device_meta = meta.data;
        io.token_ids = token_ids.data;
        io.logprobs = logprobs.data;
        io.state = state.data;
        io.host_token_ids[0] = ids0.data;
        io.host_token_ids[1] = ids1.data;
        io.host_logprobs[0] = logprobs0.data;
        io.host_logprobs[1] = logprobs1.data;
        io.host_results[0] = result0.data;
        io.host_results[1] = result1.data;
    }
    char *sent(uint32_t sequence) { return sequence & 1 ? sent1.data : sent0.data; }
    char *staging(uint32_t sequence) { return sequence & 1 ? staging1.data : staging0.data; }
    int32_t *ids(uint32_t sequence) { return sequence & 1 ? ids1.data : ids0.data; }
    qf_cuda_logprob *host_logprobs(uint32_t sequence) { return sequence & 1 ? logprobs1.data : logprobs0.data; }
    qf_cuda_step_result *result(uint32_t sequence) { return sequence & 1 ? result1.data : result0.data; }
};

/* Random metadata with room for what it says; returns its bytes. */
static size_t fill_meta(Random &random, const Shape &s, const Layout &l, uint32_t sequence, int num_results,
                        int num_logprobs, size_t rest_words, int vocab_size, char *out)
{
    size_t items_end = up(l.fixed + (size_t)random.below(s.max_items + 1) * sizeof(qf_cuda_attention_item));
    int num_sliding = s.max_sliding > 0 ? random.below(s.max_sliding + 1) : 0;
    size_t sliding_end = up(items_end + (size_t)num_sliding * sizeof(qf_cuda_attention_item));
    size_t total = up(sliding_end + rest_words * 4);
    for (size_t i = 0; i < total; i += 4) {
        uint32_t word = random.bits();
        memcpy(out + i, &word, 4);
    }
    int32_t *ids = (int32_t *)(out + l.ids), *positions = (int32_t *)(out + l.positions);
    for (int t = 0; t < s.num_tokens; t++) {
        ids[t] = random.below(3) == 0 ? -1 - random.below(NUM_SLOTS) : random.below(vocab_size);
        positions[t] = random.below(4) == 0 ? random.below(8) : random.below(131072);
    }
    qf_cuda_step_header header = {(uint32_t)total, (uint32_t)items_end,  (uint32_t)sliding_end,
                                  sequence,        (uint32_t)num_results, (uint32_t)num_logprobs, {0, 0}};
    memcpy(out, &header, sizeof header);
    return total;
}

/* True if the device's buffer holds the metadata, each part at its place, and poison elsewhere. */
static bool meta_matches(const Layout &l, const char *sent, const std::vector<char> &got)
{
    qf_cuda_step_header header;
    memcpy(&header, sent, sizeof header);
    std::vector<char> expected(got.size(), (char)0xff);
    memcpy(expected.data(), sent, header.items_end);
    memcpy(&expected[l.fixed + l.items], sent + header.items_end, header.sliding_end - header.items_end);
    memcpy(&expected[l.fixed + l.items + l.sliding], sent + header.sliding_end, header.meta_bytes - header.sliding_end);
    return memcmp(expected.data(), got.data(), got.size()) == 0;
}

/* A table, by the definition in qf_kernels.h. */
struct Table {
    int bits, vocab_size, hidden_size, k_padded;
    std::vector<float> values;
    std::vector<char> bytes;
    Table(Random &random, int bits_, int vocab_size_, int hidden_size_)
        : bits(bits_), vocab_size(vocab_size_), hidden_size(hidden_size_), k_padded((hidden_size_ + 127) / 128 * 128),
          values((size_t)vocab_size_ * hidden_size_)
    {
        std::vector<uint16_t> stored((size_t)(vocab_size + 15) / 16 * 16 * k_padded);
        for (int row = 0; row < vocab_size; row++) {
            for (int k = 0; k < hidden_size; k++) {
                float &value = values[(size_t)row * hidden_size + k];
                value = bits == 32 ? random.normal() : bf16_round(random.normal());
                size_t block = (size_t)(row / 16) * (k_padded / 128) + k / 128;
                size_t word = (block * 8 + k % 128 / 16) * 128 + (row % 8 * 4 + k % 8 / 2) * 4 + row % 16 / 8 +
                              k % 16 / 8 * 2;
                stored[bits == 16 ? (size_t)row * hidden_size + k : word * 2 + k % 2] = bf16_bits(value);
            }
        }
        const char *from = bits == 32 ? (const char *)values.data() : (const char *)stored.data();
        bytes.assign(from, from + (bits == 32 ? values.size() * 4 : stored.size() * 2));
    }
};

static bool rows_match(const Table &table, const int32_t *ids, const std::vector<int32_t> &last,
                       const std::vector<float> &out)
{
    size_t hidden = (size_t)table.hidden_size;
    for (size_t t = 0; t < out.size() / hidden; t++) {
        int32_t id = ids[t] < 0 ? last[(size_t)(-1 - ids[t])] : ids[t];
        if (memcmp(&out[t * hidden], &table.values[(size_t)(id < 0 ? 0 : id) * hidden], hidden * 4) != 0) {
            return false;
        }
    }
    return true;
}

static bool angles_match(const int32_t *positions, const std::vector<float> &freq, double factor,
                         const std::vector<float> &out)
{
    size_t half = freq.size();
    for (size_t t = 0; t < out.size() / (2 * half); t++) {
        for (size_t j = 0; j < half; j++) {
            volatile float angle = (float)positions[t] * freq[j];
            double cosine = cos((double)angle) * factor, sine = sin((double)angle) * factor;
            if (!(fabs(out[t * 2 * half + j] - cosine) < 2e-7 && fabs(out[t * 2 * half + half + j] - sine) < 2e-7)) {
                return false;
            }
        }
    }
    return true;
}

/* Steps one after the other: begin, made-up results, publish. Each twice, poisoned in between: the same bits. */
static void check_steps(Random &random, const qf_cuda_device *device, const Shape &s, bool on_host)
{
    const Layout l(s);
    const bool embeds = s.table_bits != 0;
    Table table(random, embeds ? s.table_bits : 16, 100, s.hidden_size);
    Device<char> device_table(table.bytes);
    Pinned<char> host_table(table.bytes.size());
    memcpy(host_table.data, table.bytes.data(), table.bytes.size());
    std::vector<float> freq((size_t)s.head_dim / 2);
    for (size_t j = 0; j < freq.size(); j++) {
        freq[j] = powf(1e6f, -(float)j / (float)freq.size());
    }
    Device<float> device_freq(freq), residual((size_t)s.num_tokens * s.hidden_size);
    Device<float> cos_sin((size_t)s.num_tokens * s.head_dim);
    const size_t most = (size_t)s.num_tokens + 700;
    Io b(most);
    qf_cuda_step_begin_args args = {};
    args.io = b.io;
    args.fixed_bytes = l.fixed;
    args.items_bytes = l.items;
    args.sliding_bytes = l.sliding;
    args.positions = (const int32_t *)(b.meta.data + l.positions);
    args.inv_freq = device_freq.data;
    args.factor = 1.25;
    args.cos_sin = cos_sin.data;
    args.num_tokens = s.num_tokens;
    args.head_dim = s.head_dim;
    if (embeds) {
        args.embedding = {on_host ? host_table.data : device_table.data, s.table_bits, table.k_padded,
                          (const int32_t *)(b.meta.data + l.ids), b.last_token.data, residual.data, s.num_tokens,
                          s.hidden_size};
    }
    for (uint32_t sequence = 0; sequence < 5; sequence++) {
        int num_results = random.below(s.num_tokens + 1), num_logprobs = sequence % 2 ? random.below(700) : 0;
        size_t bytes = fill_meta(random, s, l, sequence, num_results, num_logprobs, (size_t)random.below(9000), 100,
                                 b.sent(sequence));
        CHECK_CUDA(cudaMemcpy(b.staging(sequence), b.sent(sequence), bytes, cudaMemcpyHostToDevice));
        for (int again = 0; again < 2; again++) {
            b.meta.poison();
            residual.poison();
            cos_sin.poison();
            CHECK_OK(qf_cuda_step_begin(&args, 0, &check_error));
            CHECK(meta_matches(l, b.sent(sequence), b.meta.get()));
            CHECK(!embeds ||
                  rows_match(table, (int32_t *)(b.sent(sequence) + l.ids), b.last_token.get(), residual.get()));
            CHECK(angles_match((int32_t *)(b.sent(sequence) + l.positions), freq, 1.25, cos_sin.get()));
        }
        std::vector<int32_t> ids(most), before(b.ids(sequence + 1), b.ids(sequence + 1) + most);
        std::vector<qf_cuda_logprob> logprobs(most);
        for (size_t i = 0; i < most; i++) {
            ids[i] = (int32_t)random.bits();
            logprobs[i] = {(int32_t)random.bits(), (int32_t)i, random.normal()};
        }
        b.token_ids.put(ids);
        b.logprobs.put(logprobs);
        memset((void *)b.ids(sequence), 0xee, most * 4);
        CHECK_OK(qf_cuda_step_publish(&b.io, num_results, num_logprobs, device, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
        CHECK(memcmp(b.ids(sequence), ids.data(), (size_t)num_results * 4) == 0);
        CHECK(b.ids(sequence)[num_results] == (int32_t)0xeeeeeeee);
        CHECK(memcmp(b.host_logprobs(sequence), logprobs.data(), (size_t)num_logprobs * sizeof logprobs[0]) == 0);
        CHECK(memcmp(b.ids(sequence + 1), before.data(), most * 4) == 0);
        CHECK(b.result(sequence)->number == sequence + 1);
        CHECK(b.result(sequence)->end_ns >= b.result(sequence)->begin_ns);
        CHECK(b.result(sequence)->end_ns - b.result(sequence)->begin_ns < 10000000000ull);
        qf_cuda_step_state state = b.state.get()[0];
        CHECK(state.counter == sequence + 1 && state.arrivals == 0);
    }
}

/* --- steps as the backend runs them ---------------------------------------------------------------------------- */

/* Metadata on a stream of its own, a graph of begin, a copy of the embedded rows to be the logits, and the sampler, which
 * publishes. Table row i is largest at column (7 i + 3) mod vocab_size, so each step's token follows from the last one's,
 * which only the device knows while two steps are in flight; row 0 of each batch says so by its id. */
static void check_chain(const qf_cuda_device *device, int num_rows, bool all_greedy, int num_steps)
{
    const int vocab_size = 1536;
    const Shape s = {num_rows, 40, 10, vocab_size, 64, 32};
    const Layout l(s);
    Random random(31);
    std::vector<float> values((size_t)vocab_size * vocab_size);
    for (int i = 0; i < vocab_size; i++) {
        for (int j = 0; j < vocab_size; j++) {
            values[(size_t)i * vocab_size + j] = j == (7 * i + 3) % vocab_size ? 9.0f : (float)((i * 31 + j) % 50) * 0.1f;
        }
    }
    Device<float> table(values), freq(std::vector<float>(32, 0.5f)), logits((size_t)num_rows * vocab_size);
    Device<float> cos_sin((size_t)num_rows * 64);
    Device<int32_t> last_token(std::vector<int32_t>((size_t)num_rows, 1));
    Device<char> workspace(qf_cuda_sample_workspace_bytes(vocab_size, num_rows + 3));
    CHECK_CUDA(cudaMemset(workspace.data, 0, QF_CUDA_SAMPLE_ZEROED_BYTES));
    Io b((size_t)num_rows * 4);
    memset((void *)b.result0.data, 0, sizeof *b.result0.data);
    memset((void *)b.result1.data, 0, sizeof *b.result1.data);
    qf_cuda_step_begin_args begin = {};
    begin.io = b.io;
    begin.fixed_bytes = l.fixed;
    begin.items_bytes = l.items;
    begin.sliding_bytes = l.sliding;
    begin.positions = (const int32_t *)(b.meta.data + l.positions);
    begin.inv_freq = freq.data;
    begin.factor = 1.0;
    begin.cos_sin = cos_sin.data;
    begin.num_tokens = num_rows;
    begin.head_dim = 64;
    begin.embedding = {table.data, 32, 0, (const int32_t *)(b.meta.data + l.ids), last_token.data, logits.data,
                       num_rows, vocab_size};
    qf_cuda_sample_args sample = {};
    sample.logits = logits.data;
    sample.logits_stride = sample.vocab_size = vocab_size;
    sample.num_rows = num_rows;
    sample.rows = (const qf_cuda_sample_row *)(const void *)(b.meta.data + l.rows);
    sample.last_token = last_token.data;
    sample.token_ids = b.token_ids.data;
    sample.logprobs = b.logprobs.data;
    sample.workspace = workspace.data;
    sample.all_greedy = all_greedy;
    sample.publish = &b.io;

    cudaStream_t stream, meta_stream;
    cudaEvent_t sent[2];
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaStreamCreateWithFlags(&meta_stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaEventCreateWithFlags(&sent[0], cudaEventDisableTiming));
    CHECK_CUDA(cudaEventCreateWithFlags(&sent[1], cudaEventDisableTiming));
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK_OK(qf_cuda_step_begin(&begin, stream, &check_error));
    CHECK_OK(qf_cuda_sample(&sample, device, stream, &check_error));
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));

    std::vector<int32_t> token((size_t)num_rows, 1);
    for (int step = 0; step < num_steps + 1; step++) {
        if (step < num_steps) {
            char *meta = b.sent((uint32_t)step);
            size_t bytes = fill_meta(random, s, l, (uint32_t)step, num_rows, all_greedy ? 0 : 3 * num_rows, 100, 1, meta);
            for (int i = 0; i < num_rows; i++) {
                qf_cuda_sample_row row = {};
                row.slot = i;
                row.real_vocab_size = vocab_size;
                row.bitmask_offset = -1;
                row.target_id = -1;
                row.num_logprobs = all_greedy ? -1 : 2;
                row.logprobs_offset = 3 * i;
                row.repetition_penalty = row.top_p = 1.0f;
                memcpy(meta + l.rows + (size_t)i * sizeof row, &row, sizeof row);
                ((int32_t *)(void *)(meta + l.ids))[i] = -1 - i;
            }
            CHECK_CUDA(cudaMemcpyAsync(b.staging((uint32_t)step), meta, bytes, cudaMemcpyHostToDevice, meta_stream));
            CHECK_CUDA(cudaEventRecord(sent[step % 2], meta_stream));
            CHECK_CUDA(cudaStreamWaitEvent(stream, sent[step % 2], 0));
            CHECK_CUDA(cudaGraphLaunch(exec, stream));
        }
        if (step == 0) {
            continue;
        }
        uint32_t sequence = (uint32_t)step - 1; /* the oldest */
        const volatile uint32_t *number = &b.result(sequence)->number;
        const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(60);
        while (*number != sequence + 1 && std::chrono::steady_clock::now() < patience) {
        }
        CHECK(*number == sequence + 1);
        bool same = true;
        for (int i = 0; i < num_rows; i++) {
            token[(size_t)i] = (7 * token[(size_t)i] + 3) % vocab_size;
            same = same && b.ids(sequence)[i] == token[(size_t)i];
            const qf_cuda_logprob *first = b.host_logprobs(sequence) + 3 * i;
            same = same && (all_greedy || (first[0].token_id == token[(size_t)i] && first[0].rank == 1 &&
                                           first[1].token_id == token[(size_t)i]));
        }
        CHECK(same);
        memset((void *)b.ids(sequence), 0xee, (size_t)num_rows * 4);
        memset((void *)b.host_logprobs(sequence), 0xee, (size_t)num_rows * 3 * sizeof(qf_cuda_logprob));
        if (check_failures > 20) {
            break;
        }
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    CHECK_CUDA(cudaStreamDestroy(stream));
    CHECK_CUDA(cudaStreamDestroy(meta_stream));
    CHECK_CUDA(cudaEventDestroy(sent[0]));
    CHECK_CUDA(cudaEventDestroy(sent[1]));
}

/* --- errors ------------------------------------------------------------------------------------------------------ */

#define CHECK_REFUSED_WITH(args, field, value)                                        \
    do {                                                                              \
        auto changed = args;                                                          \
        qf_error refused = {};                                                        \
        changed.field = value;                                                        \
        CHECK(qf_cuda_step_begin(&changed, 0, &refused) == QF_ERROR_INVALID_ARGUMENT); \
        CHECK(refused.message[0] != '\0');                                            \
    } while (0)

static void check_errors(const qf_cuda_device *device)
{
    Io b(16);
    Device<float> f(4096);
    qf_cuda_step_begin_args a = {};
    a.io = b.io;
    a.fixed_bytes = 256;
    a.positions = (const int32_t *)(b.meta.data + 32);
    a.inv_freq = a.cos_sin = f.data;
    a.num_tokens = 8;
    a.head_dim = 64;
    a.embedding = {f.data, 32, 0, (const int32_t *)(b.meta.data + 64), b.last_token.data, f.data, 8, 16};
    CHECK_REFUSED_WITH(a, io.staging[1], nullptr);
    CHECK_REFUSED_WITH(a, io.staging[0], b.staging0.data + 4);
    CHECK_REFUSED_WITH(a, io.state, nullptr);
    CHECK_REFUSED_WITH(a, fixed_bytes, 16);
    CHECK_REFUSED_WITH(a, fixed_bytes, 260);
    CHECK_REFUSED_WITH(a, items_bytes, 40);
    CHECK_REFUSED_WITH(a, positions, nullptr);
    CHECK_REFUSED_WITH(a, positions, (const int32_t *)(b.meta.data + 228));
    CHECK_REFUSED_WITH(a, positions, (const int32_t *)b.meta.data);
    CHECK_REFUSED_WITH(a, embedding.token_ids, (const int32_t *)(b.meta.data + 256));
    CHECK_REFUSED_WITH(a, embedding.num_tokens, 7);
    CHECK_REFUSED_WITH(a, embedding.table_bits, 8);
    CHECK_REFUSED_WITH(a, num_tokens, 0);
    CHECK_REFUSED_WITH(a, head_dim, 63);
    qf_error refused = {};
    CHECK(qf_cuda_step_publish(&b.io, -1, 0, device, 0, &refused) == QF_ERROR_INVALID_ARGUMENT);
    CHECK_CUDA(cudaDeviceSynchronize());
}

/* --- times --------------------------------------------------------------------------------------------------------- */

/* Microseconds of begin and of publish for a decode step of the 0.5B model: rows of a 272 MB table. */
static void bench(const qf_cuda_device *device)
{
    const int vocab_size = 151936, hidden = 896;
    Device<char> table((size_t)vocab_size * hidden * 2);
    table.zero();
    Device<float> freq(std::vector<float>(32, 0.5f)), residual((size_t)2048 * hidden), cos_sin((size_t)2048 * 64);
    printf("%-10s %6s %9s\n", "", "tokens", "us");
    for (int num_tokens : {1, 2, 8, 64, 256, 2048}) {
        const Shape s = {num_tokens, 2 * std::min(num_tokens, 256) + 133, 0, hidden, 64, 16};
        const Layout l(s);
        Random random(9);
        Io b((size_t)num_tokens + 8);
        size_t bytes = fill_meta(random, s, l, 0, num_tokens, 0, (size_t)std::min(num_tokens, 256) * 64, vocab_size,
                                 b.sent(0));
        CHECK_CUDA(cudaMemcpy(b.staging(0), b.sent(0), bytes, cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaMemcpy(b.staging(1), b.sent(0), bytes, cudaMemcpyHostToDevice));
        qf_cuda_step_begin_args args = {};
        args.io = b.io;
        args.fixed_bytes = l.fixed;
        args.items_bytes = l.items;
        args.positions = (const int32_t *)(b.meta.data + l.positions);
        args.inv_freq = freq.data;
        args.factor = 1.0;
        args.cos_sin = cos_sin.data;
        args.num_tokens = num_tokens;
        args.head_dim = 64;
        args.embedding = {table.data, 16, 0, (const int32_t *)(b.meta.data + l.ids), b.last_token.data, residual.data,
                          num_tokens, hidden};
        auto begin = [&](cudaStream_t stream, int) { CHECK_OK(qf_cuda_step_begin(&args, stream, &check_error)); };
        auto publish = [&](cudaStream_t stream, int) {
            CHECK_OK(qf_cuda_step_publish(&b.io, num_tokens, 0, device, stream, &check_error));
        };
        printf("%-10s %6d %9.2f\n", "begin", num_tokens, time_us(begin));
        printf("%-10s %6d %9.2f\n", "publish", num_tokens, time_us(publish));
    }
}

int main(int argc, char **argv)
{
    Options options = check_options(argc, argv);
    const qf_cuda_device *device = &options.device;
    Random random(5);
    check_errors(device);
    for (int num_tokens : {1, 2, 3, 7, 8, 9, 17, 64, 130, 700}) {
        if (check_brief && num_tokens != 1 && num_tokens != 17) {
            continue;
        }
        for (int bits : {16, -16, 32, 0}) {
            check_steps(random, device, {num_tokens, 2 * num_tokens + 133, num_tokens % 2 ? 0 : 57, 896, 64, bits},
                        num_tokens == 9);
        }
    }
    for (int hidden_size : {2, 98, 384, 3584, 8192}) {
        for (int bits : {16, -16, 32}) {
            check_steps(random, device, {5, 30, 30, hidden_size, 128, bits}, false);
        }
    }
    check_steps(random, device, {3, 0, 0, 99, 128, 16}, false);
    check_steps(random, device, {3, 0, 0, 99, 128, 32}, false);
    for (int num_rows : {1, 2, 5, 16, 31, 64, 100, 256}) {
        if (!check_brief || num_rows == 5) {
            check_chain(device, num_rows, true, check_brief ? 4 : 60);
            check_chain(device, num_rows, false, check_brief ? 4 : 20);
        }
    }
    if (options.bench && check_failures == 0) {
        bench(device);
    }
    return check_report("step_io");
}
