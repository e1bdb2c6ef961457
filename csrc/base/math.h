/* Elementary functions of our own: the same bits on every machine and under every libm, with no rounding mode,
 * errno or table behind them. Plain elementwise arithmetic, so that a loop of fixed length over one vectorises.
 * The promise holds under -ffp-contract=off and round-to-nearest. */
#ifndef QF_BASE_MATH_H
#define QF_BASE_MATH_H

#include <stdint.h>
#include <string.h>

#include "base/dtype.h"

/* condition ? a : b, without a branch: compilers turn chains of ?: into jumps, which do not vectorise. */
static inline float qf_select_float(int condition, float a, float b)
{
    uint32_t mask = 0u - (uint32_t)(condition != 0);
    return qf_bits_f32((qf_f32_bits(a) & mask) | (qf_f32_bits(b) & ~mask));
}

/* e^x for x <= 0, at most 1 ulp off; below -87 (where e^x is almost subnormal) it is 0. NaN gives NaN.
 *   x = n ln 2 + r with |r| <= ln 2 / 2;   e^x = 2^n (1 + r + r^2 q(r)),  q of degree 4 (minimax, error 3.1e-9). */
static inline float qf_expf_nonpositive(float x)
{
    /* 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits. */
    const float shift = 12582912.0f;
    float t = x * 0x1.715476p+0f + shift;
    float n = t - shift;
    /* ln 2 in two parts; the first has 9 trailing zero bits, so n * hi is exact for |n| <= 150. */
    float r = x - n * 0x1.62e400p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    float q = 0x1.6a2434p-10f;
    q = q * r + 0x1.1239e2p-7f;
    q = q * r + 0x1.5558f2p-5f;
    q = q * r + 0x1.555492p-3f;
    q = q * r + 0x1.fffffcp-2f;
    float p = (q * (r * r) + r) + 1.0f;
    float scale = qf_bits_f32((qf_f32_bits(t) - 0x4b400000u + 127u) << 23);
    return qf_select_float(x < -87.0f, 0.0f, p * scale);
}

/* Natural logarithm of a positive, finite, normal double; at most 3 ulp off for x >= 1.5, exact for 1.
 *   x = 2^e m with m in [sqrt 1/2, sqrt 2);   ln m = 2 atanh(s),  s = (m - 1) / (m + 1). */
static inline double qf_log(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int64_t exponent = (int64_t)(bits >> 52) - 1023;
    uint64_t mantissa = bits & 0xfffffffffffffULL;
    if (mantissa > 0x6a09e667f3bcdULL) { /* m > sqrt 2 */
        exponent += 1;
        mantissa |= 0x3feULL << 52;
    } else {
        mantissa |= 0x3ffULL << 52;
    }
    double m;
    memcpy(&m, &mantissa, sizeof m);
    double s = (m - 1.0) / (m + 1.0);
    double s2 = s * s;
    double sum = 0.0;
    for (int k = 23; k >= 3; k -= 2) { /* |s| < 0.1716: the first term left out is below 2^-66 */
        sum = sum * s2 + 1.0 / k;
    }
    double ln_m = 2.0 * s + 2.0 * s * (sum * s2);
    double e = (double)exponent;
    return e * 0x1.62e42fefa3800p-1 + (e * 0x1.ef35793c76730p-45 + ln_m); /* ln 2 in two parts */
}

#endif
