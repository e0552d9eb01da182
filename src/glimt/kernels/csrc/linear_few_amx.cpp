// Few rows: the weights' stream is what takes time.
#if defined(__x86_64__)
#include "counts.h"
#include "results_amx.inc"

namespace glimt {
namespace {

// Up to 32 rows: one or two row tiles against the weights as they stream by, four or two blocks at
// a time. Widened weights go through two small buffers: one is filled while the other is read.
class FewRows {
  public:
    static constexpr int kChunk = 4;  // tiles of k in a buffer: whole groups of 128
    static constexpr int64_t kSumsBytes = (4 + 2 * kDigits) * kTile;
    static constexpr int64_t kWideBytes = 2 * 4 * kChunk * kTile;

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
    // A row tile's digits with the weights in tile 7; the last digit stays in tile 6.
    static void multiply_digits(const uint8_t* a, int64_t to_digit) {
        _tile_loadd(6, a, 64);
        _tile_dpbssd(0, 6, 7);
        _tile_loadd(6, a + to_digit, 64);
        _tile_dpbssd(1, 6, 7);
        _tile_loadd(6, a + 2 * to_digit, 64);
        _tile_dpbssd(2, 6, 7);
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
            multiply_digits(a, to_digit);
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
            multiply_digits(a, to_digit);
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
            for (int64_t t = k; t < least(k + kChunk, p_.num_k); ++t)
                multiply<NB>(from + (t - k) * kTile, kChunk * kTile, t);
        }
    }
    template <int NB>
    void widen_chunk(int64_t panel, int64_t k) {
        uint8_t* to = wide_ + k / kChunk % 2 * 4 * kChunk * kTile;
        for (int b = 0; b < NB; ++b) {
            fetch_chunk(2 * panel + b, k + 2 * kChunk);
            widen(p_, 2 * panel + b, k, least(k + kChunk, p_.num_k), to + b * kChunk * kTile);
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

}  // namespace

SpaceBytes space_for_few() { return {FewRows::kSumsBytes, FewRows::kWideBytes}; }

void run_few(const Product& p, const Space& space, int64_t begin, int64_t end) {
    FewRows(p, space.sums, space.wide).run(begin, end);
}

}  // namespace glimt
#endif
