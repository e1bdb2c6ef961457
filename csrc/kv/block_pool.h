/* The pool of KV-cache blocks: reference counts, the prefix cache, and the order of eviction. It knows block ids
 * and token ids only, never the device memory behind them. One thread at a time.
 *
 * A block is FREE (ref count 0, no hash), CACHED (ref count 0, hash published: it can be hit, or evicted when the
 * free ones run out, least recently used first), or USED (ref count >= 1, hash published or not). A used block whose
 * hash is already published under another id keeps its hash unpublished, so that its children can be published.
 * The hash of a block covers its tokens and all that come before it: H(parent hash, tokens, salt), keyed with a
 * random key per pool; on a hit the tokens are compared too, so a collision is a miss. The hash names the parent by
 * the parent's hash, never by its id: a child that outlives an evicted parent is unreachable until the same prefix is
 * published again, and is never a false hit when the parent's id is used for something else. */
#ifndef QF_KV_BLOCK_POOL_H
#define QF_KV_BLOCK_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct qf_block_pool qf_block_pool;

#define QF_BLOCK_NONE (-1)

/* block_size: tokens per block. `prefix_caching` false: nothing is ever published or hit. */
qf_status qf_block_pool_create(int32_t num_blocks, int32_t block_size, bool prefix_caching, uint64_t hash_key,
                               qf_block_pool **out, qf_error *err);
void qf_block_pool_destroy(qf_block_pool *self); /* NULL-safe */

int32_t qf_block_pool_num_blocks(const qf_block_pool *self);
int32_t qf_block_pool_block_size(const qf_block_pool *self);
/* Blocks that qf_block_pool_take could return now: free and cached ones. */
int32_t qf_block_pool_num_available(const qf_block_pool *self);
int32_t qf_block_pool_num_cached(const qf_block_pool *self); /* published, with ref count 0 */
int32_t qf_block_pool_ref_count(const qf_block_pool *self, int32_t block);
bool qf_block_pool_is_published(const qf_block_pool *self, int32_t block);

/* A block with ref count 1, evicting the least recently used cached one if need be; QF_BLOCK_NONE if all are used. */
int32_t qf_block_pool_take(qf_block_pool *self);
void qf_block_pool_ref(qf_block_pool *self, int32_t block);
/* At ref count 0 the block becomes cached if it is published, else free. Callers release a sequence's blocks from
 * the last to the first, so that tails are evicted before the prefixes that they need. */
void qf_block_pool_release(qf_block_pool *self, int32_t block);

/* Publishes a full block in use: its KV is final and its block_size tokens are known. `parent` is the block before it
 * in the sequence (already offered here), or QF_BLOCK_NONE for the first. Returns true if the block is published now.
 * It stays unpublished if its hash is published under another id, if its parent has no hash, or if it was in use
 * when the prefix cache was reset. */
bool qf_block_pool_publish(qf_block_pool *self, int32_t block, int32_t parent, const int32_t *token_ids,
                           uint64_t salt);

/* The published block that holds exactly these block_size tokens after `parent`, or QF_BLOCK_NONE. Does not take a
 * reference. */
int32_t qf_block_pool_find(const qf_block_pool *self, int32_t parent, const int32_t *token_ids, uint64_t salt);

/* Forgets every cached block. Those in use keep their contents but are unpublished, and can't be published again
 * before they have been released: nothing computed before the reset is ever hit after it. */
void qf_block_pool_reset_prefix_cache(qf_block_pool *self);

/* Checks every invariant; QF_ERROR_INTERNAL names the first that fails. For tests and debug builds. */
qf_status qf_block_pool_check(const qf_block_pool *self, qf_error *err);

#endif
