/* One entry of the table of cosines and sines, made by the step's first kernel (step_io.cu):
 *
 *   angle = float32(position * inv_freq[j]), taken in double;  cos_sin[t] = cos(angle) factor | sin(angle) factor */
#ifndef QF_ROPE_TABLE_CUH
#define QF_ROPE_TABLE_CUH

#include "common/launch.cuh"
#include "common/ptx.cuh"

/* row: cosines of half a head, then sines. */
static __device__ __forceinline__ void qf_rope_table_entry(int32_t position, float inv_freq, double factor, float *row,
                                                           int32_t j, int32_t half)
{
    const float angle = __fmul_rn((float)position, inv_freq);
    double sine, cosine;
    sincos((double)angle, &sine, &cosine);
    row[j] = (float)(cosine * factor);
    row[half + j] = (float)(sine * factor);
}

#endif
