# The torch that the package is built against is the one of the interpreter that builds it.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.utils.cmake_prefix_path)"
                OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE
                RESULT_VARIABLE torch_missing ERROR_QUIET)
if(torch_missing)
  if(NOT Torch_ROOT)
    message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}. Install torch, then run "
                        "`pip install --no-build-isolation .`, or set Torch_ROOT.")
  endif()
else()
  list(APPEND CMAKE_PREFIX_PATH ${torch_prefix})
endif()
