/* diffgguf: DiffusionGemma from GGUF files, in your own process.
 *
 * Four nouns. A `dg_file` is the header of a GGUF file. A `dg_model` is an opened one: immutable, shareable between
 * threads and sessions. A `dg_session` is one timeline on a model: a prefix in the KV cache, buffers, and the canvases
 * that are being denoised behind it. A session is used by one thread at a time; a second caller gets DG_ERROR_BUSY and
 * changes nothing. A session keeps its model alive, so the two may be freed in any order. A `dg_adapter` is a fine-tune
 * that sessions of its model run beside the weights.
 *
 * Data flows one way: file -> model -> session -> canvas. Text, prompts and chat templates are not known here.
 *
 *     dg_model_options mo = dg_model_options_default();
 *     dg_model *model = NULL;
 *     char err[512];
 *     if (dg_model_open(&model, "model.gguf", &mo, err, sizeof err) != DG_OK) { puts(err); return 1; }
 *     dg_session_options so = dg_session_options_default();
 *     dg_session *session = NULL;
 *     dg_session_create(&session, model, &so, err, sizeof err);
 *     dg_session_encode(session, prompt_ids, n_prompt, err, sizeof err);
 *     dg_canvas_options co = dg_canvas_options_default(model);
 *     dg_session_canvas_begin(session, &co, 1, err, sizeof err);
 *     dg_step step = {0};
 *     while (!step.finished)
 *         dg_session_canvas_step(session, NULL, &step, err, sizeof err);
 *     // step.argmax holds the finished canvas
 *
 * Errors. Every call that can fail returns a dg_status and writes one line, NUL-terminated and cut to fit, into the
 * caller's buffer `err` of `err_size` bytes (NULL and 0 are allowed). There is no other error state anywhere. What a
 * failed call leaves behind is said at the call. Nothing here aborts, exits or prints.
 *
 * Paths are UTF-8 on Windows and whatever bytes the system takes elsewhere.
 *
 * Arrays are row-major. C is the canvas length, V the vocabulary size, both from dg_model_config.
 * This file compiles as C, alone, and is the one source of the Python binding's declarations.
 */
#ifndef DIFFGGUF_H
#define DIFFGGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(DG_SHARED)
#    ifdef DG_BUILD
#        define DG_API __declspec(dllexport)
#    else
#        define DG_API __declspec(dllimport)
#    endif
#elif defined(__GNUC__)
#    define DG_API __attribute__((visibility("default")))
#else
#    define DG_API
#endif

/* Changes when a struct or a signature below changes; the shared library's number. A program that loads the library at
 * run time compares it with dg_abi_version(). */
#define DG_ABI_VERSION 10

#ifdef __cplusplus
extern "C" {
#endif

/* Outcome of a call. */
typedef enum dg_status {
    DG_OK = 0,
    DG_ERROR_ARGUMENT = 1,    /* the caller's mistake: a value out of range, a call out of order */
    DG_ERROR_IO = 2,          /* the file cannot be opened or read or written; the message holds the system's reason */
    DG_ERROR_FORMAT = 3,      /* not a GGUF, another architecture, or a broken file: says which key or tensor */
    DG_ERROR_UNSUPPORTED = 4, /* well-formed, but this build or this program cannot serve it */
    DG_ERROR_MEMORY = 5,      /* an allocation was refused: says how much was asked for */
    DG_ERROR_CONTEXT = 6,     /* does not fit into the session's context */
    DG_ERROR_BUSY = 7,        /* another thread is inside this session */
    DG_ERROR_CANCELLED = 8,   /* dg_session_cancel or the poll function stopped the call */
    DG_ERROR_INTERNAL = 9,    /* a defect here or in ggml, or logits that are not finite */
    DG_ERROR_DEVICE =
        10 /* an RPC server was lost, or a GPU failed: the model and its sessions are of no more use, the
              process is. A GPU that has failed cannot be used again in it, and what it holds stays held */
} dg_status;

/* Type of the KV cache's elements. */
typedef enum dg_kv_type { DG_KV_F32 = 0, DG_KV_F16 = 1, DG_KV_BF16 = 2, DG_KV_Q8_0 = 3 } dg_kv_type;

/* Where the work on a step's logits is done: softmax sums, argmax, entropy and draw of each row, the self-conditioning
 * signal, and what is accepted, renoised and stopped. All draw the same ids from the same logits, but for u within
 * rounding of a cumulative probability (OPERATORS). */
typedef enum dg_sampler {
    DG_SAMPLER_AUTO = 0,      /* KERNELS on a CUDA device, OPERATORS on any other, HOST on the CPU */
    DG_SAMPLER_HOST = 1,      /* C++ on the CPU, wherever the logits are made */
    DG_SAMPLER_OPERATORS = 2, /* rows by operators of the graph, in float32; nine numbers of each come to the CPU, which
                                 accepts, renoises and stops */
    DG_SAMPLER_KERNELS = 3    /* all of it by own kernels; 40 bytes a canvas come back. DG_ERROR_UNSUPPORTED unless the
                                 main device is one of CUDA's */
} dg_sampler;

typedef struct dg_file dg_file;
typedef struct dg_model dg_model;
typedef struct dg_adapter dg_adapter;
typedef struct dg_session dg_session;

/* ------------------------------------------------------------------------------------------------- file */

/* The header of a GGUF file, whatever it holds: a model of any architecture, an importance matrix, an adapter. */

/* Where files are when they are not this machine's: `size` returns a file's size in bytes, negative when there is none;
 * `read` fills `out` with `n` bytes from `offset` on, and returns whether it did. */
typedef struct dg_source {
    int64_t (*size)(void *user, const char *path);
    bool (*read)(void *user, const char *path, uint64_t offset, void *out, size_t n);
    void *user;
} dg_source;

/* Reads and checks the header of `path`, of a split model those of all parts by its first; nothing behind the headers
 * is read. `source` NULL: this machine's files. On failure *out is NULL. */
DG_API dg_status dg_file_open(dg_file **out, const char *path, const dg_source *source, char *err, size_t err_size);
DG_API void dg_file_free(dg_file *file); /* NULL is allowed */

/* DG_ERROR_FORMAT, which says what the file is, unless it holds a model that dg_model_open takes by its kind. */
DG_API dg_status dg_file_require_model(const dg_file *file, char *err, size_t err_size);

/* What follows lives as long as the file or the model that it is of; zeros and NULL when out of range. */
typedef struct dg_file_part {
    const char *path;
    uint64_t size;
    uint64_t data_offset; /* where the header, padded, ends */
    uint32_t version;
    uint32_t alignment;
} dg_file_part;

DG_API int32_t dg_file_n_parts(const dg_file *file);
DG_API dg_file_part dg_file_get_part(const dg_file *file, int32_t index);

/* Keys in the file's order, of a split model the first part's. Types are GGUF's numbers: 0..3 u8 i8 u16 i16, 4 u32,
 * 5 i32, 6 f32, 7 bool, 8 string, 9 array, 10 u64, 11 i64, 12 f64. */
typedef struct dg_key {
    const char *name;
    int32_t type;
    int32_t element;  /* of an array's elements; `type` when it is none */
    int64_t count;    /* of an array's elements; 1 when it is none */
    const void *data; /* the value as it is in the file: little-endian, not aligned; a string is a u64, its length, and
                         its bytes */
    size_t n_bytes;
    const void *entry; /* the whole entry: name, type and value */
    size_t entry_bytes;
} dg_key;

DG_API int64_t dg_file_n_keys(const dg_file *file);
DG_API dg_key dg_file_key(const dg_file *file, int64_t index);
/* All strings of a string or an array of strings, each closed by a NUL (and cut at one that it holds), written to `out`
 * when they fit into `out_size`; returns the number of bytes they need. One call for 262,144 tokens. */
DG_API size_t dg_file_strings(const dg_file *file, int64_t index, char *out, size_t out_size);

/* Tensors, in the file's order. */
typedef struct dg_tensor_info {
    const char *name;
    const char *type_name; /* ggml's */
    int32_t type;
    int32_t n_dims;
    int64_t ne[4];   /* ggml's order: ne[0] is contiguous */
    int32_t part;    /* the file that holds it, */
    uint64_t offset; /* and where in it */
    size_t n_bytes;
} dg_tensor_info;

DG_API int64_t dg_file_n_tensors(const dg_file *file);
DG_API dg_tensor_info dg_file_tensor(const dg_file *file, int64_t index);

/* ------------------------------------------------------------------------------------------------ model */

typedef struct dg_session_options {
    int32_t n_ctx;       /* positions: prefix + finished canvases + the live canvas; 0: min(8192, the file's) */
    int32_t n_batch;     /* a prompt is encoded in chunks of so many tokens; default 512 */
    int32_t n_threads;   /* 0: as many as this process may use and a step is worth */
    int32_t type_kv;     /* a dg_kv_type; default DG_KV_F16 */
    int32_t n_rows;      /* R: the most rows that canvases denoised together may have; 0: C, the least there is */
    bool ggml_operators; /* compute with ggml's operators alone, as devices other than the CPU do; default false */
    int32_t sampler;     /* a dg_sampler; default DG_SAMPLER_AUTO */
} dg_session_options;

/* Where the model lies. Devices are those behind the RPC servers, in the order of `rpc`, then this machine's GPUs. A
 * pass goes through the CPU's layers first, then through each device's; the last device, the main one, has the head,
 * the logits and the sampler as well. What is asked for and not there: DG_ERROR_UNSUPPORTED. */
typedef struct dg_model_options {
    int32_t n_gpu_layers; /* so many layers, counted from the last, lie on devices; 0: none; -1 (default): as many as
                             fit into what the devices report free, of which there may be none (dg_plan_layers) */
    bool use_mmap;        /* map the file (default) instead of reading the weights into memory */
    bool offload_kv;      /* a layer's cache lies where the layer does (default); else on the CPU, with its attention */
    int32_t n_cpu_moe;    /* the experts of the first layers stay on the CPU, so many layers'; at least so many where
                             n_gpu_layers is -1 */
    int32_t main_gpu;     /* the main device's index; -1 (default): the last one */
    const float *tensor_split; /* each device's share of the layers; NULL: as their free memory */
    int32_t n_tensor_split;
    const char *const *rpc; /* "host:port" of servers; one that does not answer: DG_ERROR_IO */
    int32_t n_rpc;
    dg_session_options expected; /* the session that "as many as fit" makes room for */
    const char *cpu;  /* the level of instructions that the CPU's own operators use, by its name (dg_local_cpu_level);
                         NULL (default): the best that is compiled in and that this processor has. Any other that is
                         not both: DG_ERROR_UNSUPPORTED */
    size_t adapters;  /* bytes of adapters (dg_adapter_info.n_bytes) that "as many as fit" makes room for, shared out
                         evenly to the layers */
    bool signal_copy; /* the main device holds the embedding once more, transposed, in F16 (2 * n_vocab * n_embd bytes):
                         the self-conditioning signal that operators of a graph make is one product with it then, and
                         they need not transpose the embedding in every step; default false. DG_ERROR_UNSUPPORTED where
                         the head is on the CPU, for a file without self-conditioning, and for an embedding with numbers
                         beyond F16's; DG_ERROR_MEMORY where the device refuses it */
} dg_model_options;

DG_API dg_model_options dg_model_options_default(void);

/* The figures of a model, all read from the file. Layers may be sliding or full; see dg_model_layer. */
typedef struct dg_config {
    int32_t n_layer;
    int32_t n_embd; /* hidden size */
    int32_t n_vocab;
    int32_t n_head;   /* query heads, the same on all layers */
    int32_t n_ff;     /* dense FFN */
    int32_t n_ff_exp; /* one expert */
    int32_t n_expert;
    int32_t n_expert_used;
    int32_t sliding_window; /* a position sees itself and the sliding_window - 1 before it */
    int32_t canvas_length;  /* C */
    int32_t n_ctx_train;    /* context_length of the file */
    float norm_eps;
    float logit_softcap; /* 0: none */
    float rope_base_full;
    float rope_base_sliding;
    bool has_self_conditioning;
    bool has_encoder_scalars;
} dg_config;

typedef struct dg_layer_config {
    bool sliding;
    int32_t n_head_kv;
    int32_t head_dim;
} dg_layer_config;

/* The entropy-bound sampler's options (MODEL: arXiv 2505.24857 and the released generation config). */
typedef struct dg_sampling {
    int32_t steps;               /* N of the temperature schedule, >= 1; default 48 */
    int32_t max_steps;           /* stop after so many steps, whatever the schedule; 0: no cap besides steps */
    int32_t stability_threshold; /* equal argmax canvases before this one that a stop needs, >= 0; default 1 */
    double t_min;                /* temperature of step n of N, n counting down: t_min + (t_max - t_min) * n / N */
    double t_max;
    double entropy_bound;        /* nats, >= 0; default 0.1 */
    double confidence_threshold; /* nats, >= 0: a stop needs the mean entropy of the free rows below it; 0.005 */
} dg_sampling;

/* Opens a GGUF file, or a model in several files by its first part (NAME-00001-of-0000N.gguf), beside which the others
 * must lie; every key and tensor that will be used is checked here (presence, type, shape, bounds).
 * On failure *out is NULL and nothing is held. */
DG_API dg_status dg_model_open(dg_model **out, const char *path, const dg_model_options *options, char *err,
                               size_t err_size);

/* Releases the caller's hold; sessions made from the model keep theirs. NULL is allowed. */
DG_API void dg_model_free(dg_model *model);

/* The figures that a model opened from this file has, without opening it; has_encoder_scalars is left false. `layers`
 * has room for `capacity`, of which config->n_layer are filled, when they fit. `warnings`: what dg_model_warning would
 * say of missing keys, a line each, cut to fit. Fails as dg_model_open does for keys. */
DG_API dg_status dg_file_config(const dg_file *file, dg_config *config, dg_layer_config *layers, int32_t capacity,
                                char *warnings, size_t warnings_size, char *err, size_t err_size);

/* The level that its CPU operators use; "" where there is none, and ggml's do the work. As long as the library. */
DG_API const char *dg_model_cpu_level(const dg_model *model);

DG_API dg_config dg_model_config(const dg_model *model);
DG_API dg_layer_config dg_model_layer(const dg_model *model, int32_t layer); /* zeros when out of range */

/* The file's sampler values, with the released defaults where the file holds none. */
DG_API dg_sampling dg_model_sampling(const dg_model *model);

/* Whether the values are in range; the message names the option, its value and the range. */
DG_API dg_status dg_sampling_check(const dg_sampling *sampling, char *err, size_t err_size);

/* What was odd but usable about the file (a missing encoder scalar, say), one line each; lives as long as the model. */
DG_API int32_t dg_model_n_warnings(const dg_model *model);
DG_API const char *dg_model_warning(const dg_model *model, int32_t index);

DG_API const dg_file *dg_model_file(const dg_model *model); /* lives as long as the model */
/* What products with a tensor of this ggml type are computed in on the CPU: "8-bit integers", "16-bit integers",
 * "bfloat16", "float32" or "ggml". */
DG_API const char *dg_model_kernel(const dg_model *model, int32_t type);

/* A device of a model, and what lies there. */
typedef struct dg_device {
    const char *name;     /* ggml's: "CUDA0"; "RPC0" */
    const char *endpoint; /* of its RPC server; "" for this machine's */
    size_t memory_free;   /* when the model was opened, before it took its part */
    size_t memory_total;
    size_t weights; /* bytes of this model's weights on it, with the signal's copy of the embedding */
    int32_t n_layers;
    int32_t n_cpu_moe; /* of these, so many have their experts on the CPU */
    bool is_main;      /* the head, the logits and the sampler are on it */
} dg_device;

DG_API int32_t dg_model_n_devices(const dg_model *model);
DG_API dg_device dg_model_device(const dg_model *model, int32_t index); /* zeros when out of range */

/* ---------------------------------------------------------------------------------------------- session */

DG_API dg_session_options dg_session_options_default(void);

/* Bytes by kind. */
typedef struct dg_memory {
    size_t weights;            /* tensor bytes of the file */
    size_t weights_mapped;     /* of which are file pages, shared and reclaimable */
    size_t weights_on_devices; /* and which lie on devices; the CPU needs no pages for them */
    size_t kv_cache;
    size_t compute;     /* inputs, scratch memory of the threads, and intermediate tensors for the largest graph */
    size_t logits;      /* the logits of a step, V * R floats */
    size_t adapters;    /* those that the session runs; shared with other sessions that run the same */
    size_t signal_copy; /* of dg_model_options; beside the weights, on the main device */
} dg_memory;

/* The n_ctx of a session with these options: what 0 comes to. DG_ERROR_CONTEXT as at dg_session_create. */
DG_API dg_status dg_model_n_ctx(const dg_model *model, const dg_session_options *options, int32_t *out, char *err,
                                size_t err_size);

/* What a session with these options would take, without making one. */
DG_API dg_status dg_model_memory(dg_model *model, const dg_session_options *options, dg_memory *out, char *err,
                                 size_t err_size);

/* What a session takes on devices, at most: bytes, from figures alone. */
typedef struct dg_needs {
    int32_t n_ctx;   /* of the session: what 0 comes to */
    int32_t n_rows;  /* R */
    size_t logits;   /* on the main device */
    size_t sampling; /* there too: what the sampler and the self-conditioning signal work in */
    size_t passes;   /* on each device that has layers: inputs and intermediate tensors of the largest pass */
} dg_needs;

/* What a session with these options will need, of a model that nobody has opened. `layers` and `cache` have n_layer
 * entries: each layer's figures, and the bytes of its KV cache. Of the config, the epsilon, the softcap, the rotation's
 * bases and has_encoder_scalars do not count. Out of range: DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT as at
 * dg_session_create, or DG_ERROR_UNSUPPORTED for heads that type_kv cannot hold; nothing is written then. */
DG_API dg_status dg_session_needs(const dg_config *config, const dg_layer_config *layers,
                                  const dg_session_options *options, dg_needs *out, size_t *cache, char *err,
                                  size_t err_size);

/* Bytes of a layer. */
typedef struct dg_layer_bytes {
    size_t weights; /* without the experts; of the first layer with the self-conditioning MLP, and all that is no
                       layer's */
    size_t experts;
    size_t cache;
} dg_layer_bytes;

typedef struct dg_plan {
    int32_t n_gpu_layers; /* as in dg_model_options, of which these are what -1 came to */
    int32_t n_cpu_moe;
    size_t reserve; /* bytes that every device with layers keeps free: contexts, kernels, a library's workspace */
} dg_plan;

/* Which layers go where: what dg_model_open does, as a function of sizes. `head`: bytes of the embedding, and of its
 * transposed copy where signal_copy is asked for (of which these options tell nothing here). `devices`: as
 * dg_model_device gives them, the main one last; of each, memory_free and endpoint count, and of the options those that
 * place layers. With n_gpu_layers -1, what the devices report free, less the reserve, `needs` and the head, takes:
 *
 * - all layers, and the experts of as many as fit, from the last one backwards;
 * - where that is too much without any expert: fewer layers, without experts;
 * - with an RPC server among the devices: as many layers as fit, with all experts but those that n_cpu_moe names, since
 *   experts on the CPU cut the graph in every layer, and each piece is sent in each step.
 *
 * `device_of` [n_layers]: each layer's device, -1 for the CPU; NULL: not wanted. DG_ERROR_ARGUMENT for options out of
 * range; nothing is written then. */
DG_API dg_status dg_plan_layers(const dg_layer_bytes *layers, int32_t n_layers, size_t head, const dg_needs *needs,
                                const dg_device *devices, int32_t n_devices, const dg_model_options *options,
                                dg_plan *out, int32_t *device_of, char *err, size_t err_size);

/* Makes a session; the cache and all buffers are allocated here, for the largest graphs it can meet.
 * n_ctx smaller than C + 1: DG_ERROR_CONTEXT. On failure *out is NULL. */
DG_API dg_status dg_session_create(dg_session **out, dg_model *model, const dg_session_options *options, char *err,
                                   size_t err_size);
DG_API void dg_session_free(dg_session *session); /* NULL is allowed; no thread may be inside */

DG_API dg_memory dg_session_memory(const dg_session *session);
DG_API int32_t dg_session_n_ctx(const dg_session *session);
DG_API int32_t dg_session_n_threads(const dg_session *session);
DG_API int32_t dg_session_n_rows(const dg_session *session);
DG_API int32_t dg_session_sampler(const dg_session *session); /* a dg_sampler: what AUTO came to */
/* What a device lacks for this session, one line for each kind of operator ("CUDA0 lacks GET_ROWS of iq4_nl"): the CPU
 * does it, and what it reads is brought there each time. Lives as long as the session. */
DG_API int32_t dg_session_n_fallbacks(const dg_session *session);
DG_API const char *dg_session_fallback(const dg_session *session, int32_t index); /* NULL when out of range */
/* Seconds of computing by what they went into, since dg_session_profile. */
typedef struct dg_timings {
    double products; /* by the layers' dense matrices */
    double experts;  /* products, routing and gathering */
    double attention;
    double head;              /* the product that makes logits */
    double self_conditioning; /* probabilities times the embedding; the MLP behind it counts among the products */
    double sampling;
    double other; /* norms, rotations, router, cache */
} dg_timings;

/* From here on (`on`) operators run one at a time and are timed, from zero; a step takes about 2 % longer. */
DG_API dg_status dg_session_profile(dg_session *session, bool on, char *err, size_t err_size);
DG_API dg_timings dg_session_timings(const dg_session *session);

/* Positions in the cache. Safe from any thread. */
DG_API int32_t dg_session_n_past(const dg_session *session);

/* Encoder mode: appends `n` tokens to the prefix, causally, in chunks of n_batch.
 * DG_ERROR_CONTEXT when prefix + n + C would pass n_ctx: nothing is changed. DG_ERROR_CANCELLED: the chunks that were
 * finished stay, n_past says how many. A canvas that was under way is dropped. */
DG_API dg_status dg_session_encode(dg_session *session, const int32_t *ids, int32_t n, char *err, size_t err_size);

/* Cuts the prefix to its first `n` tokens. Free while the sliding layers' rings still hold the window before n;
 * otherwise the kept tokens are encoded again (DG_ERROR_CANCELLED can then leave a shorter prefix, see n_past). */
DG_API dg_status dg_session_truncate(dg_session *session, int32_t n, char *err, size_t err_size);

/* Copies the prefix's tokens, n_past of them, to `out`, which has room for `capacity`; less is DG_ERROR_ARGUMENT. */
DG_API dg_status dg_session_tokens(const dg_session *session, int32_t *out, int32_t capacity, char *err,
                                   size_t err_size);

/* Writes the prefix (tokens and cache) to a file, under its final name only when whole; reads it back into a session
 * of the same model, type_kv, adapters (their encoder key) and a context that holds it. Two threads may save to one
 * path: it is the one's or the other's. Another model is told by its figures and by the name, type, shape and first and
 * last bytes of each tensor: DG_ERROR_FORMAT. A failed load leaves an empty prefix. */
DG_API dg_status dg_session_save(dg_session *session, const char *path, char *err, size_t err_size);
DG_API dg_status dg_session_load(dg_session *session, const char *path, char *err, size_t err_size);

/* Encoder mode as a causal language model: logprob[i] becomes the natural log of the probability of ids[i] after the
 * prefix and the ids before it in its text. `n_texts` texts stand one after the other in `ids`, text k has lengths[k]
 * tokens (1 .. C); they are computed side by side, R rows at a time, and do not see each other. Nothing is appended; a
 * canvas that was under way is dropped. An empty prefix: DG_ERROR_ARGUMENT. */
DG_API dg_status dg_session_score(dg_session *session, const int32_t *ids, const int32_t *lengths, int32_t n_texts,
                                  double *logprob, char *err, size_t err_size);

/* Decoder mode, once: canvas [n_rows] ids (1 .. C) -> logits [n_rows, V] float32, softcapped, before temperature. The
 * cache is read, not changed. `self_conditioning` [n_rows, V]: the *processed* logits of the step before, or NULL for a
 * zero signal; a row of it that holds NaN or has no finite maximum: DG_ERROR_ARGUMENT. A canvas that was under way is
 * dropped. `rows`: the n_out rows (1 .. n_rows of them) whose logits are wanted, logits being [n_out, V] then; the head
 * is spared for the others. NULL: all. */
DG_API dg_status dg_session_denoise(dg_session *session, const int32_t *canvas, int32_t n_rows,
                                    const float *self_conditioning, const int32_t *rows, int32_t n_out, float *logits,
                                    char *err, size_t err_size);

/* ------------------------------------------------------------------------------------------------ adapters */

/* In which passes an adapter's layers act: decoder mode (every denoise step), encoder mode (the prompt, finished
 * canvases, scored texts), or both alike. */
typedef enum dg_region {
    DG_REGION_OF_FILE = 0, /* as the file says */
    DG_REGION_BOTH = 1,
    DG_REGION_DECODER = 2,
    DG_REGION_ENCODER = 3
} dg_region;

typedef struct dg_adapter_info {
    bool both; /* which sets its layers' pairs are in */
    bool decoder;
    bool encoder;
    int32_t n_pairs; /* that act */
    int32_t n_zero;  /* that were left out: their product is zero */
    int32_t n_ranks; /* different ones */
    size_t n_bytes;  /* in memory, in float32, beside the matrices that they adapt */
} dg_adapter_info;

/* Opens a low-rank adapter for a model: a GGUF file at `path`, or, unless `data` is NULL, `size` bytes of one, which
 * are not needed afterwards. `name` begins every message. `region`: a dg_region; other than OF_FILE it says where the
 * layers' pairs act, whatever the file says. Every tensor is checked against the model. An adapter is immutable, may be
 * shared between sessions and threads, and keeps its model alive. Broken, or made for another base: DG_ERROR_FORMAT;
 * another method than plain LoRA: DG_ERROR_UNSUPPORTED; a region for an adapter of two sets: DG_ERROR_ARGUMENT. On
 * failure *out is NULL. */
DG_API dg_status dg_adapter_open(dg_adapter **out, dg_model *model, const char *path, const void *data, size_t size,
                                 const char *name, int32_t region, char *err, size_t err_size);
DG_API void dg_adapter_free(dg_adapter *adapter); /* NULL is allowed; sessions that run it keep it */
DG_API dg_adapter_info dg_adapter_get_info(const dg_adapter *adapter);
DG_API int32_t dg_adapter_rank(const dg_adapter *adapter, int32_t index); /* ascending; 0 when out of range */
DG_API const char *dg_adapter_base(const dg_adapter *adapter);            /* what it was trained on; "" if unknown */

/* What a prefix that is encoded with these adapters depends on besides its tokens: 0 where none of them acts in encoder
 * mode, so that it is the bare model's. Adapters with equal numbers have equal keys. */
DG_API uint64_t dg_encoder_key(dg_adapter *const *adapters, const float *scales, int32_t n);

/* From here on the session runs these adapters, each times its scale; 0 leaves one out, and without any the session
 * computes what it would have without adapters, bit for bit. A canvas that was under way is dropped. Where the encoder
 * key changes, the prefix's tokens are encoded again, and `encoded` (or NULL) says how many: DG_ERROR_CANCELLED can
 * leave a shorter prefix. Adapters of another model, a scale that is not finite, a session that collects:
 * DG_ERROR_ARGUMENT; nothing is changed then, nor with DG_ERROR_MEMORY. */
DG_API dg_status dg_session_set_adapters(dg_session *session, dg_adapter *const *adapters, const float *scales,
                                         int32_t n, int32_t *encoded, char *err, size_t err_size);
/* That of the session's adapters. */
DG_API uint64_t dg_session_encoder_key(const dg_session *session);

/* -------------------------------------------------------------------------------------- denoising canvases */

/* One canvas. Its arrays have n_rows entries and are copied. */
typedef struct dg_canvas_options {
    dg_sampling sampling;
    uint64_t seed;
    uint32_t canvas_index;       /* which canvas of the generation this is: part of every draw's counter */
    int32_t n_rows;              /* 1 .. C; 0: C */
    const int32_t *pinned;       /* the id where a row is fixed, -1 where it is free; NULL: all free */
    const int32_t *canvas;       /* the canvas to start from; NULL: uniform random ids */
    const int32_t *watched;      /* ids whose log-probability every step reports, -1: the argmax's; NULL: none are */
    const int32_t *allowed_ends; /* row i takes only allowed_ids[allowed_ends[i - 1]] up to, and without, */
    const int32_t *allowed_ids;  /* allowed_ids[allowed_ends[i]]; an empty range, or NULL: any id */
    bool quiet;                  /* nobody looks at the rows on the way: the arrays of dg_step are NULL until the last
                                    step, and need not leave the device; default false */
} dg_canvas_options;

DG_API dg_canvas_options dg_canvas_options_default(const dg_model *model);

/* Draws of one step, handed in instead of Philox's. Both arrays have an entry for each row. */
typedef struct dg_noise {
    const double *uniform;  /* in [0, 1): the u of the inverse-CDF draw */
    const int32_t *renoise; /* ids for the rows that are not accepted */
} dg_noise;

/* What one step did to one canvas. The arrays have n_rows entries, belong to the session and live until its next call;
 * all of them are NULL where the canvas is quiet and not finished. */
typedef struct dg_step {
    int32_t step;  /* from 0, in order of execution */
    int32_t steps; /* the most there can be: min(steps, max_steps) */
    int32_t n_rows;
    bool finished;           /* no further step will be made; argmax is the finished canvas */
    bool converged;          /* finished because stable and confident, not because the steps ran out */
    double mean_entropy;     /* nats, over the free rows */
    const int32_t *argmax;   /* the canvas that counts */
    const int32_t *canvas;   /* the canvas for the next step: accepted draws, renoise elsewhere, pins */
    const uint8_t *accepted; /* 1 where the draw was accepted; 0 on pinned rows, which take no part */
    const double *entropy;   /* nats, at this step's temperature; 0 on pinned rows */
    const double *logprob; /* of the watched ids, natural log, at temperature 1 and before `allowed`; 0 on pinned rows;
                              NULL when none are watched */
} dg_step;

/* Starts `n_canvases` canvases side by side after the prefix (which must hold at least one token); they share every
 * pass over the weights, do not see each other, and each has the numbers that it would have alone. More than R rows
 * together: DG_ERROR_ARGUMENT. Drops canvases that were under way. */
DG_API dg_status dg_session_canvas_begin(dg_session *session, const dg_canvas_options *options, int32_t n_canvases,
                                         char *err, size_t err_size);

/* One denoise step of every canvas that is not finished. `noise` (or NULL) and `out` have an entry for each canvas;
 * those that were finished before keep what their last step said. After DG_ERROR_CANCELLED all canvases are as before
 * the step and it may be repeated. A step after the last one is DG_ERROR_ARGUMENT. The prefix never changes. */
DG_API dg_status dg_session_canvas_step(dg_session *session, const dg_noise *noise, dg_step *out, char *err,
                                        size_t err_size);

/* The last step of canvas `index` again, with its arrays even where it is quiet. Before the first step: the canvas as
 * it was begun. DG_ERROR_ARGUMENT: there is none, or another call on the session has ended it. */
DG_API dg_status dg_session_canvas_rows(dg_session *session, int32_t index, dg_step *out, char *err, size_t err_size);

/* Canvas `index` makes no further step: it lost, say. Its last step stays what it was. */
DG_API dg_status dg_session_canvas_drop(dg_session *session, int32_t index, char *err, size_t err_size);

/* What the rows of a canvas may take. Arrays have n_rows entries and are copied. */
typedef struct dg_canvas_rules {
    const int32_t *pinned;      /* the id where a row is fixed, -1 where it is free; NULL: all free */
    const int32_t *mask_of_row; /* which mask a row obeys, -1: any id; NULL: all take any */
    const uint32_t *masks;      /* [n_masks, (V + 31) / 32]: bit k % 32 of word k / 32 is 1 where id k may be taken */
    int32_t n_masks;
} dg_canvas_rules;

/* Replaces pins, and `allowed`, of canvas `index` between two steps. Canvas, step count and self-conditioning stay; the
 * test for stability begins anew; newly pinned rows take their id at once. A canvas that converged in the last step,
 * before its steps ran out, goes on. DG_ERROR_ARGUMENT, and nothing is changed: an empty mask, a pin outside of its
 * mask, a canvas that makes no further step. */
DG_API dg_status dg_session_canvas_rules(dg_session *session, int32_t index, const dg_canvas_rules *rules, char *err,
                                         size_t err_size);

/* Rows n_rows and after leave canvas `index` for the rest of its steps, which cost less then: nobody will read them,
 * say. Canvas, step count, draws and self-conditioning of the other rows stay, and so does what the test for stability
 * has seen of them. The arrays of dg_step have n_rows entries from here on. DG_ERROR_ARGUMENT, and nothing is changed:
 * n_rows outside of 1 .. the canvas's rows, a canvas that makes no further step. DG_ERROR_UNSUPPORTED with
 * DG_SAMPLER_KERNELS. */
DG_API dg_status dg_session_canvas_narrow(dg_session *session, int32_t index, int32_t n_rows, char *err,
                                          size_t err_size);

/* The sampler alone, on handed-in logits z [n_rows, n_vocab] (softcapped, before temperature); no session is needed.
 * `step` counts from 0; outputs have n_rows entries; `pinned` may be NULL. A row that holds NaN or whose greatest logit
 * is not finite, as it is or divided by the temperature: DG_ERROR_ARGUMENT. `ggml_operators`: as the logits of a device
 * are sampled, in float32: where u lies within rounding of a cumulative probability, the neighbouring id may be drawn.
 */
DG_API dg_status dg_sample(const float *z, int32_t n_rows, int32_t n_vocab, const dg_sampling *sampling, int32_t step,
                           const dg_noise *noise, const int32_t *pinned, bool ggml_operators, int32_t *argmax,
                           int32_t *canvas, uint8_t *accepted, double *entropy, char *err, size_t err_size);

/* The Philox4x32-10 draws that the loop makes for itself: a pure function of the arguments, row by row. */
DG_API void dg_noise_canvas(uint64_t seed, uint32_t canvas_index, int32_t n_rows, int32_t n_vocab, int32_t *out);
DG_API void dg_noise_uniform(uint64_t seed, uint32_t canvas_index, uint32_t step, int32_t n_rows, double *out);
DG_API void dg_noise_renoise(uint64_t seed, uint32_t canvas_index, uint32_t step, int32_t n_rows, int32_t n_vocab,
                             int32_t *out);

/* ------------------------------------------------------------------------------------------- cancelling */

/* From any thread: the call that is running, or else the next one that computes, returns DG_ERROR_CANCELLED within one
 * ggml operator. dg_session_clear_cancel forgets a request that met no call. */
DG_API void dg_session_cancel(dg_session *session);
DG_API void dg_session_clear_cancel(dg_session *session);

/* Called on the computing thread between operators, at most every 20 ms; nonzero cancels. NULL: none. */
typedef int (*dg_poll)(void *user);
DG_API dg_status dg_session_set_poll(dg_session *session, dg_poll poll, void *user, char *err, size_t err_size);

/* ------------------------------------------------------------------------------------------- quantizing */

/* While this is on, every pass of the session adds the squares of what each weight matrix is multiplied by, column by
 * column, from zero: what importance matrices are made of. Off: the sums are dropped. A canvas that was under way is
 * dropped. */
DG_API dg_status dg_session_collect(dg_session *session, bool on, char *err, size_t err_size);

/* The sums of a matrix by its tensor's name: `squares` [n, ne[0]] and how many rows were summed, `counts` [n], with n =
 * ne[2] of the tensor, the experts, or 1. Zeros for what no pass has met. DG_ERROR_ARGUMENT: no such tensor, or
 * collecting is off. */
DG_API dg_status dg_session_importance(dg_session *session, const char *tensor, double *squares, int64_t *counts,
                                       char *err, size_t err_size);

/* Bytes of a row of `row` elements in a ggml type (its number, as in GGUF files); 0 when there is no such type, or the
 * row does not divide into its blocks. */
DG_API size_t dg_row_bytes(int32_t type, int64_t row);

/* Turns `n_rows` rows of `row` weights from one ggml type into another, with ggml's own row functions; rows that have
 * the type already are copied. `importance` [row]: the mean square of what each column is multiplied by (an importance
 * matrix's row), or NULL; types that take none ignore it. n_threads 0: as many as there are; the result does not
 * depend on it. DG_ERROR_FORMAT: a NaN or infinity. DG_ERROR_UNSUPPORTED: a value beyond the type's range, a type
 * that ggml cannot write, or one that needs an importance and got none. A failed call leaves `dst` undefined. */
DG_API dg_status dg_quantize_rows(int32_t src_type, const void *src, int32_t dst_type, void *dst, int64_t n_rows,
                                  int64_t row, const float *importance, int32_t n_threads, char *err, size_t err_size);

/* ------------------------------------------------------------------------------------------------ build */

/* What ggml logs, process-wide: nothing is printed. `level`: 0 none, 1 debug, 2 info, 3 warning, 4 error, 5 more of the
 * line before. `text`: a line, or a part of one, that lives during the call. Called on the thread that logs, inside
 * whatever call it is in: the function must not call this library. NULL (the default) drops the lines. A line that
 * another thread is writing may still go to the function that was set before. */
typedef void (*dg_log)(int32_t level, const char *text, void *user);
DG_API void dg_set_log(dg_log log, void *user);

DG_API const char *dg_version(void);      /* of this library, MAJOR.MINOR.PATCH */
DG_API int32_t dg_abi_version(void);      /* DG_ABI_VERSION of the header that it was compiled with */
DG_API const char *dg_ggml_version(void); /* of the ggml inside */
DG_API const char *dg_compiler(void);
DG_API const char *dg_build_flags(void);  /* the build type and the switches that were on, separated by spaces */
DG_API const char *dg_cpu_features(void); /* those that ggml's code for the CPU was built with, comma-separated */
/* What the library needs of a processor and this one lacks, comma-separated; "" if nothing. Where it is not "", every
 * call that can fail gives DG_ERROR_UNSUPPORTED, and no other is to be made but those of this part. */
DG_API const char *dg_cpu_missing(void);

/* A level of a processor's instructions. The inner loops of the CPU's own operators are compiled for each. */
typedef struct dg_cpu_level {
    const char *name;    /* what dg_model_options.cpu takes */
    const char *meaning; /* for people */
    bool compiled;       /* else the compiler that built the library could not */
    bool offered;        /* this processor has it */
    const char *lacks;   /* what this processor lacks of it, comma-separated */
} dg_cpu_level;

/* All levels of this kind of processor, from the least to the best. Zeros when out of range. */
DG_API int32_t dg_n_cpu_levels(void);
DG_API dg_cpu_level dg_local_cpu_level(int32_t index);

DG_API int32_t dg_n_backends(void);
DG_API const char *dg_backend_name(int32_t index); /* NULL when out of range */
/* This machine's devices, the CPU among them: name and memory are filled in. Zeros when out of range. */
DG_API int32_t dg_n_devices(void);
DG_API dg_device dg_local_device(int32_t index);
/* Bytes of this machine's memory that this process may use without swapping, file pages that can be given up among
 * them; 0 where the system does not tell. */
DG_API size_t dg_memory_available(void);

/* ------------------------------------------------------------------------------------------- other machines */

/* Offers this machine's GPUs, or else its CPU, to models on other machines, on "host:port" with a numeric IPv4 host.
 * Does not return while it serves; prints a line for each client, one of which is served at a time. There is no
 * authentication, and whoever reaches the port can do in this process what he likes: only 127.0.0.1 or a network of
 * which every member is trusted. n_threads 0: one for each core. DG_ERROR_IO: the port cannot be had. */
DG_API dg_status dg_rpc_serve(const char *endpoint, int32_t n_threads, char *err, size_t err_size);

#ifdef __cplusplus
}
#endif

#endif
