/* sources: base/status.c base/alloc.c base/dtype.c base/json.c model/ */
/* sanitizers: address */
/* The files of a checkpoint: missing ones, unreadable ones, bad tensors, shards and their index. */
#include <sys/stat.h>

#include "checkpoint_fixture.h"

/* Opening must fail with these words; *out stays NULL. */
static void refuse(qf_status expected, const char *words)
{
    qf_error err = {0};
    qf_checkpoint *checkpoint;
    CHECK_STATUS(open_dir(&checkpoint, &err), expected);
    CHECK(checkpoint == NULL);
    if (strstr(err.message, words) == NULL) {
        (void)fprintf(stderr, "\"%s\" without \"%s\"\n", err.message, words);
    }
    CHECK(strstr(err.message, words) != NULL);
}

static void refuse_file(const maker *m, const char *words)
{
    write_file(m, "model.safetensors");
    refuse(QF_ERROR_MODEL, words);
}

static void path_of(const char *name, char *path, size_t size) { (void)snprintf(path, size, "%s/%s", dir, name); }

/* A file that is not there is a fault of the checkpoint, and the message has its name. */
static void test_missing(void)
{
    static const char *const others[] = {"z.pt", "y.pth", "pytorch_model.bin", "model.gguf"}; /* each before the last */
    static const char index[] = "{\"weight_map\":{\"a\":\"model-00001-of-00001.safetensors\"}}";
    char path[256];
    char words[128];
    make_dir();
    refuse(QF_ERROR_MODEL, "config.json is missing from the checkpoint directory /tmp/");
    write_config("");
    refuse(QF_ERROR_MODEL, "model.safetensors (or model.safetensors.index.json) is missing from the checkpoint");
    write_text("bin", "", 0);
    write_text(".bin", "", 0);
    write_text("model.bin.txt", "", 0);
    refuse(QF_ERROR_MODEL, "is missing from the checkpoint directory");
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        write_text(others[i], "", 0);
        (void)snprintf(words, sizeof words, "json) is missing (there is %s, but only safetensors is read): /", others[i]);
        refuse(QF_ERROR_MODEL, words);
    }
    write_text("model.safetensors.index.json", index, sizeof index - 1);
    refuse(QF_ERROR_MODEL, "model-00001-of-00001.safetensors is missing (there is model.gguf, but");
    path_of("model-00001-of-00001.safetensors", path, sizeof path);
    CHECK_INT(symlink("nowhere", path), 0);
    refuse(QF_ERROR_MODEL, "model-00001-of-00001.safetensors is missing (there is model.gguf, but");
    path_of("config.json", path, sizeof path);
    CHECK_INT(unlink(path), 0);
    refuse(QF_ERROR_MODEL, "config.json is missing from the checkpoint directory /tmp/");
    remove_dir();
}

/* What is there but cannot be read is a fault of the system; so is a directory that is not there. */
static void test_unreadable(void)
{
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json", "config.json"};
    qf_error err = {0};
    qf_checkpoint *checkpoint;
    qf_checkpoint_options options = {.dir = "/tmp/qf_test_model_nowhere"};
    char path[256];
    make_dir();
    write_config("");
    write_text("pytorch_model.bin", "", 0);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        path_of(names[i], path, sizeof path);
        (void)unlink(path);
        CHECK_INT(mkdir(path, 0700), 0);
        refuse(QF_ERROR_IO, "is no regular file");
        CHECK(rmdir(path) == 0);
        CHECK_INT(mkfifo(path, 0600), 0);
        refuse(QF_ERROR_IO, "is no regular file");
        CHECK_INT(unlink(path), 0);
        CHECK_INT(symlink(names[i], path), 0); /* a link to itself */
        refuse(QF_ERROR_IO, names[i]);
        CHECK_INT(unlink(path), 0);
        write_text(names[i], "{}", 2);
        CHECK_INT(chmod(path, 0), 0);
        if (geteuid() != 0) { /* root reads it all the same */
            refuse(QF_ERROR_IO, "cannot open");
        }
        CHECK_INT(unlink(path), 0);
    }
    CHECK_STATUS(qf_checkpoint_open(&options, &checkpoint, &err), QF_ERROR_IO);
    CHECK(strstr(err.message, "cannot open /tmp/qf_test_model_nowhere/config.json: No such file") != NULL);
    path_of("pytorch_model.bin", path, sizeof path);
    options.dir = path; /* a file */
    CHECK_STATUS(qf_checkpoint_open(&options, &checkpoint, &err), QF_ERROR_IO);
    remove_dir();
}

/* The place of a tensor's bytes, by its data_offsets. */
static uint8_t *find_data(maker *m, const char *name)
{
    char quoted[112];
    (void)snprintf(quoted, sizeof quoted, "\"%s\":", name);
    const char *entry = strstr(m->header, quoted);
    const char *offsets = entry != NULL ? strstr(entry, "offsets\":[") : NULL;
    CHECK(offsets != NULL);
    return m->data + (offsets != NULL ? strtoul(offsets + strlen("offsets\":["), NULL, 10) : 0);
}

static void replace(maker *m, const char *from, const char *to)
{
    char *at = strstr(m->header, from);
    CHECK(at != NULL && strlen(from) == strlen(to));
    if (at != NULL) {
        memcpy(at, to, strlen(to));
    }
}

static void test_broken(void)
{
    static maker m;
    make_dir();
    write_config("");
    fill(&m, false);
    replace(&m, "layers.0.self_attn.k_proj.bias", "layers.0.self_attn.k_proj.bjas");
    refuse_file(&m, "\"model.layers.0.self_attn.k_proj.bias\" is missing");
    fill(&m, false);
    replace(&m, "[96,64]", "[64,96]");
    refuse_file(&m, "gate_proj.weight\" has shape (64, 96); expected (96, 64)");
    fill(&m, false);
    replace(&m, "\"model.norm.weight\":{\"dtype\":\"F32\"", "\"model.norm.weight\":{\"dtype\":\"I32\"");
    refuse_file(&m, "model.norm.weight\" has dtype I32; expected F32 or BF16 or F16");
    write_config(GPTQ);
    fill(&m, true);
    int32_t bad_group = 2;
    memcpy(find_data(&m, "model.layers.0.mlp.up_proj.g_idx") + 8, &bad_group, sizeof bad_group);
    refuse_file(&m, "up_proj.g_idx\" has group 2 at column 2; expected 0 to 1");
    bad_group = 0;
    memcpy(find_data(&m, "model.layers.0.mlp.up_proj.g_idx") + 8, &bad_group, sizeof bad_group);
    refuse_file(&m, "up_proj.g_idx\" gives group 0 33 columns; expected 32");
    fill(&m, true);
    uint16_t infinity = 0xfc00;
    memcpy(find_data(&m, "model.layers.0.self_attn.o_proj.scales") + 6, &infinity, sizeof infinity);
    refuse_file(&m, "o_proj.scales\" holds an infinite scale");
    fill(&m, true);
    replace(&m, "layers.0.mlp.down_proj.qzeros", "layers.0.mlp.down_proj.qzeroz");
    refuse_file(&m, "down_proj.qzeros\" is missing");
    remove_dir();
}

static void test_shards(void)
{
    static maker a, b;
    static const char *const bad[6][2] = {
        {"../a.safetensors", "../a.safetensors"}, {"/a.safetensors", "/a.safetensors"},
        {".a.safetensors", ".a.safetensors"},     {"a.bin", "a.bin"},
        {"c.safetensors", "c.safetensors is missing"}, {"b.safetensors", "is not in b.safetensors"},
    };
    qf_error err;
    qf_checkpoint *checkpoint;
    make_dir();
    write_config("");
    fill(&a, false);
    replace(&a, "\"model.norm.weight\"", "\"model.norm.weighs\"");
    memset(&b, 0, sizeof b);
    add_f32(&b, "model.norm.weight", 1, HIDDEN, 50);
    write_file(&a, "a.safetensors");
    write_file(&b, "b.safetensors");
    char index[8192];
    for (int32_t wrong = -1; wrong < 6; wrong++) {
        int n = snprintf(index, sizeof index, "{\"weight_map\":{\"model.norm.weight\":\"b.safetensors\"");
        for (const char *at = strstr(a.header, "\"model."); at != NULL; at = strstr(at + 1, "\"model.")) {
            bool first = at == strstr(a.header, "\"model.");
            n += snprintf(index + n, sizeof index - (size_t)n, ",%.*s:\"%s\"", (int)(strchr(at + 1, '"') + 1 - at), at,
                          first && wrong >= 0 ? bad[wrong][0] : "a.safetensors");
        }
        n += snprintf(index + n, sizeof index - (size_t)n, "}}");
        write_text("model.safetensors.index.json", index, (size_t)n);
        if (wrong >= 0) {
            refuse(QF_ERROR_MODEL, bad[wrong][1]);
            continue;
        }
        float norm[HIDDEN];
        CHECK_OK(open_dir(&checkpoint, &err));
        qf_checkpoint_read_norm(checkpoint, 0, QF_FINAL_NORM, norm);
        CHECK(norm[3] == value_of(3, 50));
        qf_checkpoint_close(checkpoint);
    }
    add_f32(&b, "model.embed_tokens.weight", VOCAB, HIDDEN, 1);
    write_file(&b, "b.safetensors");
    refuse(QF_ERROR_MODEL, "\"model.embed_tokens.weight\" is in two shards");
    remove_dir();
}

int main(void)
{
    RUN(test_missing);
    RUN(test_unreadable);
    RUN(test_broken);
    RUN(test_shards);
    return check_report();
}
