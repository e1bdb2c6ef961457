/* The CUDA backend, as the engine's device choice sees it. */
#ifndef QF_BACKEND_CUDA_CUDA_H
#define QF_BACKEND_CUDA_CUDA_H

#include "backend/backend.h"

const qf_backend_vtable *qf_cuda_backend_vtable(void);

typedef struct qf_cuda_device_info {
    char name[128];
    int32_t ordinal, compute_capability;
    uint64_t total_bytes, free_bytes; /* 0 where the device is not usable */
    bool usable;
    char reason[256]; /* why it is not */
} qf_cuda_device_info;

/* Fills up to `capacity` devices; returns how many there are (0 without a driver). Reading the free memory of a device
 * makes a context there; with free_memory false none is made and free_bytes is 0. */
int32_t qf_cuda_list_devices(qf_cuda_device_info *out, int32_t capacity, bool free_memory);

#endif
