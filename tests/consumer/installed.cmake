# Installs the build tree, moves the installed tree elsewhere (nothing in it may know where it was), builds the
# consumer against it and compares what it prints; and runs the installed program, if it was built.
include(${CMAKE_CURRENT_LIST_DIR}/common.cmake)
set(work ${BUILD}/consumer-installed)
file(REMOVE_RECURSE ${work})

run(${CMAKE_COMMAND} --install ${BUILD} --config ${CONFIG} --prefix ${work}/first)
file(RENAME ${work}/first ${work}/prefix)
run(${configure} -B ${work}/build -DCMAKE_PREFIX_PATH=${work}/prefix -DTESSERA_VERSION=${VERSION})
run(${CMAKE_COMMAND} --build ${work}/build)

run(${work}/build/consumer)
set(expected "5 blocks, right\nrefused: pattern\n")
if(NOT output STREQUAL expected)
  message(FATAL_ERROR "consumer printed:\n${output}expected:\n${expected}")
endif()

if(NOT EXISTS ${work}/prefix/share/tessera/byte_lm_qkv.safetensors)
  message(FATAL_ERROR "the sample was not installed")
endif()
if(EXISTS ${work}/prefix/${BINDIR}/tessera)
  run(${work}/prefix/${BINDIR}/tessera --version)
  if(NOT output MATCHES "${VERSION}")
    message(FATAL_ERROR "tessera --version printed:\n${output}")
  endif()
endif()
