// The fuzzers' random numbers: small, fast, and the same on every machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fuzz {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    // SplitMix64 (Steele, Lea and Flood 2014).
    uint64_t next() {
        uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }

    // From 0 to n - 1; n >= 1. The bias of the remainder does not matter here.
    size_t below(size_t n) { return static_cast<size_t>(next() % n); }

    bool one_in(size_t n) { return below(n) == 0; }

  private:
    uint64_t state_;
};

// Numbers at which readers go wrong: around zero, around powers of two, and around what was there.
inline uint64_t awkward(Random &random, uint64_t old) {
    switch (random.below(8)) {
        case 0: return random.below(17);
        case 1: return old + 1;
        case 2: return old - 1;
        case 3: return old * 2;
        case 4: return (uint64_t{1} << random.below(64)) - 1 + random.below(3);
        case 5: return ~uint64_t{0} - random.below(64);
        case 6: return old ^ (uint64_t{1} << random.below(64));
        default: return random.next() >> random.below(64);
    }
}

} // namespace fuzz
