/* How keys and values are stored: the formats of the KV cache, and their scalar codec, the reference of every backend.
 *
 * A row is one token's key or value of one KV head: head_dim values. Low-bit keys are stored rotated but without the
 * bias of k_proj, whose rotation a reader adds exactly: Qwen2.5's biases are so large that they would take all the
 * codes. Values are stored as they are. */
#ifndef QF_KV_FORMAT_H
#define QF_KV_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum qf_kv_format {
    QF_KV_AUTO = 0,
    QF_KV_F32,
    QF_KV_BF16,
    QF_KV_FP8_E4M3, /* scale * e4m3; a bf16 scale a row, amax / 448 rounded up */
    QF_KV_INT8,     /* scale * code; a bf16 scale a row, amax / 127 rounded up */
    QF_KV_INT4,     /* step * (code - zero) in groups of 32; one word a group: 12 bits of step, 4 of zero */
    QF_KV_NF4       /* scale * level[code] in groups of 32; a bf16 scale a group */
} qf_kv_format;

#define QF_KV_GROUP 32 /* of the 4-bit formats, along head_dim */

static inline bool qf_kv_is_low_bit(qf_kv_format format) { return format >= QF_KV_FP8_E4M3; }

/* Bits of a value without its scale: 32, 16, 8, 4. Not for QF_KV_AUTO. */
int32_t qf_kv_bits(qf_kv_format format);
/* 16-bit scale words of a row; 0 for 16 and 32 bits. */
int32_t qf_kv_scales_per_row(qf_kv_format format, int32_t head_dim);
/* Bytes of a row, scales included. head_dim is a multiple of QF_KV_GROUP for the low-bit formats. */
size_t qf_kv_row_bytes(qf_kv_format format, int32_t head_dim);
/* "fp8_e4m3" and so on: a string literal. */
const char *qf_kv_format_name(qf_kv_format format);

/* Low-bit formats only. codes: head_dim bytes, one a value (4-bit formats use 0 .. 15; int8 is two's complement). */
void qf_kv_encode_row(qf_kv_format format, const float *x, int32_t head_dim, uint8_t *codes, uint16_t *scales);
void qf_kv_decode_row(qf_kv_format format, const uint8_t *codes, const uint16_t *scales, int32_t head_dim, float *x);

/* What codes and scale words stand for. */
float qf_kv_e4m3_value(uint8_t code);
float qf_kv_nf4_level(uint8_t code);
const float *qf_kv_nf4_levels(void); /* (16) */
float qf_kv_int4_step(uint16_t word);
static inline int32_t qf_kv_int4_zero(uint16_t word) { return word & 15; }

#endif
