/* Finding, checking and converting the tensors of a checkpoint. */
#include <stdio.h>

#include "base/alloc.h"
#include "model/linear_formats.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors are little-endian and are read in place"
#endif

#define MAX_NAME_BYTES 160

static bool join_name(const char *name, const char *suffix, char *buffer)
{
    int n = snprintf(buffer, MAX_NAME_BYTES, "%s%s", name, suffix);
    return n > 0 && n < MAX_NAME_BYTES;
}

bool qf_has_tensor(const qf_shards *shards, const char *name, const char *suffix)
{
    char full[MAX_NAME_BYTES];
    return join_name(name, suffix, full) && qf_shards_find(shards, full) != NULL;
}

static void format_shape(const qf_tensor *tensor, char *buffer, size_t size)
{
    size_t used = 0;
    buffer[0] = '\0';
    for (int32_t i = 0; i < tensor->rank && used < size; i++) {
        int n = snprintf(buffer + used, size - used, "%s%lld", i > 0 ? ", " : "", (long long)tensor->shape[i]);
        used += n > 0 ? (size_t)n : 0;
    }
}

static void format_dtypes(uint32_t dtypes, char *buffer, size_t size)
{
    size_t used = 0;
    buffer[0] = '\0';
    for (int i = 0; i < QF_DTYPE_COUNT && used < size; i++) {
        if ((dtypes & QF_DTYPE_BIT(i)) != 0) {
            int n = snprintf(buffer + used, size - used, "%s%s", used > 0 ? " or " : "", qf_dtype_name((qf_dtype)i));
            used += n > 0 ? (size_t)n : 0;
        }
    }
}

qf_status qf_find_tensor(const qf_shards *shards, const qf_tensor_spec *spec, bool required, qf_tensor *out,
                         qf_error *err)
{
    char full[MAX_NAME_BYTES];
    memset(out, 0, sizeof *out);
    const qf_tensor *found = join_name(spec->name, spec->suffix, full) ? qf_shards_find(shards, full) : NULL;
    if (found == NULL) {
        return required ? QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%s%s\" is missing from the checkpoint", spec->name,
                                  spec->suffix)
                        : QF_OK;
    }
    if ((spec->dtypes & QF_DTYPE_BIT(found->dtype)) == 0) {
        char expected[64];
        format_dtypes(spec->dtypes, expected, sizeof expected);
        return QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%s\" has dtype %s; expected %s", full,
                       qf_dtype_name(found->dtype), expected);
    }
    int32_t rank = spec->dim1 < 0 ? 1 : 2;
    if (found->rank != rank || found->shape[0] != spec->dim0 || (rank == 2 && found->shape[1] != spec->dim1)) {
        char shape[96], expected[64];
        qf_tensor wanted = {.rank = rank, .shape = {spec->dim0, spec->dim1}};
        format_shape(found, shape, sizeof shape);
        format_shape(&wanted, expected, sizeof expected);
        return QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%s\" has shape (%s); expected (%s) by config.json", full, shape,
                       expected);
    }
    *out = *found;
    return QF_OK;
}

qf_status qf_check_scales(const qf_tensor *scales, qf_error *err)
{
    /* In each format the exponent of an infinity or a NaN is all ones. The loop only counts, so that it runs at
     * the speed of memory: scales are a few percent of a checkpoint. */
    size_t count = scales->size_bytes / qf_dtype_size(scales->dtype);
    uint32_t bad = 0;
    if (scales->dtype == QF_DTYPE_F32) {
        for (size_t i = 0; i < count; i++) {
            bad |= (uint32_t)((qf_load_u32(scales->data, i) & 0x7f800000u) == 0x7f800000u);
        }
    } else {
        uint32_t mask = scales->dtype == QF_DTYPE_F16 ? 0x7c00u : 0x7f80u;
        for (size_t i = 0; i < count; i++) {
            bad |= (uint32_t)((qf_load_u16(scales->data, i) & mask) == mask);
        }
    }
    if (bad != 0) {
        return QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%s\" holds an infinite scale or a NaN; expected finite scales",
                       scales->name);
    }
    return QF_OK;
}

void qf_set_groups(qf_linear_source *self, int32_t group_size)
{
    self->group_size = group_size < 0 || group_size > self->k ? self->k : group_size;
    self->num_groups = (self->k + self->group_size - 1) / self->group_size;
}

/* counts: (num_groups + 1), zeroed; becomes the first position of each group. */
static qf_status count_groups(const qf_tensor *g_idx, const qf_linear_source *self, int32_t *counts, bool *sorted,
                              qf_error *err)
{
    int32_t previous = 0;
    *sorted = true;
    for (int32_t i = 0; i < self->k; i++) {
        int32_t group = (int32_t)qf_load_u32(g_idx->data, (size_t)i);
        if (group < 0 || group >= self->num_groups) {
            return QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%s\" has group %d at column %d; expected 0 to %d",
                           g_idx->name, group, i, self->num_groups - 1);
        }
        counts[group + 1]++;
        *sorted = *sorted && group >= previous;
        previous = group;
    }
    for (int32_t g = 0; g < self->num_groups; g++) {
        int32_t rest = self->k - g * self->group_size;
        int32_t expected = rest < self->group_size ? rest : self->group_size;
        if (counts[g + 1] != expected) {
            return QF_FAIL(err, QF_ERROR_MODEL, "tensor \"%s\" gives group %d %d columns; expected %d", g_idx->name, g,
                           counts[g + 1], expected);
        }
        counts[g + 1] += counts[g];
    }
    return QF_OK;
}

qf_status qf_group_order(const qf_tensor *g_idx, const qf_linear_source *self, const int32_t **perm, qf_error *err)
{
    qf_status status = QF_OK;
    int32_t *starts = NULL;
    int32_t *order = NULL;
    bool sorted;
    *perm = NULL;
    QF_TRY(qf_alloc((void **)&starts, (size_t)self->num_groups + 1, sizeof *starts, "group counts", err));
    QF_TRY_GOTO(count_groups(g_idx, self, starts, &sorted, err), done);
    if (sorted) {
        goto done;
    }
    QF_TRY_GOTO(qf_alloc((void **)&order, (size_t)self->k, sizeof *order, "column order", err), done);
    for (int32_t i = 0; i < self->k; i++) {
        order[starts[qf_load_u32(g_idx->data, (size_t)i)]++] = i;
    }
    *perm = order;
done:
    qf_free(starts);
    return status;
}

float qf_tensor_f32(const qf_tensor *tensor, size_t index)
{
    switch (tensor->dtype) {
    case QF_DTYPE_F32: return qf_bits_f32(qf_load_u32(tensor->data, index));
    case QF_DTYPE_BF16: return qf_bf16_to_f32(qf_load_u16(tensor->data, index));
    default: return qf_f16_to_f32(qf_load_u16(tensor->data, index));
    }
}

/* Eight at a time through local arrays, without a branch: the compiler turns the inner loops into vectors. */
static void convert8_bf16(const uint8_t *in, float *out)
{
    uint16_t half[8];
    uint32_t bits[8];
    memcpy(half, in, sizeof half);
    for (int i = 0; i < 8; i++) {
        bits[i] = (uint32_t)half[i] << 16;
    }
    memcpy(out, bits, sizeof bits);
}

static void convert8_f16(const uint8_t *in, float *out)
{
    uint16_t half[8];
    float value[8];
    uint32_t bits[8];
    memcpy(half, in, sizeof half);
    for (int i = 0; i < 8; i++) {
        bits[i] = (uint32_t)(half[i] & 0x7fffu) << 13;
    }
    memcpy(value, bits, sizeof bits);
    for (int i = 0; i < 8; i++) {
        value[i] *= 0x1p112f; /* exact: see qf_f16_to_f32 */
    }
    memcpy(bits, value, sizeof bits);
    for (int i = 0; i < 8; i++) {
        uint32_t special = (half[i] & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
        bits[i] |= special | ((uint32_t)(half[i] & 0x8000u) << 16);
    }
    memcpy(out, bits, sizeof bits);
}

void qf_tensor_read_f32(const qf_tensor *tensor, size_t first, size_t count, float *out)
{
    const uint8_t *data = (const uint8_t *)tensor->data + first * qf_dtype_size(tensor->dtype);
    size_t i = 0;
    if (tensor->dtype == QF_DTYPE_F32) {
        memcpy(out, data, count * sizeof *out);
        return;
    }
    bool bf16 = tensor->dtype == QF_DTYPE_BF16;
    for (; i + 8 <= count; i += 8) {
        if (bf16) {
            convert8_bf16(data + 2 * i, out + i);
        } else {
            convert8_f16(data + 2 * i, out + i);
        }
    }
    for (; i < count; i++) {
        out[i] = qf_tensor_f32(tensor, first + i);
    }
}
