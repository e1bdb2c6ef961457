/* The collectives of a step, of a rank of several: sums over the ranks with the norm that follows, logits to rank 0, its
 * tokens to all. Through peer memory they are kernels like all others; where the GPUs cannot reach each other NCCL adds
 * up what a kernel has written, in place. */
#include "backend/cuda/cuda_backend.h"

/* A sum that NCCL makes, and what is then left to do. */
static qf_status reduce_by_comm(qf_cuda_backend *self, const qf_cuda_rmsnorm_args *sum, bool fresh, bool first,
                                qf_error *err)
{
    qf_comm *comm = self->rank.comm;
    qf_cuda_rmsnorm_args rest = *sum;
    if (first) {
        float *delta = fresh ? sum->residual : self->ws.delta;
        const qf_all_reduce_args args = {.in = delta,
                                         .out = delta,
                                         .count = (size_t)sum->num_tokens * (size_t)sum->delta_stride,
                                         .dtype = QF_DTYPE_F32,
                                         .stream = self->stream};
        QF_TRY(comm->vtable->all_reduce(comm, &args, err));
    }
    if (fresh) {
        rest.delta = NULL;
        rest.num_splits = 0;
        if (rest.out == NULL) {
            return QF_OK;
        }
    }
    return qf_cuda_rmsnorm(&rest, &self->device, self->stream, err);
}

qf_status qf_cuda_reduce_norm_rows(qf_cuda_backend *self, const qf_cuda_rmsnorm_args *args, bool first, qf_error *err)
{
    qf_cuda_rank *rank = &self->rank;
    const bool fresh = rank->fresh;
    if (rank->comm == NULL || (!fresh && args->delta == NULL)) {
        return qf_cuda_rmsnorm(args, &self->device, self->stream, err);
    }
    rank->fresh = false;
    qf_cuda_all_reduce_args sum = {.norm = *args, .fresh = fresh, .form = rank->form, .calls = &rank->calls};
    if (fresh) { /* each rank has the embeddings of its part of the vocabulary, and zeros */
        sum.norm.delta = args->residual;
        sum.norm.num_splits = 1;
        sum.norm.delta_stride = args->hidden_size;
    }
    return rank->peers != NULL ? qf_cuda_all_reduce(&sum, rank->peers, &self->device, self->stream, err)
                               : reduce_by_comm(self, &sum.norm, fresh, first, err);
}

qf_status qf_cuda_reduce_norm(qf_cuda_backend *self, const qf_cuda_rmsnorm_args *args, qf_error *err)
{
    return qf_cuda_reduce_norm_rows(self, args, true, err);
}

qf_status qf_cuda_gather_logits(qf_cuda_backend *self, int32_t count, qf_error *err)
{
    const qf_cuda_rank *rank = &self->rank;
    if (rank->comm == NULL) {
        return QF_OK;
    }
    if (rank->peers != NULL) {
        const qf_cuda_gather_args args = {.part = self->ws.logits,
                                          .out = rank->root_logits,
                                          .num_rows = count,
                                          .part_stride = self->logits_stride,
                                          .out_stride = self->all_logits_stride,
                                          .first_column = self->shard.vocab.begin,
                                          .num_columns = self->config.vocab_size};
        return qf_cuda_gather(&args, rank->peers, &self->device, self->stream, err);
    }
    const qf_gather_args args = {.in = self->ws.logits,
                                 .out = self->ws.all_logits,
                                 .num_rows = count,
                                 .columns = self->logits_stride, /* of a row: which of them count the communicator knows */
                                 .first_column = self->shard.vocab.begin,
                                 .out_columns = self->all_logits_stride,
                                 .root = 0,
                                 .dtype = QF_DTYPE_F32,
                                 .stream = self->stream};
    return rank->comm->vtable->gather(rank->comm, &args, err);
}

qf_status qf_cuda_share_sampled(qf_cuda_backend *self, const qf_cuda_forward *f, int32_t first, int32_t count,
                                qf_error *err)
{
    const qf_cuda_rank *rank = &self->rank;
    if (rank->comm == NULL) {
        return QF_OK;
    }
    const qf_cuda_share_tokens_args args = {.rows = f->meta->sample_rows + first,
                                            .token_ids = self->ws.token_ids + first,
                                            .last_token = self->ws.last_token,
                                            .num_rows = count};
    if (rank->peers == NULL) {
        QF_TRY(rank->comm->vtable->broadcast(rank->comm, 0, args.token_ids, (size_t)count * sizeof *args.token_ids,
                                             self->stream, err));
        if (qf_cuda_samples(self)) {
            return QF_OK;
        }
    }
    return qf_cuda_share_tokens(&args, rank->peers, &self->device, self->stream, err);
}
