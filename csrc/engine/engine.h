/* The engine's inside: what its files share. See include/qf.h for the contract.
 *
 * Threads. The driver thread owns the scheduler, the backend, every detokenizer and each request's `seq`. Everything
 * that callers touch is guarded by engine->lock, which the driver holds only while it takes commands in and hands
 * results out, never while a step runs. Callers leave commands (new requests, signals) and wake the driver. */
#ifndef QF_ENGINE_ENGINE_H
#define QF_ENGINE_ENGINE_H

#include <pthread.h>

#include "backend/backend.h"
#include "base/rapl.h"
#include "engine/detokenizer.h"
#include "engine/meter.h"
#include "kv/block_pool.h"
#include "qf.h"
#include "sched/scheduler.h"

#define QF_MAX_STEPS_IN_FLIGHT 2

/* Option strings, parsed and resolved against the checkpoint. */
typedef struct qf_resolved_options {
    const qf_backend_vtable *vtable; /* of the engine's backend: what was asked for, or ranks of it */
    qf_backend_options backend;
    qf_memory_plan plan;
    uint64_t available_bytes, device_total_bytes, device_overhead_bytes;
    int32_t num_blocks;
    int32_t max_steps_in_flight;
    int32_t max_waiting_requests;
    bool enable_prefix_caching;
    const char *dtype, *activation_dtype, *quantization, *lm_head_dtype, *kv_cache_dtype; /* static strings */
    uint8_t kv_16bit_layers[QF_MAX_LAYERS];       /* backend.kv_16bit_layers points here: this struct does not move */
    int32_t kv_cache_16bit_layers[QF_MAX_LAYERS]; /* (num_kv_cache_16bit_layers) ascending */
    int32_t num_kv_cache_16bit_layers;
} qf_resolved_options;

typedef enum qf_device_kind { QF_DEVICE_AUTO = 0, QF_DEVICE_CPU, QF_DEVICE_CUDA } qf_device_kind;

typedef struct qf_device_choice {
    qf_device_kind kind;
    int32_t ordinal; /* cuda:N */
} qf_device_choice;

qf_status qf_device_parse(const char *text, qf_device_choice *out, qf_error *err);

/* Opens the checkpoint and settles every option; nothing large is allocated. *checkpoint is closed by the caller. */
qf_status qf_options_resolve(const qf_engine_options *options, const qf_backend_vtable *backend,
                             qf_checkpoint **checkpoint, qf_resolved_options *out, qf_error *err);
void qf_memory_report_fill(const qf_resolved_options *resolved, qf_memory_report *out);
/* Commands to the driver about a request; bits of qf_request.signals. */
enum { QF_SIGNAL_CANCEL = 1, QF_SIGNAL_RESUME = 2, QF_SIGNAL_MASK = 4 };

struct qf_request {
    qf_engine *engine; /* a reference */
    pthread_cond_t readable;

    /* Fixed at submission. */
    qf_seq seq;                /* the driver's */
    qf_sample_state *sample;   /* the backend's while a step runs; NULL: nothing is sampled */
    qf_detokenizer *detokenizer; /* the driver's; NULL: no vocabulary */
    int32_t *eos_token_ids;    /* (num_eos_token_ids) */
    int32_t num_eos_token_ids;
    int32_t *stop_token_ids;   /* (num_stop_token_ids) */
    int32_t num_stop_token_ids;
    bool include_stop_str_in_output;
    int32_t min_tokens;
    int32_t num_logprobs, num_prompt_logprobs; /* -1: none */
    int32_t logits_start, logits_stop;
    int32_t max_unread_tokens;
    int64_t mask_timeout_us;
    bool notify;
    uint64_t tag, seed;
    qf_request *leader; /* a reference, or NULL */

    qf_account account; /* guarded by engine->lock */

    /* Where steps in flight leave their results, by parity of the step. */
    int32_t step_token[QF_MAX_STEPS_IN_FLIGHT];
    qf_logprob *step_logprobs[QF_MAX_STEPS_IN_FLIGHT]; /* (1 + num_logprobs) each, or NULL */

    /* Guarded by engine->lock. */
    int32_t references;
    qf_request *next_new, *next_signal, *next_ready; /* inbox, signal list, ready list */
    uint32_t signals;
    bool signalled;     /* on the signal list */
    bool in_ready_list;
    bool ready_told;    /* handed out by take_ready and not read since */
    bool paused;
    int32_t num_output_tokens; /* visible ones; token ids are in seq.token_ids */
    int32_t num_read_tokens;
    char *text;         /* (text_bytes) unread */
    size_t text_bytes, text_capacity;
    qf_logprob *logprobs; /* (logprobs_capacity, 1 + num_logprobs): rows of the unread tokens */
    int32_t logprobs_capacity;
    qf_logprob *prompt_logprobs; /* (num_prompt_tokens, 1 + num_prompt_logprobs); steps write, readers take at the end */
    float *logits;               /* (logits_stop - logits_start, vocab_size); the same */
    uint32_t *mask;              /* (ceil(vocab_size / 32)), guided requests */
    int32_t mask_position;       /* waits for its mask; -1: none */
    bool mask_told;
    double mask_asked_time;
    bool finished, finish_read;
    qf_finish_reason finish_reason;
    int32_t stop_token_id, stop_index;
    qf_error error;
    double arrival_time, first_scheduled_time, first_token_time, last_token_time, finished_time;

    /* The driver's list of requests that it still knows. */
    qf_request *prev_live, *next_live, *next_finishing;
    bool live;
    bool left_behind; /* a thread of the backend may write its results yet: its memory stays */
};

/* The arrays behind one step's qf_batch and its plan; alive until the step is collected. */
typedef struct qf_step {
    qf_step_plan plan;
    qf_batch batch;
    int32_t *token_ids, *positions, *slot_mapping; /* (max_num_batched_tokens) */
    int32_t *query_start_loc; /* (max_num_seqs + 1) */
    int32_t *seq_lens;        /* (max_num_seqs) */
    int32_t *block_tables;    /* (max_num_seqs, block_table_stride) */
    /* With a 16-bit window; else NULL: */
    int32_t *window_slot_mapping; /* (max_num_batched_tokens) */
    int32_t *window_tables;       /* (max_num_seqs, window_table_stride) */
    int32_t *window_first_block;  /* (max_num_seqs) */
    qf_logit_task *logit_tasks; /* (max_num_batched_tokens) */
    qf_meter_step meter;
} qf_step;

/* Energy counters and the thread that reads them. Guarded by engine->lock where the thread runs. */
typedef struct qf_energy_sampler {
    qf_rapl rapl;            /* the thread's */
    bool has_device;         /* source 0 is the backend's */
    int32_t num_measured;
    pthread_t thread;
    pthread_cond_t wake;
    bool started, stopping;
    bool sleeps_long;        /* no step ran for a while */
} qf_energy_sampler;

struct qf_engine {
    pthread_mutex_t lock;
    pthread_cond_t wake; /* the driver waits on it */
    int32_t references;  /* the owner and each request; guarded by lock */
    pthread_t driver;
    bool driver_started, driver_joined;
    bool driver_gone; /* joined: guarded by lock */

    /* Fixed after creation. */
    qf_resolved_options resolved;
    qf_model_config config;
    double load_seconds;
    char description[384];
    const char *backend_name;
    const char *isa; /* "": none */
    int event_read_fd, event_write_fd;

    /* Guarded by lock. */
    bool stopping, failed, reset_prefix_cache;
    qf_error failure;
    qf_vocabulary *vocabulary; /* set once */
    qf_request *inbox_head, *inbox_tail;
    qf_request *signal_head;
    qf_request *ready_head, *ready_tail;
    int32_t num_unfinished;
    qf_engine_stats stats;
    qf_meter meter;
    qf_energy_sampler sampler;

    /* The driver's. */
    qf_backend *backend;
    qf_block_pool *pool;
    qf_scheduler *scheduler;
    qf_step steps[QF_MAX_STEPS_IN_FLIGHT];
    bool left_behind; /* a thread of the backend may read the steps yet: they and the engine's memory stay */
    int32_t num_in_flight;
    uint64_t num_submitted, num_collected;
    qf_request *live_head;
    bool forget_prefixes;       /* a step gave logits that are not finite: what it cached is not trusted */
    bool finishing_step;        /* ends are published when the step's books are closed */
    qf_request *finishing_head;
    int32_t num_masks_waited;
};

/* devices.c: the backend that options->device means. */
qf_status qf_engine_choose_backend(const qf_engine_options *options, const qf_backend_vtable **out, qf_error *err);

/* For tests: any backend, over a checkpoint's options. */
qf_status qf_engine_create_with(const qf_engine_options *options, const qf_backend_vtable *backend, qf_engine **out,
                                qf_error *err);

void *qf_driver_main(void *engine);

/* commands.c: on the driver thread, lock not held unless said */
void qf_driver_take_commands(qf_engine *engine); /* lock held before and after, not in between */
void qf_driver_expire_masks(qf_engine *engine);  /* fails guided requests whose mask is late */
/* Ends a request that the scheduler has not finished. Readers hear of it at once, or when the step is over. */
void qf_driver_finish(qf_engine *engine, qf_request *request, qf_finish_reason reason, const qf_error *error);
void qf_driver_publish_finish(qf_engine *engine, qf_request *request);
/* Gives the driver's reference up, once the scheduler has let go of the sequence. */
void qf_driver_drop_if_released(qf_engine *engine, qf_request *request);
void qf_driver_update_stats(qf_engine *engine); /* lock held */

/* batch.c */
qf_status qf_step_init(qf_step *step, const qf_resolved_options *resolved, qf_error *err);
void qf_step_deinit(qf_step *step);
size_t qf_step_bytes(const qf_backend_options *options); /* what qf_step_init allocates, beside the plan's entries */
/* Fills step->batch from step->plan. `parity` selects where results go. */
void qf_step_build(qf_step *step, const qf_engine *engine, int32_t parity);

/* request.c; the lock is held by the caller of every *_locked function */
void qf_request_signal_locked(qf_request *request, uint32_t signals);
void qf_request_changed_locked(qf_request *request); /* wakes readers and the notification list */
void qf_request_unref_locked(qf_request *request);   /* may free it (not the engine) */
void qf_engine_free(qf_engine *engine); /* when engine->references is 0; lock not held */
double qf_now_seconds(void);

/* energy_sampler.c */
uint64_t qf_now_ns(void);
void qf_energy_open(qf_engine *engine);           /* once the backend is there: the sources, and their first reading */
qf_status qf_energy_start(qf_engine *engine, qf_error *err); /* the thread, if there is anything to read */
void qf_energy_wake_locked(qf_engine *engine);    /* a step is about to run */
void qf_energy_stop(qf_engine *engine);           /* lock not held; before the backend goes. Idempotent */

/* output.c: what the driver hands out. Fails only for lack of memory. */
qf_status qf_request_append_text_locked(qf_request *request, const char *text, size_t text_bytes, qf_error *err);
/* One more visible token, its id already in seq.token_ids; logprobs: (1 + num_logprobs) or NULL. */
qf_status qf_request_append_token_locked(qf_request *request, const qf_logprob *logprobs, qf_error *err);

#endif
