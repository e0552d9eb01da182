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

#include "epilogue.inc"
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

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

// The compiler's own intrinsic says that it reads 8 bytes, and the stores of the rest may go.
inline void configure_tiles(const TileConfig& config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

// Between vector stores and tile loads of the same memory, which the compiler does not see.
inline void memory_is_written() { __asm__ volatile("" : : : "memory"); }

inline void fetch(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
inline void fetch_l2(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// --- what a product is made of ---

struct Product {
    const LinearCall* call;
    const PackedHeader* header;
    bool is_int8;        // tiles of int8 into int32, else of bfloat16 into float
    bool is_widened;     // the weight is widened to tiles of bfloat16 first
    int64_t num_k;       // tiles over k
    int64_t num_row_tiles;  // of 16 rows; even where rows are many
    int64_t num_panels;  // of 32 columns
    uint8_t* rows;       // x: [num_row_tiles][num_k] tiles
    float* row_scales;   // is_int8: [num_row_tiles * 16]
};

// --- x into tiles ---

// Where 64 bytes of a row go: tile t of the row.
inline uint8_t* tile_row(const Product& p, int64_t row, int64_t t) {
    return p.rows + ((row / 16 * p.num_k + t) * 16 + row % 16) * 64;
}

void pack_bf16_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k;
    for (int64_t t = 0; t < p.num_k; ++t) {
        const int64_t left = k - t * 32;
        const __mmask32 lanes = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
        _mm512_store_si512(tile_row(p, row, t), _mm512_maskz_loadu_epi16(lanes, x + t * 32));
    }
}

inline __m512 rounded(__m512 value, __m512 factor) {
    return _mm512_roundscale_ps(_mm512_mul_ps(value, factor),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// kInt4 with rounded x: rounded by groups, and then taken as bfloat16.
void pack_rounded_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k, group = p.call->weight->group;
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
            _mm512_store_si512(tile_row(p, row, (begin + i) / 32),
                               (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
        }
    }
}

void pack_int8_row(const Product& p, int64_t row, const uint16_t* x) {
    const int64_t k = p.call->weight->k;
    const float largest = largest_of(x, k);
    p.row_scales[row] = largest / 127.0f;
    const __m512 factor = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
    for (int64_t t = 0; t < p.num_k; ++t)
        for (int i = 0; i < 64; i += 16) {
            const int64_t at = t * 64 + i;
            const __m512 value = load_bf16(x + at, first_lanes(k - at));
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
            _mm_store_si128(reinterpret_cast<__m128i*>(tile_row(p, row, t) + i),
                            _mm512_cvtsepi32_epi8(q));
        }
}

void pack_row(const Product& p, int64_t row) {
    const Weight& weight = *p.call->weight;
    if (row >= p.call->m) {
        for (int64_t t = 0; t < p.num_k; ++t)
            _mm512_store_si512(tile_row(p, row, t), _mm512_setzero_si512());
        if (p.is_int8) p.row_scales[row] = 0;
        return;
    }
    const uint16_t* x = p.call->x + row * p.call->x_stride;
    if (p.is_int8) pack_int8_row(p, row, x);
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
void widen_int4(const Product& p, const uint8_t* block, int64_t first, int64_t last,
                uint8_t* out) {
    const int group_lines = p.call->weight->group / 8;
    const int64_t group_bytes = p.header->has_offsets ? 64 : 32;
    const uint8_t* nibbles = block + p.header->nibbles_offset;
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 scale = _mm512_setzero_ps(), offset = scale;
    for (int64_t line = first * 4; line < last * 4; ++line, out += 256) {
        if (line % group_lines == 0 || line == first * 4) {
            const uint8_t* at = block + line / group_lines * group_bytes;
            scale = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
            offset = group_bytes == 64
                         ? _mm512_cvtph_ps(
                               _mm256_load_si256(reinterpret_cast<const __m256i*>(at + 32)))
                         : _mm512_mul_ps(scale, _mm512_set1_ps(-8.0f));
        }
        const __m512i v = _mm512_load_si512(nibbles + line * 64);
        __m512 w[8];
        for (int i = 0; i < 8; ++i) {
            const int shift = i < 4 ? 8 * i : 8 * (i - 4) + 4;
            const __m512 q = _mm512_permutexvar_ps(_mm512_srli_epi32(v, shift), numbers);
            w[i] = _mm512_fmadd_ps(q, scale, offset);
        }
        for (int i = 0; i < 4; ++i)
            _mm512_store_si512(out + 64 * i, pairs_of(w[2 * i], w[2 * i + 1]));
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
    Results(const Product& p, bool is_streamed) : p_(p), call_(*p.call), is_streamed_(is_streamed) {
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
            if (p_.is_int8) {
                const __m512 scale =
                    _mm512_mul_ps(scale_[i], _mm512_set1_ps(p_.row_scales[first_row_ + r]));
                const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(at + i * kTile));
                value[i] = _mm512_fmadd_ps(whole, scale, bias_[i]);
            } else {
                value[i] = _mm512_load_ps(at + i * kTile);
                value[i] = p_.header->scales_offset
                               ? _mm512_fmadd_ps(value[i], scale_[i], bias_[i])
                               : _mm512_add_ps(value[i], bias_[i]);
            }
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

template <bool kIsInt8>
inline void multiply_tiles_00() { if constexpr (kIsInt8) _tile_dpbssd(0, 6, 4); else _tile_dpbf16ps(0, 6, 4); }
template <bool kIsInt8>
inline void multiply_tiles_01() { if constexpr (kIsInt8) _tile_dpbssd(1, 6, 5); else _tile_dpbf16ps(1, 6, 5); }
template <bool kIsInt8>
inline void multiply_tiles_10() { if constexpr (kIsInt8) _tile_dpbssd(2, 7, 4); else _tile_dpbf16ps(2, 7, 4); }
template <bool kIsInt8>
inline void multiply_tiles_11() { if constexpr (kIsInt8) _tile_dpbssd(3, 7, 5); else _tile_dpbf16ps(3, 7, 5); }

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
        multiply_tiles_00<kIsInt8>();
        _tile_loadd(5, b1 + t * kTile, 64);
        multiply_tiles_01<kIsInt8>();
        _tile_loadd(7, a1 + t * kTile, 64);
        multiply_tiles_10<kIsInt8>();
        wanted.step();
        multiply_tiles_11<kIsInt8>();
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
        const Operands operands{p_.rows + (pair * 2 * p_.num_k + k) * kTile, p_.num_k * kTile,
                                panel_at(panel) + k * kTile, block_stride()};
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
        for (int64_t panel = begin; panel < end;) {
            const bool is_double = p_.num_row_tiles == 1 && panel + 2 <= end;
            is_double ? run_panels<4>(panel) : run_panels<2>(panel);
            panel += is_double ? 2 : 1;
        }
    }

  private:
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
            one_by_two_any(a, b, stride);
            const uint8_t* second = a + p_.num_k * kTile;
            _tile_loadd(7, second, 64);
            if (p_.is_int8) { multiply_tiles_10<true>(); multiply_tiles_11<true>(); }
            else { multiply_tiles_10<false>(); multiply_tiles_11<false>(); }
        }
    }
    void one_by_two_any(const uint8_t* a, const uint8_t* b, int64_t stride) {
        p_.is_int8 ? one_by_two<true>(a, b, stride) : one_by_two<false>(a, b, stride);
    }
    template <bool kIsInt8>
    void one_by_two(const uint8_t* a, const uint8_t* b, int64_t stride) {
        _tile_loadd(6, a, 64);
        _tile_loadd(4, b, 64);
        multiply_tiles_00<kIsInt8>();
        _tile_loadd(5, b + stride, 64);
        multiply_tiles_01<kIsInt8>();
    }
    template <bool kIsInt8>
    void one_by_four(const uint8_t* a, const uint8_t* b, int64_t stride) {
        one_by_two<kIsInt8>(a, b, stride);
        _tile_loadd(4, b + 2 * stride, 64);
        if constexpr (kIsInt8) _tile_dpbssd(2, 6, 4);
        else _tile_dpbf16ps(2, 6, 4);
        _tile_loadd(5, b + 3 * stride, 64);
        if constexpr (kIsInt8) _tile_dpbssd(3, 6, 5);
        else _tile_dpbf16ps(3, 6, 5);
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

// --- the workers ---

struct Work {
    Product product;
    Cut cut;
    int workers_over_rows;  // the others share the columns
    bool is_streamed, is_packed;
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
    if (!work.is_packed) {
        int64_t begin, end;
        part_of(p.num_row_tiles * 16, worker, num_workers, &begin, &end);
        for (int64_t row = begin; row < end; ++row) pack_row(p, row);
        wait_for_all();
    }
    memory_is_written();
    static const TileConfig kConfig;
    configure_tiles(kConfig);
    uint8_t* sums = work.sums + worker * work.sums_bytes;
    uint8_t* wide = work.wide + worker * work.wide_bytes;
    if (p.call->m <= kFewRows) {
        int64_t begin, end;
        part_of(p.num_panels, worker, num_workers, &begin, &end);
        FewRows(p, sums, wide).run(begin, end);
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

// Below this many rows the vectors are as fast.
int64_t rows_for_vectors(const Weight& weight) {
    return weight.format == kBf16 || !weight.quantises_x ? 4 : 8;
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
    p.is_widened = weight.format != kBf16 && !p.is_int8;
    p.num_k = p.header->k_padded / (p.is_int8 ? 64 : 32);
    p.num_row_tiles = call.m <= 16 ? 1 : up_to(call.m, 32) / 16;
    p.num_panels = p.header->num_blocks / 2;
    const int64_t rows = p.num_row_tiles * 16;
    p.rows = static_cast<uint8_t*>(scratch(kSlotRows, rows * p.num_k * 64));
    p.row_scales = static_cast<float*>(scratch(kSlotScales, rows * sizeof(float)));
    const int workers = num_workers();
    int64_t sums = 8 * kTile, wide = 8 * FewRows::kChunk * kTile;
    if (call.m > kFewRows) {
        work.cut = cut_for(p);
        work.workers_over_rows = workers_over_rows(p, workers);
        work.is_streamed = can_stream(call);
        if (work.cut.run < p.num_k) sums = work.cut.row_pairs * work.cut.panels * 4 * kTile;
        wide = work.cut.panels * 2 * p.num_k * kTile;
    }
    work.sums_bytes = sums;
    work.sums = static_cast<uint8_t*>(scratch(kSlotSums, workers * sums));
    work.wide_bytes = p.is_widened ? wide : 0;
    work.wide = static_cast<uint8_t*>(scratch(kSlotWide, workers * std::max(work.wide_bytes, int64_t(64))));
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
    for (int64_t row = 0; row < call.m; row += rows_at_once) {
        const int64_t rows = std::min(call.m - row, rows_at_once);
        LinearCall up{};
        up.weight = call.up;
        up.x = call.x + row * call.x_stride;
        up.bias = call.up_bias;
        up.out = inner;
        up.m = rows;
        up.x_stride = call.x_stride;
        up.out_stride = width;
        up.activation = call.activation;
        linear_amx(up);
        LinearCall down{};
        down.weight = call.down;
        down.x = inner;
        down.bias = call.down_bias;
        down.residual = call.residual ? call.residual + row * call.residual_stride : nullptr;
        down.out = call.out + row * call.out_stride;
        down.m = rows;
        down.x_stride = width;
        down.residual_stride = call.residual_stride;
        down.out_stride = call.out_stride;
        down.residual_scale = call.residual_scale;
        linear_amx(down);
    }
}

}  // namespace glimt
#endif
