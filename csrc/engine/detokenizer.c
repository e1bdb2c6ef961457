#include "engine/detokenizer.h"

#include <string.h>

#include "base/alloc.h"
#include "engine/utf8.h"

struct qf_vocabulary {
    uint8_t *bytes;
    uint32_t *offsets; /* (num_tokens + 1) */
    uint8_t *special;  /* (num_tokens) */
    int32_t num_tokens;
};

qf_status qf_vocabulary_create(const uint8_t *bytes, const uint32_t *offsets, const uint8_t *special,
                               int32_t num_tokens, qf_vocabulary **out, qf_error *err)
{
    *out = NULL;
    if (num_tokens < 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "vocabulary has %d tokens: must be at least 0", num_tokens);
    }
    if (offsets[0] != 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "vocabulary: first offset is %u: must be 0", offsets[0]);
    }
    for (int32_t i = 0; i < num_tokens; i++) {
        if (offsets[i + 1] < offsets[i]) {
            return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "vocabulary: token %d ends at %u, before its start, %u", i,
                           offsets[i + 1], offsets[i]);
        }
    }
    size_t count = (size_t)num_tokens;
    qf_vocabulary *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "vocabulary", err));
    self->num_tokens = num_tokens;
    qf_status status;
    QF_TRY_GOTO(qf_alloc((void **)&self->bytes, offsets[count], 1, "vocabulary", err), fail);
    QF_TRY_GOTO(qf_alloc((void **)&self->offsets, count + 1, sizeof *self->offsets, "vocabulary", err), fail);
    QF_TRY_GOTO(qf_alloc((void **)&self->special, count, 1, "vocabulary", err), fail);
    if (offsets[count] > 0) {
        memcpy(self->bytes, bytes, offsets[count]);
    }
    memcpy(self->offsets, offsets, (count + 1) * sizeof *offsets);
    if (count > 0) {
        memcpy(self->special, special, count);
    }
    *out = self;
    return QF_OK;
fail:
    qf_vocabulary_destroy(self);
    return status;
}

void qf_vocabulary_destroy(qf_vocabulary *self)
{
    if (self == NULL) {
        return;
    }
    qf_free(self->bytes);
    qf_free(self->offsets);
    qf_free(self->special);
    qf_free(self);
}

int32_t qf_vocabulary_size(const qf_vocabulary *self) { return self->num_tokens; }

/* A stop string as an automaton (Knuth, Morris and Pratt, 1977). */
typedef struct stop_matcher {
    uint8_t text[QF_MAX_STOP_BYTES];
    uint16_t fallback[QF_MAX_STOP_BYTES + 1]; /* [n]: the longest proper prefix that ends text[0 .. n) */
    uint16_t size;
    uint16_t matched; /* the longest prefix that ends the text so far */
} stop_matcher;

struct qf_detokenizer {
    const qf_vocabulary *vocabulary;
    bool include_stop_str_in_output, skip_special_tokens;
    bool allow_stop; /* of the last push: what finish goes by */
    bool finished;
    int32_t stop_index;
    int32_t num_stop;
    stop_matcher *stop; /* (num_stop) */
    qf_utf8 utf8;

    /* Decoded text: delivered by the last call, then held back. */
    uint8_t *text; /* (capacity_bytes) */
    size_t size_bytes, delivered_bytes, capacity_bytes;
};

static qf_status matcher_init(stop_matcher *self, const char *text, int32_t index, qf_error *err)
{
    size_t size = strnlen(text, QF_MAX_STOP_BYTES + 1);
    if (size == 0) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "stop[%d] is empty: must have at least 1 byte", index);
    }
    if (size > QF_MAX_STOP_BYTES) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "stop[%d] is longer than %d bytes", index, QF_MAX_STOP_BYTES);
    }
    /* A stop string begins with a whole character, so what is held back does too. */
    if (!qf_utf8_is_valid((const uint8_t *)text, size)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "stop[%d] (%zu bytes) is not valid UTF-8", index, size);
    }
    memcpy(self->text, text, size);
    self->size = (uint16_t)size;
    for (size_t i = 1; i < size; i++) {
        uint16_t n = self->fallback[i];
        while (n > 0 && self->text[n] != self->text[i]) {
            n = self->fallback[n];
        }
        self->fallback[i + 1] = self->text[n] == self->text[i] ? (uint16_t)(n + 1) : 0;
    }
    return QF_OK;
}

/* Adds a byte of text. True if the whole string ends here. */
static bool matcher_push(stop_matcher *self, uint8_t byte)
{
    uint16_t n = self->matched;
    while (n > 0 && (n == self->size || self->text[n] != byte)) {
        n = self->fallback[n];
    }
    if (self->text[n] == byte) {
        n++;
    }
    self->matched = n;
    return n == self->size;
}

qf_status qf_detokenizer_create(const qf_vocabulary *vocabulary, const qf_detokenizer_options *options,
                                qf_detokenizer **out, qf_error *err)
{
    *out = NULL;
    if (options->num_stop < 0 || options->num_stop > QF_MAX_STOP_STRINGS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%d stop strings: must be 0 to %d", options->num_stop,
                       QF_MAX_STOP_STRINGS);
    }
    qf_detokenizer *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "detokenizer", err));
    self->vocabulary = vocabulary;
    self->include_stop_str_in_output = options->include_stop_str_in_output;
    self->skip_special_tokens = options->skip_special_tokens;
    self->allow_stop = true;
    self->stop_index = -1;
    self->num_stop = options->num_stop;
    qf_status status;
    QF_TRY_GOTO(qf_alloc((void **)&self->stop, (size_t)self->num_stop, sizeof *self->stop, "stop strings", err), fail);
    for (int32_t i = 0; i < self->num_stop; i++) {
        QF_TRY_GOTO(matcher_init(&self->stop[i], options->stop[i], i, err), fail);
    }
    *out = self;
    return QF_OK;
fail:
    qf_detokenizer_destroy(self);
    return status;
}

void qf_detokenizer_destroy(qf_detokenizer *self)
{
    if (self == NULL) {
        return;
    }
    qf_free(self->stop);
    qf_free(self->text);
    qf_free(self);
}

/* Drops what the last call delivered and makes room for `more` bytes. Changes nothing that counts if it fails. */
static qf_status reserve(qf_detokenizer *self, size_t more, qf_error *err)
{
    size_t held = self->size_bytes - self->delivered_bytes;
    if (held > 0 && self->delivered_bytes > 0) {
        memmove(self->text, self->text + self->delivered_bytes, held);
    }
    self->size_bytes = held;
    self->delivered_bytes = 0;
    size_t needed;
    if (!qf_add_size(held, more, &needed)) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu more bytes of text: too many", more);
    }
    if (needed <= self->capacity_bytes) {
        return QF_OK;
    }
    size_t capacity = needed < 64 ? 64 : needed;
    if (capacity < self->capacity_bytes * 2) {
        capacity = self->capacity_bytes * 2;
    }
    uint8_t *text = qf_realloc(self->text, capacity, 1);
    if (text == NULL) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate text: %zu bytes", capacity);
    }
    self->text = text;
    self->capacity_bytes = capacity;
    return QF_OK;
}

/* Appends decoded bytes until a stop string ends. True if one did: the text then ends where it must. */
static bool append(qf_detokenizer *self, const uint8_t *bytes, size_t size_bytes)
{
    for (size_t i = 0; i < size_bytes; i++) {
        self->text[self->size_bytes++] = bytes[i];
        int32_t found = -1;
        for (int32_t s = 0; s < self->num_stop; s++) {
            if (matcher_push(&self->stop[s], bytes[i]) && (found < 0 || self->stop[s].size > self->stop[found].size)) {
                found = s;
            }
        }
        if (found >= 0 && self->allow_stop) {
            self->stop_index = found;
            self->finished = true;
            if (!self->include_stop_str_in_output) {
                self->size_bytes -= self->stop[found].size;
            }
            return true;
        }
    }
    return false;
}

/* How much of the text's end may still become a stop string. */
static size_t held_back(const qf_detokenizer *self)
{
    size_t longest = 0;
    for (int32_t s = 0; s < self->num_stop; s++) {
        const stop_matcher *stop = &self->stop[s];
        size_t prefix = stop->matched == stop->size ? stop->fallback[stop->size] : stop->matched;
        longest = prefix > longest ? prefix : longest;
    }
    return longest;
}

static void deliver(qf_detokenizer *self, qf_text_delta *out)
{
    self->delivered_bytes = self->finished ? self->size_bytes : self->size_bytes - held_back(self);
    out->text = self->text != NULL ? (const char *)self->text : "";
    out->size_bytes = self->delivered_bytes;
    out->stop_index = self->stop_index;
}

qf_status qf_detokenizer_push(qf_detokenizer *self, int32_t token_id, bool allow_stop, qf_text_delta *out,
                              qf_error *err)
{
    *out = (qf_text_delta){.text = "", .size_bytes = 0, .stop_index = self->stop_index};
    const qf_vocabulary *vocabulary = self->vocabulary;
    const uint8_t *bytes = NULL;
    size_t size = 0;
    if (!self->finished && token_id >= 0 && token_id < vocabulary->num_tokens &&
        !(self->skip_special_tokens && vocabulary->special[token_id] != 0)) {
        bytes = vocabulary->bytes + vocabulary->offsets[token_id];
        size = vocabulary->offsets[token_id + 1] - vocabulary->offsets[token_id];
    }
    size_t most;
    if (!qf_mul_size(size, QF_UTF8_MAX_OUTPUT, &most)) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "token %d has %zu bytes: too many", token_id, size);
    }
    QF_TRY(reserve(self, most, err));
    if (self->finished) {
        return QF_OK;
    }
    self->allow_stop = allow_stop;
    for (size_t i = 0; i < size; i++) {
        uint8_t decoded[QF_UTF8_MAX_OUTPUT];
        size_t decoded_size = qf_utf8_push(&self->utf8, bytes[i], decoded);
        if (append(self, decoded, decoded_size)) {
            break;
        }
    }
    deliver(self, out);
    return QF_OK;
}

qf_status qf_detokenizer_finish(qf_detokenizer *self, qf_text_delta *out, qf_error *err)
{
    *out = (qf_text_delta){.text = "", .size_bytes = 0, .stop_index = self->stop_index};
    QF_TRY(reserve(self, QF_UTF8_MAX_OUTPUT, err));
    if (self->finished) {
        return QF_OK;
    }
    uint8_t decoded[QF_UTF8_MAX_OUTPUT];
    size_t decoded_size = qf_utf8_finish(&self->utf8, decoded);
    (void)append(self, decoded, decoded_size);
    self->finished = true;
    deliver(self, out);
    return QF_OK;
}
