# The GPU backends that ggml is asked for: what each needs, checked before anything is compiled. What is missing is named
# together with what brings it.
if(GGML_CUDA)
    include(cmake/cuda.cmake)
endif()

if(GGML_VULKAN)
    find_package(Vulkan COMPONENTS glslc QUIET)
    if(NOT Vulkan_FOUND)
        message(FATAL_ERROR
            "GGML_VULKAN is on, but the Vulkan headers and loader, or the shader compiler glslc, are not here.\n"
            "  Debian and Ubuntu: apt install libvulkan-dev glslc spirv-headers; elsewhere the SDK from "
            "https://vulkan.lunarg.com, with VULKAN_SDK set.")
    endif()
    # Debian 12's headers lack it: ggml would compile shaders for minutes first.
    file(STRINGS "${Vulkan_INCLUDE_DIR}/vulkan/vulkan_core.h" layer_settings REGEX "define VK_EXT_layer_settings ")
    if(NOT layer_settings)
        message(FATAL_ERROR
            "The Vulkan headers in ${Vulkan_INCLUDE_DIR} are too old for ggml: they lack "
            "VK_EXT_layer_settings, which those of 1.4.309 have.\n"
            "  Newer ones need no installing: unpack https://github.com/KhronosGroup/Vulkan-Headers and give "
            "CMAKE_ARGS=\"-DGGML_VULKAN=on -DVulkan_INCLUDE_DIR=/path/to/include\".")
    endif()
endif()

if(GGML_HIP)
    find_program(pydiffgguf_hipconfig hipconfig HINTS "$ENV{ROCM_PATH}/bin" /opt/rocm/bin)
    mark_as_advanced(pydiffgguf_hipconfig)
    if(NOT pydiffgguf_hipconfig)
        message(FATAL_ERROR
            "GGML_HIP is on, but there is no ROCm (no hipconfig on PATH, in ROCM_PATH or in /opt/rocm).\n"
            "  Install ROCm 6.1 or newer with hipBLAS and rocBLAS (https://rocm.docs.amd.com), and name the card: "
            "CMAKE_ARGS=\"-DGGML_HIP=on -DGPU_TARGETS=gfx1100\".")
    endif()
endif()

if(GGML_METAL AND NOT APPLE)
    message(FATAL_ERROR "GGML_METAL is on, but this is ${CMAKE_SYSTEM_NAME}: Metal is a part of macOS.")
endif()
