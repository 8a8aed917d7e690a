# One static library per room of src/. A room's public header is include/quantal/<room>.h; its
# private headers are included as "<room>/name.h" from src/. Sources are found by folder: a new file
# needs no line here (CONFIGURE_DEPENDS re-runs CMake).
#
# A source whose name ends in _avx2, _avxvnni, _avx512, _avx512bf16, _avx512vnni, _neon or _neondot is compiled for
# that instruction set, alone, and only on its architecture; no flag is ever set for a whole target.

find_package(nlohmann_json 3.10 REQUIRED)
find_package(Threads REQUIRED)
find_package(ZLIB 1.2 REQUIRED)

set(QUANTAL_WARNINGS "")
if(QUANTAL_DEVELOPER)
  set(QUANTAL_WARNINGS -Wall -Wextra -Wconversion -Wshadow -Werror)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    list(APPEND QUANTAL_WARNINGS -Wno-restrict)  # GCC bug 105651: false for "text" + std::string
  endif()
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|i.86")
  set(QUANTAL_ARCH x86)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(QUANTAL_ARCH arm)
else()
  set(QUANTAL_ARCH other)
endif()

set(QUANTAL_KERNEL_FLAGS "" CACHE STRING
    "More flags for the files of one instruction set, many instances of large templates each")

function(quantal_isa_flags)
  foreach(source ${ARGN})
    if(source MATCHES "_avx2\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
    elseif(source MATCHES "_avx512\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
        "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c;-mprefer-vector-width=512")
    elseif(source MATCHES "_avx512(bf16|vnni)\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
        "-mavx512${CMAKE_MATCH_1};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c;-mprefer-vector-width=512")
    elseif(source MATCHES "_avxvnni\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-mavxvnni;-mavx2;-mfma;-mf16c")
    elseif(source MATCHES "_neondot\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-march=armv8.2-a+dotprod")
    endif()
    if(source MATCHES "_(avx|neon)[0-9a-z]*\\.cpp$")
      set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS ${QUANTAL_KERNEL_FLAGS})
    endif()
  endforeach()
endfunction()

function(quantal_room name)
  cmake_parse_arguments(ARG "" "" "USES" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name}/*.cpp)
  if(NOT QUANTAL_ARCH STREQUAL "x86")
    list(FILTER sources EXCLUDE REGEX "_(avx2|avxvnni|avx512|avx512bf16|avx512vnni)\\.cpp$")
  endif()
  if(NOT QUANTAL_ARCH STREQUAL "arm")
    list(FILTER sources EXCLUDE REGEX "_neon(dot)?\\.cpp$")
  endif()
  quantal_isa_flags(${sources})
  set(target quantal_${name})
  add_library(${target} STATIC ${sources})
  add_library(quantal::${name} ALIAS ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name} CXX_VISIBILITY_PRESET hidden
                                             VISIBILITY_INLINES_HIDDEN ON)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target}
    PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>
    PRIVATE ${PROJECT_SOURCE_DIR}/src)
  # Codecs promise bits: no contraction of a product and a sum unless a kernel writes fma itself.
  target_compile_options(${target} PRIVATE -ffp-contract=off ${QUANTAL_WARNINGS})
  foreach(room ${ARG_USES})
    target_link_libraries(${target} PUBLIC quantal_${room})
  endforeach()
  if(name MATCHES "^(formats|io|policy|checkpoint)$")
    target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>)
  endif()
  if(name STREQUAL "io")
    target_link_libraries(${target} PRIVATE ZLIB::ZLIB)
  elseif(name STREQUAL "policy")
    target_compile_definitions(${target} PRIVATE QUANTAL_VERSION="${PROJECT_VERSION}")
    target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})  # drivers are looked up at run time
  endif()
  set_property(GLOBAL APPEND PROPERTY QUANTAL_ROOMS ${target})
endfunction()
