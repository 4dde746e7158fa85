// Nothing of the standard library is used here: CMakeLists.txt compiles this file for the oldest processor of its kind,
// and an inline function from elsewhere might be compiled for a newer one.
#include "cpu/features.h"

#if defined(__x86_64__) || defined(__i386__)
#    define DG_X86 1
#    include <cpuid.h>
#    if defined(__linux__) && defined(__x86_64__)
#        include <sys/syscall.h>
#        include <unistd.h>
#    endif
#elif defined(_M_X64) // MinGW has both names
#    define DG_X86 1
#    define DG_MSVC_INTRINSICS 1
#    include <intrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#    include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#    include <sys/sysctl.h>
#endif

namespace dg {
namespace {

struct Name {
    uint32_t feature;
    const char *text;
};

constexpr Name NAMES[] = {
    {FEATURE_SSE42, "sse4.2"},
    {FEATURE_AVX, "avx"},
    {FEATURE_AVX2, "avx2"},
    {FEATURE_FMA, "fma"},
    {FEATURE_F16C, "f16c"},
    {FEATURE_AVX_VNNI, "avx_vnni"},
    {FEATURE_AVX512, "avx512"},
    {FEATURE_AVX512_VBMI, "avx512_vbmi"},
    {FEATURE_AVX512_VNNI, "avx512_vnni"},
    {FEATURE_AVX512_BF16, "avx512_bf16"},
    {FEATURE_AVX512_NEW, "avx512_vbmi2"},
    {FEATURE_AMX_BF16, "amx_bf16"},
    {FEATURE_DOTPROD, "dotprod"},
    {FEATURE_I8MM, "i8mm"},
    {FEATURE_FP16, "fp16"},
    {FEATURE_SVE, "sve"},
};

#if defined(DG_X86)

struct Registers {
    uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t sub = 0) {
    Registers r = {0, 0, 0, 0};
#    if defined(DG_MSVC_INTRINSICS)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(sub));
    r = {static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[1]), static_cast<uint32_t>(values[2]),
         static_cast<uint32_t>(values[3])};
#    else
    __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d); // all 0 beyond the last leaf
#    endif
    return r;
}

// Which registers the system saves. Only where CPUID tells of XSAVE.
uint64_t xcr0() {
#    if defined(DG_MSVC_INTRINSICS)
    return _xgetbv(0);
#    else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
#    endif
}

// Asks the system for tiles, which a process has from then on, on all threads. No for a system that is too old, or
// where a thread's stack for signals is too small: tiles are 8 KB of it. Numbers: Linux,
// Documentation/arch/x86/xstate.rst.
bool asks_for_tiles() {
#    if defined(__linux__) && defined(__x86_64__)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023;
    constexpr long XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#    else
    return false;
#    endif
}

bool has(uint32_t bits, int bit) { return (bits >> bit & 1) != 0; }

// Bit numbers: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID.
uint32_t detect() {
    const Registers one = cpuid(1);
    const Registers seven = cpuid(7);
    const Registers seven_one = seven.a >= 1 ? cpuid(7, 1) : Registers{0, 0, 0, 0};
    const Registers extended = cpuid(0x80000001u);
    const uint64_t saved = has(one.c, 27) ? xcr0() : 0;
    const bool saves_avx = (saved & 0x06) == 0x06;
    const bool saves_avx512 = (saved & 0xe6) == 0xe6;
    uint32_t found = 0;
    const auto add = [&found](uint32_t feature, bool here) { found |= here ? feature : 0u; };
    add(FEATURE_SSE42, has(one.c, 20) && has(one.c, 19) && has(one.c, 9) && has(one.c, 23));
    if (saves_avx && has(one.c, 28)) {
        add(FEATURE_AVX, true);
        add(FEATURE_AVX2, has(seven.b, 5) && has(seven.b, 3) && has(seven.b, 8) && has(extended.c, 5));
        add(FEATURE_FMA, has(one.c, 12));
        add(FEATURE_F16C, has(one.c, 29));
        add(FEATURE_AVX_VNNI, has(seven_one.a, 4));
    }
    if (saves_avx512 && has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 28) && has(seven.b, 30) &&
        has(seven.b, 31)) {
        add(FEATURE_AVX512, true);
        add(FEATURE_AVX512_VBMI, has(seven.c, 1));
        add(FEATURE_AVX512_VNNI, has(seven.c, 11));
        add(FEATURE_AVX512_BF16, has(seven_one.a, 5));
        add(FEATURE_AVX512_NEW, has(seven.c, 6) && has(seven.c, 12) && has(seven.c, 14));
        const bool saves_tiles = (saved & 0x60000) == 0x60000;
        add(FEATURE_AMX_BF16, saves_tiles && has(seven.d, 22) && has(seven.d, 24) && asks_for_tiles());
    }
    return found;
}

#elif defined(__aarch64__) && defined(__linux__)

// Bit numbers: Linux, arch/arm64/include/uapi/asm/hwcap.h; older headers lack the names.
uint32_t detect() {
    const unsigned long first = getauxval(AT_HWCAP);
    const unsigned long second = getauxval(26); // AT_HWCAP2
    uint32_t found = 0;
    found |= (first >> 20 & 1) != 0 ? FEATURE_DOTPROD : 0u;
    found |= (first >> 10 & 1) != 0 ? FEATURE_FP16 : 0u;
    found |= (first >> 22 & 1) != 0 ? FEATURE_SVE : 0u;
    found |= (second >> 13 & 1) != 0 ? FEATURE_I8MM : 0u;
    return found;
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool told(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

uint32_t detect() {
    uint32_t found = 0;
    found |= told("hw.optional.arm.FEAT_DotProd") ? FEATURE_DOTPROD : 0u;
    found |= told("hw.optional.arm.FEAT_FP16") ? FEATURE_FP16 : 0u;
    found |= told("hw.optional.arm.FEAT_I8MM") ? FEATURE_I8MM : 0u;
    return found;
}

#else

uint32_t detect() { return 0; }

#endif

} // namespace

uint32_t processor_features() { return detect(); }

const char *missing_features() {
    static char text[256]; // the same bytes whoever writes them
    name_features(floor_features() & ~processor_features(), text, sizeof text);
    return text;
}

void name_features(uint32_t features, char *text, unsigned size) {
    unsigned at = 0;
    for (const Name &name : NAMES) {
        if ((features & name.feature) == 0) {
            continue;
        }
        if (at > 0 && at + 1 < size) {
            text[at++] = ',';
        }
        for (const char *c = name.text; *c != 0 && at + 1 < size; ++c) {
            text[at++] = *c;
        }
    }
    text[at] = 0;
}

} // namespace dg
