/* Status codes and the one error path.
 *
 * Every fallible function returns qf_status and takes `qf_error *err` last. The first failure wins: QF_FAIL
 * fills `err` (which may be NULL) and yields the status; QF_TRY forwards it; QF_TRY_GOTO goes to the one exit.
 */
#ifndef QF_BASE_STATUS_H
#define QF_BASE_STATUS_H

typedef enum qf_status {
    QF_OK = 0,
    QF_ERROR_INVALID_ARGUMENT, /* the caller's value is out of range: Python ValueError */
    QF_ERROR_MODEL,            /* a checkpoint file is malformed or does not fit: ModelError */
    QF_ERROR_OUT_OF_MEMORY,    /* MemoryError, with the bytes asked for */
    QF_ERROR_IO,               /* OSError: a file cannot be opened, read or mapped */
    QF_ERROR_STATE,            /* the engine is closed or failed: EngineError */
    QF_ERROR_BACKEND,          /* a device reported a failure: EngineError */
    QF_ERROR_NOT_IMPLEMENTED,  /* NotImplementedError, naming the option */
    QF_ERROR_INTERNAL          /* an invariant does not hold: EngineError */
} qf_status;

typedef struct qf_error {
    qf_status status;
    int line;
    const char *file; /* static storage (__FILE__) */
    char message[512];
} qf_error;

#if defined(__GNUC__)
#define QF_PRINTF(fmt_index, arg_index) __attribute__((format(printf, fmt_index, arg_index)))
#else
#define QF_PRINTF(fmt_index, arg_index)
#endif

/* Fills `err` (if not NULL) and returns `status`. The message says what, the value and the limit. */
qf_status qf_error_set(qf_error *err, qf_status status, const char *file, int line, const char *format, ...)
    QF_PRINTF(5, 6);

/* "invalid argument", "model error", ...: static storage, never NULL. */
const char *qf_status_name(qf_status status);

#define QF_FAIL(err, status, ...) qf_error_set((err), (status), __FILE__, __LINE__, __VA_ARGS__)

#define QF_TRY(call)                            \
    do {                                        \
        qf_status qf_try_status_ = (call);      \
        if (qf_try_status_ != QF_OK) {          \
            return qf_try_status_;              \
        }                                       \
    } while (0)

/* Needs a local `qf_status status`. */
#define QF_TRY_GOTO(call, label)                \
    do {                                        \
        status = (call);                        \
        if (status != QF_OK) {                  \
            goto label;                         \
        }                                       \
    } while (0)

#endif
