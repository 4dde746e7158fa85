// What CanvasLoop (csrc/session/loop.h) carries from step to step, on a device: canvases, rules, entropies, decisions.
// Between the forward passes nothing crosses to the host but each canvas's struct, 208 bytes with its Decision, and
// what somebody watches.
//
// CanvasLoop stays the one that checks options and knows which canvases go on; KernelStepper has a DeviceLoop begin,
// place and step them. The pass reads Target::ids and Target::signal where a step leaves them, or, with layers on
// several devices, what the stepper has brought to the first one. Whoever computes the pass has waited for its end
// before step(); step() returns when its own launches are through.
#pragma once

#include "cuda/device.h"
#include "sample/sampler.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace dg::cuda {

// Candidates that a row has room for, and bytes that hold those of n_rows.
int32_t candidate_capacity(int32_t n_vocab);
size_t candidate_bytes(int32_t n_rows, int32_t capacity);

struct FlatRows {
    std::vector<int32_t> rows;
    std::vector<int32_t> logits;
};

class DeviceLoop {
  public:
    // Where the session's tensors lie, and their shapes.
    struct Target {
        int32_t n_rows;        // R: what logits, ids and signal have room for
        int32_t n_vocab;       // at most MAX_VOCAB
        float softcap;         // 0: the graph softcaps
        float *logits;         // [R, n_vocab]
        int32_t *ids;          // [R]
        float *signal;         // [R, n_embd]; null: the file has no self-conditioning
        const void *embedding; // null: of a type that is not gathered here, so that every row counts as flat
        RowType embedding_type;
        int32_t n_embd;
        void *candidates; // [candidate_bytes(R, capacity)], where signal and embedding are given
        int32_t capacity; // candidates that a row has room for: beyond, it is flat
        double lost;      // of a row that is gathered, at most
    };
    // Throws Error: UNSUPPORTED for a vocabulary beyond MAX_VOCAB, else what Device throws.
    DeviceLoop(Device &device, const Target &target);
    ~DeviceLoop();
    DeviceLoop(const DeviceLoop &) = delete;
    DeviceLoop &operator=(const DeviceLoop &) = delete;

    // The canvases' rows stand one after the other, in this order. UNSUPPORTED: a canvas of more than MAX_ROWS rows.
    // After an error no canvas is under way. The signal of the first pass, zero, is the session's to write.
    void begin(const std::vector<CanvasStart> &starts);
    // Closes up the rows of those that go on: `which`, a subset of the placed ones in their order.
    void place(const std::vector<int32_t> &which);
    // Other pins and allowed ids for a placed canvas; newly pinned rows hold their ids at once, and stability begins
    // anew.
    void set_rules(int32_t index, const RowRules &rules);
    // Of each placed row, which row of the logits is its own; -1: none, it is pinned. Until this is called, and after
    // place(), each has that of its number.
    void set_places(const std::vector<int32_t> &places);
    // After a pass of the placed canvases. `noise`: null, or one for each of the canvases that were begun. INTERNAL
    // when a row of logits holds NaN or has no finite maximum.
    void step(const dg_noise *noise);
    // Of the last step, by the canvas's number in begin(). Throws ARGUMENT for one that is not placed, as read() does.
    const Canvas::Decision &decision(int32_t index) const;
    // Whether the last step left rows of Target::signal out, which are too flat to be gathered: their processed logits
    // then make them, as they do on the host.
    bool has_flat_rows() const;
    // Which rows these are, ascending, and which rows of the logits are theirs.
    FlatRows flat_rows() const;
    void read(int32_t index, const CanvasRows &out);

  private:
    // One allocation on the device.
    class Memory {
      public:
        Memory(Device &device, size_t n_bytes) : device_(&device), data_(device.allocate(n_bytes)) {}
        ~Memory() { device_->release(data_); }
        Memory(const Memory &) = delete;
        Memory &operator=(const Memory &) = delete;
        char *data() const { return static_cast<char *>(data_); }

      private:
        Device *device_;
        void *data_;
    };

    Device &device_;
    const Target target_;
    std::vector<std::unique_ptr<Memory>> memories_; // of each canvas, by its number
    std::vector<std::unique_ptr<Memory>> rules_;    // likewise, where set_rules has been called
    std::unique_ptr<Memory> canvases_memory_;       // Canvas [n_canvases]: the placed ones
    std::unique_ptr<Memory> places_memory_;         // int32_t [n_rows]
    std::vector<Canvas> canvases_;                  // the placed ones, as they were after the last step
    std::vector<int32_t> placed_;                   // their numbers
    std::vector<int32_t> places_;                   // of each placed row; empty: its own number
    std::vector<double *> uniform_;                 // of each canvas, by its number: room for handed-in draws
    std::vector<int32_t *> renoise_;
    Step step_ = {};

    Canvas make_canvas(const CanvasStart &start, int32_t first_row);
    void upload_canvases();
    void forget_places();
    size_t place_of(int32_t index) const;
};

} // namespace dg::cuda
