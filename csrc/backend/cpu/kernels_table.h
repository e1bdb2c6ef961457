/* The end of each kernels_<isa>.c: the table of what was compiled. */
const qf_cpu_kernels QF_KERNELS_NAME = {
    .rows_per_block = QF_ROWS_PER_BLOCK,
    .quantize_rows = quantize_rows,
    .linear_i8 = linear_i8,
    .linear_f32 = linear_f32,
    .attention_split = attention_split,
    .attention_merge = attention_merge,
    .attention_finish = attention_finish,
    .rmsnorm_row = rmsnorm_row,
    .silu_mul = silu_mul,
    .widen_row = widen_row,
    .rope_head = rope_head,
};
