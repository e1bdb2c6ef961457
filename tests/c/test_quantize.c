/* sources: base/dtype.c model/quantize.c */
/* sanitizers: address */
/* Round-to-nearest quantisation: never worse than the plain full-range grid, exact where a grid exists. */
#include <math.h>
#include <stdlib.h>

#include "base/dtype.h"
#include "check.h"
#include "model/quantize.h"

#define MAX_K 700
#define ROWS 3

typedef struct result {
    uint8_t q[ROWS * MAX_K + 1];
    uint8_t zeros[ROWS * MAX_K];
    float scales[ROWS * MAX_K];
} result;

static uint64_t random_state = 1;

static double uniform(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 11) * 0x1p-53;
}

static float normal(void) { return (float)(sqrt(-2.0 * log(uniform() + 1e-300)) * cos(6.283185307179586 * uniform())); }

static double squared_error(const result *r, const float *w, int32_t rows, int32_t k, int32_t group_size)
{
    int32_t num_groups = (k + group_size - 1) / group_size;
    double sum = 0.0;
    for (int32_t i = 0; i < rows * k; i++) {
        int32_t group = i / k * num_groups + i % k / group_size;
        double error = (double)r->scales[group] * (r->q[i] - r->zeros[group]) - (double)w[i];
        sum += error * error;
    }
    return sum;
}

/* The plain recipe: min and max with 0 between them, nothing clipped, the scale not even rounded. */
static double plain_error(const float *w, int32_t rows, int32_t k, int32_t group_size, int32_t bits)
{
    double sum = 0.0;
    double max = (double)((1 << bits) - 1);
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t begin = 0; begin < k; begin += group_size) {
            int32_t end = begin + group_size < k ? begin + group_size : k;
            double low = 0.0, high = 0.0;
            for (int32_t i = begin; i < end; i++) {
                low = fmin(low, (double)w[r * k + i]);
                high = fmax(high, (double)w[r * k + i]);
            }
            double scale = (high - low) / max;
            double zero = nearbyint(-low / scale);
            for (int32_t i = begin; i < end; i++) {
                double q = fmin(fmax(nearbyint((double)w[r * k + i] / scale) + zero, 0.0), max);
                double error = scale * (q - zero) - (double)w[r * k + i];
                sum += error * error;
            }
        }
    }
    return sum;
}

static void test_better_than_plain(void)
{
    static const int32_t ks[] = {1, 2, 3, 17, 31, 32, 33, 118, 128, 129, 640, 700};
    static const int32_t group_sizes[] = {16, 32, 64, 128, 700};
    static result r;
    float *w = malloc(sizeof *w * ROWS * MAX_K);
    for (size_t a = 0; a < sizeof ks / sizeof ks[0]; a++) {
        for (size_t b = 0; b < sizeof group_sizes / sizeof group_sizes[0]; b++) {
            for (int32_t bits = 4; bits <= 8; bits += 4) {
                int32_t k = ks[a];
                for (int32_t i = 0; i < ROWS * k; i++) {
                    w[i] = 0.02f * normal() + (i / k == 2 ? 0.05f : 0.0f); /* the last row lies to one side */
                }
                memset(&r, 0xcd, sizeof r);
                qf_quantize_rows(w, ROWS, k, bits, group_sizes[b], r.q, r.scales, r.zeros);
                int32_t num_groups = (k + group_sizes[b] - 1) / group_sizes[b];
                for (int32_t i = 0; i < ROWS * num_groups; i++) {
                    CHECK(r.scales[i] > 0.0f && qf_f16_to_f32(qf_f32_to_f16(r.scales[i])) == r.scales[i]);
                    CHECK(r.zeros[i] < 1 << bits);
                }
                for (int32_t i = 0; i < ROWS * k; i++) {
                    CHECK(r.q[i] < 1 << bits);
                }
                CHECK_INT(r.q[ROWS * k], 0xcd); /* nothing is written past the end */
                double plain = plain_error(w, ROWS, k, group_sizes[b], bits);
                /* The plain recipe's scale is not rounded to float16 (11 bits): that may cost its own rounding. */
                double largest = 0.2;
                double slack = ROWS * k * pow(largest * 0x1p-11, 2);
                CHECK(squared_error(&r, w, ROWS, k, group_sizes[b]) <= plain + slack);
            }
        }
    }
    free(w);
}

/* On normal weights the search must gain: 4 bits, groups of 128, plain error about 0.0101 of the power. */
static void test_gain(void)
{
    static result r;
    float w[ROWS * 640];
    double ours = 0.0, plain = 0.0, power = 0.0;
    for (int32_t round = 0; round < 20; round++) {
        for (int32_t i = 0; i < ROWS * 640; i++) {
            w[i] = normal();
            power += (double)w[i] * (double)w[i];
        }
        qf_quantize_rows(w, ROWS, 640, 4, 128, r.q, r.scales, r.zeros);
        ours += squared_error(&r, w, ROWS, 640, 128);
        plain += plain_error(w, ROWS, 640, 128, 4);
    }
    CHECK(ours < 0.92 * plain);
    CHECK(ours / power < 0.0094 && ours / power > 0.007);
}

static void check_exact(const float *w, int32_t k, int32_t bits)
{
    static result r;
    qf_quantize_rows(w, 1, k, bits, 128, r.q, r.scales, r.zeros);
    CHECK(squared_error(&r, w, 1, k, 128) == 0.0);
}

static void test_exact(void)
{
    static const float constants[] = {0.0f, 1.0f, -1.0f, 0.37109375f, -0.0625f, 3.0f, -0x1p-20f, 1000.0f};
    float w[200];
    for (size_t c = 0; c < sizeof constants / sizeof constants[0]; c++) {
        for (int32_t k = 1; k <= 200; k += 33) {
            for (int32_t i = 0; i < 200; i++) {
                w[i] = constants[c];
            }
            check_exact(w, k, 4);
            check_exact(w, k, 8);
            for (int32_t i = 0; i < 200; i += 3) {
                w[i] = 0.0f;
            }
            check_exact(w, k, 4);
        }
    }
    /* Codes of a float16 grid come back as they are. */
    for (int32_t zero = 0; zero < 16; zero++) {
        for (int32_t i = 0; i < 128; i++) {
            w[i] = 0.0078125f * (float)(i % 16 - zero);
        }
        check_exact(w, 128, 4);
    }
}

/* Values that no grid holds must give defined results, not undefined conversions. */
static void test_hostile_values(void)
{
    static const float values[] = {NAN, INFINITY, -INFINITY, 1e38f, -1e38f, 1e-40f, 70000.0f};
    static result r;
    for (size_t v = 0; v < sizeof values / sizeof values[0]; v++) {
        float w[64];
        for (int32_t i = 0; i < 64; i++) {
            w[i] = normal();
        }
        w[5] = values[v];
        w[40] = -values[v];
        for (int32_t bits = 4; bits <= 8; bits += 4) {
            qf_quantize_rows(w, 1, 64, bits, 32, r.q, r.scales, r.zeros);
            CHECK(isfinite(r.scales[0]) && isfinite(r.scales[1]) && r.scales[0] > 0.0f);
            for (int32_t i = 0; i < 64; i++) {
                CHECK(r.q[i] < 1 << bits);
            }
        }
    }
}

int main(void)
{
    RUN(test_better_than_plain);
    RUN(test_gain);
    RUN(test_exact);
    RUN(test_hostile_values);
    return check_report();
}
