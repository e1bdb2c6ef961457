/* A small fuzzer for compilers without libFuzzer: `program seconds reproducer corpus_file...`.
 *
 * Replays the corpus, then mutates its members for the given time: always in the same order, so a finding comes
 * again. It is blind (nothing tells it which branches ran); its worth is in the sanitizers it runs under. The input
 * that was running when a sanitizer gave up, or that took too long, is written to `reproducer`. */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_INPUTS 4096
#define MAX_INPUT_BYTES ((size_t)1 << 16)
#define MAX_SECONDS_PER_INPUT 20

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
void __sanitizer_set_death_callback(void (*callback)(void));

typedef struct input {
    uint8_t *data;
    size_t size;
} input;

static input inputs[MAX_INPUTS];
static size_t num_inputs;
static const uint8_t *running;
static size_t running_size;
static const char *reproducer_path;
static uint64_t random_state = 1;

static void save_running(void)
{
    FILE *file = fopen(reproducer_path, "wb");
    if (file != NULL) {
        (void)fwrite(running, 1, running_size, file);
        (void)fclose(file);
    }
}

static void on_signal(int number)
{
    save_running();
    (void)fprintf(stderr, "%s\n", number == SIGALRM ? "one input took too long" : "aborted");
    _exit(1);
}

/* splitmix64 */
static size_t random_below(size_t bound)
{
    uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (size_t)((z ^ z >> 31) % bound);
}

/* The target gets a block of exactly the input's size, so that reading past its end is seen. */
static void run_input(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size > 0 ? size : 1);
    if (copy == NULL) {
        exit(2);
    }
    memcpy(copy, data, size);
    running = data;
    running_size = size;
    (void)alarm(MAX_SECONDS_PER_INPUT);
    (void)LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

/* One change in place; `data` has room for MAX_INPUT_BYTES. */
static size_t mutate(uint8_t *data, size_t size)
{
    static const uint8_t telling[] = {0, 1, 0x7f, 0x80, 0xff, '"', '\\', '{', '}', '[', ']', ',', ':', '-', '0', 'e'};
    size_t at = size > 0 ? random_below(size) : 0;
    size_t room = size - at;
    switch (random_below(8)) {
    case 0: /* a bit */
        if (size > 0) {
            data[at] ^= (uint8_t)(1u << random_below(8));
        }
        return size;
    case 1: /* a byte that parsers care about */
        if (size > 0) {
            data[at] = telling[random_below(sizeof telling)];
        }
        return size;
    case 2: /* a word at one of its limits */
        if (room >= 8) {
            uint64_t word = random_below(2) != 0 ? UINT64_MAX << random_below(64) : UINT64_C(1) << random_below(64);
            memcpy(data + at, &word, 8);
        }
        return size;
    case 3: /* insert a byte */
        if (size == MAX_INPUT_BYTES) {
            return size;
        }
        memmove(data + at + 1, data + at, room);
        data[at] = telling[random_below(sizeof telling)];
        return size + 1;
    case 4: /* remove a run */
        if (size > 0) {
            size_t count = 1 + random_below(room < 16 ? room : 16);
            memmove(data + at, data + at + count, room - count);
            return size - count;
        }
        return size;
    case 5: /* repeat a run */
        if (size > 0) {
            size_t count = 1 + random_below(room);
            count = count < MAX_INPUT_BYTES - size ? count : MAX_INPUT_BYTES - size;
            memmove(data + at + count, data + at, room);
            return size + count;
        }
        return size;
    case 6: /* cut short */
        return random_below(4) == 0 ? at : size;
    default: { /* go on as another input does */
        const input *other = &inputs[random_below(num_inputs)];
        size_t from = other->size > 0 ? random_below(other->size) : 0;
        size_t count = other->size - from;
        count = count < MAX_INPUT_BYTES - at ? count : MAX_INPUT_BYTES - at;
        memcpy(data + at, other->data + from, count);
        return at + count;
    }
    }
}

static void load(const char *path)
{
    static uint8_t buffer[MAX_INPUT_BYTES];
    FILE *file = fopen(path, "rb");
    if (file == NULL || num_inputs == MAX_INPUTS) {
        (void)fprintf(stderr, "cannot load %s\n", path);
        exit(2);
    }
    input *in = &inputs[num_inputs++];
    in->size = fread(buffer, 1, sizeof buffer, file);
    (void)fclose(file);
    in->data = malloc(in->size > 0 ? in->size : 1);
    if (in->data == NULL) {
        exit(2);
    }
    memcpy(in->data, buffer, in->size);
}

int main(int argc, char **argv)
{
    static uint8_t data[MAX_INPUT_BYTES];
    static input empty;
    if (argc < 3) {
        return 2;
    }
    double seconds = atof(argv[1]);
    reproducer_path = argv[2];
    for (int i = 3; i < argc; i++) {
        load(argv[i]);
    }
    if (num_inputs == 0) {
        inputs[num_inputs++] = empty;
    }
    __sanitizer_set_death_callback(save_running);
    (void)signal(SIGALRM, on_signal);
    (void)signal(SIGABRT, on_signal);
    for (size_t i = 0; i < num_inputs; i++) {
        run_input(inputs[i].data, inputs[i].size);
    }
    struct timespec start, now;
    (void)clock_gettime(CLOCK_MONOTONIC, &start);
    long long runs = 0;
    do {
        for (int i = 0; i < 100; i++, runs++) {
            const input *seed = &inputs[random_below(num_inputs)];
            size_t size = seed->size;
            memcpy(data, seed->data != NULL ? seed->data : data, size);
            for (size_t changes = 1 + random_below(6); changes > 0; changes--) {
                size = mutate(data, size);
            }
            run_input(data, size);
        }
        (void)clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - start.tv_sec) + 1e-9 * (double)(now.tv_nsec - start.tv_nsec) < seconds);
    (void)printf("%lld runs from %zu inputs\n", runs, num_inputs);
    for (size_t i = 0; i < num_inputs; i++) {
        free(inputs[i].data);
    }
    return 0;
}
