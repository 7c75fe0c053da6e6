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

install(FILES ${PROJECT_SOURCE_DIR}/LICENSE ${PROJECT_SOURCE_DIR}/README.md ${PROJECT_SOURCE_DIR}/CHANGELOG.md
  DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/examples DESTINATION ${CMAKE_INSTALL_DOCDIR} PATTERN __pycache__ EXCLUDE)

# For those without CMake: pkg-config tessera, and tessera-tools.
file(RELATIVE_PATH pc_to_prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
function(install_pkg_config name description library requires private)
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/${name}.pc @ONLY CONTENT [[
prefix=${pcfiledir}/@pc_to_prefix@
libdir=${prefix}/@CMAKE_INSTALL_LIBDIR@
includedir=${prefix}/@CMAKE_INSTALL_INCLUDEDIR@

Name: @name@
Description: @description@
Version: @PROJECT_VERSION@
Requires: @requires@
Requires.private: @private@
Libs: -L${libdir} -l@library@
Libs.private: -pthread
Cflags: -I${includedir}
]])
  install(FILES ${PROJECT_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()
install_pkg_config(tessera "${PROJECT_DESCRIPTION}" tessera "" "libhwy fmt")
if(TARGET tessera_tools)
  install_pkg_config(tessera-tools "Tessera's files, analysis, pictures and checks" tessera_tools tessera "libpng fmt libhwy")
endif()

install(EXPORT tessera-targets NAMESPACE tessera:: DESTINATION ${package_dir})
get_target_property(library_type tessera_core TYPE)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/tessera-config.cmake.in
  ${PROJECT_BINARY_DIR}/tessera-config.cmake INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may break the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/tessera-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/tessera-config.cmake ${PROJECT_BINARY_DIR}/tessera-config-version.cmake
  DESTINATION ${package_dir})
