// The limits of AMX tiles: see limits.h.
#include "limits.h"

#if defined(__x86_64__)
#include "amx_tiles.h"

namespace glimt {
namespace {

constexpr TileShapes kTiles{};

constexpr int64_t kTileBytes = 1024, kNumSteps = 2;
constexpr int64_t kOperands = 4 * kNumSteps * kTileBytes;  // two A and two B tiles a step: 8 KB

struct Operands {
    alignas(64) uint8_t bytes[kOperands];
};

void fill(Operands& operands, const uint16_t value) {
    for (int64_t i = 0; i < kOperands; i += 2) {
        operands.bytes[i] = static_cast<uint8_t>(value);
        operands.bytes[i + 1] = static_cast<uint8_t>(value >> 8);
    }
    memory_is_written();
}

// The block that large products are made of: 2 x 2 sums, 2 A and 2 B tiles a step, all in L1.
#define GLIMT_TILE_LOOP(name, multiply, value)                       \
    void name(int64_t rounds) {                                      \
        Operands operands;                                           \
        fill(operands, value);                                       \
        configure_tiles(kTiles);                                     \
        _tile_zero(0);                                               \
        _tile_zero(1);                                               \
        _tile_zero(2);                                               \
        _tile_zero(3);                                               \
        for (int64_t round = 0; round < rounds; ++round)             \
            for (int64_t step = 0; step < kNumSteps; ++step) {       \
                const uint8_t* at = operands.bytes + step * 4 * kTileBytes; \
                _tile_loadd(6, at, 64);                              \
                _tile_loadd(4, at + kTileBytes, 64);                 \
                multiply(0, 4, 6);                                   \
                _tile_loadd(7, at + 2 * kTileBytes, 64);             \
                multiply(1, 4, 7);                                   \
                _tile_loadd(5, at + 3 * kTileBytes, 64);             \
                multiply(2, 5, 6);                                   \
                multiply(3, 5, 7);                                   \
            }                                                        \
        _tile_release();                                             \
    }

GLIMT_TILE_LOOP(multiply_bf16, _tile_dpbf16ps, 0x3c00)  // 1/128
GLIMT_TILE_LOOP(multiply_int8, _tile_dpbssd, 0x0101)
#undef GLIMT_TILE_LOOP

constexpr int64_t kProducts = 4 * kNumSteps * 16 * 16 * 32;  // of bfloat16; of int8 twice as many

}  // namespace

LimitLoops amx_limits() {
    return {avx512_limits().read, multiply_bf16, multiply_int8, 2 * kProducts, 4 * kProducts};
}

}  // namespace glimt

#else

namespace glimt {

LimitLoops amx_limits() { return {}; }

}  // namespace glimt

#endif
