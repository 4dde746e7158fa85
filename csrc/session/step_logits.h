// The logits of a step and the self-conditioning signal that is made of them, wherever the head is.
#pragma once

#include "session/passes.h"

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace dg {

class StepLogits {
  public:
    StepLogits(Passes &passes, StepIo &io) : passes_(passes), io_(io) {}

    // Adds the logits and, where a step cannot write the next one's signal to that of the pass, next_signal to the
    // context of the head's device. `whole`: with room for all rows, else for those of a pass.
    void declare(ggml_context *head, bool whole);

    // Passes over canvases; the raw logits of all rows [R, V], or of those that are wanted, are in rows() then.
    void denoise(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *wanted);
    // In place: raw after denoise; the sampler turns them into the processed ones.
    float *rows();
    // Processed ones of a caller: the first n_rows.
    void set(const float *processed, int32_t n_rows);

    // The processed logits of the first n_rows -> the signal of the next pass.
    void make_signal(int32_t n_rows);
    // The signal that passes left in next_signal becomes the next pass's.
    void take_next_signal(int32_t n_rows);
    void clear_signal();
    // Moves the signal of `n` rows to rows `to` and after.
    void move_signal(int32_t from, int32_t to, int32_t n);

  private:
    Passes &passes_;
    StepIo &io_;
    bool whole_ = false;
    std::vector<float> copy_; // [R, V], where the tensor has not all of them, or not here, and they are wanted here

    // The tensor is in this process's memory, and has room for all rows.
    bool are_here() const;
    size_t bytes(int32_t n_rows) const;
    int64_t n_vocab() const { return io_.logits->ne[0]; }
};

} // namespace dg
