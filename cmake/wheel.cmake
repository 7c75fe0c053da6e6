# The wheel, as scikit-build-core builds it (pyproject.toml): only the operators, against the torch of the Python that
# asks, wherever that one finds it.
if(NOT Torch_DIR)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import importlib.util as u, os
print(os.path.dirname(u.find_spec('torch').origin) + '/share/cmake/Torch', end='')"
    OUTPUT_VARIABLE Torch_DIR ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "torch is not installed for ${Python3_EXECUTABLE}")
  endif()
  set(Torch_DIR ${Torch_DIR} CACHE PATH "Where TorchConfig.cmake is")
endif()

# With TESSERA_BUILT_IN=FOLDER they come from a build folder that is configured already, and nothing is compiled twice.
if(TESSERA_BUILT_IN)
  add_custom_target(built_in ALL ${CMAKE_COMMAND} --build ${TESSERA_BUILT_IN} --target tessera_torch)
  install(CODE "execute_process(COMMAND \"${CMAKE_COMMAND}\" --install \"${TESSERA_BUILT_IN}\" --component wheel --strip
    --prefix \"\${CMAKE_INSTALL_PREFIX}\" COMMAND_ERROR_IS_FATAL ANY)" COMPONENT wheel)
endif()
