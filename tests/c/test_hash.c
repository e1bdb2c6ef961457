/* sources: base/hash.c base/status.c */
/* sanitizers: address thread */
#include "base/hash.h"

#include "check.h"

/* From the SipHash authors' reference vectors: key 00 01 .. 0f, message 00 01 .. (length - 1), output bytes in hex. */
static const struct {
    int length;
    const char *hex;
} vectors[] = {
    {0, "a3817f04ba25a8e66df67214c7550293"},  {1, "da87c1d86b99af44347659119b22fc45"},
    {2, "8177228da4a45dc7fca38bdef60affe4"},  {3, "9c70b60c5267a94e5f33b6b02985ed51"},
    {4, "f88164c12d9c8faf7d0f6e7c7bcd5579"},  {5, "1368875980776f8854527a07690e9627"},
    {6, "14eeca338b208613485ea0308fd7a15e"},  {7, "a1f1ebbed8dbc153c0b84aa61ff08239"},
    {8, "3b62a9ba6258f5610f83e264f31497b4"},  {9, "264499060ad9baabc47f8b02bb6d71ed"},
    {15, "5493e99933b0a8117e08ec0f97cfc3d9"}, {16, "6ee2a4ca67b054bbfd3315bf85230577"},
    {31, "2939b0183223fafc1723de4f52c43d35"}, {63, "5150d1772f50834a503e069a973fbd7c"},
};

static uint64_t word_le(const uint8_t *bytes)
{
    uint64_t word = 0;
    for (int i = 7; i >= 0; i--) {
        word = word << 8 | bytes[i];
    }
    return word;
}

static void to_hex(qf_hash128 hash, char *hex)
{
    for (int i = 0; i < 16; i++) {
        unsigned byte = (unsigned)((i < 8 ? hash.low >> (8 * i) : hash.high >> (8 * (i - 8))) & 0xff);
        (void)snprintf(hex + 2 * i, 3, "%02x", byte);
    }
}

static void test_reference_vectors(void)
{
    uint8_t key[16], storage[1 + 64];
    for (int i = 0; i < 16; i++) {
        key[i] = (uint8_t)i;
    }
    for (int misaligned = 0; misaligned < 2; misaligned++) {
        uint8_t *message = storage + misaligned;
        for (int i = 0; i < 64; i++) {
            message[i] = (uint8_t)i;
        }
        for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
            char hex[33];
            to_hex(qf_siphash128(message, (size_t)vectors[i].length, word_le(key), word_le(key + 8)), hex);
            CHECK_STRING(hex, vectors[i].hex);
        }
    }
}

/* Every bit of the message and of the key matters. */
static void test_every_bit_counts(void)
{
    uint8_t message[21] = {0};
    qf_hash128 plain = qf_siphash128(message, sizeof message, 1, 2);
    for (size_t bit = 0; bit < 8 * sizeof message; bit++) {
        message[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        qf_hash128 other = qf_siphash128(message, sizeof message, 1, 2);
        CHECK(other.low != plain.low && other.high != plain.high);
        message[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    for (int bit = 0; bit < 64; bit++) {
        CHECK(qf_siphash128(message, sizeof message, 1 ^ UINT64_C(1) << bit, 2).low != plain.low);
        CHECK(qf_siphash128(message, sizeof message, 1, 2 ^ UINT64_C(1) << bit).high != plain.high);
    }
    CHECK(qf_siphash128(message, 20, 1, 2).low != plain.low); /* trailing zeros are part of the message */
}

static void test_random(void)
{
    uint64_t ones = 0, zeros = 0;
    for (int i = 0; i < 64; i++) {
        uint64_t value = qf_random_u64();
        ones |= value;
        zeros |= ~value;
    }
    /* A bit that is the same 64 times happens once in 2^57 runs. */
    CHECK(ones == UINT64_MAX);
    CHECK(zeros == UINT64_MAX);
}

int main(void)
{
    RUN(test_reference_vectors);
    RUN(test_every_bit_counts);
    RUN(test_random);
    return check_report();
}
