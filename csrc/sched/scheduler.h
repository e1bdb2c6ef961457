/* The scheduler: which tokens run in the next step. Pure: no device, no clock, no allocation after creation.
 *
 * There are no prefill and decode phases. Every sequence has num_computed_tokens, which chases num_tokens (plus
 * the sampled tokens still in flight); a step gives each sequence some tokens under one budget, so chunked
 * prefill, prefix hits, and preemption by recompute are one rule.
 *
 * Several steps may be in flight: schedule() may be called again before complete() of the step before. A token
 * that is sampled but not yet known to the host counts as *pending*; the next step can consume it (the backend
 * feeds it on the device). Blocks of a finished, cancelled or preempted sequence return to the pool only when no
 * step in flight uses them; a block is published to the prefix cache only when all its tokens are known and the
 * step that wrote it is complete. Steps complete in the order in which they were planned.
 *
 * Rank is (priority, arrival). Running sequences are planned in order of rank, then waiting ones are admitted in
 * order of rank; one that does not fit holds back all that rank below it, so nobody starves. A sequence is admitted
 * with blocks for all its known tokens, so only growth by sampled tokens can run out of blocks. Then:
 *  - while blocks are on their way back (a victim or finished sequence with steps in flight) the sequence waits;
 *  - else the worst running sequence is preempted: a paused one if there is one, and among those the lowest in rank.
 *    It may be the sequence itself. Nothing is admitted in such a step, unless it would be empty with none in flight.
 * Admission preempts paused sequences only, and only if that can make enough room.
 *
 * With a 16-bit window over a low-bit cache (window_tokens W > 0) a sequence holds window blocks too, for the positions
 * that a query to come, or of a step in flight, reads in 16 bits: the W - 1 before it and its own. A block that no query
 * needs any more goes when the last step that could read it is complete. There are enough for all (kv/window.h), so
 * nothing waits for one. After a prefix hit of H tokens the last prefix_margin_tokens of them are computed once more, for
 * their 16-bit copies alone: the hit blocks stay as they are.
 *
 * The owner's loop:  schedule -> run -> for each entry: accept(token), perhaps finish -> complete.  */
#ifndef QF_SCHED_SCHEDULER_H
#define QF_SCHED_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "kv/block_pool.h"

typedef enum qf_seq_state {
    QF_SEQ_NEW = 0,
    QF_SEQ_WAITING,  /* not admitted, or preempted: holds no slot; may still have steps in flight */
    QF_SEQ_RUNNING,  /* holds a slot and blocks */
    QF_SEQ_FINISHED  /* finish() was called; `released` tells when its blocks and slot are back */
} qf_seq_state;

/* One sequence. The owner fills the first part before add() and keeps the memory until `released`. */
typedef struct qf_seq {
    uint64_t id;
    int32_t priority;          /* lower runs first; equal ones in order of arrival */
    int32_t *token_ids;        /* (max_total_tokens): the prompt, then what accept() appends */
    int32_t num_prompt_tokens; /* 1 .. max_total_tokens */
    int32_t max_total_tokens;  /* prompt and output; equal to num_prompt_tokens: nothing is sampled */
    int32_t *block_table;      /* (max_blocks = ceil(max_total_tokens / block_size)): owner's storage */
    int32_t *window_table;     /* (max_blocks) of window blocks, by the same index; NULL without a window */
    int32_t max_prefix_hit;    /* prompt tokens that may come from the prefix cache; INT32_MAX: no limit */
    uint64_t cache_salt;       /* prefix blocks are shared only between equal salts */
    struct qf_seq *leader;     /* not admitted before the leader's prompt is computed (or it is finished), or NULL;
                                  added before this one; the scheduler clears this when it no longer matters */
    bool guided;               /* needs `mask_ready` before each sampled token is planned */
    void *owner;

    /* The scheduler's part: read only to the owner. */
    qf_seq_state state;
    bool released;                /* FINISHED, no step in flight, blocks returned: the memory may go */
    bool paused;                  /* see qf_scheduler_set_paused */
    bool mask_ready;              /* see qf_scheduler_set_mask_ready */
    int32_t num_followers;        /* sequences whose leader this is */
    int32_t slot;                 /* 0 .. max_num_seqs - 1 while RUNNING or in flight, else -1 */
    int32_t num_tokens;           /* known tokens: prompt and accepted output */
    int32_t num_pending_tokens;   /* sampled in steps that are still in flight */
    int32_t num_computed_tokens;  /* positions planned, those in flight included */
    int32_t num_completed_tokens; /* positions whose step is complete: their KV is there */
    int32_t num_cached_tokens;    /* prefix hit at the first admission */
    int32_t num_published_blocks; /* leading blocks hit in, or offered to, the prefix cache */
    int32_t num_blocks;
    int32_t num_shared_tokens;    /* positions before it stand in hit blocks, which a step must not write */
    int32_t window_first, window_end; /* window_table[window_first .. window_end - 1] are held */
    int32_t num_steps_in_flight;
    int32_t num_preemptions;
    bool release_when_idle; /* preempted or finished with steps in flight */
    uint64_t arrival;
    struct qf_seq *prev, *next; /* queue links */
} qf_seq;

/* One sequence's share of a step: positions start .. start + num_tokens - 1. */
typedef struct qf_step_entry {
    qf_seq *seq;
    int32_t slot;
    int32_t start;
    int32_t num_tokens;
    bool samples;        /* the last position's logits give a token (seq->num_pending_tokens counts it) */
    int32_t preemptions; /* seq->num_preemptions when planned: an entry of an older life wrote no KV that counts */
} qf_step_entry;

typedef struct qf_step_plan {
    uint64_t step;                /* counts from 1; 0: an empty plan, which is not in flight and not completed */
    int32_t num_entries;
    int32_t num_tokens;           /* sum over the entries */
    qf_step_entry *entries;       /* (max_num_seqs) allocated by qf_step_plan_init */
} qf_step_plan;

typedef struct qf_scheduler_config {
    int32_t max_num_seqs;            /* sequences in one step, and slots */
    int32_t max_num_batched_tokens;  /* tokens in one step, at least max_num_seqs is wise but not needed */
    int32_t max_model_len;
    int32_t max_steps_in_flight;     /* 1 or 2 */
    int32_t window_tokens;           /* 0: no window */
    int32_t num_window_blocks;       /* at least qf_kv_window_blocks(...) */
    int32_t prefix_margin_tokens;    /* of a prefix hit: computed again. A copy is exact where window_tokens - 1 copies of the
                                        layer below are: (layers with a window) * (window_tokens - 1) */
} qf_scheduler_config;

typedef struct qf_scheduler_stats {
    int32_t num_running, num_waiting, num_paused;
    uint64_t num_preemptions;
    uint64_t prefix_queried_tokens, prefix_hit_tokens; /* prompt tokens, at first admissions */
} qf_scheduler_stats;

typedef struct qf_scheduler qf_scheduler;

/* The pool is borrowed. */
qf_status qf_scheduler_create(const qf_scheduler_config *config, qf_block_pool *pool, qf_scheduler **out,
                              qf_error *err);
void qf_scheduler_destroy(qf_scheduler *self); /* NULL-safe; sequences are the owner's */

qf_status qf_step_plan_init(qf_step_plan *plan, int32_t max_num_seqs, qf_error *err);
void qf_step_plan_deinit(qf_step_plan *plan);

/* Resets the scheduler's part of `seq`. QF_ERROR_INVALID_ARGUMENT if the sequence can never fit: max_total_tokens
 * beyond max_model_len or beyond the whole pool; the message has the numbers. */
qf_status qf_scheduler_add(qf_scheduler *self, qf_seq *seq, qf_error *err);

/* Fills the plan; num_entries 0: nothing can run now (all waiting for tokens in flight, masks, readers or blocks).
 * Preempts by recompute, lowest priority and latest arrival first, when the pool is out of blocks. A guided sequence
 * whose mask is late is still planned up to, but without, its last known token. */
void qf_scheduler_schedule(qf_scheduler *self, qf_step_plan *plan);

/* The entry's sampled token is known: appended to token_ids. Returns false, and drops the token, if the sequence was
 * finished since. A sequence that was preempted since still takes it (it is not admitted again before its steps in
 * flight are over). Only for entries with `samples`, of the oldest step in flight. */
bool qf_scheduler_accept(qf_scheduler *self, const qf_step_entry *entry, int32_t token_id);

/* The oldest step in flight is over: in-flight counts, publishing, delayed releases. Call after each entry that
 * samples was accepted or its sequence finished. A finished sequence's blocks are published too, as far as its tokens
 * are known; if the step failed on the device, call qf_block_pool_reset_prefix_cache right after this. */
void qf_scheduler_complete(qf_scheduler *self, const qf_step_plan *plan);

/* Ends a sequence at any moment (stop, length, cancel, failure). Idempotent. */
void qf_scheduler_finish(qf_scheduler *self, qf_seq *seq);

/* A paused sequence keeps its blocks (it is the first to be preempted) but is not planned. */
void qf_scheduler_set_paused(qf_scheduler *self, qf_seq *seq, bool paused);
/* For guided sequences: the mask for the next token is there. Planning a sample consumes it. */
void qf_scheduler_set_mask_ready(qf_scheduler *self, qf_seq *seq);

/* True if a sequence is waiting or running (paused ones too), or a step is in flight. */
bool qf_scheduler_has_work(const qf_scheduler *self);
void qf_scheduler_get_stats(const qf_scheduler *self, qf_scheduler_stats *out);

/* Every invariant of scheduler, sequences and pool; QF_ERROR_INTERNAL names the first that fails. */
qf_status qf_scheduler_check(const qf_scheduler *self, qf_error *err);

#endif
