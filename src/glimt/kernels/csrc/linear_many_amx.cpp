// Many rows: two by two tiles of results stay in registers over a run of k; then bias, activation
// and residual follow, row by row, while the next tiles are multiplied.
#if defined(__x86_64__)
#include <algorithm>

#include "results_amx.inc"

namespace glimt {
namespace {

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

// The second-level cache that a block of x may take.
constexpr int64_t kRowsBytes = 1 << 20;

}  // namespace

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

SpaceBytes space_for_many(const Product& p, const Cut& cut) {
    const int64_t sums = cut.run < p.num_k ? cut.row_pairs * cut.panels : 2;
    return {sums * 4 * kTile, p.is_widened ? cut.panels * 2 * p.num_k * kTile : 0};
}

void run_many(const Product& p, const Cut& cut, const Share& share, const Space& space,
              bool is_streamed) {
    ManyRows(p, cut, space.sums, space.wide, is_streamed).run(share);
}

}  // namespace glimt
#endif
