// Vectors that the attention kernels with products of bfloat16 share. Each file that includes it
// has a copy of its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "masks.h"

namespace glimt {
namespace {

// Weights may reach 2^8 before the output is scaled down: neither bfloat16 nor float minds.
constexpr float kSlack = 8.0f;

#define INLINE inline __attribute__((always_inline))

// The first `count` values of a row, as many as a vector holds or fewer, then zeros.
INLINE __m512i values_at(const uint16_t* row, int64_t count) {
    return _mm512_maskz_loadu_epi16(first_halves(count), row);
}

// 16 rows of 16 words, in place.
void transpose(__m512i* rows) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// 2^x for x <= 9 or so, to 8e-5: ample for a bfloat16 weight.
INLINE __m512 coarse_exp2(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
    __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.07802452f), rest, _mm512_set1_ps(0.22606716f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69583354f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.99992522f));
    return _mm512_scalef_ps(sum, x);
}

// Two keys' weights of 16 queries as a row of pairs of bfloat16. They are cut, not rounded; if the
// total is of the cut weights, the error has no bias.
INLINE __m512i cut_pairs(__m512 even, __m512 odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_ternarylogic_epi32(_mm512_castps_si512(odd), low, _mm512_set1_epi32(0xffff0000),
                                     0xec);
}

// The total, and both weights of every pair.
INLINE __m512 add_pairs(__m512 total, __m512i pairs) {
    return _mm512_dpbf16_ps(total, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(0x3f803f80));
}

}  // namespace
}  // namespace glimt
