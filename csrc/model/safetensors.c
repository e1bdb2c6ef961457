#include "model/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "base/json.h"
#include "model/fields.h"

#define MAX_TENSORS 262144
#define PREFIX_BYTES 8u

/* A tensor as the header has it, before it is known to lie inside the data. */
typedef struct entry {
    uint64_t begin, end;
    size_t index; /* into qf_safetensors.tensors before these are sorted by name */
} entry;

static uint64_t read_u64(const uint8_t *p)
{
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) {
        value |= (uint64_t)p[i] << (8 * i);
    }
    return value;
}

static qf_status fail_tensor(const char *what, const qf_tensor *tensor, const char *problem, qf_error *err)
{
    char name[97];
    return QF_FAIL(err, QF_ERROR_MODEL, "%s: tensor \"%s\": %s", what,
                   qf_printable(tensor->name, strlen(tensor->name), name, sizeof name), problem);
}

static bool find_dtype(const qf_json_value *value, qf_dtype *out)
{
    for (int i = 0; i < QF_DTYPE_COUNT; i++) {
        if (qf_json_is_string(value, qf_dtype_name((qf_dtype)i))) {
            *out = (qf_dtype)i;
            return true;
        }
    }
    return false;
}

/* Fills dtype, shape and size_bytes from the JSON object; checks that the offsets agree with the size. */
static qf_status parse_tensor(const char *what, const qf_json_value *value, qf_tensor *out, entry *place,
                              qf_error *err)
{
    if (value->type != QF_JSON_OBJECT) {
        return fail_tensor(what, out, "is no object", err);
    }
    if (!find_dtype(qf_json_get(value, "dtype"), &out->dtype)) {
        char text[80];
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: tensor \"%.96s\": \"dtype\" is %s; expected a safetensors dtype", what,
                       out->name, qf_json_describe(qf_json_get(value, "dtype"), text, sizeof text));
    }
    const qf_json_value *shape = qf_json_get(value, "shape");
    if (shape == NULL || shape->type != QF_JSON_ARRAY || shape->length > 4) {
        return fail_tensor(what, out, "\"shape\" must be a list of at most 4 integers", err);
    }
    size_t bytes = qf_dtype_size(out->dtype);
    out->rank = (int32_t)shape->length;
    for (size_t i = 0; i < shape->length; i++) {
        const qf_json_value *dim = &shape->items[i];
        if (dim->type != QF_JSON_INT || dim->integer < 0) {
            return fail_tensor(what, out, "\"shape\" must hold integers from 0", err);
        }
        out->shape[i] = dim->integer;
        if (!qf_mul_size(bytes, (size_t)dim->integer, &bytes)) {
            return fail_tensor(what, out, "the product of \"shape\" is too large", err);
        }
    }
    const qf_json_value *offsets = qf_json_get(value, "data_offsets");
    if (offsets == NULL || offsets->type != QF_JSON_ARRAY || offsets->length != 2 ||
        offsets->items[0].type != QF_JSON_INT || offsets->items[1].type != QF_JSON_INT ||
        offsets->items[0].integer < 0 || offsets->items[1].integer < offsets->items[0].integer) {
        return fail_tensor(what, out, "\"data_offsets\" must be two integers, 0 <= begin <= end", err);
    }
    place->begin = (uint64_t)offsets->items[0].integer;
    place->end = (uint64_t)offsets->items[1].integer;
    if (place->end - place->begin != bytes) {
        return QF_FAIL(err, QF_ERROR_MODEL,
                       "%s: tensor \"%.96s\": \"data_offsets\" span %llu bytes; expected %zu by dtype and shape", what,
                       out->name, (unsigned long long)(place->end - place->begin), bytes);
    }
    out->size_bytes = bytes;
    return QF_OK;
}

static qf_status check_metadata(const char *what, const qf_json_value *metadata, qf_error *err)
{
    if (metadata->type == QF_JSON_NULL) {
        return QF_OK;
    }
    bool ok = metadata->type == QF_JSON_OBJECT;
    for (size_t i = 0; ok && i < metadata->length; i++) {
        ok = metadata->items[i].type == QF_JSON_STRING;
    }
    if (!ok) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: \"__metadata__\" must map strings to strings", what);
    }
    return QF_OK;
}

static bool is_metadata(const qf_json_value *member)
{
    const char *name = "__metadata__";
    return member->key_length == strlen(name) && memcmp(member->key, name, member->key_length) == 0;
}

static int compare_entries(const void *a, const void *b)
{
    const entry *x = a;
    const entry *y = b;
    if (x->begin != y->begin) {
        return x->begin < y->begin ? -1 : 1;
    }
    return (x->end > y->end) - (x->end < y->end);
}

static int compare_tensors(const void *a, const void *b)
{
    return strcmp(((const qf_tensor *)a)->name, ((const qf_tensor *)b)->name);
}

/* The tensors must tile the data without a hole or an overlap: then no byte hides between them. */
static qf_status place_tensors(const char *what, const uint8_t *data, uint64_t data_bytes, entry *entries,
                               qf_safetensors *out, qf_error *err)
{
    uint64_t position = 0;
    if (out->num_tensors > 0) {
        qsort(entries, out->num_tensors, sizeof *entries, compare_entries);
    }
    for (size_t i = 0; i < out->num_tensors; i++) {
        qf_tensor *tensor = &out->tensors[entries[i].index];
        if (entries[i].begin != position || entries[i].end > data_bytes) {
            return QF_FAIL(err, QF_ERROR_MODEL,
                           "%s: tensor \"%.96s\" has bytes %llu to %llu of the data; expected to begin at %llu and to "
                           "end by %llu",
                           what, tensor->name, (unsigned long long)entries[i].begin,
                           (unsigned long long)entries[i].end, (unsigned long long)position,
                           (unsigned long long)data_bytes);
        }
        tensor->data = data + entries[i].begin;
        position = entries[i].end;
    }
    if (position != data_bytes) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: the tensors end at byte %llu of the data, which has %llu", what,
                       (unsigned long long)position, (unsigned long long)data_bytes);
    }
    return QF_OK;
}

/* Copies the names, which the JSON document owns, and counts the tensors. */
static qf_status collect_names(const char *what, const qf_json_value *root, qf_safetensors *out, qf_error *err)
{
    size_t count = 0;
    size_t bytes = 0;
    for (size_t i = 0; i < root->length; i++) {
        const qf_json_value *member = &root->items[i];
        if (is_metadata(member)) {
            continue;
        }
        if (member->key_length == 0 || member->key_length > QF_SAFETENSORS_MAX_NAME_BYTES ||
            memchr(member->key, '\0', member->key_length) != NULL) {
            return QF_FAIL(err, QF_ERROR_MODEL,
                           "%s: tensor %zu has a name of %zu bytes or with a NUL; expected 1 to %u bytes", what, i,
                           member->key_length, QF_SAFETENSORS_MAX_NAME_BYTES);
        }
        count++;
        bytes += member->key_length + 1;
    }
    if (count > MAX_TENSORS) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: %zu tensors; at most %d are read", what, count, MAX_TENSORS);
    }
    QF_TRY(qf_alloc((void **)&out->names, bytes, 1, "tensor names", err));
    QF_TRY(qf_alloc((void **)&out->tensors, count, sizeof *out->tensors, "tensor table", err));
    char *name = out->names;
    for (size_t i = 0; i < root->length; i++) {
        const qf_json_value *member = &root->items[i];
        if (is_metadata(member)) {
            continue;
        }
        memcpy(name, member->key, member->key_length);
        name[member->key_length] = '\0';
        out->tensors[out->num_tensors++].name = name;
        name += member->key_length + 1;
    }
    return QF_OK;
}

static qf_status parse_header(const char *what, const qf_json_value *root, const uint8_t *data, uint64_t data_bytes,
                              qf_safetensors *out, qf_error *err)
{
    qf_status status = QF_OK;
    entry *entries = NULL;
    size_t index = 0;
    QF_TRY_GOTO(collect_names(what, root, out, err), done);
    QF_TRY_GOTO(qf_alloc((void **)&entries, out->num_tensors, sizeof *entries, "tensor places", err), done);
    for (size_t i = 0; i < root->length; i++) {
        const qf_json_value *member = &root->items[i];
        if (is_metadata(member)) {
            QF_TRY_GOTO(check_metadata(what, member, err), done);
            continue;
        }
        QF_TRY_GOTO(parse_tensor(what, member, &out->tensors[index], &entries[index], err), done);
        entries[index].index = index;
        index++;
    }
    QF_TRY_GOTO(place_tensors(what, data, data_bytes, entries, out, err), done);
    if (out->num_tensors > 0) {
        qsort(out->tensors, out->num_tensors, sizeof *out->tensors, compare_tensors);
    }
done:
    qf_free(entries);
    return status;
}

qf_status qf_safetensors_parse(const uint8_t *data, size_t size_bytes, const char *what, qf_safetensors *out,
                               qf_error *err)
{
    qf_status status = QF_OK;
    qf_json *json = NULL;
    memset(out, 0, sizeof *out);
    if (size_bytes < PREFIX_BYTES) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: %zu bytes; a safetensors file has at least %u", what, size_bytes,
                       PREFIX_BYTES);
    }
    uint64_t header_bytes = read_u64(data);
    if (header_bytes > QF_SAFETENSORS_MAX_HEADER_BYTES || header_bytes > size_bytes - PREFIX_BYTES) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: a header of %llu bytes; at most %zu fit in the file, and %u are read",
                       what, (unsigned long long)header_bytes, size_bytes - PREFIX_BYTES,
                       QF_SAFETENSORS_MAX_HEADER_BYTES);
    }
    if (header_bytes == 0 || data[PREFIX_BYTES] != '{') {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: the header does not begin with '{'", what);
    }
    const uint8_t *body = data + PREFIX_BYTES + header_bytes;
    qf_json_limits limits = qf_json_default_limits();
    limits.max_bytes = QF_SAFETENSORS_MAX_HEADER_BYTES;
    limits.max_depth = 16; /* members that are not read may nest */
    const char *header = (const char *)data + PREFIX_BYTES;
    uint64_t body_bytes = size_bytes - PREFIX_BYTES - header_bytes;
    QF_TRY_GOTO(qf_json_parse(header, (size_t)header_bytes, &limits, what, &json, err), fail);
    QF_TRY_GOTO(parse_header(what, qf_json_root(json), body, body_bytes, out, err), fail);
    qf_json_destroy(json);
    return QF_OK;
fail:
    qf_json_destroy(json);
    qf_safetensors_deinit(out);
    return status;
}

void qf_safetensors_deinit(qf_safetensors *self)
{
    qf_free(self->tensors);
    qf_free(self->names);
    memset(self, 0, sizeof *self);
}
