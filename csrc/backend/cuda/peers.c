/* Set-up and failure of the GPUs' common memory. */
#include "backend/cuda/peers.h"

#include <stdio.h>

#include "base/alloc.h"

#define TRY_CUDA(call)                                                                                      \
    do {                                                                                                    \
        cudaError_t cuda_status_ = (call);                                                                  \
        if (cuda_status_ != cudaSuccess) {                                                                  \
            (void)cudaGetLastError();                                                                       \
            return QF_FAIL(err, QF_ERROR_BACKEND, "%s: %s", #call, cudaGetErrorString(cuda_status_));       \
        }                                                                                                   \
    } while (0)

/* One direction. */
static bool enable(int32_t from, int32_t to, char *note, size_t note_bytes)
{
    int can = 0;
    cudaError_t result = cudaDeviceCanAccessPeer(&can, from, to);
    if (result == cudaSuccess && can == 0) {
        (void)snprintf(note, note_bytes, "cuda:%d cannot reach the memory of cuda:%d", from, to);
        return false;
    }
    if (result == cudaSuccess) {
        result = cudaSetDevice(from);
    }
    if (result == cudaSuccess) {
        result = cudaDeviceEnablePeerAccess(to, 0);
        result = result == cudaErrorPeerAccessAlreadyEnabled ? cudaSuccess : result;
    }
    (void)cudaGetLastError();
    if (result != cudaSuccess) {
        (void)snprintf(note, note_bytes, "access of cuda:%d to the memory of cuda:%d: %s", from, to,
                       cudaGetErrorString(result));
    }
    return result == cudaSuccess;
}

bool qf_cuda_peers_enable(const int32_t *ordinals, int32_t num_ranks, char *note, size_t note_bytes)
{
    for (int32_t i = 0; i < num_ranks; i++) {
        for (int32_t j = 0; j < num_ranks; j++) {
            if (ordinals[i] != ordinals[j] && !enable(ordinals[i], ordinals[j], note, note_bytes)) {
                return false;
            }
        }
    }
    return true;
}

static qf_status create_rank(qf_cuda_group *self, int32_t rank, size_t exchange_bytes, uint64_t limit_ns, qf_error *err)
{
    const size_t bytes = qf_cuda_peer_region_bytes(exchange_bytes);
    TRY_CUDA(cudaSetDevice(self->ordinals[rank]));
    char *region;
    cudaError_t result = cudaMalloc((void **)&region, bytes);
    if (result != cudaSuccess) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu bytes for what cuda:%d receives from other ranks: %s", bytes,
                       self->ordinals[rank], cudaGetErrorString(result));
    }
    for (int32_t i = 0; i < self->num_ranks; i++) {
        self->peers[i].regions[rank] = region;
    }
    self->peers[rank].rank = rank;
    self->peers[rank].num_ranks = self->num_ranks;
    self->peers[rank].exchange_bytes = exchange_bytes;
    self->peers[rank].host = self->host + rank;
    self->peers[rank].limit_ns = limit_ns;
    return qf_cuda_peer_load(err);
}

static qf_status create_all(qf_cuda_group *self, size_t exchange_bytes, uint64_t limit_ns, qf_error *err)
{
    const size_t bytes = (size_t)self->num_ranks * sizeof *self->host;
    TRY_CUDA(cudaSetDevice(self->ordinals[0]));
    TRY_CUDA(cudaHostAlloc((void **)&self->host, bytes, cudaHostAllocPortable));
    for (int32_t rank = 0; rank < self->num_ranks; rank++) {
        QF_TRY(create_rank(self, rank, exchange_bytes, limit_ns, err));
    }
    return qf_cuda_group_reset(self, err);
}

qf_status qf_cuda_group_create(const int32_t *ordinals, int32_t num_ranks, size_t exchange_bytes, uint64_t limit_ns,
                               qf_cuda_group **out, qf_error *err)
{
    *out = NULL;
    if (num_ranks < 2 || num_ranks > QF_CUDA_MAX_RANKS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "%d GPUs for one model; expected 2 to %d", num_ranks,
                       QF_CUDA_MAX_RANKS);
    }
    qf_cuda_group *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "a group of GPUs", err));
    self->num_ranks = num_ranks;
    for (int32_t i = 0; i < num_ranks; i++) {
        self->ordinals[i] = ordinals[i];
    }
    qf_status status = create_all(self, (exchange_bytes + 255) / 256 * 256, limit_ns, err);
    if (status != QF_OK) {
        qf_cuda_group_destroy(self);
        return status;
    }
    *out = self;
    return QF_OK;
}

void qf_cuda_group_destroy(qf_cuda_group *self)
{
    if (self == NULL) {
        return;
    }
    for (int32_t rank = 0; rank < self->num_ranks; rank++) {
        (void)cudaSetDevice(self->ordinals[rank]);
        (void)cudaFree(self->peers[0].regions[rank]);
    }
    (void)cudaFreeHost(self->host);
    (void)cudaGetLastError(); /* what a failed device says to all of this is known already */
    qf_free(self);
}

qf_status qf_cuda_group_reset(qf_cuda_group *self, qf_error *err)
{
    for (int32_t rank = 0; rank < self->num_ranks; rank++) {
        self->host[rank] = (qf_cuda_peer_host){0};
        TRY_CUDA(cudaSetDevice(self->ordinals[rank]));
        QF_TRY(qf_cuda_peer_reset(&self->peers[rank], NULL, err));
    }
    for (int32_t rank = 0; rank < self->num_ranks; rank++) {
        TRY_CUDA(cudaSetDevice(self->ordinals[rank]));
        TRY_CUDA(cudaStreamSynchronize(NULL));
    }
    return QF_OK;
}

void qf_cuda_group_abort(qf_cuda_group *self)
{
    for (int32_t rank = 0; rank < self->num_ranks; rank++) {
        *(volatile uint32_t *)&self->host[rank].abort = 1;
    }
}

qf_status qf_cuda_group_check(const qf_cuda_group *self, int32_t rank, qf_error *err)
{
    const uint32_t word = *(const volatile uint32_t *)&self->host[rank].error;
    const uint32_t about = word & 0xff;
    switch (word >> 8) {
    case QF_CUDA_PEER_OK:
        return QF_OK;
    case QF_CUDA_PEER_LATE:
        return QF_FAIL(err, QF_ERROR_BACKEND, "rank %d (cuda:%d) waited for rank %u for %.3g s in vain", rank,
                       self->ordinals[rank], about, (double)self->peers[rank].limit_ns * 1e-9);
    case QF_CUDA_PEER_ABORTED:
        return QF_FAIL(err, QF_ERROR_BACKEND, "rank %d (cuda:%d) has been told to stop waiting for the other ranks", rank,
                       self->ordinals[rank]);
    default:
        return QF_FAIL(err, QF_ERROR_BACKEND, "rank %d (cuda:%d) stopped because rank %u did", rank,
                       self->ordinals[rank], about);
    }
}
