#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

qf_status qf_error_set(qf_error *err, qf_status status, const char *file, int line, const char *format, ...)
{
    if (err == NULL) {
        return status;
    }
    err->status = status;
    err->file = file;
    err->line = line;
    va_list args;
    va_start(args, format);
    (void)vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    return status;
}

const char *qf_status_name(qf_status status)
{
    switch (status) {
    case QF_OK: return "ok";
    case QF_ERROR_INVALID_ARGUMENT: return "invalid argument";
    case QF_ERROR_MODEL: return "model error";
    case QF_ERROR_OUT_OF_MEMORY: return "out of memory";
    case QF_ERROR_IO: return "input/output error";
    case QF_ERROR_STATE: return "engine not running";
    case QF_ERROR_BACKEND: return "backend error";
    case QF_ERROR_NOT_IMPLEMENTED: return "not implemented";
    case QF_ERROR_INTERNAL: return "internal error";
    }
    return "unknown status";
}
