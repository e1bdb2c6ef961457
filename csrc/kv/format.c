/* The scalar codec of a low-bit KV cache: the reference of every backend. The formats are in format.h.
 *
 * Scales are rounded up, so that the largest value of a row or group stays within the codes. A row or group with an
 * infinity or a NaN gets a scale that is no number: it reads as NaN, and the sampler refuses the logits that follow. */
#include "kv/format.h"

#include "base/dtype.h"

#define E4M3_MAX 448.0f
#define E4M3_NAN 0x7fu
#define BF16_NAN 0x7fc0u
#define INT4_NAN 0xfff0u

/* QLoRA (arXiv 2305.14314), appendix E, rounded to bfloat16. */
static const float nf4_levels[16] = {-1.0f,           -0.6953125f,  -0.5234375f,   -0.39453125f,
                                     -0.28515625f,    -0.1845703125f, -0.0908203125f, 0.0f,
                                     0.07958984375f,  0.1611328125f, 0.24609375f,  0.337890625f,
                                     0.44140625f,     0.5625f,       0.72265625f,   1.0f};

int32_t qf_kv_bits(qf_kv_format format)
{
    switch (format) {
    case QF_KV_F32: return 32;
    case QF_KV_BF16: return 16;
    case QF_KV_FP8_E4M3:
    case QF_KV_INT8: return 8;
    case QF_KV_INT4:
    case QF_KV_NF4: return 4;
    case QF_KV_AUTO: break;
    }
    return 0;
}

int32_t qf_kv_scales_per_row(qf_kv_format format, int32_t head_dim)
{
    return !qf_kv_is_low_bit(format) ? 0 : qf_kv_bits(format) == 4 ? head_dim / QF_KV_GROUP : 1;
}

size_t qf_kv_row_bytes(qf_kv_format format, int32_t head_dim)
{
    const size_t bits = (size_t)qf_kv_bits(format) * (size_t)head_dim;
    return bits / 8 + 2 * (size_t)qf_kv_scales_per_row(format, head_dim);
}

const char *qf_kv_format_name(qf_kv_format format)
{
    switch (format) {
    case QF_KV_AUTO: return "auto";
    case QF_KV_F32: return "float32";
    case QF_KV_BF16: return "bfloat16";
    case QF_KV_FP8_E4M3: return "fp8_e4m3";
    case QF_KV_INT8: return "int8";
    case QF_KV_INT4: return "int4";
    case QF_KV_NF4: return "nf4";
    }
    return "?";
}

/* --- what codes and words stand for ---------------------------------------------------------------------- */

float qf_kv_e4m3_value(uint8_t code)
{
    const uint32_t magnitude = code & 0x7fu;
    if (magnitude == E4M3_NAN) {
        return qf_bits_f32(0x7fc00000u);
    }
    /* Exponent and mantissa into place, the exponent's bias of 7 made 127: exact for subnormal codes too. */
    const float value = qf_bits_f32(magnitude << 20) * 0x1p120f;
    return (code & 0x80u) != 0 ? -value : value;
}

const float *qf_kv_nf4_levels(void) { return nf4_levels; }

float qf_kv_nf4_level(uint8_t code) { return nf4_levels[code & 15]; }

float qf_kv_int4_step(uint16_t word) { return qf_bits_f32((uint32_t)(word >> 4) << 19); }

/* --- encoding ---------------------------------------------------------------------------------------------- */

/* To nearest even, for |x| < 2^22: the constant pushes the fraction out of the significand. */
static float round_even(float x)
{
    const float pushed = x + 12582912.0f;
    return pushed - 12582912.0f;
}

static bool is_finite(float x) { return (qf_f32_bits(x) & 0x7f800000u) != 0x7f800000u; }

/* The largest magnitude, or NaN if a value is not finite. */
static float find_max(const float *x, int32_t n)
{
    uint32_t max = 0; /* magnitudes order like their bits, and what is not finite comes after all others */
    for (int32_t i = 0; i < n; i++) {
        const uint32_t magnitude = qf_f32_bits(x[i]) & 0x7fffffffu;
        max = magnitude > max ? magnitude : max;
    }
    return max >= 0x7f800000u ? qf_bits_f32(0x7fc00000u) : qf_bits_f32(max);
}

/* The bf16 word of the least bf16 value that is not below `scale` >= 0; a NaN where there is none. */
static uint16_t bf16_up(float scale)
{
    if (!is_finite(scale)) {
        return BF16_NAN;
    }
    const uint32_t word = (qf_f32_bits(scale) + 0xffffu) >> 16;
    return word >= 0x7f80u ? BF16_NAN : (uint16_t)word;
}

/* |y| <= 448 and a little: to nearest even, saturated. */
static uint8_t encode_e4m3(float y)
{
    const uint32_t bits = qf_f32_bits(y);
    const uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
    uint32_t code;
    if (magnitude < 0x3c800000u) { /* below 2^-6: multiples of 2^-9; 8 of them are the first normal code */
        code = (uint32_t)round_even(qf_bits_f32(magnitude) * 512.0f);
    } else {
        const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
        code = (rounded >> 20) - (120u << 3);
    }
    return (uint8_t)(sign | (code > 0x7eu ? 0x7eu : code));
}

static uint8_t encode_nf4(float y)
{
    uint8_t code = 0;
    for (int i = 0; i < 15; i++) { /* the middle is exact: two bf16 values of nearly one size */
        code = (uint8_t)(code + (y > 0.5f * (nf4_levels[i] + nf4_levels[i + 1])));
    }
    return code;
}

static float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* One scale for n values: fp8, int8, nf4. */
static uint16_t encode_scaled(qf_kv_format format, const float *x, int32_t n, uint8_t *codes)
{
    const float limit = format == QF_KV_FP8_E4M3 ? E4M3_MAX : format == QF_KV_INT8 ? 127.0f : 1.0f;
    const uint16_t word = bf16_up(find_max(x, n) / limit);
    const float scale = qf_bf16_to_f32(word);
    if (word == 0 || word == BF16_NAN) {
        memset(codes, format == QF_KV_NF4 && word == 0 ? 7 : 0, (size_t)n); /* level 7 is 0 */
        return word;
    }
    for (int32_t i = 0; i < n; i++) {
        const float y = x[i] / scale;
        if (format == QF_KV_FP8_E4M3) {
            codes[i] = encode_e4m3(y);
        } else if (format == QF_KV_NF4) {
            codes[i] = encode_nf4(y);
        } else {
            codes[i] = (uint8_t)(int8_t)round_even(clamp(y, -127.0f, 127.0f));
        }
    }
    return word;
}

static uint16_t encode_int4(const float *x, int32_t n, uint8_t *codes)
{
    float low = 0.0f, high = 0.0f;
    memset(codes, 0, (size_t)n);
    for (int32_t i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    const float exact = (high - low) / 15.0f;
    if (!is_finite(find_max(x, n)) || !is_finite(exact)) {
        return INT4_NAN;
    }
    const uint32_t bits = (qf_f32_bits(exact) + 0x7ffffu) & 0xfff80000u;
    if (bits < 0x00800000u) {
        return 0;
    }
    const float step = qf_bits_f32(bits);
    const float zero = clamp(round_even(-low / step), 0.0f, 15.0f);
    for (int32_t i = 0; i < n; i++) {
        codes[i] = (uint8_t)clamp(round_even(x[i] / step) + zero, 0.0f, 15.0f);
    }
    return (uint16_t)((bits >> 19 & 0xfffu) << 4 | (uint32_t)zero);
}

void qf_kv_encode_row(qf_kv_format format, const float *x, int32_t head_dim, uint8_t *codes, uint16_t *scales)
{
    const int32_t n = head_dim / qf_kv_scales_per_row(format, head_dim);
    for (int32_t at = 0, group = 0; at < head_dim; at += n, group++) {
        scales[group] = format == QF_KV_INT4 ? encode_int4(x + at, n, codes + at)
                                             : encode_scaled(format, x + at, n, codes + at);
    }
}

void qf_kv_decode_row(qf_kv_format format, const uint8_t *codes, const uint16_t *scales, int32_t head_dim, float *x)
{
    const int32_t n = head_dim / qf_kv_scales_per_row(format, head_dim);
    for (int32_t i = 0; i < head_dim; i++) {
        const uint16_t word = scales[i / n];
        if (format == QF_KV_INT4) {
            x[i] = qf_kv_int4_step(word) * (float)((codes[i] & 15) - qf_kv_int4_zero(word));
        } else if (format == QF_KV_INT8) {
            x[i] = qf_bf16_to_f32(word) * (float)(int8_t)codes[i];
        } else if (format == QF_KV_NF4) {
            x[i] = qf_bf16_to_f32(word) * qf_kv_nf4_level(codes[i]);
        } else {
            x[i] = qf_bf16_to_f32(word) * qf_kv_e4m3_value(codes[i]);
        }
    }
}
