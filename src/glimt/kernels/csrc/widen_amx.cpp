// Weights of int8 and int4 into tiles of bfloat16.
#if defined(__x86_64__)
#include "counts.h"
#include "linear_amx.h"

namespace glimt {
namespace {

// Two vectors of floats, k and k + 1 of 16 columns, as one row of a tile.
inline __m512i pairs_of(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// int8 is exact in bfloat16: the upper half of the float is all of it.
void widen_int8(const uint8_t* block, int64_t first, int64_t last, uint8_t* out) {
    const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
    for (int64_t line = first * 8; line < last * 8; ++line, out += 128) {
        const __m512i four = _mm512_load_si512(block + line * 64);
        __m512i bits[4];
        for (int i = 0; i < 4; ++i) {
            const __m512i byte = _mm512_srai_epi32(_mm512_slli_epi32(four, 24 - 8 * i), 24);
            bits[i] = _mm512_castps_si512(_mm512_cvtepi32_ps(byte));
        }
        for (int i = 0; i < 2; ++i) {
            const __m512i low = _mm512_srli_epi32(bits[2 * i], 16);
            const __m512i high = _mm512_and_si512(bits[2 * i + 1], upper);
            _mm512_store_si512(out + 64 * i, _mm512_or_si512(low, high));
        }
    }
}

// int4 is rounded once: group scale and offset are applied, the power of two comes at the end.
inline void widen_nibbles(__m512i v, __m512 scale, __m512 offset, uint8_t* out) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 w[8];
    for (int i = 0; i < 8; ++i) {
        const int shift = i < 4 ? 8 * i : 8 * (i - 4) + 4;
        const __m512 q = _mm512_permutexvar_ps(_mm512_srli_epi32(v, shift), numbers);
        w[i] = _mm512_fmadd_ps(q, scale, offset);
    }
    for (int i = 0; i < 4; ++i)
        _mm512_store_si512(out + 64 * i, pairs_of(w[2 * i], w[2 * i + 1]));
}

void widen_int4(const Product& p, const uint8_t* block, int64_t first, int64_t last,
                uint8_t* out) {
    const int64_t group_lines = p.call->weight->group / 8;
    const int64_t group_bytes = p.header->has_offsets ? 64 : 32;
    const uint8_t* nibbles = block + p.header->nibbles_offset;
    const uint8_t* scales = block + first * 4 / group_lines * group_bytes;
    for (int64_t line = first * 4; line < last * 4; scales += group_bytes) {
        const __m512 scale = half_at(scales);
        const __m512 offset = p.header->has_offsets
                                  ? half_at(scales + 32)
                                  : _mm512_mul_ps(scale, _mm512_set1_ps(-8.0f));
        const int64_t end = least(line + group_lines, last * 4);
        for (; line < end; ++line, out += 256)
            widen_nibbles(_mm512_load_si512(nibbles + line * 64), scale, offset, out);
    }
}

}  // namespace

void widen(const Product& p, int64_t block, int64_t first, int64_t last, uint8_t* out) {
    const uint8_t* from = block_of(*p.call->weight, block);
    if (p.call->weight->format == kInt8) widen_int8(from, first, last, out);
    else widen_int4(p, from, first, last, out);
}

}  // namespace glimt
#endif
