// What happens between two passes, for canvases side by side: softmax, draws, what is accepted, renoised and stopped,
// and the next pass's self-conditioning signal. Each way to do it is a class of its own (dg_sampler): on the host, by
// operators of the graph, by kernels of the device. CanvasLoop, which drives them, knows none of them.
#pragma once

#include "sample/sampler.h"
#include "session/step_logits.h"

#include "ggml.h"

#include <cstdint>
#include <vector>

namespace dg {

class Stepper {
  public:
    explicit Stepper(Passes &passes) : passes_(passes), logits_(passes, io_) {}
    virtual ~Stepper() = default;
    Stepper(const Stepper &) = delete;
    Stepper &operator=(const Stepper &) = delete;

    // Adds the tensors that it needs, without memory, to the context of the head's device; what graphs read and write
    // of them is in io() then.
    virtual void declare(ggml_context *head) = 0;
    const StepIo &io() const { return io_; }
    // The tensors have memory.
    virtual void allocated() {}
    // What happens to the logits in the graphs that it asks for.
    virtual Pass kind() const { return {}; }

    // Canvases by their number here, whose rows stand one after the other. What their rules point to stays where it is
    // until the next begin(). After an error none is under way.
    void begin(const std::vector<CanvasStart> &canvases);
    // The canvases that make the next step, a subset of those that made the last one, in their order: closes up their
    // rows. With pass(), the part of a step that can be cancelled, and made again.
    void place(const std::vector<int32_t> &which);
    // `noise`: null, or the draws of each canvas that was begun.
    virtual void pass(const dg_noise *noise) = 0;
    // The rest of the step. Throws INTERNAL when a row of logits holds NaN or has no finite maximum, and what a device
    // throws: nothing goes on then.
    virtual void decide(const dg_noise *noise) = 0;
    // Whether the canvas made the last step, or none was made yet.
    bool is_placed(int32_t index) const;
    // New rules for such a canvas: pins are on it at once, and its stability begins anew.
    virtual void set_rules(int32_t index, const RowRules &rules) = 0;
    // Of such a canvas, rows n and after leave it. Throws UNSUPPORTED where a body cannot do that, with nothing
    // changed.
    void narrow(int32_t index, int32_t n);
    // Of the last step of a canvas.
    virtual CanvasDecision decision(int32_t index) const = 0;
    virtual void read(int32_t index, const CanvasRows &out) = 0;

    // One pass over one canvas, alone: raw logits [n_out, V] of its rows `out`; null: of all. `processed` [n_rows, V]:
    // the logits that its signal is made of; null: it has none.
    void denoise(const int32_t *canvas, int32_t n_rows, const float *processed, const int32_t *out, int32_t n_out,
                 float *logits);

  protected:
    Passes &passes_;
    StepIo io_;
    StepLogits logits_;
    std::vector<int32_t> placed_; // numbers of the canvases whose rows stand in logits and signal, in this order
    bool signal_stands_ = true;   // of all placed rows; else it is to be made of the processed logits

    // What begin() and place() are to a body: canvases as they start; which rows stay, before placed_ changes.
    virtual void start(const std::vector<CanvasStart> &canvases) = 0;
    virtual void close_up(const std::vector<int32_t> &which) = 0;
    // Of the placed rows, where signal_stands_ is false.
    virtual void make_signal() { logits_.make_signal(placed_rows()); }
    virtual void shorten(int32_t index, int32_t n) = 0;
    // Rows of a canvas: as logits and signal have them, and as the next place() leaves them.
    int32_t rows_of(int32_t index) const { return rows_[static_cast<size_t>(index)]; }
    int32_t kept_of(int32_t index) const { return kept_[static_cast<size_t>(index)]; }
    // Of a placed canvas; what they point to is the caller's.
    virtual const RowRules &rules_of(int32_t index) const = 0;
    // Rows of the placed canvases, one after the other, and of all of them.
    std::vector<int32_t> segments() const;
    int32_t placed_rows() const;
    // Of each of them: 1 where it is free. A pinned row's logits are known.
    std::vector<uint8_t> free_rows() const;

    int32_t n_vocab() const { return passes_.model().config().n_vocab; }

  private:
    std::vector<int32_t> rows_; // of each canvas, by its number
    std::vector<int32_t> kept_;
};

} // namespace dg
