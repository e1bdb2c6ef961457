/* Three intrusive structures over one array of blocks: the free list, the list of cached blocks in order of
 * eviction, and the hash table of the published ones. Every operation is O(1) but for hashing block_size tokens. */
#include "kv/block_pool.h"

#include <stddef.h>
#include <string.h>

#include "base/alloc.h"
#include "base/hash.h"

/* Everything that decides whether a block can stand for another one, apart from its tokens. */
typedef struct block_key {
    qf_hash128 hash;   /* of parent, salt and tokens */
    qf_hash128 parent; /* the parent's hash; zero for the first block */
    uint64_t salt;
} block_key;

typedef struct pool_block {
    block_key key; /* valid if has_hash */
    int32_t ref_count;
    int32_t prev, next;  /* in the free list or the cached list: while ref_count is 0 */
    int32_t bucket_next; /* in the hash table: while published */
    bool has_hash;
    bool published; /* implies has_hash */
    bool stale;     /* in use since before the last reset: never published */
} pool_block;

/* Doubly linked by block id, so that a hit can leave the middle in O(1). */
typedef struct block_list {
    int32_t head, tail, count;
} block_list;

struct qf_block_pool {
    int32_t num_blocks, block_size;
    bool prefix_caching;
    uint64_t hash_key;
    pool_block *blocks; /* (num_blocks) */
    int32_t *token_ids; /* (num_blocks, block_size): rows of published blocks */
    int32_t *buckets;   /* (num_buckets): first published block, or QF_BLOCK_NONE */
    uint64_t num_buckets; /* a power of two, at least 2 * num_blocks */
    block_list free;
    block_list cached; /* head: least recently used, evicted first */
    int32_t num_published;
};

static void list_push_back(qf_block_pool *self, block_list *list, int32_t id)
{
    pool_block *block = &self->blocks[id];
    block->prev = list->tail;
    block->next = QF_BLOCK_NONE;
    if (list->tail != QF_BLOCK_NONE) {
        self->blocks[list->tail].next = id;
    } else {
        list->head = id;
    }
    list->tail = id;
    list->count++;
}

static void list_remove(qf_block_pool *self, block_list *list, int32_t id)
{
    pool_block *block = &self->blocks[id];
    if (block->prev != QF_BLOCK_NONE) {
        self->blocks[block->prev].next = block->next;
    } else {
        list->head = block->next;
    }
    if (block->next != QF_BLOCK_NONE) {
        self->blocks[block->next].prev = block->prev;
    } else {
        list->tail = block->prev;
    }
    block->prev = block->next = QF_BLOCK_NONE;
    list->count--;
}

static int32_t *block_tokens(const qf_block_pool *self, int32_t id)
{
    return self->token_ids + (size_t)id * (size_t)self->block_size;
}

/* The tokens are hashed first and their digest with the parent's hash and the salt second, under another key: no
 * buffer is needed, and a message of one kind can't be taken for the other. */
static block_key make_key(const qf_block_pool *self, qf_hash128 parent, const int32_t *token_ids, uint64_t salt)
{
    const uint64_t key1 = self->hash_key ^ 0x9e3779b97f4a7c15u;
    qf_hash128 tokens =
        qf_siphash128(token_ids, (size_t)self->block_size * sizeof *token_ids, self->hash_key, key1);
    uint64_t message[5] = {parent.low, parent.high, salt, tokens.low, tokens.high};
    block_key key = {.parent = parent, .salt = salt};
    key.hash = qf_siphash128(message, sizeof message, self->hash_key, ~key1);
    return key;
}

static bool same_hash(qf_hash128 a, qf_hash128 b) { return a.low == b.low && a.high == b.high; }

static int32_t *bucket_of(const qf_block_pool *self, qf_hash128 hash)
{
    return &self->buckets[hash.low & (self->num_buckets - 1)];
}

static bool holds(const qf_block_pool *self, int32_t id, const block_key *key, const int32_t *token_ids)
{
    const pool_block *block = &self->blocks[id];
    return same_hash(block->key.hash, key->hash) && same_hash(block->key.parent, key->parent) &&
           block->key.salt == key->salt &&
           memcmp(block_tokens(self, id), token_ids, (size_t)self->block_size * sizeof *token_ids) == 0;
}

/* The published block with this hash, whatever its tokens. */
static int32_t find_hash(const qf_block_pool *self, qf_hash128 hash)
{
    int32_t id = *bucket_of(self, hash);
    while (id != QF_BLOCK_NONE && !same_hash(self->blocks[id].key.hash, hash)) {
        id = self->blocks[id].bucket_next;
    }
    return id;
}

static void unpublish(qf_block_pool *self, int32_t id)
{
    pool_block *block = &self->blocks[id];
    int32_t *link = bucket_of(self, block->key.hash);
    while (*link != id) {
        link = &self->blocks[*link].bucket_next;
    }
    *link = block->bucket_next;
    block->bucket_next = QF_BLOCK_NONE;
    block->published = false;
    block->has_hash = false;
    self->num_published--;
}

qf_status qf_block_pool_create(int32_t num_blocks, int32_t block_size, bool prefix_caching, uint64_t hash_key,
                               qf_block_pool **out, qf_error *err)
{
    *out = NULL;
    if (num_blocks < 1 || block_size < 1) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT,
                       "a block pool of %d blocks of %d tokens: both must be at least 1", num_blocks, block_size);
    }
    uint64_t num_buckets = 1;
    while (num_buckets < 2 * (uint64_t)num_blocks) {
        num_buckets *= 2;
    }
    /* Without prefix caching no tokens are ever stored. */
    size_t num_tokens = 0;
    if (prefix_caching && !qf_mul_size((size_t)num_blocks, (size_t)block_size, &num_tokens)) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%d blocks of %d tokens: the token count overflows", num_blocks,
                       block_size);
    }
    qf_status status;
    void *memory;
    QF_TRY(qf_alloc(&memory, 1, sizeof(qf_block_pool), "the block pool", err));
    qf_block_pool *self = memory;
    QF_TRY_GOTO(qf_alloc(&memory, (size_t)num_blocks, sizeof *self->blocks, "the blocks of the pool", err), fail);
    self->blocks = memory;
    QF_TRY_GOTO(qf_alloc(&memory, num_tokens, sizeof *self->token_ids, "the tokens of cached blocks", err), fail);
    self->token_ids = memory;
    QF_TRY_GOTO(qf_alloc(&memory, (size_t)num_buckets, sizeof *self->buckets, "the prefix cache's table", err), fail);
    self->buckets = memory;

    self->num_blocks = num_blocks;
    self->block_size = block_size;
    self->prefix_caching = prefix_caching;
    self->hash_key = hash_key;
    self->num_buckets = num_buckets;
    for (uint64_t i = 0; i < num_buckets; i++) {
        self->buckets[i] = QF_BLOCK_NONE;
    }
    self->free = self->cached = (block_list){QF_BLOCK_NONE, QF_BLOCK_NONE, 0};
    for (int32_t id = 0; id < num_blocks; id++) {
        self->blocks[id].bucket_next = QF_BLOCK_NONE;
        list_push_back(self, &self->free, id);
    }
    *out = self;
    return QF_OK;
fail:
    qf_block_pool_destroy(self);
    return status;
}

void qf_block_pool_destroy(qf_block_pool *self)
{
    if (self != NULL) {
        qf_free(self->buckets);
        qf_free(self->token_ids);
        qf_free(self->blocks);
        qf_free(self);
    }
}

int32_t qf_block_pool_num_blocks(const qf_block_pool *self) { return self->num_blocks; }
int32_t qf_block_pool_block_size(const qf_block_pool *self) { return self->block_size; }
int32_t qf_block_pool_num_available(const qf_block_pool *self) { return self->free.count + self->cached.count; }
int32_t qf_block_pool_num_cached(const qf_block_pool *self) { return self->cached.count; }
int32_t qf_block_pool_ref_count(const qf_block_pool *self, int32_t block) { return self->blocks[block].ref_count; }
bool qf_block_pool_is_published(const qf_block_pool *self, int32_t block) { return self->blocks[block].published; }

int32_t qf_block_pool_take(qf_block_pool *self)
{
    int32_t id = self->free.head;
    if (id != QF_BLOCK_NONE) {
        list_remove(self, &self->free, id);
    } else {
        id = self->cached.head;
        if (id == QF_BLOCK_NONE) {
            return QF_BLOCK_NONE;
        }
        list_remove(self, &self->cached, id);
        unpublish(self, id);
    }
    self->blocks[id].ref_count = 1;
    return id;
}

void qf_block_pool_ref(qf_block_pool *self, int32_t block)
{
    if (self->blocks[block].ref_count == 0) {
        list_remove(self, &self->cached, block);
    }
    self->blocks[block].ref_count++;
}

void qf_block_pool_release(qf_block_pool *self, int32_t id)
{
    pool_block *block = &self->blocks[id];
    if (--block->ref_count > 0) {
        return;
    }
    block->stale = false;
    if (block->published) {
        list_push_back(self, &self->cached, id);
    } else {
        block->has_hash = false;
        list_push_back(self, &self->free, id);
    }
}

bool qf_block_pool_publish(qf_block_pool *self, int32_t id, int32_t parent, const int32_t *token_ids, uint64_t salt)
{
    pool_block *block = &self->blocks[id];
    if (block->published) {
        return true;
    }
    if (!self->prefix_caching || block->stale || (parent != QF_BLOCK_NONE && !self->blocks[parent].has_hash)) {
        return false;
    }
    qf_hash128 parent_hash = {0, 0};
    if (parent != QF_BLOCK_NONE) {
        parent_hash = self->blocks[parent].key.hash;
    }
    block_key key = make_key(self, parent_hash, token_ids, salt);
    int32_t other = find_hash(self, key.hash);
    if (other != QF_BLOCK_NONE) {
        /* A duplicate passes its hash on to its children; a collision has none that could be told apart. */
        block->has_hash = holds(self, other, &key, token_ids);
        block->key = key;
        return false;
    }
    block->key = key;
    block->has_hash = block->published = true;
    memcpy(block_tokens(self, id), token_ids, (size_t)self->block_size * sizeof *token_ids);
    int32_t *bucket = bucket_of(self, key.hash);
    block->bucket_next = *bucket;
    *bucket = id;
    self->num_published++;
    return true;
}

int32_t qf_block_pool_find(const qf_block_pool *self, int32_t parent, const int32_t *token_ids, uint64_t salt)
{
    if (self->num_published == 0 || (parent != QF_BLOCK_NONE && !self->blocks[parent].has_hash)) {
        return QF_BLOCK_NONE;
    }
    qf_hash128 parent_hash = {0, 0};
    if (parent != QF_BLOCK_NONE) {
        parent_hash = self->blocks[parent].key.hash;
    }
    block_key key = make_key(self, parent_hash, token_ids, salt);
    int32_t id = find_hash(self, key.hash);
    return id != QF_BLOCK_NONE && holds(self, id, &key, token_ids) ? id : QF_BLOCK_NONE;
}

void qf_block_pool_reset_prefix_cache(qf_block_pool *self)
{
    for (int32_t id = 0; id < self->num_blocks; id++) {
        pool_block *block = &self->blocks[id];
        if (block->published) {
            unpublish(self, id);
            if (block->ref_count == 0) {
                list_remove(self, &self->cached, id);
                list_push_back(self, &self->free, id);
            }
        }
        block->has_hash = false;
        block->stale = block->ref_count > 0;
    }
}

/* Walks one list: links agree both ways, the count is right, and every member is of the list's kind. */
static qf_status check_list(const qf_block_pool *self, const block_list *list, bool published, const char *name,
                            qf_error *err)
{
    int32_t count = 0, prev = QF_BLOCK_NONE;
    for (int32_t id = list->head; id != QF_BLOCK_NONE; id = self->blocks[id].next) {
        const pool_block *block = &self->blocks[id];
        if (++count > list->count || block->prev != prev) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "the %s list is broken at block %d, its %dth of %d", name, id, count,
                           list->count);
        }
        if (block->ref_count != 0 || block->published != published || block->has_hash != published || block->stale) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "block %d is in the %s list with ref count %d, published %d", id,
                           name, block->ref_count, block->published);
        }
        prev = id;
    }
    if (count != list->count || prev != list->tail) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "the %s list has %d blocks, not %d", name, count, list->count);
    }
    return QF_OK;
}

/* Every published block is in the bucket of its hash, once, with the hash that its tokens give. */
static qf_status check_table(const qf_block_pool *self, qf_error *err)
{
    int32_t count = 0;
    for (uint64_t bucket = 0; bucket < self->num_buckets; bucket++) {
        for (int32_t id = self->buckets[bucket]; id != QF_BLOCK_NONE; id = self->blocks[id].bucket_next) {
            const pool_block *block = &self->blocks[id];
            if (++count > self->num_published) {
                return QF_FAIL(err, QF_ERROR_INTERNAL, "the hash table holds more than the %d published blocks",
                               self->num_published);
            }
            block_key key = make_key(self, block->key.parent, block_tokens(self, id), block->key.salt);
            if (!block->published || !same_hash(key.hash, block->key.hash) || find_hash(self, key.hash) != id) {
                return QF_FAIL(err, QF_ERROR_INTERNAL, "block %d in the hash table does not have its tokens' hash", id);
            }
        }
    }
    if (count != self->num_published) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "the hash table holds %d blocks, %d are published", count,
                       self->num_published);
    }
    return QF_OK;
}

qf_status qf_block_pool_check(const qf_block_pool *self, qf_error *err)
{
    int32_t num_used = 0, num_published = 0;
    for (int32_t id = 0; id < self->num_blocks; id++) {
        const pool_block *block = &self->blocks[id];
        if (block->ref_count < 0 || (block->published && !block->has_hash) || (block->stale && block->has_hash)) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "block %d: ref count %d, published %d, has hash %d, stale %d", id,
                           block->ref_count, block->published, block->has_hash, block->stale);
        }
        num_used += block->ref_count > 0;
        num_published += block->published;
    }
    if (num_used + self->free.count + self->cached.count != self->num_blocks || num_published != self->num_published) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "%d used, %d free and %d cached of %d blocks; %d published, not %d",
                       num_used, self->free.count, self->cached.count, self->num_blocks, num_published,
                       self->num_published);
    }
    QF_TRY(check_list(self, &self->free, false, "free", err));
    QF_TRY(check_list(self, &self->cached, true, "cached", err));
    return check_table(self, err);
}
