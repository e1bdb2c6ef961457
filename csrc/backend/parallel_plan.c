/* What each rank of a model over several devices is given, and what that takes. */
#include "backend/parallel_plan.h"

#include "model/parallel.h"

qf_backend_options qf_parallel_rank_options(const qf_backend_options *options, int32_t rank)
{
    qf_backend_options out = *options;
    int32_t size = options->tensor_parallel_size, threads = options->num_threads / size;
    out.num_threads = threads + (rank < options->num_threads % size ? 1 : 0);
    out.num_threads = out.num_threads > 0 ? out.num_threads : 1;
    out.device_ordinal = options->device_ordinal + rank;
    return out;
}

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

static size_t fixed_bytes(const qf_memory_plan *plan)
{
    return plan->embedding_bytes + plan->layers_bytes + plan->head_bytes + plan->workspace_bytes +
           plan->kv_window_bytes;
}

/* The rank with the most is what has to fit; a block is the largest of any rank. */
static void take_largest(qf_memory_plan *total, const qf_memory_plan *rank)
{
    size_t block_bytes = total->kv_block_bytes > rank->kv_block_bytes ? total->kv_block_bytes : rank->kv_block_bytes;
    size_t all_blocks_bytes = total->all_kv_block_bytes + rank->kv_block_bytes;
    size_t host_bytes = total->host_bytes + rank->host_bytes;
    if (fixed_bytes(rank) > fixed_bytes(total)) {
        *total = *rank;
    }
    total->kv_block_bytes = block_bytes;
    total->all_kv_block_bytes = all_blocks_bytes;
    total->host_bytes = host_bytes;
}

static void add_up(qf_memory_plan *total, const qf_memory_plan *rank)
{
    total->embedding_bytes += rank->embedding_bytes;
    total->layers_bytes += rank->layers_bytes;
    total->head_bytes += rank->head_bytes;
    total->workspace_bytes += rank->workspace_bytes;
    total->kv_block_bytes += rank->kv_block_bytes;
    total->all_kv_block_bytes += rank->kv_block_bytes;
    total->kv_window_bytes += rank->kv_window_bytes;
    total->num_window_blocks = rank->num_window_blocks; /* the same of all */
    total->host_bytes += rank->host_bytes;
}

static qf_status plan_rank(const qf_checkpoint *checkpoint, const qf_backend_options *options, int32_t rank,
                           qf_memory_plan *out, qf_error *err)
{
    qf_checkpoint *view;
    qf_backend_options own = qf_parallel_rank_options(options, rank);
    QF_TRY(qf_checkpoint_shard(checkpoint, rank, options->tensor_parallel_size, &view, err));
    qf_status status = options->rank_backend->plan_memory(view, &own, out, err);
    qf_checkpoint_close(view);
    return status;
}

qf_status qf_parallel_plan_memory(const qf_checkpoint *checkpoint, const qf_backend_options *options,
                                  qf_memory_plan *out, qf_error *err)
{
    *out = (qf_memory_plan){0};
    for (int32_t rank = 0; rank < options->tensor_parallel_size; rank++) {
        qf_memory_plan plan;
        QF_TRY(plan_rank(checkpoint, options, rank, &plan, err));
        if (options->rank_backend->has_own_memory) {
            take_largest(out, &plan);
        } else {
            add_up(out, &plan);
        }
    }
    return QF_OK;
}

/* What the device with the least has. */
qf_status qf_parallel_device_memory(const qf_backend_options *options, qf_device_memory *out, qf_error *err)
{
    *out = (qf_device_memory){.available_bytes = UINT64_MAX, .total_bytes = UINT64_MAX};
    for (int32_t rank = 0; rank < options->tensor_parallel_size; rank++) {
        qf_device_memory memory;
        qf_backend_options own = qf_parallel_rank_options(options, rank);
        QF_TRY(options->rank_backend->device_memory(&own, &memory, err));
        out->available_bytes = min_u64(out->available_bytes, memory.available_bytes);
        out->total_bytes = min_u64(out->total_bytes, memory.total_bytes);
        out->overhead_bytes = out->overhead_bytes > memory.overhead_bytes ? out->overhead_bytes : memory.overhead_bytes;
    }
    return QF_OK;
}
