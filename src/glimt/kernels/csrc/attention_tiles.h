// Tiles that the attention kernels for AMX share. Each file that includes it has a copy of its own.
#pragma once

#include "amx_tiles.h"
#include "attention_vectors.h"

namespace glimt {
namespace {

constexpr int kTile = 512;  // bfloat16 values

constexpr TileShapes kShapes{};

void set_shapes() { configure_tiles(kShapes); }
void release_tiles() {
    _tile_release();
    memory_is_written();
}

// The compiler may not move vector loads and stores across any of them.
#define LOAD_TILE_ROWS(tile, from, stride) \
    do {                                   \
        memory_is_written();               \
        _tile_loadd(tile, from, stride);   \
        memory_is_written();               \
    } while (0)
#define LOAD_TILE(tile, from) LOAD_TILE_ROWS(tile, from, 64)
#define STORE_TILE(tile, to) _tile_stored(tile, to, 64)
#define CLEAR_TILE(tile) _tile_zero(tile)
#define MULTIPLY_TILES(sum, left, right) _tile_dpbf16ps(sum, left, right)

}  // namespace
}  // namespace glimt
