/* Attention of many rows over a low-bit cache: dispatch and launch. What it computes and how is in
 * attention_prefill_lowbit.cuh; shapes, items and checks are attention.cu's.
 *
 * Roofline: that of 16-bit prefill (tensor cores), plus some 700 instructions of each thread a tile of 64 positions that
 * turn codes into bf16 and add the bias, about as many as a thread spends on the tile's products and weights. Target: 1.4
 * times the 16-bit kernel's time, which larger row tiles would take: they halve what is converted for a row.
 *
 * Measured: see PERF.md.
 * Tried and lost: values scaled in float32, and the tables' row read for each key instead of turning from one to the next: 2.0
 * times the 16-bit kernel's time, where this has 1.7. */
#include "attention_prefill_lowbit.cuh"

typedef void (*lowbit_kernel)(attention_params);

static lowbit_kernel kernel_of(const attention_params *p)
{
    const bool invariant = p->a.batch_invariant;
    return p->a.shape.head_dim == 64 ? invariant ? attention_prefill_lowbit_kernel<64, 1, true>
                                                 : attention_prefill_lowbit_kernel<64, 2, false>
           : invariant               ? attention_prefill_lowbit_kernel<128, 1, true>
                                     : attention_prefill_lowbit_kernel<128, 2, false>;
}

extern "C" qf_status qf_attention_prefill_lowbit(const attention_params *p, uint32_t num_blocks,
                                                 const qf_cuda_device *device, cudaStream_t stream, qf_error *err)
{
    const size_t bytes = lowbit_prefill_shared_bytes(p->a.kv.format, p->a.shape.head_dim, p->a.batch_invariant ? 1 : 2);
    qf_status status = qf_allow_shared("attention (low-bit prefill)", kernel_of(p), bytes, err);
    if (status != QF_OK) {
        return status;
    }
    return qf_launch("attention (low-bit prefill)", kernel_of(p), dim3(num_blocks), dim3(ATTENTION_THREADS), bytes,
                     device->dependent_launch, stream, err, *p);
}
