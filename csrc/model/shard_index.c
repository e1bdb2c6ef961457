#include "model/shard_index.h"

#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "model/fields.h"

/* A plain file name: nothing that could lead out of the directory, or spoil a message. */
static bool is_shard_name(const qf_json_value *value)
{
    static const char suffix[] = ".safetensors";
    size_t suffix_bytes = sizeof suffix - 1;
    if (value->type != QF_JSON_STRING || value->length <= suffix_bytes || value->length > 255 ||
        strlen(value->string) != value->length || value->string[0] == '.') {
        return false;
    }
    for (size_t i = 0; i < value->length; i++) {
        unsigned char c = (unsigned char)value->string[i];
        if (c < 0x20 || c == 0x7f) {
            return false;
        }
    }
    return strchr(value->string, '/') == NULL && strchr(value->string, '\\') == NULL &&
           strcmp(value->string + value->length - suffix_bytes, suffix) == 0;
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct file names of the map, sorted; their index is the shard's number. */
static qf_status list_shards(qf_shard_index *self, qf_error *err)
{
    const qf_json_value *map = self->map;
    QF_TRY(qf_alloc((void **)&self->names, map->length, sizeof *self->names, "shard names", err));
    for (size_t i = 0; i < map->length; i++) {
        const qf_json_value *item = &map->items[i];
        if (!is_shard_name(item)) {
            char text[80];
            char name[97];
            return QF_FAIL(err, QF_ERROR_MODEL,
                           "%s: tensor \"%s\" is in %s; expected the name of a .safetensors file beside it",
                           QF_SHARD_INDEX_NAME, qf_printable(item->key, item->key_length, name, sizeof name),
                           qf_json_describe(item, text, sizeof text));
        }
        self->names[i] = item->string;
    }
    qsort(self->names, map->length, sizeof *self->names, compare_strings);
    size_t distinct = 0;
    for (size_t i = 0; i < map->length; i++) {
        if (i == 0 || strcmp(self->names[distinct - 1], self->names[i]) != 0) {
            self->names[distinct++] = self->names[i];
        }
    }
    if (distinct > QF_MAX_SHARDS) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: %zu shards; at most %d are read", QF_SHARD_INDEX_NAME,
                       distinct, QF_MAX_SHARDS);
    }
    self->count = (int32_t)distinct;
    return QF_OK;
}

static qf_status parse(const char *text, size_t size_bytes, qf_shard_index *self, qf_error *err)
{
    qf_json_limits limits = qf_json_default_limits();
    QF_TRY(qf_json_parse(text, size_bytes, &limits, QF_SHARD_INDEX_NAME, &self->json, err));
    self->map = qf_json_get(qf_json_root(self->json), "weight_map");
    if (self->map == NULL || self->map->type != QF_JSON_OBJECT || self->map->length == 0) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: \"weight_map\" must be an object of tensor names to shard names",
                       QF_SHARD_INDEX_NAME);
    }
    return list_shards(self, err);
}

qf_status qf_shard_index_parse(const char *text, size_t size_bytes, qf_shard_index *out, qf_error *err)
{
    memset(out, 0, sizeof *out);
    qf_status status = parse(text, size_bytes, out, err);
    if (status != QF_OK) {
        qf_shard_index_deinit(out);
    }
    return status;
}

void qf_shard_index_deinit(qf_shard_index *self)
{
    qf_free(self->names);
    qf_json_destroy(self->json);
    memset(self, 0, sizeof *self);
}
