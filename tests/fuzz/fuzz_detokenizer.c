/* sources: engine/utf8.c engine/detokenizer.c base/status.c base/alloc.c */
/* Input: flags (1: include stop, 2: skip special, 12: number of stop strings, 16: stops not allowed at first), then per
 * stop string a length (of which 15 counts) and its bytes, then tokens: length (15 counts; 128: special) and bytes. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/detokenizer.h"
#include "engine/utf8.h"

#define MAX_STOP 3
#define MAX_TOKENS 4096
#define MAX_BYTES 16384

/* libFuzzer's contract: a finding is an abort. */
static void require(int ok)
{
    if (!ok) {
        abort();
    }
}

typedef struct input {
    char stop[MAX_STOP][16];
    const char *stop_list[MAX_STOP];
    qf_detokenizer_options options;
    int32_t allow_from;
    uint8_t bytes[MAX_BYTES];
    uint32_t offsets[MAX_TOKENS + 1];
    uint8_t special[MAX_TOKENS];
    int32_t num_tokens;
} input;

typedef struct output {
    uint8_t text[MAX_BYTES * 3 + 16];
    size_t size;
    int32_t stop_index;
} output;

/* The next `length` bytes, or as many as there are. */
static const uint8_t *take(const uint8_t **data, size_t *left, size_t *length)
{
    const uint8_t *start = *data;
    *length = *length < *left ? *length : *left;
    *data += *length;
    *left -= *length;
    return start;
}

static void parse(const uint8_t *data, size_t left, input *in)
{
    size_t one = 1;
    uint8_t flags = left > 0 ? *take(&data, &left, &one) : 0;
    in->options = (qf_detokenizer_options){.stop = in->stop_list,
                                           .num_stop = flags >> 2 & 3,
                                           .include_stop_str_in_output = (flags & 1) != 0,
                                           .skip_special_tokens = (flags & 2) != 0};
    in->allow_from = (flags & 16) != 0 ? 3 : 0;
    for (int32_t i = 0; i < in->options.num_stop; i++) {
        one = 1;
        size_t length = left > 0 ? *take(&data, &left, &one) & 15u : 0;
        const uint8_t *bytes = take(&data, &left, &length);
        memcpy(in->stop[i], bytes, length);
        in->stop[i][length] = '\0';
        in->stop_list[i] = in->stop[i];
    }
    in->num_tokens = 0;
    in->offsets[0] = 0;
    while (left > 0 && in->num_tokens < MAX_TOKENS && in->offsets[in->num_tokens] + 15 <= MAX_BYTES) {
        one = 1;
        uint8_t head = *take(&data, &left, &one);
        size_t length = head & 15u;
        const uint8_t *bytes = take(&data, &left, &length);
        uint32_t at = in->offsets[in->num_tokens];
        memcpy(in->bytes + at, bytes, length);
        in->special[in->num_tokens] = head >> 7;
        in->offsets[++in->num_tokens] = at + (uint32_t)length;
    }
}

static void add(output *out, const qf_text_delta *delta)
{
    require(qf_utf8_is_valid((const uint8_t *)delta->text, delta->size_bytes));
    require(out->stop_index < 0 || delta->size_bytes == 0);
    require(delta->size_bytes <= sizeof out->text - out->size);
    memcpy(out->text + out->size, delta->text, delta->size_bytes);
    out->size += delta->size_bytes;
    out->stop_index = delta->stop_index;
}

/* False if the options are refused. */
static bool run(const input *in, output *out)
{
    qf_vocabulary *vocabulary;
    qf_detokenizer *self;
    qf_text_delta delta;
    qf_error err;
    out->size = 0;
    out->stop_index = -1;
    require(qf_vocabulary_create(in->bytes, in->offsets, in->special, in->num_tokens, &vocabulary, &err) == QF_OK);
    qf_status status = qf_detokenizer_create(vocabulary, &in->options, &self, &err);
    require(status == QF_OK || status == QF_ERROR_INVALID_ARGUMENT);
    if (status == QF_OK) {
        for (int32_t i = 0; i < in->num_tokens; i++) {
            require(qf_detokenizer_push(self, i, i >= in->allow_from, &delta, &err) == QF_OK);
            add(out, &delta);
        }
        require(qf_detokenizer_finish(self, &delta, &err) == QF_OK);
        add(out, &delta);
        qf_detokenizer_destroy(self);
    }
    qf_vocabulary_destroy(vocabulary);
    return status == QF_OK;
}

/* The same bytes in one token: text and stop must not depend on how a stream is cut. */
static void join(const input *in, input *joined)
{
    *joined = *in;
    joined->options.stop = in->stop_list;
    uint32_t size = 0;
    for (int32_t i = 0; i < in->num_tokens; i++) {
        if (!in->options.skip_special_tokens || in->special[i] == 0) {
            uint32_t length = in->offsets[i + 1] - in->offsets[i];
            memcpy(joined->bytes + size, in->bytes + in->offsets[i], length);
            size += length;
        }
    }
    joined->special[0] = 0;
    joined->offsets[1] = size;
    joined->num_tokens = 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input *in = calloc(2, sizeof *in);
    output *out = calloc(2, sizeof *out);
    require(in != NULL && out != NULL);
    parse(data, size, in);
    if (run(in, out)) {
        require(qf_utf8_is_valid(out->text, out->size));
        const char *found = out->stop_index >= 0 ? in->stop[out->stop_index] : NULL;
        size_t searched = out->size;
        if (found != NULL && in->options.include_stop_str_in_output) {
            require(searched >= strlen(found));
            require(memcmp(out->text + searched - strlen(found), found, strlen(found)) == 0);
            searched--; /* no other may end before it */
        }
        for (int32_t i = 0; in->allow_from == 0 && i < in->options.num_stop; i++) {
            require(memmem(out->text, searched, in->stop[i], strlen(in->stop[i])) == NULL);
        }
        if (in->allow_from == 0) {
            join(in, in + 1);
            require(run(in + 1, out + 1));
            require(out[1].size == out->size && out[1].stop_index == out->stop_index);
            require(memcmp(out[1].text, out->text, out->size) == 0);
        }
    }
    free(in);
    free(out);
    return 0;
}
