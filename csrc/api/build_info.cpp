// What the library tells of itself: versions, the build, the backends and devices inside; and where ggml's lines go.
#include "diffgguf.h"

#include "base/log_capture.h"
#include "base/process.h"
#include "cpu/features.h"
#include "cpu/levels.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <string>
#include <vector>

#ifndef DG_VERSION
#    error "DG_VERSION is set by the build"
#endif

void dg_set_log(dg_log log, void *user) { dg::set_log(log, user); }

const char *dg_version(void) { return DG_VERSION; }

int32_t dg_abi_version(void) { return DG_ABI_VERSION; }

const char *dg_ggml_version(void) { return ggml_version(); }

const char *dg_compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc";
#else
    return "unknown";
#endif
}

const char *dg_build_flags(void) { return DG_BUILD_FLAGS; }

const char *dg_cpu_features(void) {
    static const std::string features = [] {
        std::string text;
        const auto add = [&text](const char *name, int has) {
            if (has) {
                text += (text.empty() ? "" : ",") + std::string(name);
            }
        };
        add("sse3", ggml_cpu_has_sse3());
        add("ssse3", ggml_cpu_has_ssse3());
        add("avx", ggml_cpu_has_avx());
        add("avx2", ggml_cpu_has_avx2());
        add("avx_vnni", ggml_cpu_has_avx_vnni());
        add("bmi2", ggml_cpu_has_bmi2());
        add("f16c", ggml_cpu_has_f16c());
        add("fma", ggml_cpu_has_fma());
        add("avx512", ggml_cpu_has_avx512());
        add("avx512_vbmi", ggml_cpu_has_avx512_vbmi());
        add("avx512_vnni", ggml_cpu_has_avx512_vnni());
        add("avx512_bf16", ggml_cpu_has_avx512_bf16());
        add("amx_int8", ggml_cpu_has_amx_int8());
        add("neon", ggml_cpu_has_neon());
        add("arm_fma", ggml_cpu_has_arm_fma());
        add("fp16_va", ggml_cpu_has_fp16_va());
        add("dotprod", ggml_cpu_has_dotprod());
        add("matmul_int8", ggml_cpu_has_matmul_int8());
        add("sve", ggml_cpu_has_sve());
        add("riscv_v", ggml_cpu_has_riscv_v());
        add("vsx", ggml_cpu_has_vsx());
        add("llamafile", ggml_cpu_has_llamafile());
        return text;
    }();
    return features.c_str();
}

const char *dg_cpu_missing(void) { return dg::missing_features(); }

int32_t dg_n_cpu_levels(void) { return static_cast<int32_t>(dg::levels().size()); }

dg_cpu_level dg_local_cpu_level(int32_t index) {
    if (index < 0 || index >= dg_n_cpu_levels()) {
        return {};
    }
    static const std::vector<std::string> lacks = [] {
        std::vector<std::string> texts;
        for (const dg::Level &level : dg::levels()) {
            char text[256];
            dg::name_features(level.needs & ~dg::processor_features(), text, sizeof text);
            texts.emplace_back(text);
        }
        return texts;
    }();
    const dg::Level &level = dg::levels()[static_cast<size_t>(index)];
    return {level.name, level.meaning, level.kernels != nullptr, dg::is_offered(level),
            lacks[static_cast<size_t>(index)].c_str()};
}

int32_t dg_n_backends(void) {
    if (*dg::missing_features()) {
        return 0;
    }
    dg::initialize_ggml();
    return static_cast<int32_t>(ggml_backend_reg_count());
}

const char *dg_backend_name(int32_t index) {
    return index >= 0 && index < dg_n_backends()
               ? ggml_backend_reg_name(ggml_backend_reg_get(static_cast<size_t>(index)))
               : nullptr;
}

int32_t dg_n_devices(void) {
    if (*dg::missing_features()) {
        return 0;
    }
    dg::initialize_ggml();
    return static_cast<int32_t>(ggml_backend_dev_count());
}

size_t dg_memory_available(void) { return dg::memory_available(); }

dg_device dg_local_device(int32_t index) {
    dg_device out = {};
    if (index >= 0 && index < dg_n_devices()) {
        const ggml_backend_dev_t device = ggml_backend_dev_get(static_cast<size_t>(index));
        out.name = ggml_backend_dev_name(device);
        out.endpoint = "";
        ggml_backend_dev_memory(device, &out.memory_free, &out.memory_total);
    }
    return out;
}
