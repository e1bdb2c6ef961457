/* sources: base/json.c base/status.c base/alloc.c base/dtype.c model/safetensors.c model/fields.c */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/safetensors.h"

/* libFuzzer's contract: a finding is an abort. */
static void require(int ok)
{
    if (!ok) {
        abort();
    }
}

/* Everything that an accepted file promises: its tensors tile the data, in bytes that can be read. */
static void check_accepted(const qf_safetensors *file, const uint8_t *data, size_t size)
{
    uint64_t header_bytes = 0;
    size_t tensor_bytes = 0;
    uint64_t sum = 0;
    for (int i = 0; i < 8; i++) {
        header_bytes |= (uint64_t)data[i] << (8 * i);
    }
    require(header_bytes <= size - 8);
    const uint8_t *body = data + 8 + header_bytes;
    for (size_t i = 0; i < file->num_tensors; i++) {
        const qf_tensor *tensor = &file->tensors[i];
        const uint8_t *bytes = tensor->data;
        size_t expected = qf_dtype_size(tensor->dtype);
        require(tensor->rank >= 0 && tensor->rank <= 4 && strlen(tensor->name) > 0);
        require(i == 0 || strcmp(file->tensors[i - 1].name, tensor->name) < 0);
        for (int32_t j = 0; j < tensor->rank; j++) {
            expected *= (size_t)tensor->shape[j];
        }
        require(expected == tensor->size_bytes && bytes >= body && bytes + tensor->size_bytes <= data + size);
        for (size_t j = 0; j < tensor->size_bytes; j++) {
            sum = sum * 31 + bytes[j];
        }
        tensor_bytes += tensor->size_bytes;
    }
    volatile uint64_t kept = sum;
    (void)kept;
    require(tensor_bytes == (size_t)(data + size - body));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    qf_error err;
    qf_safetensors file;
    qf_status status = qf_safetensors_parse(data, size, "fuzz", &file, &err);
    if (status != QF_OK) {
        require(status == QF_ERROR_MODEL && err.status == status && file.tensors == NULL);
        require(strncmp(err.message, "fuzz: ", 6) == 0);
        return 0;
    }
    check_accepted(&file, data, size);
    qf_safetensors_deinit(&file);
    return 0;
}
