# What an installed Tessera consists of: libraries, headers, program, sample, the operators for PyTorch where they were
# built, and the CMake package `tessera`.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/tessera)

install(TARGETS tessera_core EXPORT tessera-targets)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/tessera DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.h")
install(DIRECTORY ${PROJECT_SOURCE_DIR}/data/ DESTINATION ${CMAKE_INSTALL_DATADIR}/tessera)
if(TARGET tessera_cli)
  install(TARGETS tessera_cli)
endif()

if(TARGET tessera_tools)
  install(TARGETS tessera_tools EXPORT tessera-tools-targets)
  install(EXPORT tessera-tools-targets NAMESPACE tessera:: DESTINATION ${package_dir})
endif()

if(TARGET tessera_torch)
  install(TARGETS tessera_torch EXPORT tessera-torch-targets)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/torch/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/tessera/torch
    FILES_MATCHING PATTERN "*.h")
  install(EXPORT tessera-torch-targets NAMESPACE tessera:: DESTINATION ${package_dir})
endif()

install(EXPORT tessera-targets NAMESPACE tessera:: DESTINATION ${package_dir})
get_target_property(library_type tessera_core TYPE)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/tessera-config.cmake.in
  ${PROJECT_BINARY_DIR}/tessera-config.cmake INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may break the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/tessera-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/tessera-config.cmake ${PROJECT_BINARY_DIR}/tessera-config-version.cmake
  DESTINATION ${package_dir})
