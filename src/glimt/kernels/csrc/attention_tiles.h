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

constexpr float kPowerSteps = 128;  // of an exponent: as many as bfloat16's fraction has

// How far 1 + i / 128 lies above 2^(i / 128), in parts of 128.
alignas(64) constexpr uint8_t kBend[128] = {
    0,  0,  1,  1,  1,  1,  2,  2,  2,  3,  3,  3,  3,  4,  4,  4,  4,  5,  5,  5,  5,  6,
    6,  6,  6,  6,  7,  7,  7,  7,  7,  8,  8,  8,  8,  8,  8,  9,  9,  9,  9,  9,  9,  9,
    10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11,
    11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10, 10, 10, 10,
    10, 10, 10, 9,  9,  9,  9,  9,  9,  9,  8,  8,  8,  8,  8,  7,  7,  7,  7,  7,  6,  6,
    6,  6,  5,  5,  5,  4,  4,  4,  3,  3,  3,  3,  2,  2,  1,  1,  1,  0};

// 2^x in bfloat16 without a polynomial. 128 (x + 127), rounded, is the number's bits but for a
// fraction that grows in a straight line; a table has the bend. The sum with kMagic leaves that
// whole number in a float's lowest bits. It is off by 0.7 % at most and 0.22 % in the mean square,
// without bias; a weight that is cut, by 0.4 % and 0.16 % about its mean.
struct Powers {
    static constexpr float kMagic = 12582912.0f;  // 1.5 x 2^23

    const __m512i bends[2] = {_mm512_load_si512(kBend), _mm512_load_si512(kBend + 64)};

    // What to add to 128 x - 128 peak, the peak a whole number: then it is exact.
    INLINE __m512 offset_of(__m512 peak) const {
        const __m512 start = _mm512_set1_ps(kMagic + 127 * kPowerSteps);
        return _mm512_fnmadd_ps(peak, _mm512_set1_ps(kPowerSteps), start);
    }
    INLINE __m512 least() const { return _mm512_set1_ps(kMagic); }
    INLINE bool is_beyond(__m512 most) const {
        const __m512 allowed = _mm512_set1_ps(kMagic + (127 + kSlack) * kPowerSteps);
        return _mm512_cmp_ps_mask(most, allowed, _CMP_GT_OQ);
    }
    // Two keys of 16 queries as a row of pairs.
    INLINE __m512i pairs_of(__m512 even, __m512 odd) const {
        const __m512i low = _mm512_castps_si512(_mm512_max_ps(even, least()));
        const __m512i high = _mm512_castps_si512(_mm512_max_ps(odd, least()));
        const __m512i line = _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(high, 16),
                                                       _mm512_set1_epi32(0xffff), 0xec);
        return _mm512_sub_epi16(line, _mm512_maskz_permutex2var_epi8(0x5555555555555555, bends[0],
                                                                     line, bends[1]));
    }
};

}  // namespace
}  // namespace glimt
