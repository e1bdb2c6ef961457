#include "base/dtype.h"

size_t qf_dtype_size(qf_dtype dtype)
{
    switch (dtype) {
    case QF_DTYPE_F64:
    case QF_DTYPE_I64:
    case QF_DTYPE_U64: return 8;
    case QF_DTYPE_F32:
    case QF_DTYPE_I32:
    case QF_DTYPE_U32: return 4;
    case QF_DTYPE_BF16:
    case QF_DTYPE_F16:
    case QF_DTYPE_I16:
    case QF_DTYPE_U16: return 2;
    case QF_DTYPE_I8:
    case QF_DTYPE_U8:
    case QF_DTYPE_BOOL:
    case QF_DTYPE_F8_E4M3:
    case QF_DTYPE_F8_E5M2: return 1;
    case QF_DTYPE_COUNT: break;
    }
    return 0;
}

const char *qf_dtype_name(qf_dtype dtype)
{
    static const char *const names[QF_DTYPE_COUNT] = {"F32", "BF16", "F16", "I8",  "U8",  "I16",     "U16",    "I32",
                                                      "U32", "I64",  "U64", "F64", "BOOL", "F8_E4M3", "F8_E5M2"};
    return dtype >= 0 && dtype < QF_DTYPE_COUNT ? names[dtype] : "?";
}
