// What follows from a model's figures and a session's options alone: ranges, sizes, rows, slots. Pure functions, so
// that whoever plans a session before there is a model, and the session itself, come to the same numbers.
#pragma once

#include "diffgguf.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dg {

// What a figure may be. Beyond these it is taken for damage: they bound every product of a few of them well inside 63
// bits.
struct Range {
    int64_t least;
    int64_t most;
};
namespace ranges {
constexpr Range LAYERS = {1, 1024};
constexpr Range WIDTHS = {1, 1 << 20};
constexpr Range HEADS = {1, 4096};
constexpr Range HEAD_DIMS = {1, 1 << 14};
constexpr Range EXPERTS = {1, 65536};
constexpr Range VOCABULARIES = {2, 1 << 24};
constexpr Range WINDOWS = {2, 1 << 28};
constexpr Range CANVASES = {1, 1 << 16};
// A session needs a prefix of one token and the canvas.
constexpr Range contexts(int32_t canvas_length) { return {int64_t{canvas_length} + 1, 1 << 28}; }
constexpr Range up_to(int32_t most) { return {1, most}; } // experts that a token uses, a layer's KV heads
} // namespace ranges

// Throws ARGUMENT, naming what is out of its range.
void check_range(const char *name, int64_t value, const Range &range);
void check_figures(const dg_config &config, const std::vector<dg_layer_config> &layers);

// A session's own figures.
struct SessionFigures {
    int32_t n_ctx;     // positions
    int32_t n_batch;   // tokens of a prompt in one pass, at most
    int32_t n_rows;    // R: rows of canvases that are denoised together, at most
    int32_t pass_rows; // rows of canvases in one pass, at most
    ggml_type type_kv;
    int32_t canvas_length;
    int32_t sliding_window;

    // Throws CONTEXT for an n_ctx that is too small or too large, else ARGUMENT.
    SessionFigures(const dg_config &config, const dg_session_options &options);

    int32_t largest_pass() const; // rows
    // Tokens of the longest chunk of a prompt: a canvas has room behind it.
    int32_t longest_chunk() const;
    // Slots of a layer's cache. Full layers have one for every position. Sliding layers are rings of the window and the
    // longest segment of a pass, so that a pass never overwrites what it must still see; one more, since a scored text
    // writes one row behind itself.
    int32_t slots(bool sliding) const;
    // Bytes of one slot's K or V. Throws UNSUPPORTED where heads are no multiple of the type's blocks.
    size_t slot_bytes(int64_t head_dim, int64_t n_head_kv) const;
};

// Rows of a cache of `slots` that ggml's operators read when the last position written is end - 1: those that hold
// something, rounded up to one of few numbers (multiples of 512 up to 2,048, then of a quarter of the next power of
// two), so that a graph serves at many positions; a mask hides the rest. longest_in_view: the
// greatest end that comes to the same.
int32_t view_rows(int32_t end, int32_t slots);
int32_t longest_in_view(int32_t end, int32_t slots, int32_t n_ctx);

// What n_ctx comes to; throws as SessionFigures does.
int32_t context_size(const dg_config &config, int32_t asked);

} // namespace dg
