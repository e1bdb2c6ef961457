#include "model/shards.h"

#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "model/fields.h"
#include "model/shard_index.h"

#define MAX_INDEX_BYTES ((size_t)64 << 20)
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

/* `alternative`: the file that would have done where the first is missing, or NULL. */
static qf_status open_files(const char *dir, const char *const *names, int32_t count, const char *alternative,
                            qf_shards *out, qf_error *err)
{
    QF_TRY(qf_alloc((void **)&out->files, (size_t)count, sizeof *out->files, "shard table", err));
    for (int32_t i = 0; i < count; i++) {
        QF_TRY(qf_safetensors_open(dir, names[i], alternative, &out->files[i], err));
        out->num_files++;
    }
    return merge(out, err);
}

/* Every entry of the index must be in the shard that it names. Tensors that the index leaves out are not seen. */
static qf_status apply_index(qf_shards *self, const qf_shard_index *index, qf_error *err)
{
    const qf_json_value *map = index->map;
    for (size_t i = 0; i < map->length; i++) {
        const qf_json_value *item = &map->items[i];
        const qf_shard_tensor *found = strlen(item->key) == item->key_length ? find(self, item->key) : NULL;
        if (found == NULL || strcmp(index->names[found->shard], item->string) != 0) {
            char name[97];
            return QF_FAIL(err, QF_ERROR_MODEL, "%s: tensor \"%s\" is not in %.128s", QF_SHARD_INDEX_NAME,
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
    qf_shard_index index;
    QF_TRY(qf_shard_index_parse(text, size_bytes, &index, err));
    qf_status status = open_files(dir, index.names, index.count, NULL, out, err);
    if (status == QF_OK) {
        status = apply_index(out, &index, err);
    }
    qf_shard_index_deinit(&index);
    return status;
}

qf_status qf_shards_open(const char *dir, qf_shards *out, qf_error *err)
{
    static const char *const single[1] = {SINGLE_NAME};
    qf_status status = QF_OK;
    char *text = NULL;
    size_t size_bytes;
    memset(out, 0, sizeof *out);
    QF_TRY(qf_model_read_file(dir, QF_SHARD_INDEX_NAME, MAX_INDEX_BYTES, 1, &text, &size_bytes, err));
    status = text != NULL ? open_indexed(dir, text, size_bytes, out, err)
                          : open_files(dir, single, 1, QF_SHARD_INDEX_NAME, out, err);
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
