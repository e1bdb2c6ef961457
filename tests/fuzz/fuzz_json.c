/* sources: base/json.c base/status.c base/alloc.c */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

/* libFuzzer's contract: a finding is an abort. */
static void require(int ok)
{
    if (!ok) {
        abort();
    }
}

/* Reads every byte that the document says it has. */
static uint64_t walk(const qf_json_value *value, int depth, size_t *num_values)
{
    uint64_t sum = (uint64_t)value->type + value->length;
    require(depth <= 8);
    (*num_values)++;
    if (value->type == QF_JSON_STRING) {
        require(value->string[value->length] == '\0');
        for (size_t i = 0; i < value->length; i++) {
            sum = sum * 31 + (unsigned char)value->string[i];
        }
    }
    if (value->type == QF_JSON_INT) {
        require(value->number == (double)value->integer);
    }
    if (value->type == QF_JSON_DOUBLE) {
        require(value->number - value->number == 0); /* finite */
    }
    bool container = value->type == QF_JSON_ARRAY || value->type == QF_JSON_OBJECT;
    for (size_t i = 0; container && i < value->length; i++) {
        const qf_json_value *item = &value->items[i];
        require((item->key != NULL) == (value->type == QF_JSON_OBJECT));
        /* Keys are unique, so each is found again; one with an inner NUL cannot be asked for. */
        if (item->key != NULL && strlen(item->key) == item->key_length) {
            require(qf_json_get(value, item->key) == item);
        }
        sum = sum * 31 + walk(item, depth + 1, num_values);
    }
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    qf_error err;
    qf_json *document = NULL;
    qf_json_limits limits = {.max_bytes = 1 << 16, .max_depth = 8, .max_values = 1000};
    qf_status status = qf_json_parse((const char *)data, size, &limits, "fuzz", &document, &err);
    if (status != QF_OK) {
        require(status == QF_ERROR_MODEL && document == NULL && err.status == status);
        require(strncmp(err.message, "fuzz: ", 6) == 0);
        return 0;
    }
    size_t num_values = 0;
    volatile uint64_t sum = walk(qf_json_root(document), 0, &num_values);
    (void)sum;
    require(num_values <= limits.max_values);
    qf_json_destroy(document);
    return 0;
}
