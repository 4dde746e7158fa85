// The levels of instructions that the kernels are compiled for, from the least to the best, and which one is used.
#pragma once

#include "cpu/kernels.h"

#include <cstdint>
#include <vector>

namespace dg {

struct Level {
    const char *name;
    const char *meaning;         // for people
    uint32_t needs;              // of features.h
    const Kernels *(*kernels)(); // nullptr: the compiler that built the library could not compile it
};

// All of this kind of processor; none where the compiler knows no vectors (kernels/tile.h).
const std::vector<Level> &levels();
// Whether this processor has what the level needs.
bool is_offered(const Level &level);

// The best level that is compiled in and offered, or the one that is named; nullptr where there are none, and ggml's
// operators do the work. Throws DG_ERROR_UNSUPPORTED for a name that cannot be used, with those that can, and where
// check_processor does.
const Kernels *choose_kernels(const char *name);

// `chosen`, or where that is nullptr the best level there is, for the loops over logits: never without, since those are
// compiled for the floor as well.
const Kernels &logit_kernels(const Kernels *chosen);

// Throws DG_ERROR_UNSUPPORTED where the library was compiled for more than this processor has.
void check_processor();

} // namespace dg
