/* Element types and the scalar conversions between them. */
#ifndef QF_BASE_DTYPE_H
#define QF_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum qf_dtype {
    QF_DTYPE_F32 = 0,
    QF_DTYPE_BF16,
    QF_DTYPE_F16,
    QF_DTYPE_I8,
    QF_DTYPE_U8,
    QF_DTYPE_I16,
    QF_DTYPE_U16,
    QF_DTYPE_I32,
    QF_DTYPE_U32,
    QF_DTYPE_I64,
    QF_DTYPE_U64,
    QF_DTYPE_F64,
    QF_DTYPE_BOOL,
    QF_DTYPE_F8_E4M3,
    QF_DTYPE_F8_E5M2,
    QF_DTYPE_COUNT
} qf_dtype;

/* Bytes of one element, and the safetensors spelling ("F32", "BF16", ...). */
size_t qf_dtype_size(qf_dtype dtype);
const char *qf_dtype_name(qf_dtype dtype);

static inline uint32_t qf_f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float qf_bits_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float qf_bf16_to_f32(uint16_t value) { return qf_bits_f32((uint32_t)value << 16); }

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t qf_f32_to_bf16(float value)
{
    uint32_t bits = qf_f32_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((bits >> 16) | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float qf_f16_to_f32(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(value & 0x7fffu);
    if (magnitude >= 0x7c00u) { /* infinity or NaN */
        return qf_bits_f32(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    }
    /* Shift the exponent into place and rescale: exact for normal and subnormal halves alike. */
    return qf_bits_f32(sign | (magnitude << 13)) * 0x1p112f;
}

/* Round to nearest even; overflow gives infinity; NaN stays NaN. */
static inline uint16_t qf_f32_to_f16(float value)
{
    uint32_t bits = qf_f32_bits(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (magnitude >= 0x477ff000u) { /* 65520 and up round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) { /* below 2^-14: subnormal, let the adder round */
        float shifted = qf_bits_f32(magnitude) + 0.5f;
        return (uint16_t)(sign | (qf_f32_bits(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

#endif
