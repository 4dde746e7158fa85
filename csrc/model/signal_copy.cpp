#include "model/signal_copy.h"

#include "base/cores.h"
#include "base/error.h"
#include "base/parallel.h"
#include "file/quantize.h"
#include "model/device_weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

namespace dg {
namespace {

constexpr int64_t PIECE = 64 << 20; // bytes of the copy that exist on the host at a time
// Tokens that a thread decodes before it writes their numbers, side by side, into the transposed rows: those are half a
// megabyte apart, and a cache line of each takes 32 tokens.
constexpr int64_t TILE = 64;

} // namespace

size_t signal_copy_bytes(const dg_config &c) {
    return sizeof(ggml_fp16_t) * static_cast<size_t>(c.n_vocab) * static_cast<size_t>(c.n_embd);
}

void fill_signal_copy(const ggml_tensor *embedding, const void *data, ggml_tensor *copy) {
    const int64_t n_embd = embedding->ne[0];
    const int64_t n_vocab = embedding->ne[1];
    const int64_t block = ggml_blck_size(embedding->type);
    const int64_t width = std::clamp<int64_t>(PIECE / (n_vocab * int64_t{sizeof(ggml_fp16_t)}), 1, n_embd);
    const auto n_tiles = static_cast<int32_t>((n_vocab + TILE - 1) / TILE);
    std::vector<ggml_fp16_t> piece(static_cast<size_t>(width * n_vocab));
    std::atomic<int64_t> unsound{-1};
    for (int64_t first = 0; first < n_embd; first += width) {
        const int64_t n = std::min(width, n_embd - first);
        const int64_t begin = first - first % block; // whole blocks are decoded
        const int64_t end = (first + n + block - 1) / block * block;
        parallel_rows(n_tiles, static_cast<int32_t>(TILE * (end - begin)), usable_cores(), [&](int32_t tile) {
            thread_local std::vector<float> decoded;
            decoded.resize(static_cast<size_t>(TILE * (end - begin)));
            const int64_t first_id = tile * TILE;
            const int64_t n_ids = std::min(TILE, n_vocab - first_id);
            for (int64_t i = 0; i < n_ids; ++i) {
                const size_t at = static_cast<size_t>(first_id + i) * embedding->nb[1];
                to_floats(embedding->type, static_cast<const char *>(data) + at + ggml_row_size(embedding->type, begin),
                          end - begin, decoded.data() + i * (end - begin));
            }
            for (int64_t k = 0; k < n; ++k) {
                ggml_fp16_t *out = piece.data() + k * n_vocab + first_id;
                for (int64_t i = 0; i < n_ids; ++i) {
                    out[i] = ggml_fp32_to_fp16(decoded[static_cast<size_t>(i * (end - begin) + first - begin + k)]);
                    if (!std::isfinite(ggml_fp16_to_fp32(out[i]))) {
                        unsound.store(first_id + i, std::memory_order_relaxed);
                    }
                }
            }
        });
        if (unsound.load() >= 0) {
            throw Error(DG_ERROR_UNSUPPORTED,
                        format("signal_copy: the embedding of token %d holds a number that half precision has not",
                               static_cast<int>(unsound.load())));
        }
        const size_t row = static_cast<size_t>(n_vocab) * sizeof(ggml_fp16_t);
        upload(copy, piece.data(), static_cast<size_t>(first) * row, static_cast<size_t>(n) * row);
    }
}

} // namespace dg
