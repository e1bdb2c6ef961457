/* Engine options: strings parsed, defaults resolved against the checkpoint and the machine, memory planned. */
#include <stdio.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"
#include "engine/engine.h"

#define MAX_SEQS_LIMIT 4096
#define MAX_BATCHED_TOKENS_LIMIT (1 << 20)
#define AUTO_UTILIZATION 0.5 /* of the machine's memory; where neither a share of the memory nor a size of the KV cache is given, and then ... */
#define AUTO_DEVICE_UTILIZATION 0.9 /* the same of a GPU's */
#define AUTO_KV_TOKENS 65536 /* ... the cache holds at most this many, or two of the longest sequences */

void qf_engine_options_init(qf_engine_options *options)
{
    *options = (qf_engine_options){.load_format = "auto",
                                   .device = "auto",
                                   .dtype = "auto",
                                   .activation_dtype = "auto",
                                   .quantization = "auto",
                                   .quantization_group_size = 128,
                                   .lm_head_dtype = "auto",
                                   .kv_cache_dtype = "auto",
                                   .block_size = 32,
                                   .max_num_seqs = 256,
                                   .max_num_batched_tokens = 2048,
                                   .tensor_parallel_size = 1,
                                   .enable_prefix_caching = true,
                                   .isa = "auto",
                                   .meter = true};
}

/* --- choices ------------------------------------------------------------------------------------------- */

typedef struct choice {
    const char *name;
    int value; /* NOT_BUILT: known, not implemented */
} choice;

enum { NOT_BUILT = -1 };

/* Finds `text` in the NULL-terminated list; an unknown value's message lists the known ones. */
static qf_status choose(const char *option, const char *text, const choice *choices, int *out, qf_error *err)
{
    char known[256] = "";
    for (const choice *c = choices; c->name != NULL; c++) {
        if (text != NULL && strcmp(text, c->name) == 0) {
            if (c->value == NOT_BUILT) {
                return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED, "%s=\"%s\" is not implemented yet", option, text);
            }
            *out = c->value;
            return QF_OK;
        }
        size_t used = strlen(known);
        (void)snprintf(known + used, sizeof known - used, "%s%s", used > 0 ? ", " : "", c->name);
    }
    return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s must be one of %s; got \"%.40s\"", option, known,
                   text != NULL ? text : "(null)");
}

static qf_status check_range(const char *option, int64_t value, int64_t low, int64_t high, qf_error *err)
{
    if (value < low || value > high) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%s must be %lld to %lld; got %lld", option, (long long)low,
                       (long long)high, (long long)value);
    }
    return QF_OK;
}

static qf_status check_numbers(const qf_engine_options *o, qf_error *err)
{
    QF_TRY(check_range("max_num_seqs", o->max_num_seqs, 1, MAX_SEQS_LIMIT, err));
    QF_TRY(check_range("max_num_batched_tokens", o->max_num_batched_tokens, 1, MAX_BATCHED_TOKENS_LIMIT, err));
    QF_TRY(check_range("max_model_len", o->max_model_len, 0, INT32_MAX, err));
    QF_TRY(check_range("num_threads", o->num_threads, 0, 1024, err));
    QF_TRY(check_range("max_steps_in_flight", o->max_steps_in_flight, 0, QF_MAX_STEPS_IN_FLIGHT, err));
    QF_TRY(check_range("max_waiting_requests", o->max_waiting_requests, 0, INT32_MAX, err));
    QF_TRY(check_range("kv_cache_tokens", o->kv_cache_tokens, 0, (int64_t)1 << 40, err));
    QF_TRY(check_range("tensor_parallel_size", o->tensor_parallel_size, 1, 1024, err));
    if (o->tensor_parallel_size > 1) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED, "tensor_parallel_size=%d is not implemented yet; it must be 1",
                       o->tensor_parallel_size);
    }
    if (o->block_size != 16 && o->block_size != 32 && o->block_size != 64 && o->block_size != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "block_size must be 16, 32, 64 or 128; got %d", o->block_size);
    }
    if (o->quantization_group_size != 32 && o->quantization_group_size != 64 && o->quantization_group_size != 128) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "quantization_group_size must be 32, 64 or 128; got %d",
                       o->quantization_group_size);
    }
    if (!(o->memory_utilization >= 0.0 && o->memory_utilization <= 1.0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "memory_utilization must be above 0 and at most 1 (or 0: not given); got %g",
                       o->memory_utilization);
    }
    if (!(o->cpu_offload_gb >= 0.0 && o->cpu_offload_gb <= 65536.0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "cpu_offload_gb must be 0 to 65536; got %g", o->cpu_offload_gb);
    }
    if (o->cpu_offload != NULL && strcmp(o->cpu_offload, "embeddings") != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "cpu_offload must be \"embeddings\" or not given; got \"%.40s\"",
                       o->cpu_offload);
    }
    if (o->memory_bytes > 0 && (o->memory_utilization > 0.0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "give memory (%llu bytes) or memory_utilization (%g), not both",
                       (unsigned long long)o->memory_bytes, o->memory_utilization);
    }
    if (o->kv_cache_tokens > 0 && o->kv_cache_memory_bytes > 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "give kv_cache_tokens (%lld) or kv_cache_memory (%llu bytes), not both",
                       (long long)o->kv_cache_tokens, (unsigned long long)o->kv_cache_memory_bytes);
    }
    return QF_OK;
}

/* --- numeric formats ----------------------------------------------------------------------------------- */

enum { AS_IS = 0, WANT_NONE, WANT_W4, WANT_AWQ, WANT_GPTQ, WANT_COMPRESSED_TENSORS };

static const char *method_name(qf_quant_method method)
{
    switch (method) {
    case QF_QUANT_NONE: return "none";
    case QF_QUANT_AWQ: return "awq";
    case QF_QUANT_GPTQ: return "gptq";
    case QF_QUANT_COMPRESSED_TENSORS: return "compressed-tensors";
    }
    return "?";
}

static qf_status resolve_quantization(const qf_engine_options *o, const qf_model_config *config,
                                      qf_resolved_options *out, bool *quantized, qf_error *err)
{
    static const choice choices[] = {{"auto", AS_IS},       {"none", WANT_NONE},
                                     {"w4", WANT_W4},       {"awq", WANT_AWQ},
                                     {"gptq", WANT_GPTQ},   {"compressed-tensors", WANT_COMPRESSED_TENSORS},
                                     {"w8", NOT_BUILT},     {"fp8", NOT_BUILT},
                                     {NULL, 0}};
    static const int wanted_for[] = {WANT_NONE, WANT_AWQ, WANT_GPTQ, WANT_COMPRESSED_TENSORS};
    int want;
    QF_TRY(choose("quantization", o->quantization, choices, &want, err));
    qf_quant_method method = config->quant.method;
    if (want == WANT_W4) {
        if (method != QF_QUANT_NONE) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "quantization=\"w4\" quantises a 16- or 32-bit checkpoint; this one is %s already",
                           method_name(method));
        }
        out->backend.quantize_bits = 4;
        out->quantization = "w4";
    } else {
        if (want != AS_IS && want != wanted_for[method]) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "quantization=\"%s\" does not fit the checkpoint, which is \"%s\"", o->quantization,
                           method_name(method));
        }
        out->quantization = method_name(method);
    }
    out->backend.quantize_group_size = o->quantization_group_size;
    *quantized = want == WANT_W4 || method != QF_QUANT_NONE;
    return QF_OK;
}

static qf_status resolve_formats(const qf_engine_options *o, const qf_model_config *config, bool on_device,
                                 qf_resolved_options *out, qf_error *err)
{
    enum { AUTO = 0, BF16, F32, I8 };
    static const choice dtypes[] = {{"auto", AUTO}, {"bfloat16", BF16}, {"float16", BF16},
                                    {"half", BF16}, {"float32", F32},   {"float", F32}, {NULL, 0}};
    static const choice activations[] = {{"auto", AUTO}, {"int8", I8}, {"float32", F32}, {NULL, 0}};
    static const choice heads[] = {{"auto", QF_HEAD_AUTO}, {"model", QF_HEAD_16}, {"int8", QF_HEAD_8},
                                   {"int4", QF_HEAD_4}, {NULL, 0}};
    static const choice kvs[] = {{"auto", AUTO},          {"bfloat16", BF16},      {"float32", F32},
                                 {"fp8", NOT_BUILT},      {"fp8_e4m3", NOT_BUILT}, {"fp8_e5m2", NOT_BUILT},
                                 {"int8", NOT_BUILT},     {"int4", NOT_BUILT},     {"nf4", NOT_BUILT},
                                 {NULL, 0}};
    int dtype, activation, head, kv;
    bool quantized = false;
    QF_TRY(choose("dtype", o->dtype, dtypes, &dtype, err));
    QF_TRY(choose("activation_dtype", o->activation_dtype, activations, &activation, err));
    QF_TRY(choose("lm_head_dtype", o->lm_head_dtype, heads, &head, err));
    QF_TRY(choose("kv_cache_dtype", o->kv_cache_dtype, kvs, &kv, err));
    QF_TRY(resolve_quantization(o, config, out, &quantized, err));

    bool float32 = dtype == F32 || (dtype == AUTO && config->dtype == QF_DTYPE_F32);
    bool kv_float32 = kv == AUTO ? float32 : kv == F32;
    bool int8 = activation == I8 || (activation == AUTO && quantized && dtype != F32);
    if (on_device) {
        if (kv_float32 != float32) {
            return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                           "kv_cache_dtype=\"%s\" with dtype=\"%s\" is not implemented on the GPU; leave it at \"auto\"",
                           o->kv_cache_dtype, float32 ? "float32" : "bfloat16");
        }
        if (activation == I8) {
            return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                           "activation_dtype=\"int8\" is not implemented on the GPU; leave it at \"auto\"");
        }
        int8 = false;
    }
    if (head == QF_HEAD_AUTO) {
        /* A tied 16-bit head is the embedding: kept on the GPU, it would make offloading save nothing. */
        bool apart = on_device && o->cpu_offload != NULL && config->tie_word_embeddings && !float32;
        head = (quantized && int8) || apart ? QF_HEAD_8 : QF_HEAD_16;
    }
    if (on_device && float32 && (head != QF_HEAD_16 || out->backend.quantize_bits != 0)) {
        return QF_FAIL(err, QF_ERROR_NOT_IMPLEMENTED,
                       "dtype=\"float32\" on the GPU is the reference and takes weights as they are: no "
                       "quantization=\"w4\", no lm_head_dtype=\"%s\"", o->lm_head_dtype);
    }
    out->backend.float32 = kv_float32;
    out->backend.int8_activations = int8;
    out->backend.head_bits = head;
    out->dtype = float32 ? "float32" : "bfloat16";
    out->activation_dtype = int8 ? "int8" : on_device && !float32 ? "bfloat16" : "float32";
    out->lm_head_dtype = head == QF_HEAD_8 ? "int8" : head == QF_HEAD_4 ? "int4" : "model";
    out->kv_cache_dtype = kv_float32 ? "float32" : "bfloat16";
    return QF_OK;
}

/* --- memory -------------------------------------------------------------------------------------------- */

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

/* The most tokens that a KV cache sized by a share of the memory holds: what all sequences can use, and where no
 * share was given, far less of a large machine. */
static int64_t most_tokens(const qf_engine_options *o, int32_t wanted_len)
{
    int64_t all_seqs = (int64_t)o->max_num_seqs * wanted_len;
    if (o->memory_utilization > 0.0 || o->memory_bytes > 0) {
        return all_seqs;
    }
    int64_t two_seqs = 2 * (int64_t)wanted_len;
    return min_i64(two_seqs > AUTO_KV_TOKENS ? two_seqs : AUTO_KV_TOKENS, all_seqs);
}

/* How many blocks the options ask for, before max_model_len is settled. */
static qf_status count_blocks(const qf_engine_options *o, int32_t wanted_len, double auto_share,
                              qf_resolved_options *out, qf_error *err)
{
    const qf_memory_plan *plan = &out->plan;
    uint64_t fixed = plan->embedding_bytes + plan->layers_bytes + plan->head_bytes + plan->workspace_bytes;
    int64_t blocks;
    if (o->kv_cache_tokens > 0) {
        blocks = ceil_div(o->kv_cache_tokens, o->block_size);
    } else if (o->kv_cache_memory_bytes > 0) {
        blocks = (int64_t)(o->kv_cache_memory_bytes / plan->kv_block_bytes);
        if (blocks < 1) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "kv_cache_memory of %llu bytes is less than one block of %d tokens, %zu bytes",
                           (unsigned long long)o->kv_cache_memory_bytes, o->block_size, plan->kv_block_bytes);
        }
    } else {
        double share = o->memory_utilization > 0.0 ? o->memory_utilization : auto_share;
        uint64_t budget = o->memory_bytes > 0 ? o->memory_bytes : (uint64_t)((double)out->available_bytes * share);
        uint64_t left = budget > fixed ? budget - fixed : 0;
        blocks = min_i64((int64_t)(left / plan->kv_block_bytes), ceil_div(most_tokens(o, wanted_len), o->block_size));
        blocks = min_i64(blocks, INT32_MAX / o->block_size);
        if (blocks < 1) {
            return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY,
                           "no memory is left for the KV cache: the budget is %llu bytes (%.0f %% of %llu available); "
                           "weights and workspace take %llu, one KV block %zu",
                           (unsigned long long)budget, 100.0 * (double)budget / (double)out->available_bytes,
                           (unsigned long long)out->available_bytes, (unsigned long long)fixed, plan->kv_block_bytes);
        }
    }
    double kv_bytes = (double)blocks * (double)plan->kv_block_bytes;
    bool limited = o->memory_bytes > 0 && o->memory_bytes < out->available_bytes;
    uint64_t limit = limited ? o->memory_bytes : out->available_bytes;
    if ((double)fixed + kv_bytes > (double)limit) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY,
                       "weights and workspace of %llu bytes and a KV cache of %.0f (%lld blocks of %zu) exceed %s%llu "
                       "bytes%s",
                       (unsigned long long)fixed, kv_bytes, (long long)blocks, plan->kv_block_bytes,
                       limited ? "memory=" : "the ", (unsigned long long)limit,
                       limited ? "" : " of memory that are available");
    }
    if (blocks > INT32_MAX / o->block_size) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "a KV cache of %lld blocks of %d tokens exceeds 2^31 tokens",
                       (long long)blocks, o->block_size);
    }
    out->num_blocks = (int32_t)blocks;
    return QF_OK;
}

static qf_status resolve_lengths(const qf_engine_options *o, const qf_model_config *config, double auto_share,
                                 qf_resolved_options *out, qf_error *err)
{
    int32_t limit = config->max_position_embeddings;
    if (o->max_model_len > limit) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "max_model_len %d exceeds the model's %d positions (rope_scaling extends them)",
                       o->max_model_len, limit);
    }
    int32_t wanted = o->max_model_len > 0 ? o->max_model_len : limit;
    QF_TRY(count_blocks(o, wanted, auto_share, out, err));
    int64_t capacity = (int64_t)out->num_blocks * o->block_size;
    if (capacity < wanted) {
        if (o->max_model_len > 0) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "max_model_len %d exceeds the KV cache's %lld tokens (%d blocks of %d)", wanted,
                           (long long)capacity, out->num_blocks, o->block_size);
        }
        wanted = (int32_t)capacity;
    }
    out->backend.max_model_len = wanted;
    return QF_OK;
}

qf_status qf_device_parse(const char *text, qf_device_choice *out, qf_error *err)
{
    static const choice devices[] = {
        {"auto", QF_DEVICE_AUTO}, {"cpu", QF_DEVICE_CPU}, {"cuda", QF_DEVICE_CUDA}, {"cuda:N", QF_DEVICE_CUDA}, {NULL, 0}};
    int kind;
    *out = (qf_device_choice){0};
    if (text != NULL && strncmp(text, "cuda:", 5) == 0 && text[5] >= '0' && text[5] <= '9' &&
        (text[6] == '\0' || (text[6] >= '0' && text[6] <= '9' && text[7] == '\0'))) {
        out->kind = QF_DEVICE_CUDA;
        out->ordinal = text[6] == '\0' ? text[5] - '0' : 10 * (text[5] - '0') + (text[6] - '0');
        return QF_OK;
    }
    QF_TRY(choose("device", text, devices, &kind, err));
    out->kind = (qf_device_kind)kind;
    return QF_OK;
}

/* A device knows its own memory; the CPU's is the machine's. */
static qf_status find_memory(const qf_engine_options *o, const qf_backend_vtable *backend, qf_resolved_options *out,
                             qf_error *err)
{
    if (backend->device_memory == NULL) {
        out->available_bytes = qf_available_memory_bytes();
        return QF_OK;
    }
    qf_device_choice device;
    QF_TRY(qf_device_parse(o->device, &device, err));
    out->backend.device_ordinal = device.ordinal;
    qf_device_memory memory;
    QF_TRY(backend->device_memory(&out->backend, &memory, err));
    out->available_bytes = memory.available_bytes;
    out->device_total_bytes = memory.total_bytes;
    out->device_overhead_bytes = memory.overhead_bytes;
    return QF_OK;
}

static qf_status check_offload(const qf_engine_options *o, const qf_backend_vtable *backend, qf_error *err)
{
    if (!backend->has_own_memory && (o->cpu_offload != NULL || o->cpu_offload_gb > 0.0)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "%s is for a GPU; on the CPU every weight is in host memory already",
                       o->cpu_offload != NULL ? "cpu_offload" : "cpu_offload_gb");
    }
    return QF_OK;
}

static qf_status open_checkpoint(const qf_engine_options *o, qf_checkpoint **checkpoint, qf_error *err)
{
    static const choice formats[] = {{"auto", 0}, {"safetensors", 0}, {"dummy", 1}, {NULL, 0}};
    int dummy;
    QF_TRY(choose("load_format", o->load_format, formats, &dummy, err));
    bool w4 = o->quantization != NULL && strcmp(o->quantization, "w4") == 0;
    qf_checkpoint_options options = {.dir = o->model_dir,
                                     .hf_overrides_json = o->hf_overrides_json,
                                     .dummy = dummy != 0,
                                     .dummy_seed = o->dummy_seed,
                                     .dummy_bits = w4 ? 4 : 16};
    return qf_checkpoint_open(&options, checkpoint, err);
}

/* The backend's plan, and on the CPU the step's arrays beside it. */
static qf_status plan_memory(const qf_backend_vtable *backend, const qf_checkpoint *checkpoint,
                             qf_resolved_options *out, qf_error *err)
{
    QF_TRY(backend->plan_memory(checkpoint, &out->backend, &out->plan, err));
    if (!backend->has_own_memory) {
        out->plan.workspace_bytes += QF_MAX_STEPS_IN_FLIGHT * qf_step_bytes(&out->backend);
    }
    return QF_OK;
}

qf_status qf_options_resolve(const qf_engine_options *options, const qf_backend_vtable *backend,
                             qf_checkpoint **checkpoint, qf_resolved_options *out, qf_error *err)
{
    qf_status status = QF_OK;
    *checkpoint = NULL;
    *out = (qf_resolved_options){0};
    if (options->model_dir == NULL || options->model_dir[0] == '\0') {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "model_dir must not be empty");
    }
    QF_TRY(check_numbers(options, err));
    QF_TRY(open_checkpoint(options, checkpoint, err));
    const qf_model_config *config = qf_checkpoint_config(*checkpoint);
    bool on_device = backend->has_own_memory;
    double auto_share = on_device ? AUTO_DEVICE_UTILIZATION : AUTO_UTILIZATION;
    QF_TRY_GOTO(check_offload(options, backend, err), fail);
    QF_TRY_GOTO(resolve_formats(options, config, on_device, out, err), fail);

    qf_backend_options *b = &out->backend;
    b->block_size = options->block_size;
    b->max_num_seqs = options->max_num_seqs;
    b->max_num_batched_tokens = options->max_num_batched_tokens;
    b->num_threads = options->num_threads > 0 ? options->num_threads : qf_cpu_count();
    b->isa = options->isa != NULL && strcmp(options->isa, "auto") != 0 ? options->isa : NULL;
    b->offload_embedding = options->cpu_offload != NULL;
    b->offload_layers_bytes = (size_t)(options->cpu_offload_gb * 1073741824.0);
    b->batch_invariant = options->batch_invariant;
    b->enforce_eager = options->enforce_eager;
    out->max_waiting_requests = options->max_waiting_requests;
    out->enable_prefix_caching = options->enable_prefix_caching;
    /* A CPU step takes milliseconds and the host's turn microseconds, so overlapping them gains nothing, while each
     * request that stops would waste a planned row: one step in flight unless asked otherwise. A GPU's step can be as
     * short as the host's turn. */
    int32_t steps = on_device ? QF_MAX_STEPS_IN_FLIGHT : 1;
    out->max_steps_in_flight = options->max_steps_in_flight > 0 ? options->max_steps_in_flight : steps;
    b->max_model_len = options->max_model_len > 0 ? options->max_model_len : config->max_position_embeddings;
    QF_TRY_GOTO(find_memory(options, backend, out, err), fail);
    QF_TRY_GOTO(plan_memory(backend, *checkpoint, out, err), fail);
    QF_TRY_GOTO(resolve_lengths(options, config, auto_share, out, err), fail);
    QF_TRY_GOTO(plan_memory(backend, *checkpoint, out, err), fail); /* for the length that was settled */
    return QF_OK;
fail:
    qf_checkpoint_close(*checkpoint);
    *checkpoint = NULL;
    return status;
}

void qf_memory_report_fill(const qf_resolved_options *resolved, qf_memory_report *out)
{
    *out = (qf_memory_report){.embedding_bytes = resolved->plan.embedding_bytes,
                              .layers_bytes = resolved->plan.layers_bytes,
                              .head_bytes = resolved->plan.head_bytes,
                              .workspace_bytes = resolved->plan.workspace_bytes,
                              .kv_cache_bytes = resolved->plan.kv_block_bytes * (uint64_t)resolved->num_blocks,
                              .kv_block_bytes = resolved->plan.kv_block_bytes,
                              .num_blocks = resolved->num_blocks,
                              .block_size = resolved->backend.block_size,
                              .max_model_len = resolved->backend.max_model_len,
                              .available_bytes = resolved->available_bytes,
                              .device_overhead_bytes = resolved->device_overhead_bytes,
                              .device_total_bytes = resolved->device_total_bytes};
}
