/* sources: base/status.c backend/cuda/attention_plan.c */
/* Attention, its plan, and the write of keys and values, against plain host loops in float64. */
#include "check_cuda.cuh"
#include "qf_attention.h"

static Options options;

template <typename T> static bool same_bits(const std::vector<T> &a, const std::vector<T> &b)
{
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/* Rows first .. first + count - 1 of a sequence, as a batch holds them. */
struct Piece {
    int seq, first, count;
};

/* Sequences of known lengths with queries at all positions, in a paged cache with shuffled blocks. All that no query
 * may see is NaN: block 0, what follows a sequence in its last block, and positions below `unseen`. */
struct World {
    qf_cuda_attention_shape shape;
    std::vector<int> lengths;
    std::vector<std::vector<uint16_t>> q; /* [seq] (length, num_heads, head_dim) */
    std::vector<uint16_t> k, v;
    std::vector<int32_t> tables, table_start;
    Device<uint16_t> *device_k, *device_v;
    Device<int32_t> *device_tables;

    World(const World &) = delete;
    World(int num_heads, int num_kv_heads, int head_dim, int block_size, int window, const std::vector<int> &lens,
          uint64_t seed, int unseen = 0)
        : shape{num_heads, num_kv_heads, head_dim, block_size, window}, lengths(lens)
    {
        Random random(seed);
        int num_blocks = 1;
        for (int length : lens) {
            table_start.push_back((int)tables.size());
            for (int i = 0; i < (length + block_size - 1) / block_size; i++) {
                tables.push_back((i + 1) * block_size <= unseen ? 0 : num_blocks++);
            }
        }
        shuffle(random, num_blocks);
        k.assign((size_t)num_blocks * num_kv_heads * block_size * head_dim, 0xffff);
        v = k;
        std::vector<uint16_t> pool(1 << 17); /* vectors are cut from it at random places */
        for (uint16_t &x : pool) {
            x = bf16_bits(random.normal() * 1.5f);
        }
        auto fill = [&](uint16_t *to, int size) {
            memcpy(to, &pool[(size_t)random.below((1 << 17) - size)], (size_t)size * 2);
        };
        for (size_t s = 0; s < lens.size(); s++) {
            for (int position = unseen; position < lens[s]; position++) {
                for (int head = 0; head < num_kv_heads; head++) {
                    fill(&k[at((int)s, position, head)], head_dim);
                    fill(&v[at((int)s, position, head)], head_dim);
                }
            }
            q.emplace_back((size_t)lens[s] * num_heads * head_dim);
            for (size_t i = 0; i < q.back().size(); i += (size_t)head_dim) {
                fill(&q.back()[i], head_dim);
            }
        }
        device_k = new Device<uint16_t>(k);
        device_v = new Device<uint16_t>(v);
        device_tables = new Device<int32_t>(tables);
    }
    ~World()
    {
        delete device_k;
        delete device_v;
        delete device_tables;
    }
    void shuffle(Random &random, int num_blocks)
    {
        std::vector<int> names((size_t)num_blocks);
        for (int i = 1; i < num_blocks; i++) {
            int j = 1 + random.below(i);
            names[(size_t)i] = names[(size_t)j];
            names[(size_t)j] = i;
        }
        for (int32_t &block : tables) {
            block = names[(size_t)block];
        }
    }
    size_t at(int seq, int position, int head) const
    {
        int block = tables[(size_t)(table_start[(size_t)seq] + position / shape.block_size)];
        return (((size_t)block * shape.num_kv_heads + head) * shape.block_size + position % shape.block_size) *
               shape.head_dim;
    }
    float scale() const { return (float)(1.0 / sqrt((double)shape.head_dim)); }

    std::vector<double> reference(int seq, int position, int head) const
    {
        int head_dim = shape.head_dim, kv_head = head / (shape.num_heads / shape.num_kv_heads);
        int begin = shape.sliding_window > 0 ? std::max(0, position - shape.sliding_window + 1) : 0;
        const uint16_t *query = &q[(size_t)seq][((size_t)position * shape.num_heads + head) * head_dim];
        std::vector<double> scores, out((size_t)head_dim);
        double maximum = -INFINITY, sum = 0;
        for (int j = begin; j <= position; j++) {
            const uint16_t *key = &k[at(seq, j, kv_head)];
            double s = 0;
            for (int d = 0; d < head_dim; d++) {
                s += (double)bf16_value(query[d]) * bf16_value(key[d]);
            }
            scores.push_back(s * scale());
            maximum = std::max(maximum, scores.back());
        }
        for (int j = begin; j <= position; j++) {
            double w = exp(scores[(size_t)(j - begin)] - maximum);
            const uint16_t *value = &v[at(seq, j, kv_head)];
            sum += w;
            for (int d = 0; d < head_dim; d++) {
                out[(size_t)d] += w * bf16_value(value[d]);
            }
        }
        for (double &x : out) {
            x /= sum;
        }
        return out;
    }
};

/* --- the plan -------------------------------------------------------------------------------------------------- */

struct Planned {
    std::vector<qf_cuda_attention_item> items;
    qf_cuda_attention_plan plan;
    size_t workspace_bytes;
    int max_items;
};

/* Every row sees each of its positions in one item, items of a tile agree, units do not overlap, bounds hold. */
static void check_plan(const qf_cuda_attention_shape &shape, const std::vector<int32_t> &loc,
                       const std::vector<int32_t> &lens, bool invariant, const Planned &p)
{
    size_t num = (size_t)(p.plan.num_decode_items + p.plan.num_prefill_items);
    int group = shape.num_heads / shape.num_kv_heads, rows_of_tile = invariant ? 64 : 128;
    int64_t words = (2 * shape.num_heads + 3) / 4 * 4 + (int64_t)shape.num_heads * shape.head_dim +
                    (shape.num_kv_heads + 3) / 4 * 4;
    std::vector<int64_t> seen((size_t)loc.back(), 0);
    std::vector<char> unit_used((size_t)p.plan.num_partials, 0);
    bool good = true;
    good &= num <= (size_t)p.max_items;
    good &= (size_t)p.plan.num_partials * (size_t)words * 4 <= p.workspace_bytes;
    good &= !invariant || p.plan.num_decode_items == 0;
    for (size_t i = 0; i < num && good; i++) {
        const qf_cuda_attention_item &it = p.items[i];
        bool decode = i < (size_t)p.plan.num_decode_items;
        int rows = loc[(size_t)it.seq + 1] - loc[(size_t)it.seq], start = lens[(size_t)it.seq] - rows;
        good &= it.num_rows >= 1 && it.num_rows * group <= rows_of_tile && (!decode || it.num_rows == 1);
        good &= it.first_row >= loc[(size_t)it.seq] && it.first_row + it.num_rows <= loc[(size_t)it.seq + 1];
        good &= it.first_position == start + it.first_row - loc[(size_t)it.seq];
        good &= it.split >= 0 && it.split < it.num_splits && it.kv_begin < it.kv_end && it.kv_begin >= 0;
        const int unit = decode ? 64 : QF_CUDA_SPLIT_TOKENS;
        good &= it.split == 0 || it.kv_begin % unit == 0;
        good &= it.split == it.num_splits - 1 ? it.kv_end == it.first_position + it.num_rows
                                              : it.kv_end % unit == 0;
        good &= !invariant || it.num_splits == 1 ||
                it.kv_begin / QF_CUDA_SPLIT_TOKENS == (it.kv_end - 1) / QF_CUDA_SPLIT_TOKENS;
        for (int r = 0; r < it.num_rows && good; r++) {
            int position = it.first_position + r;
            int begin = shape.sliding_window > 0 ? std::max(0, position - shape.sliding_window + 1) : 0;
            seen[(size_t)(it.first_row + r)] +=
                std::max(0, std::min(it.kv_end, position + 1) - std::max(it.kv_begin, begin));
            if (it.num_splits > 1) {
                size_t place = (size_t)(it.partial + it.split * it.num_rows + r);
                good &= place < unit_used.size() && !unit_used[place];
                unit_used[place] = 1;
            }
        }
    }
    for (size_t s = 0; s + 1 < loc.size() && good; s++) {
        for (int r = loc[s]; r < loc[s + 1]; r++) {
            int position = lens[s] - loc[s + 1] + r;
            int most = shape.sliding_window > 0 ? std::min(position + 1, shape.sliding_window) : position + 1;
            good &= seen[(size_t)r] == most;
        }
    }
    CHECK(good);
}

static Planned make_plan(const qf_cuda_attention_shape &shape, const std::vector<int32_t> &loc,
                         const std::vector<int32_t> &lens, bool invariant, int max_model_len)
{
    Planned p;
    int num_seqs = (int)lens.size(), tokens = std::max(1, loc.back());
    p.max_items = qf_cuda_attention_max_items(&shape, num_seqs, tokens, max_model_len);
    p.workspace_bytes = qf_cuda_attention_workspace_bytes(&shape, num_seqs, tokens, max_model_len);
    p.items.resize((size_t)p.max_items + 1000); /* an overrun is found, not suffered */
    qf_cuda_attention_plan_make(&shape, num_seqs, loc.data(), lens.data(), invariant, p.items.data(), &p.plan);
    check_plan(shape, loc, lens, invariant, p);
    return p;
}

static void test_plans()
{
    Random random(3);
    const int heads[][3] = {{28, 4, 128}, {14, 2, 64}, {6, 2, 64}, {64, 8, 128}, {40, 8, 128}, {16, 1, 64}, {4, 4, 64}};
    for (int i = 0; i < 400; i++) {
        const int *h = heads[random.below(7)];
        int max_len = 64 << random.below(12);
        qf_cuda_attention_shape shape = {h[0], h[1], h[2], 32, random.below(3) == 0 ? 1 + random.below(max_len) : 0};
        int num_seqs = 1 + random.below(random.below(4) == 0 ? 256 : 20);
        int style = random.below(4);
        std::vector<int32_t> loc = {0}, lens;
        for (int s = 0; s < num_seqs; s++) {
            int length = style == 3 ? max_len : 1 + random.below(max_len);
            int rows = style != 1 && random.below(5) != 0 ? 1 : 1 + random.below(std::min(length, 600));
            rows = style == 2 && random.below(8) == 0 ? 0 : std::min(rows, 8192 - loc.back());
            loc.push_back(loc.back() + rows);
            lens.push_back(rows == 0 ? std::max(0, length - 1) : length);
        }
        for (int invariant = 0; invariant < 2; invariant++) {
            Planned p = make_plan(shape, loc, lens, invariant, max_len);
            CHECK(p.workspace_bytes < (size_t)128 << 20);
        }
    }
    qf_cuda_attention_shape shape = {28, 4, 128, 32, 0};
    CHECK(qf_cuda_attention_workspace_bytes(&shape, 256, 8192, 131072) < (size_t)32 << 20);
    CHECK(qf_cuda_attention_max_items(&shape, 256, 8192, 131072) < 4096);
    CHECK(qf_cuda_attention_max_items(&shape, 1, 1, 4096) <= 64);
}

/* --- attention ------------------------------------------------------------------------------------------------- */

/* Runs a batch; returns rows (num_tokens, num_heads * head_dim). padding: rows of a captured graph without items. */
static std::vector<uint16_t> attend(const World &w, const std::vector<Piece> &pieces, bool invariant, int padding = -1)
{
    const qf_cuda_attention_shape &shape = w.shape;
    std::vector<int32_t> loc = {0}, lens, starts;
    std::vector<uint16_t> q;
    int max_len = 1, width = shape.num_heads * shape.head_dim, out_k = (width + 127) / 128 * 128;
    for (const Piece &piece : pieces) {
        const uint16_t *from = &w.q[(size_t)piece.seq][(size_t)piece.first * width];
        q.insert(q.end(), from, from + (size_t)piece.count * width);
        loc.push_back(loc.back() + piece.count);
        lens.push_back(piece.first + piece.count);
        starts.push_back(w.table_start[(size_t)piece.seq]);
        max_len = std::max(max_len, lens.back());
    }
    int tokens = loc.back(), padded = tokens + std::max(padding, 0);
    q.resize((size_t)padded * width, 0xffff);
    Planned p = make_plan(shape, loc, lens, invariant, max_len);
    int num_items = p.plan.num_decode_items + p.plan.num_prefill_items;
    bool captured = padding >= 0;
    p.items.resize((size_t)(captured ? std::max(p.max_items, num_items) : num_items));
    Device<uint16_t> device_q(q), out((size_t)qf_cuda_tiled_size(out_k, padded));
    Device<qf_cuda_attention_item> items(p.items);
    Device<int32_t> counts(std::vector<int32_t>{p.plan.num_decode_items, p.plan.num_prefill_items});
    Device<int32_t> device_starts(starts);
    Device<float> workspace(p.workspace_bytes / 4);
    workspace.zero();
    qf_cuda_attention_args args = {};
    args.shape = shape;
    args.kv = {w.device_k->data, w.device_v->data, shape.block_size, shape.num_kv_heads, shape.head_dim, false};
    args.q = device_q.data;
    args.out = out.data;
    args.out_k = out_k;
    args.items = items.data;
    args.num_items = counts.data;
    args.prefill_offset = captured ? 0 : p.plan.num_decode_items;
    args.max_decode_items = !captured ? p.plan.num_decode_items : invariant ? 0 : p.max_items;
    args.max_prefill_items = !captured ? p.plan.num_prefill_items : invariant ? p.max_items : 0;
    args.block_tables = w.device_tables->data;
    args.block_table_start = device_starts.data;
    args.workspace = workspace.data;
    args.num_tokens = padded;
    args.scale = w.scale();
    args.batch_invariant = invariant;
    std::vector<uint16_t> tiled[2];
    for (int run = 0; run < 2; run++) {
        out.poison();
        CHECK_OK(qf_cuda_attention(&args, &options.device, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
        tiled[run] = out.get();
    }
    CHECK(same_bits(tiled[0], tiled[1])); /* also: the counters were left at zero */
    std::vector<uint16_t> rows((size_t)tokens * width);
    int nonzero = 0;
    for (int t = 0; t < tokens; t++) {
        for (int i = 0; i < out_k; i++) {
            uint16_t x = tiled[0][tiled_index(i, t, padded)];
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

/* Compares up to `samples` (row, head) with the reference, the corners always. */
static void check_rows(const World &w, const std::vector<Piece> &pieces, const std::vector<uint16_t> &rows,
                       int samples = 60)
{
    Random random(17 + pieces.size());
    int head_dim = w.shape.head_dim, num_heads = w.shape.num_heads, t = 0;
    double worst = 0;
    int total = 0;
    for (const Piece &piece : pieces) {
        total += piece.count;
    }
    for (const Piece &piece : pieces) {
        for (int i = 0; i < piece.count; i++, t++) {
            bool corner = i == 0 || i == piece.count - 1;
            if (!corner && random.below(total) >= samples) {
                continue;
            }
            int heads[2] = {random.below(num_heads), corner ? num_heads - 1 : random.below(num_heads)};
            for (int head : heads) {
                std::vector<double> want = w.reference(piece.seq, piece.first + i, head), got((size_t)head_dim);
                for (int d = 0; d < head_dim; d++) {
                    got[(size_t)d] = bf16_value(rows[((size_t)t * num_heads + head) * head_dim + d]);
                }
                double error = relative_error(got, want, (size_t)head_dim);
                worst = error == error ? std::max(worst, error) : INFINITY;
            }
        }
    }
    if (!(worst < 8e-3)) {
        fprintf(stderr, "heads %d / %d of %d, blocks of %d, window %d, %zu sequences, %d rows: error %g\n", num_heads,
                w.shape.num_kv_heads, head_dim, w.shape.block_size, w.shape.sliding_window, pieces.size(), total,
                worst);
    }
    CHECK(worst < 8e-3);
}

static const int models[][3] = {{14, 2, 64}, {28, 4, 128}, {6, 2, 64}, {12, 2, 128}, {8, 1, 64},
                                {10, 2, 128}, {3, 3, 64},  {16, 1, 128}, {32, 2, 64}};

static void test_decode()
{
    const int lengths[] = {1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 511, 512, 700, 1024, 1500, 3001};
    int seed = 100;
    for (const auto &m : models) {
        for (int block_size : {16, 32, 128}) {
            if (check_brief && block_size == 16) {
                continue;
            }
            std::vector<int> lens;
            Random random((uint64_t)seed);
            int count = block_size == 16 ? 18 : block_size == 32 ? 5 : 1;
            for (int i = 0; i < count; i++) {
                lens.push_back(count == 18 ? lengths[i] : 1 + random.below(2000));
            }
            World w(m[0], m[1], m[2], block_size, 0, lens, (uint64_t)seed++);
            std::vector<Piece> pieces;
            for (int s = 0; s < count; s++) {
                pieces.push_back({s, lens[(size_t)s] - 1, 1});
            }
            std::vector<uint16_t> rows = attend(w, pieces, false), padded = attend(w, pieces, false, 3);
            check_rows(w, pieces, rows);
            CHECK(same_bits(rows, padded));
        }
    }
}

/* Devices whose shared memory takes smaller rings, or fewer of them: of compute capability 8.0, 8.6, and less than any.
 * The arithmetic, and so every bit, is the same. */
static void test_little_shared_memory()
{
    const int32_t bytes = options.device.max_shared_bytes;
    for (const auto &m : {models[0], models[1], models[4], models[7]}) {
        if (check_brief && m != models[1]) {
            continue;
        }
        const int longest = m == models[7] ? 16 : 257;
        World w(m[0], m[1], m[2], 32, 0, {1, longest, 700, 3001}, 250);
        std::vector<Piece> pieces = {{0, 0, 1}, {1, longest - 1, 1}, {2, 699, 1}, {3, 3000, 1}};
        std::vector<uint16_t> rows = attend(w, pieces, false);
        check_rows(w, pieces, rows);
        for (int32_t little : {163 * 1024, 99 * 1024, 48 * 1024}) {
            options.device.max_shared_bytes = little;
            CHECK(same_bits(rows, attend(w, pieces, false)));
        }
        options.device.max_shared_bytes = bytes;
    }
}

static void test_prefill()
{
    const int rows[] = {2, 3, 7, 17, 18, 19, 64, 130, 300};
    int seed = 300;
    for (const auto &m : models) {
        for (int block_size : {16, 32, 128}) {
            if (check_brief && block_size != 32) {
                continue;
            }
            Random random((uint64_t)seed);
            std::vector<int> lens;
            std::vector<Piece> whole, mixed;
            for (int s = 0; s < 4; s++) {
                lens.push_back(rows[random.below(9)] + (s == 2 ? 1500 : 0));
                whole.push_back({s, s == 2 ? 1500 : 0, lens.back() - (s == 2 ? 1500 : 0)});
            }
            World w(m[0], m[1], m[2], block_size, 0, lens, (uint64_t)seed++);
            check_rows(w, whole, attend(w, whole, false));
            /* A few rows in the middle, decode rows between them, an order of its own. */
            mixed = {{2, 700, 90}, {0, lens[0] - 1, 1}, {3, 1, lens[3] - 1}, {1, 0, 1}};
            check_rows(w, mixed, attend(w, mixed, false));
            check_rows(w, mixed, attend(w, mixed, true));
            mixed = {{2, 1499, 3}}; /* few rows far on: split */
            check_rows(w, mixed, attend(w, mixed, false));
        }
    }
}

static void test_window()
{
    int seed = 500;
    for (int window : {1, 5, 64, 100, 256, 1000}) {
        for (const auto &m : {models[0], models[1], models[2]}) {
            if (check_brief && window != 100) {
                continue;
            }
            std::vector<int> lens = {1200, 1200, 1230};
            std::vector<Piece> pieces = {{0, 1199, 1}, {1, 1100, 100}, {2, 1229, 1}};
            int unseen = std::max(0, 1100 - window + 1);
            World w(m[0], m[1], m[2], window == 64 ? 128 : 16, window, lens, (uint64_t)seed++, unseen);
            check_rows(w, pieces, attend(w, pieces, false));
            check_rows(w, pieces, attend(w, pieces, true));
        }
    }
}

/* However a sequence is cut, and whatever shares the batch, its rows are the same to the bit. */
static void test_invariance()
{
    int seed = 700;
    for (const auto &m : models) {
        for (int window : {0, 300}) {
            if (check_brief && window == 0) {
                continue;
            }
            std::vector<int> lens = {1100, 37, 700};
            World w(m[0], m[1], m[2], 32, window, lens, (uint64_t)seed++);
            size_t width = (size_t)m[0] * m[2];
            std::vector<Piece> pieces = {{0, 0, 1100}};
            std::vector<uint16_t> whole = attend(w, pieces, true);
            check_rows(w, pieces, whole, 20);
            auto same = [&](const std::vector<Piece> &cut, int padding) {
                std::vector<uint16_t> rows = attend(w, cut, true, padding);
                size_t at = 0;
                bool equal = true;
                for (const Piece &piece : cut) {
                    size_t size = (size_t)piece.count * width;
                    equal &= piece.seq != 0 || memcmp(&rows[at], &whole[(size_t)piece.first * width], size * 2) == 0;
                    at += size;
                }
                CHECK(equal);
            };
            same({{0, 0, 513}}, -1);
            same({{0, 513, 587}}, -1);
            same({{1, 0, 37}, {0, 700, 5}, {2, 0, 700}}, -1);
            same({{0, 255, 1}, {0, 256, 1}, {0, 257, 1}, {0, 1099, 1}}, -1); /* decode rows: splits in the workspace */
            same({{0, 1099, 1}}, 0);
            same({{1, 36, 1}, {0, 1000, 1}}, 6);
            std::vector<Piece> many; /* so many rows that each is one item */
            for (int i = 0; i < (check_brief ? 40 : 300); i++) {
                many.push_back({0, 800 + i, 1});
            }
            same(many, -1);
        }
    }
}

/* --- rope ------------------------------------------------------------------------------------------------------ */

template <typename T> static float value_of(T x);
template <> float value_of(float x) { return x; }
template <> float value_of(uint16_t x) { return bf16_value(x); }

template <typename T> static void test_rope_write(int heads, int kv_heads, int head_dim, int tokens, int splits)
{
    const bool f32 = sizeof(T) == 4;
    const int block_size = 16, num_blocks = tokens / block_size + 3, width = (heads + 2 * kv_heads) * head_dim;
    const int stride = (width + 15) / 16 * 16 + 16, half = head_dim / 2;
    Random random((uint64_t)(tokens * 31 + splits));
    std::vector<float> qkv((size_t)splits * tokens * stride), cos_sin((size_t)tokens * head_dim);
    for (float &x : qkv) {
        x = random.normal();
    }
    for (float &x : cos_sin) {
        x = random.normal();
    }
    std::vector<int32_t> slots, free_slots;
    for (int i = 0; i < num_blocks * block_size; i++) {
        free_slots.push_back(i);
    }
    for (int t = 0; t < tokens; t++) {
        int i = random.below((int)free_slots.size());
        slots.push_back(t % 5 == 4 ? -1 : free_slots[(size_t)i]);
        free_slots[(size_t)i] = free_slots.back();
        free_slots.pop_back();
    }
    size_t cache_size = (size_t)num_blocks * kv_heads * block_size * head_dim;
    Device<float> device_qkv(qkv), device_cos(cos_sin);
    Device<int32_t> device_slots(slots);
    Device<T> q((size_t)tokens * heads * head_dim), k(cache_size), v(cache_size);
    qf_cuda_rope_kv_write_args args = {device_qkv.data, splits, stride, device_cos.data, device_slots.data, q.data,
                                       {k.data, v.data, block_size, kv_heads, head_dim, f32}, tokens, heads};
    CHECK_OK(qf_cuda_rope_kv_write(&args, &options.device, 0, &check_error));
    std::vector<T> untouched(1);
    memset(untouched.data(), 0xff, sizeof(T));
    std::vector<T> got_q = q.get(), got[2] = {k.get(), v.get()};
    double worst = 0;
    size_t written[2] = {0, 0}, wanted = 0, changed[2] = {0, 0};
    for (int t = 0; t < tokens; t++) {
        wanted += slots[(size_t)t] >= 0 ? (size_t)kv_heads * head_dim : 0;
        for (int h = 0; h < heads + 2 * kv_heads; h++) {
            int part = h < heads ? -1 : h < heads + kv_heads ? 0 : 1, kv_head = (h - heads) % kv_heads;
            for (int d = 0; d < head_dim; d++) {
                auto sum = [&](int e) {
                    double s = 0;
                    for (int i = 0; i < splits; i++) {
                        s += qkv[((size_t)i * tokens + t) * stride + h * head_dim + e];
                    }
                    return s;
                };
                const float *cs = &cos_sin[(size_t)t * head_dim];
                int j = d % half;
                double want = part == 1 ? sum(d)
                              : d < half ? sum(j) * cs[j] - sum(j + half) * cs[half + j]
                                         : sum(j + half) * cs[j] + sum(j) * cs[half + j];
                T x;
                if (part < 0) {
                    x = got_q[((size_t)t * heads + h) * head_dim + d];
                } else if (slots[(size_t)t] < 0) {
                    continue;
                } else {
                    size_t slot = (size_t)slots[(size_t)t];
                    x = got[part][((slot / block_size * kv_heads + kv_head) * block_size + slot % block_size) *
                                      head_dim + d];
                    written[part]++;
                }
                double error = fabs(value_of(x) - want) / (fabs(want) + 1.0);
                worst = error == error ? std::max(worst, error) : INFINITY;
            }
        }
    }
    for (int part = 0; part < 2; part++) {
        for (const T &x : got[part]) {
            changed[part] += memcmp(&x, untouched.data(), sizeof(T)) != 0;
        }
        CHECK(written[part] == wanted && changed[part] == wanted);
    }
    CHECK(worst < (f32 ? 2e-6 : 4.2e-3));
}

static void test_rope()
{
    for (int tokens : {1, 2, 7, 17, 118}) {
        if (check_brief && tokens != 17) {
            continue;
        }
        for (int splits : {1, 2, 4, 5, 8}) {
            test_rope_write<uint16_t>(14, 2, 64, tokens, splits);
            test_rope_write<uint16_t>(28, 4, 128, tokens, splits);
            test_rope_write<uint16_t>(6, 2, 64, tokens, splits);
            test_rope_write<float>(6, 2, 64, tokens, splits);
            test_rope_write<float>(5, 1, 10, tokens, splits);
        }
    }
}

/* --- timing ---------------------------------------------------------------------------------------------------- */

/* A batch of equal sequences, `copies` times with caches of their own. */
static void bench(const int *m, int num_seqs, int rows, int context, bool invariant = false)
{
    const int block_size = 32, blocks = (context + block_size - 1) / block_size;
    const size_t block_elements = (size_t)m[1] * block_size * m[2];
    const size_t bytes = (size_t)num_seqs * blocks * block_elements * 4;
    const size_t least = rows > 1 ? 2 : 3;
    const int copies = (int)std::min<size_t>(400, std::max(least, ((size_t)300 << 20) / bytes + 1));
    const int tokens = num_seqs * rows, num_blocks = copies * num_seqs * blocks;
    const int out_k = (m[0] * m[2] + 127) / 128 * 128;
    qf_cuda_attention_shape shape = {m[0], m[1], m[2], block_size, 0};
    shape.decode_ctas = 2 * options.device.sm_count;
    Random random(9);
    std::vector<uint16_t> noise((size_t)1 << 22);
    for (uint16_t &x : noise) {
        x = bf16_bits(random.normal());
    }
    Device<uint16_t> k((size_t)num_blocks * block_elements), v((size_t)num_blocks * block_elements);
    Device<uint16_t> q((size_t)tokens * m[0] * m[2]), out((size_t)qf_cuda_tiled_size(out_k, tokens));
    for (Device<uint16_t> *to : {&k, &v, &q}) {
        for (size_t at = 0; at < to->size; at += noise.size()) {
            CHECK_CUDA(cudaMemcpy(to->data + at, noise.data(), std::min(noise.size(), to->size - at) * 2,
                                  cudaMemcpyHostToDevice));
        }
    }
    std::vector<int32_t> tables((size_t)num_blocks), loc = {0}, lens, starts;
    for (int i = 0; i < num_blocks; i++) {
        int j = random.below(i + 1);
        tables[(size_t)i] = tables[(size_t)j];
        tables[(size_t)j] = i;
    }
    for (int s = 0; s < num_seqs; s++) {
        loc.push_back(loc.back() + rows);
        lens.push_back(context);
    }
    for (int i = 0; i < copies * num_seqs; i++) {
        starts.push_back(i * blocks);
    }
    Planned p = make_plan(shape, loc, lens, invariant, context);
    p.items.resize((size_t)(p.plan.num_decode_items + p.plan.num_prefill_items));
    Device<qf_cuda_attention_item> items(p.items);
    Device<int32_t> counts(std::vector<int32_t>{p.plan.num_decode_items, p.plan.num_prefill_items});
    Device<int32_t> device_tables(tables), device_starts(starts);
    Device<float> workspace(p.workspace_bytes / 4);
    workspace.zero();
    qf_cuda_attention_args args = {};
    args.shape = shape;
    args.kv = {k.data, v.data, block_size, m[1], m[2], false};
    args.q = q.data;
    args.out = out.data;
    args.out_k = out_k;
    args.items = items.data;
    args.num_items = counts.data;
    args.prefill_offset = p.plan.num_decode_items;
    args.max_decode_items = p.plan.num_decode_items;
    args.max_prefill_items = p.plan.num_prefill_items;
    args.block_tables = device_tables.data;
    args.workspace = workspace.data;
    args.num_tokens = tokens;
    args.scale = 0.1f;
    args.batch_invariant = invariant;
    double us = time_us(
        [&](cudaStream_t stream, int i) {
            args.block_table_start = device_starts.data + (size_t)(i % copies) * num_seqs;
            CHECK_OK(qf_cuda_attention(&args, &options.device, stream, &check_error));
        },
        rows > 1 ? 4 : std::max(20, copies), rows > 1 ? 5 : 15);
    double flops = 0;
    for (int r = 0; r < rows; r++) {
        flops += 4.0 * num_seqs * m[0] * m[2] * (context - rows + r + 1);
    }
    double read = 4.0 * num_seqs * (double)context * m[1] * m[2];
    printf("%2d/%d/%3d %4d x %5d of %6d%s  items %4d  %9.1f us  ", m[0], m[1], m[2], num_seqs, rows, context,
           invariant ? " inv" : "    ", (int)p.items.size(), us);
    if (rows == 1) {
        printf("%6.0f GB/s  %3.0f %%\n", read / us * 1e-3, read / us * 1e-3 / 44.0);
    } else {
        printf("%6.1f TFLOP/s  %3.0f %%\n", flops / us * 1e-6, flops / us * 1e-6 / 7.7);
    }
}

/* Several times over, in buffers of their own. */
static void bench_rope(const int *m, int tokens, int splits)
{
    const int width = (m[0] + 2 * m[1]) * m[2], block_size = 32, blocks = (tokens + block_size - 1) / block_size;
    const size_t qkv_size = (size_t)splits * tokens * width, q_size = (size_t)tokens * m[0] * m[2];
    const size_t cache_size = (size_t)blocks * m[1] * block_size * m[2], table_size = (size_t)tokens * m[2];
    const size_t bytes = (qkv_size + table_size) * 4 + (q_size + 2 * (size_t)tokens * m[1] * m[2]) * 2;
    const int copies = (int)std::min<size_t>(400, ((size_t)300 << 20) / bytes + 1);
    Device<float> qkv(qkv_size * copies), table(table_size * copies);
    Device<uint16_t> q(q_size * copies), k(cache_size * copies), v(cache_size * copies);
    std::vector<int32_t> slots;
    for (int t = 0; t < tokens; t++) {
        slots.push_back(t);
    }
    Device<int32_t> device_slots(slots);
    qkv.zero();
    table.zero();
    qf_cuda_rope_kv_write_args args = {};
    args.num_splits = splits;
    args.qkv_stride = width;
    args.slot_mapping = device_slots.data;
    args.num_tokens = tokens;
    args.num_heads = m[0];
    double us = time_us(
        [&](cudaStream_t stream, int i) {
            const size_t at = (size_t)(i % copies);
            args.qkv = qkv.data + at * qkv_size;
            args.cos_sin = table.data + at * table_size;
            args.q = q.data + at * q_size;
            args.kv = {k.data + at * cache_size, v.data + at * cache_size, block_size, m[1], m[2], false};
            CHECK_OK(qf_cuda_rope_kv_write(&args, &options.device, stream, &check_error));
        },
        std::max(20, copies));
    printf("%2d/%d/%3d rope %5d tokens, %d splits  %9.1f us  %6.0f GB/s  %3.0f %%\n", m[0], m[1], m[2], tokens, splits,
           us, bytes / us * 1e-3, bytes / us * 1e-3 / 44.0);
}

int main(int argc, char **argv)
{
    options = check_options(argc, argv);
    test_plans();
    test_rope();
    test_decode();
    test_little_shared_memory();
    test_prefill();
    test_window();
    test_invariance();
    int status = check_report("attention");
    for (int i = 0; options.bench && i < 2; i++) {
        const int *m = models[1 - i];
        bench_rope(m, 1, 1);
        bench_rope(m, 1, 8);
        bench_rope(m, 2048, 1);
        bench(m, 1, 1, 384);
        bench(m, 1, 1, 1024);
        bench(m, 16, 1, 384);
        bench(m, 64, 1, 384);
        bench(m, 256, 1, 384);
        bench(m, 64, 1, 2000);
        bench(m, 1, 1, 4096);
        bench(m, 1, 1, 32768);
        bench(m, 1, 2048, 2048);
        bench(m, 1, 8192, 8192);
        bench(m, 1, 2048, 30000);
        bench(m, 1, 64, 30000);
        bench(m, 16, 128, 128);
        bench(m, 64, 1, 384, true);
        bench(m, 1, 1, 32768, true);
        bench(m, 1, 8192, 8192, true);
    }
    return status;
}
