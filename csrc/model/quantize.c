/* Round-to-nearest quantisation of float rows with a search over ranges.
 *
 * A group of values is given a grid w = scale * d, d an integer from -zero to max - zero, whose range always holds 0.
 * Clipping the largest values makes the steps finer for all others, so the full range is seldom best:
 *
 *   1. shrink both ends of [min, max] together by each factor of a grid, keep the least squared error;
 *   2. around the winner, move each end alone;
 *   3. refit the scale to the codes by least squares (sum w d / sum d d), which can only lower the error before the
 *      scale is rounded; repeat while it helps.
 *
 * Codes are always chosen with the scale as float16 stores it. Sums run in BLOCK fixed partial sums, so that the
 * result depends neither on the compiler's vectors nor on the machine. */
#include "model/quantize.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "base/dtype.h"

#define BLOCK 16 /* values at a time, and partial sums */
#define MIN_SCALE 0x1p-24f /* float16's smallest and largest finite values */
#define MAX_SCALE 65504.0f
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to an integer, to nearest even */

typedef struct grid {
    float scale, inverse;
    float low, high; /* d: -zero and max - zero */
} grid;

/* Values outside, and NaN, become the lower end. */
static inline float clamp(float x, float low, float high)
{
    x = x > low ? x : low;
    return x < high ? x : high;
}

static inline float round_float(float x) { return (x + ROUNDER) - ROUNDER; }

static float to_f16(float scale)
{
    return qf_f16_to_f32(qf_f32_to_f16(clamp(scale, MIN_SCALE, MAX_SCALE)));
}

static grid grid_of(float scale, float zero, float max)
{
    grid g = {.scale = to_f16(scale)};
    g.inverse = 1.0f / g.scale;
    g.low = -zero;
    g.high = max - zero;
    return g;
}

/* The grid that spans [low, high], low <= 0 <= high. */
static grid grid_of_range(float low, float high, float max)
{
    if (low == high) {
        return grid_of(1.0f, 0.0f, max); /* all zero */
    }
    float scale = to_f16((high - low) / max);
    return grid_of(scale, round_float(clamp(-low / scale, 0.0f, max)), max);
}

static inline float nearest(const grid *g, float w)
{
    /* Clamped first: the rounding trick is for small numbers, and both ends are integers. */
    return round_float(clamp(w * g->inverse, g->low, g->high));
}

/* Sums over a group. A group's last values, fewer than BLOCK, are padded with zeros: every grid holds them exactly. */
typedef struct sums {
    float lanes[BLOCK];
} sums;

static float total_of(const sums *self)
{
    float total = 0.0f;
    for (int j = 0; j < BLOCK; j++) {
        total += self->lanes[j];
    }
    return total;
}

static inline void add_errors(grid g, const float *w, sums *errors)
{
    for (int j = 0; j < BLOCK; j++) {
        float error = nearest(&g, w[j]) * g.scale - w[j];
        errors->lanes[j] += error * error;
    }
}

static inline void add_products(grid g, const float *w, sums *products, sums *squares)
{
    for (int j = 0; j < BLOCK; j++) {
        float d = nearest(&g, w[j]);
        products->lanes[j] += w[j] * d;
        squares->lanes[j] += d * d;
    }
}

/* The sum of squared errors. */
static float error_of(const grid *g, const float *w, int32_t count)
{
    sums errors = {{0}};
    int32_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) {
        add_errors(*g, w + i, &errors);
    }
    if (i < count) {
        float rest[BLOCK] = {0};
        memcpy(rest, w + i, (size_t)(count - i) * sizeof *w);
        add_errors(*g, rest, &errors);
    }
    return total_of(&errors);
}

/* sum(w d) / sum(d d) for the codes that the grid gives; 0 if all are 0. */
static float fitted_scale(const grid *g, const float *w, int32_t count)
{
    sums products = {{0}};
    sums squares = {{0}};
    int32_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) {
        add_products(*g, w + i, &products, &squares);
    }
    if (i < count) {
        float rest[BLOCK] = {0};
        memcpy(rest, w + i, (size_t)(count - i) * sizeof *w);
        add_products(*g, rest, &products, &squares);
    }
    float square = total_of(&squares);
    return square > 0.0f ? total_of(&products) / square : 0.0f;
}

static bool try_grid(grid candidate, const float *w, int32_t count, grid *best, float *best_error)
{
    float error = error_of(&candidate, w, count);
    if (!(error < *best_error)) {
        return false;
    }
    *best = candidate;
    *best_error = error;
    return true;
}

/* Steps 1 to 3 of the search, from the grid of the full range on. */
static void refine(const float *w, int32_t count, float max, float low, float high, grid *best, float *error)
{
    float factor = 1.0f;
    for (int step = 1; step < 12 && *error > 0.0f; step++) {
        float f = 1.0f - 0.035f * (float)step;
        if (try_grid(grid_of_range(low * f, high * f, max), w, count, best, error)) {
            factor = f;
        }
    }
    static const float sides[4][2] = {{1.06f, 1.0f}, {1.0f, 1.06f}, {0.94f, 1.0f}, {1.0f, 0.94f}};
    for (int i = 0; i < 4 && *error > 0.0f; i++) {
        (void)try_grid(grid_of_range(low * factor * sides[i][0], high * factor * sides[i][1], max), w, count, best,
                       error);
    }
    for (int i = 0; i < 3 && *error > 0.0f; i++) {
        float scale = fitted_scale(best, w, count);
        if (!(scale > 0.0f) || !try_grid(grid_of(scale, -best->low, max), w, count, best, error)) {
            break;
        }
    }
}

static grid search(const float *w, int32_t count, float max)
{
    float low = 0.0f;
    float high = 0.0f;
    for (int32_t i = 0; i < count; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    grid best = grid_of_range(low, high, max);
    bool one_sided = low == 0.0f || high == 0.0f;
    bool coarse = max < 255.0f; /* with 255 steps clipping gains nothing worth its time */
    if (!coarse && !one_sided) {
        return best;
    }
    float error = error_of(&best, w, count);
    if (coarse) {
        refine(w, count, max, low, high, &best, &error);
    }
    /* One value repeated (and zeros): a step of just that size is exact where float16 holds it. */
    if (one_sided && error > 0.0f) {
        float size = high > -low ? high : -low;
        (void)try_grid(grid_of(size, high > -low ? 0.0f : max, max), w, count, &best, &error);
    }
    return best;
}

static void quantize_group(const float *w, int32_t count, int32_t bits, uint8_t *q, float *scale, uint8_t *zero)
{
    grid g = search(w, count, (float)((1 << bits) - 1));
    *scale = g.scale;
    *zero = (uint8_t)(-g.low);
    for (int32_t i = 0; i < count; i++) {
        q[i] = (uint8_t)(nearest(&g, w[i]) - g.low);
    }
}

void qf_quantize_rows(const float *w, int32_t count, int32_t k, int32_t bits, int32_t group_size, uint8_t *q,
                      float *scales, uint8_t *zeros)
{
    int32_t num_groups = (k + group_size - 1) / group_size;
    for (int32_t r = 0; r < count; r++) {
        for (int32_t g = 0; g < num_groups; g++) {
            int32_t begin = g * group_size;
            int32_t end = begin + group_size < k ? begin + group_size : k;
            size_t at = (size_t)r * (size_t)k + (size_t)begin;
            size_t group = (size_t)r * (size_t)num_groups + (size_t)g;
            quantize_group(w + at, end - begin, bits, q + at, &scales[group], &zeros[group]);
        }
    }
}
