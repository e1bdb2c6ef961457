/* The meter: what each step moved, computed and took, and whose it was. No clock, no device, no allocation after init
 * (but qf_meter_reserve): times and readings are given.
 *
 * A step's figures are shared out to the requests in it, in integers, by largest remainder (ties by order in the batch):
 * weights, embedding rows, activations and bytes from the host by tokens; the head and its rows' activations by logit
 * rows; the cache's bytes and FLOPs are each request's own; device time by the bytes that a request got of the step.
 *
 * Energy is settled per window between two movements of a source's counter. Device time since the last one tells busy
 * from idle: the idle part is at most (mean power without a step) x (window - busy), or E x (window - busy) / window
 * while that power is not known; the busy part goes to requests by their device time in the window. A step that
 * straddles the end of a window counts in both by time. What no window has closed over yet is unsettled, so that
 *     total = requests + idle + unsettled, always.
 *
 * All state but a step's is guarded by the engine's lock. */
#ifndef QF_ENGINE_METER_H
#define QF_ENGINE_METER_H

#include "backend/backend.h"
#include "qf.h"

#define QF_METER_AMOUNTS 12 /* words of qf_usage from prompt_tokens to flops */
#define QF_MAX_PENDING_WINDOWS 16

/* --- shares ---------------------------------------------------------------------------------------------- */

typedef struct qf_share_key {
    uint64_t remainder;
    int32_t index;
} qf_share_key;

typedef struct qf_share_scratch {
    uint64_t *weights, *shares; /* (capacity) */
    qf_share_key *keys;         /* (capacity) */
    int32_t capacity;
} qf_share_scratch;

qf_status qf_share_scratch_grow(qf_share_scratch *self, int32_t capacity, qf_error *err);
void qf_share_scratch_deinit(qf_share_scratch *self);
size_t qf_share_scratch_bytes(int32_t capacity);

/* scratch->shares[0 .. count) = parts of `total` in proportion to scratch->weights, whose sum fits 64 bits; they add up
 * to it. If all weights are 0 the parts are equal. */
void qf_share(qf_share_scratch *scratch, int32_t count, uint64_t total);

/* --- accounts -------------------------------------------------------------------------------------------- */

/* A request's. */
typedef struct qf_account {
    qf_usage usage;
    uint64_t settled_ns[QF_MAX_ENERGY_SOURCES]; /* of usage.device_ns: its energy is settled */
    int32_t computed_end;   /* positions before it were computed once; the driver's */
    int32_t steps_in_flight;
    bool known;             /* between open and close */
    bool listed;            /* has device time to settle, perhaps */
    struct qf_account *previous, *next;
} qf_account;

/* One request in a step. */
typedef struct qf_meter_entry {
    qf_account *account;
    int32_t start, num_tokens, num_prefill_tokens, num_rows;
    uint64_t amounts[QF_METER_AMOUNTS]; /* as in qf_usage */
    uint64_t device_ns, given_ns;
} qf_meter_entry;

typedef struct qf_meter_step {
    qf_meter_entry *entries; /* (max_num_seqs) */
    int32_t num_entries;
    uint64_t totals[QF_METER_AMOUNTS];
    qf_share_scratch scratch;
} qf_meter_step;

qf_status qf_meter_step_init(qf_meter_step *self, int32_t max_num_seqs, qf_error *err);
void qf_meter_step_deinit(qf_meter_step *self);
size_t qf_meter_step_bytes(int32_t max_num_seqs);

/* --- energy ---------------------------------------------------------------------------------------------- */

typedef struct qf_energy_window {
    uint64_t end_ns, energy_uj;
} qf_energy_window;

typedef struct qf_energy_meter {
    qf_energy_source source;
    bool started;
    uint64_t reading_uj;     /* the counter's last */
    uint64_t window_start_ns;
    uint64_t settled_ns;     /* of the meter's device time */
    double idle_memory_uj, idle_memory_ns; /* windows without a step, the older the less */
    uint64_t gone_ns;        /* device time to settle of requests that are no more */
    qf_energy_window pending[QF_MAX_PENDING_WINDOWS]; /* closed, but a step in flight may have run in them */
    int32_t num_pending;
} qf_energy_meter;

/* --- the meter ------------------------------------------------------------------------------------------- */

typedef struct qf_meter {
    bool enabled;
    /* Fixed: a token's, of all layers. */
    uint64_t kv_full_bytes, kv_sliding_bytes; /* of layers that see the whole context, and of those that slide */
    int32_t sliding_window;
    /* Of low-bit caches with a 16-bit window: a token's copy, of the same two kinds of layers. */
    uint64_t window_full_bytes, window_sliding_bytes;
    uint64_t low_full_bytes, low_sliding_bytes; /* the low-bit form of the layers that have such copies */
    int32_t window_tokens;
    uint64_t linear_flops, head_flops;          /* of a token, of a logit row */
    uint64_t full_flops, sliding_flops;         /* of a token and a position that it attends to */
    uint64_t start_ns;

    qf_usage total, requests;
    uint64_t total_high[QF_METER_AMOUNTS], requests_high[QF_METER_AMOUNTS];
    uint64_t num_steps, peak_kv_bytes;
    int32_t steps_in_flight;
    qf_energy_meter sources[QF_MAX_ENERGY_SOURCES];
    int32_t num_sources;
    qf_account *listed_head;
    int32_t num_accounts;
    qf_share_scratch scratch; /* room for all accounts and one more */
} qf_meter;

void qf_meter_init(qf_meter *self, bool enabled, const qf_model_config *config, const qf_memory_plan *plan,
                   int32_t block_size, uint64_t now_ns);
/* Another format of the cache than the plan's average layer tells: 8 and 4 bits, with 16-bit layers or a window. */
void qf_meter_set_kv(qf_meter *self, const qf_model_config *config, const qf_backend_options *options);
void qf_meter_deinit(qf_meter *self);

/* Room for one more account: fails only for lack of memory. */
qf_status qf_meter_open(qf_meter *self, qf_account *account, int32_t num_prompt_tokens, qf_error *err);
/* Before the account's memory goes; no step of it is in flight. */
void qf_meter_close(qf_meter *self, qf_account *account);
void qf_meter_add_cached(qf_meter *self, qf_account *account, int32_t num_tokens);
void qf_meter_add_output(qf_meter *self, qf_account *account);

/* A step was planned: step->entries' first six fields are filled, but the rows. */
void qf_meter_step_begun(qf_meter *self, qf_meter_step *step);
/* Fills the entries' amounts and the step's totals. Reads only what is fixed: the lock need not be held. */
void qf_meter_step_count(const qf_meter *self, qf_meter_step *step, const qf_step_traffic *traffic);
/* The step's device time in the entries, by their bytes. Needs no lock either. */
void qf_meter_step_share_time(qf_meter_step *step, uint64_t device_ns);
/* The step ended at end_ns after device_ns: everything is added, and windows that have closed are settled. */
void qf_meter_step_ended(qf_meter *self, qf_meter_step *step, uint64_t device_ns, uint64_t end_ns);
/* A step that gave no results: nothing is added. */
void qf_meter_step_lost(qf_meter *self, qf_meter_step *step);

/* False while the account's figures may still grow, the request being over. */
bool qf_meter_is_final(const qf_meter *self, const qf_account *account);
void qf_meter_get_stats(const qf_meter *self, uint64_t now_ns, qf_meter_stats *out);

/* energy.c: a source of which nothing is known but its name; returns it, or NULL if there is no room */
qf_energy_meter *qf_meter_add_source(qf_meter *self, const char *name, const char *kind);
/* The counter of source `index` stood at reading_uj at time_ns. */
void qf_meter_reading(qf_meter *self, int32_t index, uint64_t time_ns, uint64_t reading_uj);
/* Settles the windows that ended at or before time_ns, all device time up to then being known. */
void qf_meter_settle(qf_meter *self, uint64_t time_ns);
/* When the oldest pending window ended; UINT64_MAX: none. */
uint64_t qf_meter_next_window(const qf_meter *self);

#endif
