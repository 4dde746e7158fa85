// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator. A
// draw is a pure function of (seed, canvas, step, row), so threads, backends, batches and cancelling never change it.
// constexpr: nvcc then compiles the same functions for the device (--expt-relaxed-constexpr).
#pragma once

#include <array>
#include <cstdint>

namespace dg {

using Philox4 = std::array<uint32_t, 4>;

constexpr Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
                   static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

enum class Stream : uint32_t { FIRST_CANVAS = 0, UNIFORM = 1, RENOISE = 2 };

// Counter = (row, step, canvas, stream), key = seed.
constexpr Philox4 draw(uint64_t seed, uint32_t canvas, uint32_t step, uint32_t row, Stream stream) {
    return philox4x32_10({row, step, canvas, static_cast<uint32_t>(stream)}, static_cast<uint32_t>(seed),
                         static_cast<uint32_t>(seed >> 32));
}

// In [0, 1), with 53 bits.
constexpr double draw_uniform(uint64_t seed, uint32_t canvas, uint32_t step, uint32_t row) {
    const Philox4 word = draw(seed, canvas, step, row, Stream::UNIFORM);
    const uint64_t bits = (uint64_t{word[0] >> 5} << 26) | (word[1] >> 6);
    return static_cast<double>(bits) * 0x1.0p-53;
}

// In [0, n): the high word of the product, whose bias is below n / 2^32.
constexpr int32_t draw_id(uint64_t seed, uint32_t canvas, uint32_t step, uint32_t row, Stream stream, int32_t n) {
    const Philox4 word = draw(seed, canvas, step, row, stream);
    return static_cast<int32_t>((uint64_t{word[0]} * static_cast<uint32_t>(n)) >> 32);
}

} // namespace dg
