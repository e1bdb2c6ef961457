/* sources: base/status.c base/dtype.c kv/format.c backend/cuda/attention_plan.c */
/* Prefill attention over low-bit caches, with biases of keys and with a 16-bit window, against host loops in float64 over
 * the decoded codes and the exactly rotated bias. */
#include "attention_limits.h"
#include "check_cuda.cuh"
#include "common/kv_codec.cuh"
#include "qf_attention.h"

extern "C" {
#include "kv/format.h"
}

static Options options;

/* Of an output's relative error: keys, weights and values of 16 bits each have their share. An evenly spread bias that is
 * larger than keys, but not so large that their low parts count, costs keys what it costs a 16-bit cache. */
#define MEAN_LIMIT 6e-3
#define WORST_LIMIT 1.6e-2
#define MIDDLING 2.5

struct Format {
    qf_kv_format host;
    qf_cuda_kv_format device;
};
static const Format formats[] = {{QF_KV_FP8_E4M3, QF_CUDA_KV_FP8},
                                 {QF_KV_INT8, QF_CUDA_KV_INT8},
                                 {QF_KV_INT4, QF_CUDA_KV_INT4},
                                 {QF_KV_NF4, QF_CUDA_KV_NF4}};

/* Rows first .. first + count - 1 of a sequence. */
struct Piece {
    int seq, first, count;
};

/* How the biases' norm is spread over a head's pairs. */
enum Spread { EVEN, SLOW }; /* SLOW: in the slowest eighth, where the real models have theirs */

struct Case {
    int num_heads, num_kv_heads, head_dim, block_size;
    int sliding_window, kv_window;
    double norm;
    Spread spread;
    double factor; /* of attention */
};

/* Sequences of known lengths with queries at all positions. What no query may read is 0xff: block 0, what follows a
 * sequence in its last block, positions below `unseen`, and, in the window's cache, those below window_first. */
struct World {
    Case c;
    Format format;
    int row_bytes, words;
    std::vector<int> lengths;
    std::vector<std::vector<uint16_t>> q; /* [seq] (length, num_heads, head_dim) */
    std::vector<std::vector<float>> keys, values; /* [seq] (length, num_kv_heads, head_dim) as decoded, without bias */
    std::vector<std::vector<float>> window_keys, window_values; /* the same of the 16-bit copy; keys with their bias */
    std::vector<float> bias, inv_freq;
    std::vector<int32_t> tables, table_start, window_tables, window_start, window_first;
    std::vector<uint8_t> k, v;
    std::vector<uint16_t> window_k, window_v;
    Device<uint8_t> *device_k, *device_v;
    Device<uint16_t> *device_window_k, *device_window_v, *fine;
    Device<float> *device_bias, *coarse, *rotation;
    Device<int32_t> *device_tables;

    World(const World &) = delete;
    World(const Case &shape, Format f, const std::vector<int> &lens, uint64_t seed, int unseen = 0, int warm = 0)
        : c(shape), format(f), lengths(lens)
    {
        Random random(seed);
        row_bytes = qf_cuda_kv_row_bytes(f.device, c.head_dim);
        words = qf_cuda_kv_words(f.device, c.head_dim);
        make_bias(random);
        int num_blocks = 1, num_window = 1;
        for (int length : lens) {
            const int blocks = (length + c.block_size - 1) / c.block_size, first = warm / c.block_size;
            table_start.push_back((int)tables.size());
            for (int i = 0; i < blocks; i++) {
                tables.push_back((i + 1) * c.block_size <= unseen ? 0 : num_blocks++);
            }
            window_first.push_back(first * c.block_size);
            window_start.push_back((int)window_tables.size() - first);
            for (int i = first; i < blocks; i++) {
                window_tables.push_back(num_window++);
            }
        }
        shuffle(random, tables, num_blocks);
        shuffle(random, window_tables, num_window);
        const size_t block_bytes = (size_t)qf_cuda_kv_block_bytes(f.device, c.num_kv_heads, c.block_size, c.head_dim);
        k.assign((size_t)num_blocks * block_bytes, 0xff);
        v = k;
        window_k.assign(c.kv_window > 0 ? (size_t)num_window * c.num_kv_heads * c.block_size * c.head_dim : 8, 0xffff);
        window_v = window_k;
        for (size_t s = 0; s < lens.size(); s++) {
            fill_sequence(random, (int)s, unseen);
        }
        to_device();
    }
    ~World()
    {
        delete device_k, delete device_v, delete device_window_k, delete device_window_v, delete fine;
        delete device_bias, delete coarse, delete rotation, delete device_tables;
    }
    int group() const { return c.num_heads / c.num_kv_heads; }
    float scale() const { return (float)(1.0 / sqrt((double)c.head_dim)); }

    void make_bias(Random &random)
    {
        const int half = c.head_dim / 2;
        for (int j = 0; j < half; j++) {
            inv_freq.push_back((float)pow(1e6, -(double)j / half));
        }
        bias.assign((size_t)c.num_kv_heads * c.head_dim, 0.0f);
        for (int head = 0; head < c.num_kv_heads; head++) {
            float *b = &bias[(size_t)head * c.head_dim];
            double square = 0;
            for (int d = 0; d < c.head_dim; d++) {
                b[d] = c.spread == EVEN || d % half >= half - half / 8 ? random.normal() : 0.01f * random.normal();
                square += (double)b[d] * b[d];
            }
            for (int d = 0; d < c.head_dim; d++) {
                b[d] = (float)(b[d] * c.norm / sqrt(square));
            }
        }
    }
    static void shuffle(Random &random, std::vector<int32_t> &list, int num_blocks)
    {
        std::vector<int> names((size_t)num_blocks);
        for (int i = 1; i < num_blocks; i++) {
            int j = 1 + random.below(i);
            names[(size_t)i] = names[(size_t)j];
            names[(size_t)j] = i;
        }
        for (int32_t &block : list) {
            block = names[(size_t)block];
        }
    }
    /* Encodes a row to its place; x becomes what a reader decodes. */
    void put_row(bool key, std::vector<uint8_t> &cache, int seq, int position, int head, float *x)
    {
        uint8_t codes[128];
        uint16_t scales[4];
        qf_kv_encode_row(format.host, x, c.head_dim, codes, scales);
        qf_kv_decode_row(format.host, codes, scales, c.head_dim, x);
        const size_t rows = (size_t)c.num_kv_heads * c.block_size;
        const size_t row = (size_t)head * c.block_size + position % c.block_size;
        uint8_t *block = &cache[(size_t)tables[(size_t)(table_start[(size_t)seq] + position / c.block_size)] * rows *
                                (size_t)(row_bytes + 2 * words)];
        uint8_t *to = block + row * row_bytes;
        memset(to, 0, (size_t)row_bytes);
        for (int d = 0; d < c.head_dim; d++) {
            const int place = key ? qf_kv_key_place(format.device, c.head_dim, d)
                                  : qf_kv_value_place(format.device, c.head_dim, position % c.block_size, d);
            if (row_bytes == c.head_dim) {
                to[place] = qf_kv_stored(format.device, codes[d]);
            } else {
                to[place / 2] = (uint8_t)(to[place / 2] | codes[d] << (4 * (place % 2)));
            }
        }
        memcpy(block + rows * row_bytes + row * 2 * words, scales, (size_t)(2 * words));
    }
    /* The rotated bias at a position, element d. */
    double turned(int position, int head, int d) const
    {
        const int half = c.head_dim / 2, j = d % half;
        const float *b = &bias[(size_t)head * c.head_dim];
        const double angle = (double)position * inv_freq[(size_t)j];
        return c.factor * (d < half ? b[j] * cos(angle) - b[j + half] * sin(angle)
                                    : b[j + half] * cos(angle) + b[j] * sin(angle));
    }
    void fill_sequence(Random &random, int s, int unseen)
    {
        const size_t length = (size_t)lengths[(size_t)s];
        const size_t size = length * c.num_kv_heads * c.head_dim;
        std::vector<uint16_t> queries(length * c.num_heads * c.head_dim);
        for (uint16_t &x : queries) {
            x = bf16_bits(random.normal() * 1.2f);
        }
        q.push_back(queries);
        keys.emplace_back(size);
        values.emplace_back(size);
        window_keys.emplace_back(c.kv_window > 0 ? size : 0);
        window_values.emplace_back(c.kv_window > 0 ? size : 0);
        for (int position = unseen; position < (int)length; position++) {
            for (int head = 0; head < c.num_kv_heads; head++) {
                const size_t at = ((size_t)position * c.num_kv_heads + head) * c.head_dim;
                float *x[2] = {&keys.back()[at], &values.back()[at]};
                for (int d = 0; d < c.head_dim; d++) { /* with outliers: groups have scales of their own */
                    x[0][d] = random.normal() * (d % 32 == 5 ? 2.5f : 1.0f);
                    x[1][d] = random.normal() * (d / 32 == 1 ? 2.0f : 1.0f);
                }
                if (c.kv_window > 0 && position >= window_first[(size_t)s]) {
                    put_window_row(s, position, head, x[0], x[1], at);
                }
                put_row(true, k, s, position, head, x[0]);
                put_row(false, v, s, position, head, x[1]);
            }
        }
    }
    void put_window_row(int s, int position, int head, const float *key, const float *value, size_t at)
    {
        const int block = window_tables[(size_t)(window_start[(size_t)s] + position / c.block_size)];
        const size_t to = (((size_t)block * c.num_kv_heads + head) * c.block_size + position % c.block_size) * c.head_dim;
        for (int d = 0; d < c.head_dim; d++) {
            window_k[to + d] = bf16_bits((float)(key[d] + turned(position, head, d)));
            window_v[to + d] = bf16_bits(value[d]);
            window_keys[(size_t)s][at + d] = bf16_value(window_k[to + d]);
            window_values[(size_t)s][at + d] = bf16_value(window_v[to + d]);
        }
    }
    void to_device()
    {
        const int longest = *std::max_element(lengths.begin(), lengths.end());
        const int tiles = (longest + QF_CUDA_BIAS_TILE - 1) / QF_CUDA_BIAS_TILE;
        for (int32_t &start : window_start) { /* both tables stand in one array */
            start += (int)tables.size();
        }
        std::vector<int32_t> both = tables;
        both.insert(both.end(), window_tables.begin(), window_tables.end());
        device_k = new Device<uint8_t>(k);
        device_v = new Device<uint8_t>(v);
        device_window_k = new Device<uint16_t>(window_k);
        device_window_v = new Device<uint16_t>(window_v);
        device_bias = new Device<float>(bias);
        device_tables = new Device<int32_t>(both);
        fine = new Device<uint16_t>((size_t)QF_CUDA_BIAS_TILE * c.head_dim);
        coarse = new Device<float>((size_t)tiles * c.head_dim);
        rotation = new Device<float>((size_t)QF_CUDA_BIAS_TILE * c.head_dim);
        Device<float> freq(inv_freq);
        qf_cuda_kv_bias_tables_args args = {};
        args.inv_freq = freq.data;
        args.factor = c.factor;
        args.coarse = coarse->data;
        args.fine = fine->data;
        args.rotation = rotation->data;
        args.num_tiles = tiles;
        args.head_dim = c.head_dim;
        CHECK_OK(qf_cuda_kv_bias_tables(&args, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
    }

    std::vector<double> reference(int seq, int position, int head) const
    {
        const int head_dim = c.head_dim, kv_head = head / group();
        const int begin = c.sliding_window > 0 ? std::max(0, position - c.sliding_window + 1) : 0;
        const int border = c.kv_window > 0 ? std::max(position - c.kv_window + 1, window_first[(size_t)seq]) : INT32_MAX;
        const uint16_t *query = &q[(size_t)seq][((size_t)position * c.num_heads + head) * head_dim];
        std::vector<double> scores, out((size_t)head_dim);
        double maximum = -INFINITY, sum = 0;
        for (int j = begin; j <= position; j++) {
            const size_t at = ((size_t)j * c.num_kv_heads + kv_head) * head_dim;
            double s = 0;
            for (int d = 0; d < head_dim; d++) {
                const double key = j >= border ? (double)window_keys[(size_t)seq][at + d]
                                               : keys[(size_t)seq][at + d] + turned_cached(j, kv_head, d);
                s += bf16_value(query[d]) * key;
            }
            scores.push_back(s * scale());
            maximum = std::max(maximum, scores.back());
        }
        for (int j = begin; j <= position; j++) {
            const size_t at = ((size_t)j * c.num_kv_heads + kv_head) * head_dim;
            const double w = exp(scores[(size_t)(j - begin)] - maximum);
            const float *value = j >= border ? &window_values[(size_t)seq][at] : &values[(size_t)seq][at];
            sum += w;
            for (int d = 0; d < head_dim; d++) {
                out[(size_t)d] += w * value[d];
            }
        }
        for (double &x : out) {
            x /= sum;
        }
        return out;
    }
    /* turned(), remembered: cosines are slow. */
    mutable std::vector<std::vector<double>> cache;
    double turned_cached(int position, int head, int d) const
    {
        if (c.norm == 0) {
            return 0;
        }
        if (cache.empty()) {
            cache.resize((size_t)*std::max_element(lengths.begin(), lengths.end()) * c.num_kv_heads);
        }
        std::vector<double> &row = cache[(size_t)position * c.num_kv_heads + head];
        if (row.empty()) {
            for (int i = 0; i < c.head_dim; i++) {
                row.push_back(turned(position, head, i));
            }
        }
        return row[(size_t)d];
    }
};

/* Runs a batch; returns rows (num_tokens, num_heads * head_dim). */
static std::vector<uint16_t> attend(const World &w, const std::vector<Piece> &pieces, bool invariant, int padding = -1,
                                    bool window_items = false)
{
    const Case &c = w.c;
    const qf_cuda_attention_shape shape = {c.num_heads, c.num_kv_heads, c.head_dim, c.block_size, c.sliding_window,
                                           c.kv_window};
    std::vector<int32_t> loc = {0}, lens, starts, window_starts, window_first;
    std::vector<uint16_t> q;
    int max_len = 1, width = c.num_heads * c.head_dim, out_k = (width + 127) / 128 * 128;
    for (const Piece &piece : pieces) {
        const uint16_t *from = &w.q[(size_t)piece.seq][(size_t)piece.first * width];
        q.insert(q.end(), from, from + (size_t)piece.count * width);
        loc.push_back(loc.back() + piece.count);
        lens.push_back(piece.first + piece.count);
        starts.push_back(w.table_start[(size_t)piece.seq]);
        window_starts.push_back(w.window_start[(size_t)piece.seq]);
        window_first.push_back(w.window_first[(size_t)piece.seq]);
        max_len = std::max(max_len, lens.back());
    }
    const int tokens = loc.back(), padded = tokens + std::max(padding, 0), num_seqs = (int)pieces.size();
    q.resize((size_t)padded * width, 0xffff);
    qf_cuda_attention_plan plan;
    const int max_items = qf_cuda_attention_max_items(&shape, num_seqs, tokens, max_len);
    const size_t bytes = qf_cuda_attention_workspace_bytes(&shape, num_seqs, tokens, max_len);
    std::vector<qf_cuda_attention_item> list((size_t)max_items);
    std::vector<qf_cuda_attention_item> window_list((size_t)num_seqs);
    if (window_items) {
        qf_cuda_attention_plan_make_window(&shape, num_seqs, loc.data(), lens.data(), window_first.data(), list.data(),
                                           window_list.data(), &plan);
    } else {
        qf_cuda_attention_plan_make(&shape, num_seqs, loc.data(), lens.data(), invariant, list.data(), &plan);
        CHECK(plan.num_decode_items == 0); /* else this were another kernel's test */
    }
    CHECK((int64_t)plan.num_partials * qf_attention_unit_words(c.num_heads, c.num_kv_heads, c.head_dim) * 4 <=
          (int64_t)bytes);
    Device<qf_cuda_attention_item> window_device(window_list);
    Device<int32_t> window_counts(std::vector<int32_t>{plan.num_window_items, 0});
    Device<uint16_t> device_q(q), out((size_t)qf_cuda_tiled_size(out_k, padded));
    Device<qf_cuda_attention_item> items(list);
    Device<int32_t> counts(std::vector<int32_t>{plan.num_decode_items, plan.num_prefill_items});
    Device<int32_t> device_starts(starts), device_window_starts(window_starts), device_first(window_first);
    Device<float> workspace(bytes / 4);
    workspace.zero();
    qf_cuda_attention_args args = {};
    args.shape = shape;
    args.kv = {w.device_k->data, w.device_v->data, c.block_size, c.num_kv_heads, c.head_dim, false, w.format.device,
               c.norm > 0 ? w.device_bias->data : NULL};
    args.q = device_q.data;
    args.out = out.data;
    args.out_k = out_k;
    args.items = items.data;
    args.num_items = counts.data;
    args.prefill_offset = plan.num_decode_items;
    args.max_decode_items = plan.num_decode_items;
    args.max_prefill_items = padding >= 0 ? max_items : plan.num_prefill_items;
    args.block_tables = w.device_tables->data;
    args.block_table_start = device_starts.data;
    args.workspace = workspace.data;
    args.num_tokens = padded;
    args.scale = w.scale();
    args.batch_invariant = invariant;
    args.bias_coarse = w.coarse->data;
    args.bias_fine = w.fine->data;
    args.bias_rotation = w.rotation->data;
    if (c.kv_window > 0) {
        args.window_kv = {w.device_window_k->data, w.device_window_v->data, c.block_size, c.num_kv_heads, c.head_dim};
        args.window_tokens = c.kv_window;
        args.window_table_start = device_window_starts.data;
        args.window_first = device_first.data;
    }
    std::vector<uint16_t> tiled[2];
    for (int run = 0; run < 2; run++) {
        out.poison();
        CHECK_OK(qf_cuda_attention(&args, &options.device, 0, &check_error));
        if (plan.num_window_items > 0) { /* the newest positions of single rows */
            qf_cuda_attention_args window = args;
            window.kv = args.window_kv;
            window.window_tokens = 0;
            window.items = window_device.data;
            window.num_items = window_counts.data;
            window.max_decode_items = plan.num_window_items;
            window.max_prefill_items = 0;
            window.block_table_start = device_window_starts.data;
            CHECK_OK(qf_cuda_attention(&window, &options.device, 0, &check_error));
        }
        CHECK_CUDA(cudaDeviceSynchronize());
        tiled[run] = out.get();
    }
    CHECK(memcmp(tiled[0].data(), tiled[1].data(), tiled[0].size() * 2) == 0);
    std::vector<uint16_t> rows((size_t)tokens * width);
    int nonzero = 0;
    for (int t = 0; t < tokens; t++) {
        for (int i = 0; i < out_k; i++) {
            const uint16_t x = tiled[0][tiled_index(i, t, padded)];
            if (i < width) {
                rows[(size_t)t * width + i] = x;
            } else {
                nonzero += x != 0;
            }
        }
    }
    CHECK(nonzero == 0);
    return rows;
}

/* Compares some (row, head) with the reference, the corners always. Returns the largest relative error. */
static double check_rows(const World &w, const std::vector<Piece> &pieces, const std::vector<uint16_t> &rows,
                         int samples = 16)
{
    Random random(17 + pieces.size());
    const Case &c = w.c;
    int t = 0, total = 0, num = 0;
    double worst = 0, mean = 0;
    for (const Piece &piece : pieces) {
        total += piece.count;
    }
    for (const Piece &piece : pieces) {
        for (int i = 0; i < piece.count; i++, t++) {
            const bool corner = i == 0 || i == piece.count - 1;
            if (!corner && random.below(total) >= samples) {
                continue;
            }
            const int head = corner ? c.num_heads - 1 : random.below(c.num_heads);
            std::vector<double> want = w.reference(piece.seq, piece.first + i, head), got((size_t)c.head_dim);
            for (int d = 0; d < c.head_dim; d++) {
                got[(size_t)d] = bf16_value(rows[((size_t)t * c.num_heads + head) * c.head_dim + d]);
            }
            const double error = relative_error(got, want, (size_t)c.head_dim);
            worst = error == error ? std::max(worst, error) : INFINITY;
            mean += error;
            num++;
        }
    }
    mean /= num;
    const double factor = c.spread == EVEN && c.norm > 10 && c.norm < 100 ? MIDDLING : 1;
    const bool good = mean < MEAN_LIMIT * factor && worst < WORST_LIMIT * factor;
    if (!good) {
        fprintf(stderr,
                "%s, heads %d / %d of %d, blocks of %d, sliding %d, window %d, norm %g %s, %zu sequences, %d rows: "
                "error %g, mean %g\n",
                qf_kv_format_name(w.format.host), c.num_heads, c.num_kv_heads, c.head_dim, c.block_size,
                c.sliding_window, c.kv_window, c.norm, c.spread == EVEN ? "even" : "slow", pieces.size(), total, worst,
                mean);
    }
    CHECK(good);
    return worst;
}

static const int models[][3] = {{14, 2, 64}, {28, 4, 128}, {6, 2, 64}, {10, 2, 128}, {3, 3, 64}, {16, 1, 128}};

static void test_prefill()
{
    const int counts[] = {2, 3, 7, 17, 18, 19, 64, 130, 300};
    int seed = 300;
    for (const auto &m : models) {
        for (const Format &format : formats) {
            for (int block_size : {16, 32, 128}) {
                if ((check_brief && block_size != 32) || (seed % 3 != 0 && m[0] == 16)) {
                    seed++;
                    continue;
                }
                Random random((uint64_t)seed);
                std::vector<int> lens;
                std::vector<Piece> whole;
                for (int s = 0; s < 4; s++) {
                    const int first = s == 2 ? 1000 : 0;
                    lens.push_back(counts[random.below(9)] + first);
                    whole.push_back({s, first, lens.back() - first});
                }
                Case c = {m[0], m[1], m[2], block_size, 0, 0, seed % 2 == 0 ? 40.0 : 0.0, SLOW, 1.0};
                World w(c, format, lens, (uint64_t)seed++);
                check_rows(w, whole, attend(w, whole, false));
                std::vector<Piece> mixed = {{2, 700, 90}, {3, 0, lens[3]}, {1, 0, 2}};
                check_rows(w, mixed, attend(w, mixed, false));
                mixed.push_back({0, lens[0] - 1, 1}); /* a single row: of these only with batch_invariant */
                check_rows(w, mixed, attend(w, mixed, true));
                mixed = {{2, 998, 3}}; /* few rows far on: split */
                check_rows(w, mixed, attend(w, mixed, false));
            }
        }
    }
}

/* Norms from nothing to what would take all codes of a naive cache, and a third more of YaRN. */
static void test_biases()
{
    const double norms[] = {0, 1, 30, 60, 600};
    int seed = 500;
    double worst[5][2] = {};
    for (const auto &m : {models[0], models[1]}) {
        for (const Format &format : formats) {
            for (int n = 0; n < 5; n++) {
                for (Spread spread : {EVEN, SLOW}) {
                    Case c = {m[0], m[1], m[2], 32, 0, 0, norms[n], spread, n % 2 == 0 ? 1.0 : 1.3};
                    World w(c, format, {700, 90}, (uint64_t)seed++);
                    std::vector<Piece> pieces = {{0, 600, 100}, {1, 0, 90}};
                    for (int invariant = 0; invariant < 2; invariant++) {
                        const double error = check_rows(w, pieces, attend(w, pieces, invariant));
                        worst[n][spread] = std::max(worst[n][spread], error);
                    }
                }
            }
        }
    }
    for (int n = 0; n < 5; n++) {
        printf("bias of norm %4g: largest error %.1e even, %.1e in slow pairs\n", norms[n], worst[n][EVEN],
               worst[n][SLOW]);
    }
}

static void test_sliding()
{
    int seed = 700;
    for (int window : {1, 5, 64, 100, 256, 800}) {
        for (const auto &m : {models[0], models[1]}) {
            std::vector<int> lens = {1000, 1000, 1030};
            std::vector<Piece> pieces = {{0, 998, 2}, {1, 900, 100}, {2, 1020, 10}};
            const int unseen = std::max(0, 900 - window + 1);
            Case c = {m[0], m[1], m[2], window == 64 ? 128 : 16, window, 0, 100.0, SLOW, 1.0};
            World w(c, formats[seed % 4], lens, (uint64_t)seed, unseen);
            seed++;
            check_rows(w, pieces, attend(w, pieces, false));
            check_rows(w, pieces, attend(w, pieces, true));
        }
    }
}

/* The newest positions in 16 bits: all, some, one; while the window fills; with a sliding window wider or narrower. */
static void test_kv_window()
{
    int seed = 800;
    for (int window : {1, 16, 100, 256, 2000}) {
        for (int sliding : {0, 70}) {
            for (const auto &m : {models[0], models[1]}) {
                Case c = {m[0], m[1], m[2], window == 16 ? 16 : 32, sliding, window, 100.0, SLOW, 1.0};
                const int warm = window == 100 ? 480 : 0;
                World w(c, formats[seed % 4], {900, 530, 130}, (uint64_t)seed, 0, warm);
                seed++;
                std::vector<Piece> pieces = {{0, 800, 100}, {1, 500, 30}, {0, 899, 1}};
                if (warm == 0) {
                    pieces.push_back({2, 0, 130});
                }
                check_rows(w, pieces, attend(w, pieces, false));
                check_rows(w, pieces, attend(w, pieces, true));
                pieces = {{0, 899, 1}, {1, 529, 1}}; /* a decode step: splits, and a graph's bounds */
                std::vector<uint16_t> rows = attend(w, pieces, false);
                check_rows(w, pieces, rows);
                std::vector<uint16_t> padded = attend(w, pieces, false, 6);
                CHECK(rows.size() == padded.size() && memcmp(rows.data(), padded.data(), rows.size() * 2) == 0);
                pieces.push_back({0, 700, 60}); /* and with a list for single rows, other kernels' */
                check_rows(w, pieces, attend(w, pieces, false, -1, true));
                if (warm == 0) {
                    pieces = {{2, 0, 1}, {2, 15, 1}, {2, 16, 1}, {2, 99, 1}, {2, 100, 1}, {0, 640, 1}};
                    check_rows(w, pieces, attend(w, pieces, false, -1, true));
                }
            }
        }
    }
}

/* However a sequence is cut, and whatever shares the batch, its rows are the same to the bit. */
static void test_invariance()
{
    int seed = 900;
    for (const auto &m : models) {
        for (const Format &format : formats) {
            for (int kv_window : {0, 90}) {
                if ((check_brief || m[0] > 14) && kv_window != (seed / 2 % 2) * 90) {
                    seed++;
                    continue;
                }
                Case c = {m[0], m[1], m[2], 32, seed % 4 == 3 ? 300 : 0, kv_window, 200.0, SLOW, 1.0};
                World w(c, format, {800, 37, 400}, (uint64_t)seed++);
                const size_t width = (size_t)m[0] * m[2];
                std::vector<Piece> pieces = {{0, 0, 800}};
                std::vector<uint16_t> whole = attend(w, pieces, true);
                check_rows(w, pieces, whole, 8);
                auto same = [&](const std::vector<Piece> &cut, int padding) {
                    std::vector<uint16_t> rows = attend(w, cut, true, padding);
                    size_t at = 0;
                    bool equal = true;
                    for (const Piece &piece : cut) {
                        const size_t size = (size_t)piece.count * width;
                        equal &= piece.seq != 0 ||
                                 memcmp(&rows[at], &whole[(size_t)piece.first * width], size * 2) == 0;
                        at += size;
                    }
                    CHECK(equal);
                };
                same({{0, 0, 513}}, -1);
                same({{0, 513, 287}}, -1);
                same({{1, 0, 37}, {0, 600, 5}, {2, 0, 400}}, -1);
                same({{0, 255, 1}, {0, 256, 1}, {0, 257, 1}, {0, 799, 1}}, -1); /* splits in the workspace */
                same({{0, 799, 1}}, 0);
                std::vector<Piece> many; /* so many rows that each is one item */
                for (int i = 0; i < (check_brief ? 40 : 200); i++) {
                    many.push_back({0, 600 + i, 1});
                }
                same(many, -1);
            }
        }
    }
}

static void test_refusals()
{
    qf_error error;
    qf_cuda_attention_args args = {};
    Device<uint16_t> some(4096);
    Device<int32_t> words(16);
    args.shape = {2, 1, 64, 32, 0, 0};
    args.kv = {some.data, some.data, 32, 1, 64, false, QF_CUDA_KV_INT4, NULL};
    args.q = some.data;
    args.out = some.data;
    args.out_k = 128;
    args.items = (const qf_cuda_attention_item *)words.data;
    args.num_items = words.data;
    args.block_tables = args.block_table_start = words.data;
    args.workspace = some.data;
    args.num_tokens = 1;
    args.scale = 1.0f;
    CHECK(qf_cuda_attention(&args, &options.device, 0, &error) == QF_OK); /* no items: nothing is launched */
    args.kv.k_bias = (const float *)some.data;
    CHECK(qf_cuda_attention(&args, &options.device, 0, &error) == QF_ERROR_INVALID_ARGUMENT); /* no tables */
    args.kv.k_bias = NULL;
    args.window_tokens = 5;
    CHECK(qf_cuda_attention(&args, &options.device, 0, &error) == QF_ERROR_INVALID_ARGUMENT); /* no window cache */
    args.window_tokens = 0;
    args.kv.format = (qf_cuda_kv_format)9;
    CHECK(qf_cuda_attention(&args, &options.device, 0, &error) == QF_ERROR_INVALID_ARGUMENT);
}

/* --- timing ---------------------------------------------------------------------------------------------------- */

/* One sequence, several times over; format QF_CUDA_KV_16 for comparison. */
static void bench(const int *m, int rows, int context, qf_cuda_kv_format format, double bias, bool invariant = false)
{
    const int block_size = 32, blocks = (context + block_size - 1) / block_size, copies = 2;
    const size_t bytes = (size_t)qf_cuda_kv_block_bytes(format, m[1], block_size, m[2]) * blocks * copies;
    const int out_k = (m[0] * m[2] + 127) / 128 * 128, tiles = (context + 63) / 64;
    const qf_cuda_attention_shape shape = {m[0], m[1], m[2], block_size, 0, 0};
    Device<uint8_t> k(bytes), v(bytes);
    CHECK_CUDA(cudaMemset(k.data, 0x3c, bytes)); /* small numbers in every format */
    CHECK_CUDA(cudaMemset(v.data, 0x3c, bytes));
    std::vector<uint16_t> noise((size_t)rows * m[0] * m[2]);
    Random random(9);
    for (uint16_t &x : noise) {
        x = bf16_bits(random.normal());
    }
    Device<uint16_t> q(noise), out((size_t)qf_cuda_tiled_size(out_k, rows)), fine((size_t)64 * m[2]);
    std::vector<float> freq((size_t)m[2] / 2, 0.1f), b((size_t)m[1] * m[2], (float)bias);
    Device<float> inv_freq(freq), device_bias(b), coarse((size_t)tiles * m[2]), rotation((size_t)64 * m[2]);
    qf_cuda_kv_bias_tables_args tables_args = {};
    tables_args.inv_freq = inv_freq.data;
    tables_args.factor = 1.0;
    tables_args.coarse = coarse.data;
    tables_args.fine = fine.data;
    tables_args.rotation = rotation.data;
    tables_args.num_tiles = tiles;
    tables_args.head_dim = m[2];
    CHECK_OK(qf_cuda_kv_bias_tables(&tables_args, 0, &check_error));
    std::vector<int32_t> tables, loc = {0, rows}, lens = {context}, starts = {0, blocks};
    for (int i = 0; i < blocks * copies; i++) {
        tables.push_back(i);
    }
    qf_cuda_attention_plan plan;
    std::vector<qf_cuda_attention_item> list((size_t)qf_cuda_attention_max_items(&shape, 1, rows, context));
    qf_cuda_attention_plan_make(&shape, 1, loc.data(), lens.data(), invariant, list.data(), &plan);
    Device<qf_cuda_attention_item> items(list);
    Device<int32_t> counts(std::vector<int32_t>{0, plan.num_prefill_items}), device_tables(tables), device_starts(starts);
    Device<float> workspace(qf_cuda_attention_workspace_bytes(&shape, 1, rows, context) / 4);
    workspace.zero();
    qf_cuda_attention_args args = {};
    args.shape = shape;
    args.kv = {k.data, v.data, block_size, m[1], m[2], false, format, device_bias.data};
    args.q = q.data;
    args.out = out.data;
    args.out_k = out_k;
    args.items = items.data;
    args.num_items = counts.data;
    args.max_prefill_items = plan.num_prefill_items;
    args.block_tables = device_tables.data;
    args.workspace = workspace.data;
    args.num_tokens = rows;
    args.scale = 0.1f;
    args.batch_invariant = invariant;
    args.bias_coarse = coarse.data;
    args.bias_fine = fine.data;
    args.bias_rotation = rotation.data;
    const double us = time_us(
        [&](cudaStream_t stream, int i) {
            args.block_table_start = device_starts.data + i % copies;
            CHECK_OK(qf_cuda_attention(&args, &options.device, stream, &check_error));
        },
        4, 5);
    double flops = 0;
    for (int r = 0; r < rows; r++) {
        flops += 4.0 * m[0] * m[2] * (context - rows + r + 1);
    }
    const char *names[] = {"bf16", "fp8", "int8", "int4", "nf4"};
    printf("%2d/%d/%3d %5d of %6d%s %4s bias %3g  %9.1f us  %6.1f TFLOP/s\n", m[0], m[1], m[2], rows, context,
           invariant ? " inv" : "    ", names[format], bias, us, flops / us * 1e-6);
}

int main(int argc, char **argv)
{
    options = check_options(argc, argv);
    test_refusals();
    test_biases();
    test_prefill();
    test_sliding();
    test_kv_window();
    test_invariance();
    const int status = check_report("attention_lowbit_prefill");
    for (int i = 0; options.bench && i < 2; i++) {
        const int *m = models[1 - i];
        const int shapes[][2] = {{2048, 2048}, {2048, 32768}};
        for (const auto &shape : shapes) {
            bench(m, shape[0], shape[1], QF_CUDA_KV_16, 0);
            for (const Format &format : formats) {
                bench(m, shape[0], shape[1], format.device, 1);
                bench(m, shape[0], shape[1], format.device, 50); /* every step has low parts */
            }
        }
        bench(m, 2048, 2048, QF_CUDA_KV_16, 0, true);
        bench(m, 2048, 2048, QF_CUDA_KV_INT4, 1, true);
    }
    return status;
}
