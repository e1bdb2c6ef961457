/* Checkpoints written to a temporary folder, in every format that the loader reads, with random contents. */
#ifndef REPACK_CHECKPOINT_CUH
#define REPACK_CHECKPOINT_CUH

#include <dirent.h>
#include <unistd.h>

#include <string>

#include "check_cuda.cuh"

extern "C" {
#include "backend/cuda/weights_job.h"
#include "model/quantize.h"
}

enum Format { DENSE, AWQ, GPTQ, COMPRESSED };

struct Model {
    const char *name;
    int hidden, inter, heads, kv_heads, head_dim, vocab, layers;
    bool tied;
    qf_dtype dtype; /* of dense tensors */
    Format format;
    int bits, group; /* group -1: the whole row */
    bool symmetric, act_order, same_order, gptq_v2;
    qf_dtype scale_dtype;
    const char *dense; /* a linear left dense, or "" */
    bool extra_bias;   /* on all linears */
    int read_as_group; /* 0, or a group size that no parser lets through: the sources are changed after opening */
};

struct Writer {
    std::string header = "{";
    std::vector<uint8_t> data;
    Random random{7};

    void add(const std::string &name, const char *dtype, std::vector<int64_t> shape, const void *values, size_t bytes)
    {
        char text[256];
        std::string dims;
        for (int64_t d : shape) {
            dims += (dims.empty() ? "" : ",") + std::to_string(d);
        }
        snprintf(text, sizeof text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                 header.size() > 1 ? "," : "", name.c_str(), dtype, dims.c_str(), data.size(), data.size() + bytes);
        header += text;
        data.insert(data.end(), (const uint8_t *)values, (const uint8_t *)values + bytes);
    }

    void add_floats(const std::string &name, qf_dtype dtype, std::vector<int64_t> shape, const std::vector<float> &v)
    {
        std::vector<uint16_t> half(v.size());
        for (size_t i = 0; i < v.size(); i++) {
            half[i] = dtype == QF_DTYPE_F16 ? qf_f32_to_f16(v[i]) : qf_f32_to_bf16(v[i]);
        }
        if (dtype == QF_DTYPE_F32) {
            add(name, "F32", shape, v.data(), 4 * v.size());
        } else {
            add(name, qf_dtype_name(dtype), shape, half.data(), 2 * v.size());
        }
    }

    std::vector<float> normals(size_t count, float size)
    {
        std::vector<float> v(count);
        for (float &x : v) {
            x = size * random.normal();
        }
        return v;
    }

    /* With stretches of zeros, of one sign, and of one value: what the search of the quantiser treats apart. */
    std::vector<float> weights(size_t count)
    {
        std::vector<float> v = normals(count, 0.05f);
        for (size_t at = 0; at + 256 < count; at += 128 * (size_t)(1 + random.below(6))) {
            int kind = random.below(6);
            for (size_t i = at; i < at + 128; i++) {
                v[i] = kind == 0 ? 0.0f : kind == 1 ? fabsf(v[i]) : kind == 2 ? -fabsf(v[i])
                       : kind == 3 ? (i % 3 == 0 ? 0.375f : 0.0f) : kind == 4 ? v[i] * 1e-5f : v[i];
            }
        }
        return v;
    }

    void add_words(const std::string &name, int64_t rows, int64_t columns)
    {
        std::vector<uint32_t> words((size_t)(rows * columns));
        for (uint32_t &w : words) {
            w = random.bits();
        }
        add(name, "I32", {rows, columns}, words.data(), 4 * words.size());
    }

    void add_groups(const std::string &name, const Model &m, int k, int group, uint64_t seed)
    {
        std::vector<int32_t> groups((size_t)k);
        Random order(seed);
        for (int i = 0; i < k; i++) {
            groups[(size_t)i] = i / group;
        }
        for (int i = k - 1; i > 0 && m.act_order; i--) {
            std::swap(groups[(size_t)i], groups[(size_t)order.below(i + 1)]);
        }
        add(name, "I32", {k}, groups.data(), 4 * groups.size());
    }

    void add_linear(const Model &m, const std::string &name, int n, int k, bool bias)
    {
        if (bias || (m.extra_bias && m.format != DENSE)) {
            add_floats(name + ".bias", m.dtype, {n}, normals((size_t)n, 1.0f));
        }
        bool dense = m.dense[0] != 0 && name.find(m.dense) != std::string::npos;
        if (m.format == DENSE || dense || name == "lm_head") {
            add_floats(name + ".weight", m.dtype, {n, k}, weights((size_t)n * k));
            return;
        }
        int group = m.group < 0 || m.group > k ? k : m.group, per = 32 / m.bits;
        int64_t groups = (k + group - 1) / group;
        std::vector<float> scales((size_t)(groups * n));
        for (float &s : scales) {
            s = exp2f((float)-random.below(14)) * (0.01f + 0.01f * random.uniform());
        }
        uint64_t seed = m.same_order ? 3 : 3 + header.size();
        if (m.format == COMPRESSED) {
            add_words(name + ".weight_packed", n, (k + per - 1) / per);
            add_floats(name + ".weight_scale", m.scale_dtype, {n, groups}, scales);
            if (!m.symmetric) {
                add_words(name + ".weight_zero_point", (n + per - 1) / per, groups);
            }
            if (m.act_order) {
                add_groups(name + ".weight_g_idx", m, k, group, seed);
            }
            return;
        }
        if (m.format == AWQ) {
            add_words(name + ".qweight", k, n / 8);
        } else {
            add_words(name + ".qweight", k / per, n);
            add_groups(name + ".g_idx", m, k, group, seed);
        }
        if (m.format == GPTQ || !m.symmetric) {
            add_words(name + ".qzeros", groups, n / per);
        }
        add_floats(name + ".scales", m.scale_dtype, {groups, n}, scales);
    }

    void add_model(const Model &m)
    {
        int q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
        add_floats("model.embed_tokens.weight", m.dtype, {m.vocab, m.hidden}, weights((size_t)m.vocab * m.hidden));
        add_floats("model.norm.weight", m.dtype, {m.hidden}, normals((size_t)m.hidden, 1.0f));
        for (int i = 0; i < m.layers; i++) {
            std::string layer = "model.layers." + std::to_string(i) + ".";
            for (const char *norm : {"input_layernorm", "post_attention_layernorm"}) {
                add_floats(layer + norm + ".weight", m.dtype, {m.hidden}, normals((size_t)m.hidden, 1.0f));
            }
            add_linear(m, layer + "self_attn.q_proj", q, m.hidden, true);
            add_linear(m, layer + "self_attn.k_proj", kv, m.hidden, true);
            add_linear(m, layer + "self_attn.v_proj", kv, m.hidden, true);
            add_linear(m, layer + "self_attn.o_proj", m.hidden, q, false);
            add_linear(m, layer + "mlp.gate_proj", m.inter, m.hidden, false);
            add_linear(m, layer + "mlp.up_proj", m.inter, m.hidden, false);
            add_linear(m, layer + "mlp.down_proj", m.hidden, m.inter, false);
        }
        if (!m.tied) {
            add_linear(m, "lm_head", m.vocab, m.hidden, false);
        }
    }
};

static inline std::string quant_config(const Model &m)
{
    char text[512];
    const char *symmetric = m.symmetric ? "true" : "false";
    switch (m.format) {
    case DENSE: return "";
    case AWQ:
        snprintf(text, sizeof text, "{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":%d,\"zero_point\":%s}", m.group,
                 m.symmetric ? "false" : "true");
        break;
    case GPTQ:
        snprintf(text, sizeof text,
                 "{\"quant_method\":\"gptq\",\"bits\":%d,\"group_size\":%d,\"sym\":%s,\"desc_act\":%s,"
                 "\"checkpoint_format\":\"%s\"}",
                 m.bits, m.group, symmetric, m.act_order ? "true" : "false", m.gptq_v2 ? "gptq_v2" : "gptq");
        break;
    case COMPRESSED:
        snprintf(text, sizeof text,
                 "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"g\":"
                 "{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":%d,\"type\":\"int\",\"symmetric\":%s,"
                 "\"strategy\":\"%s\",\"group_size\":%d,\"actorder\":%s}}},\"ignore\":[\"lm_head\"]}",
                 m.bits, symmetric, m.group < 0 ? "channel" : "group", m.group, m.act_order ? "\"group\"" : "null");
        break;
    }
    return ",\"quantization_config\":" + std::string(text);
}

/* A folder that is removed with its files. */
struct Folder {
    char path[64] = "/tmp/qf_test_repack_XXXXXX";
    Folder() { CHECK(mkdtemp(path) != nullptr); }
    Folder(const Folder &) = delete;
    ~Folder()
    {
        for (const char *name : {"config.json", "model.safetensors"}) {
            unlink((std::string(path) + "/" + name).c_str());
        }
        CHECK(rmdir(path) == 0);
    }
    void write(const char *name, const void *a, size_t a_bytes, const void *b = nullptr, size_t b_bytes = 0)
    {
        FILE *file = fopen((std::string(path) + "/" + name).c_str(), "wb");
        CHECK(file != nullptr && fwrite(a, 1, a_bytes, file) == a_bytes);
        CHECK(file == nullptr || b_bytes == 0 || fwrite(b, 1, b_bytes, file) == b_bytes);
        CHECK(file != nullptr && fclose(file) == 0);
    }
    void write_config(const Model &m)
    {
        char text[1024];
        int bytes = snprintf(text, sizeof text,
                             "{\"model_type\":\"qwen2\",\"hidden_act\":\"silu\",\"vocab_size\":%d,\"hidden_size\":%d,"
                             "\"intermediate_size\":%d,\"num_hidden_layers\":%d,\"num_attention_heads\":%d,"
                             "\"num_key_value_heads\":%d,\"head_dim\":%d,\"max_position_embeddings\":128,"
                             "\"rms_norm_eps\":1e-6,\"rope_theta\":1e4,\"tie_word_embeddings\":%s,"
                             "\"torch_dtype\":\"bfloat16\"%s}",
                             m.vocab, m.hidden, m.inter, m.layers, m.heads, m.kv_heads, m.head_dim,
                             m.tied ? "true" : "false", quant_config(m).c_str());
        write("config.json", text, (size_t)bytes);
    }
    void write_model(const Model &m)
    {
        Writer w;
        w.add_model(m);
        w.header += "}";
        uint64_t size = w.header.size();
        std::string head((const char *)&size, 8);
        head += w.header;
        write("model.safetensors", head.data(), head.size(), w.data.data(), w.data.size());
        write_config(m);
    }
};

#endif
