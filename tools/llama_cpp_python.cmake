# How `make setup` compiles llama-cpp-python: read by CMake right after its project(), see CMAKE_ARGS in the Makefile.

# cnq needs libllama alone. llama.cpp's `common` library is half of the compile time, and its CMakeLists.txt forces the
# cache entry to ON: a plain variable hides that (policy CMP0126).
set(LLAMA_BUILD_COMMON OFF)

# With AMX compiled in, llama.cpp crashes in its first matrix product on many Xeons
# (ggml-org/llama.cpp issue 20824, pull request 26954): leave it out where the compiler knows how.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mno-amx-tile COMPILER_KNOWS_AMX)
if(COMPILER_KNOWS_AMX)
    add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
