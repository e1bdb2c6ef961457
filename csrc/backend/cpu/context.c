/* The context of the CPU ops: kernels of the chosen instruction set, and scratch memory for one step. */
#include "backend/cpu/kernels.h"

#include "base/alloc.h"

#define QF_MAX_ATTENTION_PARTIALS 4096

static const qf_cpu_kernels *find_kernels(qf_isa isa)
{
    switch (isa) {
#if QF_CPU_X86
    case QF_ISA_AVX2: return &qf_cpu_kernels_avx2;
    case QF_ISA_AVX512: return &qf_cpu_kernels_avx512;
    case QF_ISA_AVX512_VNNI: return &qf_cpu_kernels_avx512_vnni;
#endif
    default: return &qf_cpu_kernels_scalar;
    }
}

/* Hands out 64-byte aligned parts of one allocation; with base NULL it only adds up. */
typedef struct carver {
    char *base;
    size_t used_bytes;
} carver;

static void *carve(carver *self, size_t count, size_t size)
{
    void *part = self->base != NULL ? self->base + self->used_bytes : NULL;
    self->used_bytes += (count * size + 63) / 64 * 64;
    return part;
}

static size_t carve_context(qf_cpu_context *ctx, char *base, int32_t num_threads, int32_t max_num_tokens,
                            int32_t max_features)
{
    const size_t tokens = (size_t)max_num_tokens;
    const size_t padded = ((size_t)max_features + 127) / 128 * 128;
    carver c = {base, 0};
    ctx->act_q = carve(&c, tokens * padded, 1);
    ctx->act_scales = carve(&c, tokens * padded / 8, sizeof(float));
    ctx->act_sums = carve(&c, tokens * padded / 8, sizeof(int32_t));
    ctx->act_gathered = carve(&c, tokens * (size_t)max_features, sizeof(float));
    ctx->attention_scratch = carve(&c, (size_t)num_threads, sizeof(qf_attention_scratch));
    ctx->attention_partials = carve(&c, QF_MAX_ATTENTION_PARTIALS, sizeof(qf_attention_partial));
    return c.used_bytes;
}

size_t qf_cpu_context_bytes(int32_t num_threads, int32_t max_num_tokens, int32_t max_features)
{
    qf_cpu_context unused = {0};
    return carve_context(&unused, NULL, num_threads, max_num_tokens, max_features);
}

qf_status qf_cpu_context_create(qf_isa isa, qf_thread_pool *pool, int32_t max_num_tokens, int32_t max_features,
                                qf_cpu_context **out, qf_error *err)
{
    *out = NULL;
    if ((int)isa < 0 || isa > qf_isa_detect()) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "isa: %s is not supported here, at most %s", qf_isa_name(isa),
                       qf_isa_name(qf_isa_detect()));
    }
    if (max_num_tokens < 1 || max_num_tokens > 1 << 22 || max_features < 1 || max_features > 1 << 22) {
        return QF_FAIL(err, QF_ERROR_INVALID_ARGUMENT, "max_num_tokens %d, max_features %d: each must be 1..%d",
                       max_num_tokens, max_features, 1 << 22);
    }
    qf_cpu_context *self = qf_calloc(1, sizeof *self);
    if (self == NULL) {
        return QF_FAIL(err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate the CPU context: %zu bytes", sizeof *self);
    }
    self->kernels = find_kernels(isa);
    self->pool = pool;
    self->num_threads = qf_thread_pool_size(pool);
    self->max_num_tokens = max_num_tokens;
    self->max_features = max_features;
    self->max_partials = QF_MAX_ATTENTION_PARTIALS;
    self->pages_bytes = qf_cpu_context_bytes(self->num_threads, max_num_tokens, max_features);
    qf_status status = qf_pages_alloc(&self->pages, self->pages_bytes, "the CPU workspace", err);
    if (status != QF_OK) {
        qf_free(self);
        return status;
    }
    carve_context(self, self->pages, self->num_threads, max_num_tokens, max_features);
    *out = self;
    return QF_OK;
}

void qf_cpu_context_destroy(qf_cpu_context *self)
{
    if (self != NULL) {
        qf_pages_free(self->pages, self->pages_bytes);
        qf_free(self);
    }
}
