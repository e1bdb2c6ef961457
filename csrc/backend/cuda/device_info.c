/* Which devices there are, and whether this build can use them. */
#include <stdio.h>

#include "backend/cuda/cuda.h"
#include "qf_kernels.h"

int32_t qf_cuda_list_devices(qf_cuda_device_info *out, int32_t capacity, bool free_memory)
{
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        (void)cudaGetLastError(); /* no driver, or no device */
        return 0;
    }
    for (int32_t i = 0; i < count && i < capacity; i++) {
        qf_cuda_device_info *info = &out[i];
        *info = (qf_cuda_device_info){.ordinal = i};
        struct cudaDeviceProp properties;
        cudaError_t result = cudaGetDeviceProperties(&properties, i);
        if (result != cudaSuccess) {
            (void)cudaGetLastError();
            (void)snprintf(info->reason, sizeof info->reason, "%s", cudaGetErrorString(result));
            continue;
        }
        (void)snprintf(info->name, sizeof info->name, "%.127s", properties.name);
        info->compute_capability = 10 * properties.major + properties.minor;
        info->total_bytes = properties.totalGlobalMem;
        qf_cuda_device device;
        qf_error error;
        if (qf_cuda_device_get(i, &device, &error) != QF_OK) {
            (void)snprintf(info->reason, sizeof info->reason, "%.255s", error.message);
            continue;
        }
        info->usable = true;
        size_t available = 0, total = 0;
        if (free_memory && cudaMemGetInfo(&available, &total) == cudaSuccess) {
            info->free_bytes = available;
        }
    }
    (void)cudaGetLastError();
    return count;
}
