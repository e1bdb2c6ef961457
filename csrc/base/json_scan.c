#include "base/json_scan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

qf_status qf_json_fail_at(const qf_json_scanner *s, const char *file, int line, size_t offset, const char *reason)
{
    return qf_error_set(s->err, QF_ERROR_MODEL, file, line, "%s: byte %zu: %s", s->what, offset, reason);
}

/* -- strings ------------------------------------------------------------------------------------------------- */

static void put_utf8(qf_json_scanner *s, uint32_t code)
{
    char *out = s->strings + s->string_bytes;
    if (code < 0x80) {
        out[0] = (char)code;
        s->string_bytes += 1;
    } else if (code < 0x800) {
        out[0] = (char)(0xc0 | (code >> 6));
        out[1] = (char)(0x80 | (code & 0x3f));
        s->string_bytes += 2;
    } else if (code < 0x10000) {
        out[0] = (char)(0xe0 | (code >> 12));
        out[1] = (char)(0x80 | ((code >> 6) & 0x3f));
        out[2] = (char)(0x80 | (code & 0x3f));
        s->string_bytes += 3;
    } else {
        out[0] = (char)(0xf0 | (code >> 18));
        out[1] = (char)(0x80 | ((code >> 12) & 0x3f));
        out[2] = (char)(0x80 | ((code >> 6) & 0x3f));
        out[3] = (char)(0x80 | (code & 0x3f));
        s->string_bytes += 4;
    }
}

/* Bytes of the well-formed UTF-8 sequence at the front (RFC 3629: shortest form, no surrogates, up to U+10FFFF),
 * or 0. */
static size_t utf8_length(const unsigned char *bytes, size_t size)
{
    unsigned char lead = bytes[0];
    size_t length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    if (length > size) {
        return 0;
    }
    for (size_t i = 1; i < length; i++) {
        if ((bytes[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    bool overlong = (lead == 0xe0 && bytes[1] < 0xa0) || (lead == 0xf0 && bytes[1] < 0x90);
    bool too_high = (lead == 0xed && bytes[1] >= 0xa0) || (lead == 0xf4 && bytes[1] >= 0x90);
    return overlong || too_high ? 0 : length;
}

/* The four hex digits of a \u escape, whose backslash is at `escape`. */
static qf_status parse_hex4(qf_json_scanner *s, size_t escape, uint32_t *out)
{
    uint32_t code = 0;
    for (int i = 0; i < 4; i++, s->at++) {
        int c = qf_json_peek(s);
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) {
            return QF_JSON_FAIL(s, escape, "\\u needs four hexadecimal digits");
        }
        code = code << 4 | (uint32_t)digit;
    }
    *out = code;
    return QF_OK;
}

static qf_status parse_escape(qf_json_scanner *s)
{
    static const char names[] = "\"\\/bfnrt";
    static const char bytes[] = "\"\\/\b\f\n\r\t";
    size_t escape = s->at++;
    int c = qf_json_peek(s);
    const char *name = c > 0 ? strchr(names, c) : NULL;
    if (name != NULL) {
        s->at++;
        put_utf8(s, (uint32_t)bytes[name - names]);
        return QF_OK;
    }
    if (c != 'u') {
        return QF_JSON_FAIL(s, escape, "unknown escape in a string");
    }
    s->at++;
    uint32_t code;
    QF_TRY(parse_hex4(s, escape, &code));
    if (code >= 0xd800 && code < 0xe000) {
        uint32_t low = 0;
        if (code < 0xdc00 && s->size - s->at >= 6 && s->text[s->at] == '\\' && s->text[s->at + 1] == 'u') {
            s->at += 2;
            QF_TRY(parse_hex4(s, escape, &low));
        }
        if (low < 0xdc00 || low >= 0xe000) {
            return QF_JSON_FAIL(s, escape, "half of a surrogate pair");
        }
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    put_utf8(s, code);
    return QF_OK;
}

/* At the opening quote. The result is NUL-terminated. */
qf_status qf_json_scan_string(qf_json_scanner *s, const char **out, size_t *out_length)
{
    size_t quote = s->at++;
    size_t start = s->string_bytes;
    for (;;) {
        int c = qf_json_peek(s);
        if (c < 0) {
            return QF_JSON_FAIL(s, quote, "the string is not closed");
        }
        if (c == '"') {
            break;
        }
        if (c < 0x20) {
            return QF_JSON_FAIL(s, s->at, "control character in a string");
        }
        if (c == '\\') {
            QF_TRY(parse_escape(s));
            continue;
        }
        size_t length = utf8_length((const unsigned char *)s->text + s->at, s->size - s->at);
        if (length == 0) {
            return QF_JSON_FAIL(s, s->at, "invalid UTF-8 in a string");
        }
        memcpy(s->strings + s->string_bytes, s->text + s->at, length);
        s->string_bytes += length;
        s->at += length;
    }
    s->at++;
    *out = s->strings + start;
    *out_length = s->string_bytes - start;
    s->strings[s->string_bytes++] = '\0';
    return QF_OK;
}

/* -- numbers ------------------------------------------------------------------------------------------------- */

/* Enough for every double and every halfway point between two (767 digits), plus one that says "and a bit more". */
#define MAX_DIGITS 800

typedef struct decimal {
    char digits[MAX_DIGITS + 32]; /* no leading zeros; room for "e", the exponent and a NUL */
    size_t num_digits;
    int64_t exponent; /* value = digits * 10^exponent */
    bool truncated;   /* digits other than 0 were left out */
} decimal;

static bool is_digit(int c) { return c >= '0' && c <= '9'; }

static void add_digit(decimal *d, int c, bool after_point)
{
    d->exponent -= after_point ? 1 : 0;
    if (d->num_digits == 0 && c == '0') {
        return;
    }
    if (d->num_digits < MAX_DIGITS) {
        d->digits[d->num_digits++] = (char)c;
        return;
    }
    d->exponent++;
    d->truncated |= c != '0';
}

/* To the nearest double. strtod() only ever sees digits and an exponent: the decimal point, which is what differs
 * between locales, has been moved into the exponent. */
static double decimal_to_double(decimal *d)
{
    if (d->num_digits == 0) {
        return 0.0;
    }
    if (d->truncated) {
        d->digits[d->num_digits++] = '1';
        d->exponent--;
    }
    /* 1 <= digits < 10^801, so exponents beyond these are infinity and zero whatever the digits are. */
    int64_t exponent = d->exponent > 400 ? 400 : d->exponent < -1200 ? -1200 : d->exponent;
    (void)snprintf(d->digits + d->num_digits, sizeof d->digits - d->num_digits, "e%d", (int)exponent);
    return strtod(d->digits, NULL);
}

/* Consumes digits; false if there is none. */
static bool parse_digits(qf_json_scanner *s, decimal *d, bool after_point)
{
    if (!is_digit(qf_json_peek(s))) {
        return false;
    }
    for (; is_digit(qf_json_peek(s)); s->at++) {
        add_digit(d, qf_json_peek(s), after_point);
    }
    return true;
}

static bool parse_exponent(qf_json_scanner *s, int64_t *out)
{
    s->at++; /* the "e" */
    bool negative = qf_json_peek(s) == '-';
    s->at += negative || qf_json_peek(s) == '+' ? 1 : 0;
    if (!is_digit(qf_json_peek(s))) {
        return false;
    }
    int64_t exponent = 0;
    for (; is_digit(qf_json_peek(s)); s->at++) {
        /* Saturates far beyond what the digits before it, at most the text's size, can make good. */
        exponent = exponent < INT64_MAX / 100 ? exponent * 10 + (qf_json_peek(s) - '0') : exponent;
    }
    *out = negative ? -exponent : exponent;
    return true;
}

static bool decimal_to_int64(const decimal *d, bool negative, int64_t *out)
{
    int64_t value = 0; /* negated: the negative range is the larger one */
    if (d->exponent != 0 || d->num_digits > 19) {
        return false;
    }
    for (size_t i = 0; i < d->num_digits; i++) {
        if (__builtin_mul_overflow(value, (int64_t)10, &value) ||
            __builtin_sub_overflow(value, (int64_t)(d->digits[i] - '0'), &value)) {
            return false;
        }
    }
    return negative ? (*out = value, true) : !__builtin_sub_overflow((int64_t)0, value, out);
}

qf_status qf_json_scan_number(qf_json_scanner *s, qf_json_value *value)
{
    size_t start = s->at;
    decimal d;
    d.num_digits = 0;
    d.exponent = 0;
    d.truncated = false;
    bool negative = qf_json_peek(s) == '-', integer = true;
    s->at += negative ? 1 : 0;
    size_t first = s->at;
    if (!parse_digits(s, &d, false)) {
        return QF_JSON_FAIL(s, start, "not a number: digits are missing");
    }
    if (s->text[first] == '0' && s->at - first > 1) {
        return QF_JSON_FAIL(s, start, "not a number: leading zero");
    }
    if (qf_json_peek(s) == '.') {
        s->at++;
        integer = false;
        if (!parse_digits(s, &d, true)) {
            return QF_JSON_FAIL(s, start, "not a number: no digit after the decimal point");
        }
    }
    if (qf_json_peek(s) == 'e' || qf_json_peek(s) == 'E') {
        int64_t exponent;
        integer = false;
        if (!parse_exponent(s, &exponent)) {
            return QF_JSON_FAIL(s, start, "not a number: no digit in the exponent");
        }
        d.exponent += exponent;
    }
    if (negative && s->text[first] == '0') {
        integer = false; /* -0 has no integer */
    }
    if (integer && decimal_to_int64(&d, negative, &value->integer)) {
        value->type = QF_JSON_INT;
        value->number = (double)value->integer;
        return QF_OK;
    }
    value->type = QF_JSON_DOUBLE;
    value->number = decimal_to_double(&d);
    if (isinf(value->number)) {
        return QF_JSON_FAIL(s, start, "the number is too large for a double");
    }
    value->number = negative ? -value->number : value->number;
    return QF_OK;
}
