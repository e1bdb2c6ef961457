/* sources: base/status.c */
/* The decode step in one launch against plain kernels that compute the same step one op at a time. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check_cuda.cuh"
#include "decode_step.cuh"

/* ---- random weights, made on the device ------------------------------------------------------------------------ */

static __device__ uint32_t hash(uint64_t i)
{
    i = (i + 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
    i = (i ^ i >> 27) * 0x94D049BB133111EBull;
    return (uint32_t)(i >> 32);
}

static __global__ void fill_words(uint32_t *p, size_t n, uint64_t seed, uint32_t keep, uint32_t set)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        p[i] = (hash(i + seed * 1000003) & keep) | set;
    }
}

static __global__ void fill_scales(uint32_t *p, size_t n, uint64_t seed, int bits)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = hash(i + seed * 1000003);
        float scale = (bits == 4 ? 0.003f : 0.0002f) * (0.5f + (h & 0xffff) / 65536.0f);
        float zero = bits == 4 ? 6.0f + (h >> 16) % 4 : 124.0f + (h >> 16) % 8;
        p[i] = __half_as_ushort(__float2half(scale)) |
               (uint32_t)__bfloat16_as_ushort(__float2bfloat16(zero)) << 16;
    }
}

static __global__ void fill_floats(float *p, size_t n, uint64_t seed, float centre, float width)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = hash(i + seed * 1000003);
        p[i] = centre + width * ((h & 0xffff) + (h >> 16) - 65535.0f) / 65536.0f;
    }
}

static __global__ void fill_bf16(__nv_bfloat16 *p, size_t n, uint64_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = hash(i + seed * 1000003);
        p[i] = __float2bfloat16(((h & 0xffff) + (h >> 16) - 65535.0f) / 65536.0f);
    }
}

static std::vector<void *> allocations;
static uint64_t next_seed = 1;

template <typename T> static T *allocate(size_t count)
{
    void *p;
    CHECK_CUDA(cudaMalloc(&p, count * sizeof(T) + 256));
    allocations.push_back(p);
    return (T *)p;
}
static void free_all()
{
    for (void *p : allocations) {
        CHECK_CUDA(cudaFree(p));
    }
    allocations.clear();
}

static float *make_floats(size_t count, float centre, float width)
{
    float *p = allocate<float>(count);
    fill_floats<<<512, 256>>>(p, count, next_seed++, centre, width);
    return p;
}

static qf_cuda_weight make_weight(int n, int k, int bits, int group, bool bias, float multiplier)
{
    qf_cuda_weight w = {};
    size_t words = (size_t)n * k * bits / 32;
    uint32_t *data = allocate<uint32_t>(words);
    fill_words<<<1024, 256>>>(data, words, next_seed++, bits == 16 ? 0x80ff80ffu : ~0u, bits == 16 ? 0x3c003c00u : 0);
    w.data = data;
    if (bits != 16) {
        size_t count = (size_t)n * (k / group);
        uint32_t *scales = allocate<uint32_t>(count);
        fill_scales<<<512, 256>>>(scales, count, next_seed++, bits);
        w.scales = scales;
    }
    w.bias = bias ? make_floats(n, 0.0f, 0.5f) : nullptr;
    w.n = n;
    w.k = k;
    w.bits = bits;
    w.group_size = group;
    w.scale_multiplier = multiplier;
    return w;
}

/* ---- the reference: float32, one thread or block a result ------------------------------------------------------- */

static __device__ float bf16(float x) { return __bfloat162float(__float2bfloat16(x)); }

/* By the words of qf_kernels.h. */
static __device__ float weight_at(const qf_cuda_weight &w, int row, int column)
{
    int r = row % 16, step = column % 128 / 16, c = column % 16, lane = r % 8 * 4 + c % 8 / 2, reg = r / 8 + c / 8 * 2;
    size_t block = (size_t)(row / 16) * (w.k / 128) + column / 128;
    const uint8_t *data = (const uint8_t *)w.data + block * 256 * w.bits;
    if (w.bits == 16) {
        uint16_t v = *(const uint16_t *)(data + step * 512 + lane * 16 + reg * 4 + c % 2 * 2);
        return w.scale_multiplier * __uint_as_float((uint32_t)v << 16);
    }
    float q;
    if (w.bits == 4) {
        uint32_t word = *(const uint32_t *)(data + step / 4 * 512 + lane * 16 + step % 4 * 4);
        q = (float)(word >> (4 * reg + 16 * (c % 2)) & 15u);
    } else {
        q = (float)data[step / 2 * 512 + lane * 16 + step % 2 * 8 + reg * 2 + c % 2];
    }
    uint32_t s = w.scales[(block * (128 / w.group_size) + column % 128 / w.group_size) * 16 + r];
    return w.scale_multiplier * __half2float(__ushort_as_half((unsigned short)(s & 0xffff))) *
           (q - __uint_as_float(s & 0xffff0000u));
}

/* out[t][row] (+)= r[t] * sum x[t][k] w[row][k] + bias; a warp a row. */
static __global__ void ref_linear(qf_cuda_weight w, const float *x, int x_stride, const float *r, float *out, int tokens,
                                  bool add)
{
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= w.n) {
        return;
    }
    float sum[8] = {};
    for (int k = lane; k < w.k; k += 32) {
        float v = weight_at(w, row, k);
        for (int t = 0; t < tokens; t++) {
            sum[t] += k < x_stride ? v * x[(size_t)t * x_stride + k] : 0.0f;
        }
    }
    for (int t = 0; t < tokens; t++) {
        for (int m = 16; m != 0; m >>= 1) {
            sum[t] += __shfl_xor_sync(~0u, sum[t], m);
        }
        if (lane == 0) {
            float v = sum[t] * (r ? r[t] : 1.0f) + (w.bias ? w.bias[row] : 0.0f);
            out[(size_t)t * w.n + row] = v + (add ? out[(size_t)t * w.n + row] : 0.0f);
        }
    }
}

/* x = bf16(h * weight), r = 1 / root mean square: a block a token */
static __global__ void ref_norm(const float *h, const float *weight, float *x, float *r, int size, float eps)
{
    __shared__ double sum;
    if (threadIdx.x == 0) {
        sum = 0;
    }
    __syncthreads();
    double mine = 0;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        double v = h[(size_t)blockIdx.x * size + i];
        mine += v * v;
        x[(size_t)blockIdx.x * size + i] = bf16(h[(size_t)blockIdx.x * size + i] * weight[i]);
    }
    atomicAdd(&sum, mine);
    __syncthreads();
    if (threadIdx.x == 0) {
        r[blockIdx.x] = (float)(1.0 / sqrt(sum / size + eps));
    }
}

struct RefAttention {
    float *qkv, *out; /* (tokens, n), (tokens, num_heads * head_dim) */
    const float *cos_sin;
    __nv_bfloat16 *k, *v;
    const int32_t *slot_mapping, *seq_lens, *block_tables, *block_table_start;
    int heads, kv_heads, head_dim, block_size, window;
    float scale;
};

/* Rotates and rounds q in place, and k and v into the cache; a block a token. */
static __global__ void ref_rope(RefAttention a)
{
    int t = blockIdx.x, half = a.head_dim / 2, n = (a.heads + 2 * a.kv_heads) * a.head_dim, slot = a.slot_mapping[t];
    for (int i = threadIdx.x; i < (a.heads + a.kv_heads) * half; i += blockDim.x) {
        int head = i / half, j = i % half;
        float *p = a.qkv + (size_t)t * n + head * a.head_dim;
        float c = a.cos_sin[t * a.head_dim + j], s = a.cos_sin[t * a.head_dim + half + j], u = p[j], v = p[j + half];
        p[j] = bf16(u * c - v * s);
        p[j + half] = bf16(v * c + u * s);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.kv_heads * a.head_dim && slot >= 0; i += blockDim.x) {
        int head = i / a.head_dim, d = i % a.head_dim;
        size_t at = (((size_t)(slot / a.block_size) * a.kv_heads + head) * a.block_size + slot % a.block_size) *
                        a.head_dim + d;
        a.k[at] = __float2bfloat16(a.qkv[(size_t)t * n + (a.heads + head) * a.head_dim + d]);
        a.v[at] = __float2bfloat16(a.qkv[(size_t)t * n + (a.heads + a.kv_heads + head) * a.head_dim + d]);
    }
}

/* A block of 128 threads for a (token, head); scores in dynamic shared memory. */
static __global__ void ref_attention(RefAttention a)
{
    extern __shared__ float score[];
    __shared__ float q[128], sum;
    int t = blockIdx.x, head = blockIdx.y, n = (a.heads + 2 * a.kv_heads) * a.head_dim, length = a.seq_lens[t];
    int start = a.window > 0 && length > a.window ? length - a.window : 0, kv = head / (a.heads / a.kv_heads);
    const int32_t *table = a.block_tables + a.block_table_start[t];
    if (threadIdx.x < a.head_dim) {
        q[threadIdx.x] = a.qkv[(size_t)t * n + head * a.head_dim + threadIdx.x];
    }
    __syncthreads();
    for (int p = start + threadIdx.x; p < length; p += blockDim.x) {
        size_t at = (((size_t)table[p / a.block_size] * a.kv_heads + kv) * a.block_size + p % a.block_size) * a.head_dim;
        float s = 0;
        for (int d = 0; d < a.head_dim; d++) {
            s += q[d] * __bfloat162float(a.k[at + d]);
        }
        score[p - start] = s * a.scale;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float m = -INFINITY, total = 0;
        for (int p = 0; p < length - start; p++) {
            m = fmaxf(m, score[p]);
        }
        for (int p = 0; p < length - start; p++) {
            score[p] = expf(score[p] - m);
            total += score[p];
        }
        sum = total;
    }
    __syncthreads();
    if (threadIdx.x < a.head_dim) {
        float o = 0;
        for (int p = start; p < length; p++) {
            size_t at = (((size_t)table[p / a.block_size] * a.kv_heads + kv) * a.block_size + p % a.block_size) *
                            a.head_dim + threadIdx.x;
            o += score[p - start] * __bfloat162float(a.v[at]);
        }
        a.out[((size_t)t * a.heads + head) * a.head_dim + threadIdx.x] = length > 0 ? bf16(o / sum) : 0.0f;
    }
}

/* act = bf16(silu(gate) * up) of interleaved rows; padded rows are zero. */
static __global__ void ref_act(const float *gate_up, float *act, int size, int tokens)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size * tokens) {
        int t = i / size, j = i % size;
        const float *row = gate_up + (size_t)t * 2 * size + j / 8 * 16 + j % 8;
        act[i] = bf16(row[0] / (1.0f + expf(-row[0])) * row[8]);
    }
}

/* ---- a model ---------------------------------------------------------------------------------------------------- */

struct Shape {
    const char *name;
    int hidden, act, heads, kv_heads, head_dim, layers, vocab;
};

struct Model {
    Shape s;
    std::vector<qf_cuda_decode_layer> layers;
    qf_cuda_decode_args args = {};
    std::vector<int> windows;
    size_t kv_elements = 0;     /* of K or V of a layer */
    __nv_bfloat16 *ref_k, *ref_v; /* one layer's, the reference's */
    int max_len, block_size;
    size_t weight_bytes = 0;

    void count(const qf_cuda_weight &w)
    {
        weight_bytes += (size_t)w.n * w.k * w.bits / 8 + (w.bits == 16 ? 0 : (size_t)w.n * w.k / w.group_size * 4);
    }

    Model(const Shape &shape, int bits, int group, int head_bits, int max_seqs, int max_length, int block,
          const qf_cuda_device &device)
        : s(shape), max_len(max_length), block_size(block)
    {
        int kv_rows = (max_length + block - 1) / block * max_seqs + 1;
        kv_elements = (size_t)kv_rows * s.kv_heads * block * s.head_dim;
        for (int i = 0; i < s.layers; i++) {
            qf_cuda_decode_layer l = {};
            float multiplier = i % 2 ? 2.0f : 1.0f;
            l.qkv = make_weight((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden, bits, group, true, multiplier);
            l.o = make_weight(s.hidden, s.heads * s.head_dim, bits, group, false, multiplier);
            l.gate_up = make_weight(2 * s.act, s.hidden, bits, group, false, 1.0f);
            l.down = make_weight(s.hidden, (s.act + 127) / 128 * 128, bits, group, false, 1.0f);
            l.input_norm = make_floats(s.hidden, 1.0f, 0.5f);
            l.post_attention_norm = make_floats(s.hidden, 1.0f, 0.5f);
            __nv_bfloat16 *k = allocate<__nv_bfloat16>(kv_elements), *v = allocate<__nv_bfloat16>(kv_elements);
            fill_bf16<<<1024, 256>>>(k, kv_elements, next_seed++);
            fill_bf16<<<1024, 256>>>(v, kv_elements, next_seed++);
            l.k = k;
            l.v = v;
            count(l.qkv);
            count(l.o);
            count(l.gate_up);
            count(l.down);
            layers.push_back(l);
        }
        args.head = make_weight(s.vocab, s.hidden, head_bits, group, false, 1.0f);
        count(args.head);
        args.final_norm = make_floats(s.hidden, 1.0f, 0.5f);
        args.num_layers = s.layers;
        args.hidden_size = s.hidden;
        args.intermediate_size = s.act;
        args.num_heads = s.heads;
        args.num_kv_heads = s.kv_heads;
        args.head_dim = s.head_dim;
        args.block_size = block;
        args.eps = 1e-6f;
        args.scale = 1.0f / sqrtf((float)s.head_dim);
        put_layers();
        args.num_seqs = 1;
        size_t bytes = qf_cuda_decode_workspace_bytes(&args, &device, max_length);
        args.workspace = allocate<char>(bytes);
        CHECK_CUDA(cudaMemset(args.workspace, 0, bytes));
        ref_k = allocate<__nv_bfloat16>(kv_elements);
        ref_v = allocate<__nv_bfloat16>(kv_elements);
    }

    void put_layers()
    {
        qf_cuda_decode_layer *d = allocate<qf_cuda_decode_layer>(layers.size());
        CHECK_CUDA(cudaMemcpy(d, layers.data(), layers.size() * sizeof(layers[0]), cudaMemcpyHostToDevice));
        args.layers = d;
        args.host_layers = layers.data();
    }
};

/* One step's inputs. Blocks, from those of first_seq on, are dealt to the sequences in a scrambled order; length 0 is
 * padding. */
struct Step {
    Model &m;
    qf_cuda_decode_args args;
    std::vector<int> lengths;
    float *residual, *logits;

    Step(Model &model, const std::vector<int> &seq_lens, int first_seq = 0)
        : m(model), args(model.args), lengths(seq_lens)
    {
        int n = (int)lengths.size(), next = 0, blocks_a_seq = (m.max_len + m.block_size - 1) / m.block_size;
        int total = blocks_a_seq * n;
        std::vector<int32_t> tables, starts, slots;
        for (int t = 0; t < n; t++) {
            starts.push_back((int)tables.size());
            int blocks = (lengths[t] + m.block_size - 1) / m.block_size;
            for (int b = 0; b < blocks; b++) {
                tables.push_back(first_seq * blocks_a_seq + (int)((next++ * (int64_t)7919) % total));
            }
            int last = lengths[t] - 1;
            slots.push_back(last < 0 ? -1 : tables[starts[t] + last / m.block_size] * m.block_size + last % m.block_size);
        }
        tables.push_back(0);
        args.num_seqs = n;
        residual = make_floats((size_t)n * m.s.hidden, 0.0f, 2.0f);
        logits = allocate<float>((size_t)n * m.s.vocab);
        args.residual = residual;
        args.logits = logits;
        args.cos_sin = make_floats((size_t)n * m.s.head_dim, 0.5f, 0.5f);
        args.block_tables = put(tables);
        args.block_table_start = put(starts);
        args.slot_mapping = put(slots);
        args.seq_lens = put(lengths);
    }
    static const int32_t *put(const std::vector<int> &v)
    {
        int32_t *p = allocate<int32_t>(v.size());
        CHECK_CUDA(cudaMemcpy(p, v.data(), v.size() * 4, cudaMemcpyHostToDevice));
        return p;
    }
    size_t size() const { return lengths.size() * (size_t)m.s.vocab; }
    std::vector<float> get() const
    {
        std::vector<float> v(size());
        CHECK_CUDA(cudaMemcpy(v.data(), logits, size() * 4, cudaMemcpyDeviceToHost));
        return v;
    }

    /* The reference's logits. Also compares the new keys and values that the kernel left in the cache, if `written`. */
    std::vector<float> reference(bool written)
    {
        const Shape &s = m.s;
        int n = (int)lengths.size(), nq = (s.heads + 2 * s.kv_heads) * s.head_dim;
        float *h = allocate<float>((size_t)n * s.hidden), *x = allocate<float>((size_t)n * s.hidden);
        float *qkv = allocate<float>((size_t)n * nq), *att = allocate<float>((size_t)n * s.heads * s.head_dim);
        float *gu = allocate<float>((size_t)n * 2 * s.act), *act = allocate<float>((size_t)n * s.act);
        float *r = allocate<float>(8), *out = allocate<float>(size());
        CHECK_CUDA(cudaMemcpy(h, residual, (size_t)n * s.hidden * 4, cudaMemcpyDeviceToDevice));
        for (const qf_cuda_decode_layer &l : m.layers) {
            CHECK_CUDA(cudaMemcpy(m.ref_k, l.k, m.kv_elements * 2, cudaMemcpyDeviceToDevice));
            CHECK_CUDA(cudaMemcpy(m.ref_v, l.v, m.kv_elements * 2, cudaMemcpyDeviceToDevice));
            ref_norm<<<n, 256>>>(h, l.input_norm, x, r, s.hidden, args.eps);
            ref_linear<<<(nq + 7) / 8, 256>>>(l.qkv, x, s.hidden, r, qkv, n, false);
            RefAttention a = {qkv,      att,        args.cos_sin,     m.ref_k,        m.ref_v,
                              args.slot_mapping, args.seq_lens, args.block_tables, args.block_table_start,
                              s.heads,  s.kv_heads, s.head_dim, m.block_size, l.sliding_window, args.scale};
            ref_rope<<<n, 256>>>(a);
            if (written) {
                compare_cache(l);
            }
            ref_attention<<<dim3(n, s.heads), 128, 8192>>>(a);
            ref_linear<<<(s.hidden + 7) / 8, 256>>>(l.o, att, s.heads * s.head_dim, nullptr, h, n, true);
            ref_norm<<<n, 256>>>(h, l.post_attention_norm, x, r, s.hidden, args.eps);
            ref_linear<<<(2 * s.act + 7) / 8, 256>>>(l.gate_up, x, s.hidden, r, gu, n, false);
            ref_act<<<(s.act * n + 255) / 256, 256>>>(gu, act, s.act, n);
            ref_linear<<<(s.hidden + 7) / 8, 256>>>(l.down, act, s.act, nullptr, h, n, true);
        }
        ref_norm<<<n, 256>>>(h, args.final_norm, x, r, s.hidden, args.eps);
        ref_linear<<<(s.vocab + 7) / 8, 256>>>(args.head, x, s.hidden, r, out, n, false);
        std::vector<float> v(size());
        CHECK_CUDA(cudaMemcpy(v.data(), out, size() * 4, cudaMemcpyDeviceToHost));
        return v;
    }
    /* Nothing but the newest rows may differ at all, and those by rounding. */
    void compare_cache(const qf_cuda_decode_layer &l)
    {
        std::vector<uint16_t> a(m.kv_elements), b(m.kv_elements);
        for (int which = 0; which < 2; which++) {
            CHECK_CUDA(cudaMemcpy(a.data(), which ? l.v : l.k, m.kv_elements * 2, cudaMemcpyDeviceToHost));
            CHECK_CUDA(cudaMemcpy(b.data(), which ? m.ref_v : m.ref_k, m.kv_elements * 2, cudaMemcpyDeviceToHost));
            std::vector<float> mine, theirs;
            for (size_t i = 0; i < a.size(); i++) {
                if (a[i] != b[i]) {
                    mine.push_back(bf16_value(a[i]));
                    theirs.push_back(bf16_value(b[i]));
                }
            }
            CHECK(mine.size() <= lengths.size() * m.s.kv_heads * m.s.head_dim);
            CHECK(relative_error(mine, theirs, mine.size()) < 0.02);
        }
    }
};

static const double tolerance = 6e-3;

/* Real rows against the reference. */
static double worst_error(const Step &step, const std::vector<float> &mine, const std::vector<float> &theirs)
{
    double worst = 0;
    for (size_t t = 0; t < step.lengths.size(); t++) {
        size_t at = t * (size_t)step.m.s.vocab;
        worst = std::max(worst, relative_error(&mine[at], &theirs[at], (size_t)step.m.s.vocab));
    }
    return worst;
}

static void run_checked(Step &step, const qf_cuda_decode_options &options, const Options &o, const char *what)
{
    CHECK(qf_cuda_decode_supported(&step.args, &o.device));
    CHECK_CUDA(cudaMemset(step.logits, 0xff, step.size() * 4));
    CHECK_OK(qf_cuda_decode_with(&step.args, &options, &o.device, 0, &check_error));
    CHECK_CUDA(cudaDeviceSynchronize());
    uint32_t error;
    CHECK_CUDA(cudaMemcpy(&error, step.args.workspace, 4, cudaMemcpyDeviceToHost));
    std::vector<float> first = step.get(), expected = step.reference(true);
    double worst = worst_error(step, first, expected);
    if (!(worst < tolerance) || error != 0) {
        fprintf(stderr, "%s: relative error %.2e, error word %u\n", what, worst, error);
        check_failures++;
    }
    if (error != 0) {
        fprintf(stderr, "a wait gave up; the rest would tell nothing\n");
        exit(1);
    }
    CHECK_OK(qf_cuda_decode_with(&step.args, &options, &o.device, 0, &check_error));
    std::vector<float> second = step.get();
    CHECK(memcmp(first.data(), second.data(), first.size() * 4) == 0);
}

static const qf_cuda_decode_options plain = {0, 0, nullptr};

static const std::vector<std::vector<int>> batches = {
    {1}, {5}, {64}, {65}, {128}, {300}, {1000}, {257}, {129}, {0}, {256}, {600}};

static void test_shape(const Shape &shape, int head_bits, int block, bool window, const Options &o,
                       size_t first = 0, size_t step_size = 1)
{
    char what[256];
    {
        Model m(shape, 4, 128, head_bits, 1, 1000, block, o.device);
        if (window) {
            m.layers[m.layers.size() - 1].sliding_window = 100;
            m.put_layers();
        }
        for (size_t i = first; i < batches.size(); i += step_size) {
            snprintf(what, sizeof what, "%s head %d block %d window %d length %d", shape.name, head_bits, block, window,
                     batches[i][0]);
            Step step(m, batches[i]);
            run_checked(step, plain, o, what);
        }
    }
    free_all();
}

/* Many steps in a row in graphs, of several lengths by turns, which share a workspace: always the same bits. */
static void test_many_steps(const Shape &shape, const Options &o)
{
    Model m(shape, 4, 128, 16, 24, 1000, 32, o.device);
    std::vector<Step> steps;
    int seqs = 0;
    std::vector<std::vector<float>> expected;
    for (size_t i : {(size_t)5, batches.size() - 2, (size_t)9, (size_t)0, batches.size() - 1, (size_t)6}) {
        steps.emplace_back(m, batches[i], seqs);
        seqs += (int)batches[i].size();
        CHECK_OK(qf_cuda_decode(&steps.back().args, &o.device, 0, &check_error));
        expected.push_back(steps.back().get());
    }
    CHECK(seqs <= 24);
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreate(&stream));
    std::vector<cudaGraphExec_t> graphs;
    for (Step &s : steps) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < 3; i++) {
            CHECK_OK(qf_cuda_decode(&s.args, &o.device, stream, &check_error));
        }
        CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CHECK_CUDA(cudaGraphDestroy(graph));
        graphs.push_back(exec);
    }
    int different = 0;
    for (int round = 0; round < 40; round++) {
        size_t i = (size_t)round * 5 % steps.size(), repeats = 1 + (size_t)round % 7;
        CHECK_CUDA(cudaMemsetAsync(steps[i].logits, 0xff, steps[i].size() * 4, stream));
        for (size_t k = 0; k < repeats; k++) {
            CHECK_CUDA(cudaGraphLaunch(graphs[i], stream));
        }
        CHECK_CUDA(cudaStreamSynchronize(stream));
        std::vector<float> v = steps[i].get();
        different += memcmp(v.data(), expected[i].data(), v.size() * 4) != 0;
    }
    CHECK(different == 0);
    for (cudaGraphExec_t g : graphs) {
        cudaGraphExecDestroy(g);
    }
    cudaStreamDestroy(stream);
    steps.clear();
    free_all();
}

/* Each must be refused, or it would hang or read astray. */
static void test_unsupported(const Shape &shape, const Options &o)
{
    Model m(shape, 4, 128, 16, 1, 64, 32, o.device);
    Step step(m, {5});
    CHECK(qf_cuda_decode_supported(&step.args, &o.device));
    qf_cuda_decode_args bad = step.args;
    bad.num_seqs = 2;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    bad = step.args;
    bad.head_dim = 96;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    std::vector<qf_cuda_decode_layer> layers = m.layers;
    bad = step.args;
    bad.host_layers = layers.data();
    layers[1].down.data = nullptr;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    layers = m.layers;
    layers[1].down.perm = (const int32_t *)step.args.seq_lens;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    layers = m.layers;
    layers[0].gate_up.bits = 8;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    layers = m.layers;
    layers[0].gate_up.group_size = 64;
    CHECK(!qf_cuda_decode_supported(&bad, &o.device));
    qf_cuda_device small = o.device;
    small.max_shared_bytes = 48 * 1024;
    CHECK(!qf_cuda_decode_supported(&step.args, &small));
    qf_error error;
    CHECK(qf_cuda_decode(&step.args, &small, 0, &error) == QF_ERROR_NOT_IMPLEMENTED);
    bad = step.args;
    bad.logits = nullptr;
    CHECK(qf_cuda_decode(&bad, &o.device, 0, &error) == QF_ERROR_INVALID_ARGUMENT);
    free_all();
}

/* ---- timing ----------------------------------------------------------------------------------------------------- */

static double bench_step(Step &step, const qf_cuda_decode_options &options, const Options &o)
{
    double us = time_us(
        [&](cudaStream_t stream, int) {
            CHECK_OK(qf_cuda_decode_with(&step.args, &options, &o.device, stream, &check_error));
        },
        8, 9);
    uint32_t error;
    CHECK_CUDA(cudaMemcpy(&error, step.args.workspace, 4, cudaMemcpyDeviceToHost));
    if (error != 0) {
        fprintf(stderr, "a wait gave up; the rest would tell nothing\n");
        exit(1);
    }
    return us;
}

/* The layer's critical path: when the earliest, the mean and the latest CTA come by each stamp, in microseconds after the
 * earliest start of the layer's qkv; means over all layers but the first. Clocks of different multiprocessors are put on
 * one scale by the common nanoseconds, whose steps are coarse: by the median of the differences. */
static void timeline(Step &step, qf_cuda_decode_options options, const Options &o)
{
    static const char *const kinds[5] = {"qkv", "o", "gate_up", "down", "head"};
    static const char *const names[QF_STAMP_GLOBAL] = {"start", "q", "tiles", "published", "gathered", "x", "units", "end"};
    const int steps = 4 * step.m.s.layers + 1, ctas = o.device.sm_count;
    const size_t count = (size_t)ctas * steps * QF_STAMPS;
    long long *stamps = allocate<long long>(count);
    std::vector<long long> v(count);
    CHECK_CUDA(cudaMemset(stamps, 0, count * 8));
    options.stamps = stamps;
    for (int i = 0; i < 3; i++) {
        CHECK_OK(qf_cuda_decode_with(&step.args, &options, &o.device, 0, &check_error));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(v.data(), stamps, count * 8, cudaMemcpyDeviceToHost));
    auto at = [&](int cta, int i, int stamp) { return v[((size_t)cta * steps + i) * QF_STAMPS + stamp]; };
    double clocks = 0, nanoseconds = 0;
    int used = 0;
    for (int c = 0; c < ctas; c++) {
        if (at(c, 0, 0) != 0) {
            clocks += (double)(at(c, steps - 1, QF_STAMP_START) - at(c, 0, QF_STAMP_START));
            nanoseconds += (double)(at(c, steps - 1, QF_STAMP_GLOBAL) - at(c, 0, QF_STAMP_GLOBAL));
            used++;
        }
    }
    const double period = nanoseconds / clocks; /* nanoseconds a clock */
    std::vector<double> offset(ctas, 0.0);
    for (int c = 0; c < ctas; c++) {
        std::vector<double> seen;
        for (int i = 0; i < steps && at(c, 0, 0) != 0; i++) {
            seen.push_back((double)(at(c, i, QF_STAMP_GLOBAL) - at(0, 0, QF_STAMP_GLOBAL)) -
                           (double)(at(c, i, QF_STAMP_START) - at(c, 0, QF_STAMP_START)) * period);
        }
        if (!seen.empty()) {
            std::sort(seen.begin(), seen.end());
            offset[c] = seen[seen.size() / 2];
        }
    }
    auto time = [&](int cta, int i, int stamp) {
        return offset[cta] + (double)(at(cta, i, stamp) - at(cta, 0, QF_STAMP_START)) * period;
    };
    printf("    timeline, us after the layer's start: earliest mean latest (CTAs); %.2f GHz\n", 1 / period);
    for (int kind = 0; kind < 5; kind++) {
        printf("      %-8s", kinds[kind]);
        for (int stamp = 0; stamp < QF_STAMP_GLOBAL; stamp++) {
            double first = 0, mean = 0, last = 0, have = 0;
            int layers = 0;
            for (int i = kind == 4 ? steps - 1 : 4 + kind; i < steps - (kind != 4); i += 4) {
                double base = 1e30, low = 1e30, high = -1e30, sum = 0;
                int n = 0;
                for (int c = 0; c < ctas; c++) {
                    if (at(c, 0, 0) != 0) {
                        base = std::min(base, time(c, i - (kind == 4 ? 0 : kind), QF_STAMP_START));
                    }
                    if (at(c, i, stamp) != 0) {
                        double t = time(c, i, stamp);
                        low = std::min(low, t);
                        high = std::max(high, t);
                        sum += t;
                        n++;
                    }
                }
                if (n > 0) {
                    first += low - base;
                    last += high - base;
                    mean += sum / n - base;
                    have += n;
                    layers++;
                }
            }
            if (layers > 0) {
                double k = 1e-3 / layers;
                printf("| %s %.2f %.2f %.2f (%.0f) ", names[stamp], first * k, mean * k, last * k, have / layers);
            }
        }
        printf("\n");
    }
}

static void bench_line(Model &m, const char *what, const std::vector<int> &lengths, const qf_cuda_decode_options &options,
                       const Options &o, bool with_timeline)
{
    Step step(m, lengths);
    if (!qf_cuda_decode_supported(&step.args, &o.device)) {
        printf("  %-34s batch %zu: not supported\n", what, lengths.size());
        return;
    }
    double bytes = (double)m.weight_bytes, us = bench_step(step, options, o);
    for (int length : lengths) {
        bytes += 4.0 * length * m.s.kv_heads * m.s.head_dim * m.s.layers;
    }
    printf("  %-34s batch %zu context %5d: %8.1f us, %7.0f tok/s, %.3f GB, %.2f TB/s (%.0f %% of 4.4)\n", what,
           lengths.size(), lengths[0], us, 1e6 * (double)lengths.size() / us, bytes / 1e9, bytes / us / 1e6,
           bytes / us / 1e6 / 4.4 * 100);
    if (with_timeline) {
        timeline(step, options, o);
    }
    fflush(stdout);
}

static void bench_model(const Shape &shape, int head_bits, int max_len, bool variants, const Options &o)
{
    char what[64];
    Model m(shape, 4, 128, head_bits, max_len > 8192 ? 1 : 4, max_len, 32, o.device);
    CHECK_CUDA(cudaDeviceSynchronize());
    snprintf(what, sizeof what, "%s head %d", shape.name, head_bits);
    if (max_len > 8192) {
        bench_line(m, what, {max_len}, plain, o, true);
    } else {
        bench_line(m, what, {256}, plain, o, true);
    }
    if (variants) {
        struct {
            const char *name;
            qf_cuda_decode_options options;
        } list[] = {{"  2 stages", {2, 0, nullptr}}, {"  3 stages", {3, 0, nullptr}}, {"  down in 1 range", {0, 1, nullptr}},
                    {"  down in 2 ranges", {0, 2, nullptr}}};
        for (auto &v : list) {
            bench_line(m, v.name, {256}, v.options, o, false);
        }
    }
    free_all();
}

int main(int argc, char **argv)
{
    Options o = check_options(argc, argv);
    const Shape demo = {"demo", 384, 1024, 6, 2, 64, 3, 512}, demo_wide = {"demo", 384, 1024, 6, 2, 64, 3, 8192};
    const Shape small = {"0.5B", 896, 4864, 14, 2, 64, 2, 151936}, middle = {"1.5B", 1536, 8960, 12, 2, 128, 2, 8192};
    const Shape large = {"7B", 3584, 18944, 28, 4, 128, 2, 8192};
    test_unsupported(demo, o);
    if (check_brief) {
        test_shape(demo, 8, 32, false, o, 1, 3);
        return check_report("decode");
    }
    test_shape(demo, 16, 16, false, o);
    test_shape(demo_wide, 16, 32, true, o);
    test_shape(demo, 8, 32, false, o, 1, 3);
    test_shape(demo, 4, 128, true, o, 2, 3);
    test_many_steps(demo_wide, o);
    test_shape(small, 16, 32, false, o, 3, 4);
    test_shape(small, 8, 32, false, o, 5, 6);
    test_shape(middle, 16, 16, true, o, 1, 4);
    test_shape(large, 16, 32, false, o, 2, 4);
    test_many_steps(large, o);
    if (o.bench && check_failures == 0) {
        printf("decode: one launch a step\n");
        const Shape full_small = {"0.5B", 896, 4864, 14, 2, 64, 24, 151936};
        const Shape full_large = {"7B", 3584, 18944, 28, 4, 128, 28, 152064};
        bench_model(full_small, 16, 256, true, o);
        bench_model(full_small, 8, 256, false, o);
        bench_model(full_large, 16, 256, true, o);
        bench_model(full_large, 16, 32768, false, o);
    }
    return check_report("decode");
}
