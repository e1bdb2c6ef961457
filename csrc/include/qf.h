/* qwen_fast: the engine's public C API.
 *
 * A qf_engine is a loaded model, its KV cache, and a driver thread that plans steps, runs them on a backend and
 * hands tokens to requests. A qf_request is one sequence: submitted once, read as often as wanted, from any
 * thread. All functions are thread-safe unless they say otherwise; none needs the caller to hold anything.
 * Strings are UTF-8. Times are seconds of the monotonic clock. */
#ifndef QF_H
#define QF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "sample/params.h"
#include "sample/sampler.h"

typedef struct qf_engine qf_engine;
typedef struct qf_request qf_request;

/* Called while weights load, from the thread that creates the engine. false stops the load: QF_ERROR_STATE. */
typedef bool (*qf_engine_progress_fn)(void *arg, size_t done_bytes, size_t total_bytes);

/* qf_engine_options_init sets the defaults; a string option is borrowed during the call that takes the struct.
 * A value that is known but not built yet gives QF_ERROR_NOT_IMPLEMENTED naming it. */
typedef struct qf_engine_options {
    const char *model_dir;         /* a Hugging Face checkpoint directory */
    const char *hf_overrides_json; /* JSON object merged over config.json, or NULL */
    const char *load_format;       /* "auto" (safetensors), "safetensors", "dummy" */
    const char *device;            /* "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" */
    const char *dtype;             /* "auto" (the checkpoint's), "bfloat16", "float32"; "float16" and "half" run as
                                      bfloat16, since Qwen2.5 exceeds float16's range */
    const char *activation_dtype;  /* "auto" (int8 for 4- and 8-bit weights on the CPU), "int8", "float32" */
    const char *quantization;      /* "auto" (as the checkpoint is), "none", "w4", "awq", "gptq", "compressed-tensors" */
    int32_t quantization_group_size; /* for "w4": 32, 64, 128 */
    const char *lm_head_dtype;     /* "auto" (int8 on the CPU where the layers are quantised, and on a GPU
                                      with cpu_offload where it is tied), "model", "int8", "int4" */
    const char *kv_cache_dtype;    /* "auto" (dtype), "bfloat16", "float32", "fp8_e4m3" ("fp8"), "int8", "int4", "nf4" */
    int32_t kv_cache_16bit_window; /* with a cache of 8 or 4 bits: a query reads the newest so many positions, its own
                                      included, in 16 bits. Without one: no effect */
    const int32_t *kv_cache_16bit_layers; /* (num_kv_cache_16bit_layers) the same: these layers' caches have 16 bits */
    int32_t num_kv_cache_16bit_layers;
    int32_t block_size;            /* tokens per KV block: 16, 32, 64, 128 */
    int32_t max_model_len;         /* 0: the checkpoint's, lowered to what the KV cache can hold */
    int32_t max_num_seqs;
    int32_t max_num_batched_tokens;
    int32_t tensor_parallel_size;  /* 1; ranks that each hold a part of every layer: threads of the CPU, or GPUs */
    const char *tensor_parallel_comm; /* of GPUs: "auto" (each other's memory if they can reach it, else NCCL), "peer", "nccl" */
    const char *nccl_library;      /* a file of NCCL, for where the loader finds none; NULL: there is none */
    double watchdog_seconds;       /* of several ranks: a step that takes longer hangs, and the engine fails; GPUs wait for
                                      each other a quarter of it. Negative: 120 on GPUs, 1800 on the CPU; 0: no limit */
    uint64_t kv_cache_memory_bytes; /* 0: not given */
    int64_t kv_cache_tokens;        /* 0: not given */
    double memory_utilization;      /* share of the memory available at start that engine and cache may use; where
                                       neither figure above is given the cache takes what is left of it, at most
                                       max_num_seqs sequences of max_model_len. 0: not given: 0.5, and the cache
                                       takes at most 65,536 tokens or two sequences of max_model_len */
    uint64_t memory_bytes;          /* weights, workspace and KV cache together may take so much; 0: not given */
    const char *cpu_offload;        /* NULL: nothing; "embeddings": they stay in pinned host memory (GPU) */
    double cpu_offload_gb;          /* GiB of layers' weights that stay in pinned host memory (GPU) */
    bool batch_invariant;           /* GPU: the same bits in every batch; the CPU's always are */
    bool enforce_eager;             /* GPU: no captured graphs */
    bool enable_prefix_caching;
    int32_t num_threads;            /* 0: the CPUs of this process */
    const char *isa;                /* "auto", "scalar", "avx2", "avx512", "avx512_vnni" */
    int32_t max_steps_in_flight;    /* 0: the backend's choice; 1, 2 */
    int32_t max_waiting_requests;   /* submissions beyond this many unfinished ones are refused; 0: no limit */
    uint64_t dummy_seed;
    bool meter;                     /* false: only tokens are counted; to measure what metering costs */
    qf_engine_progress_fn progress; /* or NULL */
    void *progress_arg;
} qf_engine_options;

void qf_engine_options_init(qf_engine_options *options);

/* Bytes, as planned before allocation; the same figures are allocated. */
typedef struct qf_memory_report {
    uint64_t embedding_bytes, layers_bytes, head_bytes, workspace_bytes;
    uint64_t kv_cache_bytes, kv_block_bytes; /* the cache: num_blocks blocks, and the 16-bit window's */
    uint64_t kv_window_bytes;
    int32_t num_blocks, block_size, max_model_len;
    uint64_t available_bytes; /* what the machine, or the GPU, had free when asked */
    uint64_t device_overhead_bytes; /* of a GPU: context, modules, graphs, as measured; else 0 */
    uint64_t device_total_bytes;    /* of a GPU; else 0 */
} qf_memory_report;

typedef struct qf_device_info {
    char name[128];
    int32_t index;
    int32_t compute_capability; /* 90 for 9.0 */
    uint64_t total_bytes, free_bytes;
    bool usable;
    char reason[256]; /* why it is not usable */
} qf_device_info;

/* GPUs: fills up to `capacity` and returns how many there are; 0 without a driver, or in a build without CUDA. */
int32_t qf_list_devices(qf_device_info *out, int32_t capacity);

/* What qf_engine_create would allocate. Reads headers only. */
qf_status qf_engine_estimate(const qf_engine_options *options, qf_memory_report *out, qf_error *err);

qf_status qf_engine_create(const qf_engine_options *options, qf_engine **out, qf_error *err);
/* Stops the driver; unfinished requests end with QF_FINISH_ABORT. Requests must be released before or after: they
 * keep what they need alive. NULL-safe. */
void qf_engine_destroy(qf_engine *self);
/* Stops the driver and ends all requests, but keeps the memory until destroy. Idempotent. */
void qf_engine_stop(qf_engine *self);

/* Once, before the first request with text: see qf_vocabulary_create. Ids from num_tokens on are never sampled. */
qf_status qf_engine_set_vocabulary(qf_engine *self, const uint8_t *bytes, const uint32_t *offsets,
                                   const uint8_t *special, int32_t num_tokens, qf_error *err);

typedef struct qf_engine_info {
    const char *backend;     /* "cpu", "cuda" */
    const char *description; /* one line */
    const char *isa;         /* the instruction set in use: see the option; "" for a backend without the choice */
    int32_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim;
    int32_t max_position_embeddings; /* the checkpoint's (with YaRN, extended) */
    int32_t max_model_len, block_size, num_blocks, max_num_seqs, max_num_batched_tokens, max_steps_in_flight;
    const char *dtype, *activation_dtype, *quantization, *lm_head_dtype, *kv_cache_dtype; /* as resolved */
    int32_t kv_cache_16bit_window;        /* in effect: 0 where the cache has 16 or 32 bits */
    const int32_t *kv_cache_16bit_layers; /* (num_kv_cache_16bit_layers) the same, ascending; the engine's */
    int32_t num_kv_cache_16bit_layers;
    int32_t num_threads;
    int32_t tensor_parallel_size;
    double load_seconds;
} qf_engine_info;

void qf_engine_get_info(const qf_engine *self, qf_engine_info *out);

typedef struct qf_engine_stats {
    qf_memory_report memory;
    int32_t num_running, num_waiting, num_paused;
    int32_t num_free_blocks, num_cached_blocks; /* available ones, and those of them that hold a prefix */
    uint64_t num_steps, num_prompt_tokens, num_generated_tokens; /* prompt tokens computed, not hit */
    uint64_t prefix_queried_tokens, prefix_hit_tokens, num_preemptions;
    uint64_t num_finished_stop, num_finished_length, num_finished_abort, num_finished_error;
    uint64_t busy_ns; /* time with a step in flight */
    bool failed;
} qf_engine_stats;

void qf_engine_get_stats(qf_engine *self, qf_engine_stats *out);

/* --- the meter ------------------------------------------------------------------------------------------- */

#define QF_MAX_ENERGY_SOURCES 10

/* What a request, or all of them, took. Bytes and FLOPs are counted: by formula from the layout of weights, cache and
 * activations, step by step. Times are measured: a step's time on its device. A step's weights are shared out by the
 * tokens that a request had in it, its head by logit rows, its time by bytes; what is left over by rounding goes to the
 * largest remainders, so that the requests' figures add up to the engine's exactly. */
typedef struct qf_usage {
    uint64_t prompt_tokens, cached_tokens, output_tokens; /* cached: of the prompt, from the prefix cache */
    uint64_t computed_prompt_tokens;  /* with those computed again after a preemption */
    uint64_t weight_bytes;     /* the layers', read by every step */
    uint64_t head_bytes;       /* of steps with logit rows */
    uint64_t embedding_bytes;  /* rows of the embedding */
    uint64_t kv_read_bytes, kv_write_bytes;
    uint64_t activation_bytes; /* between kernels; 0 where they stay in the device's cache */
    uint64_t host_bytes;       /* from host memory to the device: offloaded weights */
    uint64_t flops;            /* floating-point operations of the linear layers, the head and attention */
    uint64_t device_ns, prefill_device_ns, decode_device_ns; /* the first is the sum of the other two */
    uint64_t energy_uj[QF_MAX_ENERGY_SOURCES]; /* microjoules, as in qf_meter_stats.sources */
} qf_usage;

typedef struct qf_energy_source {
    char name[24];  /* "gpu0", "cpu0" */
    char kind[8];   /* "nvml", "rapl", "none" */
    char note[200]; /* measured: what the figure covers; else why there is none */
    bool measured;
    bool has_idle_watts;
    double idle_watts; /* while no step ran: the mean of the last seconds of that */
    uint64_t total_uj; /* since the engine was loaded; requests + idle + unsettled */
    uint64_t requests_uj, idle_uj, unsettled_uj;
} qf_energy_source;

typedef struct qf_meter_stats {
    bool enabled;
    qf_usage total;    /* of the steps that were run */
    qf_usage requests; /* sum of the shares of all requests, ended ones too */
    uint64_t total_high[12], requests_high[12]; /* multiples of 2^64 to add to prompt_tokens .. flops */
    uint64_t num_steps, busy_ns, wall_ns; /* busy: a step ran on the device; wall: since the engine was loaded */
    uint64_t peak_kv_bytes; /* the most of the KV cache that sequences held at once */
    qf_energy_source sources[QF_MAX_ENERGY_SOURCES];
    int32_t num_sources;
} qf_meter_stats;

void qf_engine_get_meter(qf_engine *self, qf_meter_stats *out);

/* --- requests ------------------------------------------------------------------------------------------ */

typedef struct qf_request_options {
    const int32_t *prompt_token_ids; /* (num_prompt_tokens), at least one */
    int32_t num_prompt_tokens;
    int32_t max_tokens;              /* -1: as many as fit into max_model_len; 0: only the prompt is computed */
    qf_sampling_params sampling;     /* its stop_token_ids are the request's; see also eos_token_ids */
    bool has_seed;                   /* false: a fresh seed is drawn and reported */
    const int32_t *eos_token_ids;    /* end of text: finish without a stop reason */
    int32_t num_eos_token_ids;
    bool ignore_eos;
    const char *const *stop;         /* (num_stop) strings */
    int32_t num_stop;
    bool include_stop_str_in_output;
    bool skip_special_tokens;
    int32_t num_prompt_logprobs;     /* -1: none */
    int32_t logits_start, logits_stop; /* positions whose raw logits are returned; equal: none */
    int32_t priority;                /* lower first */
    uint64_t cache_salt;
    qf_request *leader;              /* a request with the same prompt: wait until its prompt is in the cache; or NULL */
    bool guided;                     /* a grammar: each token waits for qf_request_set_mask */
    int64_t mask_timeout_us;         /* a mask that is later fails the request; 0: 60 s */
    int32_t max_unread_tokens;       /* generation pauses while this many are unread; 0: never pauses */
    bool notify;                     /* appears in qf_engine_take_ready when there is something to read */
    uint64_t tag;                    /* for qf_engine_take_ready */
} qf_request_options;

void qf_request_options_init(qf_request_options *options);

typedef enum qf_finish_reason {
    QF_FINISH_NONE = 0,
    QF_FINISH_STOP,   /* end token, stop token or stop string */
    QF_FINISH_LENGTH, /* max_tokens or max_model_len */
    QF_FINISH_ABORT,  /* cancelled, or the engine was stopped */
    QF_FINISH_ERROR   /* see qf_output.error */
} qf_finish_reason;

/* What is new since the last read. Owns its arrays: qf_output_deinit. */
typedef struct qf_output {
    int32_t *token_ids;       /* (num_tokens) */
    int32_t num_tokens;
    char *text;               /* (text_bytes) valid UTF-8 */
    size_t text_bytes;
    qf_logprob *logprobs;     /* (num_tokens, logprobs_stride): the sampled token first; NULL if not asked for */
    int32_t logprobs_stride;
    int32_t mask_position;    /* guided: the output position that waits for its mask, or -1 */

    bool finished;            /* the fields below are final when this is true */
    qf_finish_reason finish_reason;
    int32_t stop_token_id;    /* of stop_token_ids, or -1 */
    int32_t stop_index;       /* of stop, or -1 */
    qf_error error;
    uint64_t seed;            /* as given or drawn */
    int32_t num_prompt_tokens, num_output_tokens, num_cached_tokens, num_preemptions;
    double arrival_time, first_scheduled_time, first_token_time, last_token_time, finished_time; /* 0: never */
    qf_logprob *prompt_logprobs;    /* (num_prompt_tokens, prompt_logprobs_stride), row 0 unused; NULL if not asked */
    int32_t prompt_logprobs_stride;
    float *logits;                  /* (num_logits_rows, vocab_size); NULL if not asked */
    int32_t num_logits_rows, vocab_size;
} qf_output;

/* Checks everything, copies everything. A request that can never fit is refused with the numbers. */
qf_status qf_engine_submit(qf_engine *self, const qf_request_options *options, qf_request **out, qf_error *err);

/* Waits until there is something to read (tokens, text, a mask wanted, the end) or timeout_us is over (0: no wait;
 * negative: for ever). true if there is. */
bool qf_request_wait(qf_request *self, int64_t timeout_us);
/* Takes what is new; an empty output if nothing is. One reader at a time. */
qf_status qf_request_read(qf_request *self, qf_output *out, qf_error *err);
void qf_output_deinit(qf_output *output);
/* What the request took up to now. true: final. false: it runs, or the energy of its last moments waits for the counters
 * to be read, or a step with a token that it no longer wanted was in flight when it ended; all of that is settled
 * within a second. sources: (QF_MAX_ENERGY_SOURCES) what usage.energy_uj holds, their sums as of now. */
bool qf_request_usage(qf_request *self, qf_usage *out, qf_energy_source *sources, int32_t *num_sources);

/* From any thread, at any moment; the request ends with QF_FINISH_ABORT within a step, or had ended before. */
void qf_request_cancel(qf_request *self);
/* Cancels if need be and gives the handle up. NULL-safe. */
void qf_request_release(qf_request *self);

/* The bitmask (bit 1: allowed) for the token at `position`, which must be the one that waits. num_words:
 * ceil(vocab_size / 32). */
qf_status qf_request_set_mask(qf_request *self, int32_t position, const uint32_t *words, int32_t num_words,
                              qf_error *err);

/* --- notification -------------------------------------------------------------------------------------- */

/* A file descriptor (eventfd on Linux, else a pipe) that is readable while qf_engine_take_ready has something.
 * Owned by the engine. */
int qf_engine_event_fd(const qf_engine *self);
/* Tags of requests with `notify` that have something to read, each once until it is read again; clears the
 * descriptor when the list is empty. Returns their number, at most `capacity`. */
int32_t qf_engine_take_ready(qf_engine *self, uint64_t *tags, int32_t capacity);

/* Forgets cached prefixes (running requests keep their blocks). */
void qf_engine_reset_prefix_cache(qf_engine *self);

/* --- layers alone ---------------------------------------------------------------------------------------- */

/* The layers of a checkpoint without the machinery of requests: for calibration and other tools that look inside. Not
 * thread-safe. */
typedef struct qf_layers qf_layers;

typedef struct qf_layers_options {
    const char *model_dir;
    const char *device;  /* as in qf_engine_options; activations are never int8 */
    const char *dtype;
    int32_t max_tokens;  /* in one call */
    int32_t tensor_parallel_size; /* 1: more is refused, as a tap sees whole inputs, of which a rank has a part */
    int32_t num_threads; /* 0: the CPUs of this process */
    const char *isa;
} qf_layers_options;

void qf_layers_options_init(qf_layers_options *options);
qf_status qf_layers_create(const qf_layers_options *options, qf_layers **out, qf_error *err);
void qf_layers_destroy(qf_layers *self); /* NULL-safe */

typedef struct qf_layers_info {
    const char *backend, *description, *dtype; /* owned by the layers */
    int32_t num_layers, hidden_size, intermediate_size;
    int32_t max_tokens, max_seqs, max_seq_len; /* in one call, in one call, of one sequence */
} qf_layers_info;

void qf_layers_get_info(const qf_layers *self, qf_layers_info *out);

/* Sees the input of a linear layer: x (num_tokens, k) float32, valid during the call. linear: "q_proj" ... "down_proj".
 * A layer's rows may come in several calls, in order. From the caller's thread. false: no more calls, and the forward
 * pass fails with QF_ERROR_STATE. */
typedef bool (*qf_layers_tap_fn)(void *arg, int32_t layer, const char *linear, const float *x, int32_t num_tokens,
                                 int32_t k);

/* Layers first .. last - 1 over whole sequences: hidden (num_tokens, hidden_size) float32 in and out, seq_lens
 * (num_seqs) adding up to num_tokens. linears: bit i asks for the input of the i-th of q, k, v, o, gate, up, down. */
qf_status qf_layers_forward(qf_layers *self, int32_t first, int32_t last, float *hidden, int32_t num_tokens,
                            const int32_t *seq_lens, int32_t num_seqs, uint32_t linears, qf_layers_tap_fn tap,
                            void *tap_arg, qf_error *err);

/* What the library was built with and what this machine offers, as one line of JSON into buffer: version, compiler,
 * cuda (bool), isa list, CPU count. */
void qf_build_info(char *buffer, size_t size_bytes);

/* float32 rows of a linear layer of a checkpoint, dequantised by the format's formula: for tests and tools.
 * module: "model.layers.0.self_attn.q_proj", ..., "lm_head". out: (n, k), allocated; free with qf_buffer_free. */
qf_status qf_checkpoint_dequantize(const char *model_dir, const char *module, float **out, int32_t *n, int32_t *k,
                                   qf_error *err);
/* Round-to-nearest codes of float rows (see model/quantize.h). Arrays are the caller's. */
qf_status qf_quantize_rtn(const float *w, int32_t count, int32_t k, int32_t bits, int32_t group_size, uint8_t *q,
                          float *scales, uint8_t *zeros, qf_error *err);
void qf_buffer_free(void *memory);

#endif
