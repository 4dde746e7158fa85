// What rows may take, as bits: a form in which whole vocabularies of ids travel, 32 KB at 262,144 instead of 1 MB.
#pragma once

#include "diffgguf.h"

#include <cstdint>
#include <vector>

namespace dg {

// The same as lists of ids: RowRules::allowed_ends and allowed_ids, each row's ascending. Both are empty where no row
// has a mask.
struct AllowedIds {
    std::vector<int32_t> ends;
    std::vector<int32_t> ids;
};

// Throws DG_ERROR_ARGUMENT for masks that are missing or empty, and a pin that its row's mask leaves out.
AllowedIds expand_masks(const dg_canvas_rules &rules, int32_t n_rows, int32_t n_vocab);

} // namespace dg
