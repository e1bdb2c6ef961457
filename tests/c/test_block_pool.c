/* The block pool: states, eviction order, prefix chains. */
/* sources: base/status.c base/alloc.c base/hash.c kv/block_pool.c */
/* sanitizers: address */
/* alloc-faults: yes */
#include "check.h"

#include "kv/block_pool.h"

#define KEY 0x1234567890abcdefu
#define BLOCK 4

static const int32_t tokens_a[BLOCK] = {1, 2, 3, 4};
static const int32_t tokens_b[BLOCK] = {5, 6, 7, 8};
static const int32_t tokens_c[BLOCK] = {9, 9, 9, 9};

static qf_block_pool *new_pool(int32_t num_blocks, bool prefix_caching)
{
    qf_error err;
    qf_block_pool *pool;
    CHECK_OK(qf_block_pool_create(num_blocks, BLOCK, prefix_caching, KEY, &pool, &err));
    return pool;
}

static void check_and_destroy(qf_block_pool *pool)
{
    qf_error err;
    CHECK_OK(qf_block_pool_check(pool, &err));
    qf_block_pool_destroy(pool);
}

static void test_take_and_release(void)
{
    qf_error err;
    qf_block_pool *pool = new_pool(3, true);
    CHECK_INT(qf_block_pool_num_blocks(pool), 3);
    CHECK_INT(qf_block_pool_block_size(pool), BLOCK);
    int32_t taken[3];
    for (int i = 0; i < 3; i++) {
        CHECK_INT(qf_block_pool_num_available(pool), 3 - i);
        taken[i] = qf_block_pool_take(pool);
        CHECK(taken[i] >= 0 && taken[i] < 3);
        CHECK_INT(qf_block_pool_ref_count(pool, taken[i]), 1);
        for (int j = 0; j < i; j++) {
            CHECK(taken[i] != taken[j]);
        }
        CHECK_OK(qf_block_pool_check(pool, &err));
    }
    CHECK_INT(qf_block_pool_take(pool), QF_BLOCK_NONE);
    qf_block_pool_ref(pool, taken[1]);
    qf_block_pool_release(pool, taken[1]);
    CHECK_INT(qf_block_pool_num_available(pool), 0);
    qf_block_pool_release(pool, taken[1]);
    CHECK_INT(qf_block_pool_num_available(pool), 1);
    CHECK_INT(qf_block_pool_num_cached(pool), 0);
    CHECK_INT(qf_block_pool_take(pool), taken[1]);
    check_and_destroy(pool);
}

static void test_publish_and_find(void)
{
    qf_block_pool *pool = new_pool(4, true);
    int32_t a = qf_block_pool_take(pool), b = qf_block_pool_take(pool);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), QF_BLOCK_NONE);
    CHECK(!qf_block_pool_publish(pool, b, a, tokens_b, 0)); /* the parent has no hash yet */
    CHECK(qf_block_pool_publish(pool, a, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(qf_block_pool_publish(pool, b, a, tokens_b, 0));
    CHECK(qf_block_pool_publish(pool, b, a, tokens_b, 0)); /* again changes nothing */
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), a);
    CHECK_INT(qf_block_pool_find(pool, a, tokens_b, 0), b);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_b, 0), QF_BLOCK_NONE); /* b is not a first block */
    CHECK_INT(qf_block_pool_find(pool, b, tokens_a, 0), QF_BLOCK_NONE);
    CHECK_INT(qf_block_pool_find(pool, a, tokens_c, 0), QF_BLOCK_NONE);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 1), QF_BLOCK_NONE); /* another salt */
    qf_block_pool_release(pool, b);
    qf_block_pool_release(pool, a);
    CHECK_INT(qf_block_pool_num_cached(pool), 2);
    CHECK_INT(qf_block_pool_find(pool, a, tokens_b, 0), b);
    qf_block_pool_ref(pool, b); /* a hit leaves the middle of the eviction order */
    CHECK_INT(qf_block_pool_num_cached(pool), 1);
    CHECK_INT(qf_block_pool_ref_count(pool, b), 1);
    check_and_destroy(pool);
}

/* Equal tokens after different parents, or under different salts, are different blocks that live side by side. */
static void test_same_tokens_elsewhere(void)
{
    qf_block_pool *pool = new_pool(4, true);
    int32_t first = qf_block_pool_take(pool), second = qf_block_pool_take(pool), salted = qf_block_pool_take(pool);
    CHECK(qf_block_pool_publish(pool, first, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(qf_block_pool_publish(pool, second, first, tokens_a, 0));
    CHECK(qf_block_pool_publish(pool, salted, QF_BLOCK_NONE, tokens_a, 1));
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), first);
    CHECK_INT(qf_block_pool_find(pool, first, tokens_a, 0), second);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 1), salted);
    check_and_destroy(pool);
}

static void test_eviction_is_least_recently_used(void)
{
    qf_block_pool *pool = new_pool(4, true);
    int32_t ids[3];
    const int32_t *contents[3] = {tokens_a, tokens_b, tokens_c};
    for (int i = 0; i < 3; i++) {
        ids[i] = qf_block_pool_take(pool);
        CHECK(qf_block_pool_publish(pool, ids[i], QF_BLOCK_NONE, contents[i], 0));
    }
    for (int i = 0; i < 3; i++) {
        qf_block_pool_release(pool, ids[i]);
    }
    qf_block_pool_ref(pool, ids[0]); /* used again: now the last to go */
    qf_block_pool_release(pool, ids[0]);
    CHECK(qf_block_pool_take(pool) != ids[1]); /* the free block goes first */
    CHECK_INT(qf_block_pool_num_cached(pool), 3);
    CHECK_INT(qf_block_pool_take(pool), ids[1]);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_b, 0), QF_BLOCK_NONE);
    CHECK(!qf_block_pool_is_published(pool, ids[1]));
    CHECK_INT(qf_block_pool_take(pool), ids[2]);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), ids[0]);
    CHECK_INT(qf_block_pool_take(pool), ids[0]);
    CHECK_INT(qf_block_pool_take(pool), QF_BLOCK_NONE);
    check_and_destroy(pool);
}

static void test_duplicate_passes_its_hash_on(void)
{
    qf_block_pool *pool = new_pool(4, true);
    int32_t first = qf_block_pool_take(pool), twin = qf_block_pool_take(pool), child = qf_block_pool_take(pool);
    CHECK(qf_block_pool_publish(pool, first, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(!qf_block_pool_publish(pool, twin, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(!qf_block_pool_is_published(pool, twin));
    CHECK(qf_block_pool_publish(pool, child, twin, tokens_b, 0));
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), first);
    CHECK_INT(qf_block_pool_find(pool, first, tokens_b, 0), child);
    qf_block_pool_release(pool, twin); /* unpublished: free, not cached, and its hash is forgotten */
    CHECK_INT(qf_block_pool_num_cached(pool), 0);
    CHECK_INT(qf_block_pool_find(pool, twin, tokens_b, 0), QF_BLOCK_NONE);
    check_and_destroy(pool);
}

static void test_orphans_are_no_false_hits(void)
{
    qf_block_pool *pool = new_pool(2, true);
    int32_t parent = qf_block_pool_take(pool), child = qf_block_pool_take(pool);
    CHECK(qf_block_pool_publish(pool, parent, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(qf_block_pool_publish(pool, child, parent, tokens_b, 0));
    qf_block_pool_release(pool, parent); /* the wrong way round on purpose: the parent is evicted first */
    qf_block_pool_release(pool, child);
    CHECK_INT(qf_block_pool_take(pool), parent);
    CHECK(qf_block_pool_publish(pool, parent, QF_BLOCK_NONE, tokens_c, 0)); /* the id has other content now */
    CHECK_INT(qf_block_pool_find(pool, parent, tokens_b, 0), QF_BLOCK_NONE);
    qf_block_pool_release(pool, parent);
    CHECK_INT(qf_block_pool_num_cached(pool), 2);
    CHECK_INT(qf_block_pool_take(pool), child); /* the orphan is evicted in its turn */
    CHECK_INT(qf_block_pool_take(pool), parent);
    check_and_destroy(pool);
}

static void test_orphan_is_found_again_under_the_same_prefix(void)
{
    qf_block_pool *pool = new_pool(2, true);
    int32_t parent = qf_block_pool_take(pool), child = qf_block_pool_take(pool);
    CHECK(qf_block_pool_publish(pool, parent, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(qf_block_pool_publish(pool, child, parent, tokens_b, 0));
    qf_block_pool_release(pool, parent);
    qf_block_pool_release(pool, child);
    int32_t again = qf_block_pool_take(pool);
    CHECK(qf_block_pool_publish(pool, again, QF_BLOCK_NONE, tokens_a, 0));
    CHECK_INT(qf_block_pool_find(pool, again, tokens_b, 0), child);
    check_and_destroy(pool);
}

static void test_reset(void)
{
    qf_block_pool *pool = new_pool(4, true);
    int32_t used = qf_block_pool_take(pool), cached = qf_block_pool_take(pool), growing = qf_block_pool_take(pool);
    CHECK(qf_block_pool_publish(pool, used, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(qf_block_pool_publish(pool, cached, QF_BLOCK_NONE, tokens_b, 0));
    qf_block_pool_release(pool, cached);
    qf_block_pool_reset_prefix_cache(pool);
    CHECK_INT(qf_block_pool_num_cached(pool), 0);
    CHECK_INT(qf_block_pool_num_available(pool), 2);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), QF_BLOCK_NONE);
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_b, 0), QF_BLOCK_NONE);
    /* Neither what was in use then, nor what follows it, is published afterwards. */
    CHECK(!qf_block_pool_publish(pool, used, QF_BLOCK_NONE, tokens_a, 0));
    CHECK(!qf_block_pool_publish(pool, growing, QF_BLOCK_NONE, tokens_c, 0));
    int32_t later = qf_block_pool_take(pool);
    CHECK(!qf_block_pool_publish(pool, later, used, tokens_b, 0));
    CHECK(qf_block_pool_publish(pool, later, QF_BLOCK_NONE, tokens_a, 0));
    qf_block_pool_release(pool, used);
    int32_t fresh[2] = {qf_block_pool_take(pool), qf_block_pool_take(pool)};
    CHECK(fresh[0] == used || fresh[1] == used);
    CHECK(qf_block_pool_publish(pool, used, QF_BLOCK_NONE, tokens_b, 0)); /* released since: as good as new */
    check_and_destroy(pool);
}

static void test_without_prefix_caching(void)
{
    qf_block_pool *pool = new_pool(2, false);
    int32_t block = qf_block_pool_take(pool);
    CHECK(!qf_block_pool_publish(pool, block, QF_BLOCK_NONE, tokens_a, 0));
    CHECK_INT(qf_block_pool_find(pool, QF_BLOCK_NONE, tokens_a, 0), QF_BLOCK_NONE);
    qf_block_pool_release(pool, block);
    CHECK_INT(qf_block_pool_num_cached(pool), 0);
    CHECK_INT(qf_block_pool_num_available(pool), 2);
    check_and_destroy(pool);
}

static void test_bad_sizes(void)
{
    qf_error err;
    qf_block_pool *pool;
    CHECK_STATUS(qf_block_pool_create(0, 4, true, KEY, &pool, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK(pool == NULL);
    CHECK_STATUS(qf_block_pool_create(4, 0, true, KEY, &pool, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(qf_block_pool_create(-1, 4, true, KEY, &pool, &err), QF_ERROR_INVALID_ARGUMENT);
    qf_block_pool_destroy(NULL);
}

#ifdef CHECK_ALLOC_FAULTS
static void test_alloc_faults(void)
{
    for (int64_t n = 1;; n++) {
        qf_error err;
        qf_block_pool *pool;
        check_fail_alloc(n);
        qf_status status = qf_block_pool_create(5, BLOCK, true, KEY, &pool, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        CHECK((pool == NULL) == failed);
        qf_block_pool_destroy(pool);
        if (!failed) {
            CHECK(n > 3);
            break;
        }
    }
}
#endif

int main(void)
{
    RUN(test_take_and_release);
    RUN(test_publish_and_find);
    RUN(test_same_tokens_elsewhere);
    RUN(test_eviction_is_least_recently_used);
    RUN(test_duplicate_passes_its_hash_on);
    RUN(test_orphans_are_no_false_hits);
    RUN(test_orphan_is_found_again_under_the_same_prefix);
    RUN(test_reset);
    RUN(test_without_prefix_caching);
    RUN(test_bad_sizes);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    return check_report();
}
