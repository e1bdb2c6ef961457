/* sources: base/status.c kv/format.c backend/cuda/attention_plan.c */
/* Low-bit caches: the write of keys and values against the scalar codec, bit for bit; decode attention against float64
 * over decoded codes and the exact rotated bias; and the error of the 16-bit kernel over the same cache restored. */
#include "check_cuda.cuh"

#include "common/kv_codec.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "qf_attention.h"

extern "C" {
#include "kv/format.h"
}

static Options options;

static const int formats[4] = {QF_CUDA_KV_FP8, QF_CUDA_KV_INT8, QF_CUDA_KV_INT4, QF_CUDA_KV_NF4};
static const char *const format_names[5] = {"bf16", "fp8", "int8", "int4", "nf4"};

static qf_kv_format codec_of(int format) { return (qf_kv_format)(QF_KV_FP8_E4M3 + (format - QF_CUDA_KV_FP8)); }

/* A row's bytes in the kernels' order; index: within its block. */
static void pack_row(int format, int head_dim, bool key, int index, const uint8_t *codes, uint8_t *row)
{
    memset(row, 0, (size_t)qf_kv_row_bytes(format, head_dim));
    for (int d = 0; d < head_dim; d++) {
        int place = key ? qf_kv_key_place(format, head_dim, d) : qf_kv_value_place(format, head_dim, index, d);
        if (qf_kv_row_bytes(format, head_dim) == head_dim) {
            row[place] = qf_kv_stored(format, codes[d]);
        } else {
            row[place / 2] = (uint8_t)(row[place / 2] | codes[d] << (place % 2 * 4));
        }
    }
}

/* Layout of a cache. */
struct Layout {
    int format, num_kv_heads, head_dim, block_size;
    size_t row_bytes() const { return (size_t)qf_cuda_kv_row_bytes((qf_cuda_kv_format)format, head_dim); }
    size_t words() const { return (size_t)qf_cuda_kv_words((qf_cuda_kv_format)format, head_dim); }
    size_t block_bytes() const
    {
        return (size_t)qf_cuda_kv_block_bytes((qf_cuda_kv_format)format, num_kv_heads, block_size, head_dim);
    }
    size_t code_at(int block, int head, int offset) const
    {
        return (size_t)block * block_bytes() + ((size_t)head * block_size + offset) * row_bytes();
    }
    size_t word_at(int block, int head, int offset) const
    {
        return (size_t)block * block_bytes() + (size_t)num_kv_heads * block_size * row_bytes() +
               ((size_t)head * block_size + offset) * words() * 2;
    }
};

/* --- the write -------------------------------------------------------------------------------------------------- */

/* Rows of all sizes: usual, zero, one outlier, tiny (steps that are not normal), huge, one sign. */
static float sample(Random &random, int style)
{
    float x = random.normal();
    switch (style) {
    case 1: return 0.0f;
    case 2: return random.below(40) == 0 ? x * 300.0f : x;
    case 3: return x * 1e-39f;
    case 4: return x * 1e36f;
    case 5: return fabsf(x) + 0.5f;
    case 6: return -fabsf(x) - 0.5f;
    case 7: return x * 1e-4f;
    case 9: return x * 0x1p-40f; /* on either side of where quotients are made another way */
    case 10: return x * 0x1p39f;
    default: return x * 3.0f;
    }
}

/* As the kernel does it, operation by operation. */
static void rotate_row(float *x, int head_dim, const float *cos_sin)
{
    const int half = head_dim / 2;
    for (int j = 0; j < half; j++) {
        float low = x[j], high = x[j + half], c = cos_sin[j], s = cos_sin[half + j];
        volatile float a = high * s, b = low * s;
        x[j] = fmaf(low, c, -a);
        x[j + half] = fmaf(high, c, b);
    }
}

static void test_write(int format, int num_heads, int num_kv_heads, int head_dim, int num_tokens, int num_splits,
                       int block_size)
{
    Random random((uint64_t)(format * 1000 + num_tokens * 10 + head_dim + num_splits));
    Layout at = {format, num_kv_heads, head_dim, block_size};
    int width = (num_heads + 2 * num_kv_heads) * head_dim, stride = width + 16, half = head_dim / 2;
    int num_blocks = num_tokens / block_size + 3;
    std::vector<float> qkv((size_t)num_splits * num_tokens * stride), cos_sin((size_t)num_tokens * head_dim);
    for (int t = 0; t < num_tokens; t++) {
        for (int h = 0; h < width / head_dim; h++) {
            int style = random.below(11);
            for (int d = 0; d < head_dim; d++) {
                for (int s = 0; s < num_splits; s++) {
                    qkv[((size_t)s * num_tokens + t) * stride + h * head_dim + d] = sample(random, style);
                }
            }
        }
        for (int j = 0; j < half; j++) {
            float angle = random.uniform() * 6.2831853f;
            cos_sin[(size_t)t * head_dim + j] = t == 0 ? 1.0f : cosf(angle);
            cos_sin[(size_t)t * head_dim + half + j] = t == 0 ? 0.0f : sinf(angle);
        }
    }
    std::vector<int32_t> slots((size_t)num_tokens), names((size_t)num_blocks * block_size);
    for (size_t i = 0; i < names.size(); i++) {
        names[i] = (int32_t)i;
        std::swap(names[i], names[(size_t)random.below((int)i + 1)]);
    }
    for (int t = 0; t < num_tokens; t++) {
        slots[(size_t)t] = num_tokens > 3 && t == 2 ? -1 : names[(size_t)t];
    }
    /* A 16-bit window of other blocks beside it, with its own slots: of tokens with a slot and without. */
    const bool windowed = num_tokens > 1 && num_tokens % 2 == 1;
    const int window_block_size = 16, window_blocks = num_tokens / window_block_size + 2;
    std::vector<int32_t> window_slots((size_t)num_tokens);
    for (int t = 0; t < num_tokens; t++) {
        window_slots[(size_t)t] = t % 5 == 1 ? -1 : (window_blocks * window_block_size - 1 - t);
    }
    std::vector<float> bias((size_t)num_kv_heads * head_dim);
    for (float &b : bias) {
        b = random.normal() * 20.0f;
    }
    std::vector<uint16_t> want_window[2];
    want_window[0].assign((size_t)window_blocks * num_kv_heads * window_block_size * head_dim, 0xffff);
    want_window[1] = want_window[0];
    std::vector<uint8_t> want[2];
    want[0].assign((size_t)num_blocks * at.block_bytes(), 0xff);
    want[1] = want[0];
    std::vector<uint16_t> want_q((size_t)num_tokens * num_heads * head_dim, 0xffff);
    for (int t = 0; t < num_tokens; t++) {
        for (int h = 0; h < width / head_dim; h++) {
            float x[128], y[128]; /* y: the window's */
            for (int d = 0; d < head_dim; d++) {
                x[d] = qkv[(size_t)t * stride + h * head_dim + d];
                for (int s = 1; s < num_splits; s++) {
                    x[d] = x[d] + qkv[((size_t)s * num_tokens + t) * stride + h * head_dim + d];
                }
            }
            const bool value = h >= num_heads + num_kv_heads;
            const int kv_head = h < num_heads ? 0 : (h - num_heads) % num_kv_heads;
            for (int d = 0; d < head_dim; d++) {
                y[d] = value ? x[d] : x[d] + bias[(size_t)kv_head * head_dim + d];
            }
            if (!value) {
                rotate_row(x, head_dim, &cos_sin[(size_t)t * head_dim]);
                rotate_row(y, head_dim, &cos_sin[(size_t)t * head_dim]);
            }
            if (h < num_heads) {
                for (int d = 0; d < head_dim; d++) {
                    want_q[((size_t)t * num_heads + h) * head_dim + d] = bf16_bits(x[d]);
                }
                continue;
            }
            for (int d = 0; d < head_dim && windowed && window_slots[(size_t)t] >= 0; d++) {
                int slot = window_slots[(size_t)t];
                size_t row = ((size_t)(slot / window_block_size) * num_kv_heads + kv_head) * window_block_size;
                want_window[value][(row + slot % window_block_size) * head_dim + d] = bf16_bits(y[d]);
            }
            if (slots[(size_t)t] < 0) {
                continue;
            }
            int block = slots[(size_t)t] / block_size, offset = slots[(size_t)t] % block_size;
            uint8_t codes[128];
            uint16_t words[4];
            qf_kv_encode_row(codec_of(format), x, head_dim, codes, words);
            pack_row(format, head_dim, !value, offset, codes, &want[value][at.code_at(block, kv_head, offset)]);
            memcpy(&want[value][at.word_at(block, kv_head, offset)], words, at.words() * 2);
        }
    }
    Device<float> device_qkv(qkv), device_cos_sin(cos_sin);
    Device<int32_t> device_slots(slots);
    Device<uint16_t> q(want_q.size());
    Device<uint8_t> k(want[0].size()), v(want[1].size());
    qf_cuda_rope_kv_write_args args = {};
    args.qkv = device_qkv.data;
    args.num_splits = num_splits;
    args.qkv_stride = stride;
    args.cos_sin = device_cos_sin.data;
    args.slot_mapping = device_slots.data;
    args.q = q.data;
    Device<float> device_bias(bias);
    Device<int32_t> device_window_slots(window_slots);
    Device<uint16_t> window_k(want_window[0].size()), window_v(want_window[0].size());
    args.kv = {k.data, v.data, block_size, num_kv_heads, head_dim, false, (qf_cuda_kv_format)format, device_bias.data};
    if (windowed) {
        args.window = {window_k.data,  window_v.data, window_block_size, num_kv_heads, head_dim, false,
                       QF_CUDA_KV_16, NULL};
        args.window_slot_mapping = device_window_slots.data;
    }
    args.num_tokens = num_tokens;
    args.num_heads = num_heads;
    CHECK_OK(qf_cuda_rope_kv_write(&args, &options.device, 0, &check_error));
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<uint16_t> got_q = q.get();
    std::vector<uint8_t> got[2] = {k.get(), v.get()};
    CHECK(got_q == want_q);
    CHECK(window_k.get() == want_window[0] && window_v.get() == want_window[1]);
    for (int value = 0; value < 2; value++) {
        size_t different = 0, first = 0;
        for (size_t i = 0; i < want[value].size(); i++) {
            if (got[value][i] != want[value][i] && different++ == 0) {
                first = i;
            }
        }
        if (different != 0) {
            fprintf(stderr, "%s %s of %d, %d tokens: %zu bytes differ, first %zu of %zu a block: %02x, not %02x\n",
                    format_names[format], value ? "values" : "keys", head_dim, num_tokens, different,
                    first % at.block_bytes(), at.block_bytes(), got[value][first], want[value][first]);
        }
        CHECK(different == 0);
    }
}

static void test_writes()
{
    for (int format : formats) {
        for (int head_dim : {64, 128}) {
            for (int tokens : {1, 2, 3, 7, 17, 130}) {
                test_write(format, head_dim == 64 ? 6 : 28, head_dim == 64 ? 2 : 4, head_dim, tokens,
                           1 + tokens % 3, tokens == 7 ? 16 : 32);
            }
            test_write(format, 3, 3, head_dim, 1500, 1, 128);
        }
    }
}

/* --- tables ------------------------------------------------------------------------------------------------------- */

static std::vector<float> inverse_frequencies(int head_dim)
{
    std::vector<float> inv_freq((size_t)head_dim / 2);
    for (int j = 0; j < head_dim / 2; j++) {
        inv_freq[(size_t)j] = (float)pow(1e6, -2.0 * j / head_dim);
    }
    return inv_freq;
}

struct Tables {
    Device<float> coarse, rotation;
    Device<uint16_t> fine;
    Tables(int head_dim, int max_positions, double factor)
        : coarse((size_t)((max_positions + QF_CUDA_BIAS_TILE - 1) / QF_CUDA_BIAS_TILE) * head_dim),
          rotation((size_t)QF_CUDA_BIAS_TILE * head_dim), fine((size_t)QF_CUDA_BIAS_TILE * head_dim)
    {
        Device<float> inv_freq(inverse_frequencies(head_dim));
        qf_cuda_kv_bias_tables_args args = {};
        args.inv_freq = inv_freq.data;
        args.factor = factor;
        args.coarse = coarse.data;
        args.fine = fine.data;
        args.rotation = rotation.data;
        args.num_tiles = (max_positions + QF_CUDA_BIAS_TILE - 1) / QF_CUDA_BIAS_TILE;
        args.head_dim = head_dim;
        CHECK_OK(qf_cuda_kv_bias_tables(&args, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
    }
};

static void test_tables()
{
    for (int head_dim : {64, 128}) {
        const int positions = 131072, half = head_dim / 2;
        const double factor = 1.1;
        Tables tables(head_dim, positions, factor);
        std::vector<float> inv_freq = inverse_frequencies(head_dim), coarse = tables.coarse.get();
        std::vector<float> rotation = tables.rotation.get();
        std::vector<uint16_t> fine = tables.fine.get();
        double worst = 0, worst_fine = 0;
        for (int n = 0; n < positions / QF_CUDA_BIAS_TILE; n++) {
            for (int j = 0; j < half; j++) {
                double angle = (double)n * QF_CUDA_BIAS_TILE * (double)inv_freq[(size_t)j];
                worst = std::max(worst, fabs(coarse[(size_t)n * head_dim + j] - factor * cos(angle)));
                worst = std::max(worst, fabs(coarse[(size_t)n * head_dim + half + j] - factor * sin(angle)));
            }
        }
        for (int i = 0; i < QF_CUDA_BIAS_TILE; i++) {
            for (int j = 0; j < half; j++) {
                double angle = (double)i * (double)inv_freq[(size_t)j];
                worst = std::max(worst, fabs(rotation[(size_t)i * head_dim + j] - cos(angle)));
                worst = std::max(worst, fabs(rotation[(size_t)i * head_dim + half + j] - sin(angle)));
                int r = i % 16 / 8 + 2 * (j % 4 / 2), lane = i % 8 * 4 + j % 16 / 4;
                angle = ((double)i + 0.5) * (double)inv_freq[(size_t)j];
                for (int part = 0; part < 2 && i < QF_CUDA_BIAS_TILE / 2; part++) {
                    size_t piece = ((size_t)(i / 16) * (head_dim / 32) + j / 16) * 2 + part;
                    __half_raw raw;
                    raw.x = fine[(piece * 32 + lane) * 8 + 2 * r + j % 2];
                    double got = (double)__half2float(__half(raw)) / (1 << QF_CUDA_BIAS_SHIFT);
                    double want = part == 0 ? cos(angle) - 1.0 : sin(angle);
                    worst_fine = std::max(worst_fine, fabs(got - want) - 5e-4 * fabs(want));
                }
                if (i == QF_CUDA_BIAS_TILE / 2 - 1) { /* (T - 1) / 2 */
                    float middle[2];
                    memcpy(middle, &fine[(size_t)QF_CUDA_BIAS_TILE / 2 * head_dim + 2 * j], sizeof(float));
                    memcpy(middle + 1, &fine[(size_t)QF_CUDA_BIAS_TILE / 2 * head_dim + 2 * (half + j)], sizeof(float));
                    worst = std::max(worst, std::max(fabs(middle[0] - cos(angle)), fabs(middle[1] - sin(angle))));
                }
            }
        }
        CHECK(worst < 1e-6);
        CHECK(worst_fine < 1e-10);
    }
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

enum BiasStyle { NO_BIAS, SPREAD, SLOW };

/* Sequences of known lengths, whose last position has the query. Keys and values are rows of a pool, encoded once. All
 * that no query may see is 0xff: NaN scales. */
struct World {
    qf_cuda_attention_shape shape;
    int format;
    double factor;
    std::vector<int> lengths;
    std::vector<uint16_t> q; /* [seq] (num_heads, head_dim) */
    std::vector<int32_t> tables, table_start;
    std::vector<uint16_t> choice; /* (positions of all, num_kv_heads): rows of the pool */
    std::vector<size_t> first_choice;
    std::vector<float> decoded[2], bias;
    std::vector<uint8_t> cache[2];
    std::vector<uint16_t> restored[2];
    int num_blocks;
    static const int pool_rows = 300;

    World(int format_, const int *model, int block_size, int window, const std::vector<int> &lens, BiasStyle style,
          float norm, double factor_, uint64_t seed)
        : shape{model[0], model[1], model[2], block_size, window}, format(format_), factor(factor_), lengths(lens)
    {
        Random random(seed);
        const int head_dim = shape.head_dim, num_kv_heads = shape.num_kv_heads;
        Layout at = {format, num_kv_heads, head_dim, block_size};
        std::vector<uint8_t> rows[2];
        std::vector<uint16_t> words[2];
        for (int value = 0; value < 2; value++) {
            decoded[value].resize((size_t)pool_rows * head_dim);
            rows[value].resize((size_t)pool_rows * 8 * at.row_bytes()); /* as they stand in rows i % 8 of a block */
            words[value].resize((size_t)pool_rows * at.words());
            for (int r = 0; r < pool_rows; r++) {
                float x[128], size = powf(2.0f, 2.0f * random.uniform() - 1.0f);
                uint8_t codes[128];
                for (int d = 0; d < head_dim; d++) {
                    x[d] = size * random.normal() * (d % 17 == 3 ? 3.0f : 1.0f);
                }
                uint16_t *word = &words[value][(size_t)r * at.words()];
                qf_kv_encode_row(codec_of(format), x, head_dim, codes, word);
                qf_kv_decode_row(codec_of(format), codes, word, head_dim, &decoded[value][(size_t)r * head_dim]);
                for (int i = 0; i < 8; i++) {
                    pack_row(format, head_dim, value == 0, i, codes, &rows[value][(size_t)(8 * r + i) * at.row_bytes()]);
                }
            }
        }
        num_blocks = 1;
        for (size_t s = 0; s < lens.size(); s++) {
            table_start.push_back((int)tables.size());
            int unseen = window > 0 ? std::max(0, lens[s] - window) : 0;
            for (int i = 0; i < (lens[s] + block_size - 1) / block_size; i++) {
                tables.push_back((i + 1) * block_size <= unseen ? 0 : num_blocks++);
            }
        }
        std::vector<int> names((size_t)num_blocks);
        for (int i = 1; i < num_blocks; i++) {
            names[(size_t)i] = i;
            std::swap(names[(size_t)i], names[(size_t)(1 + random.below(i))]);
        }
        for (int32_t &block : tables) {
            block = names[(size_t)block];
        }
        cache[0].assign((size_t)num_blocks * at.block_bytes(), 0xff);
        cache[1] = cache[0];
        for (size_t s = 0; s < lens.size(); s++) {
            first_choice.push_back(choice.size());
            int unseen = window > 0 ? std::max(0, lens[s] - window) : 0;
            for (int p = 0; p < lens[s]; p++) {
                int block = tables[(size_t)(table_start[s] + p / block_size)];
                for (int h = 0; h < num_kv_heads; h++) {
                    int r = random.below(pool_rows);
                    choice.push_back((uint16_t)r);
                    for (int value = 0; value < 2 && p >= unseen; value++) {
                        memcpy(&cache[value][at.code_at(block, h, p % block_size)],
                               &rows[value][(size_t)(8 * r + p % 8) * at.row_bytes()], at.row_bytes());
                        memcpy(&cache[value][at.word_at(block, h, p % block_size)],
                               &words[value][(size_t)r * at.words()], at.words() * 2);
                    }
                }
            }
        }
        q.resize(lens.size() * (size_t)shape.num_heads * head_dim);
        for (uint16_t &x : q) {
            x = bf16_bits(random.normal() * 1.5f);
        }
        bias.assign((size_t)num_kv_heads * head_dim, 0.0f);
        for (int h = 0; h < num_kv_heads && style != NO_BIAS; h++) {
            double sum = 0;
            for (int d = 0; d < head_dim; d++) {
                int j = d % (head_dim / 2), slow = head_dim / 2 - 1 - j;
                float x = style == SPREAD ? random.normal() : slow < 4 ? 1.0f + random.uniform() : 0.0f;
                bias[(size_t)h * head_dim + d] = x;
                sum += (double)x * x;
            }
            for (int d = 0; d < head_dim; d++) {
                bias[(size_t)h * head_dim + d] *= (float)(norm / sqrt(sum));
            }
        }
    }
    float scale() const { return (float)(1.0 / sqrt((double)shape.head_dim)); }
    int group() const { return shape.num_heads / shape.num_kv_heads; }
    const float *row(int value, int seq, int position, int kv_head) const
    {
        size_t r = choice[first_choice[(size_t)seq] + (size_t)position * shape.num_kv_heads + kv_head];
        return &decoded[value][r * shape.head_dim];
    }
    int begin_of(int seq) const
    {
        return shape.sliding_window > 0 ? std::max(0, lengths[(size_t)seq] - shape.sliding_window) : 0;
    }
    /* R_p(b) factor of a kv head. */
    void rotated_bias(int kv_head, const double *cosines, const double *sines, double *to) const
    {
        int half = shape.head_dim / 2;
        const float *b = &bias[(size_t)kv_head * shape.head_dim];
        for (int j = 0; j < half; j++) {
            to[j] = factor * (b[j] * cosines[j] - b[j + half] * sines[j]);
            to[j + half] = factor * (b[j + half] * cosines[j] + b[j] * sines[j]);
        }
    }
    /* Rows (head_dim) of these heads of one sequence. */
    std::vector<std::vector<double>> reference(int seq, const std::vector<int> &heads, double sign = 1.0) const
    {
        const int head_dim = shape.head_dim, half = head_dim / 2, end = lengths[(size_t)seq];
        std::vector<float> inv_freq = inverse_frequencies(head_dim);
        std::vector<std::vector<double>> scores(heads.size()), out;
        double cosines[64], sines[64], rotated[128];
        for (int p = begin_of(seq); p < end; p++) {
            for (int j = 0; j < half; j++) {
                double angle = (double)p * (double)inv_freq[(size_t)j];
                cosines[j] = cos(angle);
                sines[j] = sin(angle);
            }
            for (size_t i = 0; i < heads.size(); i++) {
                const uint16_t *query = &q[((size_t)seq * shape.num_heads + heads[i]) * head_dim];
                const float *key = row(0, seq, p, heads[i] / group());
                rotated_bias(heads[i] / group(), cosines, sines, rotated);
                double s = 0;
                for (int d = 0; d < head_dim; d++) {
                    s += (double)bf16_value(query[d]) * (key[d] + sign * rotated[d]);
                }
                scores[i].push_back(s * scale());
            }
        }
        for (size_t i = 0; i < heads.size(); i++) {
            double maximum = *std::max_element(scores[i].begin(), scores[i].end()), sum = 0;
            std::vector<double> x((size_t)head_dim, 0.0);
            for (int p = begin_of(seq); p < end; p++) {
                double w = exp(scores[i][(size_t)(p - begin_of(seq))] - maximum);
                const float *value = row(1, seq, p, heads[i] / group());
                sum += w;
                for (int d = 0; d < head_dim; d++) {
                    x[(size_t)d] += w * value[d];
                }
            }
            for (double &y : x) {
                y /= sum;
            }
            out.push_back(x);
        }
        return out;
    }
    /* The same keys, bias inside, and values in 16 bits. */
    void restore()
    {
        const int head_dim = shape.head_dim, half = head_dim / 2, block_size = shape.block_size;
        std::vector<float> inv_freq = inverse_frequencies(head_dim);
        restored[0].assign((size_t)num_blocks * shape.num_kv_heads * block_size * head_dim, 0xffff);
        restored[1] = restored[0];
        for (size_t s = 0; s < lengths.size(); s++) {
            for (int p = 0; p < lengths[s]; p++) {
                double cosines[64], sines[64], rotated[128];
                for (int j = 0; j < half; j++) {
                    double angle = (double)p * (double)inv_freq[(size_t)j];
                    cosines[j] = cos(angle);
                    sines[j] = sin(angle);
                }
                for (int h = 0; h < shape.num_kv_heads; h++) {
                    int block = tables[(size_t)(table_start[s] + p / block_size)];
                    size_t to = (((size_t)block * shape.num_kv_heads + h) * block_size + p % block_size) * head_dim;
                    rotated_bias(h, cosines, sines, rotated);
                    for (int d = 0; d < head_dim; d++) {
                        restored[0][to + d] = bf16_bits((float)(row(0, (int)s, p, h)[d] + rotated[d]));
                        restored[1][to + d] = bf16_bits(row(1, (int)s, p, h)[d]);
                    }
                }
            }
        }
    }
};

static qf_cuda_attention_args attention_args(const qf_cuda_attention_shape &shape, int tokens)
{
    qf_cuda_attention_args args = {};
    int width = shape.num_heads * shape.head_dim;
    args.shape = shape;
    args.out_k = (width + 127) / 128 * 128;
    args.num_tokens = tokens;
    args.scale = (float)(1.0 / sqrt((double)shape.head_dim));
    return args;
}

/* What the QKV linear made of each sequence's last token, and the caches in the end. */
struct OwnRows {
    int num_splits, stride;
    std::vector<float> qkv, cos_sin;
    std::vector<int32_t> slots;
    std::vector<uint8_t> cache[2];
    OwnRows(const World &w, int splits, uint64_t seed)
        : num_splits(splits), stride((w.shape.num_heads + 2 * w.shape.num_kv_heads) * w.shape.head_dim + 16)
    {
        Random random(seed);
        const int num = (int)w.lengths.size(), head_dim = w.shape.head_dim, block_size = w.shape.block_size;
        for (int s = 0; s < splits * num; s++) {
            for (int h = 0; h < stride / 16; h++) {
                const int style = random.below(12) == 0 ? 1 + random.below(2) : 8; /* zero, an outlier, or usual */
                for (int d = 0; d < 16; d++) {
                    qkv.push_back(sample(random, style));
                }
            }
        }
        for (int t = 0; t < num; t++) {
            std::vector<float> sines;
            for (int j = 0; j < head_dim / 2; j++) {
                const float angle = random.uniform() * 6.2831853f;
                cos_sin.push_back(cosf(angle));
                sines.push_back(sinf(angle));
            }
            cos_sin.insert(cos_sin.end(), sines.begin(), sines.end());
            const int position = w.lengths[(size_t)t] - 1;
            const int block = w.tables[(size_t)(w.table_start[(size_t)t] + position / block_size)];
            slots.push_back(t % 4 == 2 ? -1 : block * block_size + position % block_size); /* -1: it stays as it is */
        }
    }
};

/* Takes its time, and lets the next kernel start at once. */
static __global__ void copy_late(float *to, const float *from, int64_t count, int64_t wait)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int64_t start = clock64();
    while (clock64() - start < wait) {
    }
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        to[i] = from[i];
    }
}

/* Rows of `own` to attention, by a kernel of their own or by attention itself. Both kernels start before what they read is
 * there, if the device can do that. */
static void give_rows(const World &w, const OwnRows &own, bool in_kernel, float *qkv, const float *source, float *cos_sin,
                      const int32_t *slots, uint16_t *q, qf_cuda_attention_args *args)
{
    CHECK_CUDA(cudaMemset(qkv, 0xff, own.qkv.size() * sizeof(float)));
    CHECK_CUDA(cudaMemset(cos_sin, 0xff, own.cos_sin.size() * sizeof(float)));
    const bool dependent = options.device.dependent_launch;
    CHECK_OK(qf_launch("copy_late", copy_late, dim3(3), dim3(256), 0, false, 0, &check_error, cos_sin,
                       source + own.qkv.size(), (int64_t)own.cos_sin.size(), (int64_t)0));
    CHECK_OK(qf_launch("copy_late", copy_late, dim3(8), dim3(256), 0, dependent, 0, &check_error, qkv, source,
                       (int64_t)own.qkv.size(), (int64_t)20000));
    if (in_kernel) {
        args->qkv = qkv;
        args->qkv_splits = own.num_splits;
        args->qkv_stride = own.stride;
        args->cos_sin = cos_sin;
        args->slot_mapping = slots;
        return;
    }
    qf_cuda_rope_kv_write_args rope = {};
    rope.qkv = qkv;
    rope.num_splits = own.num_splits;
    rope.qkv_stride = own.stride;
    rope.cos_sin = cos_sin;
    rope.slot_mapping = slots;
    rope.q = q;
    rope.kv = args->kv;
    rope.num_tokens = (int)w.lengths.size();
    rope.num_heads = w.shape.num_heads;
    CHECK_OK(qf_cuda_rope_kv_write(&rope, &options.device, 0, &check_error));
}

/* One query a sequence: rows (num_seqs, num_heads * head_dim). in_16_bits: over restored. sign: of the bias given. own:
 * where queries and last rows come from, if not from the world. */
static std::vector<float> attend(const World &w, bool in_16_bits = false, float sign = 1.0f, OwnRows *own = NULL,
                                 bool in_kernel = false)
{
    const qf_cuda_attention_shape &shape = w.shape;
    int num = (int)w.lengths.size(), longest = *std::max_element(w.lengths.begin(), w.lengths.end());
    qf_cuda_attention_args args = attention_args(shape, num);
    std::vector<int32_t> loc = {0}, lens(w.lengths.begin(), w.lengths.end());
    for (int i = 1; i <= num; i++) {
        loc.push_back(i);
    }
    std::vector<qf_cuda_attention_item> planned(
        (size_t)qf_cuda_attention_max_items(&shape, num, num, longest));
    qf_cuda_attention_plan plan;
    qf_cuda_attention_plan_make(&shape, num, loc.data(), lens.data(), false, planned.data(), &plan);
    CHECK((shape.decode_ctas < 0 ? plan.num_decode_items : plan.num_prefill_items) == 0);
    planned.resize((size_t)(plan.num_decode_items + plan.num_prefill_items));
    std::vector<float> bias = w.bias;
    bool biased = false;
    for (float &b : bias) {
        biased |= b != 0.0f;
        b *= sign;
    }
    Tables tables(shape.head_dim, longest, w.factor);
    Device<float> device_bias(bias);
    Device<uint16_t> q(w.q), out((size_t)qf_cuda_tiled_size(args.out_k, num));
    Device<uint8_t> k(in_16_bits ? 16 : w.cache[0].size()), v(in_16_bits ? 16 : w.cache[0].size());
    Device<uint16_t> k16(in_16_bits ? w.restored[0].size() : 16), v16(in_16_bits ? w.restored[0].size() : 16);
    if (in_16_bits) {
        k16.put(w.restored[0]);
        v16.put(w.restored[1]);
    } else {
        k.put(w.cache[0]);
        v.put(w.cache[1]);
    }
    Device<qf_cuda_attention_item> items(planned);
    Device<int32_t> counts(std::vector<int32_t>{plan.num_decode_items, plan.num_prefill_items}), starts(w.table_start), tables_(w.tables);
    Device<float> workspace(qf_cuda_attention_workspace_bytes(&shape, num, num, longest) / 4);
    workspace.zero();
    args.kv = {in_16_bits ? (void *)k16.data : k.data,
               in_16_bits ? (void *)v16.data : v.data,
               shape.block_size,
               shape.num_kv_heads,
               shape.head_dim,
               false,
               in_16_bits ? QF_CUDA_KV_16 : (qf_cuda_kv_format)w.format,
               biased && !in_16_bits ? device_bias.data : NULL};
    args.q = q.data;
    args.out = out.data;
    args.items = items.data;
    args.num_items = counts.data;
    args.max_decode_items = plan.num_decode_items;
    args.max_prefill_items = plan.num_prefill_items;
    args.block_tables = tables_.data;
    args.block_table_start = starts.data;
    args.workspace = workspace.data;
    if (args.kv.k_bias != NULL) {
        args.bias_coarse = tables.coarse.data;
        args.bias_fine = tables.fine.data;
        args.bias_rotation = tables.rotation.data;
    }
    std::vector<float> rows_of_own(16);
    if (own != NULL) {
        rows_of_own = own->qkv;
        rows_of_own.insert(rows_of_own.end(), own->cos_sin.begin(), own->cos_sin.end());
        q.poison();
    }
    Device<float> source(rows_of_own), qkv(own != NULL ? own->qkv.size() : 16), cos_sin(own != NULL ? own->cos_sin.size() : 16);
    Device<int32_t> slots(own != NULL ? own->slots : std::vector<int32_t>(4));
    std::vector<uint16_t> tiled[2];
    for (std::vector<uint16_t> &to : tiled) {
        out.poison();
        if (own != NULL) {
            give_rows(w, *own, in_kernel, qkv.data, source.data, cos_sin.data, slots.data, q.data, &args);
        }
        CHECK_OK(qf_cuda_attention(&args, &options.device, 0, &check_error));
        CHECK_CUDA(cudaDeviceSynchronize());
        to = out.get();
    }
    CHECK(tiled[0] == tiled[1]); /* also: the counters were left at zero */
    if (own != NULL) {
        own->cache[0] = k.get();
        own->cache[1] = v.get();
    }
    int width = shape.num_heads * shape.head_dim, nonzero = 0;
    std::vector<float> rows((size_t)num * width);
    for (int t = 0; t < num; t++) {
        for (int i = 0; i < args.out_k; i++) {
            uint16_t x = tiled[0][tiled_index(i, t, num)];
            if (i < width) {
                rows[(size_t)t * width + i] = bf16_value(x);
            } else {
                nonzero += x != 0;
            }
        }
    }
    CHECK(nonzero == 0);
    return rows;
}

/* Some heads of each sequence: the reference, made once. */
struct Sampled {
    std::vector<std::vector<int>> heads;
    std::vector<std::vector<std::vector<double>>> want;
    Sampled(const World &w, uint64_t seed)
    {
        Random random(seed);
        for (size_t s = 0; s < w.lengths.size(); s++) {
            std::vector<int> h = {random.below(w.shape.num_heads), w.shape.num_heads - 1};
            heads.push_back(h);
            want.push_back(w.reference((int)s, h));
        }
    }
    /* The worst relative error of a row, and the root of the mean square. */
    double worst(const World &w, const std::vector<float> &rows, double *mean) const
    {
        double most = 0, sum = 0;
        int count = 0, width = w.shape.num_heads * w.shape.head_dim;
        for (size_t s = 0; s < heads.size(); s++) {
            for (size_t i = 0; i < heads[s].size(); i++) {
                const float *got = &rows[s * (size_t)width + (size_t)heads[s][i] * w.shape.head_dim];
                double e = relative_error(got, want[s][i], (size_t)w.shape.head_dim);
                most = e == e ? std::max(most, e) : INFINITY;
                sum += e * e;
                count++;
            }
        }
        *mean = sqrt(sum / count);
        return most;
    }
};

static const int models[][3] = {{28, 4, 128}, {14, 2, 64}, {40, 8, 128}, {6, 2, 64}, {12, 2, 128}, {16, 1, 128},
                                {10, 1, 64},  {3, 3, 64},  {2, 2, 128}};

#define LIMIT 8e-3 /* weights in bf16, twice, and the result's own rounding */

static void check_world(const World &w, uint64_t seed, double limit, const char *what)
{
    Sampled sampled(w, seed);
    double mean, worst = sampled.worst(w, attend(w), &mean);
    if (!(worst < limit)) {
        fprintf(stderr, "%s: %s, heads %d / %d of %d, blocks of %d, window %d, %zu sequences: error %g, mean %g\n",
                what, format_names[w.format], w.shape.num_heads, w.shape.num_kv_heads, w.shape.head_dim,
                w.shape.block_size, w.shape.sliding_window, w.lengths.size(), worst, mean);
    }
    CHECK(worst < limit);
}

static void test_shapes()
{
    const std::vector<int> all = {1,   2,   15,  16,  17,  31,  32,  33,   63,   64,   65,   127, 128,
                                  129, 255, 256, 257, 511, 512, 513, 700, 1024, 1500, 3001, 40,  9};
    uint64_t seed = 100;
    for (int format : formats) {
        int style = 0;
        for (const auto &m : models) {
            for (int block_size : {16, 32, 64, 128}) {
                if (check_brief && block_size != 32) {
                    continue;
                }
                std::vector<int> lens = all;
                Random random(seed);
                if (block_size != 16) {
                    lens.resize(block_size == 32 ? 5 : 1);
                    for (int &length : lens) {
                        length = 1 + random.below(block_size == 32 ? 2000 : 9000);
                    }
                }
                World w(format, m, block_size, 0, lens, (BiasStyle)(style % 3), 1.0f, style % 2 ? 1.0 : 1.15, seed++);
                check_world(w, seed, LIMIT, "shapes");
                style++;
            }
        }
    }
}

static void test_window()
{
    uint64_t seed = 500;
    for (int format : formats) {
        for (int window : {1, 5, 64, 100, 1000}) {
            const int *m = models[seed % 4];
            std::vector<int> lens = {1200, 1230, 1, 90, 2000};
            World w(format, m, window == 64 ? 128 : 16, window, lens, SPREAD, 1.0f, 1.0, seed++);
            check_world(w, seed, LIMIT, "window");
        }
    }
}

static void test_long()
{
    uint64_t seed = 700;
    for (int format : formats) {
        for (int hd128 = 0; hd128 < 2; hd128++) {
            if (check_brief && hd128 == 0) {
                continue;
            }
            int longest = format == QF_CUDA_KV_INT4 && hd128 ? 131072 : 20011;
            World w(format, models[hd128 ? 0 : 1], 32, 0, {check_brief ? 5000 : longest, 77}, SLOW, 30.0f, 1.0, seed++);
            check_world(w, seed, LIMIT, "long");
        }
    }
}

/* Biases of real models' sizes: the error must not be above that of the 16-bit kernel over the cache restored. */
static void test_biases()
{
    struct {
        BiasStyle style;
        float norm;
        double limit;
    } cases[] = {{NO_BIAS, 0.0f, LIMIT}, {SPREAD, 1.0f, LIMIT}, {SLOW, 30.0f, LIMIT},
                 {SPREAD, 30.0f, 1.2e-2}, {SLOW, 600.0f, 1.2e-2}, {SPREAD, 600.0f, 0.1}};
    printf("error against float64: worst and mean, low-bit | restored to 16 bits\n");
    uint64_t seed = 900;
    for (int format : formats) {
        for (int head_dim : {64, 128}) {
            for (const auto &c : cases) {
                std::vector<int> lens = {300, 511, 1024, 1500, 2048, 2900, 64, 700};
                World w(format, models[head_dim == 64 ? 1 : 0], 32, 0, lens, c.style, c.norm, 1.0, seed++);
                w.restore();
                Sampled sampled(w, seed);
                double mean, mean16, worst = sampled.worst(w, attend(w), &mean);
                double worst16 = sampled.worst(w, attend(w, true), &mean16);
                printf("  %-4s of %3d, bias %-6s norm %3.0f: %.2e %.2e | %.2e %.2e\n", format_names[format], head_dim,
                       c.style == SLOW ? "slow" : c.style == SPREAD ? "spread" : "none", (double)c.norm, worst, mean,
                       worst16, mean16);
                CHECK(worst < c.limit);
                CHECK(mean < (c.norm >= 30.0f ? 1.0 : 1.25) * mean16);
                if (c.norm >= 30.0f && c.style == SPREAD) { /* a wrong sign is seen: slow pairs' terms hardly differ
                                                               from position to position */
                    double wrong = sampled.worst(w, attend(w, false, -1.0f), &mean16);
                    CHECK(wrong > 5 * c.limit);
                }
            }
        }
    }
}

/* Devices of compute capability 8.0 and 8.6: fewer stages, or decode rows as tiles of the prefill kernel. */
static void test_little_shared_memory()
{
    const int32_t bytes = options.device.max_shared_bytes;
    for (int32_t few : {166912, 101376}) {
        options.device.max_shared_bytes = few;
        for (int format : formats) {
            const bool fits = qf_cuda_attention_decode_fits(&options.device, (qf_cuda_kv_format)format, 128);
            CHECK(few > 101376 || !fits);
            World w(format, models[0], 32, 0, {1, 700, 3000}, SPREAD, 1.0f, 1.0, 1100);
            w.shape.decode_ctas = fits ? options.device.sm_count : -1;
            check_world(w, 1101, fits ? LIMIT : 2 * LIMIT, "little shared memory");
        }
    }
    options.device.max_shared_bytes = bytes;
}

/* Attention that takes its rows from the QKV linear against a kernel for each: the same bits, in the cache too. */
static void check_own_rows(int format, const int *model, int block_size, int window, const std::vector<int> &lens,
                           int splits, uint64_t seed)
{
    World w(format, model, block_size, window, lens, seed % 4 == 3 ? NO_BIAS : SPREAD, 2.0f, 1.0, seed);
    OwnRows own(w, splits, seed);
    const std::vector<float> want = attend(w, false, 1.0f, &own, false);
    const std::vector<uint8_t> cache[2] = {own.cache[0], own.cache[1]};
    CHECK(cache[0] != w.cache[0] && cache[1] != w.cache[1]);
    const bool same = attend(w, false, 1.0f, &own, true) == want;
    if (!same || own.cache[0] != cache[0] || own.cache[1] != cache[1]) {
        fprintf(stderr, "own rows: %s, heads %d / %d of %d, blocks of %d, window %d, %zu sequences from %d, %d splits: %s\n",
                format_names[format], model[0], model[1], model[2], block_size, window, lens.size(), lens[0], splits,
                same ? "the cache differs" : "results differ");
    }
    CHECK(same && own.cache[0] == cache[0] && own.cache[1] == cache[1]);
}

static void test_own_rows()
{
    const int wide[][3] = {{28, 4, 128}, {40, 8, 128}, {12, 2, 128}, {16, 1, 128}, {2, 2, 128}, {16, 2, 128}, {32, 8, 128}};
    const qf_cuda_kv kv = {NULL, NULL, 32, 4, 128, false, QF_CUDA_KV_INT4, NULL};
    if (!qf_cuda_attention_takes_rows(&options.device, &kv)) {
        CHECK(!options.device.hopper);
        return;
    }
    std::vector<int> many;
    Random random(7);
    for (int i = 0; i < 33; i++) {
        many.push_back(1 + random.below(i % 8 == 0 ? 3000 : 200));
    }
    uint64_t seed = 1200;
    for (const auto &model : wide) {
        for (int block_size : {32, 64, 128}) {
            for (const std::vector<int> &lens : {std::vector<int>{1, 33, 64}, many, std::vector<int>{9000}}) {
                const int number = (int)seed++;
                check_own_rows(QF_CUDA_KV_INT4, model, block_size, number % 7 == 3 ? 100 : 0, lens, 1 + number % 5, seed);
            }
        }
    }
    for (int length : {1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 2048, 2049}) { /* one row, at all borders */
        for (int splits = 1; splits <= (check_brief ? 1 : 5); splits++) {
            check_own_rows(QF_CUDA_KV_INT4, models[0], length % 3 == 0 ? 64 : 32, 0, {length}, splits, seed++);
        }
    }
    if (!check_brief) {
        for (int i = 0; i < 4; i++) { /* CTAs with several items */
            check_own_rows(QF_CUDA_KV_INT4, models[0], 32, 0, {70001 + 64 * i, 5, 64, 33000 + i}, 1 + i, seed++);
        }
        std::vector<int> more;
        for (int i = 0; i < 400; i++) {
            more.push_back(many[(size_t)(i % 33)]);
        }
        check_own_rows(QF_CUDA_KV_INT4, models[0], 32, 0, more, 2, seed++); /* more rows than threads */
    }
}

/* What attention refuses of rows from the QKV linear. Nothing is launched. */
static void test_own_refusals()
{
    const qf_cuda_attention_shape shape = {28, 4, 128, 32, 0};
    qf_cuda_attention_args good = attention_args(shape, 1);
    void *const somewhere = (void *)4096;
    good.kv = {somewhere, somewhere, 32, 4, 128, false, QF_CUDA_KV_INT4, NULL};
    good.out = (uint16_t *)somewhere;
    good.items = (const qf_cuda_attention_item *)somewhere;
    good.num_items = good.block_tables = good.block_table_start = good.slot_mapping = (const int32_t *)somewhere;
    good.workspace = somewhere;
    good.qkv = good.cos_sin = (const float *)somewhere;
    good.qkv_splits = 1;
    good.qkv_stride = (28 + 8) * 128;
    qf_error error;
    const bool takes = qf_cuda_attention_takes_rows(&options.device, &good.kv);
    CHECK((qf_cuda_attention(&good, &options.device, 0, &error) == QF_OK) == takes);
    for (int i = 0; i < 9; i++) {
        qf_cuda_attention_args bad = good;
        switch (i) {
        case 0: bad.kv.format = QF_CUDA_KV_16; break;
        case 1: bad.max_prefill_items = 1; break;
        case 2: bad.cos_sin = NULL; break;
        case 3: bad.slot_mapping = NULL; break;
        case 4: bad.qkv = good.qkv + 1; break;
        case 5: bad.qkv_splits = 0; break;
        case 6: bad.qkv_stride -= 4; break;
        case 7: bad.kv.format = QF_CUDA_KV_FP8; break;
        default: bad.qkv_stride += 2; break;
        }
        CHECK(qf_cuda_attention(&bad, &options.device, 0, &error) == QF_ERROR_INVALID_ARGUMENT);
    }
    good.qkv = NULL; /* and no q either */
    CHECK(qf_cuda_attention(&good, &options.device, 0, &error) == QF_ERROR_INVALID_ARGUMENT);
}

/* --- timing ------------------------------------------------------------------------------------------------------- */

/* Random codes; scale words of one usual size. */
static __global__ void fill_cache(uint32_t *to, int64_t count, int64_t block_words, int64_t code_words, uint32_t scales)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u;
        x ^= x >> 15;
        x *= 2246822519u;
        x ^= x >> 13;
        to[i] = i % block_words < code_words ? x : scales;
    }
}

/* As the plan would, with `splits` splits of every row. */
static int even_items(std::vector<qf_cuda_attention_item> &items, int num_seqs, int length, int splits)
{
    const int chunk = (length + splits * 64 - 1) / (splits * 64) * 64, count = (length + chunk - 1) / chunk;
    items.clear();
    for (int i = 0; i < num_seqs * count; i++) {
        const int seq = i / count, split = i % count;
        items.push_back({seq, seq, 1, length - 1, split * chunk, std::min(length, (split + 1) * chunk), split, count,
                         seq * count, seq * count});
    }
    return (int)items.size();
}

/* What is timed: attention; after a kernel that stands for the QKV linear, which is timed too: that and attention with a
 * kernel for rotation and the write before it, or with its own rows. */
enum Chain { ALONE, ROPE_BEFORE, OWN_ROWS };

/* 3 us after the kernel before, with a multiprocessor's shared memory to itself. */
static __global__ void __launch_bounds__(256) stand_in_linear(float *to, int64_t count)
{
    qf_grid_launch_dependents();
    qf_grid_dependency_wait();
    const int64_t start = clock64();
    while (clock64() - start < 5000) {
    }
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        to[i] = (float)(i % 37 - 18) * 0.1f;
    }
}

/* splits: of every row, or 0: the plan's. */
static double bench_one(const int *model, int num_seqs, int length, int format, bool biased, int splits = 0,
                        Chain chain = ALONE)
{
    qf_cuda_attention_shape shape = {model[0], model[1], model[2], 32, 0};
    const int head_dim = shape.head_dim;
    shape.decode_ctas = options.device.sm_count * (format == QF_CUDA_KV_16 ? 2 : 1);
    qf_cuda_attention_args args = attention_args(shape, num_seqs);
    const int blocks = num_seqs * (length / 32);
    const int64_t block_bytes = format == QF_CUDA_KV_16 ? (int64_t)shape.num_kv_heads * 32 * head_dim * 2
                                                        : qf_cuda_kv_block_bytes((qf_cuda_kv_format)format,
                                                                                 shape.num_kv_heads, 32, head_dim);
    const int64_t bytes = blocks * block_bytes;
    const int copies = (int)(400000000 / (2 * bytes)) + 1;
    Device<uint8_t> cache((size_t)(2 * bytes * copies));
    const int64_t code_bytes = (int64_t)shape.num_kv_heads * 32 *
                               qf_cuda_kv_row_bytes((qf_cuda_kv_format)format, head_dim);
    if (format == QF_CUDA_KV_16) {
        CHECK_CUDA(cudaMemset(cache.data, 0x3c, cache.size));
    } else {
        fill_cache<<<1056, 256>>>((uint32_t *)cache.data, (int64_t)cache.size / 4, block_bytes / 4, code_bytes / 4,
                                  format == QF_CUDA_KV_INT4 ? 0x7a387a38u : 0x3c3c3c3cu);
    }
    Random random(1);
    std::vector<int32_t> loc = {0}, lens, starts, table;
    for (int s = 0; s < num_seqs; s++) {
        loc.push_back(s + 1);
        lens.push_back(length);
        starts.push_back(s * (length / 32));
    }
    for (int i = 0; i < blocks; i++) {
        table.push_back(i);
        std::swap(table[(size_t)i], table[(size_t)random.below(i + 1)]);
    }
    std::vector<qf_cuda_attention_item> planned(
        (size_t)qf_cuda_attention_max_items(&shape, num_seqs, num_seqs, length));
    qf_cuda_attention_plan plan;
    qf_cuda_attention_plan_make(&shape, num_seqs, loc.data(), lens.data(), false, planned.data(), &plan);
    if (splits > 0) {
        plan.num_decode_items = even_items(planned, num_seqs, length, splits);
    }
    std::vector<uint16_t> queries((size_t)num_seqs * shape.num_heads * head_dim);
    for (uint16_t &x : queries) {
        x = bf16_bits(random.normal());
    }
    std::vector<float> bias((size_t)shape.num_kv_heads * head_dim);
    for (float &b : bias) {
        b = random.normal();
    }
    Tables tables(head_dim, length, 1.0);
    Device<float> device_bias(bias);
    Device<uint16_t> q(queries), out((size_t)qf_cuda_tiled_size(args.out_k, num_seqs));
    Device<qf_cuda_attention_item> items(planned);
    Device<int32_t> counts(std::vector<int32_t>{plan.num_decode_items, 0}), device_starts(starts), device_table(table);
    Device<float> workspace(qf_cuda_attention_workspace_bytes(&shape, num_seqs, num_seqs, length) / 4);
    workspace.zero();
    args.q = q.data;
    args.out = out.data;
    args.items = items.data;
    args.num_items = counts.data;
    args.max_decode_items = plan.num_decode_items;
    args.block_tables = device_table.data;
    args.block_table_start = device_starts.data;
    args.workspace = workspace.data;
    args.bias_coarse = tables.coarse.data;
    args.bias_fine = tables.fine.data;
    args.bias_rotation = tables.rotation.data;
    const int n = (shape.num_heads + 2 * shape.num_kv_heads) * head_dim;
    const int qkv_splits = qf_cuda_linear_splits(&options.device, n, shape.num_heads * head_dim, 4, num_seqs, QF_CUDA_STORE,
                                                 false);
    Device<float> qkv((size_t)qkv_splits * num_seqs * n), cos_sin(std::vector<float>((size_t)num_seqs * head_dim, 0.7f));
    std::vector<int32_t> slots;
    for (int s = 0; s < num_seqs; s++) {
        slots.push_back(table[(size_t)((s + 1) * (length / 32) - 1)] * 32 + 31);
    }
    Device<int32_t> device_slots(slots);
    qf_cuda_rope_kv_write_args rope = {};
    rope.qkv = qkv.data;
    rope.num_splits = qkv_splits;
    rope.qkv_stride = n;
    rope.cos_sin = cos_sin.data;
    rope.slot_mapping = device_slots.data;
    rope.q = q.data;
    rope.num_tokens = num_seqs;
    rope.num_heads = shape.num_heads;
    const size_t shared_bytes = 160 * 1024;
    CHECK_OK(qf_allow_shared("stand-in", stand_in_linear, shared_bytes, &check_error));
    double us = time_us(
        [&](cudaStream_t stream, int i) {
            qf_cuda_attention_args a = args;
            uint8_t *k = cache.data + (int64_t)(i % copies) * 2 * bytes;
            a.kv = {k, k + bytes, 32, shape.num_kv_heads, head_dim, false, (qf_cuda_kv_format)format,
                    format != QF_CUDA_KV_16 && biased ? device_bias.data : NULL};
            if (chain != ALONE) {
                CHECK_OK(qf_launch("stand-in", stand_in_linear, dim3((unsigned)options.device.sm_count), dim3(256),
                                   shared_bytes, options.device.dependent_launch, stream, &check_error, qkv.data,
                                   (int64_t)qkv.size));
            }
            if (chain == ROPE_BEFORE) {
                rope.kv = a.kv;
                CHECK_OK(qf_cuda_rope_kv_write(&rope, &options.device, stream, &check_error));
            } else if (chain == OWN_ROWS) {
                a.qkv = qkv.data;
                a.qkv_splits = qkv_splits;
                a.qkv_stride = n;
                a.cos_sin = cos_sin.data;
                a.slot_mapping = device_slots.data;
            }
            CHECK_OK(qf_cuda_attention(&a, &options.device, stream, &check_error));
        },
        std::max(copies, 12), 9);
    CHECK_CUDA(cudaGetLastError());
    if (chain != ALONE) {
        return us;
    }
    printf("  %2d / %d of %3d, %3d x %6d  %-4s%s %9.1f us %7.1f MB %6.3f of 4.4 TB/s  (%d items)\n", shape.num_heads,
           shape.num_kv_heads, head_dim, num_seqs, length, format_names[format], biased ? "     " : " (nb)", us,
           2 * bytes * 1e-6, 2 * bytes / us * 1e-6 / 4.4, plan.num_decode_items);
    return us;
}

static void bench_own_rows()
{
    const int shapes[][2] = {{1, 131072}, {32, 8192}, {8, 32768}, {1, 32768}, {1, 8192}, {8, 1024}, {32, 512}};
    printf("int4 of 128: stand-in for the QKV linear, rope_kv_write, attention | the first, attention with its own rows\n");
    for (const auto &s : shapes) {
        double best[2] = {1e9, 1e9};
        for (int i = 0; i < 6; i++) {
            best[i % 2] = std::min(best[i % 2], bench_one(models[0], s[0], s[1], QF_CUDA_KV_INT4, true, 0,
                                                          i % 2 == 0 ? ROPE_BEFORE : OWN_ROWS));
        }
        printf("  %3d x %6d %8.2f | %8.2f us: %5.2f less\n", s[0], s[1], best[0], best[1], best[0] - best[1]);
    }
}

/* Rotation and the write, one kernel after the other. */
static void bench_writes()
{
    printf("rope_kv_write, 28 / 4 heads of 128, 3 splits: us of 1, 32 and 2,048 tokens\n");
    for (int format : formats) {
        printf("  %-4s", format_names[format]);
        for (int tokens : {1, 32, 2048}) {
            const int splits = tokens > 32 ? 1 : 3, stride = 36 * 128, block_size = 32;
            const size_t bytes = (size_t)(tokens / block_size + 1) *
                                 (size_t)qf_cuda_kv_block_bytes((qf_cuda_kv_format)format, 4, block_size, 128);
            Random random(3);
            std::vector<float> x((size_t)splits * tokens * stride);
            for (float &y : x) {
                y = random.normal();
            }
            std::vector<int32_t> slots;
            for (int t = 0; t < tokens; t++) {
                slots.push_back(t);
            }
            Device<float> qkv(x), cos_sin(std::vector<float>((size_t)tokens * 128, 0.7f));
            Device<int32_t> device_slots(slots);
            Device<uint16_t> q((size_t)tokens * 28 * 128);
            Device<uint8_t> k(bytes), v(bytes);
            qf_cuda_rope_kv_write_args args = {};
            args.qkv = qkv.data;
            args.num_splits = splits;
            args.qkv_stride = stride;
            args.cos_sin = cos_sin.data;
            args.slot_mapping = device_slots.data;
            args.q = q.data;
            args.kv = {k.data, v.data, block_size, 4, 128, false, (qf_cuda_kv_format)format, NULL};
            args.num_tokens = tokens;
            args.num_heads = 28;
            printf(" %8.2f", time_us(
                                 [&](cudaStream_t stream, int) {
                                     CHECK_OK(qf_cuda_rope_kv_write(&args, &options.device, stream, &check_error));
                                 },
                                 50, 15));
        }
        printf("\n");
    }
}

static void bench()
{
    const int shapes[][3] = {{0, 32, 8192}, {0, 1, 131072}, {0, 64, 2048}, {0, 8, 32768}, {1, 64, 2048}, {0, 1, 8192}};
    printf("decode attention, one layer, cold L2; (nb): no bias\n");
    for (const auto &s : shapes) {
        for (int format = 0; format < 5; format++) {
            bench_one(models[s[0]], s[1], s[2], format, true);
        }
        bench_one(models[s[0]], s[1], s[2], QF_CUDA_KV_INT4, false);
    }
}

/* How many splits are best. */
static void sweep()
{
    const int shapes[][3] = {{32, 8192, 1}, {32, 8192, 2}, {32, 8192, 3}, {32, 8192, 4}, {1, 131072, 33},
                             {1, 131072, 64}, {1, 131072, 66}, {1, 131072, 99}, {1, 131072, 132}, {64, 2048, 1},
                             {64, 2048, 2}, {64, 2048, 3}, {64, 2048, 4}};
    printf("splits of every row\n");
    for (const auto &s : shapes) {
        for (int format : {QF_CUDA_KV_16, QF_CUDA_KV_FP8, QF_CUDA_KV_INT4}) {
            bench_one(models[0], s[0], s[1], format, true, s[2]);
        }
    }
}

int main(int argc, char **argv)
{
    options = check_options(argc, argv);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--profile") == 0) { /* one shape, for a profiler; no check */
            bench_one(models[0], 32, 8192, QF_CUDA_KV_INT4, true);
            bench_one(models[0], 32, 8192, QF_CUDA_KV_FP8, true);
            return 0;
        }
        if (strcmp(argv[i], "--own") == 0) {
            test_own_rows();
            test_own_refusals();
            if (options.bench && options.device.hopper) {
                bench_own_rows();
            }
            return check_report("attention_lowbit, own rows");
        }
        if (strcmp(argv[i], "--sweep") == 0) {
            sweep();
            return 0;
        }
    }
    test_tables();
    test_writes();
    test_shapes();
    test_window();
    test_long();
    test_biases();
    test_little_shared_memory();
    test_own_rows();
    test_own_refusals();
    if (options.bench) {
        bench_writes();
        bench();
        if (options.device.hopper) {
            bench_own_rows();
        }
    }
    return check_report("attention_lowbit");
}
