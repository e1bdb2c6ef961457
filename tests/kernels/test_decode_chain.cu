/* sources: base/status.c backend/cuda/attention_plan.c */
/* The kernels of a decode layer one after the other, as the engine enqueues them: norm, qkv, rope, attention, o, norm,
 * gate_up, down. In one graph with dependent launch they have to make the same bits as one by one with the device idle in
 * between. Where the linears make the norms, the residual behind attention has to be the same to the bit, and that of
 * more layers but for rounding. --bench: us a layer; --shares: what each kernel's absence saves; --model, --tokens,
 * --context, --format: of what. */
#include <string>

#include "check_cuda.cuh"
#include "qf_attention.h"

static Options options;

static __global__ void fill_kernel(uint32_t *to, size_t size, uint32_t seed, uint32_t keep, uint32_t set)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t u = (uint32_t)i * 2654435761u ^ seed * 40503u ^ (uint32_t)(i >> 32);
        u = (u ^ u >> 16) * 0x7feb352du;
        u = (u ^ u >> 15) * 0x846ca68bu;
        to[i] = ((u ^ u >> 16) & keep) | set;
    }
}

/* Words of random bits, of which `keep` stay random and `set` are set. */
template <typename T> static void fill(Device<T> &to, uint32_t seed, uint32_t keep, uint32_t set)
{
    fill_kernel<<<1056, 256>>>((uint32_t *)to.data, to.size * sizeof(T) / 4, seed, keep, set);
}

static const uint32_t FLOATS = 0x807fffffu, NEAR_ONE = 0x3f000000u; /* float32 of 0.5 .. 1 and their negatives */

/* A random packed matrix of 4 bits in groups of 128, made on the device. Its values are of about the size that keeps
 * that of activations. */
struct Matrix {
    Device<uint8_t> data;
    Device<uint32_t> scales;
    Device<float> bias;
    qf_cuda_weight view;
    Matrix(int n, int k, bool with_bias, uint32_t seed)
        : data((size_t)n * k / 2), scales((size_t)n * (k / 128)), bias(with_bias ? n : 0), view()
    {
        fill(data, seed, 0xffffffffu, 0);
        fill(scales, seed + 1, 0x006003ffu, 0x40801800u); /* scale 2^-9 .. 2^-8, zero point 4 .. 7 */
        fill(bias, seed + 2, FLOATS, NEAR_ONE);
        view.data = data.data;
        view.scales = scales.data;
        view.bias = with_bias ? bias.data : nullptr;
        view.n = n;
        view.k = k;
        view.bits = 4;
        view.group_size = 128;
        view.scale_multiplier = 1.0f;
    }
};

struct Model {
    const char *name;
    int hidden, inter, heads, kv_heads, head_dim;
    int qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

struct Layer {
    Matrix qkv, o, gate_up, down;
    Device<float> norms; /* input's, the one behind attention */
    Device<uint8_t> cache;
    Layer(const Model &m, size_t cache_bytes, bool low_bit, uint32_t seed)
        : qkv(m.qkv(), m.hidden, true, seed), o(m.hidden, m.heads * m.head_dim, false, seed + 10),
          gate_up(2 * m.inter, m.hidden, false, seed + 20), down(m.hidden, m.inter, false, seed + 30),
          norms((size_t)2 * m.hidden), cache(2 * cache_bytes)
    {
        fill(norms, seed + 40, 0x007fffffu, NEAR_ONE);
        fill(cache, seed + 50, low_bit ? 0x37373737u : 0x80ff80ffu, low_bit ? 0 : 0x3f003f00u);
    }
};

/* How the layers are put together. */
struct Form {
    bool norms_inside, one_by_one;
    std::string without;             /* the kernel that is left out */
};

#define BLOCK_TOKENS 32

struct Chain {
    Model m;
    int tokens, context;
    qf_cuda_kv_format format;
    size_t cache_bytes;
    std::vector<Layer *> layers;
    Device<float> start, residual, qkv, delta, squares, cos_sin, exchange;
    Device<uint16_t> x, q, attn, act;
    Device<int32_t> slots, tables, starts, counts;
    Device<uint8_t> *workspace = nullptr;
    Device<qf_cuda_attention_item> *items = nullptr;
    qf_cuda_attention_shape shape;
    int max_items;

    static size_t bytes_of(const Model &m, qf_cuda_kv_format format, int tokens, int context)
    {
        return (size_t)(tokens * (context / BLOCK_TOKENS)) *
               (size_t)qf_cuda_kv_block_bytes(format, m.kv_heads, BLOCK_TOKENS, m.head_dim);
    }
    Chain(const Model &model, int num_tokens, int num_layers, int context_, qf_cuda_kv_format format_)
        : m(model), tokens(num_tokens), context(context_), format(format_),
          cache_bytes(bytes_of(model, format_, num_tokens, context_)), start((size_t)tokens * m.hidden),
          residual((size_t)tokens * m.hidden), qkv((size_t)8 * tokens * m.qkv()), delta((size_t)8 * tokens * m.hidden),
          squares((size_t)tokens * m.hidden / 16), cos_sin((size_t)tokens * m.head_dim),
          exchange((size_t)7 * tokens * m.hidden),
          x((size_t)qf_cuda_tiled_size(m.hidden, tokens)), q((size_t)tokens * m.heads * m.head_dim),
          attn((size_t)qf_cuda_tiled_size(m.heads * m.head_dim, tokens)), act((size_t)qf_cuda_tiled_size(m.inter, tokens)),
          slots((size_t)tokens),
          tables((size_t)tokens * (context / BLOCK_TOKENS)), starts((size_t)tokens), counts(2),
          shape{m.heads, m.kv_heads, m.head_dim, BLOCK_TOKENS, 0, 0, 0}
    {
        for (int i = 0; i < num_layers; i++) {
            layers.push_back(new Layer(m, cache_bytes, format != QF_CUDA_KV_16, 1000 * (uint32_t)i + 7));
        }
        fill(start, 3, FLOATS, NEAR_ONE);
        fill(cos_sin, 4, FLOATS, NEAR_ONE);
        std::vector<int32_t> slot, table, first, loc = {0}, lens;
        for (int t = 0; t < tokens; t++) {
            first.push_back((int)table.size());
            for (int i = 0; i < context / BLOCK_TOKENS; i++) {
                table.push_back((int)table.size());
            }
            slot.push_back(table.back() * BLOCK_TOKENS + BLOCK_TOKENS - 1);
            loc.push_back(t + 1);
            lens.push_back(context);
        }
        slots.put(slot);
        tables.put(table);
        starts.put(first);
        shape.decode_ctas = options.device.sm_count * (format == QF_CUDA_KV_16 ? 2 : 1);
        max_items = qf_cuda_attention_max_items(&shape, tokens, tokens, context);
        std::vector<qf_cuda_attention_item> list((size_t)max_items);
        qf_cuda_attention_plan plan;
        qf_cuda_attention_plan_make(&shape, tokens, loc.data(), lens.data(), false, list.data(), &plan);
        CHECK(plan.num_prefill_items == 0);
        items = new Device<qf_cuda_attention_item>(list);
        counts.put({plan.num_decode_items, 0});
        workspace = new Device<uint8_t>(qf_cuda_attention_workspace_bytes(&shape, tokens, tokens, context));
        workspace->zero();
        exchange.zero();
    }
    Chain(const Chain &) = delete;
    ~Chain()
    {
        for (Layer *layer : layers) {
            delete layer;
        }
        delete items;
        delete workspace;
    }
    void reset() { CHECK_CUDA(cudaMemcpy(residual.data, start.data, start.size * 4, cudaMemcpyDeviceToDevice)); }

    void norm(const float *weight, int splits, const Form &form, cudaStream_t stream)
    {
        qf_cuda_rmsnorm_args a = {};
        a.residual = residual.data;
        a.delta = splits > 0 ? delta.data : nullptr;
        a.num_splits = splits;
        a.delta_stride = a.hidden_size = a.k_padded = m.hidden;
        a.weight = weight;
        a.out = x.data;
        a.num_tokens = a.num_rows = tokens;
        a.eps = 1e-6f;
        if (form.without != "norm") {
            CHECK_OK(qf_cuda_rmsnorm(&a, &options.device, stream, &check_error));
        }
        ended(form);
    }
    void attention(const Layer &layer, int splits, const Form &form, cudaStream_t stream)
    {
        uint8_t *cache = layer.cache.data;
        qf_cuda_kv kv = {cache, cache + cache_bytes, BLOCK_TOKENS, m.kv_heads, m.head_dim, false, format, nullptr};
        qf_cuda_rope_kv_write_args r = {};
        r.qkv = qkv.data;
        r.num_splits = splits;
        r.qkv_stride = m.qkv();
        r.cos_sin = cos_sin.data;
        r.slot_mapping = slots.data;
        r.q = q.data;
        r.kv = kv;
        r.num_tokens = tokens;
        r.num_heads = m.heads;
        if (form.without != "rope") {
            CHECK_OK(qf_cuda_rope_kv_write(&r, &options.device, stream, &check_error));
        }
        ended(form);
        qf_cuda_attention_args a = {};
        a.shape = shape;
        a.kv = kv;
        a.q = q.data;
        a.out = attn.data;
        a.out_k = m.heads * m.head_dim;
        a.items = items->data;
        a.num_items = counts.data;
        a.max_decode_items = max_items;
        a.block_tables = tables.data;
        a.block_table_start = starts.data;
        a.workspace = workspace->data;
        a.num_tokens = tokens;
        a.scale = 0.01f;
        if (form.without != "attention") {
            CHECK_OK(qf_cuda_attention(&a, &options.device, stream, &check_error));
        }
        ended(form);
    }
    int splits_of(const qf_cuda_weight &w, qf_cuda_epilogue epilogue) const
    {
        return qf_cuda_linear_splits(&options.device, w.n, w.k, w.bits, tokens, epilogue, false);
    }
    /* Whether norms are made by the linears. */
    bool inside(const Form &form) const
    {
        const Layer &l = *layers[0];
        bool fits = form.norms_inside;
        for (const qf_cuda_weight *w : {&l.qkv.view, &l.o.view, &l.gate_up.view, &l.down.view}) {
            const qf_cuda_epilogue epilogue = w == &l.gate_up.view ? QF_CUDA_SILU_MUL : QF_CUDA_STORE;
            fits = fits && qf_cuda_linear_norm_fits(&options.device, w->n, w->k, w->bits, tokens,
                                                    splits_of(*w, epilogue), false);
        }
        return fits;
    }
    /* weight_behind: of the norm that this layer makes; normed: x is. */
    int linear(const char *name, const Matrix &w, const uint16_t *in, float *out, const float *weight_behind, bool normed,
               const Form &form, cudaStream_t stream)
    {
        qf_cuda_linear_args a = {};
        a.weight = w.view;
        a.x = in;
        a.epilogue = out == nullptr ? QF_CUDA_SILU_MUL : QF_CUDA_STORE;
        a.out = out;
        a.act = act.data;
        a.num_tokens = tokens;
        a.num_splits = splits_of(w.view, a.epilogue);
        if (weight_behind != nullptr) {
            a.norm = {residual.data, weight_behind, x.data, squares.data, exchange.data};
        }
        a.squares = normed ? nullptr : squares.data;
        a.eps = 1e-6f;
        if (form.without != name) {
            CHECK_OK(qf_cuda_linear(&a, &options.device, stream, &check_error));
        }
        ended(form);
        return weight_behind == nullptr ? a.num_splits : 0;
    }
    void ended(const Form &form)
    {
        if (form.one_by_one) {
            CHECK_CUDA(cudaDeviceSynchronize());
        }
    }
    void enqueue(const Form &form, int passes, cudaStream_t stream)
    {
        const int count = (int)layers.size() * passes;
        const bool inside_ = inside(form);
        int splits = 0;
        for (int i = 0; i < count; i++) {
            const Layer &layer = *layers[(size_t)i % layers.size()], &after = *layers[(size_t)(i + 1) % layers.size()];
            const bool normed = i == 0 || !inside_, last = i + 1 == count;
            const float *input = layer.norms.data, *behind = input + m.hidden;
            if (normed) {
                norm(input, splits, form, stream);
            }
            splits = linear("qkv", layer.qkv, x.data, qkv.data, nullptr, normed, form, stream);
            attention(layer, splits, form, stream);
            splits = linear("o", layer.o, attn.data, delta.data, inside_ ? behind : nullptr, true, form, stream);
            if (!inside_) {
                norm(behind, splits, form, stream);
            }
            linear("gate_up", layer.gate_up, x.data, nullptr, nullptr, !inside_, form, stream);
            splits = linear("down", layer.down, act.data, delta.data, inside_ && !last ? after.norms.data : nullptr, true,
                            form, stream);
        }
    }
    std::vector<float> results()
    {
        CHECK_CUDA(cudaDeviceSynchronize());
        std::vector<float> all = residual.get();
        const std::vector<float> last = delta.get();
        const int splits = splits_of(layers[0]->down.view, QF_CUDA_STORE);
        all.insert(all.end(), last.begin(), last.begin() + (long)((size_t)splits * tokens * m.hidden));
        return all;
    }
};

/* --- checks ------------------------------------------------------------------------------------------------------ */

/* The residual behind one layer's attention: the same sums in the same order, whoever adds them. */
static void check_residual(const Model &m, int tokens)
{
    Chain chain(m, tokens, 1, 64, QF_CUDA_KV_16);
    std::vector<float> residual[2];
    for (int inside = 0; inside < 2; inside++) {
        chain.reset();
        chain.enqueue({inside != 0, true, "down"}, 1, 0);
        residual[inside] = chain.residual.get();
    }
    CHECK(memcmp(residual[0].data(), chain.start.get().data(), residual[0].size() * 4) != 0);
    if (memcmp(residual[0].data(), residual[1].data(), residual[0].size() * 4) != 0) {
        printf("%s, %d tokens: another residual with norms inside\n", m.name, tokens);
        check_failures++;
    }
}

static void check_chain(const Model &m, int tokens, qf_cuda_kv_format format)
{
    Chain chain(m, tokens, 2, 512, format);
    std::vector<float> first;
    for (int inside = 0; inside < 2; inside++) {
        Form form = {inside != 0, true, ""};
        chain.reset();
        chain.enqueue(form, 2, 0);
        const std::vector<float> want = chain.results();
        form.one_by_one = false;
        cudaStream_t stream;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaStreamCreate(&stream));
        CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        chain.enqueue(form, 2, stream);
        CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        for (int run = 0; run < (check_brief ? 2 : 5); run++) {
            chain.reset();
            chain.delta.poison();
            CHECK_CUDA(cudaGraphLaunch(exec, stream));
            const std::vector<float> got = chain.results();
            if (memcmp(got.data(), want.data(), want.size() * 4) != 0) {
                printf("%s, %d tokens, cache %d, norms %s: run %d of the graph differs\n", m.name, tokens, (int)format,
                       inside ? "inside" : "apart", run);
                check_failures++;
            }
        }
        CHECK(relative_error(want, want, want.size()) == 0); /* no NaN */
        if (inside) {
            const double error = relative_error(want, first, (size_t)tokens * m.hidden);
            if (!(error < 0.02)) {
                printf("%s, %d tokens, cache %d: norms inside: error %g\n", m.name, tokens, (int)format, error);
                check_failures++;
            }
            for (float word : chain.exchange.get()) {
                if (word != 0.0f || signbit(word)) {
                    printf("%s, %d tokens: the exchange is not empty\n", m.name, tokens);
                    check_failures++;
                    break;
                }
            }
        }
        first = want;
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
        cudaStreamDestroy(stream);
    }
}

/* --- times ------------------------------------------------------------------------------------------------------- */

static double layer_us(Chain &chain, const Form &form)
{
    const int passes = 2;
    chain.reset();
    return time_us([&](cudaStream_t stream, int) { chain.enqueue(form, passes, stream); }, 1, 15) /
           (passes * (double)chain.layers.size());
}

static void bench(const Model &m, int tokens, int context, qf_cuda_kv_format format, bool shares)
{
    Chain chain(m, tokens, 8, context, format);
    const Form apart = {false, false, ""};
    Form form = apart;
    const double base = layer_us(chain, apart);
    printf("%s %2d tokens, cache %d of %d: %6.2f", m.name, tokens, (int)format, context, base);
    form.norms_inside = true;
    if (chain.inside(form)) {
        printf(", norms inside %6.2f", layer_us(chain, form));
    }
    printf("\n");
    if (shares) {
        for (int inside = 0; inside < 2; inside++) {
            form = apart;
            form.norms_inside = inside;
            if (inside && !chain.inside(form)) {
                break;
            }
            const double all = layer_us(chain, form);
            printf("  without, norms %s:", inside ? "inside" : "apart");
            for (const char *name : {"norm", "qkv", "rope", "attention", "o", "gate_up", "down"}) {
                form.without = name;
                printf("  %s %.2f", name, all - layer_us(chain, form));
            }
            printf("\n");
        }
    }
}

int main(int argc, char **argv)
{
    options = check_options(argc, argv);
    const Model demo = {"demo", 384, 1024, 6, 2, 64}, half = {"0.5B", 896, 4864, 14, 2, 64};
    const Model seven = {"7B", 3584, 18944, 28, 4, 128}, fourteen = {"14B", 5120, 13824, 40, 8, 128};
    int only_tokens = 0, context = 2048, format = -1;
    bool shares = false, check = true;
    const char *model = "7B";
    for (int i = 1; i < argc; i++) {
        const bool value = i + 1 < argc;
        only_tokens = value && strcmp(argv[i], "--tokens") == 0 ? atoi(argv[i + 1]) : only_tokens;
        context = value && strcmp(argv[i], "--context") == 0 ? atoi(argv[i + 1]) : context;
        format = value && strcmp(argv[i], "--format") == 0 ? atoi(argv[i + 1]) : format;
        model = value && strcmp(argv[i], "--model") == 0 ? argv[i + 1] : model;
        shares = shares || strcmp(argv[i], "--shares") == 0;
        check = check && strcmp(argv[i], "--no-check") != 0;
    }
    if (check) {
        for (int tokens : {1, 2, 3, 4, 5, 8, 9, 32}) {
            check_residual(demo, tokens);
            check_residual(seven, tokens);
            check_chain(demo, tokens, tokens % 2 ? QF_CUDA_KV_FP8 : QF_CUDA_KV_16);
            check_chain(half, tokens, tokens % 2 ? QF_CUDA_KV_16 : QF_CUDA_KV_NF4);
            if (tokens < 5 || tokens > 9) {
                check_chain(seven, tokens, tokens % 2 ? QF_CUDA_KV_FP8 : QF_CUDA_KV_16);
            }
        }
    }
    if (options.bench) {
        for (const Model &m : {demo, half, seven, fourteen}) {
            for (int tokens : {1, 2, 4, 8, 16, 32}) {
                for (int f : {0, 1}) {
                    if ((only_tokens == 0 || only_tokens == tokens) && (format < 0 || format == f) &&
                        strcmp(model, m.name) == 0) {
                        bench(m, tokens, context, (qf_cuda_kv_format)f, shares);
                    }
                }
            }
        }
    }
    return check_report("decode chain");
}
