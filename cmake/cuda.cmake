# What GGML_CUDA needs before ggml's own CMakeLists may run: a compiler, the runtime, cuBLAS. Each that is missing is
# named together with the command that brings it; ggml alone would say "CUDA Toolkit not found" and stop, or fail at the
# first #include after minutes of compiling.
#
# Sets CMAKE_CUDA_ARCHITECTURES and makes the targets CUDA::cudart and CUDA::cublas.

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR
        "GGML_CUDA is on, but there is no CUDA compiler (nvcc).\n"
        "  Install the CUDA toolkit, 12.8 or newer (https://developer.nvidia.com/cuda-downloads; Debian and Ubuntu: "
        "apt install nvidia-cuda-toolkit), and put its bin folder on PATH, or say where nvcc is: "
        "CMAKE_ARGS=\"-DGGML_CUDA=on -DCMAKE_CUDA_COMPILER=/usr/local/cuda/bin/nvcc\".\n"
        "  Without -DGGML_CUDA=on everything is built for the CPU.")
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # The cards of this machine, or, without one, what ggml takes by default: that is hours of compiling on few cores.
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE capabilities OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE no_gpu)
    string(REGEX MATCHALL "[0-9]+[.][0-9]" capabilities "${capabilities}")
    if(no_gpu OR NOT capabilities)
        set(CMAKE_CUDA_ARCHITECTURES 75-virtual 80-virtual 86-real 89-real 90-virtual 120a-real)
        message(STATUS "No GPU here: compiling for ${CMAKE_CUDA_ARCHITECTURES}; "
            "-DCMAKE_CUDA_ARCHITECTURES=89 (RTX 40), 120a (RTX 50), 90 (H100) or 80 (A100) saves most of the time")
    else()
        list(REMOVE_DUPLICATES capabilities)
        list(TRANSFORM capabilities REPLACE "[.]" "")
        list(TRANSFORM capabilities REPLACE "^(12[0-9])$" "\\1a") # ggml's FP4 code is for these cards alone
        list(TRANSFORM capabilities APPEND "-real")
        set(CMAKE_CUDA_ARCHITECTURES ${capabilities})
    endif()
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared) # as ggml-cuda links it: the static one beside it would be a second runtime
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# cuBLAS: the toolkit's, or that of the package nvidia-cublas in this Python (480 MB instead of a whole toolkit).
set(PYDIFFGGUF_CUBLAS_DIR "" CACHE PATH "folder with include/cublas_v2.h and lib/libcublas.so*, if not the toolkit's")
if(NOT PYDIFFGGUF_CUBLAS_DIR AND NOT TARGET CUDA::cublas)
    execute_process(
        COMMAND "${Python_EXECUTABLE}" -c "import os, nvidia
for root in nvidia.__path__:
    for name in ('cu${CUDAToolkit_VERSION_MAJOR}', 'cublas'):
        folder = os.path.join(root, name)
        if os.path.exists(os.path.join(folder, 'include', 'cublas_v2.h')):
            print(folder)
            raise SystemExit"
        OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(folder)
        set(PYDIFFGGUF_CUBLAS_DIR "${folder}" CACHE PATH "" FORCE)
    endif()
endif()
if(PYDIFFGGUF_CUBLAS_DIR)
    file(GLOB cublas "${PYDIFFGGUF_CUBLAS_DIR}/lib/libcublas.so*" "${PYDIFFGGUF_CUBLAS_DIR}/lib/x64/cublas.lib")
    if(NOT cublas OR NOT EXISTS "${PYDIFFGGUF_CUBLAS_DIR}/include/cublas_v2.h")
        message(FATAL_ERROR "PYDIFFGGUF_CUBLAS_DIR is ${PYDIFFGGUF_CUBLAS_DIR}: there is no include/cublas_v2.h or no "
            "lib/libcublas.so in it")
    endif()
    list(GET cublas 0 cublas)
    message(STATUS "cuBLAS: ${cublas}")
    if(NOT TARGET CUDA::cublas)
        add_library(CUDA::cublas UNKNOWN IMPORTED GLOBAL)
    endif()
    set_target_properties(CUDA::cublas PROPERTIES IMPORTED_LOCATION "${cublas}"
        INTERFACE_INCLUDE_DIRECTORIES "${PYDIFFGGUF_CUBLAS_DIR}/include")
elseif(NOT TARGET CUDA::cublas)
    set(package nvidia-cublas)
    if(CUDAToolkit_VERSION_MAJOR LESS 13)
        string(APPEND package "-cu${CUDAToolkit_VERSION_MAJOR}")
    endif()
    message(FATAL_ERROR
        "GGML_CUDA is on and nvcc ${CUDAToolkit_VERSION} is there, but cuBLAS is not.\n"
        "  Install the toolkit's package for it (libcublas-dev), or take it from PyPI:\n"
        "      pip install ${package} \"scikit-build-core>=1.0\" \"cffi>=2.1\" ninja\n"
        "      CMAKE_ARGS=\"-DGGML_CUDA=on\" pip install --no-build-isolation .\n"
        "  or name a folder that has include/ and lib/ of it: -DPYDIFFGGUF_CUBLAS_DIR=/path")
endif()

# ggml's pool of virtual memory calls the driver itself, so the linker wants its library or the toolkit's stub of it.
if(NOT GGML_CUDA_NO_VMM AND NOT TARGET CUDA::cuda_driver)
    message(FATAL_ERROR
        "GGML_CUDA is on, but neither the driver's library (libcuda.so) nor the toolkit's stub of it is here.\n"
        "  Install the toolkit's cuda-driver-dev package, or do without ggml's pool of virtual memory: "
        "CMAKE_ARGS=\"-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON\"")
endif()
