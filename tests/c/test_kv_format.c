/* sources: kv/format.c base/dtype.c */
/* sanitizers: address */
#include <math.h>
#include <stdlib.h>

#include "base/dtype.h"
#include "check.h"
#include "kv/format.h"

static const qf_kv_format formats[] = {QF_KV_FP8_E4M3, QF_KV_INT8, QF_KV_INT4, QF_KV_NF4};
enum { NUM_FORMATS = 4, MAX_DIM = 256, MAX_SCALES = MAX_DIM / QF_KV_GROUP };

static uint64_t random_state = 0x9e3779b97f4a7c15u;

static float random_normal(void)
{
    float sum = -6.0f;
    for (int i = 0; i < 12; i++) {
        random_state = random_state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(random_state >> 40) * 0x1p-24f;
    }
    return sum;
}

static void test_sizes(void)
{
    CHECK_INT(qf_kv_row_bytes(QF_KV_F32, 128), 512);
    CHECK_INT(qf_kv_row_bytes(QF_KV_BF16, 80), 160);
    CHECK_INT(qf_kv_row_bytes(QF_KV_FP8_E4M3, 128), 130);
    CHECK_INT(qf_kv_row_bytes(QF_KV_INT8, 64), 66);
    CHECK_INT(qf_kv_row_bytes(QF_KV_INT4, 128), 72);
    CHECK_INT(qf_kv_row_bytes(QF_KV_NF4, 64), 36);
    CHECK_INT(qf_kv_row_bytes(QF_KV_INT4, 32), 18);
    CHECK_INT(qf_kv_scales_per_row(QF_KV_INT8, 96), 1);
    CHECK_INT(qf_kv_scales_per_row(QF_KV_NF4, 96), 3);
    CHECK_INT(qf_kv_scales_per_row(QF_KV_BF16, 96), 0);
    CHECK(!qf_kv_is_low_bit(QF_KV_AUTO) && !qf_kv_is_low_bit(QF_KV_F32) && !qf_kv_is_low_bit(QF_KV_BF16));
    CHECK_STRING(qf_kv_format_name(QF_KV_FP8_E4M3), "fp8_e4m3");
    CHECK_STRING(qf_kv_format_name(QF_KV_BF16), "bfloat16");
    for (int f = 0; f < NUM_FORMATS; f++) {
        CHECK(qf_kv_is_low_bit(formats[f]));
        CHECK_INT(qf_kv_bits(formats[f]), f < 2 ? 8 : 4);
    }
}

/* --- cases worked out by hand ------------------------------------------------------------------------------ */

typedef struct hand_case {
    float x;
    uint8_t code;
    float value;
} hand_case;

/* Encodes the cases as one row of 32 (the rest is 0) and compares scale words, codes and values. */
static void check_hand(qf_kv_format format, uint16_t scale, const hand_case *cases, int count)
{
    float x[32] = {0}, back[32];
    uint8_t codes[32];
    uint16_t scales[1];
    for (int i = 0; i < count; i++) {
        x[i] = cases[i].x;
    }
    qf_kv_encode_row(format, x, 32, codes, scales);
    qf_kv_decode_row(format, codes, scales, 32, back);
    CHECK_INT(scales[0], scale);
    for (int i = 0; i < count; i++) {
        CHECK_INT(codes[i], cases[i].code);
        CHECK(back[i] == cases[i].value);
    }
    for (int i = count; i < 32; i++) {
        CHECK(back[i] == 0.0f);
    }
}

static void test_fp8_by_hand(void)
{
    const hand_case one[] = {/* scale 1 */
                             {448.0f, 0x7e, 448.0f},
                             {-224.0f, 0xf6, -224.0f},
                             {1.0f, 0x38, 1.0f},
                             {17.0f, 0x58, 16.0f},         /* half way from 16 to 18: to the even mantissa */
                             {19.0f, 0x5a, 20.0f},         /* and from 18 to 20 */
                             {0x1p-6f, 0x08, 0x1p-6f},     /* the least normal number */
                             {0x1p-9f, 0x01, 0x1p-9f},     /* the least of all */
                             {0x1p-10f, 0x00, 0.0f},       /* half of it: to 0 */
                             {0x1.8p-9f, 0x02, 0x1p-8f},   /* one and a half: to 2 */
                             {0x1.ep-7f, 0x08, 0x1p-6f},   /* 7.5 steps: into the normal numbers */
                             {-0x1p-9f, 0x81, -0x1p-9f},
                             {432.0f, 0x7e, 448.0f}};      /* half way from 416 to 448 */
    check_hand(QF_KV_FP8_E4M3, 0x3f80, one, 12);
    /* amax 450: 450 / 448 = 1.00446.. up to the next bf16, 1 + 1/128 */
    const hand_case up[] = {{450.0f, 0x7e, 451.5f}, {-1.0078125f, 0xb8, -1.0078125f}};
    check_hand(QF_KV_FP8_E4M3, 0x3f81, up, 2);
}

static void test_int8_by_hand(void)
{
    const hand_case one[] = {{127.0f, 127, 127.0f},         {-127.0f, 0x81, -127.0f}, {0.5f, 0, 0.0f},
                             {1.5f, 2, 2.0f},               {-2.5f, 0xfe, -2.0f},     {-0.75f, 0xff, -1.0f},
                             {126.49f, 126, 126.0f}};
    check_hand(QF_KV_INT8, 0x3f80, one, 7);
    /* amax 1: 1 / 127 = 0x1.0204..p-7 up to 0x1.04p-7; 1 / that = 126.03 */
    const hand_case up[] = {{-1.0f, 0x82, -126.0f * 0x1.04p-7f}, {0.25f, 32, 32.0f * 0x1.04p-7f}};
    check_hand(QF_KV_INT8, 0x3c02, up, 2);
}

static void test_int4_by_hand(void)
{
    const hand_case positive[] = {{15.0f, 15, 15.0f}, {0.5f, 0, 0.0f}, {1.5f, 2, 2.0f}, {7.0f, 7, 7.0f}};
    check_hand(QF_KV_INT4, 0x7f0 << 4, positive, 4); /* step 1, zero 0 */
    float x[32] = {-7.0f, 8.0f, -0.4f, 3.6f}, back[32];
    const uint8_t expected[5] = {0, 15, 7, 11, 7};
    uint8_t codes[32];
    uint16_t word;
    qf_kv_encode_row(QF_KV_INT4, x, 32, codes, &word);
    qf_kv_decode_row(QF_KV_INT4, codes, &word, 32, back);
    CHECK_INT(word, 0x7f0 << 4 | 7);
    for (int i = 0; i < 5; i++) {
        CHECK_INT(codes[i], expected[i]);
        CHECK(back[i] == (float)(expected[i] - 7));
    }
    /* All below 0: the range is stretched to 0, whose code is 15. 30 / 15 = 2. */
    const hand_case negative[] = {{-30.0f, 0, -30.0f}, {-2.0f, 14, -2.0f}, {-29.1f, 0, -30.0f}};
    float n[32] = {0};
    for (int i = 0; i < 3; i++) {
        n[i] = negative[i].x;
    }
    qf_kv_encode_row(QF_KV_INT4, n, 32, codes, &word);
    CHECK_INT(word, 0x800 << 4 | 15);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(codes[i], negative[i].code);
    }
    CHECK_INT(codes[3], 15);
    /* 16 / 15 = 1.0666 up to a mantissa of 4 bits: 1 + 2 / 16. */
    const hand_case up[] = {{16.0f, 14, 15.75f}, {1.0f, 1, 1.125f}};
    check_hand(QF_KV_INT4, 0x7f2 << 4, up, 2);
    CHECK(qf_kv_int4_step(0x7f2 << 4 | 9) == 1.125f);
    CHECK_INT(qf_kv_int4_zero(0x7f2 << 4 | 9), 9);
}

static void test_nf4_by_hand(void)
{
    const float levels[16] = {-1.0f,          -0.6953125f,  -0.5234375f,    -0.39453125f, -0.28515625f, -0.1845703125f,
                              -0.0908203125f, 0.0f,         0.07958984375f, 0.1611328125f, 0.24609375f, 0.337890625f,
                              0.44140625f,    0.5625f,      0.72265625f,    1.0f};
    float x[32], back[32];
    uint8_t codes[32];
    uint16_t word;
    for (int i = 0; i < 16; i++) {
        CHECK(qf_kv_nf4_level((uint8_t)i) == levels[i]);
        x[i] = 2.0f * levels[i];
        x[16 + i] = i < 15 ? levels[i] + levels[i + 1] : 1.6f; /* a tie goes to the lower index */
    }
    qf_kv_encode_row(QF_KV_NF4, x, 32, codes, &word);
    qf_kv_decode_row(QF_KV_NF4, codes, &word, 32, back);
    CHECK_INT(word, 0x4000);
    for (int i = 0; i < 16; i++) {
        CHECK_INT(codes[i], i);
        CHECK(back[i] == x[i]);
        CHECK_INT(codes[16 + i], i < 15 ? i : 14);
    }
}

/* --- properties -------------------------------------------------------------------------------------------- */

/* The largest error that the format allows at x, in a row or group of largest magnitude `max` and range `range`. */
static double error_bound(qf_kv_format format, double x, double max, double range)
{
    const double up = 1.0 + 1.0 / 128;
    switch (format) {
    case QF_KV_FP8_E4M3: return fmax(fabs(x) / 16, max / 448 * up * 0x1p-10) * (1 + 1e-6);
    case QF_KV_INT8: return max / 127 * up * 0.5 * (1 + 1e-5);
    case QF_KV_INT4: return range / 15 * (1 + 1.0 / 16) * (1 + 1e-5); /* half a step, and half of the zero's rounding */
    default: return max * up * (1.0 - 0.6953125) / 2 * (1 + 1e-6);
    }
}

static void test_round_trip(void)
{
    static const int32_t dims[] = {32, 64, 96, 128, 256};
    static const float magnitudes[] = {1e-30f, 1e-3f, 1.0f, 600.0f, 1e30f};
    float x[MAX_DIM], back[MAX_DIM];
    uint8_t codes[MAX_DIM];
    uint16_t scales[MAX_SCALES + 1];
    for (int f = 0; f < NUM_FORMATS; f++) {
        for (int round = 0; round < 400; round++) {
            const int32_t dim = dims[round % 5];
            const int32_t n = dim / qf_kv_scales_per_row(formats[f], dim);
            for (int32_t i = 0; i < dim; i++) {
                x[i] = random_normal() * magnitudes[round / 5 % 5] + (round % 3 == 0 ? magnitudes[round / 5 % 5] : 0.0f);
            }
            scales[dim / n] = 0xabcd;
            memset(codes, 0xee, sizeof codes);
            qf_kv_encode_row(formats[f], x, dim, codes, scales);
            qf_kv_decode_row(formats[f], codes, scales, dim, back);
            CHECK_INT(scales[dim / n], 0xabcd);
            for (int32_t g = 0; g < dim; g += n) {
                double low = 0, high = 0;
                for (int32_t i = g; i < g + n; i++) {
                    low = fmin(low, (double)x[i]);
                    high = fmax(high, (double)x[i]);
                }
                for (int32_t i = g; i < g + n; i++) {
                    CHECK(fabs((double)back[i] - (double)x[i]) <=
                          error_bound(formats[f], (double)x[i], fmax(-low, high), high - low));
                    CHECK(qf_kv_bits(formats[f]) == 8 || codes[i] < 16);
                }
            }
        }
    }
}

/* What was read and is written again is the same, where the scale is: a 16-bit window's neighbours never drift. */
static void test_int8_is_stable(void)
{
    float x[64], back[64], again[64];
    uint8_t codes[64];
    uint16_t scale;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 64; i++) {
            x[i] = random_normal();
        }
        x[round % 64] = 127.0f * 0x1p-4f; /* an exact scale */
        qf_kv_encode_row(QF_KV_INT8, x, 64, codes, &scale);
        qf_kv_decode_row(QF_KV_INT8, codes, &scale, 64, back);
        qf_kv_encode_row(QF_KV_INT8, back, 64, codes, &scale);
        qf_kv_decode_row(QF_KV_INT8, codes, &scale, 64, again);
        CHECK(memcmp(back, again, sizeof back) == 0);
    }
}

static void test_zeros_and_denormals(void)
{
    float x[64] = {0}, back[64];
    uint8_t codes[64];
    uint16_t scales[2];
    for (int f = 0; f < NUM_FORMATS; f++) {
        for (int sign = 0; sign < 2; sign++) {
            for (int i = 0; i < 64; i++) {
                x[i] = sign != 0 ? -0.0f : 0.0f;
            }
            qf_kv_encode_row(formats[f], x, 64, codes, scales);
            qf_kv_decode_row(formats[f], codes, scales, 64, back);
            CHECK_INT(scales[0], 0);
            for (int i = 0; i < 64; i++) {
                CHECK(back[i] == 0.0f);
                CHECK(formats[f] == QF_KV_NF4 || codes[i] == 0);
            }
        }
        for (int e = -149; e <= -110; e++) { /* as small as float32 goes: finite, and never larger than it was by much */
            for (int i = 0; i < 64; i++) {
                x[i] = ldexpf(i % 2 == 0 ? 1.0f : -0.5f, e);
            }
            qf_kv_encode_row(formats[f], x, 64, codes, scales);
            qf_kv_decode_row(formats[f], codes, scales, 64, back);
            for (int i = 0; i < 64; i++) {
                CHECK(fabsf(back[i]) <= ldexpf(1.0f, e) * 1.1f + 0x1p-126f);
            }
        }
    }
    memset(x, 0, sizeof x);
    x[0] = 0x1p-124f; /* a step of 2^-124 / 15 is below 2^-126: 0 */
    qf_kv_encode_row(QF_KV_INT4, x, 64, codes, scales);
    CHECK_INT(scales[0], 0);
}

/* Never a crash; a row that holds one reads as NaN, so that nothing silently goes on with it. */
static void test_not_finite(void)
{
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    float x[64], back[64];
    uint8_t codes[64];
    uint16_t scales[2];
    for (int f = 0; f < NUM_FORMATS; f++) {
        for (int b = 0; b < 4; b++) {
            for (int at = 0; at < 32; at += 31) {
                for (int i = 0; i < 64; i++) {
                    x[i] = random_normal();
                }
                x[at] = bad[b];
                qf_kv_encode_row(formats[f], x, 64, codes, scales);
                qf_kv_decode_row(formats[f], codes, scales, 64, back);
                CHECK(isnan(back[at]));
                CHECK(qf_kv_bits(formats[f]) == 8 || isfinite(back[40])); /* the other group is as it was */
            }
        }
        for (int i = 0; i < 64; i++) { /* the largest numbers: any codes */
            x[i] = i % 2 == 0 ? 3.4e38f : -3.4e38f;
        }
        qf_kv_encode_row(formats[f], x, 64, codes, scales);
        qf_kv_decode_row(formats[f], codes, scales, 64, back);
    }
}

static void test_every_code_decodes(void)
{
    uint8_t codes[32] = {0};
    uint16_t scale = 0x3f80;
    float x[32];
    for (int code = 0; code < 256; code++) {
        codes[3] = (uint8_t)code;
        qf_kv_decode_row(QF_KV_FP8_E4M3, codes, &scale, 32, x);
        const int exponent = code >> 3 & 15, mantissa = code & 7;
        const double value = exponent == 0 ? mantissa * 0x1p-9 : ldexp(8 + mantissa, exponent - 10);
        CHECK((code & 0x7f) == 0x7f ? isnan(x[3]) : (double)x[3] == (code < 128 ? value : -value));
        CHECK(x[2] == 0.0f);
        qf_kv_decode_row(QF_KV_INT8, codes, &scale, 32, x);
        CHECK(x[3] == (float)(code < 128 ? code : code - 256));
        if (code < 16) {
            qf_kv_decode_row(QF_KV_NF4, codes, &scale, 32, x);
            CHECK(x[3] == qf_kv_nf4_level((uint8_t)code));
        }
    }
    for (int word = 0; word < 65536; word++) { /* every step and zero */
        const uint16_t w = (uint16_t)word;
        const float step = qf_kv_int4_step(w);
        codes[3] = (uint8_t)(word % 16);
        codes[4] = (uint8_t)(15 - word % 16);
        qf_kv_decode_row(QF_KV_INT4, codes, &w, 32, x);
        CHECK(!(step < 0.0f));
        if (isfinite(step)) {
            CHECK(x[3] == 0.0f);
            CHECK(x[4] == step * (float)(15 - 2 * (word % 16)));
        }
    }
}

int main(void)
{
    RUN(test_sizes);
    RUN(test_fp8_by_hand);
    RUN(test_int8_by_hand);
    RUN(test_int4_by_hand);
    RUN(test_nf4_by_hand);
    RUN(test_round_trip);
    RUN(test_int8_is_stable);
    RUN(test_zeros_and_denormals);
    RUN(test_not_finite);
    RUN(test_every_code_decodes);
    return check_report();
}
