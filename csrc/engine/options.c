/* Engine options: checked, defaults resolved against the checkpoint and the machine, memory planned. */
/* needs: engine/options_formats.c kv/format.c backend/parallel.c */
#include <stdio.h>
#include <string.h>

#include "backend/parallel.h"
#include "base/memory.h"
#include "base/threads.h"
#include "engine/engine.h"
#include "engine/options.h"

#define MAX_SEQS_LIMIT 4096
#define MAX_BATCHED_TOKENS_LIMIT (1 << 20)
#define MAX_KV_WINDOW (1 << 20)
#define MAX_WATCHDOG_SECONDS 86400.0
#define WATCHDOG_SECONDS 1800.0 /* where none is given: a CPU may compute minutes at a step of a long prompt ... */
#define DEVICE_WATCHDOG_SECONDS 120.0 /* ... and a GPU seconds, or read layers over the bus as long */
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
                                   .tensor_parallel_comm = "auto",
                                   .watchdog_seconds = -1.0,
                                   .enable_prefix_caching = true,
                                   .isa = "auto",
                                   .meter = true};
}

/* --- checks ----------------------------------------------------------------------------------------------------- */

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
    QF_TRY(check_range("kv_cache_16bit_window", o->kv_cache_16bit_window, 0, MAX_KV_WINDOW, err));
    QF_TRY(check_range("kv_cache_tokens", o->kv_cache_tokens, 0, (int64_t)1 << 40, err));
    QF_TRY(check_range("tensor_parallel_size", o->tensor_parallel_size, 1, 1024, err));
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
    if (!(o->watchdog_seconds <= MAX_WATCHDOG_SECONDS)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "watchdog_seconds must be at most %.0f (0: off); got %g",
                       MAX_WATCHDOG_SECONDS, o->watchdog_seconds);
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
    uint64_t window = plan->kv_window_bytes;
    uint64_t fixed = plan->embedding_bytes + plan->layers_bytes + plan->head_bytes + plan->workspace_bytes + window;
    const char *fixed_name = window > 0 ? "weights, workspace and kv_cache_16bit_window" : "weights and workspace";
    int64_t blocks;
    if (o->kv_cache_tokens > 0) {
        blocks = ceil_div(o->kv_cache_tokens, o->block_size);
    } else if (o->kv_cache_memory_bytes > 0) {
        uint64_t left = o->kv_cache_memory_bytes > window ? o->kv_cache_memory_bytes - window : 0;
        blocks = (int64_t)(left / plan->kv_block_bytes);
        if (blocks < 1) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                           "kv_cache_memory of %llu bytes is less than one block of %d tokens, %zu bytes, and the 16-bit "
                           "window, %llu",
                           (unsigned long long)o->kv_cache_memory_bytes, o->block_size, plan->kv_block_bytes,
                           (unsigned long long)window);
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
                           "%s take %llu, one KV block %zu",
                           (unsigned long long)budget, 100.0 * (double)budget / (double)out->available_bytes,
                           (unsigned long long)out->available_bytes, fixed_name, (unsigned long long)fixed,
                           plan->kv_block_bytes);
        }
    }
    double kv_bytes = (double)blocks * (double)plan->kv_block_bytes;
    bool limited = o->memory_bytes > 0 && o->memory_bytes < out->available_bytes;
    uint64_t limit = limited ? o->memory_bytes : out->available_bytes;
    if ((double)fixed + kv_bytes > (double)limit) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY,
                       "%s of %llu bytes and a KV cache of %.0f (%lld blocks of %zu) exceed %s%llu bytes%s", fixed_name,
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
    static const qf_choice devices[] = {
        {"auto", QF_DEVICE_AUTO}, {"cpu", QF_DEVICE_CPU}, {"cuda", QF_DEVICE_CUDA}, {"cuda:N", QF_DEVICE_CUDA}, {NULL, 0}};
    int kind;
    *out = (qf_device_choice){0};
    if (text != NULL && strncmp(text, "cuda:", 5) == 0 && text[5] >= '0' && text[5] <= '9' &&
        (text[6] == '\0' || (text[6] >= '0' && text[6] <= '9' && text[7] == '\0'))) {
        out->kind = QF_DEVICE_CUDA;
        out->ordinal = text[6] == '\0' ? text[5] - '0' : 10 * (text[5] - '0') + (text[6] - '0');
        return QF_OK;
    }
    QF_TRY(qf_choose("device", text, devices, &kind, err));
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

/* Several ranks of the backend are a backend, too. */
static qf_status resolve_ranks(const qf_engine_options *o, const qf_backend_vtable *backend, qf_resolved_options *out,
                               qf_error *err)
{
    static const qf_choice comms[] = {
        {"auto", QF_RANK_COMM_AUTO}, {"peer", QF_RANK_COMM_PEER}, {"nccl", QF_RANK_COMM_NCCL}, {NULL, 0}};
    int comm;
    QF_TRY(qf_choose("tensor_parallel_comm", o->tensor_parallel_comm, comms, &comm, err));
    out->vtable = backend;
    out->backend.tensor_parallel_size = o->tensor_parallel_size;
    if (comm != QF_RANK_COMM_AUTO && (o->tensor_parallel_size == 1 || !backend->has_own_memory)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "tensor_parallel_comm=\"%.8s\" is for a model over several GPUs; device is %s, tensor_parallel_size "
                       "%d", o->tensor_parallel_comm, backend->name, o->tensor_parallel_size);
    }
    if (o->tensor_parallel_size > 1) {
        const double standard = backend->has_own_memory ? DEVICE_WATCHDOG_SECONDS : WATCHDOG_SECONDS;
        const double seconds = o->watchdog_seconds < 0.0 ? standard : o->watchdog_seconds;
        out->vtable = qf_parallel_backend_vtable(backend);
        out->backend.rank_backend = backend;
        out->backend.rank_comm = (qf_rank_comm)comm;
        out->backend.nccl_library = o->nccl_library;
        out->backend.step_timeout_ms = seconds > 0.0 && seconds < 1e-3 ? 1 : (int32_t)(seconds * 1e3);
    }
    return QF_OK;
}

static qf_status open_checkpoint(const qf_engine_options *o, qf_checkpoint **checkpoint, qf_error *err)
{
    static const qf_choice formats[] = {{"auto", 0}, {"safetensors", 0}, {"dummy", 1}, {NULL, 0}};
    int dummy;
    QF_TRY(qf_choose("load_format", o->load_format, formats, &dummy, err));
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
    QF_TRY_GOTO(resolve_ranks(options, backend, out, err), fail);
    backend = out->vtable;
    QF_TRY_GOTO(qf_options_resolve_formats(options, config, on_device, out, err), fail);

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
                              .kv_cache_bytes = resolved->plan.kv_block_bytes * (uint64_t)resolved->num_blocks +
                                                resolved->plan.kv_window_bytes,
                              .kv_window_bytes = resolved->plan.kv_window_bytes,
                              .kv_block_bytes = resolved->plan.kv_block_bytes,
                              .num_blocks = resolved->num_blocks,
                              .block_size = resolved->backend.block_size,
                              .max_model_len = resolved->backend.max_model_len,
                              .available_bytes = resolved->available_bytes,
                              .device_overhead_bytes = resolved->device_overhead_bytes,
                              .device_total_bytes = resolved->device_total_bytes};
}
