/* exp over sixteen lanes: 2^n * p(r) with n = nearest(x / ln 2), r = x - n ln 2 in two steps, p of degree 6.
 * Relative error below 2e-7; 0 below -87.33, infinity above 88.72, NaN stays NaN. Subnormal results become 0. */
QF_INLINE vf vf_exp(vf x)
{
    const vf lowest = vf_set1(-87.33654f), highest = vf_set1(88.72283f);
    const vf inside = vf_select_lt(x, lowest, lowest, vf_select_lt(highest, x, highest, x));
    const vi steps = vi_round_vf(vf_mul(inside, vf_set1(1.44269504f)));
    const vf n = vf_from_vi(steps);
    vf r = vf_fnma(n, vf_set1(0x1.62e4p-1f), inside);
    r = vf_fnma(n, vf_set1(1.42860677e-6f), r);
    vf p = vf_set1(1.0f / 720.0f);
    p = vf_fma(p, r, vf_set1(1.0f / 120.0f));
    p = vf_fma(p, r, vf_set1(1.0f / 24.0f));
    p = vf_fma(p, r, vf_set1(1.0f / 6.0f));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    /* 2^n in two factors: n reaches 128, whose exponent field alone would be that of infinity. */
    const vi half = vi_sub(vi_srl(vi_add(steps, vi_set1(256)), 1), vi_set1(128));
    const vi bias = vi_set1(127);
    p = vf_mul(p, vf_bits(vi_sll(vi_add(half, bias), 23)));
    p = vf_mul(p, vf_bits(vi_sll(vi_add(vi_sub(steps, half), bias), 23)));
    p = vf_select_lt(x, lowest, vf_set1(0.0f), p);
    return vf_select_lt(highest, x, vf_set1(__builtin_inff()), p);
}
