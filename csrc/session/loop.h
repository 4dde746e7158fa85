// The canvas loop: what is carried from one denoise step to the next, for one canvas or several side by side.
#pragma once

#include "sample/masks.h"
#include "sample/sampler.h"
#include "session/session.h"

#include <vector>

namespace dg {

class CanvasLoop {
  public:
    explicit CanvasLoop(Session &session) : session_(session) {}

    void begin(const dg_canvas_options *options, int32_t n_canvases);
    // One step of every canvas that goes on; a cancelled one may be repeated. `handed_in` (or null) and `out` have an
    // entry for each canvas. Throws ARGUMENT when no canvas is under way.
    void step(const dg_noise *handed_in, dg_step *out);
    // The last step of a canvas, with its arrays.
    dg_step rows_of(int32_t index);
    // The canvas makes no further step.
    void leave(int32_t index);
    // New pins and masks for a canvas that goes on, or has converged in the last step and has steps left: then it goes
    // on. Its stability begins anew. Throws ARGUMENT, and changes nothing, for rules or a canvas that cannot be.
    void set_rules(int32_t index, const dg_canvas_rules &rules);
    // Rows n_rows and after leave a canvas that goes on. Throws ARGUMENT for other canvases and more rows than there
    // are.
    void narrow(int32_t index, int32_t n_rows);
    // Whatever else uses the session's logits ends the canvases.
    void drop() {
        active_ = false;
        canvases_.clear();
    }

  private:
    struct Live {
        int32_t n_rows = 0;
        bool goes_on = true;
        bool quiet = false;
        // [n_rows] each: what was asked for, where it was
        std::vector<int32_t> pinned;
        std::vector<int32_t> watched;
        std::vector<int32_t> allowed_ends;
        std::vector<int32_t> allowed_ids; // as many as the last end
        // and what was read last
        std::vector<int32_t> canvas;
        std::vector<int32_t> argmax;
        std::vector<uint8_t> accepted;
        std::vector<double> entropy;
        std::vector<double> logprob; // empty unless watched
        dg_step last = {};

        // `last`, without its arrays where nobody looks.
        dg_step shown() const;
        RowRules rules() const;
    };

    Session &session_;
    bool active_ = false;
    int32_t step_ = 0;
    std::vector<Live> canvases_;

    CanvasStart start(Live &live, const dg_canvas_options &options) const;
    // Brings what a canvas's last step left to `live`; its pins must have stayed.
    void read(size_t index);
    // The argument, as an index; throws ARGUMENT unless there is such a canvas.
    size_t checked(int32_t index) const;
};

} // namespace dg
