#include "engine/utf8.h"

#include <string.h>

static const uint8_t REPLACEMENT[3] = {0xef, 0xbf, 0xbd}; /* U+FFFD */

/* Bytes of the character that begins with this one; 0: none does. */
static uint8_t length_from_first(uint8_t byte)
{
    if (byte < 0x80) {
        return 1;
    }
    if (byte >= 0xc2 && byte <= 0xdf) {
        return 2;
    }
    if (byte >= 0xe0 && byte <= 0xef) {
        return 3;
    }
    return byte >= 0xf0 && byte <= 0xf4 ? 4 : 0;
}

/* The second byte's range rules out overlong forms, surrogates and everything above U+10FFFF. */
static bool continues(const qf_utf8 *self, uint8_t byte)
{
    uint8_t low = 0x80, high = 0xbf;
    if (self->length == 1) {
        switch (self->bytes[0]) {
        case 0xe0: low = 0xa0; break;
        case 0xed: high = 0x9f; break;
        case 0xf0: low = 0x90; break;
        case 0xf4: high = 0x8f; break;
        default: break;
        }
    }
    return byte >= low && byte <= high;
}

size_t qf_utf8_finish(qf_utf8 *self, uint8_t *out)
{
    if (self->length == 0) {
        return 0;
    }
    self->length = 0;
    self->needed = 0;
    memcpy(out, REPLACEMENT, sizeof REPLACEMENT);
    return sizeof REPLACEMENT;
}

size_t qf_utf8_push(qf_utf8 *self, uint8_t byte, uint8_t *out)
{
    size_t size = 0;
    if (self->length > 0) {
        if (continues(self, byte)) {
            self->bytes[self->length++] = byte;
            if (self->length < self->needed) {
                return 0;
            }
            size = self->length;
            memcpy(out, self->bytes, size);
            self->length = 0;
            self->needed = 0;
            return size;
        }
        size = qf_utf8_finish(self, out); /* what was pending is ill-formed; the byte begins anew */
    }
    uint8_t needed = length_from_first(byte);
    if (needed == 1) {
        out[size++] = byte;
    } else if (needed == 0) {
        memcpy(out + size, REPLACEMENT, sizeof REPLACEMENT);
        size += sizeof REPLACEMENT;
    } else {
        self->bytes[0] = byte;
        self->length = 1;
        self->needed = needed;
    }
    return size;
}

bool qf_utf8_is_valid(const uint8_t *text, size_t size_bytes)
{
    qf_utf8 state = {0};
    for (size_t i = 0; i < size_bytes; i++) {
        if (state.length > 0 ? !continues(&state, text[i]) : length_from_first(text[i]) == 0) {
            return false;
        }
        uint8_t out[QF_UTF8_MAX_OUTPUT];
        (void)qf_utf8_push(&state, text[i], out);
    }
    return state.length == 0;
}
