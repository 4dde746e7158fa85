# The kernels of the CPU's own operators (csrc/cpu/kernels), compiled once for each level of instructions that the
# compiler knows, each into a namespace of its own. csrc/cpu/levels.cpp picks one when a model is opened.
#
# MSVC has no vectors as a part of the language: there ggml's operators do the work.
include(CheckCXXCompilerFlag)

# Which levels this kind of processor has; levels.cpp has the same names.
if(MSVC AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    set(levels "")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(levels sse4 avx2 avx_vnni avx512 avx512_bf16 amx)
    set(flags_sse4 -msse4.2 -mpopcnt)
    set(flags_avx2 ${flags_sse4} -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt)
    set(flags_avx_vnni ${flags_avx2} -mavxvnni)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mavx512vnni)
    set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16)
    set(flags_amx ${flags_avx512_bf16} -mamx-tile -mamx-bf16)
    set(oldest -march=x86-64)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    set(levels neon dotprod i8mm)
    set(flags_neon -march=armv8-a)
    set(flags_dotprod -march=armv8.2-a+dotprod)
    set(flags_i8mm -march=armv8.2-a+dotprod+i8mm)
    set(oldest -march=armv8-a)
else()
    set(levels generic)
    set(flags_generic "")
    set(oldest "")
endif()

set(kernel_sources attention bfloats integers logits norm product quantized_rows self_conditioning table tile)
list(TRANSFORM kernel_sources PREPEND csrc/cpu/kernels/)
list(TRANSFORM kernel_sources APPEND .cpp)

set(kernel_targets "") # whose objects are diffgguf's, too
foreach(level IN LISTS levels)
    set(CMAKE_REQUIRED_FLAGS "-Werror")
    string(REPLACE ";" " " flags "${flags_${level}}")
    if(flags)
        check_cxx_compiler_flag("${flags}" compiles_${level})
    else()
        set(compiles_${level} ON)
    endif()
    unset(CMAKE_REQUIRED_FLAGS)
    if(NOT compiles_${level})
        message(STATUS "this compiler cannot compile the CPU's kernels for ${level}: they are left out")
        target_compile_definitions(diffgguf PRIVATE DG_HAS_${level}=0)
        continue()
    endif()
    target_compile_definitions(diffgguf PRIVATE DG_HAS_${level}=1)
    add_library(kernels-${level} OBJECT ${kernel_sources})
    target_include_directories(kernels-${level} PRIVATE csrc)
    target_compile_definitions(kernels-${level} PRIVATE DG_LEVEL=${level})
    target_link_libraries(kernels-${level} PRIVATE ${ggml_target})
    # Optimized in a debug build as well: what is not inlined there would be a function of the standard library, compiled
    # for this level, under a name that all code shares. For GCC 12's warning of its own header's undefined vectors see
    # its bug 105593.
    target_compile_options(kernels-${level} PRIVATE ${flags_${level}} $<$<CONFIG:Debug>:-O2>
        -fno-math-errno -fno-trapping-math ${warnings}
        $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>)
    target_sources(diffgguf PRIVATE $<TARGET_OBJECTS:kernels-${level}>)
    list(APPEND kernel_targets kernels-${level})
endforeach()

# The loops over logits need no vectors: compiled for the floor as well, they serve where there is no level.
target_sources(diffgguf PRIVATE csrc/cpu/kernels/logits.cpp)
target_compile_definitions(diffgguf PRIVATE DG_LEVEL=plain)

# What asks the processor must run on the oldest.
if(oldest AND NOT MSVC)
    set_source_files_properties(csrc/cpu/features.cpp PROPERTIES COMPILE_OPTIONS ${oldest})
endif()
