/* Integers in proportion to weights, by largest remainder. */
#include "base/alloc.h"
#include "engine/meter.h"

size_t qf_share_scratch_bytes(int32_t capacity)
{
    return (size_t)capacity * (2 * sizeof(uint64_t) + sizeof(qf_share_key));
}

static qf_status grow(void **array, int32_t capacity, size_t size, qf_error *err)
{
    void *grown = qf_realloc(*array, (size_t)capacity, size);
    if (grown == NULL) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate the meter's room for %d requests", capacity);
    }
    *array = grown;
    return QF_OK;
}

qf_status qf_share_scratch_grow(qf_share_scratch *self, int32_t capacity, qf_error *err)
{
    if (capacity > self->capacity) {
        QF_TRY(grow((void **)&self->weights, capacity, sizeof *self->weights, err));
        QF_TRY(grow((void **)&self->shares, capacity, sizeof *self->shares, err));
        QF_TRY(grow((void **)&self->keys, capacity, sizeof *self->keys, err));
        self->capacity = capacity;
    }
    return QF_OK;
}

void qf_share_scratch_deinit(qf_share_scratch *self)
{
    qf_free(self->weights);
    qf_free(self->shares);
    qf_free(self->keys);
    *self = (qf_share_scratch){0};
}

/* a is served before b */
static bool before(qf_share_key a, qf_share_key b)
{
    return a.remainder > b.remainder || (a.remainder == b.remainder && a.index < b.index);
}

static void swap_keys(qf_share_key *a, qf_share_key *b)
{
    qf_share_key kept = *a;
    *a = *b;
    *b = kept;
}

/* Moves the `count` that are served first to the front, in any order. No two keys are alike. */
static void select_first(qf_share_key *keys, int32_t size, int32_t count)
{
    int32_t low = 0, high = size - 1;
    while (low < high) {
        swap_keys(&keys[low + (high - low) / 2], &keys[high]);
        int32_t place = low;
        for (int32_t i = low; i < high; i++) {
            if (before(keys[i], keys[high])) {
                swap_keys(&keys[i], &keys[place++]);
            }
        }
        swap_keys(&keys[place], &keys[high]);
        if (place == count || place == count - 1) {
            return;
        }
        if (place < count) {
            low = place + 1;
        } else {
            high = place - 1;
        }
    }
}

static void share_equally(uint64_t *shares, int32_t count, uint64_t total)
{
    uint64_t each = total / (uint64_t)count, left = total % (uint64_t)count;
    for (int32_t i = 0; i < count; i++) {
        shares[i] = each + ((uint64_t)i < left);
    }
}

void qf_share(qf_share_scratch *scratch, int32_t count, uint64_t total)
{
    const uint64_t *weights = scratch->weights;
    uint64_t *shares = scratch->shares;
    uint64_t sum = 0, given = 0;
    bool equal = true;
    for (int32_t i = 0; i < count; i++) {
        sum += weights[i];
        equal = equal && weights[i] == weights[0];
    }
    if (count == 0) {
        return;
    }
    if (equal) { /* all 0 too */
        share_equally(shares, count, total);
        return;
    }
    for (int32_t i = 0; i < count; i++) {
        uint64_t product, remainder;
        if (__builtin_mul_overflow(total, weights[i], &product)) {
            unsigned __int128 wide = (unsigned __int128)total * weights[i];
            shares[i] = (uint64_t)(wide / sum); /* at most total */
            remainder = (uint64_t)(wide % sum);
        } else {
            shares[i] = product / sum;
            remainder = product % sum;
        }
        given += shares[i];
        scratch->keys[i] = (qf_share_key){.remainder = remainder, .index = i};
    }
    int32_t left = (int32_t)(total - given); /* less than count: each remainder is less than one */
    if (left > 0) {
        select_first(scratch->keys, count, left);
    }
    for (int32_t i = 0; i < left; i++) {
        shares[scratch->keys[i].index]++;
    }
}
