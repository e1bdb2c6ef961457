/* UTF-8, a byte at a time, with U+FFFD for every maximal ill-formed part (Unicode 15, table 3-7 and "U+FFFD
 * substitution of maximal subparts"): what Python's bytes.decode("utf-8", errors="replace") does. */
#ifndef QF_ENGINE_UTF8_H
#define QF_ENGINE_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The beginning of a character that is not complete yet. All zero at the start. */
typedef struct qf_utf8 {
    uint8_t bytes[4];
    uint8_t length, needed; /* 0 <= length < needed <= 4, or both 0 */
} qf_utf8;

/* The most that one byte can give: U+FFFD for what was pending and then U+FFFD for the byte. */
#define QF_UTF8_MAX_OUTPUT 6

/* Adds a byte; text that is certain now goes to out: (QF_UTF8_MAX_OUTPUT). Returns how many bytes. */
size_t qf_utf8_push(qf_utf8 *self, uint8_t byte, uint8_t *out);
/* The end: an incomplete character comes out as U+FFFD. */
size_t qf_utf8_finish(qf_utf8 *self, uint8_t *out);
/* True if all of text is well-formed. */
bool qf_utf8_is_valid(const uint8_t *text, size_t size_bytes);

#endif
