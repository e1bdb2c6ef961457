/* sources: base/status.c base/alloc.c engine/utf8.c engine/detokenizer.c */
/* sanitizers: address */
/* alloc-faults: yes */
#include <stdlib.h>

#include "check.h"
#include "engine/detokenizer.h"
#include "engine/utf8.h"

/* Tokens 0 .. 255 are the bytes; 256 is special ("<|x|>"), 257 is "stop", 258 is empty. */
#define SPECIAL 256
#define WORD 257
#define EMPTY 258
#define NUM_TOKENS 259

static qf_status make_vocabulary(qf_vocabulary **out, qf_error *err)
{
    uint8_t bytes[256 + 5 + 4], special[NUM_TOKENS] = {0};
    uint32_t offsets[NUM_TOKENS + 1];
    for (uint32_t i = 0; i < 256; i++) {
        bytes[i] = (uint8_t)i;
        offsets[i] = i;
    }
    memcpy(bytes + 256, "<|x|>stop", 9);
    offsets[SPECIAL] = 256;
    offsets[WORD] = 261;
    offsets[EMPTY] = offsets[NUM_TOKENS] = 265;
    special[SPECIAL] = 1;
    return qf_vocabulary_create(bytes, offsets, special, NUM_TOKENS, out, err);
}

typedef struct result {
    char text[4096];
    size_t size_bytes;
    int32_t stop_index;
    int32_t stop_token; /* the push that found it; -1: none did */
} result;

static void add(result *out, const qf_text_delta *delta)
{
    CHECK(qf_utf8_is_valid((const uint8_t *)delta->text, delta->size_bytes));
    CHECK(out->stop_index < 0 || delta->size_bytes == 0);
    memcpy(out->text + out->size_bytes, delta->text, delta->size_bytes);
    out->size_bytes += delta->size_bytes;
    out->text[out->size_bytes] = '\0';
    out->stop_index = delta->stop_index;
}

/* Stops are allowed from token number `allow_from` on. */
static qf_status run(const qf_detokenizer_options *options, const int32_t *tokens, int32_t num_tokens,
                     int32_t allow_from, result *out, qf_error *err)
{
    *out = (result){.stop_index = -1, .stop_token = -1};
    qf_vocabulary *vocabulary = NULL;
    qf_detokenizer *self = NULL;
    qf_text_delta delta;
    qf_status status;
    QF_TRY_GOTO(make_vocabulary(&vocabulary, err), end);
    QF_TRY_GOTO(qf_detokenizer_create(vocabulary, options, &self, err), end);
    for (int32_t i = 0; i < num_tokens; i++) {
        QF_TRY_GOTO(qf_detokenizer_push(self, tokens[i], i >= allow_from, &delta, err), end);
        add(out, &delta);
        if (delta.stop_index >= 0 && out->stop_token < 0) {
            out->stop_token = i;
        }
    }
    QF_TRY_GOTO(qf_detokenizer_finish(self, &delta, err), end);
    add(out, &delta);
    QF_TRY_GOTO(qf_detokenizer_push(self, 'x', true, &delta, err), end);
    CHECK_INT(delta.size_bytes, 0);
    QF_TRY_GOTO(qf_detokenizer_finish(self, &delta, err), end);
    CHECK_INT(delta.size_bytes, 0);
end:
    qf_detokenizer_destroy(self);
    qf_vocabulary_destroy(vocabulary);
    return status;
}

static void run_bytes(const qf_detokenizer_options *options, const char *bytes, result *out)
{
    int32_t tokens[1024];
    int32_t count = 0;
    for (; bytes[count] != '\0'; count++) {
        tokens[count] = (uint8_t)bytes[count];
    }
    qf_error err;
    CHECK_OK(run(options, tokens, count, 0, out, &err));
}

#define FFFD "\xef\xbf\xbd"

static void test_utf8(void)
{
    const struct {
        const char *bytes, *text;
    } cases[] = {
        {"a\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80z", "a\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80z"},
        {"\xc3", FFFD},
        {"\xc3z", FFFD "z"},
        {"\xc3\xc3\xa4", FFFD "\xc3\xa4"},
        {"\x80\xbf", FFFD FFFD},
        {"\xc0\xaf\xc1\xbf", FFFD FFFD FFFD FFFD},           /* overlong */
        {"\xe0\x80\x80", FFFD FFFD FFFD},                    /* overlong */
        {"\xe0\xa0", FFFD},                                  /* one maximal part */
        {"\xed\xa0\x80", FFFD FFFD FFFD},                    /* surrogate */
        {"\xed\x9f\xbf", "\xed\x9f\xbf"},
        {"\xf0\x80\x80\x80", FFFD FFFD FFFD FFFD},
        {"\xf0\x9f\x98", FFFD},
        {"\xf0\x9f\x98z", FFFD "z"},
        {"\xf0\x9f\xf0\x9f\x98\x80", FFFD "\xf0\x9f\x98\x80"},
        {"\xf4\x8f\xbf\xbf\xf4\x90\x80\x80", "\xf4\x8f\xbf\xbf" FFFD FFFD FFFD FFFD},
        {"\xf5\xff\xfe", FFFD FFFD FFFD},
        {"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf" "A", FFFD FFFD FFFD FFFD "A"},
    };
    const qf_detokenizer_options options = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        result out;
        run_bytes(&options, cases[i].bytes, &out);
        CHECK_STRING(out.text, cases[i].text);
        CHECK_INT(qf_utf8_is_valid((const uint8_t *)cases[i].bytes, strlen(cases[i].bytes)),
                  strcmp(cases[i].bytes, cases[i].text) == 0);
    }
}

static void test_stops(void)
{
    const struct {
        const char *stop[3];
        const char *bytes, *without, *with;
        int32_t index, token;
    } cases[] = {
        {{"END"}, "abENDcd", "ab", "abEND", 0, 4},
        {{"END"}, "abENcdEN", "abENcdEN", "abENcdEN", -1, -1},
        {{"aab"}, "aaaab", "aa", "aaaab", 0, 4},
        {{"abab"}, "aababab", "a", "aabab", 0, 4},
        {{"cd", "abcd"}, "xabcd", "x", "xabcd", 1, 4},        /* both end there: the longer */
        {{"abcde", "bc"}, "xabcde", "xa", "xabc", 1, 3},      /* the one that ends first */
        {{"q", "b", "b"}, "ab", "a", "ab", 1, 1},             /* equal: the lower index */
        {{"\xe2\x82\xac"}, "1\xe2\x82\xac" "2", "1", "1\xe2\x82\xac", 0, 3},
        {{"\xc3\xa4" "b"}, "\xc3\xa4" "c\xc3\xa4" "b", "\xc3\xa4" "c", "\xc3\xa4" "c\xc3\xa4" "b", 0, 5},
        {{FFFD "b"}, "a\xff" "bc", "a", "a" FFFD "b", 0, 2},
        {{"x" FFFD}, "ax\xc3", "a", "ax" FFFD, 0, -1}, /* completed by the end itself */
        {{"a"}, "a", "", "a", 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qf_detokenizer_options options = {.stop = cases[i].stop};
        while (options.num_stop < 3 && cases[i].stop[options.num_stop] != NULL) {
            options.num_stop++;
        }
        result out;
        for (int include = 0; include < 2; include++) {
            options.include_stop_str_in_output = include == 1;
            run_bytes(&options, cases[i].bytes, &out);
            CHECK_STRING(out.text, include == 1 ? cases[i].with : cases[i].without);
            CHECK_INT(out.stop_index, cases[i].index);
            CHECK_INT(out.stop_token, cases[i].token);
        }
    }
}

static void test_allow_stop(void)
{
    const char *const stop[] = {"ab"};
    qf_detokenizer_options options = {.stop = stop, .num_stop = 1};
    const int32_t tokens[] = {'x', 'a', 'b', 'y', 'a', 'b', 'z'};
    const struct {
        int32_t allow_from, stop_token;
        const char *text;
    } cases[] = {{0, 2, "x"},     {2, 2, "x"},       {3, 5, "xaby"},
                 {5, 5, "xaby"},  {6, -1, "xabyabz"}, {7, -1, "xabyabz"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        result out;
        qf_error err;
        CHECK_OK(run(&options, tokens, 7, cases[i].allow_from, &out, &err));
        CHECK_STRING(out.text, cases[i].text);
        CHECK_INT(out.stop_token, cases[i].stop_token);
    }
}

/* What each push gives: no more is held back than could still become a stop. */
static void test_held_back(void)
{
    const char *const stop[] = {"abc", "bd"};
    const qf_detokenizer_options options = {.stop = stop, .num_stop = 2};
    const struct {
        int32_t token;
        const char *text;
    } steps[] = {{'a', ""}, {'a', "a"}, {'b', ""}, {'x', "abx"}, {0xf0, ""}, {0x9f, ""}, {0x98, ""},
                 {0x80, "\xf0\x9f\x98\x80"}, {'b', ""}, {'a', "b"}, {'b', ""}, {'d', "a"}};
    qf_error err;
    qf_vocabulary *vocabulary = NULL;
    qf_detokenizer *self = NULL;
    qf_text_delta delta;
    CHECK_OK(make_vocabulary(&vocabulary, &err));
    CHECK_OK(qf_detokenizer_create(vocabulary, &options, &self, &err));
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        CHECK_OK(qf_detokenizer_push(self, steps[i].token, true, &delta, &err));
        CHECK_INT(delta.size_bytes, strlen(steps[i].text));
        CHECK(memcmp(delta.text, steps[i].text, strlen(steps[i].text)) == 0);
    }
    CHECK_INT(delta.stop_index, 1);
    qf_detokenizer_destroy(self);
    qf_vocabulary_destroy(vocabulary);
}

static void test_special_and_unknown(void)
{
    const int32_t tokens[] = {'a', SPECIAL, 0xc3, SPECIAL, 0xa4, EMPTY, -1, NUM_TOKENS, INT32_MAX, INT32_MIN, WORD};
    qf_detokenizer_options options = {.skip_special_tokens = true};
    result out;
    qf_error err;
    CHECK_OK(run(&options, tokens, 11, 0, &out, &err));
    CHECK_STRING(out.text, "a\xc3\xa4stop");
    options.skip_special_tokens = false;
    CHECK_OK(run(&options, tokens, 11, 0, &out, &err));
    CHECK_STRING(out.text, "a<|x|>" FFFD "<|x|>" FFFD "stop");
    const char *const stop[] = {"\xc3\xa4stop"};
    options = (qf_detokenizer_options){.stop = stop, .num_stop = 1, .skip_special_tokens = true};
    CHECK_OK(run(&options, tokens, 11, 0, &out, &err));
    CHECK_STRING(out.text, "a");
    CHECK_INT(out.stop_token, 10);
}

/* The same bytes, split into tokens in every way that two cuts allow: the same text and the same stop. */
static void test_splits(void)
{
    static const char bytes[] = "a\xc3\xa4\xf0\x9f\x98\x80\xff\xe2\x82ststop\xf0\x9f!";
    enum { SIZE = sizeof bytes - 1 };
    const char *const stop[] = {"\xef\xbf\xbdstst", "op\xef\xbf\xbd", "top!"};
    const uint8_t special[3] = {0};
    qf_error err;
    for (int num_stop = 0; num_stop <= 3; num_stop++) {
        const qf_detokenizer_options options = {.stop = stop, .num_stop = num_stop};
        result expected;
        run_bytes(&options, bytes, &expected);
        for (uint32_t a = 0; a <= SIZE; a++) {
            for (uint32_t b = a; b <= SIZE; b++) {
                const uint32_t offsets[4] = {0, a, b, SIZE};
                qf_vocabulary *vocabulary = NULL;
                qf_detokenizer *self = NULL;
                qf_text_delta delta;
                result out = {.stop_index = -1};
                CHECK_OK(qf_vocabulary_create((const uint8_t *)bytes, offsets, special, 3, &vocabulary, &err));
                CHECK_OK(qf_detokenizer_create(vocabulary, &options, &self, &err));
                for (int32_t i = 0; i < 3; i++) {
                    CHECK_OK(qf_detokenizer_push(self, i, true, &delta, &err));
                    add(&out, &delta);
                }
                CHECK_OK(qf_detokenizer_finish(self, &delta, &err));
                add(&out, &delta);
                CHECK_STRING(out.text, expected.text);
                CHECK_INT(out.stop_index, expected.stop_index);
                qf_detokenizer_destroy(self);
                qf_vocabulary_destroy(vocabulary);
            }
        }
    }
}

static void test_refused(void)
{
    qf_error err;
    qf_vocabulary *vocabulary = NULL;
    const uint8_t bytes[4] = "abcd", special[2] = {0};
    const uint32_t falling[3] = {0, 3, 2}, late[3] = {1, 2, 3}, good[3] = {0, 2, 4};
    CHECK_STATUS(qf_vocabulary_create(bytes, falling, special, 2, &vocabulary, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(qf_vocabulary_create(bytes, late, special, 2, &vocabulary, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_STATUS(qf_vocabulary_create(bytes, good, special, -1, &vocabulary, &err), QF_ERROR_INVALID_ARGUMENT);
    CHECK_OK(qf_vocabulary_create(bytes, good, special, 2, &vocabulary, &err));
    CHECK_INT(qf_vocabulary_size(vocabulary), 2);
    char longest[QF_MAX_STOP_BYTES + 2];
    memset(longest, 'a', sizeof longest);
    longest[QF_MAX_STOP_BYTES + 1] = '\0';
    const char *const bad[] = {"", longest, "\xff", "a\xc3", "\x82z"};
    qf_detokenizer *self = NULL;
    for (int i = 0; i < 5; i++) {
        const qf_detokenizer_options options = {.stop = &bad[i], .num_stop = 1};
        CHECK_STATUS(qf_detokenizer_create(vocabulary, &options, &self, &err), QF_ERROR_INVALID_ARGUMENT);
        CHECK(self == NULL);
    }
    const char *many[QF_MAX_STOP_STRINGS + 1];
    for (int i = 0; i <= QF_MAX_STOP_STRINGS; i++) {
        many[i] = longest + 1; /* QF_MAX_STOP_BYTES bytes */
    }
    qf_detokenizer_options options = {.stop = many, .num_stop = QF_MAX_STOP_STRINGS + 1};
    CHECK_STATUS(qf_detokenizer_create(vocabulary, &options, &self, &err), QF_ERROR_INVALID_ARGUMENT);
    options.num_stop = -1;
    CHECK_STATUS(qf_detokenizer_create(vocabulary, &options, &self, &err), QF_ERROR_INVALID_ARGUMENT);
    options.num_stop = QF_MAX_STOP_STRINGS;
    CHECK_OK(qf_detokenizer_create(vocabulary, &options, &self, &err));
    qf_detokenizer_destroy(self);
    qf_vocabulary_destroy(vocabulary);
}

/* The longest stop string, missed by its last byte again and again: all of it comes out, and nothing piles up. */
static void test_longest_stop(void)
{
    static char text[QF_MAX_STOP_BYTES + 1];
    memset(text, 'a', QF_MAX_STOP_BYTES - 1);
    text[QF_MAX_STOP_BYTES - 1] = 'b';
    const char *const stop[] = {text};
    const qf_detokenizer_options options = {.stop = stop, .num_stop = 1};
    static int32_t tokens[2000];
    for (int i = 0; i < 2000; i++) {
        tokens[i] = i == 1990 ? 'b' : 'a';
    }
    result out;
    qf_error err;
    CHECK_OK(run(&options, tokens, 2000, 0, &out, &err));
    CHECK_INT(out.stop_token, 1990);
    CHECK_INT(out.size_bytes, 1991 - QF_MAX_STOP_BYTES);
}

#ifdef CHECK_ALLOC_FAULTS
static void test_alloc_faults(void)
{
    const char *const stop[] = {"stop it"};
    const qf_detokenizer_options options = {.stop = stop, .num_stop = 1};
    int32_t tokens[100];
    for (int i = 0; i < 100; i++) {
        tokens[i] = i % 3 == 0 ? WORD : ' ';
    }
    for (int64_t n = 1;; n++) {
        result out;
        qf_error err;
        check_fail_alloc(n);
        qf_status status = run(&options, tokens, 100, 0, &out, &err);
        bool failed = check_alloc_failed();
        check_fail_alloc(0);
        CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
        if (!failed) {
            CHECK(n > 6);
            break;
        }
    }
}

/* A push that ran out of memory can be repeated, and the text is the same. */
static void test_repeat_after_fault(void)
{
    const char *const stop[] = {"stops"};
    const qf_detokenizer_options options = {.stop = stop, .num_stop = 1};
    qf_error err;
    qf_vocabulary *vocabulary = NULL;
    qf_detokenizer *self = NULL;
    qf_text_delta delta;
    result out = {.stop_index = -1};
    CHECK_OK(make_vocabulary(&vocabulary, &err));
    CHECK_OK(qf_detokenizer_create(vocabulary, &options, &self, &err));
    check_fail_alloc(1);
    CHECK_STATUS(qf_detokenizer_push(self, WORD, true, &delta, &err), QF_ERROR_OUT_OF_MEMORY);
    CHECK_INT(delta.size_bytes, 0);
    check_fail_alloc(0);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(qf_detokenizer_push(self, WORD, true, &delta, &err));
        add(&out, &delta);
    }
    CHECK_STRING(out.text, "");
    CHECK_INT(out.stop_index, 0);
    qf_detokenizer_destroy(self);
    qf_vocabulary_destroy(vocabulary);
}
#endif

int main(void)
{
#ifdef CHECK_ALLOC_FAULTS
    RUN(test_alloc_faults);
    RUN(test_repeat_after_fault);
#endif
    RUN(test_utf8);
    RUN(test_stops);
    RUN(test_allow_stop);
    RUN(test_held_back);
    RUN(test_special_and_unknown);
    RUN(test_splits);
    RUN(test_refused);
    RUN(test_longest_stop);
    return check_report();
}
