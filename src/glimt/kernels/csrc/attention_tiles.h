// Tiles that the attention kernels for AMX share. Each file that includes it has a copy of its own.
#pragma once

#include <cstdint>

#include "attention_vectors.h"

namespace glimt {
namespace {

constexpr int kTile = 512;  // bfloat16 values

struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// Constant and whole operands: g++ takes the intrinsic for a read of eight bytes only, and may
// drop the stores of the rest.
const TileShapes kShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void set_shapes() { __asm__ volatile("ldtilecfg %0" : : "m"(kShapes) : "memory"); }
void release_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

// Each clobbers memory: the compiler may not move vector loads and stores across.
#define LOAD_TILE(tile, from) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(int64_t(64)) : "memory")
#define LOAD_TILE_ROWS(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(int64_t(stride)) \
                     : "memory")
#define STORE_TILE(tile, to) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" \
                     : : "r"(to), "r"(int64_t(64)) : "memory")
#define CLEAR_TILE(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define MULTIPLY_TILES(sum, left, right) \
    __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum : :)

}  // namespace
}  // namespace glimt
