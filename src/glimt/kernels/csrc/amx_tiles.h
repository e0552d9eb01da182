// AMX tiles: their shapes, and the intrinsics _tile_loadd, _tile_stored, _tile_zero,
// _tile_dpbf16ps, _tile_dpbssd and _tile_release.
//
// A processor without AMX can run them too, for tests: with -DGLIMT_EMULATE_AMX=ON, CMake builds
// the kernels for AMX over emulated tiles, and says that the set is there where AVX-512 BF16 is.
//
//     cmake -S . -B build/emulated -DGLIMT_EMULATE_AMX=ON && cmake --build build/emulated -j
//     cp build/emulated/_native.so src/glimt/kernels/ && pytest tests/kernels -k amx
//
// Each file that includes this has a copy of its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace glimt {

// What ldtilecfg reads: 8 tiles, unless told otherwise of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64, "ldtilecfg reads 64 bytes");

}  // namespace glimt

#if defined(GLIMT_EMULATE_AMX)
#include "amx_emulated.h"
#endif

namespace glimt {
namespace {

// Between vector stores and tile loads of the same memory, which the compiler does not see.
inline void memory_is_written() { __asm__ volatile("" : : : "memory"); }

// The compiler's own intrinsic says that it reads 8 bytes, and the stores of the rest may go.
inline void configure_tiles(const TileShapes& shapes) {
#if defined(GLIMT_EMULATE_AMX)
    emulated::configure(shapes);
#else
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
#endif
}

}  // namespace
}  // namespace glimt
