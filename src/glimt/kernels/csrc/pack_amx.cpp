// x into tiles: bfloat16 as it is, or rounded to int8 on the way.
#if defined(__x86_64__)
#include <algorithm>

#include "counts.h"
#include "epilogue.inc"
#include "linear_amx.h"
#include "quantise.inc"

namespace glimt {
namespace {

// Where 64 bytes of a row go, tile after tile. A run of all rows lies together: were rows a power
// of two apart, a run's tiles would share a few sets of the second-level cache.
class RowOfTiles {
  public:
    RowOfTiles(const Product& p, int64_t row, int digit = 0)
        : at_(p.rows + ((digit * p.num_row_tiles + row / 16) * p.run * 16 + row % 16) * 64),
          run_(p.run),
          left_(p.run),
          to_next_run_((p.num_row_tiles - 1) * p.run * kTile) {}
    uint8_t* next() {
        uint8_t* at = at_;
        at_ += kTile;
        if (--left_ == 0) {
            left_ = run_;
            at_ += to_next_run_;
        }
        return at;
    }

  private:
    uint8_t* at_;
    const int64_t run_;
    int64_t left_;
    const int64_t to_next_run_;
};

void pack_bf16_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k;
    RowOfTiles tiles(p, row);
    for (int64_t t = 0; t < p.num_k; ++t)
        _mm512_store_si512(tiles.next(),
                           _mm512_maskz_loadu_epi16(first_halves(k - t * 32), x + t * 32));
}

inline __m512 rounded(__m512 value, __m512 factor) {
    return _mm512_roundscale_ps(_mm512_mul_ps(value, factor),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// kInt4 with rounded x: rounded by groups, and then taken as bfloat16.
void pack_rounded_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k, group = p.call->weight->group;
    RowOfTiles tiles(p, row);
    for (int64_t begin = 0; begin < p.num_k * 32; begin += group) {
        const int64_t count = std::clamp(k - begin, int64_t(0), group);
        const float largest = count ? largest_of(x + begin, count) : 0.0f;
        const __m512 factor = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
        const __m512 scale = _mm512_set1_ps(largest / 127.0f);
        for (int64_t i = 0; i < group; i += 32) {
            __m512 half[2];
            for (int h = 0; h < 2; ++h) {
                const int64_t at = i + 16 * h;
                const __m512 value = load_bf16(x + begin + at, first_lanes(count - at));
                half[h] = _mm512_mul_ps(rounded(value, factor), scale);
            }
            _mm512_store_si512(tiles.next(), (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
        }
    }
}

// 64 whole numbers as bytes, in order: packing mixes them by fours.
inline __m512i bytes_of(const __m512i* whole) {
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_packs_epi32(whole[0], whole[1]);
    const __m512i high = _mm512_packs_epi32(whole[2], whole[3]);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}

void pack_int8_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k;
    const float largest = largest_of(x, k);
    p.row_scales[row] = largest / 127.0f;
    const __m512 factor = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
    RowOfTiles tiles(p, row);
    for (int64_t t = 0; t < p.num_k; ++t) {
        __m512i whole[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t at = t * 64 + 16 * i;
            const __m512 value = load_bf16(x + at, first_lanes(k - at));
            whole[i] = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
        }
        _mm512_store_si512(tiles.next(), bytes_of(whole));
    }
}

// x = scale * (digit 0 * 2^14 + digit 1 * 2^7 + digit 2): 21 bits and a sign under the largest of
// the row, so that bfloat16 of 2^-13 of the largest are still exact.
inline __m512i low_digit(__m512i value) {  // -64 … 63
    const __m512i half = _mm512_set1_epi32(64);
    const __m512i moved = _mm512_add_epi32(value, half);
    return _mm512_sub_epi32(_mm512_and_si512(moved, _mm512_set1_epi32(127)), half);
}

void pack_split_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k;
    constexpr float kLargest = 127.0f * 16384.0f;
    const float largest = largest_of(x, k);
    p.row_scales[row] = largest / kLargest;
    const __m512 factor = _mm512_set1_ps(largest > 1e-30f ? kLargest / largest : 0.0f);
    RowOfTiles tiles[kDigits] = {{p, row, 0}, {p, row, 1}, {p, row, 2}};
    for (int64_t t = 0; t < p.num_k; ++t) {
        uint8_t* to[kDigits] = {tiles[0].next(), tiles[1].next(), tiles[2].next()};
        for (int i = 0; i < 64; i += 16) {
            const int64_t at = t * 64 + i;
            const __m512 value = load_bf16(x + at, first_lanes(k - at));
            __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
            for (int digit = kDigits - 1; digit >= 0; --digit) {
                const __m512i low = digit ? low_digit(left) : left;
                left = _mm512_srai_epi32(_mm512_sub_epi32(left, low), 7);
                _mm_store_si128(reinterpret_cast<__m128i*>(to[digit] + i),
                                _mm512_cvtsepi32_epi8(low));
            }
        }
    }
}

// is_grouped and rounded x: as int8, with a scale and a sum for every group.
void pack_group_bytes(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k, group = p.call->weight->group;
    RowOfTiles tiles(p, row);
    for (int64_t g = 0; g < p.num_groups; ++g) {
        const int64_t begin = least(g * group, k), at = row * p.num_groups + g;
        alignas(64) int8_t bytes[128];
        int32_t sum;
        const float scale =
            quantise(x + begin, least(group, k - begin), group, bytes, &sum);
        for (int64_t i = 0; i < group; i += 64)
            _mm512_store_si512(tiles.next(), _mm512_load_si512(bytes + i));
        p.group_scales[at] = scale / 16.0f;
        p.group_sums[at] = scale * float(sum);
    }
}

// is_grouped and exact x: of every 8 values 0 2 4 6 1 3 5 7, as the nibbles lie in 16 bits.
void pack_group_pairs(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k, group = p.call->weight->group;
    const __m512i order = _mm512_set_epi16(
        31, 29, 27, 25, 30, 28, 26, 24, 23, 21, 19, 17, 22, 20, 18, 16, 15, 13, 11, 9, 14, 12, 10,
        8, 7, 5, 3, 1, 6, 4, 2, 0);
    RowOfTiles tiles(p, row);
    for (int64_t g = 0; g < p.num_groups; ++g) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = g * group; i < (g + 1) * group; i += 32) {
            const __m512i values = _mm512_maskz_loadu_epi16(first_halves(k - i), x + i);
            _mm512_store_si512(tiles.next(), _mm512_permutexvar_epi16(order, values));
            const __m512i odd = _mm512_and_si512(values, _mm512_set1_epi32(int32_t(0xffff0000)));
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(values, 16)));
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(odd));
        }
        p.group_sums[row * p.num_groups + g] = _mm512_reduce_add_ps(sum);
    }
}

void clear_row(const Product& p, int64_t row) {
    for (int digit = 0; digit < (p.is_split ? kDigits : 1); ++digit) {
        RowOfTiles tiles(p, row, digit);
        for (int64_t t = 0; t < p.num_k; ++t)
            _mm512_store_si512(tiles.next(), _mm512_setzero_si512());
    }
    p.row_scales[row] = 0;
}

}  // namespace

void pack_row(const Product& p, int64_t row) {
    const Weight& weight = *p.call->weight;
    if (row >= p.call->m) return clear_row(p, row);
    const uint16_t* x = p.call->x + row * p.call->x_stride;
    if (p.is_split) pack_split_row(p, row, x);
    else if (p.is_grouped && weight.quantises_x) pack_group_bytes(p, row, x);
    else if (p.is_grouped) pack_group_pairs(p, row, x);
    else if (p.is_int8) pack_int8_row(p, row, x);
    else if (weight.format == kInt4 && weight.quantises_x) pack_rounded_row(p, row, x);
    else pack_bf16_row(p, row, x);
}

}  // namespace glimt
#endif
