/* sources: base/status.c base/alloc.c base/dtype.c base/json.c model/safetensors.c model/fields.c */
/* sanitizers: address */
/* alloc-faults: yes */
/* The safetensors parser: every rule of the format, from both sides. */
#include <stdlib.h>

#include "check.h"
#include "model/safetensors.h"

/* A file in memory, in a heap block of just its size, so that the sanitizer sees a read past its end. */
static uint8_t *make_file(uint64_t header_bytes, const char *header, size_t data_bytes, size_t *size)
{
    size_t length = strlen(header);
    *size = 8 + length + data_bytes;
    uint8_t *file = calloc(1, *size);
    for (int i = 0; i < 8; i++) {
        file[i] = (uint8_t)(header_bytes >> (8 * i));
    }
    memcpy(file + 8, header, length);
    return file;
}

static qf_status parse(const char *header, size_t data_bytes, qf_safetensors *out, qf_error *err)
{
    size_t size;
    uint8_t *file = make_file(strlen(header), header, data_bytes, &size);
    qf_status status = qf_safetensors_parse(file, size, "file", out, err);
    free(file);
    return status;
}

#define A4 "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}"
#define B2 "\"b\":{\"dtype\":\"BF16\",\"shape\":[1,1],\"data_offsets\":[4,6]}"

static void test_accepted(void)
{
    static const struct {
        const char *header;
        size_t data_bytes, count;
    } cases[] = {
        {"{}", 0, 0},
        {"{\"__metadata__\":{\"x\":\"y\"}}", 0, 0},
        {"{\"__metadata__\":null}", 0, 0},
        {"{" A4 "}", 4, 1},
        {"{" B2 "," A4 "}", 6, 2},
        {"{" A4 "," B2 ",\"__metadata__\":{}}   ", 6, 2},
        {"{\"s\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]}}", 8, 1},
        {"{\"z\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[4,4]}," A4 "}", 4, 2},
        {"{\"z\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}," A4 "}", 4, 2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qf_error err;
        qf_safetensors file;
        CHECK_OK(parse(cases[i].header, cases[i].data_bytes, &file, &err));
        CHECK_INT(file.num_tensors, cases[i].count);
        qf_safetensors_deinit(&file);
    }
}

static void test_fields(void)
{
    qf_error err;
    qf_safetensors out;
    size_t size;
    const char *header = "{" B2 "," A4 "}";
    uint8_t *file = make_file(strlen(header), header, 6, &size);
    CHECK_OK(qf_safetensors_parse(file, size, "file", &out, &err));
    CHECK_STRING(out.tensors[0].name, "a"); /* sorted by name */
    CHECK_STRING(out.tensors[1].name, "b");
    CHECK_INT(out.tensors[1].rank, 2);
    CHECK_INT(out.tensors[1].dtype, QF_DTYPE_BF16);
    CHECK_INT(out.tensors[1].size_bytes, 2);
    CHECK(out.tensors[1].data == file + 8 + strlen(header) + 4);
    qf_safetensors_deinit(&out);
    free(file);
}

static void test_refused(void)
{
    static const struct {
        const char *header;
        size_t data_bytes;
        const char *words;
    } cases[] = {
        {"{" A4 "}", 3, "bytes 0 to 4"},
        {"{" A4 "}", 5, "end at byte 4 of the data, which has 5"},
        {"{}", 1, "end at byte 0"},
        {" {}", 0, "does not begin"},
        {"[]", 0, "does not begin"},
        {"{", 0, "file: byte"},
        {"{} x", 0, "file: byte"},
        {"{" A4 "," A4 "}", 4, "twice"},
        {"{" B2 "}", 6, "expected to begin at 0"},                                                        /* hole */
        {"{" A4 ",\"b\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[2,4]}}", 4, "expected to begin at 4"},
        {"{\"__metadata__\":{\"x\":1}}", 0, "__metadata__"},
        {"{\"__metadata__\":[]}", 0, "__metadata__"},
        {"{\"a\":1}", 0, "\"a\": is no object"},
        {"{\"\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "name"},
        {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "NUL"},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[0,1]}}", 1, "\"F4\""},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", 4, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1],\"data_offsets\":[0,4]}}", 4, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "too large"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2305843009213693952,2],\"data_offsets\":[0,0]}}", 0, "too large"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,4]}}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "span 4 bytes; expected 8"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[9223372036854775800,9223372036854775804]}}", 4,
         "expected to begin at 0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qf_error err = {0};
        qf_safetensors file;
        CHECK_STATUS(parse(cases[i].header, cases[i].data_bytes, &file, &err), QF_ERROR_MODEL);
        if (strstr(err.message, cases[i].words) == NULL) {
            (void)fprintf(stderr, "%s: \"%s\"\n", cases[i].header, err.message);
        }
        CHECK(strstr(err.message, cases[i].words) != NULL);
        CHECK(file.tensors == NULL && file.names == NULL && file.num_tensors == 0);
    }
}

static void test_lengths(void)
{
    static const uint64_t wrong[] = {0, 1, 3, 5, 100000001, (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7};
    qf_error err;
    qf_safetensors out;
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        size_t size;
        uint8_t *file = make_file(wrong[i], "{}", 0, &size);
        CHECK_STATUS(qf_safetensors_parse(file, size, "file", &out, &err), QF_ERROR_MODEL);
        free(file);
    }
    uint8_t *file = calloc(1, 8);
    for (size_t size = 0; size <= 8; size++) {
        uint8_t *part = malloc(size > 0 ? size : 1);
        memcpy(part, file, size);
        CHECK_STATUS(qf_safetensors_parse(part, size, "file", &out, &err), QF_ERROR_MODEL);
        free(part);
    }
    free(file);
}

/* Every prefix of a good file is refused: nothing is read past the end. */
static void test_truncated(void)
{
    const char *header = "{" A4 "," B2 "}";
    size_t size;
    uint8_t *file = make_file(strlen(header), header, 6, &size);
    for (size_t n = 0; n < size; n++) {
        qf_error err;
        qf_safetensors out;
        uint8_t *part = malloc(n > 0 ? n : 1);
        memcpy(part, file, n);
        CHECK_STATUS(qf_safetensors_parse(part, n, "file", &out, &err), QF_ERROR_MODEL);
        free(part);
    }
    free(file);
}

#ifdef CHECK_ALLOC_FAULTS
static void test_alloc_faults(void)
{
    for (int64_t n = 1;; n++) {
        qf_error err;
        qf_safetensors out;
        check_fail_alloc(n);
        qf_status status = parse("{" A4 "," B2 ",\"__metadata__\":{\"x\":\"y\"}}", 6, &out, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        qf_safetensors_deinit(&out);
        if (!failed) {
            break;
        }
    }
}
#endif

int main(void)
{
    RUN(test_accepted);
    RUN(test_fields);
    RUN(test_refused);
    RUN(test_lengths);
    RUN(test_truncated);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    return check_report();
}
