/* sources: base/status.c base/alloc.c base/dtype.c */
/* sanitizers: address */
/* alloc-faults: yes */
#include <math.h>

#include "base/alloc.h"
#include "base/dtype.h"
#include "check.h"

static uint32_t random_u32(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(*state >> 32);
}

/* The value of a half by its definition. Exact in double. */
static double half_value(uint16_t half)
{
    int exponent = (half >> 10) & 0x1f;
    double fraction = half & 0x3ff;
    double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024.0 + fraction, exponent - 25);
    return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

/* Round to nearest even by search among all finite halves: slow, and obviously right. */
static uint16_t half_reference(float value)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double magnitude = fabs((double)value);
    /* From halfway between the largest half and what would follow it, up. */
    if (magnitude >= 65520.0) {
        return (uint16_t)(sign | 0x7c00);
    }
    unsigned low = 0, high = 0x7bff; /* the largest half that is not above */
    while (low < high) {
        unsigned middle = (low + high + 1) / 2;
        if (half_value((uint16_t)middle) <= magnitude) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    if (low < 0x7bff) {
        double below = magnitude - half_value((uint16_t)low);
        double above = half_value((uint16_t)(low + 1)) - magnitude;
        low += above < below || (above == below && (low & 1) != 0) ? 1 : 0;
    }
    return (uint16_t)(sign | low);
}

static void test_f16_to_f32_exhaustive(void)
{
    for (uint32_t i = 0; i < 65536; i++) {
        uint16_t half = (uint16_t)i;
        float value = qf_f16_to_f32(half);
        bool special = (half & 0x7c00) == 0x7c00;
        if (special && (half & 0x3ff) != 0) {
            CHECK(isnan(value));
            CHECK(isnan(qf_f16_to_f32(qf_f32_to_f16(value))));
            continue;
        }
        if (special) {
            CHECK(isinf(value) && (value < 0) == ((half & 0x8000) != 0));
        } else {
            CHECK((double)value == half_value(half) && (signbit(value) != 0) == ((half & 0x8000) != 0));
        }
        CHECK_INT(qf_f32_to_f16(value), half); /* every half survives the round trip */
    }
}

static void test_f32_to_f16_rounding(void)
{
    /* Each half, the midpoint to the next, and the floats on either side of these. */
    for (uint32_t i = 0; i < 0x7c00; i++) {
        double middle = i < 0x7bff ? (half_value((uint16_t)i) + half_value((uint16_t)(i + 1))) / 2 : 65520.0;
        uint32_t centres[2] = {qf_f32_bits((float)half_value((uint16_t)i)), qf_f32_bits((float)middle)};
        for (int c = 0; c < 2; c++) {
            for (uint32_t step = 0; step < 3; step++) {
                uint32_t bits = centres[c] + step - (centres[c] > 0 ? 1 : 0);
                CHECK_INT(qf_f32_to_f16(qf_bits_f32(bits)), half_reference(qf_bits_f32(bits)));
                CHECK_INT(qf_f32_to_f16(qf_bits_f32(bits | 0x80000000u)),
                          half_reference(qf_bits_f32(bits | 0x80000000u)));
            }
        }
    }
    uint64_t state = 1;
    for (int i = 0; i < 500000; i++) {
        uint32_t bits = random_u32(&state);
        if ((i & 1) != 0) { /* exponents near those of halves: most floats at random are far outside */
            bits = (bits & 0x807fffffu) | (100 + bits % 45) << 23;
        }
        float value = qf_bits_f32(bits);
        if (!isnan(value)) {
            CHECK_INT(qf_f32_to_f16(value), half_reference(value));
        }
    }
}

static void test_f32_to_f16_special(void)
{
    CHECK_INT(qf_f32_to_f16(INFINITY), 0x7c00);
    CHECK_INT(qf_f32_to_f16(-INFINITY), 0xfc00);
    CHECK_INT(qf_f32_to_f16(65504.0f), 0x7bff);
    CHECK_INT(qf_f32_to_f16(65519.996f), 0x7bff);
    CHECK_INT(qf_f32_to_f16(65520.0f), 0x7c00);
    CHECK_INT(qf_f32_to_f16(0x1p-25f), 0);      /* half of the least half: a tie, to even */
    CHECK_INT(qf_f32_to_f16(0x1.8p-25f), 1);
    CHECK_INT(qf_f32_to_f16(-0.0f), 0x8000);
    CHECK((qf_f32_to_f16(NAN) & 0x7fff) > 0x7c00);
    CHECK((qf_f32_to_f16(qf_bits_f32(0x7f800001u)) & 0x7fff) > 0x7c00); /* its payload is in the low bits alone */
}

static void test_bf16_exhaustive(void)
{
    for (uint32_t i = 0; i < 65536; i++) {
        uint16_t brain = (uint16_t)i;
        float value = qf_bf16_to_f32(brain);
        CHECK(qf_f32_bits(value) == i << 16);
        if (isnan(value)) {
            CHECK(isnan(qf_bf16_to_f32(qf_f32_to_bf16(value))));
            continue;
        }
        CHECK_INT(qf_f32_to_bf16(value), brain);
        if ((brain & 0x7f80) == 0x7f80) {
            continue; /* nothing lies above infinity */
        }
        /* Below, at and above the midpoint to the next one (for the largest, that is infinity). */
        uint16_t even = (uint16_t)(brain + (brain & 1));
        CHECK_INT(qf_f32_to_bf16(qf_bits_f32((i << 16) + 0x7fffu)), brain);
        CHECK_INT(qf_f32_to_bf16(qf_bits_f32((i << 16) + 0x8000u)), even);
        CHECK_INT(qf_f32_to_bf16(qf_bits_f32((i << 16) + 0x8001u)), brain + 1);
    }
    CHECK((qf_f32_to_bf16(qf_bits_f32(0x7f800001u)) & 0x7fff) > 0x7f80);
    CHECK((qf_f32_to_bf16(qf_bits_f32(0xffffffffu)) & 0x7fff) > 0x7f80);
}

static void test_dtype_tables(void)
{
    static const struct {
        qf_dtype dtype;
        const char *name;
        int size;
    } expected[] = {
        {QF_DTYPE_F32, "F32", 4}, {QF_DTYPE_BF16, "BF16", 2}, {QF_DTYPE_F16, "F16", 2}, {QF_DTYPE_I8, "I8", 1},
        {QF_DTYPE_U8, "U8", 1},   {QF_DTYPE_I16, "I16", 2},   {QF_DTYPE_U16, "U16", 2}, {QF_DTYPE_I32, "I32", 4},
        {QF_DTYPE_U32, "U32", 4}, {QF_DTYPE_I64, "I64", 8},   {QF_DTYPE_U64, "U64", 8}, {QF_DTYPE_F64, "F64", 8},
        {QF_DTYPE_BOOL, "BOOL", 1}, {QF_DTYPE_F8_E4M3, "F8_E4M3", 1}, {QF_DTYPE_F8_E5M2, "F8_E5M2", 1},
    };
    CHECK_INT(sizeof expected / sizeof expected[0], QF_DTYPE_COUNT);
    for (int i = 0; i < QF_DTYPE_COUNT; i++) {
        CHECK_INT(expected[i].dtype, i);
        CHECK_STRING(qf_dtype_name(expected[i].dtype), expected[i].name);
        CHECK_INT(qf_dtype_size(expected[i].dtype), expected[i].size);
    }
    CHECK_STRING(qf_dtype_name(QF_DTYPE_COUNT), "?");
    CHECK_INT(qf_dtype_size(QF_DTYPE_COUNT), 0);
}

static qf_status forward(qf_error *err)
{
    QF_TRY(QF_FAIL(err, QF_ERROR_MODEL, "%s is %d, but the limit is %d", "depth", 9, 4));
    return QF_OK;
}

static void test_status(void)
{
    qf_error err;
    int line = __LINE__ + 1;
    CHECK_STATUS(QF_FAIL(&err, QF_ERROR_IO, "cannot read %s", "a.json"), QF_ERROR_IO);
    CHECK_INT(err.status, QF_ERROR_IO);
    CHECK_INT(err.line, line);
    CHECK(strstr(err.file, "test_base.c") != NULL);
    CHECK_STRING(err.message, "cannot read a.json");
    CHECK_STATUS(forward(&err), QF_ERROR_MODEL);
    CHECK_STRING(err.message, "depth is 9, but the limit is 4");
    CHECK_INT(forward(NULL), QF_ERROR_MODEL); /* the error may be left out */

    char longer[2000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    CHECK_STATUS(QF_FAIL(&err, QF_ERROR_INTERNAL, "%s", longer), QF_ERROR_INTERNAL);
    CHECK_INT(strlen(err.message), sizeof err.message - 1);

    for (int i = QF_OK; i <= QF_ERROR_INTERNAL; i++) {
        CHECK(strcmp(qf_status_name((qf_status)i), "unknown status") != 0);
        for (int j = QF_OK; j < i; j++) {
            CHECK(strcmp(qf_status_name((qf_status)i), qf_status_name((qf_status)j)) != 0);
        }
    }
    CHECK_STRING(qf_status_name((qf_status)(QF_ERROR_INTERNAL + 1)), "unknown status");
}

static bool all_zero(const unsigned char *bytes, size_t size)
{
    unsigned char any = 0;
    for (size_t i = 0; i < size; i++) {
        any = (unsigned char)(any | bytes[i]);
    }
    return any == 0;
}

static void test_alloc(void)
{
    qf_error err;
    void *memory = NULL;
    CHECK_OK(qf_alloc(&memory, 7, 3, "things", &err));
    CHECK(memory != NULL && all_zero(memory, 21));
    memset(memory, 5, 21);
    unsigned char *grown = qf_realloc(memory, 1000, 3);
    CHECK(grown != NULL && grown[0] == 5 && grown[20] == 5);
    qf_free(grown);

    void *empty1 = qf_calloc(0, 8), *empty2 = qf_calloc(8, 0);
    CHECK(empty1 != NULL && empty2 != NULL && empty1 != empty2);
    qf_free(empty1);
    qf_free(empty2);
    qf_free(NULL);

    /* Sizes that overflow are refused, not wrapped around. */
    CHECK(qf_calloc(SIZE_MAX / 2, 3) == NULL);
    void *small = qf_calloc(1, 1);
    CHECK(qf_realloc(small, SIZE_MAX / 2, 3) == NULL);
    qf_free(small);
    memory = &err;
    CHECK_STATUS(qf_alloc(&memory, SIZE_MAX, 2, "huge things", &err), QF_ERROR_OUT_OF_MEMORY);
    CHECK(memory == NULL);
    CHECK(strstr(err.message, "huge things") != NULL && strstr(err.message, "18446744073709551615") != NULL);
}

static void test_pages(void)
{
    static const size_t sizes[] = {0, 1, 4096, 4097, (size_t)5 << 20};
    qf_error err;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        void *pages = NULL;
        CHECK_OK(qf_pages_alloc(&pages, sizes[i], "pages", &err));
        CHECK(pages != NULL && (uintptr_t)pages % 4096 == 0 && all_zero(pages, sizes[i]));
        memset(pages, 1, sizes[i]);
        qf_pages_free(pages, sizes[i]);
    }
    void *pages = &err;
    CHECK_STATUS(qf_pages_alloc(&pages, SIZE_MAX / 2, "too many pages", &err), QF_ERROR_OUT_OF_MEMORY);
    CHECK(pages == NULL && strstr(err.message, "too many pages") != NULL);
    qf_pages_free(NULL, 4096);
}

static void test_checked_arithmetic(void)
{
    size_t out;
    CHECK(qf_mul_size(SIZE_MAX / 2, 2, &out) && out == SIZE_MAX - 1);
    CHECK(!qf_mul_size(SIZE_MAX / 2 + 1, 2, &out));
    CHECK(qf_add_size(SIZE_MAX - 1, 1, &out) && out == SIZE_MAX);
    CHECK(!qf_add_size(SIZE_MAX, 1, &out));
}

#ifdef CHECK_ALLOC_FAULTS
/* The injector itself: it fails the one allocation that it was asked to, of every kind. */
static void test_injected_faults(void)
{
    qf_error err;
    for (int kind = 0; kind < 4; kind++) {
        void *memory = NULL;
        check_fail_alloc(2);
        void *first = qf_calloc(1, 1);
        CHECK(first != NULL && !check_alloc_failed());
        switch (kind) {
        case 0: memory = qf_calloc(1, 1); break;
        case 1: memory = qf_realloc(NULL, 1, 1); break;
        case 2: CHECK_STATUS(qf_alloc(&memory, 1, 1, "one", &err), QF_ERROR_OUT_OF_MEMORY); break;
        default: CHECK_STATUS(qf_pages_alloc(&memory, 1, "page", &err), QF_ERROR_OUT_OF_MEMORY); break;
        }
        CHECK(memory == NULL && check_alloc_failed());
        memory = qf_calloc(1, 1);
        CHECK(memory != NULL);
        qf_free(memory);
        qf_free(first);
        check_fail_alloc(0);
        CHECK(!check_alloc_failed());
    }
}
#endif

int main(void)
{
    RUN(test_f16_to_f32_exhaustive);
    RUN(test_f32_to_f16_rounding);
    RUN(test_f32_to_f16_special);
    RUN(test_bf16_exhaustive);
    RUN(test_dtype_tables);
    RUN(test_status);
    RUN(test_alloc);
    RUN(test_pages);
    RUN(test_checked_arithmetic);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_injected_faults);
#endif
    return check_report();
}
