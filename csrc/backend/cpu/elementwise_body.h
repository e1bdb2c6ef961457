/* Row operations: rmsnorm, silu(gate) * up, widening a row to float32, rotary embedding of one head. All of them
 * read and write each element once (bound by cache or memory); a row's reductions run over sixteen lanes, lane i
 * taking elements i, i + 16, ..., and end in one fixed tree. */

QF_INLINE vf load_row(const float *p, int32_t left) { return left >= 16 ? vf_load(p) : vf_load_part(p, left); }

QF_INLINE void store_row(float *p, vf a, int32_t left)
{
    if (left >= 16) {
        vf_store(p, a);
    } else {
        vf_store_part(p, a, left);
    }
}

static void rmsnorm_row(float *residual, const float *delta, const float *weight, float *out, int32_t n, float eps)
{
    vf squares = vf_set1(0.0f);
    for (int32_t i = 0; i < n; i += 16) {
        vf v = load_row(residual + i, n - i);
        if (delta != NULL) {
            v = vf_add(v, load_row(delta + i, n - i));
            store_row(residual + i, v, n - i);
        }
        squares = vf_fma(v, v, squares);
    }
    if (out == NULL) {
        return;
    }
    const vf inverse = vf_set1(1.0f / __builtin_sqrtf(vf_reduce_add(squares) / (float)n + eps));
    for (int32_t i = 0; i < n; i += 16) {
        vf v = vf_mul(load_row(residual + i, n - i), inverse);
        store_row(out + i, vf_mul(v, load_row(weight + i, n - i)), n - i);
    }
}

/* silu(g) = g / (1 + exp(-g)); where exp overflows the quotient is -0, as it should be. */
static void silu_mul(const float *gate, const float *up, float *out, int32_t n)
{
    const vf one = vf_set1(1.0f);
    for (int32_t i = 0; i < n; i += 16) {
        vf g = load_row(gate + i, n - i);
        vf silu = vf_div(g, vf_add(one, vf_exp(vf_sub(vf_set1(0.0f), g))));
        store_row(out + i, vf_mul(silu, load_row(up + i, n - i)), n - i);
    }
}

static void widen_row(const void *row, qf_dtype dtype, float *out, int32_t n)
{
    if (dtype == QF_DTYPE_F32) {
        memcpy(out, row, (size_t)n * sizeof *out);
        return;
    }
    const uint16_t *halves = row;
    const bool bf16 = dtype == QF_DTYPE_BF16;
    int32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        vf_store(out + i, bf16 ? vf_load_bf16(halves + i) : vf_load_f16(halves + i));
    }
    for (; i < n; i++) {
        out[i] = bf16 ? qf_bf16_to_f32(halves[i]) : qf_f16_to_f32(halves[i]);
    }
}

/* (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (j, j + head_dim / 2). */
static void rope_head(const float *x, const float *cos_sin, float *out, int32_t head_dim)
{
    const int32_t half = head_dim / 2;
    for (int32_t i = 0; i < half; i += 16) {
        const int32_t left = half - i;
        const vf a = load_row(x + i, left), b = load_row(x + half + i, left);
        const vf c = load_row(cos_sin + i, left), s = load_row(cos_sin + half + i, left);
        const vf first = vf_fnma(b, s, vf_mul(a, c));
        const vf second = vf_fma(a, s, vf_mul(b, c));
        store_row(out + i, first, left);
        store_row(out + half + i, second, left);
    }
}
