// The logits of a step and the self-conditioning signal that is made of them, wherever the head is.
#pragma once

#include "session/passes.h"

#include "ggml.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace dg {

class StepLogits {
  public:
    StepLogits(Passes &passes, StepIo &io) : passes_(passes), io_(io) {}

    // Adds the logits and, where a step cannot write the next one's signal to that of the pass, next_signal to the
    // context of the head's device. `whole`: with room for all rows, else for those of a pass.
    void declare(ggml_context *head, bool whole);

    // Whether they are in this process's memory, with room for all rows.
    bool are_here() const;
    // Where they are here: of all rows [R, V].
    float *rows() { return static_cast<float *>(io_.logits->data); }

    // Passes over canvases, one after the other. After each, `take` finds the raw logits of its rows, or of those that
    // are wanted, in the tensor.
    void denoise(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *wanted,
                 const std::function<void(const Pass &)> &take);
    // Rows of the tensor, to here and from here.
    void fetch(int32_t first, int32_t n, float *out) const;
    void store(int32_t first, int32_t n, const float *logits);

    // The processed logits of the first n_rows -> the signal of the next pass: where the tensor has all of them; and a
    // caller's.
    void make_signal(int32_t n_rows);
    void make_signal(const float *processed, int32_t n_rows);
    // Into next_signal.
    void set_next_signal(const float *signal, int32_t first, int32_t n);
    // The signal that passes left in next_signal becomes the next pass's.
    void take_next_signal(int32_t n_rows);
    void clear_signal();
    // Moves the signal of `n` rows to rows `to` and after.
    void move_signal(int32_t from, int32_t to, int32_t n);

  private:
    Passes &passes_;
    StepIo &io_;
    bool whole_ = false;

    size_t bytes(int32_t n_rows) const;
    int64_t n_vocab() const { return io_.logits->ne[0]; }
};

} // namespace dg
