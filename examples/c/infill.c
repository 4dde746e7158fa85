/* Fills a gap of known length, in C alone: pinned rows on a canvas, denoised behind a prefix in the cache.
 *
 *     infill demo.gguf
 *
 * The library knows token ids and no text. Here every word is one token of the demo model's vocabulary and is looked up
 * in the file; a program for any text brings a tokenizer (in Python: pydiffgguf.DiffusionModel.infill).
 */
#include <diffgguf.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* "_" stands for the vocabulary's mark of a space. */
static const char *const PREFIX[] = {"<bos>", "On", "_Sunday", "_Emma", "_found", "_a"};
static const char *const SUFFIX[] = {"_in",    "_the",  "_school", ".",     "_Emma",   "_gave", "_the",
                                     "_white", "_cup",  "_to",     "_Mia",  ".",       "_Mia",  "_took",
                                     "_the",   "_cup",  "_home",   "_that", "_Sunday", "_and",  "_never",
                                     "_went",  "_back", "_to",     "_the",  "_school", ".",     "<eos>"};
enum { GAP = 2, N_PREFIX = sizeof PREFIX / sizeof *PREFIX, N_SUFFIX = sizeof SUFFIX / sizeof *SUFFIX };
enum { N_ROWS = GAP + N_SUFFIX };

static char err[512];

static void check(dg_status status) {
    if (status != DG_OK) {
        fprintf(stderr, "error %d: %s\n", (int)status, err);
        exit(1);
    }
}

/* The vocabulary: one string behind the other, each closed by a NUL. */
static char *read_vocabulary(const dg_model *model) {
    const dg_file *file = dg_model_file(model);
    for (int64_t i = 0; i < dg_file_n_keys(file); ++i) {
        if (strcmp(dg_file_key(file, i).name, "tokenizer.ggml.tokens") == 0) {
            const size_t size = dg_file_strings(file, i, NULL, 0);
            char *text = malloc(size);
            if (text) {
                dg_file_strings(file, i, text, size);
            }
            return text;
        }
    }
    return NULL;
}

static const char *piece_of(const char *vocabulary, int32_t id) {
    while (id-- > 0) {
        vocabulary += strlen(vocabulary) + 1;
    }
    return vocabulary;
}

static int32_t id_of(const char *vocabulary, int32_t n_vocab, const char *word) {
    char piece[64];
    snprintf(piece, sizeof piece, "%s%s", word[0] == '_' ? "\xe2\x96\x81" : "", word + (word[0] == '_'));
    for (int32_t id = 0; id < n_vocab; ++id, vocabulary += strlen(vocabulary) + 1) {
        if (strcmp(vocabulary, piece) == 0) {
            return id;
        }
    }
    fprintf(stderr, "the vocabulary has no '%s': this example is for the demo model\n", piece);
    exit(1);
}

static void print_piece(const char *piece) {
    const char *const mark = "\xe2\x96\x81";
    if (strncmp(piece, mark, 3) == 0) {
        putchar(' ');
        piece += 3;
    }
    fputs(piece, stdout);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s demo.gguf\n", argv[0]);
        return 2;
    }
    if (dg_abi_version() != DG_ABI_VERSION) {
        fprintf(stderr, "compiled for ABI %d, but the library has %d\n", DG_ABI_VERSION, (int)dg_abi_version());
        return 1;
    }
    dg_model *model = NULL;
    const dg_model_options model_options = dg_model_options_default();
    check(dg_model_open(&model, argv[1], &model_options, err, sizeof err));
    dg_session *session = NULL;
    dg_session_options session_options = dg_session_options_default();
    session_options.n_ctx = 256;
    check(dg_session_create(&session, model, &session_options, err, sizeof err));

    const int32_t n_vocab = dg_model_config(model).n_vocab;
    char *vocabulary = read_vocabulary(model);
    if (!vocabulary) {
        fprintf(stderr, "the file holds no vocabulary\n");
        return 1;
    }
    int32_t prefix[N_PREFIX];
    for (int i = 0; i < N_PREFIX; ++i) {
        prefix[i] = id_of(vocabulary, n_vocab, PREFIX[i]);
    }
    int32_t pinned[N_ROWS]; /* -1 where a row is free: the gap comes first on the canvas, the suffix behind it */
    for (int i = 0; i < N_ROWS; ++i) {
        pinned[i] = i < GAP ? -1 : id_of(vocabulary, n_vocab, SUFFIX[i - GAP]);
    }

    check(dg_session_encode(session, prefix, N_PREFIX, err, sizeof err));
    dg_canvas_options canvas = dg_canvas_options_default(model);
    canvas.n_rows = N_ROWS;
    canvas.pinned = pinned;
    canvas.seed = 7;
    check(dg_session_canvas_begin(session, &canvas, 1, err, sizeof err));
    dg_step step = {0};
    while (!step.finished) {
        check(dg_session_canvas_step(session, NULL, &step, err, sizeof err));
        printf("step %d:", (int)step.step + 1);
        for (int i = 0; i < GAP; ++i) {
            print_piece(piece_of(vocabulary, step.argmax[i]));
        }
        putchar('\n');
    }
    for (int i = 1; i < N_PREFIX; ++i) {
        print_piece(piece_of(vocabulary, prefix[i]));
    }
    for (int i = 0; i < N_ROWS - 1; ++i) { /* without the end token */
        print_piece(piece_of(vocabulary, step.argmax[i]));
    }
    putchar('\n');

    free(vocabulary);
    dg_session_free(session);
    dg_model_free(model);
    return 0;
}
