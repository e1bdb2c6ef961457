/* needs: comm/comm_nccl.c comm/comm_threads.c backend/cuda/peers.c */
/* A communicator of GPUs: the ranks' threads meet on the host as CPU ranks do; data goes through peer memory or NCCL. */
#include "backend/cuda/comm.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "backend/cuda/peers.h"
#include "base/alloc.h"
#include "comm/comm_nccl.h"

/* A rank on the device waits for another for a share of the time that a step may take, so that its error says whom it
 * waited for. They are apart by a layer, the host's time for a step, or a kernel's first loading. */
#define SHARE_OF_STEP 4
#define NO_LIMIT_MS 86400000u /* abort ends a wait all the same */
#define CONNECT_LIMIT_MS 60000

/* What the ranks share. */
typedef struct comm_group {
    pthread_mutex_t lock; /* of aborted, num_handles and the list of nccl's */
    bool aborted;
    int32_t size, num_handles;
    uint32_t limit_ms;
    qf_cuda_group *memory; /* NULL: not reachable */
    qf_nccl *library;      /* NULL: not needed */
    qf_nccl_id id;
    qf_nccl_comm *nccl[QF_CUDA_MAX_RANKS];
    int32_t first_column[QF_CUDA_MAX_RANKS], num_columns[QF_CUDA_MAX_RANKS]; /* of each rank: written by it alone */
    float *root_matrix; /* rank 0's, device */
    char notes[QF_CUDA_MAX_RANKS][QF_CUDA_COMM_NOTE_BYTES]; /* of qf_cuda_comm_tell: of each rank, written by it alone */
    char description[256];
} comm_group;

typedef struct cuda_comm {
    qf_comm base;
    comm_group *group;
    qf_comm *host; /* the ranks' threads */
} cuda_comm;

static const qf_comm_vtable *vtable(void);

static qf_nccl_comm *nccl_of(const cuda_comm *self) { return self->group->nccl[self->base.rank]; }

static qf_status no_nccl(qf_error *err)
{
    return QF_FAIL(err, QF_ERROR_INTERNAL, "the GPUs reach each other's memory: NCCL is not connected");
}

/* --- collectives of NCCL ---------------------------------------------------------------------------------- */

static qf_status cuda_all_reduce(qf_comm *base, const qf_all_reduce_args *args, qf_error *err)
{
    qf_nccl_comm *nccl = nccl_of((cuda_comm *)base);
    return nccl == NULL ? no_nccl(err)
                        : qf_nccl_all_reduce(nccl, args->in, args->out, args->count, args->dtype, args->stream, err);
}

static qf_status cuda_broadcast(qf_comm *base, int32_t root, void *data, size_t size_bytes, void *stream, qf_error *err)
{
    qf_nccl_comm *nccl = nccl_of((cuda_comm *)base);
    return nccl == NULL ? no_nccl(err) : qf_nccl_broadcast(nccl, root, data, size_bytes, stream, err);
}

/* Columns and their numbers are those of connect(). */
static qf_status cuda_gather(qf_comm *base, const qf_gather_args *args, qf_error *err)
{
    const comm_group *group = ((cuda_comm *)base)->group;
    qf_nccl_comm *nccl = nccl_of((cuda_comm *)base);
    const size_t width = qf_dtype_size(args->dtype);
    size_t first_byte[QF_CUDA_MAX_RANKS], size_bytes[QF_CUDA_MAX_RANKS];
    if (nccl == NULL) {
        return no_nccl(err);
    }
    for (int32_t i = 0; i < group->size; i++) {
        first_byte[i] = (size_t)group->first_column[i] * width;
        size_bytes[i] = (size_t)group->num_columns[i] * width;
    }
    const size_t in_row_bytes = (size_t)args->columns * width, out_row_bytes = (size_t)args->out_columns * width;
    if (base->rank == args->root) {
        char *own = (char *)args->out + first_byte[base->rank];
        cudaError_t result =
            cudaMemcpy2DAsync(own, out_row_bytes, args->in, in_row_bytes, size_bytes[base->rank],
                              (size_t)args->num_rows, cudaMemcpyDeviceToDevice, (cudaStream_t)args->stream);
        if (result != cudaSuccess) {
            (void)cudaGetLastError();
            return QF_FAIL(err, QF_ERROR_BACKEND, "the root's own columns: %s", cudaGetErrorString(result));
        }
    }
    const qf_nccl_columns columns = {.root = args->root,
                                     .num_rows = args->num_rows,
                                     .in = args->in,
                                     .out = args->out,
                                     .in_row_bytes = in_row_bytes,
                                     .out_row_bytes = out_row_bytes,
                                     .first_byte = first_byte,
                                     .size_bytes = size_bytes};
    return qf_nccl_gather(nccl, &columns, args->stream, err);
}

/* --- threads -------------------------------------------------------------------------------------------------- */

static qf_status cuda_barrier(qf_comm *base, qf_error *err)
{
    qf_comm *host = ((cuda_comm *)base)->host;
    return host->vtable->barrier(host, err);
}

static void cuda_abort(qf_comm *base)
{
    cuda_comm *self = (cuda_comm *)base;
    comm_group *group = self->group;
    self->host->vtable->abort(self->host);
    (void)pthread_mutex_lock(&group->lock);
    bool first = !group->aborted;
    group->aborted = true;
    if (first && group->memory != NULL) {
        qf_cuda_group_abort(group->memory);
    }
    for (int32_t i = 0; first && i < group->size; i++) {
        if (group->nccl[i] != NULL) {
            qf_nccl_comm_abort(group->nccl[i]);
        }
    }
    (void)pthread_mutex_unlock(&group->lock);
}

/* --- creation --------------------------------------------------------------------------------------------------- */

static void destroy_group(comm_group *group)
{
    qf_cuda_group_destroy(group->memory);
    qf_nccl_close(group->library);
    (void)pthread_mutex_destroy(&group->lock);
    qf_free(group);
}

static void cuda_destroy(qf_comm *base)
{
    cuda_comm *self = (cuda_comm *)base;
    if (self == NULL) {
        return;
    }
    comm_group *group = self->group;
    qf_cuda_comm_disconnect(base);
    (void)pthread_mutex_lock(&group->lock);
    bool last = --group->num_handles == 0;
    (void)pthread_mutex_unlock(&group->lock);
    if (self->host != NULL) {
        self->host->vtable->destroy(self->host);
    }
    qf_free(self);
    if (last) {
        destroy_group(group);
    }
}

static const qf_comm_vtable *vtable(void)
{
    static const qf_comm_vtable table = {.name = "cuda",
                                         .all_reduce = cuda_all_reduce,
                                         .gather = cuda_gather,
                                         .broadcast = cuda_broadcast,
                                         .barrier = cuda_barrier,
                                         .abort = cuda_abort,
                                         .destroy = cuda_destroy};
    return &table;
}

/* As the loader finds it, else where the caller says. */
static qf_status open_nccl(comm_group *group, const qf_backend_options *options, const char *why, qf_error *err)
{
    qf_status status = qf_nccl_open(NULL, &group->library, err);
    if (status != QF_OK && options->nccl_library != NULL) {
        status = qf_nccl_open(options->nccl_library, &group->library, err);
    }
    QF_TRY(status);
    const int32_t version = qf_nccl_version(group->library);
    (void)snprintf(group->description, sizeof group->description, "NCCL %d.%d.%d, %s", version / 10000,
                   version / 100 % 100, version % 100, why);
    return qf_nccl_make_id(group->library, &group->id, err);
}

/* Peer memory if it can be had, else NCCL, unless one of them is wanted. */
static qf_status open_group(comm_group *group, const qf_backend_options *options, qf_error *err)
{
    int32_t ordinals[QF_CUDA_MAX_RANKS];
    char note[160] = "";
    for (int32_t i = 0; i < group->size; i++) {
        qf_cuda_device device;
        ordinals[i] = options->device_ordinal + i;
        QF_TRY(qf_cuda_device_get(ordinals[i], &device, err)); /* says which is not there */
    }
    const uint32_t step_ms = (uint32_t)options->step_timeout_ms;
    group->limit_ms = step_ms > 0 ? step_ms / SHARE_OF_STEP + 1 : NO_LIMIT_MS;
    if (options->rank_comm == QF_RANK_COMM_NCCL) {
        return open_nccl(group, options, "as asked for", err);
    }
    if (qf_cuda_peers_enable(ordinals, group->size, note, sizeof note)) {
        (void)snprintf(group->description, sizeof group->description, "peer memory");
        return qf_cuda_group_create(ordinals, group->size, QF_CUDA_EXCHANGE_BYTES, (uint64_t)group->limit_ms * 1000000,
                                    &group->memory, err);
    }
    if (options->rank_comm == QF_RANK_COMM_PEER) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "tensor_parallel_comm=\"peer\": %s", note);
    }
    char why[176];
    (void)snprintf(why, sizeof why, "as %s", note);
    return open_nccl(group, options, why, err);
}

static qf_status create_handles(comm_group *group, qf_comm **out, qf_error *err)
{
    qf_comm *hosts[QF_CUDA_MAX_RANKS];
    QF_TRY(qf_comm_threads_create(group->size, hosts, err));
    qf_status status = QF_OK;
    for (int32_t i = 0; i < group->size; i++) {
        cuda_comm *self = NULL;
        if (status == QF_OK) {
            status = qf_alloc((void **)&self, 1, sizeof *self, "a communicator", err);
        }
        if (status != QF_OK) {
            hosts[i]->vtable->destroy(hosts[i]);
            continue;
        }
        *self = (cuda_comm){.base = {.vtable = vtable(), .rank = i, .size = group->size}, .group = group, .host = hosts[i]};
        group->num_handles++;
        out[i] = &self->base;
    }
    return status;
}

qf_status qf_cuda_create_comms(const qf_backend_options *options, int32_t size, qf_comm **out, qf_error *err)
{
    for (int32_t i = 0; i < size; i++) {
        out[i] = NULL;
    }
    if (size < 2 || size > QF_CUDA_MAX_RANKS) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "tensor_parallel_size=%d; on GPUs at most %d", size,
                       QF_CUDA_MAX_RANKS);
    }
    comm_group *group;
    QF_TRY(qf_alloc((void **)&group, 1, sizeof *group, "the GPUs' communicator", err));
    group->size = size;
    if (pthread_mutex_init(&group->lock, NULL) != 0) {
        qf_free(group);
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot create a lock for the GPUs' communicator");
    }
    qf_status status = open_group(group, options, err);
    if (status == QF_OK) {
        status = create_handles(group, out, err);
    }
    if (status != QF_OK) {
        const bool any = group->num_handles > 0; /* the last of them takes the group along */
        for (int32_t i = 0; i < size; i++) {
            cuda_destroy(out[i]);
            out[i] = NULL;
        }
        if (!any) {
            destroy_group(group);
        }
    }
    return status;
}

/* Not for ever: where the links between GPUs do not work, NCCL's first calls hang. */
static qf_status wait_for_first_calls(qf_error *err)
{
    const struct timespec pause = {.tv_nsec = 1000000};
    cudaError_t result = cudaStreamQuery(NULL);
    for (int32_t i = 0; result == cudaErrorNotReady && i < CONNECT_LIMIT_MS; i++) {
        (void)nanosleep(&pause, NULL);
        result = cudaStreamQuery(NULL);
    }
    (void)cudaGetLastError();
    if (result == cudaErrorNotReady) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "NCCL's first calls are not done after %d ms", CONNECT_LIMIT_MS);
    }
    return result == cudaSuccess ? QF_OK
                                 : QF_FAIL(err, QF_ERROR_BACKEND, "NCCL's first calls: %s", cudaGetErrorString(result));
}

/* The first collective of each kind connects the ranks, which is no matter for a graph's capture. */
static qf_status warm_up(qf_nccl_comm *nccl, int32_t size, float *buffer, qf_error *err)
{
    size_t first_byte[QF_CUDA_MAX_RANKS], size_bytes[QF_CUDA_MAX_RANKS];
    for (int32_t i = 0; i < size; i++) {
        first_byte[i] = (size_t)i * sizeof *buffer;
        size_bytes[i] = sizeof *buffer;
    }
    const qf_nccl_columns columns = {.num_rows = 1,
                                     .in = (const char *)(buffer + QF_CUDA_MAX_RANKS),
                                     .out = (char *)buffer,
                                     .first_byte = first_byte,
                                     .size_bytes = size_bytes};
    QF_TRY(qf_nccl_all_reduce(nccl, buffer, buffer, QF_CUDA_MAX_RANKS, QF_DTYPE_F32, NULL, err));
    QF_TRY(qf_nccl_gather(nccl, &columns, NULL, err));
    QF_TRY(qf_nccl_broadcast(nccl, 0, buffer, sizeof *buffer, NULL, err));
    return wait_for_first_calls(err);
}

static qf_status allocate_and_warm_up(qf_comm *comm, qf_nccl_comm *nccl, qf_error *err)
{
    float *buffer;
    const size_t bytes = 2 * QF_CUDA_MAX_RANKS * sizeof *buffer;
    cudaError_t result = cudaMalloc((void **)&buffer, bytes);
    if (result != cudaSuccess) {
        (void)cudaGetLastError();
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "%zu bytes for NCCL's first calls: %s", bytes,
                       cudaGetErrorString(result));
    }
    qf_status status = cuda_barrier(comm, err); /* an allocation may wait for kernels of other ranks: they begin later */
    if (status == QF_OK) {
        status = warm_up(nccl, comm->size, buffer, err);
    }
    if (status != QF_OK) {
        qf_nccl_comm_abort(nccl); /* or the memory waits for a kernel that hangs */
    }
    (void)cudaFree(buffer);
    return status;
}

/* --- what the backend asks ------------------------------------------------------------------------------------- */

size_t qf_cuda_comm_bytes(void) { return qf_cuda_peer_region_bytes(QF_CUDA_EXCHANGE_BYTES); }

qf_status qf_cuda_comm_connect(qf_comm *comm, int32_t first_column, int32_t num_columns, qf_error *err)
{
    cuda_comm *self = (cuda_comm *)comm;
    comm_group *group = self->group;
    qf_nccl_comm *nccl;
    group->first_column[comm->rank] = first_column;
    group->num_columns[comm->rank] = num_columns;
    QF_TRY(cuda_barrier(comm, err));
    if (group->library == NULL) {
        return QF_OK;
    }
    QF_TRY(qf_nccl_comm_create(group->library, &group->id, comm->rank, comm->size, CONNECT_LIMIT_MS, &nccl, err));
    (void)pthread_mutex_lock(&group->lock);
    group->nccl[comm->rank] = nccl;
    if (group->aborted) {
        qf_nccl_comm_abort(nccl);
    }
    (void)pthread_mutex_unlock(&group->lock);
    return allocate_and_warm_up(comm, nccl, err);
}

void qf_cuda_comm_disconnect(qf_comm *comm)
{
    comm_group *group = ((cuda_comm *)comm)->group;
    (void)pthread_mutex_lock(&group->lock);
    qf_nccl_comm *nccl = group->nccl[comm->rank];
    group->nccl[comm->rank] = NULL;
    (void)pthread_mutex_unlock(&group->lock);
    qf_nccl_comm_destroy(nccl);
}

qf_status qf_cuda_comm_share_root(qf_comm *comm, float *own, float **out, qf_error *err)
{
    comm_group *group = ((cuda_comm *)comm)->group;
    if (comm->rank == 0) {
        group->root_matrix = own;
    }
    QF_TRY(cuda_barrier(comm, err));
    *out = group->memory != NULL ? group->root_matrix : NULL;
    return QF_OK;
}

qf_status qf_cuda_comm_tell(qf_comm *comm, const void *own, size_t bytes, void *all, qf_error *err)
{
    comm_group *group = ((cuda_comm *)comm)->group;
    if (bytes > QF_CUDA_COMM_NOTE_BYTES) {
        return QF_FAIL(err, QF_ERROR_INTERNAL, "%zu bytes to tell the other ranks; there is room for %d", bytes,
                       QF_CUDA_COMM_NOTE_BYTES);
    }
    memcpy(group->notes[comm->rank], own, bytes);
    QF_TRY(cuda_barrier(comm, err));
    for (int32_t i = 0; i < group->size; i++) {
        memcpy((char *)all + (size_t)i * bytes, group->notes[i], bytes);
    }
    return cuda_barrier(comm, err); /* nobody writes the next ones before all have read these */
}

const qf_cuda_peers *qf_cuda_comm_peers(const qf_comm *comm)
{
    const comm_group *group = ((const cuda_comm *)comm)->group;
    return group->memory != NULL ? &group->memory->peers[comm->rank] : NULL;
}

qf_status qf_cuda_comm_check(const qf_comm *comm, qf_error *err)
{
    const cuda_comm *self = (const cuda_comm *)comm;
    return self->group->memory != NULL ? qf_cuda_group_check(self->group->memory, comm->rank, err)
                                       : qf_nccl_comm_check(nccl_of(self), err);
}

const char *qf_cuda_comm_describe(const qf_comm *comm) { return ((const cuda_comm *)comm)->group->description; }
