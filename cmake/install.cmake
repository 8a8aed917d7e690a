# cmake --install gives find_package(quantal) with quantal::quantal and, where built, quantal::torch.
if(NOT PROJECT_IS_TOP_LEVEL OR QUANTAL_BUILD_PYTHON)
  return()
endif()
include(CMakePackageConfigHelpers)
get_property(rooms GLOBAL PROPERTY QUANTAL_ROOMS)
install(TARGETS ${rooms} quantal EXPORT quantal-targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/quantal DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET quantal_torch)
  install(TARGETS quantal_torch EXPORT quantal-torch-targets
          ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT quantal-torch-targets NAMESPACE quantal::
          DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/quantal)
endif()
if(TARGET quantal_cuda)
  install(TARGETS quantal_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
if(TARGET quantal_cli)
  install(TARGETS quantal_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
install(EXPORT quantal-targets NAMESPACE quantal::
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/quantal)
configure_package_config_file(cmake/quantal-config.cmake.in
  ${PROJECT_BINARY_DIR}/quantal-config.cmake INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/quantal)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/quantal-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/quantal-config.cmake ${PROJECT_BINARY_DIR}/quantal-config-version.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/quantal)
