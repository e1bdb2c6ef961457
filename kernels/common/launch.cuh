/* Host side of every launcher: checks, error messages, and launches with or without dependent launch. */
#ifndef QF_COMMON_LAUNCH_CUH
#define QF_COMMON_LAUNCH_CUH

#include "qf_kernels.h"

/* A launcher's argument check: `return QF_FAIL` with what, the value and the limit is written out at the place. */
#define QF_CUDA_TRY(call)                                                                                        \
    do {                                                                                                         \
        cudaError_t cuda_error_ = (call);                                                                        \
        if (cuda_error_ != cudaSuccess) {                                                                        \
            (void)cudaGetLastError();                                                                            \
            return QF_FAIL(err, cuda_error_ == cudaErrorMemoryAllocation ? QF_ERROR_OUT_OF_MEMORY                \
                                                                         : QF_ERROR_BACKEND,                     \
                           "%s: %s", #call, cudaGetErrorString(cuda_error_));                                    \
        }                                                                                                        \
    } while (0)

/* Launches kernel(args...) and forwards its error. With dependent = true the kernel may start before the one before it
 * in the stream ends: it must call qf_grid_dependency_wait() before it touches what that one writes. */
template <typename... Params, typename... Args>
static qf_status qf_launch(const char *name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                           bool dependent, cudaStream_t stream, qf_error *err, Args... args)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attribute;
    config.numAttrs = dependent ? 1 : 0;
    cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
    if (status == cudaSuccess) {
        status = cudaPeekAtLastError();
    }
    if (status != cudaSuccess) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_BACKEND, "%s: launch of %u x %u x %u blocks of %u threads, %zu bytes: %s", name,
                       grid.x, grid.y, grid.z, block.x, shared_bytes, cudaGetErrorString(status));
    }
    return QF_OK;
}

/* Allows a kernel more than 48 KB of dynamic shared memory; cheap enough to call at every launch. */
template <typename... Params>
static qf_status qf_allow_shared(const char *name, void (*kernel)(Params...), size_t bytes, qf_error *err)
{
    if (bytes <= 32 * 1024) { /* the limit of 48 KB counts the kernel's static shared memory too */
        return QF_OK;
    }
    cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (status != cudaSuccess) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_BACKEND, "%s: %zu bytes of shared memory: %s", name, bytes,
                       cudaGetErrorString(status));
    }
    return QF_OK;
}

#endif
