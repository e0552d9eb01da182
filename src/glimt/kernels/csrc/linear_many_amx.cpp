// Many rows: two by two tiles of results stay in registers over a run of k. Bias, activation and
// residual follow row by row, and what comes next is fetched, while other tiles are multiplied.
#if defined(__x86_64__)
#include <algorithm>

#include "counts.h"
#include "results_amx.inc"

namespace glimt {
namespace {

// Lines that are fetched into the second-level cache, some at each step.
class Wanted {
  public:
    // Two stretches of as many bytes, or one where `second` is null.
    void set(const uint8_t* first, const uint8_t* second, int64_t bytes, int64_t steps) {
        at_ = first;
        end_ = first + bytes;
        second_ = second;
        bytes_ = bytes;
        lines_ = ((second ? 2 : 1) * bytes / 64 + steps - 1) / steps;
    }
    void step() {
        for (int64_t i = 0; i < lines_; ++i, at_ += 64) {
            if (at_ >= end_ && !go_on()) return;
            fetch_l2(at_);
        }
    }

  private:
    bool go_on() {
        if (!second_) return false;
        at_ = second_;
        end_ = second_ + bytes_;
        second_ = nullptr;
        return true;
    }
    const uint8_t* at_ = nullptr;
    const uint8_t* end_ = nullptr;
    const uint8_t* second_ = nullptr;
    int64_t bytes_ = 0, lines_ = 0;
};

// Sums that are done, worked off in the order in which they came.
class Queue {
  public:
    Queue(Results& results, int64_t pace) : results_(results), pace_(pace) {}

    // The sums that came first; null where there are none.
    const uint8_t* oldest() const { return results_.is_done() ? nullptr : oldest_; }
    void push(const uint8_t* sums, int64_t row, int64_t panel) {
        const bool is_idle = results_.is_done();
        waiting_[last_++ % kRoom] = {sums, row, panel};
        if (!is_idle) return;
        next();
        left_ = kPause;
    }
    // Two rows every `pace` steps.
    void step() {
        if (results_.is_done() || --left_ > 0) return;
        left_ = pace_;
        results_.step();
        next();
    }
    void finish_oldest() {
        results_.finish();
        next();
    }
    void finish() {
        while (oldest()) finish_oldest();
    }

  private:
    struct Finished {
        const uint8_t* sums;
        int64_t row, panel;
    };
    void next() {
        while (results_.is_done() && first_ != last_) {
            const Finished& finished = waiting_[first_++ % kRoom];
            oldest_ = finished.sums;
            results_.begin(finished.sums, finished.row, finished.panel);
        }
    }

    static constexpr uint64_t kRoom = 256;  // a block's pairs of rows by panels, at least
    static constexpr int64_t kPause = 3;    // until a store of tiles has left the store buffer
    Results& results_;
    const int64_t pace_;
    int64_t left_ = 0;
    uint64_t first_ = 0, last_ = 0;
    const uint8_t* oldest_ = nullptr;
    Finished waiting_[kRoom];
};

// What is done beside the multiplication, a little at each step.
struct Beside {
    Queue queue;
    Wanted rows, panels;
};

struct Operands {
    const uint8_t* a;  // first row tile
    int64_t a_next;    // to the second
    const uint8_t* b;  // first block
    int64_t b_next;
};

template <bool kIsInt8>
inline void multiply_run(const Operands& o, int64_t run, Beside& beside) {
    const uint8_t *a0 = o.a, *a1 = o.a + o.a_next, *b0 = o.b, *b1 = o.b + o.b_next;
    for (int64_t t = 0; t < run; ++t) {
        _tile_loadd(4, b0 + t * kTile, 64);
        _tile_loadd(6, a0 + t * kTile, 64);
        MULTIPLY_TILES(0, 6, 4);
        _tile_loadd(5, b1 + t * kTile, 64);
        MULTIPLY_TILES(1, 6, 5);
        _tile_loadd(7, a1 + t * kTile, 64);
        MULTIPLY_TILES(2, 7, 4);
        beside.rows.step();
        beside.panels.step();
        MULTIPLY_TILES(3, 7, 5);
        beside.queue.step();
    }
}

// The tiles that are multiplied between two loads of sums: all pairs of rows by all panels, a run.
struct Slice {
    int64_t pair, pair_end, panel, panel_end, k, run;
};

// Blocks of equal size, up to `most`, rather than a small last one.
int64_t evenly(int64_t count, int64_t most) {
    return ceil_div(count, std::max(ceil_div(count, most), int64_t(1)));
}

Cut cut_of(const Cut& most, const Share& share) {
    return {evenly(share.last_pair - share.first_pair, most.row_pairs),
            evenly(share.last_panel - share.first_panel, most.panels), most.run};
}

class ManyRows {
  public:
    ManyRows(const Product& p, const Cut& cut, const Share& share, const Space& space,
             bool is_streamed)
        : p_(p),
          cut_(cut_of(cut, share)),
          share_(share),
          sums_(space.sums),
          wide_(space.wide),
          results_(p, is_streamed),
          beside_{{results_, pace()}, {}, {}} {}

    void run() {
        for (int64_t panel = share_.first_panel; panel < share_.last_panel; panel += cut_.panels) {
            const int64_t end = least(panel + cut_.panels, share_.last_panel);
            if (p_.is_widened) widen_chunk(panel, end);
            for (int64_t pair = share_.first_pair; pair < share_.last_pair; pair += cut_.row_pairs)
                run_block({pair, end_of_rows(pair), panel, end, 0, 0});
            if (p_.is_widened) beside_.queue.finish();
        }
        beside_.queue.finish();
        _mm_sfence();
    }

  private:
    bool is_whole() const { return cut_.run >= p_.num_k; }
    // All 32 rows of sums within a run over all of k; else within the last run and the first one
    // after it, when they are about to be overwritten.
    int64_t pace() const {
        const int64_t steps = is_whole() ? p_.num_k : 2 * cut_.run;
        return std::clamp(steps / 16, int64_t(1), int64_t(2));
    }
    int64_t end_of_rows(int64_t pair) const {
        return least(pair + cut_.row_pairs, share_.last_pair);
    }
    void widen_chunk(int64_t panel, int64_t end) {
        for (int64_t block = 2 * panel; block < 2 * end; ++block)
            widen(p_, block, 0, p_.num_k, wide_ + (block - 2 * panel) * p_.num_k * kTile);
        first_wide_ = panel;
        memory_is_written();
    }
    int64_t block_stride() const {
        return p_.is_widened ? p_.num_k * kTile : p_.header->block_bytes;
    }
    const uint8_t* panel_at(int64_t panel, int64_t k) const {
        return k * kTile + (p_.is_widened ? wide_ + (panel - first_wide_) * 2 * block_stride()
                                          : block_of(*p_.call->weight, 2 * panel));
    }
    const uint8_t* rows_at(int64_t pair, int64_t k) const {
        return p_.rows + (k * p_.num_row_tiles + pair * 2 * p_.run) * kTile;
    }
    void run_block(Slice slice) {
        for (; slice.k < p_.num_k; slice.k += cut_.run) {
            slice.run = least(cut_.run, p_.num_k - slice.k);
            run_slice(slice);
            // Of a larger block before this one, past this one's sums.
            if (!slice.k && !is_whole()) beside_.queue.finish();
        }
    }
    void run_slice(const Slice& slice) {
        const Slice next = after(slice);
        want_rows(slice, next);
        for (int64_t panel = slice.panel; panel < slice.panel_end; ++panel) {
            if (!p_.is_widened) want_panel(slice, panel, next);
            for (int64_t pair = slice.pair; pair < slice.pair_end; ++pair)
                run_tiles(slice, panel, pair);
        }
    }
    // The next run of k; else the next rows; else the next panels.
    Slice after(const Slice& slice) const {
        Slice next = slice;
        next.k = slice.k + slice.run;
        if (next.k >= p_.num_k) {
            next.k = 0;
            next.pair = slice.pair_end;
            if (next.pair >= share_.last_pair) {
                next.pair = share_.first_pair;
                next.panel = slice.panel_end;
            }
            next.pair_end = end_of_rows(next.pair);
        }
        next.run = least(cut_.run, p_.num_k - next.k);
        return next;
    }
    void want_rows(const Slice& slice, const Slice& next) {
        const int64_t steps =
            (slice.panel_end - slice.panel) * (slice.pair_end - slice.pair) * slice.run;
        const int64_t bytes = (next.pair_end - next.pair) * 2 * p_.run * kTile;
        const bool is_there = next.panel < share_.last_panel;
        beside_.rows.set(rows_at(next.pair, next.k), nullptr, is_there ? bytes : 0, steps);
    }
    void want_panel(const Slice& slice, int64_t panel, const Slice& next) {
        const bool is_last = panel + 1 == slice.panel_end;
        const bool is_there = !is_last || next.panel < share_.last_panel;
        const uint8_t* from =
            is_last ? panel_at(next.panel, next.k) : panel_at(panel + 1, slice.k);
        const int64_t bytes = (is_last ? next.run : slice.run) * kTile;
        beside_.panels.set(from, from + block_stride(), is_there ? bytes : 0,
                           (slice.pair_end - slice.pair) * slice.run);
    }
    void run_tiles(const Slice& slice, int64_t panel, int64_t pair) {
        const Operands operands{rows_at(pair, slice.k), p_.run * kTile, panel_at(panel, slice.k),
                                block_stride()};
        uint8_t* sums = sums_for(slice, panel, pair);
        if (slice.k) load_sums(sums);
        else clear_sums();
        if (p_.is_int8) multiply_run<true>(operands, slice.run, beside_);
        else multiply_run<false>(operands, slice.run, beside_);
        if (!slice.k) make_room(sums);
        store_sums(sums);
        if (slice.k + slice.run == p_.num_k) beside_.queue.push(sums, pair * 32, panel);
    }
    // Sums over all of k go to one of two places by turns: the other is being worked off.
    uint8_t* sums_for(const Slice& slice, int64_t panel, int64_t pair) {
        const int64_t at = is_whole() ? turn_ ^= 1
                                      : (panel - slice.panel) * cut_.row_pairs + pair - slice.pair;
        return sums_ + at * 4 * kTile;
    }
    // Blocks fill their sums in the same order: what lies before these is older.
    void make_room(const uint8_t* sums) {
        const auto is_in_the_way = [&](const uint8_t* oldest) {
            return oldest && (is_whole() ? oldest == sums : oldest <= sums);
        };
        while (is_in_the_way(beside_.queue.oldest())) beside_.queue.finish_oldest();
    }

    const Product& p_;
    const Cut cut_;
    const Share share_;
    uint8_t* sums_;
    uint8_t* wide_;
    Results results_;
    Beside beside_;
    int64_t first_wide_ = 0;
    int turn_ = 0;
};

// The second-level cache that a block of x may take.
constexpr int64_t kRowsBytes = 1 << 20;

}  // namespace

// A short k is one run. Else a run is as long as still leaves the panel in the first-level cache:
// each costs a load and a store of the sums.
Cut cut_for(const Product& p) {
    if (p.num_k > 64) return {10, 10, 16};
    return {least(kRowsBytes / (p.num_k * 2 * kTile), 14), 32, p.num_k};
}

SpaceBytes space_for_many(const Product& p, const Cut& cut) {
    const int64_t sums = cut.run < p.num_k ? cut.row_pairs * cut.panels : 2;
    return {sums * 4 * kTile, p.is_widened ? cut.panels * 2 * p.num_k * kTile : 0};
}

void run_many(const Product& p, const Cut& cut, const Share& share, const Space& space,
              bool is_streamed) {
    ManyRows(p, cut, share, space, is_streamed).run();
}

}  // namespace glimt
#endif
