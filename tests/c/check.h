/* The harness of the C tests: one main() per file, plain macros, no state outside the test program.
 *
 *   static void test_something(void) { qf_error err; CHECK_OK(qf_call(..., &err)); CHECK_INT(actual, expected); }
 *   int main(void) { RUN(test_something); return check_report(); }
 *
 * A failed check prints file, line and what was found, is counted, and the test goes on. The comments at the top of a
 * test file tell run.py how to build it; there is one build per sanitizer. With `alloc-faults: yes` there is one more
 * build, in which alloc_fault.c stands in for base/alloc.c and CHECK_ALLOC_FAULTS is defined:
 *
 *   for (int64_t n = 1;; n++) {
 *       check_fail_alloc(n);
 *       qf_status status = scenario();                     (frees what it made, whatever happens)
 *       bool failed = check_alloc_failed();
 *       check_fail_alloc(0);
 *       CHECK_INT(status, failed ? QF_ERROR_OUT_OF_MEMORY : QF_OK);
 *       if (!failed) break;
 *   }
 */
#ifndef QF_TESTS_CHECK_H
#define QF_TESTS_CHECK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"

#ifdef CHECK_ALLOC_FAULTS
/* The n-th allocation from now on fails (n from 1), and only that one; 0 switches the faults off. */
void check_fail_alloc(int64_t n);
/* Whether an allocation was made to fail since the last check_fail_alloc(). */
bool check_alloc_failed(void);
#endif

static atomic_int check_failures;
static atomic_int check_count;

/* Floods of the same failure say nothing new: print the first of them only. */
#define CHECK_MAX_PRINTED 50

static inline bool check_begin_failure(const char *file, int line)
{
    int earlier = atomic_fetch_add(&check_failures, 1);
    if (earlier == CHECK_MAX_PRINTED) {
        (void)fprintf(stderr, "(further failures are counted, not printed)\n");
    }
    if (earlier >= CHECK_MAX_PRINTED) {
        return false;
    }
    (void)fprintf(stderr, "%s:%d: ", file, line);
    return true;
}

static inline void check_true(bool ok, const char *text, const char *file, int line)
{
    atomic_fetch_add(&check_count, 1);
    if (!ok && check_begin_failure(file, line)) {
        (void)fprintf(stderr, "CHECK failed: %s\n", text);
    }
}

static inline void check_int(long long actual, long long expected, const char *text, const char *file, int line)
{
    atomic_fetch_add(&check_count, 1);
    if (actual != expected && check_begin_failure(file, line)) {
        (void)fprintf(stderr, "%s is %lld, expected %lld\n", text, actual, expected);
    }
}

static inline void check_string(const char *actual, const char *expected, const char *text, const char *file, int line)
{
    atomic_fetch_add(&check_count, 1);
    bool equal = actual != NULL && expected != NULL ? strcmp(actual, expected) == 0 : actual == expected;
    if (!equal && check_begin_failure(file, line)) {
        (void)fprintf(stderr, "%s is \"%s\", expected \"%s\"\n", text, actual != NULL ? actual : "(null)",
                      expected != NULL ? expected : "(null)");
    }
}

/* `err` is read only where the status is a failure, which filled it. */
static inline void check_status(qf_status actual, qf_status expected, const qf_error *err, const char *text,
                                const char *file, int line)
{
    atomic_fetch_add(&check_count, 1);
    if (actual != expected && check_begin_failure(file, line)) {
        (void)fprintf(stderr, "%s returned status %d, expected %d", text, (int)actual, (int)expected);
        if (actual != QF_OK && err != NULL) {
            (void)fprintf(stderr, ": %s (%s:%d)", err->message, err->file, err->line);
        }
        (void)fprintf(stderr, "\n");
    }
}

static inline void check_run(void (*test)(void), const char *name)
{
    int before = atomic_load(&check_failures);
    test();
    bool ok = atomic_load(&check_failures) == before;
    (void)printf("%s %s\n", ok ? "ok    " : "FAILED", name);
    (void)fflush(stdout);
}

/* A program without a single check has proved nothing, so that is a failure too. */
static inline int check_report(void)
{
    int failures = atomic_load(&check_failures);
    int count = atomic_load(&check_count);
    (void)printf("%d checks, %d failures\n", count, failures);
    return failures == 0 && count > 0 ? 0 : 1;
}

#define CHECK(cond) check_true((cond), #cond, __FILE__, __LINE__)
#define CHECK_INT(actual, expected) \
    check_int((long long)(actual), (long long)(expected), #actual, __FILE__, __LINE__)
#define CHECK_STRING(actual, expected) check_string((actual), (expected), #actual, __FILE__, __LINE__)

/* Both need a local `qf_error err`, which the call is given. */
#define CHECK_STATUS(call, expected) check_status((call), (expected), &err, #call, __FILE__, __LINE__)
#define CHECK_OK(call) CHECK_STATUS(call, QF_OK)

#define RUN(test_fn) check_run((test_fn), #test_fn)

#endif
