# What `cmake --install` installs for programs in C and C++: the header, a shared and a static library, a CMake package
# and a pkg-config file. Included by a plain CMake build, not by pip's.
#
# Both libraries hold ggml. Nothing but dg_* can be linked against in either: another ggml in the same program, a newer
# one say, is not met.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# The engine's own archive, which the Python module takes, has no name to be installed under.
set_target_properties(diffgguf PROPERTIES OUTPUT_NAME diffgguf_engine)

# What a program in C needs besides the static library: C++'s run-time library, as this compiler calls it, and what ggml
# takes from the system.
set(private_libraries ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER private_libraries INCLUDE REGEX "^(stdc\\+\\+|c\\+\\+)$")
if(NOT private_libraries AND NOT MSVC)
    set(private_libraries c++) # `zig c++` does not tell what it links, and has this one alone
endif()
if(APPLE)
    list(APPEND private_libraries "-framework Accelerate")
elseif(WIN32)
    list(APPEND private_libraries ws2_32) # RPC
elseif(UNIX)
    list(APPEND private_libraries m ${CMAKE_DL_LIBS})
endif()

# ---------------------------------------------------------------------------------------------------------- shared
add_library(diffgguf_shared SHARED $<TARGET_OBJECTS:diffgguf>)
add_library(diffgguf::diffgguf ALIAS diffgguf_shared)
set_target_properties(diffgguf_shared PROPERTIES
    OUTPUT_NAME diffgguf
    EXPORT_NAME diffgguf
    LINKER_LANGUAGE CXX
    VERSION ${PROJECT_VERSION}
    SOVERSION ${abi_version}
)
if(WIN32)
    if(MSVC) # diffgguf.lib is the static one; elsewhere this is libdiffgguf.dll.a, which -ldiffgguf finds first
        set_target_properties(diffgguf_shared PROPERTIES ARCHIVE_OUTPUT_NAME diffgguf_shared)
    endif()
    target_compile_definitions(diffgguf_shared INTERFACE DG_SHARED)
elseif(APPLE)
    target_link_options(diffgguf_shared PRIVATE LINKER:-exported_symbol,_dg_*)
else()
    # Hidden visibility alone leaves what libstdc++'s headers mark as visible: instances of std:: templates.
    file(CONFIGURE OUTPUT exports.map CONTENT "{ global: dg_*; local: *; };\n")
    target_link_options(diffgguf_shared PRIVATE LINKER:--version-script,${CMAKE_CURRENT_BINARY_DIR}/exports.map)
endif()
target_link_libraries(diffgguf_shared PRIVATE diffgguf)
set_target_properties(diffgguf_shared PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON) # an installed ggml is found again
target_include_directories(diffgguf_shared INTERFACE
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

# ---------------------------------------------------------------------------------------------------------- static
# One archive with everything in it. A GPU backend brings libraries of its vendor's, which this list does not know, and
# an installed ggml is no archive to take from: then there is only the shared library.
set(backends "")
if(NOT PYDIFFGGUF_SYSTEM_GGML)
    get_target_property(backends ggml INTERFACE_LINK_LIBRARIES)
    list(FILTER backends INCLUDE REGEX "^ggml-")
    list(REMOVE_ITEM backends ggml-base)
endif()
set(libraries diffgguf_shared)
set(foreign ${backends})
list(REMOVE_ITEM foreign ggml-cpu ggml-rpc)
if(foreign OR NOT "ggml-cpu" IN_LIST backends)
    message(STATUS "diffgguf: no static library, since ggml's backends are '${backends}', not the CPU and RPC alone")
else()
    list(APPEND libraries diffgguf_static)
    find_package(Threads REQUIRED)
    set(parts diffgguf ${kernel_targets} ggml ggml-base ${backends})
    set(objects "")
    foreach(part IN LISTS parts)
        list(APPEND objects $<TARGET_OBJECTS:${part}>)
    endforeach()
    if(UNIX AND NOT APPLE AND CMAKE_OBJCOPY AND NOT PYDIFFGGUF_SANITIZE)
        # An archive has no notion of hidden symbols: two ggmls in one program would be one too many. Linked into one
        # object first, hidden ones can be made local to it.
        add_custom_command(
            OUTPUT diffgguf.o
            COMMAND "${CMAKE_CXX_COMPILER}" -r -nostdlib -o diffgguf.o "${objects}"
            COMMAND "${CMAKE_OBJCOPY}" --localize-hidden
                    --wildcard --localize-symbol=!dg_* --localize-symbol=*ggml* diffgguf.o
            DEPENDS ${parts}
            COMMAND_EXPAND_LISTS VERBATIM
        )
        set(objects diffgguf.o)
    endif()
    add_library(diffgguf_static STATIC ${objects})
    add_library(diffgguf::diffgguf_static ALIAS diffgguf_static)
    set_target_properties(diffgguf_static PROPERTIES OUTPUT_NAME diffgguf LINKER_LANGUAGE CXX)
    target_link_libraries(diffgguf_static INTERFACE Threads::Threads ${private_libraries})
    target_include_directories(diffgguf_static INTERFACE
        $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
endif()

# --------------------------------------------------------------------------------------------------------- install
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/diffgguf)
install(FILES csrc/diffgguf.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS ${libraries} EXPORT diffgguf-targets)
install(EXPORT diffgguf-targets NAMESPACE diffgguf:: DESTINATION ${package_dir})
configure_package_config_file(cmake/diffgguf-config.cmake.in diffgguf-config.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(diffgguf-config-version.cmake COMPATIBILITY SameMinorVersion) # until 1.0
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/diffgguf-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/diffgguf-config-version.cmake DESTINATION ${package_dir})
set(private_flags "")
foreach(library IN LISTS private_libraries)
    if(NOT library MATCHES "^-")
        string(PREPEND library "-l")
    endif()
    string(APPEND private_flags "${library} ")
endforeach()
configure_file(cmake/diffgguf.pc.in diffgguf.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/diffgguf.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/diffgguf)
if(NOT PYDIFFGGUF_SYSTEM_GGML)
    install(FILES vendor/ggml/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/diffgguf/ggml)
endif()
