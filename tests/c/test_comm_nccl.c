/* sources: base/status.c base/alloc.c base/dtype.c comm/comm_nccl.c */
/* sanitizers: address thread */
/* alloc-faults: yes */
/* What can be said of NCCL without it: that it is missing, and what to do then. tests/multi_gpu runs it. */
#include <string.h>

#include "check.h"
#include "comm/comm_nccl.h"

static void test_missing_library(void)
{
    qf_nccl *nccl = (qf_nccl *)1;
    qf_error err;
    CHECK_INT(qf_nccl_open("/nowhere/libnccl.so.2", &nccl, &err), QF_ERROR_BACKEND);
    CHECK(nccl == NULL);
    CHECK(strstr(err.message, "/nowhere/libnccl.so.2") != NULL);
    CHECK(strstr(err.message, "pip install nvidia-nccl-cu13") != NULL);
}

static void test_another_library(void)
{
    qf_nccl *nccl = (qf_nccl *)1;
    qf_error err;
    CHECK_INT(qf_nccl_open("libm.so.6", &nccl, &err), QF_ERROR_BACKEND);
    CHECK(nccl == NULL);
    CHECK(strstr(err.message, "libm.so.6 lacks functions of NCCL") != NULL);
    qf_nccl_close(NULL);
    qf_nccl_comm_destroy(NULL);
}

#ifdef CHECK_ALLOC_FAULTS
static void test_memory_runs_out(void)
{
    qf_nccl *nccl;
    qf_error err;
    check_fail_alloc(1);
    CHECK_INT(qf_nccl_open("libm.so.6", &nccl, &err), QF_ERROR_OUT_OF_MEMORY);
    CHECK(nccl == NULL);
    check_fail_alloc(0);
}
#endif

int main(void)
{
    RUN(test_missing_library);
    RUN(test_another_library);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_memory_runs_out);
#endif
    return check_report();
}
