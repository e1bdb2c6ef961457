#include "comm/comm_nccl.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "base/alloc.h"

/* nccl.h's names, as far as they are used; its numbers have not changed since 2.18. */
enum { NCCL_SUCCESS = 0, NCCL_IN_PROGRESS = 7 };
enum { NCCL_SUM = 0 };
enum { NCCL_INT8 = 0, NCCL_FLOAT32 = 7, NCCL_BFLOAT16 = 9 };

#define OLDEST_VERSION 21800
#define CONFIG_MAGIC 0xcafebeefu
#define FIRST_PAUSE_NS 20000
#define LONGEST_PAUSE_NS 1000000

/* ncclConfig_t as of 2.18: the size says which of its versions this is. */
typedef struct config {
    size_t size;
    unsigned int magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
} config;

struct qf_nccl {
    void *handle;
    int version;
    int (*get_version)(int *);
    int (*get_unique_id)(qf_nccl_id *);
    int (*init_rank)(void **, int, qf_nccl_id, int, config *);
    int (*finalize)(void *);
    int (*destroy)(void *);
    int (*stop)(void *);
    int (*async_error)(void *, int *);
    int (*all_reduce)(const void *, void *, size_t, int, int, void *, void *);
    int (*broadcast)(const void *, void *, size_t, int, int, void *, void *);
    int (*send)(const void *, size_t, int, int, void *, void *);
    int (*receive)(void *, size_t, int, int, void *, void *);
    int (*group_start)(void);
    int (*group_end)(void);
    const char *(*error_string)(int);
    const char *(*last_error)(void *);
};

struct qf_nccl_comm {
    const qf_nccl *nccl;
    pthread_mutex_t lock; /* held by whoever uses the handle, never while waiting */
    void *handle;         /* NULL: aborted, or not there yet */
    int32_t rank, num_ranks;
    uint32_t limit_ms;
};

/* --- the library ----------------------------------------------------------------------------------------- */

/* dlsym's result is an object pointer; a function pointer of the same size is behind it. */
static bool find(void *handle, const char *name, void *out)
{
    *(void **)out = dlsym(handle, name);
    return *(void **)out != NULL;
}

static bool find_all(qf_nccl *self)
{
    return find(self->handle, "ncclGetVersion", &self->get_version) &&
           find(self->handle, "ncclGetUniqueId", &self->get_unique_id) &&
           find(self->handle, "ncclCommInitRankConfig", &self->init_rank) &&
           find(self->handle, "ncclCommFinalize", &self->finalize) &&
           find(self->handle, "ncclCommDestroy", &self->destroy) &&
           find(self->handle, "ncclCommAbort", &self->stop) &&
           find(self->handle, "ncclCommGetAsyncError", &self->async_error) &&
           find(self->handle, "ncclAllReduce", &self->all_reduce) &&
           find(self->handle, "ncclBroadcast", &self->broadcast) &&
           find(self->handle, "ncclSend", &self->send) &&
           find(self->handle, "ncclRecv", &self->receive) &&
           find(self->handle, "ncclGroupStart", &self->group_start) &&
           find(self->handle, "ncclGroupEnd", &self->group_end) &&
           find(self->handle, "ncclGetErrorString", &self->error_string) &&
           find(self->handle, "ncclGetLastError", &self->last_error);
}

static qf_status load(qf_nccl *self, const char *path, qf_error *err)
{
    const char *name = path != NULL ? path : "libnccl.so.2";
    /* It stays: threads of its own may still be taking an aborted communicator apart when it is closed. */
    self->handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (self->handle == NULL) {
        const char *why = dlerror();
        return QF_FAIL(err, QF_ERROR_BACKEND,
                       "NCCL, which several GPUs need, cannot be loaded: %.200s. Install it: pip install "
                       "nvidia-nccl-cu13, or the package libnccl2 of NVIDIA's repository",
                       why != NULL ? why : name);
    }
    if (!find_all(self)) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "%.200s lacks functions of NCCL 2.18", name);
    }
    int result = self->get_version(&self->version);
    if (result != NCCL_SUCCESS || self->version < OLDEST_VERSION) {
        return QF_FAIL(err, QF_ERROR_BACKEND, "%.200s is NCCL of version code %d (result %d); expected %d or later", name,
                       self->version, result, OLDEST_VERSION);
    }
    return QF_OK;
}

qf_status qf_nccl_open(const char *path, qf_nccl **out, qf_error *err)
{
    *out = NULL;
    qf_nccl *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "NCCL's functions", err));
    qf_status status = load(self, path, err);
    if (status != QF_OK) {
        qf_nccl_close(self);
        return status;
    }
    *out = self;
    return QF_OK;
}

void qf_nccl_close(qf_nccl *self)
{
    if (self == NULL) {
        return;
    }
    if (self->handle != NULL) {
        (void)dlclose(self->handle);
    }
    qf_free(self);
}

int32_t qf_nccl_version(const qf_nccl *self) { return self->version; }

/* comm may be NULL. */
static qf_status fail(const qf_nccl *nccl, void *comm, const char *what, int32_t rank, int result, qf_error *err)
{
    const char *detail = nccl->last_error(comm);
    return QF_FAIL(err, QF_ERROR_BACKEND, "NCCL: %s of rank %d: %.100s%s%.200s", what, rank, nccl->error_string(result),
                   detail != NULL && detail[0] != '\0' ? ": " : "", detail != NULL ? detail : "");
}

qf_status qf_nccl_make_id(const qf_nccl *self, qf_nccl_id *out, qf_error *err)
{
    int result = self->get_unique_id(out);
    return result == NCCL_SUCCESS ? QF_OK : fail(self, NULL, "ncclGetUniqueId", 0, result, err);
}

/* --- communicators --------------------------------------------------------------------------------------- */

static int64_t now_ns(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static qf_status aborted(const qf_nccl_comm *self, qf_error *err)
{
    return QF_FAIL(err, QF_ERROR_BACKEND, "NCCL: rank %d's communicator has been aborted", self->rank);
}

/* What has become of a call that returned `result`: done, failed, or *in_progress. */
static qf_status look(qf_nccl_comm *self, const char *what, int result, bool *in_progress, qf_error *err)
{
    qf_status status = QF_OK;
    (void)pthread_mutex_lock(&self->lock);
    *in_progress = false;
    if (self->handle == NULL) {
        status = aborted(self, err);
    } else {
        if (result == NCCL_IN_PROGRESS) {
            int queried = self->nccl->async_error(self->handle, &result);
            result = queried != NCCL_SUCCESS ? queried : result;
        }
        *in_progress = result == NCCL_IN_PROGRESS;
        if (result != NCCL_SUCCESS && !*in_progress) {
            status = fail(self->nccl, self->handle, what, self->rank, result, err);
        }
    }
    (void)pthread_mutex_unlock(&self->lock);
    return status;
}

/* Until what a call began in the background is done; `result` is what the call returned. */
static qf_status settle(qf_nccl_comm *self, const char *what, int result, qf_error *err)
{
    const int64_t deadline = now_ns() + (int64_t)self->limit_ms * 1000000;
    struct timespec pause = {.tv_nsec = FIRST_PAUSE_NS};
    bool in_progress;
    for (;;) {
        QF_TRY(look(self, what, result, &in_progress, err));
        if (!in_progress) {
            return QF_OK;
        }
        if (now_ns() > deadline) {
            return QF_FAIL(err, QF_ERROR_BACKEND, "NCCL: %s of rank %d of %d is not done after %u ms", what, self->rank,
                           self->num_ranks, self->limit_ms);
        }
        (void)nanosleep(&pause, NULL);
        pause.tv_nsec = pause.tv_nsec < LONGEST_PAUSE_NS ? 2 * pause.tv_nsec : LONGEST_PAUSE_NS;
    }
}

qf_status qf_nccl_comm_create(const qf_nccl *library, const qf_nccl_id *id, int32_t rank, int32_t num_ranks,
                              uint32_t limit_ms, qf_nccl_comm **out, qf_error *err)
{
    *out = NULL;
    qf_nccl_comm *self;
    QF_TRY(qf_alloc((void **)&self, 1, sizeof *self, "a communicator", err));
    *self = (qf_nccl_comm){.nccl = library, .rank = rank, .num_ranks = num_ranks, .limit_ms = limit_ms};
    if (pthread_mutex_init(&self->lock, NULL) != 0) {
        qf_free(self);
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot create a lock for a communicator");
    }
    config how = {.size = sizeof how,
                  .magic = CONFIG_MAGIC,
                  .version = OLDEST_VERSION,
                  .blocking = 0,
                  .cga_cluster_size = INT_MIN, /* INT_MIN: NCCL's choice */
                  .min_ctas = INT_MIN,
                  .max_ctas = INT_MIN,
                  .split_share = INT_MIN};
    int result = library->init_rank(&self->handle, num_ranks, *id, rank, &how);
    qf_status status = self->handle == NULL
                           ? fail(library, NULL, "ncclCommInitRankConfig", rank, result, err)
                           : settle(self, "ncclCommInitRankConfig", result, err);
    if (status != QF_OK) {
        qf_nccl_comm_abort(self);
        qf_nccl_comm_destroy(self);
        return status;
    }
    *out = self;
    return QF_OK;
}

typedef struct stop_call {
    int (*stop)(void *);
    void *handle;
} stop_call;

static void *stop_main(void *arg)
{
    const stop_call call = *(stop_call *)arg;
    qf_free(arg);
    (void)call.stop(call.handle);
    return NULL;
}

/* What ncclCommAbort begins with ends the kernels; what it goes on with waits for other ranks, and for a GPU that may hang.
 * So it has a thread of its own, for which nobody waits. */
static void stop(const qf_nccl *nccl, void *handle)
{
    stop_call *call = NULL;
    pthread_t thread;
    sigset_t all, before; /* signals stay with the threads of the program around us */
    int code = -1;
    if (qf_alloc((void **)&call, 1, sizeof *call, "an abort", NULL) == QF_OK) {
        *call = (stop_call){.stop = nccl->stop, .handle = handle};
        (void)sigfillset(&all);
        (void)pthread_sigmask(SIG_SETMASK, &all, &before);
        code = pthread_create(&thread, NULL, stop_main, call);
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (code == 0) {
        (void)pthread_detach(thread);
    } else {
        qf_free(call);
        (void)nccl->stop(handle);
    }
}

void qf_nccl_comm_abort(qf_nccl_comm *self)
{
    (void)pthread_mutex_lock(&self->lock);
    void *handle = self->handle;
    self->handle = NULL;
    (void)pthread_mutex_unlock(&self->lock);
    if (handle != NULL) {
        stop(self->nccl, handle);
    }
}

void qf_nccl_comm_destroy(qf_nccl_comm *self)
{
    if (self == NULL) {
        return;
    }
    if (self->handle != NULL) {
        int result = self->nccl->finalize(self->handle);
        if (settle(self, "ncclCommFinalize", result, NULL) == QF_OK) {
            (void)self->nccl->destroy(self->handle);
        } else {
            stop(self->nccl, self->handle);
        }
    }
    (void)pthread_mutex_destroy(&self->lock);
    qf_free(self);
}

qf_status qf_nccl_comm_check(qf_nccl_comm *self, qf_error *err)
{
    bool in_progress;
    return look(self, "a collective", NCCL_IN_PROGRESS, &in_progress, err);
}

/* --- collectives ------------------------------------------------------------------------------------------ */

qf_status qf_nccl_all_reduce(qf_nccl_comm *self, const void *in, void *out, size_t count, qf_dtype dtype, void *stream,
                             qf_error *err)
{
    if (dtype != QF_DTYPE_F32 && dtype != QF_DTYPE_BF16) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "NCCL: all-reduce of %s; expected F32 or BF16",
                       qf_dtype_name(dtype));
    }
    const int type = dtype == QF_DTYPE_F32 ? NCCL_FLOAT32 : NCCL_BFLOAT16;
    int result = NCCL_IN_PROGRESS; /* which makes settle() ask: it finds no handle */
    (void)pthread_mutex_lock(&self->lock);
    if (self->handle != NULL) {
        result = self->nccl->all_reduce(in, out, count, type, NCCL_SUM, self->handle, stream);
    }
    (void)pthread_mutex_unlock(&self->lock);
    return settle(self, "ncclAllReduce", result, err);
}

qf_status qf_nccl_broadcast(qf_nccl_comm *self, int32_t root, void *data, size_t size_bytes, void *stream, qf_error *err)
{
    int result = NCCL_IN_PROGRESS;
    (void)pthread_mutex_lock(&self->lock);
    if (self->handle != NULL) {
        result = self->nccl->broadcast(data, data, size_bytes, NCCL_INT8, root, self->handle, stream);
    }
    (void)pthread_mutex_unlock(&self->lock);
    return settle(self, "ncclBroadcast", result, err);
}

/* Between group_start and group_end: what this rank sends or receives, row by row. */
static int enqueue_rows(qf_nccl_comm *self, const qf_nccl_columns *args, void *stream)
{
    const qf_nccl *nccl = self->nccl;
    const int32_t first = self->rank == args->root ? 0 : self->rank;
    const int32_t last = self->rank == args->root ? self->num_ranks : self->rank + 1;
    int result = NCCL_SUCCESS;
    for (int32_t r = first; r < last; r++) {
        const size_t bytes = args->size_bytes[r];
        for (int32_t row = 0; r != args->root && bytes > 0 && row < args->num_rows; row++) {
            result = self->rank != args->root
                         ? nccl->send(args->in + (size_t)row * args->in_row_bytes, bytes, NCCL_INT8, args->root,
                                      self->handle, stream)
                         : nccl->receive(args->out + (size_t)row * args->out_row_bytes + args->first_byte[r], bytes,
                                         NCCL_INT8, r, self->handle, stream);
            if (result != NCCL_SUCCESS && result != NCCL_IN_PROGRESS) {
                return result;
            }
        }
    }
    return result;
}

qf_status qf_nccl_gather(qf_nccl_comm *self, const qf_nccl_columns *args, void *stream, qf_error *err)
{
    int result = NCCL_IN_PROGRESS;
    (void)pthread_mutex_lock(&self->lock);
    if (self->handle != NULL) {
        result = self->nccl->group_start();
        if (result == NCCL_SUCCESS) {
            const int rows = enqueue_rows(self, args, stream);
            const int ended = self->nccl->group_end();
            result = rows != NCCL_SUCCESS && rows != NCCL_IN_PROGRESS ? rows : ended;
        }
    }
    (void)pthread_mutex_unlock(&self->lock);
    return settle(self, "ncclSend and ncclRecv", result, err);
}
