#include "sample/select.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/dtype.h"
#include "base/math.h"

/* Inner loops have this fixed length and independent lanes, so that compilers vectorise them without reordering. */
#define LANES 16
#define INSERTION_SORT_MAX 96 /* below, clearing the radix sort's digits costs more */
#define NARROW_MIN 512        /* fewer candidates are sorted as they are */

bool qf_row_is_valid(const float *x, int32_t size)
{
    int valid = 1;
    for (int32_t i = 0; i < size; i++) {
        valid &= x[i] < INFINITY;
    }
    return valid != 0;
}

/* The maximum of one block; *valid becomes 0 if it holds NaN or +inf. */
static float block_scan(const float *restrict x, uint32_t *valid)
{
    float max[LANES];
    uint32_t ok[LANES];
    for (int j = 0; j < LANES; j++) {
        max[j] = x[j];
        ok[j] = x[j] < INFINITY ? 1u : 0u;
    }
    for (int i = LANES; i < QF_SCAN_BLOCK; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            float v = x[i + j];
            max[j] = v > max[j] ? v : max[j];
            ok[j] &= v < INFINITY ? 1u : 0u;
        }
    }
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) {
            max[j] = max[j + width] > max[j] ? max[j + width] : max[j];
            ok[j] &= ok[j + width];
        }
    }
    *valid &= ok[0];
    return max[0];
}

bool qf_row_scan(qf_sampler *self, const float *x, int32_t size, float *max)
{
    uint32_t valid = 1;
    float best = -INFINITY;
    int32_t block = 0;
    int32_t i = 0;
    for (; i + QF_SCAN_BLOCK <= size; i += QF_SCAN_BLOCK) {
        float m = block_scan(x + i, &valid);
        self->block_max[block++] = m;
        best = m > best ? m : best;
    }
    if (i < size) {
        float m = -INFINITY;
        valid &= qf_row_is_valid(x + i, size - i) ? 1u : 0u;
        for (; i < size; i++) {
            m = x[i] > m ? x[i] : m;
        }
        self->block_max[block] = m;
        best = m > best ? m : best;
    }
    *max = best;
    return valid != 0;
}

int32_t qf_row_find(const qf_sampler *self, const float *x, int32_t size, float max)
{
    int32_t i = 0;
    while (i < size && self->block_max[i / QF_SCAN_BLOCK] < max) {
        i += QF_SCAN_BLOCK;
    }
    while (i < size && x[i] < max) {
        i++;
    }
    return i < size ? i : -1;
}


static void weight_lanes(const float *restrict x, float max, float inverse_temperature, float min_p, float *restrict w)
{
    for (int j = 0; j < LANES; j++) {
        w[j] = qf_weight(x[j], max, inverse_temperature, min_p);
    }
}

/* Lane j adds the weights j, j + LANES, ...; then lane j takes lane j + 8, then j + 4, ... */
static double block_weights(const float *restrict x, int32_t size, float max, float inverse_temperature,
                            float min_p, float *restrict w)
{
    double sum[LANES] = {0};
    int32_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        weight_lanes(x + i, max, inverse_temperature, min_p, w + i);
        for (int j = 0; j < LANES; j++) {
            sum[j] += (double)w[i + j];
        }
    }
    for (int j = 0; i < size; i++, j++) {
        w[i] = qf_weight(x[i], max, inverse_temperature, min_p);
        sum[j] += (double)w[i];
    }
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) {
            sum[j] += sum[j + width];
        }
    }
    return sum[0];
}

double qf_row_weights(qf_sampler *self, const float *x, int32_t size, float max, float temperature, float min_p)
{
    double total = 0.0;
    for (int32_t i = 0; i < size; i += QF_MASS_BLOCK) {
        int32_t length = size - i < QF_MASS_BLOCK ? size - i : QF_MASS_BLOCK;
        double mass = block_weights(x + i, length, max, 1.0f / temperature, min_p, self->weights + i);
        self->mass[i / QF_MASS_BLOCK] = mass;
        total += mass;
    }
    return total;
}

static uint64_t make_key(float x, int32_t token_id)
{
    uint32_t bits = qf_f32_bits(x + 0.0f); /* -0 becomes 0: they tie */
    uint32_t descending = (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
    return (uint64_t)descending << 32 | (uint32_t)token_id;
}

/* The ids of all unmasked logits >= threshold, ascending, into self->ids. Returns how many. */
static int32_t gather(qf_sampler *self, const float *x, int32_t size, float threshold)
{
    threshold = threshold < -FLT_MAX ? -FLT_MAX : threshold;
    int32_t count = 0;
    for (int32_t first = 0; first < size; first += QF_SCAN_BLOCK) {
        if (self->block_max[first / QF_SCAN_BLOCK] < threshold) {
            continue;
        }
        int32_t end = size - first < QF_SCAN_BLOCK ? size : first + QF_SCAN_BLOCK;
        for (int32_t i = first; i < end; i++) {
            self->ids[count] = i; /* without a branch: kept only if the count moves on */
            count += x[i] >= threshold ? 1 : 0;
        }
    }
    return count;
}

static void sort_insertion(uint64_t *keys, int32_t count)
{
    for (int32_t i = 1; i < count; i++) {
        uint64_t key = keys[i];
        int32_t j = i;
        for (; j > 0 && keys[j - 1] > key; j--) {
            keys[j] = keys[j - 1];
        }
        keys[j] = key;
    }
}

static uint32_t digit(uint64_t key, int index) { return (uint32_t)(key >> (32 + 11 * index)) & (QF_NUM_BUCKETS - 1); }

/* Stable, by the upper halves of the keys; those of the gathered ids already ascend in the lower ones. */
static void sort_radix(qf_sampler *self, int32_t count)
{
    memset(self->digits, 0, sizeof *self->digits * QF_NUM_DIGITS * QF_NUM_BUCKETS);
    for (int32_t i = 0; i < count; i++) {
        for (int d = 0; d < QF_NUM_DIGITS; d++) {
            self->digits[(uint32_t)d * QF_NUM_BUCKETS + digit(self->keys[i], d)]++;
        }
    }
    for (int d = 0; d < QF_NUM_DIGITS; d++) {
        uint32_t *offsets = self->digits + d * QF_NUM_BUCKETS;
        if (offsets[digit(self->keys[0], d)] == (uint32_t)count) {
            continue; /* all the same */
        }
        uint32_t next = 0;
        for (int b = 0; b < QF_NUM_BUCKETS; b++) {
            uint32_t size = offsets[b];
            offsets[b] = next;
            next += size;
        }
        for (int32_t i = 0; i < count; i++) {
            uint64_t key = self->keys[i];
            self->spare_keys[offsets[digit(key, d)]++] = key;
        }
        uint64_t *keys = self->keys;
        self->keys = self->spare_keys;
        self->spare_keys = keys;
    }
}

/* self->ids to self->keys, in order. */
static void sort_ids(qf_sampler *self, const float *x, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        self->keys[i] = make_key(x[self->ids[i]], self->ids[i]);
    }
    if (count <= INSERTION_SORT_MAX) {
        sort_insertion(self->keys, count);
    } else {
        sort_radix(self, count);
    }
}

/* heap: (size), a min-heap except perhaps at the root. */
static void sift_down(float *heap, int32_t size, int32_t root)
{
    float value = heap[root];
    for (int32_t child = 2 * root + 1; child < size; child = 2 * root + 1) {
        if (child + 1 < size && heap[child + 1] < heap[child]) {
            child++;
        }
        if (!(heap[child] < value)) {
            break;
        }
        heap[root] = heap[child];
        root = child;
    }
    heap[root] = value;
}

/* The rank-th largest of values: (count), rank 1 .. count. heap: (rank) scratch. */
static float nth_largest(const float *values, int32_t count, int32_t rank, float *heap)
{
    memcpy(heap, values, (size_t)rank * sizeof *heap);
    for (int32_t root = rank / 2 - 1; root >= 0; root--) {
        sift_down(heap, rank, root);
    }
    for (int32_t i = rank; i < count; i++) {
        if (values[i] > heap[0]) {
            heap[0] = values[i];
            sift_down(heap, rank, 0);
        }
    }
    return heap[0];
}

int32_t qf_row_select_top(qf_sampler *self, const float *x, int32_t size, int32_t count)
{
    /* Each of `count` blocks has a logit that reaches the count-th largest block maximum. */
    int32_t num_blocks = (size + QF_SCAN_BLOCK - 1) / QF_SCAN_BLOCK;
    float threshold = -INFINITY;
    if (count <= 0) {
        return 0;
    }
    if (count <= num_blocks) {
        threshold = nth_largest(self->block_max, num_blocks, count, self->sorted);
    }
    int32_t found = gather(self, x, size, threshold);
    sort_ids(self, x, found);
    return found < count ? found : count;
}

static int bucket(float x, float max, float scale)
{
    float position = (max - x) * scale;
    return position < (float)(QF_NUM_BUCKETS - 1) ? (int)position : QF_NUM_BUCKETS - 1;
}

/* Drops candidates behind the bucket in which the nucleus ends. */
static int32_t narrow(qf_sampler *self, const float *x, int32_t count, float max, float threshold, double limit)
{
    float range = max - threshold;
    float scale = range > 0.0f && range < INFINITY ? (float)QF_NUM_BUCKETS / range : 0.0f;
    if (!(scale > 0.0f && scale < INFINITY)) {
        return count;
    }
    memset(self->bucket_mass, 0, sizeof *self->bucket_mass * QF_NUM_BUCKETS);
    for (int32_t i = 0; i < count; i++) {
        int32_t token_id = self->ids[i];
        int b = bucket(x[token_id], max, scale);
        self->buckets[i] = (uint16_t)b;
        self->bucket_mass[b] += (double)self->weights[token_id];
    }
    int last = 0;
    double sum = self->bucket_mass[0];
    while (last < QF_NUM_BUCKETS - 1 && sum < limit) {
        sum += self->bucket_mass[++last];
    }
    int32_t kept = 0;
    for (int32_t i = 0; i < count; i++) {
        self->ids[kept] = self->ids[i];
        kept += self->buckets[i] <= last ? 1 : 0;
    }
    return kept;
}

int32_t qf_row_select_nucleus(qf_sampler *self, const float *x, int32_t size, float max, float temperature,
                              float min_p, double total, double top_p)
{
    /* From its last token on, the order's tail weighs more than (1 - top_p) total; so that token weighs more than
     * an equal share of it. 0.998 is far more slack than all roundings need. */
    double least = (1.0 - top_p) * total / (double)size;
    least = (least > (double)min_p ? least : (double)min_p) * 0.998;
    double threshold = (double)max + (double)temperature * qf_log(least);
    float rounded = threshold < -(double)FLT_MAX ? -FLT_MAX : (float)threshold;
    rounded = (double)rounded > threshold ? rounded - fabsf(rounded) * FLT_EPSILON : rounded;
    int32_t count = gather(self, x, size, rounded);
    if (count > NARROW_MIN) {
        count = narrow(self, x, count, max, rounded, top_p * total * (1.0 + 1e-9));
    }
    sort_ids(self, x, count);
    return count;
}
