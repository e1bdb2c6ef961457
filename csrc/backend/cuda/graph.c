/* Captured decode steps: one graph for each padded batch size and kind of sampling (and of one sequence, for the decode
 * kernel and for the chain of kernels), made when it is first needed. Ranks
 * make it together, with no step in flight on any of them: making it may wait for memory that another rank's kernel,
 * waiting for this rank, keeps busy. */
#include "backend/cuda/cuda_backend.h"

/* 1, 2, 4, 8, then every 8 up to 64 and every 16 up to the limit. */
int32_t qf_cuda_graph_size(const qf_cuda_backend *self, int32_t num_seqs)
{
    if (self->options.enforce_eager || self->options.float32 || num_seqs > self->logit_rows) {
        return 0;
    }
    int32_t size = 1;
    while (size < num_seqs) {
        size += size < 8 ? size : size < 64 ? 8 : 16;
    }
    int32_t limit = self->options.max_num_batched_tokens < self->logit_rows ? self->options.max_num_batched_tokens
                                                                            : self->logit_rows;
    return size <= limit ? size : num_seqs <= limit ? limit : 0;
}

/* With the other ranks, each with nothing to do. */
static qf_status meet(qf_cuda_backend *self, qf_error *err)
{
    qf_comm *comm = self->rank.comm;
    if (comm == NULL) {
        return QF_OK;
    }
    QF_CUDA_CHECK(cudaStreamSynchronize(self->stream));
    return comm->vtable->barrier(comm, err);
}

static qf_status capture(qf_cuda_backend *self, const qf_cuda_graph *of, cudaGraphExec_t *out, qf_error *err)
{
    const int32_t num_seqs = of->num_seqs;
    qf_cuda_meta meta;
    int32_t max_items = qf_cuda_step_max_items(self, NULL, num_seqs);
    qf_cuda_meta_layout(self, self->ws.meta, num_seqs, num_seqs, num_seqs, max_items, &meta);
    /* Rows of tiles of the prefill kernel alone. */
    bool tiles = self->options.batch_invariant || qf_cuda_backend_attention_shape(self, false).decode_ctas < 0;
    qf_cuda_attention_plan bound = {.num_decode_items = tiles ? 0 : max_items,
                                    .num_prefill_items = tiles ? max_items : 0,
                                    .num_window_items = tiles || self->kv_window == 0 ? 0 : num_seqs};
    qf_cuda_forward f = {.meta = &meta,
                         .plan = {.full = bound, .sliding = bound, .all_greedy = of->greedy, .one_kernel = of->one_kernel},
                         .captured = true};
    cudaGraph_t graph = NULL;
    QF_CUDA_CHECK(cudaStreamBeginCapture(self->stream, cudaStreamCaptureModeThreadLocal));
    qf_status status = qf_cuda_decode_forward(self, &f, err);
    cudaError_t result = cudaStreamEndCapture(self->stream, &graph);
    if (status == QF_OK && result == cudaSuccess) {
        result = cudaGraphInstantiate(out, graph, 0);
    }
    if (status == QF_OK && result != cudaSuccess) {
        status = QF_FAIL(err, result == cudaErrorMemoryAllocation ? QF_ERROR_OUT_OF_MEMORY : QF_ERROR_BACKEND,
                         "capturing the graph of %d sequences: %s", num_seqs, cudaGetErrorString(result));
    }
    (void)cudaGetLastError();
    if (graph != NULL) {
        (void)cudaGraphDestroy(graph);
    }
    return status;
}

/* A rank of several makes what it will need of this size: how rank 0's rows are sampled is its own affair, so the others
 * cannot tell when it wants which. */
static qf_status capture_together(qf_cuda_backend *self, qf_cuda_graph wanted, qf_cuda_graph *graphs, qf_error *err)
{
    const int count = qf_cuda_samples(self) ? 2 : 1;
    QF_TRY(meet(self, err));
    for (int i = 0; i < count; i++) {
        if (graphs + i == self->graphs + QF_CUDA_MAX_GRAPHS) {
            return QF_FAIL(err, QF_ERROR_INTERNAL, "no room for one more of %d graphs", QF_CUDA_MAX_GRAPHS);
        }
        wanted.greedy = i == 0;
        QF_TRY(capture(self, &wanted, &wanted.exec, err));
        graphs[i] = wanted;
        QF_CUDA_CHECK(cudaGraphUpload(graphs[i].exec, self->stream));
    }
    return meet(self, err);
}

qf_status qf_cuda_graph_get(qf_cuda_backend *self, int32_t num_seqs, const qf_cuda_plan *plan, cudaGraphExec_t *out,
                            qf_error *err)
{
    qf_cuda_graph wanted = {.num_seqs = num_seqs, .greedy = plan->all_greedy, .one_kernel = plan->one_kernel};
    for (int i = 0; i < QF_CUDA_MAX_GRAPHS; i++) {
        qf_cuda_graph *graph = &self->graphs[i];
        if (graph->num_seqs == num_seqs && graph->one_kernel == wanted.one_kernel &&
            (graph->greedy == wanted.greedy || !qf_cuda_samples(self))) {
            *out = graph->exec;
            return QF_OK;
        }
        if (graph->num_seqs == 0 && self->rank.comm != NULL) {
            QF_TRY(capture_together(self, wanted, graph, err));
            *out = graph[qf_cuda_samples(self) && !wanted.greedy ? 1 : 0].exec;
            return QF_OK;
        }
        if (graph->num_seqs == 0) {
            QF_TRY(capture(self, &wanted, &wanted.exec, err));
            *graph = wanted;
            *out = graph->exec;
            return QF_OK;
        }
    }
    return QF_FAIL(err, QF_ERROR_INTERNAL, "no room for one more of %d graphs", QF_CUDA_MAX_GRAPHS);
}

void qf_cuda_graphs_destroy(qf_cuda_backend *self)
{
    for (int i = 0; i < QF_CUDA_MAX_GRAPHS && self->graphs[i].num_seqs > 0; i++) {
        (void)cudaGraphExecDestroy(self->graphs[i].exec);
    }
}
