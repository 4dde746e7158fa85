/* What a program in C meets, with the example's own functions: answers at every level, files, errors, cancels, memory.
 * For systems that the Python tests do not run on; .ci/windows and .ci/cross run it.
 *
 *     checks demo.gguf FOLDER
 *
 * FOLDER is writable and has "gr\u00f6\u00dfe-\u65e5\u672c.gguf", a copy of the model; empty.gguf; cut.gguf, its
 * first 1,000 bytes; short.gguf, all of it except the last 1,000; vast.gguf, the model and behind it more than there
 * is memory; and words.gguf, a text.
 */
#define main example_main
#include "../../examples/c/infill.c"
#undef main

#include <stdarg.h>
#ifdef _WIN32
#    include <windows.h>
#else
#    include <dirent.h>
#endif

#define LETTERS                                                                                                        \
    "gr\xc3\xb6\xc3\x9f"                                                                                               \
    "e-\xe6\x97\xa5\xe6\x9c\xac" /* UTF-8, whatever the system's code page is */

static const char *folder;
static int n_failures;

static void expect(int holds, const char *what, ...) {
    va_list args;
    va_start(args, what);
    printf("%s ", holds ? "ok   " : "FAILS");
    vprintf(what, args);
    va_end(args);
    printf("%s%s\n", !holds && *err ? ": " : "", holds ? "" : err);
    n_failures += !holds;
}

/* A path in the folder; the last four live. */
static const char *in_folder(const char *name) {
    static char paths[4][1024];
    static int next;
    char *const path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static void expect_failure(dg_status status, dg_status wanted, const char *part, const char *what) {
    expect(status == wanted && strstr(err, part), "%s: %d, \"%s\"", what, (int)status, err);
    if (strpbrk(err, "\r\n\t")) {
        expect(0, "its message is one line");
    }
}

static dg_model *open_model(const char *path, const char *level, bool map) {
    dg_model_options options = dg_model_options_default();
    options.cpu = level;
    options.use_mmap = map;
    dg_model *model = NULL;
    check(dg_model_open(&model, path, &options, err, sizeof err));
    return model;
}

static dg_status try_model(const char *path, bool map) {
    dg_model_options options = dg_model_options_default();
    options.use_mmap = map;
    dg_model *model = NULL;
    const dg_status status = dg_model_open(&model, path, &options, err, sizeof err);
    dg_model_free(model);
    return status;
}

static dg_session *make_session(dg_model *model, int32_t n_threads) {
    dg_session_options options = dg_session_options_default();
    options.n_ctx = 256;
    options.n_threads = n_threads;
    dg_session *session = NULL;
    check(dg_session_create(&session, model, &options, err, sizeof err));
    return session;
}

static int32_t *ids_of(const dg_model *model, const char *const *words, int n) {
    char *const vocabulary = read_vocabulary(model);
    int32_t *const ids = malloc(sizeof *ids * (size_t)n);
    if (!vocabulary || !ids) {
        exit(1);
    }
    for (int i = 0; i < n; ++i) {
        ids[i] = id_of(vocabulary, dg_model_config(model).n_vocab, words[i]);
    }
    free(vocabulary);
    return ids;
}

static void encode_prefix(dg_session *session, const dg_model *model) {
    int32_t *const prefix = ids_of(model, PREFIX, N_PREFIX);
    check(dg_session_encode(session, prefix, N_PREFIX, err, sizeof err));
    free(prefix);
}

static void begin_gap(dg_session *session, const dg_model *model) {
    int32_t *const suffix = ids_of(model, SUFFIX, N_SUFFIX);
    int32_t pinned[N_ROWS];
    for (int i = 0; i < N_ROWS; ++i) {
        pinned[i] = i < GAP ? -1 : suffix[i - GAP];
    }
    free(suffix);
    dg_canvas_options canvas = dg_canvas_options_default(model);
    canvas.n_rows = N_ROWS;
    canvas.pinned = pinned;
    canvas.seed = 7;
    check(dg_session_canvas_begin(session, &canvas, 1, err, sizeof err));
}

/* Whether the example's words come out of the gap behind a prefix. */
static int fills_gap(dg_session *session, const dg_model *model) {
    static const char *const FILLING[GAP] = {"_white", "_cup"};
    begin_gap(session, model);
    dg_step step = {0};
    while (!step.finished) {
        check(dg_session_canvas_step(session, NULL, &step, err, sizeof err));
    }
    int32_t *const filling = ids_of(model, FILLING, GAP);
    const int right = memcmp(filling, step.argmax, sizeof *filling * GAP) == 0;
    free(filling);
    return right;
}

static int answers(dg_model *model, int32_t n_threads) {
    dg_session *const session = make_session(model, n_threads);
    encode_prefix(session, model);
    const int right = fills_gap(session, model);
    dg_session_free(session);
    return right;
}

static void check_build(void) {
    printf("diffgguf %s, ABI %d, ggml %s, %s, %s, %s\n", dg_version(), (int)dg_abi_version(), dg_ggml_version(),
           dg_compiler(), dg_build_flags(), dg_cpu_features());
    expect(dg_abi_version() == DG_ABI_VERSION, "the header's ABI");
    expect(*dg_cpu_missing() == 0, "this processor lacks nothing");
    expect(dg_n_devices() > 0, "a device: %s", dg_local_device(0).name);
    expect(dg_memory_available() >> 26 > 0, "memory: %.0f MiB", (double)dg_memory_available() / (1 << 20));
    for (int32_t i = 0; i < dg_n_cpu_levels(); ++i) {
        const dg_cpu_level level = dg_local_cpu_level(i);
        expect(level.compiled, "%s, %s: compiled in; %s", level.name, level.meaning,
               level.offered ? "this processor has it" : level.lacks);
    }
}

static void check_levels(const char *path) {
    const char *best = "";
    for (int32_t i = 0; i < dg_n_cpu_levels(); ++i) {
        const dg_cpu_level level = dg_local_cpu_level(i);
        if (!level.offered || !level.compiled) {
            dg_model_options options = dg_model_options_default();
            options.cpu = level.name;
            dg_model *model = NULL;
            expect_failure(dg_model_open(&model, path, &options, err, sizeof err), DG_ERROR_UNSUPPORTED, level.name,
                           "a level that is not there");
            continue;
        }
        best = level.name;
        for (int32_t n_threads = 1; n_threads <= 2; ++n_threads) {
            dg_model *const model = open_model(path, level.name, n_threads == 1);
            expect(answers(model, n_threads), "%s, threads: %d, %s: the right words", dg_model_cpu_level(model),
                   (int)n_threads, n_threads == 1 ? "mapped" : "read");
            dg_model_free(model);
        }
    }
    dg_model *const model = open_model(path, NULL, true);
    expect(strcmp(dg_model_cpu_level(model), best) == 0, "by itself the best of them: %s", dg_model_cpu_level(model));
    dg_model_free(model);
}

static void check_files(const char *path) {
    for (int map = 0; map < 2; ++map) {
        const char *const how = map ? "mapped" : "read";
        expect_failure(try_model(in_folder("missing.gguf"), map), DG_ERROR_IO, "missing.gguf", "no such file");
        expect_failure(try_model(in_folder("empty.gguf"), map), DG_ERROR_FORMAT, "empty.gguf", "an empty file");
        expect_failure(try_model(in_folder("words.gguf"), map), DG_ERROR_FORMAT, "words.gguf", "no GGUF");
        expect_failure(try_model(in_folder("cut.gguf"), map), DG_ERROR_FORMAT, "cut.gguf", "a cut header");
        expect_failure(try_model(in_folder("short.gguf"), map), DG_ERROR_FORMAT, "short.gguf", "cut weights");
        expect_failure(try_model(folder, map), DG_ERROR_IO, folder, "a folder");
#ifdef _WIN32
        expect_failure(try_model("NUL", map), DG_ERROR_IO, "not a regular file", "a device");
        expect_failure(try_model("\xff.gguf", map), DG_ERROR_IO, "UTF-8", "a path of other bytes");
#endif
        dg_model *const model = open_model(in_folder(LETTERS ".gguf"), NULL, map);
        expect(answers(model, 0), "letters of other alphabets in a path, %s", how);
        dg_model_free(model);
    }
    dg_adapter *adapter = NULL;
    dg_model *const model = open_model(path, NULL, true);
    expect_failure(dg_adapter_open(&adapter, model, path, NULL, 0, "a", DG_REGION_OF_FILE, err, sizeof err),
                   DG_ERROR_FORMAT, "a: ", "a model as an adapter");
    dg_model_free(model);
}

static FILE *open_stream(const char *path, const char *mode) {
#ifdef _WIN32
    wchar_t wide[1024], wide_mode[8];
    MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, 1024);
    MultiByteToWideChar(CP_UTF8, 0, mode, -1, wide_mode, 8);
    return _wfopen(wide, wide_mode);
#else
    return fopen(path, mode);
#endif
}

/* Bytes of a file; -1 without one. */
static long size_of(const char *path) {
    FILE *const file = open_stream(path, "rb");
    if (!file) {
        return -1;
    }
    fseek(file, 0, SEEK_END);
    const long size = ftell(file);
    fclose(file);
    return size;
}

/* Files of the folder with ".tmp" in their names. */
static int n_left_over(void) {
    int n = 0;
#ifdef _WIN32
    WIN32_FIND_DATAA found;
    const HANDLE search = FindFirstFileA(in_folder("*.tmp*"), &found);
    for (BOOL more = search != INVALID_HANDLE_VALUE; more; more = FindNextFileA(search, &found)) {
        ++n;
    }
    FindClose(search);
#else
    DIR *const entries = opendir(folder);
    for (const struct dirent *entry = readdir(entries); entry; entry = readdir(entries)) {
        n += strstr(entry->d_name, ".tmp") != NULL;
    }
    closedir(entries);
#endif
    return n;
}

static void check_saving(const char *path) {
    dg_model *const model = open_model(path, NULL, true);
    dg_session *const session = make_session(model, 1);
    encode_prefix(session, model);
    const char *const saved = in_folder(LETTERS ".session");
    FILE *const before = open_stream(saved, "wb"); /* the file that is replaced */
    fputs("another", before);
    fclose(before);
    check(dg_session_save(session, saved, err, sizeof err));
    const long whole = size_of(saved);
    expect(whole > 1000, "a session's file in the place of another: %ld bytes", whole);
    dg_session *const other = make_session(model, 1);
    check(dg_session_load(other, saved, err, sizeof err));
    expect(dg_session_n_past(other) == N_PREFIX && fills_gap(other, model), "loaded, it answers as before");
    expect_failure(dg_session_load(other, path, err, sizeof err), DG_ERROR_FORMAT, path, "a model as a session");
    expect_failure(dg_session_save(session, in_folder("no/such.session"), err, sizeof err), DG_ERROR_IO, "such.session",
                   "a folder that is not there");
    /* A file that is open as a model: Windows refuses, elsewhere the model keeps what it has. */
    dg_model *const mapped = open_model(in_folder(LETTERS ".gguf"), NULL, true);
    const long size = size_of(in_folder(LETTERS ".gguf"));
#ifdef _WIN32
    expect_failure(dg_session_save(session, in_folder(LETTERS ".gguf"), err, sizeof err), DG_ERROR_IO, LETTERS,
                   "in the place of an open model");
    expect(size_of(in_folder(LETTERS ".gguf")) == size, "which is as it was");
    expect(open_stream(in_folder(LETTERS ".gguf"), "r+b") == NULL, "nobody writes to an open model");
#else
    (void)size;
#endif
    expect(answers(mapped, 1), "and answers");
    dg_model_free(mapped);
#ifdef _WIN32
    FILE *const writer = open_stream(in_folder(LETTERS ".gguf"), "r+b");
    expect(writer != NULL, "a closed model is anybody's");
    expect_failure(try_model(in_folder(LETTERS ".gguf"), true), DG_ERROR_IO, LETTERS, "a file that somebody writes to");
    if (writer) {
        fclose(writer);
    }
#endif
    expect(n_left_over() == 0, "no temporary file is left");
    dg_session_free(other);
    dg_session_free(session);
    dg_model_free(model);
}

static int ask(void *calls) { return ++*(int *)calls > 0; }

static void check_cancels(const char *path) {
    dg_model *const model = open_model(path, NULL, true);
    dg_session *const session = make_session(model, 2);
    encode_prefix(session, model);
    begin_gap(session, model);
    dg_step step = {0};
    dg_session_cancel(session);
    expect(dg_session_canvas_step(session, NULL, &step, err, sizeof err) == DG_ERROR_CANCELLED, "a step is cancelled");
    int calls = 0;
    check(dg_session_set_poll(session, ask, &calls, err, sizeof err));
    int32_t ids[128];
    dg_status status = DG_OK;
    dg_noise_canvas(1, 0, 128, dg_model_config(model).n_vocab, ids);
    for (int i = 0; status == DG_OK && i < 1000; ++i) { /* asked every 20 ms, which a prompt may not last */
        check(dg_session_truncate(session, 1, err, sizeof err));
        status = dg_session_encode(session, ids, 128, err, sizeof err);
    }
    expect(calls > 0 && status == DG_ERROR_CANCELLED, "the poll function cancels a prompt");
    check(dg_session_set_poll(session, NULL, NULL, err, sizeof err));
    check(dg_session_truncate(session, 0, err, sizeof err));
    encode_prefix(session, model);
    expect(fills_gap(session, model), "and the session goes on");
    dg_session_free(session);
    dg_model_free(model);
}

static void check_memory(const char *path) {
    expect_failure(try_model(in_folder("vast.gguf"), false), DG_ERROR_MEMORY, "MiB", "more memory than there is");
    if (try_model(in_folder("vast.gguf"), true) == DG_ERROR_MEMORY) { /* in qemu's user mode */
        expect_failure(DG_ERROR_MEMORY, DG_ERROR_MEMORY, "address space were refused", "a vast file, mapped");
    } else {
        dg_model *const vast = open_model(in_folder("vast.gguf"), NULL, true);
        expect(answers(vast, 1), "a vast file, mapped");
        dg_model_free(vast);
    }

    dg_model *const model = open_model(path, NULL, true);
    dg_session *session = NULL;
    dg_session_options options = dg_session_options_default();
    options.n_ctx = 10;
    expect_failure(dg_session_create(&session, model, &options, err, sizeof err), DG_ERROR_CONTEXT, "10",
                   "a context without room");
    options = dg_session_options_default();
    check(dg_session_create(&session, model, &options, err, sizeof err));
    expect(dg_session_n_threads(session) == 1, "a thread for a small model");
    expect(dg_session_encode(session, NULL, 3, err, sizeof err) == DG_ERROR_ARGUMENT, "a null pointer");
    dg_session_free(session);
    dg_model_free(model);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s demo.gguf FOLDER\n", argv[0]);
        return 2;
    }
    setvbuf(stdout, NULL, _IONBF, 0); /* a crash loses no line */
    folder = argv[2];
    check_build();
    check_levels(argv[1]);
    check_files(argv[1]);
    check_saving(argv[1]);
    check_cancels(argv[1]);
    check_memory(argv[1]);
    printf("%d failures\n", n_failures);
    return n_failures != 0;
}
