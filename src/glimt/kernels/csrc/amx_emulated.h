// The AMX instructions that the kernels use, in AVX-512: for tests, where there is no AMX.
//
// Values are those of the processor, but that MXCSR says what becomes of denormal numbers; the
// kernels flush them, as AMX always does. What a processor refuses ends the process with a message.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, the instructions
// by name.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "amx_tiles.h"

#if !defined(__AVX512BW__) || !defined(__AVX512VNNI__)
#error "only files built for AMX include this"
#endif

namespace glimt {
namespace emulated {

constexpr int kNumTiles = 8, kRows = 16;

struct Tiles {
    uint8_t rows[kNumTiles][kRows][64];
    uint16_t row_bytes[kNumTiles];  // all 0 before ldtilecfg
    uint8_t num_rows[kNumTiles];
};
// One for all files: a kernel may set the shapes in one file and multiply in another.
alignas(64) inline thread_local Tiles tiles = {};

namespace {

inline void require(bool is_right, const char* what) {
    if (is_right) return;
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
}

inline void require_tile(int tile) {
    require(tile >= 0 && tile < kNumTiles, "there are 8 tiles");
    require(tiles.row_bytes[tile] && tiles.num_rows[tile], "the tile has no shape");
}

inline void release() { tiles = {}; }

inline void configure(const TileShapes& shapes) {
    release();
    if (shapes.palette == 0) return;
    require(shapes.palette == 1 && shapes.start_row == 0, "palette 1 begins at row 0");
    for (uint8_t byte : shapes.reserved) require(byte == 0, "reserved bytes are 0");
    for (int tile = 0; tile < 16; ++tile) {
        const int bytes = shapes.row_bytes[tile], rows = shapes.num_rows[tile];
        require(bytes <= 64 && rows <= kRows, "a tile has up to 16 rows of 64 bytes");
        require((bytes == 0) == (rows == 0), "a tile has both rows and columns or neither");
        require(tile < kNumTiles || bytes == 0, "tiles 8 to 15 are reserved");
        if (tile >= kNumTiles) continue;
        tiles.row_bytes[tile] = uint16_t(bytes);
        tiles.num_rows[tile] = uint8_t(rows);
    }
}

inline void zero(int tile) {
    require_tile(tile);
    std::memset(tiles.rows[tile], 0, sizeof(tiles.rows[tile]));
}

inline __mmask64 bytes_of(int tile) {
    return ~0ull >> (64 - tiles.row_bytes[tile]);
}

inline void load(int tile, const void* from, int64_t stride) {
    require_tile(tile);
    const __mmask64 bytes = bytes_of(tile);
    for (int r = 0; r < kRows; ++r) {
        __m512i row = _mm512_setzero_si512();
        if (r < tiles.num_rows[tile])
            row = _mm512_maskz_loadu_epi8(bytes, static_cast<const char*>(from) + r * stride);
        _mm512_store_si512(tiles.rows[tile][r], row);
    }
}

inline void store(int tile, void* to, int64_t stride) {
    require_tile(tile);
    const __mmask64 bytes = bytes_of(tile);
    for (int r = 0; r < tiles.num_rows[tile]; ++r)
        _mm512_mask_storeu_epi8(static_cast<char*>(to) + r * stride, bytes,
                                _mm512_load_si512(tiles.rows[tile][r]));
}

inline void require_product(int sum, int left, int right) {
    for (int tile : {sum, left, right}) require_tile(tile);
    require(sum != left && sum != right && left != right, "a product takes three tiles");
    require(tiles.num_rows[sum] == tiles.num_rows[left], "sums have the rows of the left tile");
    require(tiles.row_bytes[sum] == tiles.row_bytes[right], "and the columns of the right one");
    require(tiles.row_bytes[left] == 4 * tiles.num_rows[right], "k is the same in both");
    require(tiles.row_bytes[sum] % 4 == 0, "a row is whole words");
}

// Sums of even and of odd k by themselves, then together onto what is there.
inline void dot_bf16(int sum, int left, int right) {
    require_product(sum, left, right);
    const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
    __m512 even_k[kRows], odd_k[kRows];
    for (int k = 0; k < kRows; ++k) {
        const __m512i pair = _mm512_load_si512(tiles.rows[right][k]);
        even_k[k] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        odd_k[k] = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
    }
    const int num_k = tiles.num_rows[right];
    for (int r = 0; r < tiles.num_rows[sum]; ++r) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < num_k; ++k) {
            int32_t pair;
            std::memcpy(&pair, tiles.rows[left][r] + 4 * k, 4);
            const __m512i of = _mm512_set1_epi32(pair);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(of, 16)), even_k[k], even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(of, upper)), odd_k[k], odd);
        }
        auto* at = reinterpret_cast<float*>(tiles.rows[sum][r]);
        _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), _mm512_add_ps(even, odd)));
    }
}

// AVX-512 multiplies unsigned by signed: 128 is added to the left side, and taken off the sums.
inline void dot_int8(int sum, int left, int right) {
    require_product(sum, left, right);
    const __m512i turn = _mm512_set1_epi32(int32_t(0x80808080));
    const int num_k = tiles.num_rows[right];
    __m512i excess = _mm512_setzero_si512();
    for (int k = 0; k < num_k; ++k)
        excess = _mm512_dpbusd_epi32(excess, turn, _mm512_load_si512(tiles.rows[right][k]));
    for (int r = 0; r < tiles.num_rows[sum]; ++r) {
        __m512i total = _mm512_sub_epi32(_mm512_load_si512(tiles.rows[sum][r]), excess);
        for (int k = 0; k < num_k; ++k) {
            int32_t four;
            std::memcpy(&four, tiles.rows[left][r] + 4 * k, 4);
            total = _mm512_dpbusd_epi32(total, _mm512_xor_si512(_mm512_set1_epi32(four), turn),
                                        _mm512_load_si512(tiles.rows[right][k]));
        }
        _mm512_store_si512(tiles.rows[sum][r], total);
    }
}

}  // namespace
}  // namespace emulated
}  // namespace glimt

// Some compilers define these whether or not they may generate AMX.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_release
#define _tile_loadd(tile, from, stride) ::glimt::emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::glimt::emulated::store(tile, to, stride)
#define _tile_zero(tile) ::glimt::emulated::zero(tile)
#define _tile_dpbf16ps(sum, left, right) ::glimt::emulated::dot_bf16(sum, left, right)
#define _tile_dpbssd(sum, left, right) ::glimt::emulated::dot_int8(sum, left, right)
#define _tile_release() ::glimt::emulated::release()
