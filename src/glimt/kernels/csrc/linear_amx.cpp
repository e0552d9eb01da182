// Matrix products with AMX tiles.
//
// x is copied into tiles of 16 rows by 64 bytes. Weights of bfloat16, and of int8 with rounded x,
// are tiles as they lie; others are first widened to bfloat16 tiles. Two by two tiles of results
// stay in registers over a run of k; then bias, activation and residual follow, row by row, while
// the next tiles are multiplied.
#if defined(__x86_64__)
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "amx_tiles.h"
#include "epilogue.inc"
#include "mlp.h"
#include "quantise.inc"
#include "threads.h"

namespace glimt {
namespace {

constexpr int kTile = 1024;      // bytes: 16 rows of 64
constexpr int kFewRows = 32;     // up to here the weights' stream is what takes time
constexpr int kSlotRows = 0, kSlotScales = 1, kSlotInner = 2, kSlotSums = 3, kSlotWide = 4;

int64_t up_to(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// --- tiles ---

inline void fetch(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}
inline void fetch_l2(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// --- what a product is made of ---

struct Product {
    const LinearCall* call;
    const PackedHeader* header;
    bool is_int8;        // tiles of int8 into int32, else of bfloat16 into float
    bool is_widened;     // the weight is widened to tiles of bfloat16 first
    bool is_split;       // few rows of exact x by int8: x is three int8 digits, nothing is widened
    int64_t num_k;       // tiles over k
    int64_t num_row_tiles;  // of 16 rows; even where rows are many
    int64_t num_panels;  // of 32 columns
    int64_t run;         // tiles of k that are multiplied at a time
    uint8_t* rows;       // x: [num_k / run, up][num_row_tiles][run] tiles
    float* row_scales;   // is_int8, is_split: [num_row_tiles * 16]
    bool is_grouped;     // few rows by int4: exact tiles, scaled group by group
    int64_t num_groups;  // is_grouped, as the next two: [num_row_tiles * 16][num_groups]
    float* group_scales; // 1/16 of the scales of rounded x
    float* group_sums;   // of x
};

// --- x into tiles ---

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
    for (int64_t t = 0; t < p.num_k; ++t) {
        const int64_t left = k - t * 32;
        const __mmask32 lanes = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
        _mm512_store_si512(tiles.next(), _mm512_maskz_loadu_epi16(lanes, x + t * 32));
    }
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

void pack_int8_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k;
    const float largest = largest_of(x, k);
    p.row_scales[row] = largest / 127.0f;
    const __m512 factor = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
    RowOfTiles tiles(p, row);
    for (int64_t t = 0; t < p.num_k; ++t) {
        uint8_t* to = tiles.next();
        for (int i = 0; i < 64; i += 16) {
            const int64_t at = t * 64 + i;
            const __m512 value = load_bf16(x + at, first_lanes(k - at));
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtsepi32_epi8(q));
        }
    }
}

// x = scale * (digit 0 * 2^14 + digit 1 * 2^7 + digit 2): 21 bits and a sign under the largest of
// the row, so that bfloat16 of 2^-13 of the largest are still exact.
constexpr int kDigits = 3;

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
        const int64_t begin = std::min(g * group, k), at = row * p.num_groups + g;
        alignas(64) int8_t bytes[128];
        int32_t sum;
        const float scale =
            quantise(x + begin, std::min(group, k - begin), group, bytes, &sum);
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
            const int64_t left = k - i;
            const __mmask32 lanes = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
            const __m512i values = _mm512_maskz_loadu_epi16(lanes, x + i);
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

// --- weights into tiles of bfloat16 ---

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

inline __m512 half_at(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
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
        const int64_t end = std::min(line + group_lines, last * 4);
        for (; line < end; ++line, out += 256)
            widen_nibbles(_mm512_load_si512(nibbles + line * 64), scale, offset, out);
    }
}

// Tiles first … last-1 of a block.
void widen(const Product& p, int64_t block, int64_t first, int64_t last, uint8_t* out) {
    const uint8_t* from = block_of(*p.call->weight, block);
    if (p.call->weight->format == kInt8) widen_int8(from, first, last, out);
    else widen_int4(p, from, first, last, out);
}

// --- results: 2 x 2 tiles in memory, row by row to where they belong ---

class Results {
  public:
    Results(const Product& p, bool is_streamed)
        : p_(p), call_(*p.call), is_streamed_(is_streamed) {
        is_joined_ = !call_.weight->is_paired && call_.activation != kSiluMul;
    }
    // Begins with the results of 32 rows and a panel. tiles: row tile 0 of both blocks, then 1.
    void begin(const uint8_t* tiles, int64_t row, int64_t panel) {
        tiles_ = tiles;
        first_row_ = row;
        row_ = 0;
        end_ = int(std::clamp(call_.m - row, int64_t(0), int64_t(32)));
        block_ = panel * 2;
        const Weight& weight = *call_.weight;
        if (p_.header->scales_offset) {
            const float* scales = scales_of(weight) + block_ * kBlock;
            scale_[0] = _mm512_loadu_ps(scales);
            scale_[1] = _mm512_loadu_ps(scales + kBlock);
        }
        column_[0] = first_row_of(0);
        column_[1] = first_row_of(1);
        for (int i = 0; i < 2; ++i)
            bias_[i] = with_bias(call_, column_[i], _mm512_setzero_ps());
        is_whole_ = is_joined_ && !call_.is_out_float && column_[0] + 32 <= weight.n;
    }
    bool is_done() const { return row_ >= end_; }
    void finish() {
        while (!is_done()) step();
    }
    // One row.
    void step() {
        const int r = row_++;
        const uint8_t* at = tiles_ + r / 16 * 2 * kTile + r % 16 * 64;
        __m512 value[2];
        for (int i = 0; i < 2; ++i) {
            const uint8_t* of = at + i * kTile;
            value[i] = p_.is_int8 ? _mm512_cvtepi32_ps(_mm512_load_si512(of))
                                  : _mm512_load_ps(of);
            if (!p_.header->scales_offset) {
                value[i] = _mm512_add_ps(value[i], bias_[i]);
                continue;
            }
            __m512 scale = scale_[i];
            if (p_.is_int8 || p_.is_split)
                scale = _mm512_mul_ps(scale, _mm512_set1_ps(p_.row_scales[first_row_ + r]));
            value[i] = _mm512_fmadd_ps(value[i], scale, bias_[i]);
        }
        store(first_row_ + r, value);
    }

  private:
    int64_t first_row_of(int i) const {
        return first_row(call_.weight->n, call_.weight->is_paired, block_ + i);
    }
    void store(int64_t row, const __m512* value) {
        if (is_whole_) {
            store_whole(row, value);
        } else if (call_.activation == kSiluMul) {
            store_columns(call_, row, column_[0], call_.weight->n / 2,
                          _mm512_mul_ps(silu(value[0]), value[1]));
        } else {
            for (int i = 0; i < 2; ++i)
                store_columns(call_, row, column_[i], call_.weight->n,
                              activate(value[i], call_.activation));
        }
    }
    void store_whole(int64_t row, const __m512* value) {
        __m512 done[2];
        for (int i = 0; i < 2; ++i)
            done[i] = with_residual(call_, row, column_[i], 0xffff,
                                    activate(value[i], call_.activation));
        auto* out = static_cast<uint16_t*>(call_.out) + row * call_.out_stride + column_[0];
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(done[1], done[0]);
        if (is_streamed_) _mm512_stream_si512(reinterpret_cast<__m512i*>(out), both);
        else _mm512_storeu_si512(out, both);
    }

    const Product& p_;
    const LinearCall& call_;
    const bool is_streamed_;  // past the caches: lines are whole and aligned
    bool is_joined_, is_whole_ = false;
    const uint8_t* tiles_ = nullptr;
    int64_t first_row_ = 0, block_ = 0, column_[2] = {};
    int row_ = 0, end_ = 0;
    __m512 bias_[2], scale_[2];
};

// --- many rows ---

// How the matrices are cut so that what is used again stays in the second-level cache: for each
// chunk of panels and block of rows, k in runs; sums between runs stay in memory.
struct Cut {
    int64_t row_pairs;  // of 32 rows in a block
    int64_t panels;     // in a chunk
    int64_t run;        // tiles of k in a run
};

// sums += a * b; the numbers of tiles are part of the instruction.
#define MULTIPLY_TILES(sums, a, b)                              \
    do {                                                        \
        if constexpr (kIsInt8) _tile_dpbssd(sums, a, b);        \
        else _tile_dpbf16ps(sums, a, b);                        \
    } while (0)

// Lines that are fetched into the second-level cache while others are multiplied.
struct Wanted {
    const uint8_t* at = nullptr;
    const uint8_t* end = nullptr;
    int64_t lines = 0;  // at each step
    void step() {
        for (int64_t i = 0; i < lines && at < end; ++i, at += 64) fetch_l2(at);
    }
};

struct Operands {
    const uint8_t* a;  // first row tile
    int64_t a_next;    // to the second
    const uint8_t* b;  // first block
    int64_t b_next;
};

template <bool kIsInt8>
inline void multiply_run(const Operands& o, int64_t run, Results& results, Wanted& wanted) {
    const uint8_t *a0 = o.a, *a1 = o.a + o.a_next, *b0 = o.b, *b1 = o.b + o.b_next;
    for (int64_t t = 0; t < run; ++t) {
        _tile_loadd(4, b0 + t * kTile, 64);
        _tile_loadd(6, a0 + t * kTile, 64);
        MULTIPLY_TILES(0, 6, 4);
        _tile_loadd(5, b1 + t * kTile, 64);
        MULTIPLY_TILES(1, 6, 5);
        _tile_loadd(7, a1 + t * kTile, 64);
        MULTIPLY_TILES(2, 7, 4);
        wanted.step();
        MULTIPLY_TILES(3, 7, 5);
        if (!results.is_done()) results.step();
    }
}

inline void load_sums(const uint8_t* sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTile, 64);
    _tile_loadd(2, sums + 2 * kTile, 64);
    _tile_loadd(3, sums + 3 * kTile, 64);
}

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void store_sums(uint8_t* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTile, 64);
    _tile_stored(2, sums + 2 * kTile, 64);
    _tile_stored(3, sums + 3 * kTile, 64);
}

// A worker's share of the result: row pairs and panels.
struct Share {
    int64_t first_pair, last_pair, first_panel, last_panel;
};

class ManyRows {
  public:
    ManyRows(const Product& p, const Cut& cut, uint8_t* sums, uint8_t* wide, bool is_streamed)
        : p_(p), cut_(cut), sums_(sums), wide_(wide), results_(p, is_streamed) {}

    void run(const Share& share) {
        for (int64_t panel = share.first_panel; panel < share.last_panel; panel += cut_.panels) {
            const int64_t end = std::min(panel + cut_.panels, share.last_panel);
            if (p_.is_widened) widen_chunk(panel, end);
            for (int64_t pair = share.first_pair; pair < share.last_pair; pair += cut_.row_pairs)
                run_block(panel, end, pair, std::min(pair + cut_.row_pairs, share.last_pair));
            results_.finish();  // before the widened panels are overwritten
        }
        _mm_sfence();
    }

  private:
    void widen_chunk(int64_t panel, int64_t end) {
        for (int64_t block = 2 * panel; block < 2 * end; ++block)
            widen(p_, block, 0, p_.num_k, wide_ + (block - 2 * panel) * p_.num_k * kTile);
        first_wide_ = panel;
        memory_is_written();
    }
    int64_t block_stride() const {
        return p_.is_widened ? p_.num_k * kTile : p_.header->block_bytes;
    }
    const uint8_t* panel_at(int64_t panel) const {
        return p_.is_widened ? wide_ + (panel - first_wide_) * 2 * block_stride()
                             : block_of(*p_.call->weight, 2 * panel);
    }
    void run_block(int64_t panel, int64_t panel_end, int64_t pair, int64_t pair_end) {
        for (int64_t k = 0; k < p_.num_k; k += cut_.run) {
            const int64_t run = std::min(cut_.run, p_.num_k - k);
            for (int64_t n = panel; n < panel_end; ++n) {
                want(n + 1 < panel_end ? n + 1 : panel, k, run, pair_end - pair);
                for (int64_t m = pair; m < pair_end; ++m) {
                    const int64_t at = (n - panel) * cut_.row_pairs + m - pair;
                    run_tiles(n, m, k, run, at);
                }
            }
        }
    }
    // The next panel's tiles, spread over the steps of this one.
    void want(int64_t panel, int64_t k, int64_t run, int64_t num_pairs) {
        wanted_.at = panel_at(panel) + k * kTile;
        wanted_.end = wanted_.at + run * kTile;
        second_ = wanted_.at + block_stride();
        second_end_ = second_ + run * kTile;
        wanted_.lines = (32 + num_pairs - 1) / num_pairs;
    }
    void run_tiles(int64_t panel, int64_t pair, int64_t k, int64_t run, int64_t at) {
        const Operands operands{p_.rows + (k * p_.num_row_tiles + pair * 2 * p_.run) * kTile,
                                p_.run * kTile, panel_at(panel) + k * kTile, block_stride()};
        const bool is_last = k + run == p_.num_k;
        // Finished sums go through one of two buffers: the other is being worked off.
        uint8_t* sums = cut_.run >= p_.num_k ? sums_ + (turn_ ^= 1) * 4 * kTile
                                             : sums_ + at * 4 * kTile;
        if (k) load_sums(sums);
        else clear_sums();
        if (wanted_.at >= wanted_.end && second_) {
            wanted_.at = second_;
            wanted_.end = second_end_;
            second_ = nullptr;
        }
        if (p_.is_int8) multiply_run<true>(operands, run, results_, wanted_);
        else multiply_run<false>(operands, run, results_, wanted_);
        if (is_last || !k) results_.finish();  // the store may be where they lie
        store_sums(sums);
        if (is_last) results_.begin(sums, pair * 32, panel);
    }

    const Product& p_;
    const Cut cut_;
    uint8_t* sums_;
    uint8_t* wide_;
    Results results_;
    Wanted wanted_;
    const uint8_t* second_ = nullptr;
    const uint8_t* second_end_ = nullptr;
    int64_t first_wide_ = 0;
    int turn_ = 0;
};

// --- few rows ---

// Up to 32 rows: one or two row tiles against the weights as they stream by, four or two blocks at
// a time. Widened weights go through two small buffers: one is filled while the other is read.
class FewRows {
  public:
    static constexpr int kChunk = 4;  // tiles of k in a buffer: whole groups of 128

    FewRows(const Product& p, uint8_t* sums, uint8_t* wide)
        : p_(p), sums_(sums), wide_(wide), results_(p, false) {}

    void run(int64_t begin, int64_t end) {
        for (int64_t panel = begin; p_.is_split && panel < end; ++panel) run_split(panel);
        for (int64_t panel = begin; !p_.is_split && panel < end;) {
            const bool is_double = p_.num_row_tiles == 1 && panel + 2 <= end;
            is_double ? run_panels<4>(panel) : run_panels<2>(panel);
            panel += is_double ? 2 : 1;
        }
    }

  private:
    // Digits have sums of their own, 3 for each of two row tiles or of two blocks.
    void run_split(int64_t panel) {
        uint8_t* digits = sums_ + 4 * kTile;
        if (p_.num_row_tiles == 1) {
            split_row_tile(block_of(*p_.call->weight, 2 * panel));
            store_digits(digits);
            join_digits(digits, sums_);
            join_digits(digits + kDigits * kTile, sums_ + kTile);
        } else {
            for (int b = 0; b < 2; ++b) {
                split_block(block_of(*p_.call->weight, 2 * panel + b));
                store_digits(digits);
                join_digits(digits, sums_ + b * kTile);
                join_digits(digits + kDigits * kTile, sums_ + (2 + b) * kTile);
            }
        }
        results_.begin(sums_, 0, panel);
        results_.finish();
    }
    static void clear_digits() {
        clear_sums();
        _tile_zero(4);
        _tile_zero(5);
    }
    static void store_digits(uint8_t* to) {
        store_sums(to);
        _tile_stored(4, to + 4 * kTile, 64);
        _tile_stored(5, to + 5 * kTile, 64);
    }
    static void join_digits(const uint8_t* digits, uint8_t* to) {
        const __m512 step = _mm512_set1_ps(128.0f);
        for (int line = 0; line < kTile; line += 64) {
            __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(digits + line));
            for (int digit = 1; digit < kDigits; ++digit)
                value = _mm512_fmadd_ps(
                    value, step,
                    _mm512_cvtepi32_ps(_mm512_load_si512(digits + digit * kTile + line)));
            _mm512_store_ps(to + line, value);
        }
    }
    static void fetch_tile(const uint8_t* at) {
        for (int line = 0; line < kTile; line += 64) fetch(at + line);
    }
    void split_row_tile(const uint8_t* b) {
        const int64_t to_digit = p_.num_k * kTile, to_block = p_.header->block_bytes;
        clear_digits();
        for (int64_t t = 0; t < p_.num_k; ++t) {
            const int64_t wrap = t + 2 < p_.num_k ? 0 : to_block;
            const uint8_t *a = p_.rows + t * kTile, *at = b + t * kTile;
            fetch_tile(at + 2 * kTile + wrap);
            fetch_tile(at + 2 * kTile + wrap + to_block);
            _tile_loadd(7, at, 64);
            _tile_loadd(6, a, 64);
            _tile_dpbssd(0, 6, 7);
            _tile_loadd(6, a + to_digit, 64);
            _tile_dpbssd(1, 6, 7);
            _tile_loadd(6, a + 2 * to_digit, 64);
            _tile_dpbssd(2, 6, 7);
            _tile_loadd(7, at + to_block, 64);
            _tile_dpbssd(5, 6, 7);
            _tile_loadd(6, a, 64);
            _tile_dpbssd(3, 6, 7);
            _tile_loadd(6, a + to_digit, 64);
            _tile_dpbssd(4, 6, 7);
        }
    }
    void split_block(const uint8_t* b) {
        const int64_t to_row = p_.num_k * kTile, to_digit = 2 * to_row;
        clear_digits();
        for (int64_t t = 0; t < p_.num_k; ++t) {
            const uint8_t *a = p_.rows + t * kTile, *at = b + t * kTile;
            fetch_tile(at + 3 * kTile);  // past the end begins the next block
            _tile_loadd(7, at, 64);
            _tile_loadd(6, a, 64);
            _tile_dpbssd(0, 6, 7);
            _tile_loadd(6, a + to_digit, 64);
            _tile_dpbssd(1, 6, 7);
            _tile_loadd(6, a + 2 * to_digit, 64);
            _tile_dpbssd(2, 6, 7);
            _tile_loadd(6, a + to_row, 64);
            _tile_dpbssd(3, 6, 7);
            _tile_loadd(6, a + to_row + to_digit, 64);
            _tile_dpbssd(4, 6, 7);
            _tile_loadd(6, a + to_row + 2 * to_digit, 64);
            _tile_dpbssd(5, 6, 7);
        }
    }
    template <int NB>
    void run_panels(int64_t panel) {
        clear_sums();
        if (p_.is_widened) stream_widened<NB>(panel);
        else stream<NB>(panel);
        store_results<NB>(panel);
    }
    template <int NB>
    void stream(int64_t panel) {
        const uint8_t* blocks = block_of(*p_.call->weight, 2 * panel);
        const int64_t stride = p_.header->block_bytes;
        for (int64_t t = 0; t < p_.num_k; ++t) {
            const int64_t wrap = t + 2 < p_.num_k ? 0 : (NB - 1) * stride;
            for (int b = 0; b < NB; ++b)
                for (int line = 0; line < kTile; line += 64)
                    fetch(blocks + b * stride + (t + 2) * kTile + wrap + line);
            multiply<NB>(blocks + t * kTile, stride, t);
        }
    }
    template <int NB>
    void stream_widened(int64_t panel) {
        widen_chunk<NB>(panel, 0);
        for (int64_t k = 0; k < p_.num_k; k += kChunk) {
            if (k + kChunk < p_.num_k) widen_chunk<NB>(panel, k + kChunk);
            const uint8_t* from = wide_ + k / kChunk % 2 * 4 * kChunk * kTile;
            for (int64_t t = k; t < std::min(k + kChunk, p_.num_k); ++t)
                multiply<NB>(from + (t - k) * kTile, kChunk * kTile, t);
        }
    }
    template <int NB>
    void widen_chunk(int64_t panel, int64_t k) {
        uint8_t* to = wide_ + k / kChunk % 2 * 4 * kChunk * kTile;
        for (int b = 0; b < NB; ++b) {
            fetch_chunk(2 * panel + b, k + 2 * kChunk);
            widen(p_, 2 * panel + b, k, std::min(k + kChunk, p_.num_k), to + b * kChunk * kTile);
        }
        memory_is_written();
    }
    void fetch_chunk(int64_t block, int64_t k) const {
        const int64_t bytes = p_.call->weight->format == kInt8 ? kTile / 2 : kTile / 4;
        const uint8_t* at =
            block_of(*p_.call->weight, block) + p_.header->nibbles_offset + k * bytes;
        for (int64_t line = 0; line < kChunk * bytes; line += 64) fetch(at + line);
    }
    template <int NB>
    void multiply(const uint8_t* b, int64_t stride, int64_t t) {
        const uint8_t* a = p_.rows + t * kTile;
        if (NB == 4) {
            p_.is_int8 ? one_by_four<true>(a, b, stride) : one_by_four<false>(a, b, stride);
        } else if (p_.num_row_tiles == 1) {
            p_.is_int8 ? one_by_two<true>(a, b, stride) : one_by_two<false>(a, b, stride);
        } else {
            p_.is_int8 ? two_by_two<true>(a, b, stride) : two_by_two<false>(a, b, stride);
        }
    }
    template <bool kIsInt8>
    void one_by_two(const uint8_t* a, const uint8_t* b, int64_t stride) {
        _tile_loadd(6, a, 64);
        _tile_loadd(4, b, 64);
        MULTIPLY_TILES(0, 6, 4);
        _tile_loadd(5, b + stride, 64);
        MULTIPLY_TILES(1, 6, 5);
    }
    template <bool kIsInt8>
    void two_by_two(const uint8_t* a, const uint8_t* b, int64_t stride) {
        one_by_two<kIsInt8>(a, b, stride);
        _tile_loadd(7, a + p_.num_k * kTile, 64);
        MULTIPLY_TILES(2, 7, 4);
        MULTIPLY_TILES(3, 7, 5);
    }
    template <bool kIsInt8>
    void one_by_four(const uint8_t* a, const uint8_t* b, int64_t stride) {
        one_by_two<kIsInt8>(a, b, stride);
        _tile_loadd(4, b + 2 * stride, 64);
        MULTIPLY_TILES(2, 6, 4);
        _tile_loadd(5, b + 3 * stride, 64);
        MULTIPLY_TILES(3, 6, 5);
    }
    // With one row tile, tiles 2 and 3 are the next panel's; its unused rows are never looked at.
    template <int NB>
    void store_results(int64_t panel) {
        store_sums(sums_);
        results_.begin(sums_, 0, panel);
        results_.finish();
        if (NB == 4) {
            results_.begin(sums_ + 2 * kTile, 0, panel + 1);
            results_.finish();
        }
    }

    const Product& p_;
    uint8_t* sums_;
    uint8_t* wide_;
    Results results_;
};

// --- few rows by int4 ---

// Up to 32 rows by nibbles: within a group the tiles sum exactly (whole numbers, or bfloat16 by
// whole numbers), then each row adds the group's sums with its scales. Nibbles are unpacked two
// groups ahead of the tiles, and the tiles run two groups ahead of the adding: what one of them
// writes has long left the store buffer when the next one reads it.
template <bool kIsBytes, bool kHasOffsets>
class GroupedRows {
  public:
        static constexpr int kUnits = 2;  // of 64 values of k in a batch: one or two groups
    static constexpr int kUnitTiles = kIsBytes ? 1 : 2;
    static constexpr int64_t kSumsBytes = (4 + 2 * kUnits * 4) * kTile;
    static constexpr int64_t kWideBytes = 2 * kUnits * 2 * kUnitTiles * kTile;

    GroupedRows(const Product& p, uint8_t* sums, uint8_t* wide)
        : p_(p),
          sums_(sums),
          wide_(wide),
          results_(p, false),
          num_rows_(p.call->m),
          num_units_(p.header->k_padded / 64),
          units_of_group_(p.call->weight->group / 64) {}

    void run(int64_t begin, int64_t end) {
        const int64_t num_batches = (num_units_ + kUnits - 1) / kUnits;
        for (int64_t panel = begin; panel < end; ++panel) {
            block_ = block_of(*p_.call->weight, 2 * panel);
            clear();
            unpack(0);
            for (int64_t i = 0; i < num_batches; ++i) {
                if (i + 1 < num_batches) unpack(i + 1);
                memory_is_written();
                // Before the tiles of the next batch are stored: at an address that is the same
                // but for whole pages, a load waits for the store.
                if (i) add(i - 1);
                p_.num_row_tiles == 1 ? multiply<1>(i) : multiply<2>(i);
            }
            add(num_batches - 1);
            results_.begin(sums_, 0, panel);
            results_.finish();
        }
    }

  private:
    void clear() {
        for (int64_t at = 0; at < 4 * kTile; at += 64)
            _mm512_store_si512(sums_ + at, _mm512_setzero_si512());
    }
    int64_t units_in(int64_t batch) const {
        return std::min(int64_t(kUnits), num_units_ - batch * kUnits);
    }
    uint8_t* wide_at(int64_t batch, int64_t unit, int block) const {
        return wide_ + ((batch % 2 * kUnits + unit) * 2 + block) * kUnitTiles * kTile;
    }
    uint8_t* partial(int64_t batch, int64_t group) const {
        return sums_ + (4 + (batch % 2 * kUnits + group) * 4) * kTile;
    }
    void unpack(int64_t batch) {
        constexpr int64_t kAhead = 3072;
        const int64_t bytes = num_units_ * 512;
        for (int b = 0; b < 2; ++b) {
            const uint8_t* nibbles =
                block_ + b * p_.header->block_bytes + p_.header->nibbles_offset;
            for (int64_t u = 0; u < units_in(batch); ++u) {
                const int64_t at = (batch * kUnits + u) * 512;
                const int64_t wrap = at + kAhead < bytes ? 0 : 2 * p_.header->block_bytes - bytes;
                unpack_unit(nibbles + at, kAhead + wrap, wide_at(batch, u, b));
            }
        }
    }
    // Bytes: 16 (q - 8), signed: the nibble is the upper half of the byte, its highest bit turned.
    static void unpack_unit(const uint8_t* at, int64_t ahead, uint8_t* to) {
        alignas(64) static const uint16_t kTable[32] = {
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // -8 … -1
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,   // 0 … 7
            0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,   // bit 4 is not
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // masked
        const __m512i table = _mm512_load_si512(kTable);
        const __m512i turn = _mm512_set1_epi8(int8_t(0x80));
        const __m512i high_half = _mm512_set1_epi8(int8_t(0xf0));
        constexpr int kTurnAndMask = 0x28;  // (a ^ b) & c
        for (int line = 0; line < 8; ++line) {
            fetch(at + line * 64 + ahead);
            const __m512i v = _mm512_load_si512(at + line * 64);
            if constexpr (kIsBytes) {
                const __m512i low = _mm512_slli_epi16(v, 4);
                _mm512_store_si512(to + line * 128, _mm512_ternarylogic_epi32(
                                                        low, turn, high_half, kTurnAndMask));
                _mm512_store_si512(to + line * 128 + 64, _mm512_ternarylogic_epi32(
                                                             v, turn, high_half, kTurnAndMask));
            } else {
                for (int j = 0; j < 4; ++j)
                    _mm512_store_si512(
                        to + line * 256 + j * 64,
                        _mm512_permutexvar_epi16(_mm512_srli_epi32(v, 4 * j), table));
            }
        }
    }
    template <int kRowTiles>
    void multiply(int64_t batch) {
        const int64_t units = units_in(batch);
        for (int64_t u = 0, part = 0; u < units; ++part) {
            const bool is_odd = kRowTiles == 1 && part % 2;
            if (!is_odd) clear_sums();
            for (const int64_t end = u + units_of_group_; u < end; ++u)
                is_odd ? multiply_unit<kRowTiles, 1>(batch, u)
                       : multiply_unit<kRowTiles, 0>(batch, u);
            is_odd ? store<kRowTiles, 1>(partial(batch, part))
                   : store<kRowTiles, 0>(partial(batch, part));
        }
    }
    // With one row tile every other group has sums of its own, 2 and 3.
    template <int kRowTiles, int kTurn>
    void multiply_unit(int64_t batch, int64_t unit) {
        constexpr bool kIsInt8 = kIsBytes;
        const uint8_t *b0 = wide_at(batch, unit, 0), *b1 = wide_at(batch, unit, 1);
        const uint8_t* a = p_.rows + (batch * kUnits + unit) * kUnitTiles * kTile;
        for (int t = 0; t < kUnitTiles; ++t, a += kTile, b0 += kTile, b1 += kTile) {
            _tile_loadd(4, b0, 64);
            _tile_loadd(5, b1, 64);
            _tile_loadd(6, a, 64);
            if constexpr (kRowTiles == 1 && kTurn == 1) {
                MULTIPLY_TILES(2, 6, 4);
                MULTIPLY_TILES(3, 6, 5);
                continue;
            }
            MULTIPLY_TILES(0, 6, 4);
            MULTIPLY_TILES(1, 6, 5);
            if constexpr (kRowTiles == 2) {
                _tile_loadd(7, a + p_.num_k * kTile, 64);
                MULTIPLY_TILES(2, 7, 4);
                MULTIPLY_TILES(3, 7, 5);
            }
        }
    }
    template <int kRowTiles, int kTurn>
    static void store(uint8_t* to) {
        if constexpr (kRowTiles == 2) {
            store_sums(to);
        } else if constexpr (kTurn == 0) {
            _tile_stored(0, to, 64);
            _tile_stored(1, to + kTile, 64);
        } else {
            _tile_stored(2, to, 64);
            _tile_stored(3, to + kTile, 64);
        }
    }
    void add(int64_t batch) {
        const int64_t first = batch * kUnits / units_of_group_;
        const int64_t groups = units_in(batch) / units_of_group_;
        for (int64_t part = 0; part < groups; part += 2) {
            const uint8_t* from = partial(batch, part);
            part + 1 < groups ? add_groups<2>(from, first + part)
                              : add_groups<1>(from, first + part);
        }
    }
    template <int kGroups>
    void add_groups(const uint8_t* from, int64_t group) {
        __m512 scale[kGroups][2], rest[kGroups][2];
        for (int g = 0; g < kGroups; ++g)
            for (int b = 0; b < 2; ++b) scales_at(group + g, b, &scale[g][b], &rest[g][b]);
        const float* row_scales = p_.group_scales + group;
        const float* row_sums = p_.group_sums + group;
        for (int64_t r = 0; r < num_rows_; ++r) {
            const int64_t at = r / 16 * 2 * kTile + r % 16 * 64, of = r * p_.num_groups;
            for (int b = 0; b < 2; ++b) {
                auto* sums = reinterpret_cast<float*>(sums_ + at + b * kTile);
                __m512 value = _mm512_load_ps(sums);
                for (int g = 0; g < kGroups; ++g) {
                    const uint8_t* part = from + g * 4 * kTile + at + b * kTile;
                    __m512 whole;
                    if constexpr (kIsBytes)
                        whole = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(part)),
                                              _mm512_set1_ps(row_scales[of + g]));
                    else
                        whole = _mm512_load_ps(part);
                    value = _mm512_fmadd_ps(whole, scale[g][b], value);
                    if constexpr (kHasOffsets)
                        value = _mm512_fmadd_ps(_mm512_set1_ps(row_sums[of + g]), rest[g][b],
                                                value);
                }
                _mm512_store_ps(sums, value);
            }
        }
    }
    // A group's scale, and offset + 8 scale: the tiles sum q - 8.
    void scales_at(int64_t group, int block, __m512* scale, __m512* rest) const {
        constexpr int64_t kBytes = kHasOffsets ? 64 : 32, kAhead = 16;
        const uint8_t* at = block_ + block * p_.header->block_bytes + group * kBytes;
        const int64_t wrap = group + kAhead < p_.num_groups
                                 ? 0
                                 : 2 * p_.header->block_bytes - p_.num_groups * kBytes;
        fetch(at + kAhead * kBytes + wrap);
        *scale = half_at(at);
        if (kHasOffsets) *rest = _mm512_fmadd_ps(_mm512_set1_ps(8.0f), *scale, half_at(at + 32));
    }

    const Product& p_;
    uint8_t* sums_;  // [4] tiles of float, then [2][kUnits][4] of groups
    uint8_t* wide_;  // [2][kUnits][2 blocks][kUnitTiles]
    Results results_;
    const int64_t num_rows_, num_units_, units_of_group_;
    const uint8_t* block_ = nullptr;
};

void run_grouped(const Product& p, uint8_t* sums, uint8_t* wide, int64_t begin, int64_t end) {
    const bool is_bytes = p.call->weight->quantises_x, has_offsets = p.header->has_offsets;
    if (is_bytes && has_offsets) GroupedRows<true, true>(p, sums, wide).run(begin, end);
    else if (is_bytes) GroupedRows<true, false>(p, sums, wide).run(begin, end);
    else if (has_offsets) GroupedRows<false, true>(p, sums, wide).run(begin, end);
    else GroupedRows<false, false>(p, sums, wide).run(begin, end);
}

// --- the workers ---

// Of a single row tile only the rows that there are: fewer take less time.
TileShapes config_for(const Product& p) {
    TileShapes config;
    if (p.num_row_tiles > 1) return config;
    const auto rows = uint8_t(p.call->m);
    for (int tile : {0, 1, 2, 3, 6}) config.num_rows[tile] = rows;
    if (p.is_split) config.num_rows[4] = config.num_rows[5] = rows;
    return config;
}

struct Work {
    Product product;
    Cut cut;
    int workers_over_rows;  // the others share the columns
    bool is_streamed;
    uint8_t* sums;          // of all workers
    uint8_t* wide;
    int64_t sums_bytes, wide_bytes;  // of each
};

Share share_of(const Work& work, int worker, int num_workers) {
    const int over_columns = num_workers / work.workers_over_rows;
    Share share;
    part_of(work.product.num_row_tiles / 2, worker / over_columns, work.workers_over_rows,
            &share.first_pair, &share.last_pair);
    part_of(work.product.num_panels, worker % over_columns, over_columns, &share.first_panel,
            &share.last_panel);
    return share;
}

void work_part(void* context, int worker, int num_workers) {
    const FlushDenormals flush;
    const Work& work = *static_cast<const Work*>(context);
    const Product& p = work.product;
    for (int64_t row = worker; row < p.num_row_tiles * 16; row += num_workers) pack_row(p, row);
    wait_for_all();
    memory_is_written();
    const TileShapes config = config_for(p);
    configure_tiles(config);
    uint8_t* sums = work.sums + worker * work.sums_bytes;
    uint8_t* wide = work.wide + worker * work.wide_bytes;
    if (p.call->m <= kFewRows) {
        int64_t begin, end;
        part_of(p.num_panels, worker, num_workers, &begin, &end);
        if (p.is_grouped) run_grouped(p, sums, wide, begin, end);
        else FewRows(p, sums, wide).run(begin, end);
    } else {
        ManyRows(p, work.cut, sums, wide, work.is_streamed)
            .run(share_of(work, worker, num_workers));
    }
    _tile_release();
}

// The second-level cache that a block of x may take.
constexpr int64_t kRowsBytes = 1 << 20;

Cut cut_for(const Product& p) {
    Cut cut;
    if (p.num_k <= 64) {
        cut = {kRowsBytes / (p.num_k * 2 * kTile), 32, p.num_k};
        cut.row_pairs = std::min(cut.row_pairs, int64_t(14));
    } else {
        cut = {10, 10, 8};
    }
    // Blocks of equal size rather than a small last one.
    const int64_t pairs = p.num_row_tiles / 2;
    const int64_t blocks = (pairs + cut.row_pairs - 1) / cut.row_pairs;
    cut.row_pairs = (pairs + blocks - 1) / blocks;
    return cut;
}

// Of the ways to give each worker rows and columns, the one whose largest share is smallest.
int workers_over_rows(const Product& p, int workers) {
    int best = 1;
    int64_t least = INT64_MAX;
    for (int rows = 1; rows <= workers; ++rows) {
        if (workers % rows) continue;
        const int64_t pairs = (p.num_row_tiles / 2 + rows - 1) / rows;
        const int64_t panels = (p.num_panels + workers / rows - 1) / (workers / rows);
        if (pairs * panels < least) {
            least = pairs * panels;
            best = rows;
        }
    }
    return best;
}

// Past the caches only what they could not hold, in whole lines.
bool can_stream(const LinearCall& call) {
    const auto at = reinterpret_cast<uintptr_t>(call.out);
    return call.m * call.out_stride > (2 << 20) && at % 64 == 0 && call.out_stride % 32 == 0;
}

// Up to this many rows the vectors are as fast. Groups of 32 values are too short for tiles: their
// weights must be widened, which takes longer than four passes of the dot product of bytes.
int64_t rows_for_vectors(const Weight& weight) {
    if (weight.format == kBf16) return 4;
    if (weight.format == kInt8) return weight.quantises_x ? 8 : 1;
    if (weight.group >= 64) return weight.quantises_x ? 8 : 1;
    return weight.quantises_x ? 32 : 4;
}

}  // namespace

void linear_amx(const LinearCall& call) {
    const Weight& weight = *call.weight;
    if (call.m <= rows_for_vectors(weight)) return linear_avx512(call);
    if (weight.n <= 0) return;
    Work work{};
    Product& p = work.product;
    p.call = &call;
    p.header = &header_of(weight);
    p.is_int8 = weight.format == kInt8 && weight.quantises_x;
    p.is_split = weight.format == kInt8 && !p.is_int8 && call.m <= kFewRows;
    p.is_grouped = weight.format == kInt4 && weight.group >= 64 && call.m <= kFewRows;
    p.is_widened = weight.format != kBf16 && !p.is_int8 && !p.is_split && !p.is_grouped;
    const bool is_bytes = p.is_int8 || p.is_split || (p.is_grouped && weight.quantises_x);
    p.num_k = p.header->k_padded / (is_bytes ? 64 : 32);
    p.num_row_tiles = call.m <= 16 ? 1 : up_to(call.m, 32) / 16;
    p.num_panels = p.header->num_blocks / 2;
    if (call.m > kFewRows) work.cut = cut_for(p);
    p.run = call.m > kFewRows ? work.cut.run : p.num_k;
    const int64_t rows = p.num_row_tiles * 16;
    const int64_t row_bytes = (p.is_split ? kDigits : 1) * up_to(p.num_k, p.run) * 64;
    p.rows = static_cast<uint8_t*>(scratch(kSlotRows, rows * row_bytes));
    p.num_groups = p.is_grouped ? p.header->k_padded / weight.group : 0;
    const int64_t num_scales = rows * (1 + 2 * p.num_groups);
    p.row_scales = static_cast<float*>(scratch(kSlotScales, num_scales * sizeof(float)));
    p.group_scales = p.row_scales + rows;
    p.group_sums = p.group_scales + rows * p.num_groups;
    const int workers = num_workers();
    int64_t sums = (4 + 2 * kDigits) * kTile, wide = 8 * FewRows::kChunk * kTile;
    if (call.m > kFewRows) {
        work.workers_over_rows = workers_over_rows(p, workers);
        work.is_streamed = can_stream(call);
        if (work.cut.run < p.num_k) sums = work.cut.row_pairs * work.cut.panels * 4 * kTile;
        wide = work.cut.panels * 2 * p.num_k * kTile;
    } else if (p.is_grouped) {
        sums = GroupedRows<false, false>::kSumsBytes;
        wide = GroupedRows<false, false>::kWideBytes;
    }
    work.sums_bytes = sums;
    work.sums = static_cast<uint8_t*>(scratch(kSlotSums, workers * sums));
    work.wide_bytes = p.is_widened || p.is_grouped ? wide : 0;
    if (work.wide_bytes)
        work.wide = static_cast<uint8_t*>(scratch(kSlotWide, workers * work.wide_bytes));
    run_parallel(work_part, &work);
}

void mlp_amx(const MlpCall& call) {
    if (call.m <= 0) return;
    // The inner values of this many rows stay in the last-level cache.
    constexpr int64_t kRows = 1024;
    const int64_t width = call.down->k, blocks = (call.m + kRows - 1) / kRows;
    const int64_t rows_at_once = up_to((call.m + blocks - 1) / blocks, 32);
    auto* inner = static_cast<uint16_t*>(
        scratch(kSlotInner, std::min(rows_at_once, call.m) * width * int64_t(sizeof(uint16_t))));
    mlp_by_blocks(call, rows_at_once, inner, linear_amx);
}

}  // namespace glimt
#endif
