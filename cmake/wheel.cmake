# The wheel, as scikit-build-core builds it (pyproject.toml): the program, and the operators against the torch of the Python that
# asks, wherever that one finds it.
if(NOT DEFINED CACHE{Torch_DIR})
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import importlib.util as u, os
print(os.path.dirname(u.find_spec('torch').origin) + '/share/cmake/Torch', end='')"
    OUTPUT_VARIABLE Torch_DIR ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "torch is not installed for ${Python3_EXECUTABLE}")
  endif()
endif()

# The build folder is kept for the next time; what its cache knows of another torch is not.
if(NOT Torch_DIR STREQUAL TESSERA_TORCH_BEFORE)
  get_cmake_property(remembered CACHE_VARIABLES)
  list(FILTER remembered INCLUDE REGEX "^(Caffe2_|TORCH|c10_)")
  foreach(name IN LISTS remembered)
    unset(${name} CACHE)
  endforeach()
  set(TESSERA_TORCH_BEFORE ${Torch_DIR} CACHE INTERNAL "The torch that this folder was configured for")
endif()

# With TESSERA_BUILT_IN=FOLDER they come from a build folder that is configured already, and nothing is compiled twice.
if(TESSERA_BUILT_IN)
  add_custom_target(built_in ALL ${CMAKE_COMMAND} --build ${TESSERA_BUILT_IN} --target tessera_torch tessera_cli)
  install(CODE "execute_process(COMMAND \"${CMAKE_COMMAND}\" --install \"${TESSERA_BUILT_IN}\" --component wheel --strip
    --prefix \"\${CMAKE_INSTALL_PREFIX}\" COMMAND_ERROR_IS_FATAL ANY)" COMPONENT wheel)
endif()
