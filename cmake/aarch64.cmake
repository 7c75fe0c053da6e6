# Toolchain: Debian's cross compiler for aarch64 and its emulator; libraries from build/aarch64-sysroot, which
# tools/aarch64.sh fills. CMake calls this file from folders of its own, hence no PROJECT_SOURCE_DIR.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CXX_FLAGS_INIT -march=armv8-a+crypto)  # Highway's NEON target asks for AES

get_filename_component(TESSERA_SYSROOT ${CMAKE_CURRENT_LIST_DIR}/../build/aarch64-sysroot ABSOLUTE)
set(CMAKE_FIND_ROOT_PATH ${TESSERA_SYSROOT})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)

set(libraries ${TESSERA_SYSROOT}/usr/lib/aarch64-linux-gnu:${TESSERA_SYSROOT}/lib/aarch64-linux-gnu)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu -E LD_LIBRARY_PATH=${libraries})
# libz, which libpng needs, lies in /lib: the linker must be told, as it looks at no path of the other machine.
set(CMAKE_EXE_LINKER_FLAGS_INIT -Wl,-rpath-link,${TESSERA_SYSROOT}/lib/aarch64-linux-gnu)
