/* Loads the DLL at run time and looks for the functions of a list, one name a line: `load DLL NAMES`. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <windows.h>

int main(int argc, char **argv) {
    const HMODULE library = argc == 3 ? LoadLibraryA(argv[1]) : NULL;
    FILE *const names = argc == 3 ? fopen(argv[2], "r") : NULL;
    if (!library || !names) {
        fprintf(stderr, "%s is not loaded: error %lu\n", argc > 1 ? argv[1] : "nothing", GetLastError());
        return 1;
    }
    DWORD n_names = 0;
    char name[128];
    while (fscanf(names, "%127s", name) == 1) {
        if (!GetProcAddress(library, name)) {
            printf("%s is missing\n", name);
            return 1;
        }
        ++n_names;
    }
    fclose(names);
    /* The table of exports, where the headers of a loaded image say that it is. */
    const char *const base = (const char *)library;
    const IMAGE_NT_HEADERS *const headers = (const void *)(base + ((const IMAGE_DOS_HEADER *)base)->e_lfanew);
    const IMAGE_EXPORT_DIRECTORY *const exports =
        (const void *)(base + headers->OptionalHeader.DataDirectory[IMAGE_DIRECTORY_ENTRY_EXPORT].VirtualAddress);
    if (exports->NumberOfFunctions != n_names) {
        printf("%lu functions are exported\n", exports->NumberOfFunctions);
        return 1;
    }
    const char *(*const version)(void) = (const char *(*)(void))(uintptr_t)GetProcAddress(library, "dg_version");
    printf("%s: %lu functions, none is missing, no other is there; version %s\n", strrchr(argv[1], '/') + 1, n_names,
           version());
    return 0;
}
