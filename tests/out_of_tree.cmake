# Installs the build into a fresh prefix, then builds and runs examples/out_of_tree against it, as a
# user of the installed library would. Run by ctest with -DBUILD_DIR -DSOURCE_DIR -DGENERATOR -DCXX
# -DCXX_FLAGS -DBUILD_TYPE.
set(work ${BUILD_DIR}/out_of_tree)
file(REMOVE_RECURSE ${work})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE err)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${ARGN}: exit code ${code}\n${out}\n${err}")
  endif()
  set(output "${out}" PARENT_SCOPE)
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${work}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE_DIR}/examples/out_of_tree -B ${work}/build -G ${GENERATOR}
    -DCMAKE_PREFIX_PATH=${work}/prefix -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${CXX_FLAGS}
    -DCMAKE_BUILD_TYPE=${BUILD_TYPE})
run(${CMAKE_COMMAND} --build ${work}/build)
run(${work}/build/nf4_roundtrip)
message(STATUS "${output}")
# 4.5 bits per weight: 4 for the code, 32 for the scale of 64 codes.
if(NOT output MATCHES "0\\.5625 bytes per weight" OR NOT output MATCHES "relative error 0\\.0[89]")
  message(FATAL_ERROR "unexpected output: ${output}")
endif()
