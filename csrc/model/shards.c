#include "model/shards.h"

#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "base/json.h"
#include "model/fields.h"

#define MAX_SHARDS 4096
#define MAX_INDEX_BYTES ((size_t)64 << 20)
#define MAX_PATH_BYTES 4096
#define INDEX_NAME "model.safetensors.index.json"
#define SINGLE_NAME "model.safetensors"

static int compare_by_name(const void *a, const void *b)
{
    return strcmp(((const qf_shard_tensor *)a)->tensor->name, ((const qf_shard_tensor *)b)->tensor->name);
}

static const qf_shard_tensor *find(const qf_shards *self, const char *name)
{
    size_t low = 0;
    size_t high = self->num_tensors;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(self->tensors[middle].tensor->name, name);
        if (order == 0) {
            return &self->tensors[middle];
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return NULL;
}

const qf_tensor *qf_shards_find(const qf_shards *self, const char *name)
{
    const qf_shard_tensor *found = find(self, name);
    return found != NULL ? found->tensor : NULL;
}

/* One table over all files. */
static qf_status merge(qf_shards *self, qf_error *err)
{
    size_t total = 0;
    for (int32_t i = 0; i < self->num_files; i++) {
        total += self->files[i].header.num_tensors;
    }
    QF_TRY(qf_alloc((void **)&self->tensors, total, sizeof *self->tensors, "tensor table", err));
    for (int32_t i = 0; i < self->num_files; i++) {
        for (size_t j = 0; j < self->files[i].header.num_tensors; j++) {
            self->tensors[self->num_tensors].tensor = &self->files[i].header.tensors[j];
            self->tensors[self->num_tensors++].shard = i;
        }
    }
    if (total > 0) {
        qsort(self->tensors, total, sizeof *self->tensors, compare_by_name);
    }
    for (size_t i = 1; i < total; i++) {
        const char *name = self->tensors[i].tensor->name;
        if (strcmp(self->tensors[i - 1].tensor->name, name) == 0) {
            return QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%.96s\" is in two shards", name);
        }
    }
    return QF_OK;
}

/* A plain file name: nothing that could lead out of the directory. */
static bool is_shard_name(const qf_json_value *value)
{
    static const char suffix[] = ".safetensors";
    size_t suffix_bytes = sizeof suffix - 1;
    if (value->type != QF_JSON_STRING || value->length <= suffix_bytes || value->length > 255 ||
        strlen(value->string) != value->length || value->string[0] == '.') {
        return false;
    }
    return strchr(value->string, '/') == NULL && strchr(value->string, '\\') == NULL &&
           strcmp(value->string + value->length - suffix_bytes, suffix) == 0;
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct file names of the map, sorted; their index is the shard's number. *names is allocated. */
static qf_status list_shards(const qf_json_value *map, const char ***names, int32_t *count, qf_error *err)
{
    QF_TRY(qf_alloc((void **)names, map->length, sizeof **names, "shard names", err));
    for (size_t i = 0; i < map->length; i++) {
        const qf_json_value *item = &map->items[i];
        if (!is_shard_name(item)) {
            char text[80];
            char name[97];
            return QF_FAIL(err, QF_ERROR_MODEL,
                           "%s: tensor \"%s\" is in %s; expected the name of a .safetensors file beside it", INDEX_NAME,
                           qf_printable(item->key, item->key_length, name, sizeof name),
                           qf_json_describe(item, text, sizeof text));
        }
        (*names)[i] = item->string;
    }
    qsort(*names, map->length, sizeof **names, compare_strings);
    size_t distinct = 0;
    for (size_t i = 0; i < map->length; i++) {
        if (i == 0 || strcmp((*names)[distinct - 1], (*names)[i]) != 0) {
            (*names)[distinct++] = (*names)[i];
        }
    }
    if (distinct > MAX_SHARDS) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: %zu shards; at most %d are read", INDEX_NAME, distinct, MAX_SHARDS);
    }
    *count = (int32_t)distinct;
    return QF_OK;
}

static qf_status open_files(const char *dir, const char *const *names, int32_t count, qf_shards *out, qf_error *err)
{
    QF_TRY(qf_alloc((void **)&out->files, (size_t)count, sizeof *out->files, "shard table", err));
    for (int32_t i = 0; i < count; i++) {
        char path[MAX_PATH_BYTES];
        QF_TRY(qf_model_path(dir, names[i], path, sizeof path, err));
        QF_TRY(qf_safetensors_open(path, &out->files[i], err));
        out->num_files++;
    }
    return merge(out, err);
}

/* Every entry of the index must be in the shard that it names. Tensors that the index leaves out are not seen. */
static qf_status apply_index(qf_shards *self, const qf_json_value *map, const char *const *names, qf_error *err)
{
    for (size_t i = 0; i < map->length; i++) {
        const qf_json_value *item = &map->items[i];
        const qf_shard_tensor *found = strlen(item->key) == item->key_length ? find(self, item->key) : NULL;
        if (found == NULL || strcmp(names[found->shard], item->string) != 0) {
            char name[97];
            return QF_FAIL(err, QF_ERROR_MODEL, "%s: tensor \"%s\" is not in %.128s", INDEX_NAME,
                           qf_printable(item->key, item->key_length, name, sizeof name), item->string);
        }
    }
    size_t kept = 0;
    for (size_t i = 0; i < self->num_tensors; i++) {
        if (qf_json_get(map, self->tensors[i].tensor->name) != NULL) {
            self->tensors[kept++] = self->tensors[i];
        }
    }
    self->num_tensors = kept;
    return QF_OK;
}

static qf_status open_indexed(const char *dir, const char *text, size_t size_bytes, qf_shards *out, qf_error *err)
{
    qf_status status = QF_OK;
    qf_json *json = NULL;
    const char **names = NULL;
    int32_t count = 0;
    qf_json_limits limits = qf_json_default_limits();
    QF_TRY_GOTO(qf_json_parse(text, size_bytes, &limits, INDEX_NAME, &json, err), done);
    const qf_json_value *map = qf_json_get(qf_json_root(json), "weight_map");
    if (map == NULL || map->type != QF_JSON_OBJECT || map->length == 0) {
        status = QF_FAIL(err, QF_ERROR_MODEL, "%s: \"weight_map\" must be an object of tensor names to shard names",
                         INDEX_NAME);
        goto done;
    }
    QF_TRY_GOTO(list_shards(map, &names, &count, err), done);
    QF_TRY_GOTO(open_files(dir, names, count, out, err), done);
    QF_TRY_GOTO(apply_index(out, map, names, err), done);
done:
    qf_free(names);
    qf_json_destroy(json);
    return status;
}

qf_status qf_shards_open(const char *dir, qf_shards *out, qf_error *err)
{
    static const char *const single[1] = {SINGLE_NAME};
    qf_status status = QF_OK;
    char *text = NULL;
    size_t size_bytes;
    memset(out, 0, sizeof *out);
    QF_TRY(qf_model_read_file(dir, INDEX_NAME, MAX_INDEX_BYTES, 1, &text, &size_bytes, err));
    status = text != NULL ? open_indexed(dir, text, size_bytes, out, err) : open_files(dir, single, 1, out, err);
    qf_free(text);
    if (status != QF_OK) {
        qf_shards_close(out);
    }
    return status;
}

void qf_shards_close(qf_shards *self)
{
    for (int32_t i = 0; i < self->num_files; i++) {
        qf_safetensors_close(&self->files[i]);
    }
    qf_free(self->files);
    qf_free(self->tensors);
    memset(self, 0, sizeof *self);
}
