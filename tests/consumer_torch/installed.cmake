# Installs the build tree, moves it, builds the consumer against it and compares what it prints.
include(${CMAKE_CURRENT_LIST_DIR}/../consumer/common.cmake)
set(work ${BUILD}/consumer-torch)
file(REMOVE_RECURSE ${work})

run(${CMAKE_COMMAND} --install ${BUILD} --config ${CONFIG} --prefix ${work}/first)
file(RENAME ${work}/first ${work}/prefix)
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${work}/build -G ${GENERATOR} -DCMAKE_CXX_COMPILER=${COMPILER}
  -DCMAKE_BUILD_TYPE=${CONFIG} -DCMAKE_PREFIX_PATH=${work}/prefix -DTorch_DIR=${TORCH_DIR} -DTESSERA_VERSION=${VERSION})
run(${CMAKE_COMMAND} --build ${work}/build)

run(${work}/build/consumer_torch)
set(expected "operator right\nmodule right, gradient there\nrefused\n")
if(NOT output STREQUAL expected)
  message(FATAL_ERROR "consumer_torch printed:\n${output}expected:\n${expected}")
endif()
