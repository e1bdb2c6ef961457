/* Models of random weights for the decode kernel, alone or as the ranks of one; plain kernels that compute its step one op
 * at a time; and where the time of a layer goes. */
#ifndef DECODE_MODEL_CUH
#define DECODE_MODEL_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

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

static std::vector<std::pair<int, void *>> allocations; /* device, memory */
static uint64_t next_seed = 1;

template <typename T> static T *allocate(size_t count)
{
    void *p;
    int device;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaMalloc(&p, count * sizeof(T) + 256));
    allocations.emplace_back(device, p);
    return (T *)p;
}
static void free_all()
{
    int device;
    CHECK_CUDA(cudaGetDevice(&device));
    for (const auto &p : allocations) {
        CHECK_CUDA(cudaSetDevice(p.first));
        CHECK_CUDA(cudaFree(p.second));
    }
    CHECK_CUDA(cudaSetDevice(device));
    allocations.clear();
}

/* All devices on which something is. */
static void synchronize_all()
{
    int device;
    CHECK_CUDA(cudaGetDevice(&device));
    for (size_t i = 0; i < allocations.size(); i++) {
        if (i == 0 || allocations[i].first != allocations[i - 1].first) {
            CHECK_CUDA(cudaSetDevice(allocations[i].first));
            CHECK_CUDA(cudaDeviceSynchronize());
        }
    }
    CHECK_CUDA(cudaSetDevice(device));
}

/* seed 0: one of its own, here and below */
static float *make_floats(size_t count, float centre, float width, uint64_t seed = 0)
{
    float *p = allocate<float>(count);
    fill_floats<<<512, 256>>>(p, count, seed != 0 ? seed : next_seed++, centre, width);
    return p;
}

static qf_cuda_weight make_weight(int n, int k, int bits, int group, bool bias, float multiplier, uint64_t seed = 0)
{
    qf_cuda_weight w = {};
    size_t words = (size_t)n * k * bits / 32;
    uint32_t *data = allocate<uint32_t>(words);
    fill_words<<<1024, 256>>>(data, words, seed != 0 ? seed : next_seed++, bits == 16 ? 0x80ff80ffu : ~0u, bits == 16 ? 0x3c003c00u : 0);
    w.data = data;
    if (bits != 16) {
        size_t count = (size_t)n * (k / group);
        uint32_t *scales = allocate<uint32_t>(count);
        fill_scales<<<512, 256>>>(scales, count, seed != 0 ? seed + 1 : next_seed++, bits);
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

    /* seed: of what ranks of one model have alike, the norms and (so that logits can be compared) the head. */
    Model(const Shape &shape, int bits, int group, int head_bits, int max_seqs, int max_length, int block,
          const qf_cuda_device &device, uint64_t seed = 0)
        : s(shape), max_len(max_length), block_size(block)
    {
        auto of_all = [&](int i) { return seed == 0 ? 0 : seed + 2 * (uint64_t)i; };
        int kv_rows = (max_length + block - 1) / block * max_seqs + 1;
        kv_elements = (size_t)kv_rows * s.kv_heads * block * s.head_dim;
        for (int i = 0; i < s.layers; i++) {
            qf_cuda_decode_layer l = {};
            float multiplier = i % 2 ? 2.0f : 1.0f;
            l.qkv = make_weight((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden, bits, group, true, multiplier);
            l.o = make_weight(s.hidden, (s.heads * s.head_dim + 127) / 128 * 128, bits, group, false, multiplier);
            l.gate_up = make_weight(2 * s.act, s.hidden, bits, group, false, 1.0f);
            l.down = make_weight(s.hidden, (s.act + 127) / 128 * 128, bits, group, false, 1.0f);
            l.input_norm = make_floats(s.hidden, 1.0f, 0.5f, of_all(2 * i + 2));
            l.post_attention_norm = make_floats(s.hidden, 1.0f, 0.5f, of_all(2 * i + 3));
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
        args.head = make_weight(s.vocab, s.hidden, head_bits, group, false, 1.0f, of_all(0));
        count(args.head);
        args.final_norm = make_floats(s.hidden, 1.0f, 0.5f, of_all(1));
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

    Step(Model &model, const std::vector<int> &seq_lens, int first_seq = 0, uint64_t seed = 0)
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
        residual = make_floats((size_t)n * m.s.hidden, 0.0f, 2.0f, seed);
        logits = allocate<float>((size_t)n * m.s.vocab);
        args.residual = residual;
        args.logits = logits;
        args.cos_sin = make_floats((size_t)n * m.s.head_dim, 0.5f, 0.5f, seed == 0 ? 0 : seed + 1);
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
};

/* Of the cache of a layer nothing but the newest rows may differ from the reference's at all, and those by rounding. */
static void compare_cache(const Step &step, const qf_cuda_decode_layer &l)
{
    const Model &m = step.m;
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
        CHECK(mine.size() <= step.lengths.size() * m.s.kv_heads * m.s.head_dim);
        CHECK(relative_error(mine, theirs, mine.size()) < 0.02);
    }
}

/* The reference's logits of the same step on all ranks of a model, each rank's part; computed on the current device. The
 * kernel has run: also compares the new keys and values that it left in the cache. */
static std::vector<std::vector<float>> reference(const std::vector<Step *> &ranks)
{
    const Step &any = *ranks[0];
    const Shape &s = any.m.s;
    const int n = (int)any.lengths.size();
    float *h = allocate<float>((size_t)n * s.hidden), *x = allocate<float>((size_t)n * s.hidden), *r = allocate<float>(8);
    std::vector<float *> qkv, att, gu, act;
    for (const Step *step : ranks) {
        const Shape &own = step->m.s;
        qkv.push_back(allocate<float>((size_t)n * (own.heads + 2 * own.kv_heads) * own.head_dim));
        att.push_back(allocate<float>((size_t)n * own.heads * own.head_dim));
        gu.push_back(allocate<float>((size_t)n * 2 * own.act));
        act.push_back(allocate<float>((size_t)n * own.act));
    }
    CHECK_CUDA(cudaMemcpy(h, any.residual, (size_t)n * s.hidden * 4, cudaMemcpyDefault));
    for (size_t i = 0; i < any.m.layers.size(); i++) {
        ref_norm<<<n, 256>>>(h, any.m.layers[i].input_norm, x, r, s.hidden, any.args.eps);
        for (size_t k = 0; k < ranks.size(); k++) {
            const Step &step = *ranks[k];
            const Model &m = step.m;
            const Shape &own = m.s;
            const qf_cuda_decode_layer &l = m.layers[i];
            const int nq = (own.heads + 2 * own.kv_heads) * own.head_dim;
            CHECK_CUDA(cudaMemcpy(m.ref_k, l.k, m.kv_elements * 2, cudaMemcpyDefault));
            CHECK_CUDA(cudaMemcpy(m.ref_v, l.v, m.kv_elements * 2, cudaMemcpyDefault));
            synchronize_all();
            ref_linear<<<(nq + 7) / 8, 256>>>(l.qkv, x, own.hidden, r, qkv[k], n, false);
            RefAttention a = {qkv[k],
                              att[k],
                              step.args.cos_sin,
                              m.ref_k,
                              m.ref_v,
                              step.args.slot_mapping,
                              step.args.seq_lens,
                              step.args.block_tables,
                              step.args.block_table_start,
                              own.heads,
                              own.kv_heads,
                              own.head_dim,
                              m.block_size,
                              l.sliding_window,
                              step.args.scale};
            ref_rope<<<n, 256>>>(a);
            compare_cache(step, l);
            ref_attention<<<dim3(n, own.heads), 128, 8192>>>(a);
            ref_linear<<<(own.hidden + 7) / 8, 256>>>(l.o, att[k], own.heads * own.head_dim, nullptr, h, n, true);
        }
        ref_norm<<<n, 256>>>(h, any.m.layers[i].post_attention_norm, x, r, s.hidden, any.args.eps);
        for (size_t k = 0; k < ranks.size(); k++) {
            const Shape &own = ranks[k]->m.s;
            const qf_cuda_decode_layer &l = ranks[k]->m.layers[i];
            ref_linear<<<(2 * own.act + 7) / 8, 256>>>(l.gate_up, x, own.hidden, r, gu[k], n, false);
            ref_act<<<(own.act * n + 255) / 256, 256>>>(gu[k], act[k], own.act, n);
            ref_linear<<<(own.hidden + 7) / 8, 256>>>(l.down, act[k], own.act, nullptr, h, n, true);
        }
    }
    ref_norm<<<n, 256>>>(h, any.args.final_norm, x, r, s.hidden, any.args.eps);
    std::vector<std::vector<float>> logits;
    for (const Step *step : ranks) {
        float *out = allocate<float>(step->size());
        ref_linear<<<(step->m.s.vocab + 7) / 8, 256>>>(step->args.head, x, s.hidden, r, out, n, false);
        logits.emplace_back(step->size());
        CHECK_CUDA(cudaMemcpy(logits.back().data(), out, step->size() * 4, cudaMemcpyDeviceToHost));
    }
    return logits;
}

/* ---- where the time goes ----------------------------------------------------------------------------------------- */

/* run(stamps) enqueues the step once. The layer's critical path: when the earliest, the mean and the latest CTA come by each stamp, in microseconds after the
 * earliest start of the layer's qkv; means over all layers but the first. Clocks of different multiprocessors are put on
 * one scale by the common nanoseconds, whose steps are coarse: by the median of the differences. */
template <typename Run> static void timeline(Step &step, const qf_cuda_device &device, Run run)
{
    static const char *const kinds[5] = {"qkv", "o", "gate_up", "down", "head"};
    static const char *const names[QF_STAMP_GLOBAL] = {"start", "q", "tiles", "published", "gathered", "x", "units", "end"};
    const int steps = 4 * step.m.s.layers + 1, ctas = device.sm_count;
    const size_t count = (size_t)ctas * steps * QF_STAMPS;
    long long *stamps = allocate<long long>(count);
    std::vector<long long> v(count);
    CHECK_CUDA(cudaMemset(stamps, 0, count * 8));
    for (int i = 0; i < 3; i++) {
        run(stamps);
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

#endif
