/* The block pool where a block's hash is its first token: a collision must be a miss. */
/* sources: base/status.c base/alloc.c kv/block_pool.c */
/* sanitizers: address */
#include "check.h"

#include "base/hash.h"
#include "kv/block_pool.h"

/* In place of base/hash.c. */
qf_hash128 qf_siphash128(const void *data, size_t size_bytes, uint64_t key0, uint64_t key1)
{
    (void)key0, (void)key1;
    uint64_t digest = 0;
    if (size_bytes == 2 * sizeof(int32_t)) { /* the tokens */
        memcpy(&digest, data, sizeof(int32_t));
    } else { /* parent (2 words), salt, and the digest of the tokens (2 words) */
        memcpy(&digest, (const char *)data + 3 * sizeof digest, sizeof digest);
    }
    return (qf_hash128){digest, 0};
}

static void test_collision_is_a_miss(void)
{
    qf_error err;
    qf_block_pool *pool;
    const int32_t tokens_a[2] = {1, 2}, tokens_b[2] = {1, 4}, tokens_c[2] = {3, 3};
    CHECK_OK(qf_block_pool_create(3, 2, true, 1, &pool, &err));
    int32_t a = qf_block_pool_take(pool), b = qf_block_pool_take(pool), c = qf_block_pool_take(pool);
    CHECK(qf_block_pool_publish(pool, a, QF_BLOCK_NONE, tokens_a, 0));
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), a);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_b, 0), QF_BLOCK_NONE); /* other tokens */
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 1), QF_BLOCK_NONE); /* another salt */
    CHECK_INT(qf_block_pool_find(pool, a, tokens_a, 0), QF_BLOCK_NONE);             /* another parent */
    CHECK(!qf_block_pool_publish(pool, b, QF_BLOCK_NONE, tokens_b, 0));
    CHECK(!qf_block_pool_publish(pool, c, b, tokens_c, 0)); /* nor is anything published after it */
    CHECK_OK(qf_block_pool_check(pool, &err));
    qf_block_pool_release(pool, c);
    qf_block_pool_release(pool, b);
    qf_block_pool_release(pool, a);
    CHECK_INT(qf_block_pool_num_cached(pool), 1);
    CHECK_OK(qf_block_pool_check(pool, &err));
    qf_block_pool_destroy(pool);
}

int main(void)
{
    RUN(test_collision_is_a_miss);
    return check_report();
}
