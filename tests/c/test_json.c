/* sources: base/json.c base/status.c base/alloc.c */
/* sanitizers: address */
/* alloc-faults: yes */
#include "base/json.h"

#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "base/alloc.h"
#include "check.h"

/* Parses a copy in a block of exactly its size, so that reading one byte too far is seen. */
static qf_status parse_sized(const char *text, size_t size, const qf_json_limits *limits, qf_json **out, qf_error *err)
{
    char *copy = malloc(size > 0 ? size : 1);
    CHECK(copy != NULL);
    memcpy(copy, text, size);
    qf_status status = qf_json_parse(copy, size, limits, "a.json", out, err);
    free(copy); /* the document must not point into it */
    return status;
}

static qf_json *parse(const char *text)
{
    qf_error err;
    qf_json *document = NULL;
    CHECK_OK(parse_sized(text, strlen(text), NULL, &document, &err));
    return document;
}

#define TEXT(literal) literal, sizeof(literal) - 1

static const struct {
    const char *text;
    size_t size;
} accepted[] = {
    {TEXT("0")}, {TEXT("-0")}, {TEXT("-1")}, {TEXT("1.5")}, {TEXT("1e5")}, {TEXT("1E+5")}, {TEXT("1e-5")},
    {TEXT("0.0")}, {TEXT("0e0")}, {TEXT("-0.5e-07")}, {TEXT("1e-99999999999999999999999")}, {TEXT("123456789012345678901234567890")},
    {TEXT("true")}, {TEXT("false")}, {TEXT("null")}, {TEXT(" \t\r\n null \t\r\n ")},
    {TEXT("\"\"")}, {TEXT("\"a\"")}, {TEXT("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"")}, {TEXT("\"\\u0000\"")}, {TEXT("\"\\uD83D\\uDE00\"")},
    {TEXT("\"\\ud83d\\ude00\"")}, {TEXT("\"\\uFFFF\"")}, {TEXT("\"\x7f\"")}, {TEXT("\"\xc2\x80\"")}, {TEXT("\"\xdf\xbf\"")},
    {TEXT("\"\xe0\xa0\x80\"")}, {TEXT("\"\xed\x9f\xbf\"")}, {TEXT("\"\xee\x80\x80\"")}, {TEXT("\"\xef\xbf\xbf\"")},
    {TEXT("\"\xf0\x90\x80\x80\"")}, {TEXT("\"\xf4\x8f\xbf\xbf\"")}, {TEXT("[]")}, {TEXT("[ ]")}, {TEXT("[1]")},
    {TEXT("[1 , 2,3]")}, {TEXT("[[],[[]],{}]")}, {TEXT("{}")}, {TEXT("{ }")}, {TEXT("{\"a\":1}")}, {TEXT("{\"\":1}")},
    {TEXT("{ \"a\" : 1 , \"b\" : [ ] }")}, {TEXT("{\"a\":{\"a\":{\"a\":1}}}")}, {TEXT("[\"a\",\"a\"]")},
};

static const struct {
    const char *text;
    size_t size;
    const char *reason; /* a part of the message */
} refused[] = {
    {TEXT(""), "byte 0: the text ends"}, {TEXT("  "), "byte 2: the text ends"}, {TEXT("nul"), "not a value"},
    {TEXT("nulls"), "goes on"}, {TEXT("True"), "not a value"}, {TEXT("NaN"), "not a value"}, {TEXT("Infinity"), "not a value"},
    {TEXT("-Infinity"), "digits are missing"}, {TEXT("-"), "digits are missing"}, {TEXT("+1"), "not a value"},
    {TEXT("01"), "leading zero"}, {TEXT("-01"), "leading zero"}, {TEXT("00"), "leading zero"}, {TEXT("1."), "decimal point"},
    {TEXT(".5"), "not a value"}, {TEXT("1.e5"), "decimal point"}, {TEXT("1e"), "exponent"}, {TEXT("1e+"), "exponent"},
    {TEXT("0x10"), "goes on"}, {TEXT("1,5"), "goes on"}, {TEXT("1_000"), "goes on"}, {TEXT("1e400"), "too large"},
    {TEXT("-1e309"), "too large"}, {TEXT("1e99999999999999999999999"), "too large"}, {TEXT("1 2"), "byte 2: the text goes on"},
    {TEXT("\""), "byte 0: the string is not closed"}, {TEXT("\"a"), "not closed"}, {TEXT("'a'"), "not a value"},
    {TEXT("\"\\"), "unknown escape"}, {TEXT("\"\\x41\""), "byte 1: unknown escape"}, {TEXT("\"\\\0\""), "unknown escape"},
    {TEXT("\"\\u12\""), "four hexadecimal"}, {TEXT("\"\\u12g4\""), "four hexadecimal"}, {TEXT("\"\\u"), "four hexadecimal"},
    {TEXT("\"\\uD83D\""), "surrogate"}, {TEXT("\"\\uDE00\""), "surrogate"}, {TEXT("\"\\uD83Dabcdef\""), "surrogate"},
    {TEXT("\"\\uD83D\\n12345\""), "surrogate"}, {TEXT("\"\\uD83D\\uD83D\""), "surrogate"}, {TEXT("\"\\uD83D\\u0041\""), "surrogate"},
    {TEXT("\"\\uD83D\\uDE0\""), "four hexadecimal"}, {TEXT("\"a\nb\""), "byte 2: control"}, {TEXT("\"\0\""), "control"},
    {TEXT("\"\x1f\""), "control"}, {TEXT("\"\x80\""), "byte 1: invalid UTF-8"}, {TEXT("\"\xc0\x80\""), "invalid UTF-8"},
    {TEXT("\"\xc1\xbf\""), "invalid UTF-8"}, {TEXT("\"\xc2\""), "invalid UTF-8"}, {TEXT("\"\xc2"), "invalid UTF-8"},
    {TEXT("\"\xe0\x9f\xbf\""), "invalid UTF-8"}, {TEXT("\"\xed\xa0\x80\""), "invalid UTF-8"}, {TEXT("\"\xed\xbf\xbf\""), "invalid UTF-8"},
    {TEXT("\"\xf0\x8f\xbf\xbf\""), "invalid UTF-8"}, {TEXT("\"\xf4\x90\x80\x80\""), "invalid UTF-8"}, {TEXT("\"\xf5\x80\x80\x80\""), "invalid UTF-8"},
    {TEXT("\"\xff\""), "invalid UTF-8"}, {TEXT("\"\xe2\x82\""), "invalid UTF-8"}, {TEXT("\xef\xbb\xbf{}"), "byte 0: not a value"},
    {TEXT("["), "the text ends"}, {TEXT("]"), "not a value"}, {TEXT("[1"), "missing in an array"}, {TEXT("[1,"), "the text ends"},
    {TEXT("[1,]"), "not a value"}, {TEXT("[,1]"), "not a value"}, {TEXT("[1 2]"), "missing in an array"}, {TEXT("[1}"), "missing in an array"},
    {TEXT("[]]"), "goes on"}, {TEXT("{"), "name in quotes"}, {TEXT("}"), "not a value"}, {TEXT("{\"a\"}"), "colon"},
    {TEXT("{\"a\":}"), "not a value"}, {TEXT("{\"a\":1,}"), "name in quotes"}, {TEXT("{,}"), "name in quotes"}, {TEXT("{a:1}"), "name in quotes"},
    {TEXT("{1:1}"), "name in quotes"}, {TEXT("{\"a\":1 \"b\":2}"), "missing in an object"}, {TEXT("{\"a\":1]"), "missing in an object"},
    {TEXT("{\"a\" 1}"), "colon"}, {TEXT("{\"a\":1,\"a\":2}"), "\"a\" twice"}, {TEXT("{\"a\":1,\"\\u0061\":2}"), "\"a\" twice"},
    {TEXT("{\"\\n\\u0000\177\":1,\"\\n\\u0000\177\":2}"), "\"???\" twice"},
    {TEXT("{\"\":1,\"\":2}"), "\"\" twice"}, {TEXT("// c\n1"), "not a value"}, {TEXT("[1/**/]"), "missing in an array"}, {TEXT("\0"), "not a value"},
    {TEXT("1\0"), "byte 1: the text goes on"},
};

static void test_accepted(void)
{
    for (size_t i = 0; i < sizeof accepted / sizeof accepted[0]; i++) {
        qf_error err;
        qf_json *document = NULL;
        qf_status status = parse_sized(accepted[i].text, accepted[i].size, NULL, &document, &err);
        if (status != QF_OK) {
            (void)fprintf(stderr, "text: %s\n", accepted[i].text);
        }
        CHECK_STATUS(status, QF_OK);
        CHECK(document != NULL);
        qf_json_destroy(document);
    }
}

static void test_refused(void)
{
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        qf_error err = {.message = ""};
        qf_json *document = (qf_json *)&err;
        qf_status status = parse_sized(refused[i].text, refused[i].size, NULL, &document, &err);
        bool right = status == QF_ERROR_MODEL && document == NULL && strstr(err.message, refused[i].reason) != NULL &&
                     strncmp(err.message, "a.json: byte ", 13) == 0;
        if (!right) {
            (void)fprintf(stderr, "text: %s\nmessage: %s\n", refused[i].text, err.message);
        }
        CHECK(right);
    }
}

/* Every prefix of a text with everything in it is refused, and none reads past its end. */
static void test_prefixes(void)
{
    static const char text[] = "{\"a\\u00e9\\ud83d\\ude00\xe2\x82\xac\": [true, false, null, -12.5e+3, {\"b\": \"\\n\"}], \"c\": {}}";
    for (size_t size = 0; size + 1 < sizeof text; size++) {
        qf_error err;
        qf_json *document = NULL;
        CHECK_STATUS(parse_sized(text, size, NULL, &document, &err), QF_ERROR_MODEL);
    }
    qf_json_destroy(parse(text));
}

static void test_strings(void)
{
    qf_json *document = parse("[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\", \"\\u0041\\u00e9\\u20ac\\uD83D\\uDE00\", \"a\\u0000b\", \"\"]");
    const qf_json_value *items = qf_json_root(document)->items;
    CHECK_STRING(items[0].string, "\"\\/\b\f\n\r\t");
    CHECK_STRING(items[1].string, "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
    CHECK_INT(items[1].length, 10);
    CHECK_INT(items[2].length, 3);
    CHECK(memcmp(items[2].string, "a\0b", 4) == 0);
    CHECK_INT(items[3].length, 0);
    CHECK_STRING(items[3].string, "");
    CHECK(qf_json_is_string(&items[3], ""));
    CHECK(!qf_json_is_string(&items[2], "a")); /* the inner NUL does not end it */
    CHECK(!qf_json_is_string(NULL, "a"));
    CHECK(!qf_json_is_string(qf_json_root(document), "a"));
    qf_json_destroy(document);
}

static void test_structure(void)
{
    qf_json *document = parse(" {\"z\": [1, [2.5, null], {\"k\": true}], \"a\": {\"b\": \"c\"}, \"e\": [], \"o\": {}, \"f\": false} ");
    const qf_json_value *root = qf_json_root(document);
    CHECK_INT(root->type, QF_JSON_OBJECT);
    CHECK_INT(root->length, 5);
    CHECK(root->key == NULL);
    CHECK_STRING(root->items[0].key, "z"); /* members stay in their order */
    CHECK_STRING(root->items[4].key, "f");
    CHECK_INT(root->items[4].key_length, 1);
    const qf_json_value *z = qf_json_get(root, "z");
    CHECK(z == &root->items[0] && z->type == QF_JSON_ARRAY && z->length == 3);
    CHECK(z->items[0].type == QF_JSON_INT && z->items[0].integer == 1 && z->items[0].key == NULL);
    CHECK(z->items[1].type == QF_JSON_ARRAY && z->items[1].length == 2 && z->items[1].items[0].number == 2.5);
    CHECK(z->items[1].items[1].type == QF_JSON_NULL);
    CHECK(qf_json_get(&z->items[2], "k")->boolean);
    CHECK(qf_json_is_string(qf_json_get(qf_json_get(root, "a"), "b"), "c"));
    CHECK(qf_json_get(root, "e")->type == QF_JSON_ARRAY && qf_json_get(root, "e")->length == 0);
    CHECK(qf_json_get(root, "o")->type == QF_JSON_OBJECT && qf_json_get(root, "o")->length == 0);
    CHECK(qf_json_get(root, "f")->type == QF_JSON_BOOL && !qf_json_get(root, "f")->boolean);
    CHECK(qf_json_get(root, "missing") == NULL);
    CHECK(qf_json_get(NULL, "z") == NULL);
    CHECK(qf_json_get(z, "z") == NULL);
    CHECK(qf_json_get(qf_json_get(root, "o"), "z") == NULL);
    qf_json_destroy(document);
    qf_json_destroy(NULL);
}

static const struct {
    const char *text;
    int64_t integer;
} integers[] = {
    {"0", 0}, {"7", 7}, {"-1", -1}, {"9007199254740993", 9007199254740993}, {"9223372036854775807", INT64_MAX},
    {"-9223372036854775808", INT64_MIN},
};

static const struct {
    const char *text;
    double number; /* literals: the compiler's conversion is the reference */
} doubles[] = {
    {"9223372036854775808", 9223372036854775808.0}, {"-9223372036854775809", -9223372036854775809.0},
    {"123456789012345678901234567890", 123456789012345678901234567890.0}, {"0.1", 0.1}, {"-0.0", -0.0}, {"1e-6", 1e-6},
    {"1e-05", 1e-05}, {"1000000.0", 1000000.0}, {"1e6", 1e6}, {"1.7976931348623157e308", 1.7976931348623157e308},
    {"2.2250738585072011e-308", 2.2250738585072011e-308}, {"4.9406564584124654e-324", 4.9406564584124654e-324},
    {"2e-324", 0.0}, {"0.000001234567", 0.000001234567}, {"123.456e10", 123.456e10}, {"0e999999999999", 0.0},
    {"9007199254740993.0", 9007199254740992.0}, {"9007199254740993.00000000000000000000000000000001", 9007199254740994.0},
    {"0.00000000000000000000000000000000000000000000000001e50", 1.0},
};

static void check_numbers(void)
{
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++) {
        qf_json *document = parse(integers[i].text);
        const qf_json_value *value = qf_json_root(document);
        CHECK_INT(value->type, QF_JSON_INT);
        CHECK_INT(value->integer, integers[i].integer);
        CHECK(value->number == (double)integers[i].integer);
        qf_json_destroy(document);
    }
    for (size_t i = 0; i < sizeof doubles / sizeof doubles[0]; i++) {
        qf_json *document = parse(doubles[i].text);
        const qf_json_value *value = qf_json_root(document);
        CHECK_INT(value->type, QF_JSON_DOUBLE);
        CHECK(memcmp(&value->number, &doubles[i].number, sizeof value->number) == 0);
        qf_json_destroy(document);
    }
}

static void test_numbers(void) { check_numbers(); }

/* Where the decimal point is a comma, strtod() would stop at the point. */
static void test_numbers_in_another_locale(void)
{
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "ru_RU.UTF-8"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (setlocale(LC_ALL, names[i]) != NULL) {
            check_numbers();
            break;
        }
        if (i + 1 == sizeof names / sizeof names[0]) {
            (void)printf("(no locale with a decimal comma is installed here)\n");
        }
    }
    CHECK(setlocale(LC_ALL, "C") != NULL);
}

/* "0.000...1", "1000...0" and halfway cases with thousands of digits, where digits are dropped. */
static void test_very_long_numbers(void)
{
    enum { ZEROS = 5000 };
    char *text = malloc(ZEROS + 64);
    CHECK(text != NULL);
    static const struct {
        const char *before, *after;
        double number;
    } cases[] = {
        {"0.", "1e5001", 1.0},
        {"1", "e-5000", 1.0},
        {"9007199254740993.", "", 9007199254740992.0},  /* exactly halfway: to even */
        {"9007199254740993.", "1", 9007199254740994.0}, /* the very last digit says more than halfway */
        {"-9007199254740993.", "1e0", -9007199254740994.0},
        {"0.", "", 0.0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t length = strlen(cases[i].before);
        memcpy(text, cases[i].before, length);
        memset(text + length, '0', ZEROS);
        memcpy(text + length + ZEROS, cases[i].after, strlen(cases[i].after) + 1);
        qf_json *document = parse(text);
        CHECK(qf_json_root(document)->type == QF_JSON_DOUBLE && qf_json_root(document)->number == cases[i].number);
        qf_json_destroy(document);
    }
    free(text);
}

/* Random doubles, printed with as many digits as it takes and read back. */
static void test_doubles_round_trip(void)
{
    uint64_t state = 12345;
    for (int i = 0; i < 20000; i++) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        uint64_t bits = state ^ state >> 29;
        double value;
        memcpy(&value, &bits, sizeof value);
        if (!isfinite(value)) {
            continue;
        }
        char text[64];
        (void)snprintf(text, sizeof text, "%.*e", 16 + i % 8, value);
        qf_json *document = parse(text);
        CHECK(memcmp(&qf_json_root(document)->number, &value, sizeof value) == 0);
        qf_json_destroy(document);
    }
}

static void test_limits(void)
{
    qf_error err;
    qf_json *document = NULL;
    qf_json_limits limits = qf_json_default_limits();
    CHECK(limits.max_bytes == (size_t)64 << 20 && limits.max_depth == 32 && limits.max_values == 4000000);
    limits.max_bytes = 7;
    CHECK_OK(parse_sized("[1,2,3]", 7, &limits, &document, &err));
    qf_json_destroy(document);
    CHECK_STATUS(parse_sized("[1,2,3] ", 8, &limits, &document, &err), QF_ERROR_MODEL);
    CHECK_STRING(err.message, "a.json: 8 bytes of JSON, but the limit is 7");
    limits = qf_json_default_limits();
    limits.max_values = 4;
    CHECK_OK(parse_sized("[1,2,3]", 7, &limits, &document, &err));
    qf_json_destroy(document);
    CHECK_STATUS(parse_sized("[1,2,3,4]", 9, &limits, &document, &err), QF_ERROR_MODEL);
    CHECK(strstr(err.message, "more than 4 values") != NULL && document == NULL);
    limits = qf_json_default_limits();
    limits.max_depth = 2;
    CHECK_OK(parse_sized("[[],{},[]]", 10, &limits, &document, &err)); /* closing gives depth back */
    qf_json_destroy(document);
    CHECK_STATUS(parse_sized("[[],{\"a\":[]}]", 13, &limits, &document, &err), QF_ERROR_MODEL);
    CHECK(strstr(err.message, "byte 9: nested deeper than 2 levels") != NULL);

    enum { DEEP = 1 << 20 };
    char *text = malloc(2 * DEEP);
    CHECK(text != NULL);
    memset(text, '[', DEEP);
    memset(text + DEEP, ']', DEEP);
    CHECK_STATUS(parse_sized(text, 2 * DEEP, NULL, &document, &err), QF_ERROR_MODEL);
    limits = qf_json_default_limits();
    limits.max_depth = DEEP; /* no recursion: a million levels do not touch the C stack */
    CHECK_OK(parse_sized(text, 2 * DEEP, &limits, &document, &err));
    qf_json_destroy(document);
    free(text);
}

static double seconds(void)
{
    struct timespec time;
    (void)clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static size_t write_object(char *text, int members, int step)
{
    size_t at = 0;
    text[at++] = '{';
    for (int i = 0; i < members; i++) {
        at += (size_t)sprintf(text + at, "%s\"key_%07d\":%d", i > 0 ? "," : "", (int)((int64_t)i * step % members), i);
    }
    text[at++] = '}';
    return at;
}

/* 200,000 members take n log n steps to check and look up; the quadratic way would take minutes here. */
static void test_large_objects(void)
{
    enum { MEMBERS = 200000 };
    static const int steps[] = {1, MEMBERS - 1, 77777}; /* ascending, descending, scattered (coprime to MEMBERS) */
    char *text = malloc((size_t)MEMBERS * 24);
    CHECK(text != NULL);
    double start = seconds();
    for (size_t s = 0; s < sizeof steps / sizeof steps[0]; s++) {
        qf_error err;
        qf_json *document = NULL;
        size_t size = write_object(text, MEMBERS, steps[s]);
        CHECK_OK(parse_sized(text, size, NULL, &document, &err));
        const qf_json_value *root = qf_json_root(document);
        CHECK_INT(root->length, MEMBERS);
        bool found = true;
        for (int i = 0; i < MEMBERS; i++) {
            char key[32];
            (void)snprintf(key, sizeof key, "key_%07d", (int)((int64_t)i * steps[s] % MEMBERS));
            const qf_json_value *member = qf_json_get(root, key);
            found = found && member == &root->items[i] && member->integer == i;
        }
        CHECK(found);
        CHECK(qf_json_get(root, "key_") == NULL && qf_json_get(root, "") == NULL && qf_json_get(root, "zzz") == NULL);
        qf_json_destroy(document);

        memcpy(text + size - 1, ",\"key_0000000\":0}", 17);
        CHECK_STATUS(parse_sized(text, size + 16, NULL, &document, &err), QF_ERROR_MODEL);
        CHECK(strstr(err.message, "the key \"key_0000000\" twice") != NULL);
    }
    CHECK(seconds() - start < 60);
    free(text);
}

/* Around the size from which objects are indexed. */
static void test_object_sizes(void)
{
    char text[2048];
    for (int members = 1; members <= 40; members++) {
        qf_error err;
        qf_json *document = NULL;
        size_t size = write_object(text, members, 1);
        CHECK_OK(parse_sized(text, size, NULL, &document, &err));
        for (int i = 0; i < members; i++) {
            char key[32];
            (void)snprintf(key, sizeof key, "key_%07d", i);
            CHECK(qf_json_get(qf_json_root(document), key) == &qf_json_root(document)->items[i]);
        }
        qf_json_destroy(document);
        for (int i = 0; i < members; i++) {
            (void)snprintf(text + size - 1, 32, ",\"key_%07d\":0}", i);
            CHECK_STATUS(parse_sized(text, strlen(text), NULL, &document, &err), QF_ERROR_MODEL);
        }
    }
}

#ifdef CHECK_ALLOC_FAULTS
static void test_alloc_faults(void)
{
    static char text[4096 + 70 * 24];
    size_t size = write_object(text, 70, 1);
    text[size - 1] = ',';
    size += (size_t)sprintf(text + size, "\"tail\":[[],[1,[2]],{\"a\":{\"b\":[\"c\"]}}");
    for (int i = 0; i < 800; i++) {
        size += (size_t)sprintf(text + size, ",%d", i % 10);
    }
    size += (size_t)sprintf(text + size, "]}");
    CHECK(size < sizeof text);
    for (int64_t n = 1; n < 1000; n++) {
        qf_error err;
        qf_json *document = NULL;
        check_fail_alloc(n);
        qf_status status = qf_json_parse(text, size, NULL, "a.json", &document, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_STATUS(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        CHECK((document == NULL) == failed);
        qf_json_destroy(document);
        if (!failed) {
            CHECK(n > 6); /* document, strings, a stack that grew, chunks */
            return;
        }
    }
    CHECK(false);
}
#endif

int main(void)
{
    RUN(test_accepted);
    RUN(test_refused);
    RUN(test_prefixes);
    RUN(test_strings);
    RUN(test_structure);
    RUN(test_numbers);
    RUN(test_numbers_in_another_locale);
    RUN(test_very_long_numbers);
    RUN(test_doubles_round_trip);
    RUN(test_limits);
    RUN(test_large_objects);
    RUN(test_object_sizes);
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
#endif
    return check_report();
}
