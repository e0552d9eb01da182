// Few rows by int4 whose groups are long enough for tiles.
#if defined(__x86_64__)
#include "counts.h"
#include "results_amx.inc"

namespace glimt {
namespace {

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
        const int64_t num_batches = ceil_div(num_units_, kUnits);
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
        return least(num_units_ - batch * kUnits, kUnits);
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
        const __m512i table = nibbles_as_bf16();
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

}  // namespace

SpaceBytes space_for_groups() {
    using Largest = GroupedRows<false, false>;
    return {Largest::kSumsBytes, Largest::kWideBytes};
}

void run_groups(const Product& p, const Space& space, int64_t begin, int64_t end) {
    const bool is_bytes = p.call->weight->quantises_x, has_offsets = p.header->has_offsets;
    if (is_bytes && has_offsets) GroupedRows<true, true>(p, space.sums, space.wide).run(begin, end);
    else if (is_bytes) GroupedRows<true, false>(p, space.sums, space.wide).run(begin, end);
    else if (has_offsets) GroupedRows<false, true>(p, space.sums, space.wide).run(begin, end);
    else GroupedRows<false, false>(p, space.sums, space.wide).run(begin, end);
}

}  // namespace glimt
#endif
