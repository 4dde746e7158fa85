// ggml reports the reasons of its refusals through a process-wide log function. Ours prints nothing: lines go to the
// LogCapture that lives on the calling thread, if there is one, and to the function that dg_set_log was given.
#pragma once

#include "diffgguf.h"

#include <string>

namespace dg {

// Installs the log function and the abort guard, once a process. Called by everything that may reach ggml first.
void initialize_ggml();

// Where log lines go from now on; see dg_set_log.
void set_log(dg_log log, void *user);

class LogCapture {
  public:
    LogCapture();
    ~LogCapture();
    LogCapture(const LogCapture &) = delete;
    LogCapture &operator=(const LogCapture &) = delete;
    void append(const char *text) { text_ += text; }
    // The last line that ggml logged, without its function name, or `otherwise`.
    std::string last_line(const std::string &otherwise) const;

  private:
    LogCapture *outer_;
    std::string text_;
};

// While one lives on a thread, ggml's GGML_ABORT on that thread throws dg::Error instead of ending the process.
class AbortGuard {
  public:
    AbortGuard();
    ~AbortGuard();
    AbortGuard(const AbortGuard &) = delete;
    AbortGuard &operator=(const AbortGuard &) = delete;

  private:
    bool outer_;
};

} // namespace dg
