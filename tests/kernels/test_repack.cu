/* sources: base/status.c base/alloc.c base/dtype.c base/hash.c base/threads.c base/cpu_count.c base/cgroup.c base/json.c
 *          base/json_scan.c model/ backend/cuda/weights.c backend/cuda/weights_embedding.c backend/cuda/weights_job.c
 *          backend/cuda/weights_plan.c backend/cuda/weights_scales.c backend/cuda/weights_stage.c */
/* Loading whole checkpoints: plan, load, copy back, decode by the layout's definition, compare with csrc/model. */
#include <chrono>
#include <memory>

#include "qf_repack.h"
#include "repack_decode.cuh"

extern "C" {
#include "model/parallel.h"
}

static double now_s()
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Checkpoint {
    qf_checkpoint *self = nullptr;
    Folder folder;
    Checkpoint(const Model &m, int dummy_bits = 0)
    {
        qf_checkpoint_options options = {};
        options.dir = folder.path;
        options.dummy = dummy_bits != 0;
        options.dummy_bits = dummy_bits;
        options.dummy_seed = 11;
        if (dummy_bits != 0) {
            folder.write_config(m);
        } else {
            folder.write_model(m);
        }
        CHECK_OK(qf_checkpoint_open(&options, &self, &check_error));
        for (int i = 0; i < m.layers * QF_LINEARS_PER_LAYER && m.read_as_group > 0; i++) {
            qf_linear_source *source = const_cast<qf_linear_source *>(
                qf_checkpoint_linear(self, i / QF_LINEARS_PER_LAYER, (qf_linear_id)(i % QF_LINEARS_PER_LAYER)));
            CHECK(m.read_as_group >= source->group_size); /* there are scales enough */
            source->group_size = m.read_as_group;
            source->num_groups = (source->k + m.read_as_group - 1) / m.read_as_group;
        }
    }
    ~Checkpoint() { qf_checkpoint_close(self); }
};

struct Progress {
    size_t done = 0, total = 0, calls = 0, stop_at = SIZE_MAX;
};

static bool on_progress(void *arg, size_t done, size_t total)
{
    Progress *p = (Progress *)arg;
    CHECK(done >= p->done && done <= total);
    p->done = done;
    p->total = total;
    return ++p->calls < p->stop_at;
}

/* Device and host memory filled by one load. */
struct Loaded {
    qf_cuda_weights_layout layout = {};
    qf_cuda_weights weights = {};
    std::unique_ptr<Device<uint8_t>> device, scratch;
    uint8_t *host = nullptr;
    Progress progress;
    qf_status status = QF_OK;
    qf_error error = {};
    double seconds = 0;

    Loaded(const qf_checkpoint *checkpoint, const qf_backend_options &options, const qf_cuda_device &gpu,
           qf_thread_pool *pool, size_t stop_at = SIZE_MAX)
    {
        progress.stop_at = stop_at;
        CHECK_OK(qf_cuda_weights_plan(checkpoint, &options, &layout, &check_error));
        device.reset(new Device<uint8_t>(layout.device_bytes));
        scratch.reset(new Device<uint8_t>(qf_cuda_weights_scratch_bytes(&layout)));
        if (layout.host_bytes > 0) {
            CHECK_CUDA(cudaHostAlloc((void **)&host, layout.host_bytes, cudaHostAllocDefault));
            memset(host, 0xff, layout.host_bytes);
        }
        double start = now_s();
        status = qf_cuda_weights_load(checkpoint, &options, &layout, &gpu, device->data, host, scratch->data,
                                      scratch->size, pool, on_progress, &progress, &weights, &error);
        seconds = now_s() - start;
    }
    Loaded(const Loaded &) = delete;
    ~Loaded()
    {
        qf_cuda_weights_deinit(&weights);
        qf_cuda_weights_layout_deinit(&layout);
        if (host != nullptr) {
            CHECK_CUDA(cudaFreeHost(host));
        }
    }
    std::vector<uint8_t> bytes() const
    {
        std::vector<uint8_t> all = device->get();
        all.insert(all.end(), host, host + layout.host_bytes);
        return all;
    }
};

static qf_backend_options options_of(int quantize_bits, int group, int head_bits)
{
    qf_backend_options o = {};
    o.quantize_bits = quantize_bits;
    o.quantize_group_size = group;
    o.head_bits = head_bits;
    return o;
}

/* --- comparing a whole model ---------------------------------------------------------------------------------- */

static long compare_norm(const qf_checkpoint *checkpoint, int layer, qf_norm_id id, const uint8_t *at)
{
    size_t width = (size_t)qf_checkpoint_config(checkpoint)->hidden_size;
    std::vector<float> norm(width);
    qf_checkpoint_read_norm(checkpoint, layer, id, norm.data());
    return memcmp(norm.data(), at, 4 * width) != 0;
}

static long compare_embedding(const qf_checkpoint *checkpoint, const Loaded &l, const std::vector<uint8_t> &device)
{
    const qf_model_config *config = qf_checkpoint_config(checkpoint);
    const uint8_t *at = l.layout.embedding_on_host ? l.host
                        : l.layout.head_is_embedding
                            ? device.data() + l.layout.head_offset + l.layout.head.data
                            : device.data() + l.layout.embedding_offset;
    const uint8_t *seen = (const uint8_t *)l.weights.embedding;
    CHECK(l.layout.embedding_on_host || seen - l.device->data == at - device.data());
    qf_dtype dtype = qf_checkpoint_embedding_dtype(checkpoint);
    size_t width = (size_t)config->hidden_size, size = qf_dtype_size(dtype);
    std::vector<uint8_t> row(width * size);
    Packed fragments = {device.data() + l.layout.head_offset, &l.layout.head};
    long wrong = 0;
    for (int r = 0; r < config->vocab_size; r++) {
        qf_checkpoint_read_embedding(checkpoint, r, 1, row.data());
        for (size_t i = 0; i < width; i++) {
            float value;
            uint16_t half;
            memcpy(&half, &row[i * size], 2);
            memcpy(&value, &row[dtype == QF_DTYPE_F32 ? i * size : 0], 4);
            value = dtype == QF_DTYPE_F32 ? value : dtype == QF_DTYPE_F16 ? qf_f16_to_f32(half) : qf_bf16_to_f32(half);
            if (l.layout.embedding_bits == 32) {
                wrong += memcmp(at + ((size_t)r * width + i) * 4, &value, 4) != 0;
            } else if (l.layout.embedding_bits == 16) {
                half = qf_f32_to_bf16(value);
                wrong += memcmp(at + ((size_t)r * width + i) * 2, &half, 2) != 0;
            } else {
                wrong += fragments.code(r, (int)i) != qf_f32_to_bf16(value);
            }
        }
    }
    return wrong;
}

static long compare_model(const char *name, const qf_checkpoint *checkpoint, bool float32, const Loaded &l)
{
    std::vector<uint8_t> device = l.device->get();
    long wrong = compare_embedding(checkpoint, l, device);
    CHECK(wrong == 0);
    const uint8_t *at = device.data() + l.layout.layers_offset;
    const uint8_t *host = l.host == nullptr ? nullptr : l.host + l.layout.host_bytes;
    for (int i = l.layout.num_layers - 1; i >= l.layout.num_layers - l.layout.num_host_layers; i--) {
        host -= l.layout.layers[i].size_bytes;
    }
    for (int i = 0; i < l.layout.num_layers; i++) {
        qf_cuda_layer_layout *layer = &l.layout.layers[i];
        bool on_host = i >= l.layout.num_layers - l.layout.num_host_layers;
        const uint8_t *&blob = on_host ? host : at;
        CHECK((l.weights.layers[i].host_blob == blob) == on_host);
        CHECK(on_host || (const uint8_t *)l.weights.layers[i].down.data - l.device->data ==
                             blob + layer->down.data - device.data());
        for (int id = 0; id < QF_CUDA_LINEARS_PER_LAYER; id++) {
            qf_cuda_fused fused;
            qf_cuda_fused_get(checkpoint, i, (qf_cuda_linear_id)id, float32, &fused);
            Packed packed = {blob, qf_cuda_layer_linear(layer, (qf_cuda_linear_id)id)};
            wrong += compare_linear(name, fused, packed);
        }
        wrong += compare_norm(checkpoint, i, QF_INPUT_NORM, blob + layer->input_norm);
        wrong += compare_norm(checkpoint, i, QF_POST_ATTENTION_NORM, blob + layer->post_attention_norm);
        blob += layer->size_bytes;
    }
    CHECK(at == device.data() + l.layout.head_offset);
    qf_cuda_fused fused;
    qf_cuda_fused_get(checkpoint, 0, QF_CUDA_HEAD, float32, &fused);
    wrong += compare_linear(name, fused, {at, &l.layout.head});
    wrong += compare_norm(checkpoint, 0, QF_FINAL_NORM, at + l.layout.final_norm);
    CHECK(at + l.layout.head_bytes == device.data() + l.layout.device_bytes);
    return wrong;
}

static void check_load(const char *name, const qf_checkpoint *checkpoint, const qf_backend_options &options,
                       const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    Loaded first(checkpoint, options, gpu, pool), second(checkpoint, options, gpu, pool);
    for (const Loaded *l : {&first, &second}) {
        if (l->status != QF_OK) {
            fprintf(stderr, "%s: %s\n", name, l->error.message);
        }
        CHECK(l->status == QF_OK);
        CHECK(l->progress.done == l->layout.device_bytes + l->layout.host_bytes);
        CHECK(l->progress.total == l->progress.done);
    }
    if (first.status == QF_OK) {
        CHECK(compare_model(name, checkpoint, options.float32, first) == 0);
        CHECK(first.bytes() == second.bytes()); /* gaps included */
    }
}

/* --- cases ---------------------------------------------------------------------------------------------------- */

static const Model models[] = {
    /* name, hidden, inter, heads, kv, head_dim, vocab, layers, tied, dtype,
       format, bits, group, symmetric, act_order, same_order, v2, scale dtype, dense, extra bias, read as group */
    {"bf16", 384, 1024, 6, 2, 64, 1000, 2, true, QF_DTYPE_BF16, DENSE, 16, -1, true, false, false, false, QF_DTYPE_F16, "", false},
    {"bf16 odd", 215, 333, 5, 1, 42, 517, 2, false, QF_DTYPE_BF16, DENSE, 16, -1, true, false, false, false, QF_DTYPE_F16, "", false},
    {"fp16", 130, 77, 3, 1, 6, 259, 2, false, QF_DTYPE_F16, DENSE, 16, -1, true, false, false, false, QF_DTYPE_F16, "", false},
    {"float32", 96, 200, 2, 2, 24, 130, 1, true, QF_DTYPE_F32, DENSE, 16, -1, true, false, false, false, QF_DTYPE_F16, "", false},
    {"awq 128", 384, 1024, 6, 2, 64, 300, 2, false, QF_DTYPE_F16, AWQ, 4, 128, false, false, false, false, QF_DTYPE_F16, "", false},
    {"awq 64, some dense", 192, 320, 3, 1, 40, 300, 2, true, QF_DTYPE_BF16, AWQ, 4, 64, false, false, false, false, QF_DTYPE_F16, "1.self_attn.k_proj", true},
    {"awq 256, symmetric", 512, 800, 4, 2, 64, 300, 1, true, QF_DTYPE_F16, AWQ, 4, 128, true, false, false, false, QF_DTYPE_F16, "", true, 256},
    {"awq 48", 384, 480, 4, 2, 64, 300, 1, true, QF_DTYPE_F16, AWQ, 4, 32, false, false, false, false, QF_DTYPE_F16, "", false, 48},
    {"gptq 128", 384, 1024, 6, 2, 64, 300, 2, false, QF_DTYPE_F16, GPTQ, 4, 128, false, false, false, false, QF_DTYPE_F16, "", true},
    {"gptq v2, rows", 384, 648, 6, 2, 64, 300, 1, true, QF_DTYPE_BF16, GPTQ, 4, -1, true, false, false, true, QF_DTYPE_F16, "", false},
    {"gptq act-order", 256, 520, 4, 2, 64, 300, 2, true, QF_DTYPE_F16, GPTQ, 4, 32, false, true, true, false, QF_DTYPE_F16, "", true},
    {"gptq act-orders", 256, 520, 4, 2, 40, 300, 1, true, QF_DTYPE_F16, GPTQ, 4, 64, false, true, false, false, QF_DTYPE_F16, "", true},
    {"gptq 8, act-order", 192, 324, 3, 1, 36, 300, 1, true, QF_DTYPE_F16, GPTQ, 8, 32, false, true, true, true, QF_DTYPE_F16, "", false},
    {"gptq 8", 384, 512, 6, 2, 64, 300, 1, true, QF_DTYPE_F16, GPTQ, 8, 128, false, false, false, false, QF_DTYPE_BF16, "", false},
    {"compressed 4", 384, 512, 6, 2, 64, 300, 2, false, QF_DTYPE_BF16, COMPRESSED, 4, 128, true, false, false, false, QF_DTYPE_BF16, "", false},
    {"compressed 4, odd", 230, 333, 5, 1, 42, 300, 2, true, QF_DTYPE_BF16, COMPRESSED, 4, 32, false, false, false, false, QF_DTYPE_F32, "up_proj", true},
    {"compressed 8", 230, 333, 5, 1, 42, 300, 2, true, QF_DTYPE_F16, COMPRESSED, 8, 64, false, false, false, false, QF_DTYPE_BF16, "", true, 96},
    {"compressed 8, act-order", 256, 333, 4, 1, 64, 300, 1, true, QF_DTYPE_F16, COMPRESSED, 8, 64, true, true, true, false, QF_DTYPE_F16, "", false},
    {"compressed 4, act-orders", 256, 333, 4, 1, 64, 300, 1, true, QF_DTYPE_F16, COMPRESSED, 4, 64, false, true, false, false, QF_DTYPE_F16, "", false},
    {"compressed 4, rows", 256, 333, 4, 1, 64, 300, 1, true, QF_DTYPE_F16, COMPRESSED, 4, -1, true, false, false, false, QF_DTYPE_F32, "", false},
    /* ranks' columns begin and end inside words of the file, inside groups, and in groups of no size that can be packed */
    {"gptq 4, cut words", 256, 24, 6, 6, 20, 300, 1, true, QF_DTYPE_F16, GPTQ, 4, 32, false, false, false, false, QF_DTYPE_F16, "", true},
    {"gptq 4, act-order, cut words", 256, 24, 6, 6, 20, 300, 1, true, QF_DTYPE_F16, GPTQ, 4, 32, false, true, false, true, QF_DTYPE_F16, "", true},
    {"gptq 8, cut words", 256, 20, 6, 6, 22, 300, 1, true, QF_DTYPE_F16, GPTQ, 8, 32, false, false, false, false, QF_DTYPE_F16, "", true},
    {"compressed 4, cut words", 256, 21, 6, 3, 26, 300, 1, true, QF_DTYPE_BF16, COMPRESSED, 4, 32, false, false, false, false, QF_DTYPE_BF16, "", false},
    {"compressed 8, cut groups", 256, 330, 6, 3, 50, 300, 1, true, QF_DTYPE_BF16, COMPRESSED, 8, 32, false, false, false, false, QF_DTYPE_BF16, "", false, 33},
    {"awq 4, cut groups", 256, 480, 6, 6, 20, 304, 1, true, QF_DTYPE_F16, AWQ, 4, 32, false, false, false, false, QF_DTYPE_F16, "", false, 36},
};

static void check_formats(const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    static const int groups[] = {128, 64, 32};
    int index = 0;
    for (const Model &m : models) {
        Checkpoint checkpoint(m);
        if (checkpoint.self == nullptr) {
            continue;
        }
        int group = groups[index++ % 3];
        qf_backend_options as_stored = options_of(0, group, 16), reference = as_stored;
        check_load(m.name, checkpoint.self, as_stored, gpu, pool);
        reference.float32 = true;
        check_load(m.name, checkpoint.self, reference, gpu, pool);
        if (m.format == DENSE) {
            check_load(m.name, checkpoint.self, options_of(4, group, 8), gpu, pool);
            check_load(m.name, checkpoint.self, options_of(8, groups[index % 3], 4), gpu, pool);
        } else {
            check_load(m.name, checkpoint.self, options_of(0, group, 4 + 4 * (index % 2)), gpu, pool);
        }
    }
}

/* Ranks' parts of models (model/parallel.h). */
static void check_parts(const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    static const int quantize_bits[] = {4, 0, 4, 8, 8};
    int loaded = 0, widened = 0;
    for (const Model &m : models) {
        Model plain = m;
        plain.read_as_group = 0;
        Checkpoint checkpoint(m), dummy(plain, m.bits == 4 ? 4 : 16);
        for (int size = check_brief ? 3 : 2; size <= 5; size += check_brief ? 9 : size - 1) { /* 2, 3, 5; or 3 */
            for (int rank = 0; rank < size && size <= m.heads; rank++) {
                for (const qf_checkpoint *whole : {checkpoint.self, dummy.self}) {
                    if (whole == dummy.self && size != 3) {
                        continue;
                    }
                    qf_checkpoint *part = nullptr;
                    CHECK_OK(qf_checkpoint_shard(whole, rank, size, &part, &check_error));
                    qf_backend_options options =
                        options_of(m.format == DENSE ? quantize_bits[rank] : 0, size == 3 ? 128 : 64, 8);
                    for (int float32 = 0; float32 < 2; float32++) {
                        options.float32 = float32 == 1;
                        Loaded l(part, options, gpu, pool);
                        CHECK(l.status == QF_OK && compare_model(m.name, part, options.float32, l) == 0);
                        CHECK(float32 == 0 || l.layout.num_widened == 0);
                        widened += l.layout.num_widened;
                        loaded++;
                    }
                    qf_checkpoint_close(part);
                }
            }
        }
    }
    CHECK(loaded > 150 && widened > 20);
}

static void check_dummy(const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    for (int bits : {4, 16}) {
        Checkpoint checkpoint(models[bits == 4 ? 1 : 0], bits);
        for (int head_bits : {4, 8, 16}) {
            check_load("dummy", checkpoint.self, options_of(bits == 16 && head_bits == 4 ? 4 : 0, 128, head_bits), gpu,
                       pool);
        }
        qf_backend_options reference = options_of(0, 128, 16);
        reference.float32 = true;
        check_load("dummy", checkpoint.self, reference, gpu, pool);
    }
}

static void check_offload(const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    Model m = models[0];
    m.layers = 4;
    for (qf_dtype dtype : {QF_DTYPE_BF16, QF_DTYPE_F16}) {
        m.dtype = dtype;
        Checkpoint checkpoint(m);
        for (int offloaded = 0; offloaded <= 5; offloaded++) {
            qf_backend_options options = options_of(0, 128, 16);
            options.offload_embedding = offloaded != 4;
            qf_cuda_weights_layout layout;
            CHECK_OK(qf_cuda_weights_plan(checkpoint.self, &options, &layout, &check_error));
            size_t layer_bytes = layout.layers[0].size_bytes;
            qf_cuda_weights_layout_deinit(&layout);
            options.offload_layers_bytes = (size_t)offloaded * layer_bytes - (offloaded > 0 ? 1 : 0);
            CHECK_OK(qf_cuda_weights_plan(checkpoint.self, &options, &layout, &check_error));
            CHECK(layout.num_host_layers == std::min(offloaded, 4));
            CHECK(layout.slot_bytes == (offloaded > 0 ? layer_bytes : 0));
            CHECK(layout.head_is_embedding == (offloaded == 4));
            qf_cuda_weights_layout_deinit(&layout);
            check_load("offload", checkpoint.self, options, gpu, pool);
        }
    }
}

static void check_refusals(const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    Checkpoint checkpoint(models[4]);
    qf_backend_options options = options_of(0, 128, 8);
    for (size_t calls = 1; calls <= 4; calls++) { /* embedding, two layers, head */
        Loaded l(checkpoint.self, options, gpu, pool, calls);
        CHECK(l.status == QF_ERROR_STATE && l.progress.calls == calls && l.weights.layers == nullptr);
        CHECK(strncmp(l.error.message, "loading was stopped at ", 23) == 0);
    }
    qf_cuda_weights_layout layout;
    qf_error error;
    for (qf_backend_options wrong : {options_of(5, 128, 16), options_of(0, 128, 6), options_of(4, 96, 16)}) {
        CHECK(qf_cuda_weights_plan(checkpoint.self, &wrong, &layout, &error) == QF_ERROR_INVALID_ARGUMENT);
    }
    CHECK_OK(qf_cuda_weights_plan(checkpoint.self, &options, &layout, &check_error));
    qf_cuda_weights weights;
    size_t scratch_bytes = qf_cuda_weights_scratch_bytes(&layout);
    Device<uint8_t> memory(layout.device_bytes);
    CHECK(qf_cuda_weights_load(checkpoint.self, &options, &layout, &gpu, memory.data, nullptr, memory.data,
                               scratch_bytes - 1, pool, nullptr, nullptr, &weights, &error) ==
          QF_ERROR_INVALID_ARGUMENT);
    qf_cuda_weights_layout_deinit(&layout);
    qf_repack_args args = {};
    CHECK(qf_cuda_repack(&args, nullptr, &error) == QF_ERROR_INVALID_ARGUMENT);
}

/* --- timing --------------------------------------------------------------------------------------------------- */

struct BenchCase {
    const char *name;
    qf_repack_format format;
    int source_bits, bits;
    bool quantize, permuted;
};

/* The fused gate_up of the 7B model. */
static void bench_kernel(const BenchCase &c)
{
    const int n = 18944, k = 3584, group = 128, groups = k / group;
    std::vector<int32_t> order((size_t)k);
    Random random(5);
    for (int i = 0; i < k; i++) {
        order[(size_t)i] = i;
    }
    for (int i = k - 1; i > 0; i--) {
        std::swap(order[(size_t)i], order[(size_t)random.below(i + 1)]);
    }
    size_t raw_bytes = c.format == QF_REPACK_DUMMY ? 1 : (size_t)2 * n * k * (size_t)c.source_bits / 8;
    size_t out_bytes = (size_t)2 * n * k * (size_t)c.bits / 8;
    Device<uint8_t> raw(raw_bytes), out(out_bytes);
    Device<uint32_t> zeros((size_t)2 * n * groups), scales((size_t)2 * n * groups), packed((size_t)2 * n * groups);
    Device<int32_t> columns(order);
    if (c.quantize) { /* real values: the search's length depends on them */
        Writer w;
        std::vector<float> normals = w.normals(1 << 20, 0.02f);
        std::vector<uint16_t> half(normals.size());
        std::transform(normals.begin(), normals.end(), half.begin(), qf_f32_to_bf16);
        for (size_t at = 0; at < raw_bytes; at += 2 * half.size()) {
            CHECK_CUDA(cudaMemcpy(raw.data + at, half.data(), std::min(2 * half.size(), raw_bytes - at),
                                  cudaMemcpyHostToDevice));
        }
    }
    qf_repack_args args = {};
    args.num_parts = 2;
    args.interleave = c.bits != 32;
    args.rows = c.bits == 32;
    args.quantize_bits = c.quantize ? c.bits : 0;
    args.quantize_group_size = group;
    args.bits = c.bits;
    args.group_size = group;
    args.k = args.k_packed = k;
    args.num_rows = 2 * n;
    args.inverse_multiplier = 1.0f;
    args.data = out.data;
    args.scales = packed.data;
    for (int i = 0; i < 2; i++) {
        qf_repack_part &part = args.parts[i];
        part.weight = raw.data + (size_t)i * raw_bytes / 2;
        part.scales = scales.data + (size_t)i * n * groups;
        part.zeros = zeros.data + (size_t)i * n * groups;
        part.columns = c.permuted ? columns.data : nullptr;
        part.format = c.format;
        part.bits = c.source_bits;
        part.scale_format = QF_REPACK_F16;
        part.row_start = i * n;
        part.n = part.num_rows = n;
        part.num_columns = k;
        part.group_size = group;
        part.num_groups = groups;
    }
    auto launch = [&](cudaStream_t stream, int) { CHECK_OK(qf_cuda_repack(&args, stream, &check_error)); };
    double us = time_us(launch, 2, 5);
    double weights = 2.0 * n * k;
    printf("%-22s %9.1f us  %7.1f Gweights/s  %7.1f GB/s in  %7.1f GB/s out\n", c.name, us, weights / us * 1e-3,
           (double)raw_bytes / us * 1e-3, (double)out_bytes / us * 1e-3);
}

static void bench_load(const char *name, const Model &m, int dummy_bits, const qf_backend_options &options,
                       const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    Checkpoint checkpoint(m, dummy_bits);
    for (int i = 0; i < 2; i++) { /* the file is in the page cache both times */
        Loaded l(checkpoint.self, options, gpu, pool);
        CHECK(l.status == QF_OK);
        if (i == 0 && l.status == QF_OK && dummy_bits == 0) {
            CHECK(compare_model(name, checkpoint.self, false, l) == 0);
        }
        double bytes = (double)(l.layout.device_bytes + l.layout.host_bytes);
        printf("%-34s %8.1f MB packed, %7.1f ms, %6.2f GB/s, %d threads\n", name, bytes * 1e-6, l.seconds * 1e3,
               bytes / l.seconds * 1e-9, qf_thread_pool_size(pool));
    }
}

static void bench(const qf_cuda_device &gpu, qf_thread_pool *pool)
{
    static const BenchCase cases[] = {
        {"awq 4", QF_REPACK_AWQ, 4, 4, false, false},          {"gptq 4", QF_REPACK_GPTQ, 4, 4, false, false},
        {"gptq 4 act-order", QF_REPACK_GPTQ, 4, 4, false, true}, {"gptq 8", QF_REPACK_GPTQ, 8, 8, false, false},
        {"compressed 4", QF_REPACK_COMPRESSED, 4, 4, false, false}, {"bf16 to 16", QF_REPACK_BF16, 16, 16, false, false},
        {"fp16 to 16", QF_REPACK_F16, 16, 16, false, false},   {"awq 4 to 16", QF_REPACK_AWQ, 4, 16, false, false},
        {"awq 4 to float32", QF_REPACK_AWQ, 4, 32, false, false}, {"dummy 4", QF_REPACK_DUMMY, 4, 4, false, false},
        {"dummy 16", QF_REPACK_DUMMY, 16, 16, false, false},   {"quantize 4", QF_REPACK_BF16, 16, 4, true, false},
        {"quantize 8", QF_REPACK_BF16, 16, 8, true, false},
    };
    printf("repack kernels, gate_up of 7B (2 x 18944 x 3584)\n");
    for (const BenchCase &c : cases) {
        bench_kernel(c);
    }
    printf("loading\n");
    Model big = {"72B, a layer, awq", 8192, 29568, 64, 8, 128, 2048, 1, false, QF_DTYPE_BF16, AWQ, 4, 128, false,
                 false, false, false, QF_DTYPE_F16, "", false};
    bench_load(big.name, big, 0, options_of(0, 128, 16), gpu, pool);
    Model seven = {"7B, a layer, bf16", 3584, 18944, 28, 4, 128, 8192, 1, true, QF_DTYPE_BF16, DENSE, 16, -1, true,
                   false, false, false, QF_DTYPE_F16, "", false};
    bench_load(seven.name, seven, 0, options_of(0, 128, 16), gpu, pool);
    bench_load("7B, a layer, bf16 to 4", seven, 0, options_of(4, 128, 8), gpu, pool);
    seven.layers = 28;
    seven.vocab = 152064;
    bench_load("7B, dummy 4, head 8", seven, 4, options_of(0, 128, 8), gpu, pool);
    Model half = {"0.5B, awq", 896, 4864, 14, 2, 64, 151936, 24, true, QF_DTYPE_BF16, AWQ, 4, 128, false,
                  false, false, false, QF_DTYPE_F16, "", false};
    bench_load(half.name, half, 0, options_of(0, 128, 8), gpu, pool);
}

int main(int argc, char **argv)
{
    Options o = check_options(argc, argv);
    qf_thread_pool *one = nullptr, *all = nullptr;
    CHECK_OK(qf_thread_pool_create(1, &one, &check_error));
    CHECK_OK(qf_thread_pool_create(qf_cpu_count(), &all, &check_error));
    check_formats(o.device, all);
    check_dummy(o.device, one);
    check_parts(o.device, all);
    check_offload(o.device, all);
    check_refusals(o.device, one);
    if (o.bench && check_failures == 0) {
        bench(o.device, all);
    }
    qf_thread_pool_destroy(one);
    qf_thread_pool_destroy(all);
    return check_report("repack");
}
