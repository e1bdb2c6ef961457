/* sources: base/status.c base/alloc.c base/dtype.c base/json.c model/config.c model/quant_config.c model/fields.c
 *          model/rope.c */
/* sanitizers: address */
/* config.json: what is read, with which defaults, and what is refused with which words. */
#include <math.h>
#include <stdlib.h>

#include "check.h"
#include "model/config.h"

#define MAX_TEXT 8192

/* A complete file; tests add members in front of the last brace or replace some by overrides. */
#define BASE                                                                                                        \
    "\"model_type\":\"qwen2\",\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_act\":\"silu\",\"vocab_size\":1000," \
    "\"hidden_size\":256,\"intermediate_size\":512,\"num_hidden_layers\":3,\"num_attention_heads\":4,"               \
    "\"num_key_value_heads\":2,\"max_position_embeddings\":2048,\"use_sliding_window\":false,"                       \
    "\"sliding_window\":1024,\"max_window_layers\":2,\"tie_word_embeddings\":true,\"rms_norm_eps\":1e-5"

static qf_status parse(const char *text, const char *overrides, qf_model_config *out, qf_error *err)
{
    qf_json_limits limits = qf_json_default_limits();
    qf_json *json = NULL;
    qf_json *over = NULL;
    qf_status status = qf_json_parse(text, strlen(text), &limits, "config.json", &json, err);
    if (status == QF_OK && overrides != NULL) {
        status = qf_json_parse(overrides, strlen(overrides), &limits, "hf_overrides", &over, err);
    }
    if (status == QF_OK) {
        status = qf_model_config_parse(qf_json_root(json), over != NULL ? qf_json_root(over) : NULL, out, err);
    }
    qf_json_destroy(over);
    qf_json_destroy(json);
    return status;
}

/* `members` follow BASE; `key` and `value` must be in the message. */
static void refuse_with(const char *members, const char *overrides, const char *key, const char *value)
{
    char text[MAX_TEXT];
    qf_error err = {0};
    qf_model_config config;
    (void)snprintf(text, sizeof text, "{" BASE "%s}", members);
    CHECK_STATUS(parse(text, overrides, &config, &err), QF_ERROR_MODEL);
    bool named = strstr(err.message, key) != NULL && strstr(err.message, value) != NULL;
    if (!named) {
        (void)fprintf(stderr, "%s | %s: message \"%s\"\n", members, overrides != NULL ? overrides : "", err.message);
    }
    CHECK(named);
}

static void accept(const char *members, const char *overrides, qf_model_config *out)
{
    char text[MAX_TEXT];
    qf_error err;
    (void)snprintf(text, sizeof text, "{" BASE "%s}", members);
    CHECK_OK(parse(text, overrides, out, &err));
}

static void test_plain(void)
{
    qf_model_config c;
    accept(",\"rope_theta\":1000000.0,\"torch_dtype\":\"bfloat16\"", NULL, &c);
    CHECK_INT(c.vocab_size, 1000);
    CHECK_INT(c.head_dim, 64);
    CHECK_INT(c.num_kv_heads, 2);
    CHECK_INT(c.max_position_embeddings, 2048);
    CHECK(c.rms_norm_eps == 1e-5f && c.rope.theta == 1e6 && c.tie_word_embeddings);
    CHECK(!c.rope.yarn && c.rope.attention_factor == 1.0);
    CHECK_INT(c.dtype, QF_DTYPE_BF16);
    CHECK_INT(c.sliding_window, 0); /* it is off, whatever "sliding_window" says */
    CHECK(!qf_model_config_layer_slides(&c, 2));
    CHECK_INT(c.quant.method, QF_QUANT_NONE);
}

static void test_new_spelling(void)
{
    qf_model_config c;
    accept(",\"rope_parameters\":{\"rope_theta\":10000.0,\"rope_type\":\"default\"},\"dtype\":\"float16\","
           "\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\"]", NULL, &c);
    CHECK(c.rope.theta == 10000.0);
    CHECK_INT(c.dtype, QF_DTYPE_F16);
    refuse_with(",\"rope_theta\":5.0,\"rope_parameters\":{\"rope_theta\":6.0}", NULL, "rope_theta", "6");
    refuse_with(",\"rope_theta\":5.0,\"layer_types\":[\"full_attention\",\"full_attention\",\"sliding_attention\"]",
                NULL, "layer_types", "sliding_attention");
    refuse_with(",\"rope_theta\":5.0,\"layer_types\":[\"full_attention\"]", NULL, "layer_types", "a list of 1");
}

static void test_overrides(void)
{
    qf_model_config c;
    accept(",\"rope_theta\":5.0", "{\"rope_theta\":7.0,\"num_key_value_heads\":null,\"dtype\":\"float32\"}", &c);
    CHECK(c.rope.theta == 7.0);
    CHECK_INT(c.num_kv_heads, 4); /* removed: the default, the number of heads */
    accept(",\"rope_parameters\":{\"rope_theta\":9.0,\"rope_type\":\"default\"}",
           "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":100}}", &c);
    CHECK(c.rope.theta == 9.0 && c.rope.yarn);
    CHECK_INT(c.max_position_embeddings, 400);
    accept(",\"rope_theta\":9.0,\"rope_scaling\":{\"type\":\"yarn\"}", "{\"rope_scaling\":null}", &c);
    CHECK(!c.rope.yarn);
    accept(",\"rope_theta\":9.0", "{\"rope_parameters\":{\"rope_theta\":11.0}}", &c);
    CHECK(c.rope.theta == 11.0);
}

static void test_sliding_window(void)
{
    qf_model_config c;
    accept(",\"rope_theta\":5.0", "{\"use_sliding_window\":true}", &c);
    CHECK_INT(c.sliding_window, 1024);
    CHECK(!qf_model_config_layer_slides(&c, 1));
    CHECK(qf_model_config_layer_slides(&c, 2));
    accept(",\"rope_theta\":5.0", "{\"use_sliding_window\":true,\"sliding_window\":null}", &c);
    CHECK_INT(c.sliding_window, 0);
}

static void test_required_and_ranges(void)
{
    static const char *const required[] = {"model_type", "vocab_size", "hidden_size", "intermediate_size",
                                           "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                                           "rope_theta"};
    for (size_t i = 0; i < sizeof required / sizeof required[0]; i++) {
        char overrides[128];
        (void)snprintf(overrides, sizeof overrides, "{\"%s\":null}", required[i]);
        refuse_with(strcmp(required[i], "rope_theta") == 0 ? "" : ",\"rope_theta\":5.0", overrides, required[i],
                    "missing");
    }
    static const char *const wrong[][3] = {
        {"model_type", "\"qwen3\"", "qwen3"},
        {"architectures", "[\"Qwen2ForSequenceClassification\"]", "Qwen2ForSequenceClassification"},
        {"architectures", "\"Qwen2ForCausalLM\"", "Qwen2ForCausalLM"},
        {"auto_map", "{\"AutoModel\":\"x.Y\"}", "an object of 1"},
        {"trust_remote_code", "true", "true"},
        {"use_mrope", "true", "true"},
        {"hidden_act", "\"gelu\"", "gelu"},
        {"vocab_size", "0", "0"},
        {"vocab_size", "-5", "-5"},
        {"vocab_size", "99999999999", "99999999999"},
        {"vocab_size", "1000.0", "1000"},
        {"hidden_size", "\"256\"", "\"256\""},
        {"hidden_size", "255", "255"},
        {"num_key_value_heads", "3", "3"},
        {"num_attention_heads", "256", "1"},
        {"head_dim", "65", "65"},
        {"head_dim", "512", "512"},
        {"num_hidden_layers", "1025", "1024"},
        {"max_position_embeddings", "2147483648", "2147483647"},
        {"rms_norm_eps", "0", "0"},
        {"rms_norm_eps", "\"1e-6\"", "1e-6"},
        {"tie_word_embeddings", "1", "true or false"},
        {"torch_dtype", "\"int8\"", "int8"},
        {"rope_theta", "1", "1"},
        {"rope_scaling", "\"yarn\"", "yarn"},
        {"rope_scaling", "{\"type\":\"linear\",\"factor\":2}", "linear"},
        {"rope_scaling", "{\"rope_type\":\"dynamic\",\"factor\":2}", "dynamic"},
        {"rope_scaling", "{\"rope_type\":\"longrope\"}", "longrope"},
        {"rope_scaling", "{\"type\":\"mrope\"}", "mrope"},
        {"rope_scaling", "{\"type\":\"yarn\",\"rope_type\":\"default\"}", "yarn"},
        {"rope_scaling", "{\"type\":\"yarn\",\"original_max_position_embeddings\":8}", "factor"},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4}", "original_max_position_embeddings"},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":0.5,\"original_max_position_embeddings\":8}", "0.5"},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":2000000000}", "factor"},
        {"quantization_config", "[]", "a list of 0"},
        {"use_sliding_window", "\"no\"", "no"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        char overrides[256];
        (void)snprintf(overrides, sizeof overrides, "{\"%s\":%s}", wrong[i][0], wrong[i][1]);
        refuse_with(",\"rope_theta\":5.0", overrides, i == 14 ? "head" : wrong[i][0], wrong[i][2]);
    }
}

static void test_dual_chunk(void)
{
    qf_model_config c;
    accept(",\"rope_theta\":5.0,\"dual_chunk_attention_config\":{\"original_max_position_embeddings\":512}", NULL, &c);
    CHECK_INT(c.max_position_embeddings, 512);
}

static void check_close(float actual, double expected) { CHECK(fabs((double)actual / expected - 1.0) < 1e-7); }

/* Values from the published formula, computed apart in double precision. */
static void test_yarn(void)
{
    float inv_freq[64]; /* (head_dim / 2) */
    qf_model_config c;
    accept(",\"rope_theta\":1000000.0", "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0,"
           "\"original_max_position_embeddings\":32768}}", &c);
    CHECK_INT(c.max_position_embeddings, 131072);
    CHECK(fabs(c.rope.attention_factor - 1.138629436111989) < 1e-14);
    qf_rope_inv_freq(&c.rope, 128, inv_freq);
    check_close(inv_freq[0], 1.0);
    check_close(inv_freq[23], 6.978305848598663e-3);
    check_close(inv_freq[24], 5.375321490790102e-3);
    check_close(inv_freq[31], 8.029597275452302e-4);
    check_close(inv_freq[40], 4.445698525097307e-5);
    check_close(inv_freq[63], 3.102344401879299e-7);
    qf_rope_inv_freq(&c.rope, 64, inv_freq);
    check_close(inv_freq[12], 5.154795480911533e-3);
    check_close(inv_freq[31], 3.84981631514873e-7);
    c.rope.yarn = false;
    qf_rope_inv_freq(&c.rope, 128, inv_freq);
    check_close(inv_freq[32], 1e-3);
    accept(",\"rope_theta\":1000000.0", "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,"
           "\"original_max_position_embeddings\":32768,\"attention_factor\":1.5}}", &c);
    CHECK(c.rope.attention_factor == 1.5);
}

static qf_status parse_quant(const char *text, qf_quant_config *out, qf_error *err)
{
    qf_json_limits limits = qf_json_default_limits();
    qf_json *json = NULL;
    qf_status status = qf_json_parse(text, strlen(text), &limits, "quantization_config", &json, err);
    if (status == QF_OK) {
        status = qf_quant_config_parse(qf_json_root(json), out, err);
    }
    qf_json_destroy(json);
    return status;
}

#define CT(weights, more)                                                                                           \
    "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"ignore\":[\"lm_head\"],"               \
    "\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"],\"weights\":{" weights "}}}" more "}"
#define CT4 "\"num_bits\":4,\"type\":\"int\",\"symmetric\":true,\"strategy\":\"group\",\"group_size\":128"
#define CT_GROUPS(groups) \
    "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{" groups "}}"

static void test_quant_accepted(void)
{
    static const struct {
        const char *text;
        int method, bits, group_size, symmetric, desc_act, gptq_v2, num_ignore;
    } cases[] = {
        {"{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"version\":\"gemm\",\"zero_point\":true}",
         QF_QUANT_AWQ, 4, 128, 0, 0, 0, 0},
        {"{\"zero_point\":false,\"q_group_size\":64,\"w_bit\":4,\"version\":\"GEMM\"}",
         QF_QUANT_AWQ, 4, 64, 1, 0, 0, 0},
        {"{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":-1,\"modules_to_not_convert\":[\"a\",\"b\"]}",
         QF_QUANT_AWQ, 4, -1, 0, 0, 0, 2},
        {"{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":32,\"desc_act\":true,\"sym\":false,"
         "\"checkpoint_format\":\"gptq_v2\"}", QF_QUANT_GPTQ, 8, 32, 0, 1, 1, 0},
        {"{\"bits\":4,\"group_size\":128,\"desc_act\":false}", QF_QUANT_GPTQ, 4, 128, 1, 0, 0, 0},
        {CT(CT4, ""), QF_QUANT_COMPRESSED_TENSORS, 4, 128, 1, 0, 0, 1},
        {CT("\"num_bits\":8,\"strategy\":\"channel\"", ",\"kv_cache_scheme\":null"), QF_QUANT_COMPRESSED_TENSORS, 8, -1,
         1, 0, 0, 1},
        {CT(CT4 ",\"actorder\":\"group\"", ""), QF_QUANT_COMPRESSED_TENSORS, 4, 128, 1, 1, 0, 1},
        {CT(CT4 ",\"actorder\":\"static\"", ""), QF_QUANT_COMPRESSED_TENSORS, 4, 128, 1, 0, 0, 1},
        {CT_GROUPS("\"W4A16\":[\"Linear\"]"), QF_QUANT_COMPRESSED_TENSORS, 4, 128, 1, 0, 0, 0},
        {CT_GROUPS("\"W8A16\":[\"Linear\"]"), QF_QUANT_COMPRESSED_TENSORS, 8, -1, 1, 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qf_error err;
        qf_quant_config c;
        CHECK_OK(parse_quant(cases[i].text, &c, &err));
        CHECK_INT(c.method, cases[i].method);
        CHECK_INT(c.bits, cases[i].bits);
        CHECK_INT(c.group_size, cases[i].group_size);
        CHECK_INT(c.symmetric, cases[i].symmetric);
        CHECK_INT(c.desc_act, cases[i].desc_act);
        CHECK_INT(c.gptq_v2, cases[i].gptq_v2);
        CHECK_INT(c.num_ignore, cases[i].num_ignore);
    }
}

static void test_quant_refused(void)
{
    static const char *const cases[][2] = {
        {"{\"quant_method\":\"fp8\"}", "fp8"},
        {"{\"quant_method\":\"bitsandbytes\"}", "bitsandbytes"},
        {"{\"load_in_4bit\":true}", "quant_method"},
        {"{\"quant_method\":\"awq\",\"bits\":8,\"group_size\":128}", "bits"},
        {"{\"quant_method\":\"awq\",\"bits\":4}", "group_size"},
        {"{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"version\":\"gemv\"}", "gemv"},
        {"{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"modules_to_not_convert\":[1]}", "modules"},
        {"{\"quant_method\":\"gptq\",\"bits\":3,\"group_size\":128}", "bits"},
        {"{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":0}", "group_size"},
        {"{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"checkpoint_format\":\"marlin\"}", "marlin"},
        {"{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"checkpoint_format\":\"bitblas\"}", "bitblas"},
        {"{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"is_marlin_format\":true}", "is_marlin_format"},
        {"{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"dynamic\":{\"+:x\":{}}}", "dynamic"},
        {"{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"checkpoint_format\":\"gptq\",\"format\":"
         "\"gptq_v2\"}", "format"},
        {CT(CT4, ",\"kv_cache_scheme\":{\"num_bits\":8}"), "kv_cache_scheme"},
        {CT("\"num_bits\":4,\"type\":\"float\",\"strategy\":\"group\",\"group_size\":128", ""), "float"},
        {CT("\"num_bits\":4,\"strategy\":\"tensor\"", ""), "tensor"},
        {CT("\"num_bits\":4,\"strategy\":\"group\"", ""), "group_size"},
        {CT(CT4 ",\"actorder\":\"sideways\"", ""), "sideways"},
        {CT(CT4 ",\"dynamic\":true", ""), "dynamic"},
        {"{\"quant_method\":\"compressed-tensors\",\"format\":\"marlin-24\"}", "marlin-24"},
        {CT_GROUPS(""), "config_groups"},
        {CT_GROUPS("\"W8A8\":[\"Linear\"]"), "W8A8"},
        {CT_GROUPS("\"W4A16\":[\"Conv\"]"), "W4A16"},
        {CT_GROUPS("\"W4A16\":[\"Linear\"],\"W8A16\":[\"Linear\"]"), "differs"},
        {CT_GROUPS("\"g\":{\"targets\":[\"Linear\"],\"weights\":{" CT4 "},\"input_activations\":{\"num_bits\":8}}"),
         "input_activations"},
        {CT_GROUPS("\"g\":{\"targets\":[\"re:.*\"],\"weights\":{" CT4 "}}"), "targets"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qf_error err = {0};
        qf_quant_config c;
        CHECK_STATUS(parse_quant(cases[i][0], &c, &err), QF_ERROR_MODEL);
        if (strstr(err.message, cases[i][1]) == NULL) {
            (void)fprintf(stderr, "%s: \"%s\" without %s\n", cases[i][0], err.message, cases[i][1]);
        }
        CHECK(strstr(err.message, cases[i][1]) != NULL);
    }
}

int main(void)
{
    RUN(test_plain);
    RUN(test_new_spelling);
    RUN(test_overrides);
    RUN(test_sliding_window);
    RUN(test_required_and_ranges);
    RUN(test_dual_chunk);
    RUN(test_yarn);
    RUN(test_quant_accepted);
    RUN(test_quant_refused);
    return check_report();
}
