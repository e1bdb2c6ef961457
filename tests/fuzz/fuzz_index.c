/* sources: base/json.c base/status.c base/alloc.c model/shard_index.c model/fields.c */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/shard_index.h"

/* libFuzzer's contract: a finding is an abort. */
static void require(int ok)
{
    if (!ok) {
        abort();
    }
}

static int compare(const void *key, const void *item) { return strcmp(key, *(const char *const *)item); }

/* A name that cannot lead out of the checkpoint's directory. */
static void check_name(const char *name)
{
    static const char suffix[] = ".safetensors";
    size_t length = strlen(name);
    require(length >= sizeof suffix && length <= 255 && name[0] != '.');
    require(strcmp(name + length - (sizeof suffix - 1), suffix) == 0);
    for (size_t i = 0; i < length; i++) {
        require((unsigned char)name[i] >= 0x20 && name[i] != 0x7f && name[i] != '/' && name[i] != '\\');
    }
}

static void check_accepted(const qf_shard_index *index)
{
    bool *used = calloc((size_t)index->count, sizeof *used); /* (count) */
    require(used != NULL && index->count > 0 && index->count <= QF_MAX_SHARDS);
    require(index->map->type == QF_JSON_OBJECT && index->map->length >= (size_t)index->count);
    for (int32_t i = 0; i < index->count; i++) {
        check_name(index->names[i]);
        require(i == 0 || strcmp(index->names[i - 1], index->names[i]) < 0);
    }
    for (size_t i = 0; i < index->map->length; i++) {
        const char *name = index->map->items[i].string;
        const char **found = bsearch(name, index->names, (size_t)index->count, sizeof *index->names, compare);
        require(found != NULL && strlen(name) == index->map->items[i].length);
        used[found - index->names] = true;
    }
    for (int32_t i = 0; i < index->count; i++) {
        require(used[i]);
    }
    free(used);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    qf_error err;
    qf_shard_index index;
    qf_status status = qf_shard_index_parse((const char *)data, size, &index, &err);
    if (status != QF_OK) {
        require(status == QF_ERROR_MODEL && err.status == status);
        require(index.json == NULL && index.map == NULL && index.names == NULL && index.count == 0);
        require(strncmp(err.message, QF_SHARD_INDEX_NAME, strlen(QF_SHARD_INDEX_NAME)) == 0);
        for (const char *c = err.message; *c != '\0'; c++) {
            require(*c >= 0x20 && *c < 0x7f);
        }
        return 0;
    }
    check_accepted(&index);
    qf_shard_index_deinit(&index);
    return 0;
}
