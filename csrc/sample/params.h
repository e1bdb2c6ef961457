/* Sampling parameters of one sequence, checked. */
#ifndef QF_SAMPLE_PARAMS_H
#define QF_SAMPLE_PARAMS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define QF_MAX_LOGPROBS 64 /* top logprobs per position */

typedef struct qf_logit_bias {
    int32_t token_id;
    float bias; /* -100 .. 100 */
} qf_logit_bias;

/* A token sequence that must not appear: its last token is masked when the rest has just been generated. */
typedef struct qf_bad_words {
    const int32_t *token_ids; /* (length) */
    int32_t length;           /* >= 1 */
} qf_bad_words;

/* Pointers are borrowed until the call that takes the struct returns. */
typedef struct qf_sampling_params {
    float temperature;        /* 0: greedy; else 0.01 .. 100 after clamping up to 0.01 */
    int32_t top_k;            /* 0 or -1: off */
    float top_p;              /* (0, 1] */
    float min_p;              /* [0, 1] */
    float repetition_penalty; /* > 0, prompt and output; 1: off */
    float presence_penalty;   /* -2 .. 2, output only */
    float frequency_penalty;  /* -2 .. 2, output only */
    uint64_t seed;
    uint32_t sample_index;    /* 0 .. n - 1 */
    int32_t min_tokens;       /* stop tokens are masked before this many output tokens */
    int32_t num_logprobs;     /* -1: none; 0: the sampled token's alone; else the top ones too */
    const qf_logit_bias *logit_bias;
    int32_t num_logit_bias;
    const int32_t *allowed_token_ids; /* NULL: all */
    int32_t num_allowed_token_ids;
    const qf_bad_words *bad_words;
    int32_t num_bad_words;
    const int32_t *stop_token_ids; /* end tokens too (unless ignore_eos): masked while below min_tokens */
    int32_t num_stop_token_ids;
} qf_sampling_params;

/* The defaults: temperature 1, everything else off, seed 0. */
void qf_sampling_params_init(qf_sampling_params *params);

/* QF_ERROR_INVALID_ARGUMENT naming field, value and limit. NaN and infinities are refused everywhere. */
qf_status qf_sampling_params_check(const qf_sampling_params *params, int32_t vocab_size, qf_error *err);

#endif
