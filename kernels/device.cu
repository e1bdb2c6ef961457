/* What the kernels need to know of the device. */
#include "common/launch.cuh"
#include "common/ptx.cuh"

/* Its attributes tell which of the builds in this binary the device runs. */
static __global__ void qf_probe_kernel(int *out)
{
#ifdef QF_SM90A
    *out = 1;
#else
    *out = 0;
#endif
}

extern "C" qf_status qf_cuda_device_get(int32_t ordinal, qf_cuda_device *out, qf_error *err)
{
    int count = 0;
    cudaError_t found = cudaGetDeviceCount(&count);
    if (found != cudaSuccess) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_BACKEND, "device cuda:%d: no CUDA device can be used: %s", ordinal,
                       cudaGetErrorString(found));
    }
    if (ordinal < 0 || ordinal >= count) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "device cuda:%d is not among the %d CUDA devices", ordinal, count);
    }
    int major, minor, sm_count, shared_bytes;
    QF_CUDA_TRY(cudaSetDevice(ordinal));
    QF_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
    QF_CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal));
    QF_CUDA_TRY(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, ordinal));
    QF_CUDA_TRY(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
    if (major < 8) {
        return QF_FAIL(err, QF_ERROR_BACKEND,
                       "device cuda:%d has compute capability %d.%d; the kernels need 8.0 (Ampere) or later", ordinal,
                       major, minor);
    }
    cudaFuncAttributes attributes;
    cudaError_t status = cudaFuncGetAttributes(&attributes, qf_probe_kernel);
    const bool no_code = status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction;
    if (status != cudaSuccess && !no_code) { /* after a kernel failed, say: CUDA is lost to this process then */
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_BACKEND, "device cuda:%d: %s", ordinal, cudaGetErrorString(status));
    }
    if (no_code) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_BACKEND,
                       "this build has no code for device cuda:%d of compute capability %d.%d (%s); build with "
                       "QF_CUDA_ARCHS=%d%d",
                       ordinal, major, minor, cudaGetErrorString(status), major, minor);
    }
    *out = (qf_cuda_device){};
    out->ordinal = ordinal;
    out->sm_count = sm_count;
    out->compute_capability = 10 * major + minor;
    out->max_shared_bytes = shared_bytes;
    out->hopper = major == 9 && attributes.binaryVersion == 90;
    out->dependent_launch = major >= 9 && attributes.ptxVersion >= 90;
    return QF_OK;
}
