# Installs the build into a fresh prefix, then builds and runs an example against it, as a user of
# the installed library would. Run by ctest with -DBUILD_DIR -DSOURCE_DIR -DGENERATOR -DCXX
# -DCXX_FLAGS -DBUILD_TYPE, -DEXAMPLE (folder and target of the example) and -DEXPECT (a regular
# expression that its output must match); -DTORCH_DIR where it needs libtorch.
set(work ${BUILD_DIR}/${EXAMPLE})
file(REMOVE_RECURSE ${work})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE err)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${ARGN}: exit code ${code}\n${out}\n${err}")
  endif()
  set(output "${out}" PARENT_SCOPE)
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${work}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE_DIR}/examples/${EXAMPLE} -B ${work}/build -G ${GENERATOR}
    -DCMAKE_PREFIX_PATH=${work}/prefix -DTorch_DIR=${TORCH_DIR} -DCMAKE_CXX_COMPILER=${CXX}
    -DCMAKE_CXX_FLAGS=${CXX_FLAGS} -DCMAKE_BUILD_TYPE=${BUILD_TYPE})
run(${CMAKE_COMMAND} --build ${work}/build)
run(${work}/build/${PROGRAM})
message(STATUS "${output}")
if(NOT output MATCHES "${EXPECT}")
  message(FATAL_ERROR "unexpected output, expected to match ${EXPECT}:\n${output}")
endif()
