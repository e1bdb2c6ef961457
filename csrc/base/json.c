/* needs: base/json_scan.c */
#include "base/json.h"

#include <string.h>

#include "base/alloc.h"
#include "base/json_scan.h"

/* An object with more members than this carries an index right behind its items: (length) uint32_t, the numbers of
 * the items in the order of their keys. Sorted rather than hashed, so no choice of keys makes it slow. */
#define MAX_UNINDEXED_MEMBERS 16
#define MIN_CHUNK_BYTES ((size_t)16 << 10)
#define NO_CONTAINER SIZE_MAX

typedef struct chunk {
    struct chunk *next;
    size_t used_bytes, capacity_bytes;
    _Alignas(16) unsigned char data[];
} chunk;

struct qf_json {
    qf_json_value root;
    char *strings;
    chunk *chunks; /* items and indices of arrays and objects */
};

typedef struct parser {
    qf_json_scanner scan;
    qf_json_limits limits;
    qf_json *document;
    /* The values of containers that are still open. An open container comes right before its items so far, and its
     * `length` is the position of the container around it (NO_CONTAINER for none). */
    qf_json_value *stack;
    size_t stack_size, stack_capacity;
    size_t open; /* position of the innermost open container */
    int32_t depth;
    size_t num_values;
} parser;

/* -- storage ------------------------------------------------------------------------------------------------- */

static qf_status chunk_alloc(parser *p, size_t bytes, void **out)
{
    chunk *top = p->document->chunks;
    bytes = (bytes + 15) & ~(size_t)15;
    if (top == NULL || top->capacity_bytes - top->used_bytes < bytes) {
        /* Doubling keeps the number of chunks small, and a document of one member small too. */
        size_t capacity = top == NULL ? MIN_CHUNK_BYTES : top->capacity_bytes * 2;
        capacity = capacity < bytes ? bytes : capacity;
        void *memory;
        QF_TRY(qf_alloc(&memory, 1, sizeof(chunk) + capacity, "JSON values", p->scan.err));
        top = memory;
        top->capacity_bytes = capacity;
        top->next = p->document->chunks;
        p->document->chunks = top;
    }
    *out = top->data + top->used_bytes;
    top->used_bytes += bytes;
    return QF_OK;
}

/* Appends a zeroed value and takes the pending key. *out is valid until the next push. */
static qf_status push_value(parser *p, const char *key, size_t key_length, qf_json_value **out)
{
    if (p->num_values == p->limits.max_values) {
        return QF_FAIL(p->scan.err, QF_ERROR_MODEL, "%s: byte %zu: more than %zu values", p->scan.what, p->scan.at,
                       p->limits.max_values);
    }
    if (p->stack_size == p->stack_capacity) {
        size_t capacity = p->stack_capacity > 0 ? p->stack_capacity * 2 : 64;
        qf_json_value *grown = qf_realloc(p->stack, capacity, sizeof *grown);
        if (grown == NULL) {
            return QF_FAIL(p->scan.err, QF_ERROR_OUT_OF_MEMORY, "cannot allocate JSON values: %zu items of %zu bytes",
                           capacity, sizeof *grown);
        }
        p->stack = grown;
        p->stack_capacity = capacity;
    }
    qf_json_value *value = &p->stack[p->stack_size++];
    memset(value, 0, sizeof *value);
    value->key = key;
    value->key_length = key_length;
    p->num_values++;
    *out = value;
    return QF_OK;
}

/* -- members ------------------------------------------------------------------------------------------------- */

static int compare_keys(const char *a, size_t a_length, const char *b, size_t b_length)
{
    int order = memcmp(a, b, a_length < b_length ? a_length : b_length);
    return order != 0 ? order : (a_length > b_length) - (a_length < b_length);
}

static int compare_members(const qf_json_value *items, uint32_t a, uint32_t b)
{
    return compare_keys(items[a].key, items[a].key_length, items[b].key, items[b].key_length);
}

static void sift_down(const qf_json_value *items, uint32_t *heap, size_t root, size_t size)
{
    for (size_t child = 2 * root + 1; child < size; child = 2 * root + 1) {
        if (child + 1 < size && compare_members(items, heap[child], heap[child + 1]) < 0) {
            child++;
        }
        if (compare_members(items, heap[root], heap[child]) >= 0) {
            return;
        }
        uint32_t swap = heap[root];
        heap[root] = heap[child];
        heap[child] = swap;
        root = child;
    }
}

/* Heap sort: in place, and n log n for every input. */
static void sort_members(const qf_json_value *items, uint32_t *index, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        index[i] = (uint32_t)i;
    }
    for (size_t i = length / 2; i-- > 0;) {
        sift_down(items, index, i, length);
    }
    for (size_t last = length; last-- > 1;) {
        uint32_t largest = index[0];
        index[0] = index[last];
        index[last] = largest;
        sift_down(items, index, 0, last);
    }
}

static qf_status fail_duplicate(const parser *p, const qf_json_value *member)
{
    char shown[101]; /* its beginning; what is no printable ASCII would spoil the message */
    size_t length = member->key_length < sizeof shown - 1 ? member->key_length : sizeof shown - 1;
    for (size_t i = 0; i < length; i++) {
        char c = member->key[i];
        shown[i] = c >= 0x20 && c < 0x7f ? c : '?';
    }
    shown[length] = '\0';
    return QF_FAIL(p->scan.err, QF_ERROR_MODEL, "%s: byte %zu: the object has the key \"%s\" twice", p->scan.what,
                   p->scan.at, shown);
}

/* `index` is NULL for a small object. */
static qf_status check_duplicates(const parser *p, const qf_json_value *items, size_t length, uint32_t *index)
{
    if (index != NULL) {
        sort_members(items, index, length);
        for (size_t i = 1; i < length; i++) {
            if (compare_members(items, index[i - 1], index[i]) == 0) {
                return fail_duplicate(p, &items[index[i]]);
            }
        }
        return QF_OK;
    }
    for (uint32_t i = 1; i < length; i++) {
        for (uint32_t j = 0; j < i; j++) {
            if (compare_members(items, i, j) == 0) {
                return fail_duplicate(p, &items[i]);
            }
        }
    }
    return QF_OK;
}

/* -- grammar ------------------------------------------------------------------------------------------------- */

static void skip_space(parser *p)
{
    for (int c = qf_json_peek(&p->scan); c == ' ' || c == '\t' || c == '\n' || c == '\r'; c = qf_json_peek(&p->scan)) {
        p->scan.at++;
    }
}

static qf_status open_container(parser *p, qf_json_value *value, qf_json_type type)
{
    if (p->depth >= p->limits.max_depth) {
        return QF_FAIL(p->scan.err, QF_ERROR_MODEL, "%s: byte %zu: nested deeper than %d levels", p->scan.what,
                       p->scan.at, p->limits.max_depth);
    }
    p->scan.at++;
    p->depth++;
    value->type = type;
    value->length = p->open;
    p->open = p->stack_size - 1;
    return QF_OK;
}

/* At the closing bracket: moves the items to their final place. */
static qf_status close_container(parser *p)
{
    qf_json_value *container = &p->stack[p->open];
    size_t length = p->stack_size - p->open - 1;
    bool indexed = container->type == QF_JSON_OBJECT && length > MAX_UNINDEXED_MEMBERS;
    size_t items_bytes, index_bytes = indexed ? length * sizeof(uint32_t) : 0, bytes;
    if (!qf_mul_size(length, sizeof(qf_json_value), &items_bytes) || !qf_add_size(items_bytes, index_bytes, &bytes) ||
        length > UINT32_MAX) {
        return QF_JSON_FAIL(&p->scan, p->scan.at, "too many values");
    }
    if (length > 0) {
        void *memory;
        QF_TRY(chunk_alloc(p, bytes, &memory));
        memcpy(memory, container + 1, items_bytes);
        container->items = memory;
        if (container->type == QF_JSON_OBJECT) {
            uint32_t *index = indexed ? (uint32_t *)((qf_json_value *)memory + length) : NULL;
            QF_TRY(check_duplicates(p, memory, length, index));
        }
    }
    p->stack_size = p->open + 1;
    p->open = container->length;
    container->length = length;
    p->scan.at++;
    p->depth--;
    return QF_OK;
}

static qf_status parse_word(parser *p, qf_json_value *value)
{
    static const struct {
        const char *text;
        qf_json_type type;
        bool boolean;
    } words[] = {{"true", QF_JSON_BOOL, true}, {"false", QF_JSON_BOOL, false}, {"null", QF_JSON_NULL, false}};
    qf_json_scanner *s = &p->scan;
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        size_t length = strlen(words[i].text);
        if (s->size - s->at >= length && memcmp(s->text + s->at, words[i].text, length) == 0) {
            s->at += length;
            value->type = words[i].type;
            value->boolean = words[i].boolean;
            return QF_OK;
        }
    }
    return QF_JSON_FAIL(s, s->at, qf_json_peek(s) < 0 ? "the text ends where a value should be" : "not a value");
}

/* A member's name and colon. */
static qf_status parse_key(parser *p, const char **key, size_t *key_length)
{
    skip_space(p);
    if (qf_json_peek(&p->scan) != '"') {
        return QF_JSON_FAIL(&p->scan, p->scan.at, "a member must begin with its name in quotes");
    }
    QF_TRY(qf_json_scan_string(&p->scan, key, key_length));
    skip_space(p);
    if (qf_json_peek(&p->scan) != ':') {
        return QF_JSON_FAIL(&p->scan, p->scan.at, "the colon after a member's name is missing");
    }
    p->scan.at++;
    return QF_OK;
}

/* One scalar, or the opening bracket of a container. */
static qf_status parse_item(parser *p)
{
    const char *key = NULL;
    size_t key_length = 0;
    if (p->open != NO_CONTAINER && p->stack[p->open].type == QF_JSON_OBJECT) {
        QF_TRY(parse_key(p, &key, &key_length));
    }
    skip_space(p);
    qf_json_value *value = NULL;
    QF_TRY(push_value(p, key, key_length, &value));
    int c = qf_json_peek(&p->scan);
    if (c == '{') {
        return open_container(p, value, QF_JSON_OBJECT);
    }
    if (c == '[') {
        return open_container(p, value, QF_JSON_ARRAY);
    }
    if (c == '"') {
        value->type = QF_JSON_STRING;
        return qf_json_scan_string(&p->scan, &value->string, &value->length);
    }
    if (c == '-' || (c >= '0' && c <= '9')) {
        return qf_json_scan_number(&p->scan, value);
    }
    return parse_word(p, value);
}

static qf_status parse_document(parser *p)
{
    bool opened = false; /* the item before was an opening bracket */
    do {
        size_t open_before = p->open;
        QF_TRY(parse_item(p));
        opened = p->open != open_before;
        /* Close what ends here; a comma leads to the next item. */
        for (skip_space(p); p->open != NO_CONTAINER; skip_space(p)) {
            int closing = p->stack[p->open].type == QF_JSON_OBJECT ? '}' : ']';
            if (qf_json_peek(&p->scan) == closing) {
                QF_TRY(close_container(p));
                opened = false;
                continue;
            }
            if (opened) {
                break;
            }
            if (qf_json_peek(&p->scan) != ',') {
                return QF_JSON_FAIL(&p->scan, p->scan.at, closing == '}' ? "\",\" or \"}\" is missing in an object"
                                                                         : "\",\" or \"]\" is missing in an array");
            }
            p->scan.at++;
            break;
        }
    } while (p->open != NO_CONTAINER);
    if (p->scan.at != p->scan.size) {
        return QF_JSON_FAIL(&p->scan, p->scan.at, "the text goes on after the value");
    }
    return QF_OK;
}

/* -- interface ----------------------------------------------------------------------------------------------- */

qf_json_limits qf_json_default_limits(void)
{
    qf_json_limits limits = {.max_bytes = (size_t)64 << 20, .max_depth = 32, .max_values = 4000000};
    return limits;
}

qf_status qf_json_parse(const char *text, size_t size, const qf_json_limits *limits, const char *what, qf_json **out,
                        qf_error *err)
{
    qf_status status;
    parser p = {.scan = {.text = text, .size = size, .what = what, .err = err}, .open = NO_CONTAINER};
    void *memory;
    *out = NULL;
    p.limits = limits != NULL ? *limits : qf_json_default_limits();
    if (size > p.limits.max_bytes) {
        return QF_FAIL(err, QF_ERROR_MODEL, "%s: %zu bytes of JSON, but the limit is %zu", what, size,
                       p.limits.max_bytes);
    }
    QF_TRY(qf_alloc(&memory, 1, sizeof(qf_json), "JSON document", err));
    p.document = memory;
    QF_TRY_GOTO(qf_alloc(&memory, 1, size + 1, "JSON strings", err), done);
    p.document->strings = memory;
    p.scan.strings = memory;
    QF_TRY_GOTO(parse_document(&p), done);
    p.document->root = p.stack[0];
    *out = p.document;
done:
    qf_free(p.stack);
    if (status != QF_OK) {
        qf_json_destroy(p.document);
    }
    return status;
}

void qf_json_destroy(qf_json *self)
{
    if (self == NULL) {
        return;
    }
    for (chunk *c = self->chunks; c != NULL;) {
        chunk *next = c->next;
        qf_free(c);
        c = next;
    }
    qf_free(self->strings);
    qf_free(self);
}

const qf_json_value *qf_json_root(const qf_json *self) { return &self->root; }

const qf_json_value *qf_json_get(const qf_json_value *object, const char *key)
{
    if (object == NULL || object->type != QF_JSON_OBJECT) {
        return NULL;
    }
    size_t key_length = strlen(key);
    const qf_json_value *items = object->items;
    if (object->length <= MAX_UNINDEXED_MEMBERS) {
        for (size_t i = 0; i < object->length; i++) {
            if (compare_keys(items[i].key, items[i].key_length, key, key_length) == 0) {
                return &items[i];
            }
        }
        return NULL;
    }
    const uint32_t *index = (const uint32_t *)(items + object->length);
    size_t low = 0, high = object->length;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const qf_json_value *item = &items[index[middle]];
        int order = compare_keys(item->key, item->key_length, key, key_length);
        if (order == 0) {
            return item;
        }
        low = order < 0 ? middle + 1 : low;
        high = order < 0 ? high : middle;
    }
    return NULL;
}

bool qf_json_is_string(const qf_json_value *value, const char *text)
{
    return value != NULL && value->type == QF_JSON_STRING && value->length == strlen(text) &&
           memcmp(value->string, text, value->length) == 0;
}
