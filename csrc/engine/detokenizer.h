/* Text from token ids, as it streams: byte-level BPE, so text is the concatenation of the tokens' bytes.
 * Never emits half a UTF-8 character; finds stop strings that span tokens; holds back text that may still become
 * one. Invalid bytes come out as U+FFFD, as Python's errors="replace" does.
 *
 * Stop strings are looked for in the text as it comes out. The one that ends first wins; of several that end with the
 * same byte, the one that begins first (so the longest; of equal ones, the lower index). A stop string may begin in
 * text from before stops were allowed, but must end after. Only the longest end of the text that is a proper
 * beginning of some stop string is held back. */
#ifndef QF_ENGINE_DETOKENIZER_H
#define QF_ENGINE_DETOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* token id -> bytes. Immutable after creation; shared by all requests. */
typedef struct qf_vocabulary qf_vocabulary;

/* bytes: the tokens' bytes one after another; offsets: (num_tokens + 1), rising; special: (num_tokens) 1 for
 * special tokens, which skip_special_tokens leaves out. All copied. */
qf_status qf_vocabulary_create(const uint8_t *bytes, const uint32_t *offsets, const uint8_t *special,
                               int32_t num_tokens, qf_vocabulary **out, qf_error *err);
void qf_vocabulary_destroy(qf_vocabulary *self); /* NULL-safe */
int32_t qf_vocabulary_size(const qf_vocabulary *self);

#define QF_MAX_STOP_STRINGS 16
#define QF_MAX_STOP_BYTES 256

typedef struct qf_detokenizer_options {
    const char *const *stop; /* (num_stop) UTF-8, non-empty, at most QF_MAX_STOP_BYTES bytes each */
    int32_t num_stop;
    bool include_stop_str_in_output;
    bool skip_special_tokens;
} qf_detokenizer_options;

typedef struct qf_detokenizer qf_detokenizer;

qf_status qf_detokenizer_create(const qf_vocabulary *vocabulary, const qf_detokenizer_options *options,
                                qf_detokenizer **out, qf_error *err);
void qf_detokenizer_destroy(qf_detokenizer *self); /* NULL-safe */

typedef struct qf_text_delta {
    const char *text;   /* new text that is final: valid UTF-8, not NUL-terminated; valid until the next call */
    size_t size_bytes;
    int32_t stop_index; /* the stop string that was found (by later calls too), or -1; no text comes after it */
} qf_text_delta;

/* Adds one token (ids outside the vocabulary add nothing). min_tokens: stop strings are not looked for while
 * `allow_stop` is false. */
qf_status qf_detokenizer_push(qf_detokenizer *self, int32_t token_id, bool allow_stop, qf_text_delta *out,
                              qf_error *err);
/* The end: held-back text and incomplete bytes (as U+FFFD) come out. A U+FFFD that comes so may complete a stop string,
 * if the last push allowed it. Calls after the end give nothing. After QF_ERROR_OUT_OF_MEMORY, the call can be
 * repeated. */
qf_status qf_detokenizer_finish(qf_detokenizer *self, qf_text_delta *out, qf_error *err);

#endif
