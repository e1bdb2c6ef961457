/* Options and memory of the ranks behind backend/parallel.h; internal to it. */
#ifndef QF_BACKEND_PARALLEL_PLAN_H
#define QF_BACKEND_PARALLEL_PLAN_H

#include "backend/backend.h"

/* A rank's own: host threads are shared out, devices are neighbours. */
qf_backend_options qf_parallel_rank_options(const qf_backend_options *options, int32_t rank);

qf_status qf_parallel_plan_memory(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                                  qf_memory_plan *out, qf_error *err);
qf_status qf_parallel_device_memory(const qf_backend_options *options, qf_device_memory *out, qf_error *err);

#endif
