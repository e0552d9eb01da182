// Attention with bfloat16 tiles: many queries of one sequence.
//
// Scores are held transposed, keys x queries, so that the softmax runs down the rows of a tile and
// needs no sums across lanes; the weights then already are the right operand of the second product.
// Keys and values are packed into tiles once for all query heads that share them. Source of the
// running maximum: FlashAttention-2, arXiv 2307.08691, section 3.1; the rescaling that waits until
// the maximum has grown by much: FlashAttention-4.
//
// The matrix unit and the vector units work at the same time only if their instructions lie near
// each other. So the work on a window of 32 keys is spread over three times: its scores are made in
// one window, weighed during the next, and one slice of an earlier block's values is added in each.
#if defined(__x86_64__)

#include <cstring>

#include "attention.h"
#include "attention_tiles.h"
#include "counts.h"
#include "denormals.h"
#include "threads.h"

namespace glimt {
namespace {

constexpr int kUnit = 32;     // queries side by side
constexpr int kWindow = 32;   // keys whose scores are made together
constexpr int kBlock = 256;   // keys between two looks at the output tiles
constexpr int kRange = 1024;  // keys that stay in the L2 cache while the units pass over them
constexpr int kUnits = 16;    // of an item, at most
constexpr int kKeySlot = 8, kUnitSlot = 9;

// --- packing ---

// Two rows of 16 values, interleaved.
__m512i pairs_at(const uint16_t* even, const uint16_t* odd, int64_t count) {
    const __mmask16 mask = first_lanes(count);
    const __m256i low = even ? _mm256_maskz_loadu_epi16(mask, even) : _mm256_setzero_si256();
    const __m256i high = odd ? _mm256_maskz_loadu_epi16(mask, odd) : _mm256_setzero_si256();
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// What the call's sizes come to.
struct Sizes {
    int64_t dim, dim_steps, dim_tiles;  // tiles of 32 dims for scores, of 16 for outputs
    int64_t num_windows;                // of keys
    int64_t group;                      // query heads of a KV head
    int64_t num_units, units_per_item, num_items;

    // Values of a window, a block, a head: what lies together.
    int64_t key_window() const { return 2 * dim_steps * kTile; }
    int64_t value_block() const { return kBlock / kWindow * dim_tiles * kTile; }
    int64_t num_blocks() const { return ceil_div(num_windows * kWindow, kBlock); }
    int64_t head_keys() const { return num_windows * key_window(); }
    int64_t head_values() const { return num_blocks() * value_block(); }
    int64_t head() const { return head_keys() + head_values(); }
    // Of a block's values: where the tiles of dims begin that are added together, and their stride.
    int64_t slice_at(int64_t tile) const { return kBlock / kWindow * tile * kTile; }
    int64_t slice_step(int64_t tile) const { return tile + 1 < dim_tiles ? 2 * kTile : kTile; }
};

// Keys: tiles [window][2][dim_steps] of 16 keys x 32 dims. Values: tiles of 16 dims x 32 keys in
// the order [block][dim_tiles / 2][window][2], so that what is added together is read in order.
// Rows that are not there are zeros: zero weights times what lies there may be NaN.
void pack_window(const AttentionCall& call, const Sizes& sizes, int64_t kv_head, int64_t window,
                 uint16_t* keys, uint16_t* values) {
    const TokenRows key_rows = keys_of(call, kv_head), value_rows = values_of(call, kv_head);
    const uint16_t* rows[kWindow];
    for (int i = 0; i < kWindow; ++i) {
        const int64_t token = window * kWindow + i;
        const uint16_t* row = token < call.num_keys ? key_rows.at(token) : nullptr;
        for (int64_t step = 0; step < sizes.dim_steps; ++step)
            _mm512_store_si512(
                keys + (i / 16 * sizes.dim_steps + step) * kTile + i % 16 * 32,
                row ? values_at(row + step * 32, sizes.dim - step * 32) : _mm512_setzero_si512());
        rows[i] = token < call.num_keys ? value_rows.at(token) : nullptr;
    }
    for (int64_t tile = 0; tile < sizes.dim_tiles; ++tile) {
        __m512i pairs[16];
        for (int i = 0; i < 16; ++i)
            pairs[i] = pairs_at(rows[2 * i] ? rows[2 * i] + tile * 16 : nullptr,
                                rows[2 * i + 1] ? rows[2 * i + 1] + tile * 16 : nullptr,
                                sizes.dim - tile * 16);
        transpose(pairs);
        const int64_t pair = tile / 2 * 2;
        uint16_t* to = values + sizes.slice_at(pair) +
                       window % (kBlock / kWindow) * sizes.slice_step(pair) + tile % 2 * kTile;
        for (int i = 0; i < 16; ++i)
            _mm512_store_si512(to + i * 32, pairs[i]);
    }
}

// --- queries ---

// Queries of one head side by side, and what they have gathered from the keys so far.
struct alignas(64) Unit {
    uint16_t query[kMaxDim / 32][2][kTile];  // tiles of 16 pairs of dims x 16 queries
    float out[kMaxDim / 16][2][256];         // tiles of 16 dims x 16 queries, not yet divided
    float peak[kUnit], total[kUnit];         // peak: in powers of two
    int32_t limit[kUnit];                    // keys below it are seen
    int64_t least_limit, most_limit;
};

void start_unit(const AttentionCall& call, const Sizes& sizes, int64_t head, int64_t first,
                Unit& unit) {
    const uint16_t* rows[kUnit];
    for (int i = 0; i < kUnit; ++i) {
        const int64_t query = least(first + i, call.num_queries - 1);
        unit.limit[i] = int32_t(keys_seen(call, query));
        unit.peak[i] = kLowest, unit.total[i] = 0;
        rows[i] = call.query + query * call.query_token_stride + head * call.query_head_stride;
    }
    unit.least_limit = unit.limit[0], unit.most_limit = unit.limit[kUnit - 1];
    for (int64_t step = 0; step < sizes.dim_steps; ++step)
        for (int half = 0; half < 2; ++half) {
            __m512i pairs[16];
            for (int i = 0; i < 16; ++i)
                pairs[i] = values_at(rows[half * 16 + i] + step * 32, sizes.dim - step * 32);
            transpose(pairs);
            for (int i = 0; i < 16; ++i)
                _mm512_store_si512(unit.query[step][half] + i * 32, pairs[i]);
        }
    std::memset(unit.out, 0, sizeof(float) * 512 * sizes.dim_tiles);
}

void finish_unit(const AttentionCall& call, const Sizes& sizes, int64_t head, int64_t first,
                 const Unit& unit) {
    for (int half = 0; half < 2; ++half) {
        const __m512 total = _mm512_load_ps(unit.total + half * 16);
        const __mmask16 sees = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 share = _mm512_maskz_div_ps(sees, _mm512_set1_ps(1), total);
        for (int64_t tile = 0; tile < sizes.dim_tiles; ++tile) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i)
                rows[i] = _mm512_castps_si512(
                    _mm512_mul_ps(_mm512_load_ps(unit.out[tile][half] + i * 16), share));
            transpose(rows);
            const __mmask16 mask = first_lanes(sizes.dim - tile * 16);
            for (int64_t i = 0; i < 16 && first + half * 16 + i < call.num_queries; ++i) {
                uint16_t* to = call.out + (first + half * 16 + i) * call.out_token_stride +
                               head * call.out_head_stride + tile * 16;
                const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[i]));
                _mm256_mask_storeu_epi16(to, mask, (__m256i)narrow);
            }
        }
    }
}

// --- the pipeline ---

// Products of two left and two right tiles. What the next step needs is loaded as soon as a tile is
// free, before the vector work: behind it, the loads would come too late for their products.
#define LOAD_STEP(left, right, below, beside) \
    LOAD_TILE(6, right);                      \
    LOAD_TILE(4, left);                       \
    LOAD_TILE(7, beside);                     \
    LOAD_TILE(5, below)
#define MULTIPLY_STEP()      \
    MULTIPLY_TILES(0, 4, 6); \
    MULTIPLY_TILES(1, 4, 7); \
    MULTIPLY_TILES(2, 5, 6); \
    MULTIPLY_TILES(3, 5, 7)
#define MULTIPLY_AND_LOAD(left, right, below, beside, share) \
    MULTIPLY_TILES(0, 4, 6);                                 \
    meanwhile((share) / 2);                                  \
    MULTIPLY_TILES(1, 4, 7);                                 \
    LOAD_TILE(4, left);                                      \
    MULTIPLY_TILES(2, 5, 6);                                 \
    LOAD_TILE(6, right);                                     \
    meanwhile((share) - (share) / 2);                        \
    MULTIPLY_TILES(3, 5, 7);                                 \
    LOAD_TILE(7, beside);                                    \
    LOAD_TILE(5, below)

// What a worker needs besides its units.
struct alignas(64) Workspace {
    float scores[2][kWindow * kUnit];     // windows: [query half][keys][16 queries]
    uint16_t weights[2][kBlock * kUnit];  // blocks: tiles [window][query half] of 16 key pairs
};

// A window of scores that waits to be weighed.
struct Scored {
    Unit* unit = nullptr;
    float* scores;
    uint16_t* weights;       // of the unit's whole block
    const uint16_t* values;  // tiles of the whole block
    int64_t first_key;       // of the window
    int64_t window;          // its number in the block
    bool is_last;            // of the block
};

// Weights of a block that wait to be multiplied with its values.
struct Weighed {
    Unit* unit = nullptr;
    const uint16_t* weights;
    const uint16_t* values;
    int64_t num_windows;
    int64_t next_tile;
};

struct Vectors {
    __m512 a, b;  // of the first and second 16 queries
};

// Turns the scores of two keys and a unit's queries into weights.
struct Weigher {
    const Powers powers;
    const __m512 factor;
    const Vectors offset;
    Vectors total;
    __m512 most;

    INLINE Weigher(const Unit& unit, float score_factor)
        : factor(_mm512_set1_ps(score_factor)),
          offset{powers.offset_of(_mm512_load_ps(unit.peak)),
                 powers.offset_of(_mm512_load_ps(unit.peak + 16))},
          total{_mm512_load_ps(unit.total), _mm512_load_ps(unit.total + 16)},
          most(powers.least()) {}

    INLINE void weigh(const float* scores, uint16_t* weights) {
        total.a = weigh_half(scores, weights, offset.a, total.a);
        total.b = weigh_half(scores + 512, weights + 512, offset.b, total.b);
    }
    // Some weight is not what was written: its score is too far above the maximum.
    INLINE bool is_beyond() const { return powers.is_beyond(most); }

  private:
    INLINE __m512 weigh_half(const float* scores, uint16_t* weights, __m512 from, __m512 sum) {
        const __m512 even = _mm512_fmadd_ps(_mm512_load_ps(scores), factor, from);
        const __m512 odd = _mm512_fmadd_ps(_mm512_load_ps(scores + 16), factor, from);
        most = _mm512_max_ps(most, _mm512_max_ps(even, odd));
        const __m512i pairs = powers.pairs_of(even, odd);
        _mm512_store_si512(weights, pairs);
        return add_pairs(sum, pairs);
    }
};

class Pipeline {
  public:
    Pipeline(const Sizes& sizes, float scale, Workspace& space)
        : sizes_(sizes), scale_(scale * kLog2E), factor_(scale_ * kPowerSteps), space_(space) {}

    // The keys of a block that the unit sees. keys, values: the block's tiles
    void pass(Unit& unit, int64_t first_key, const uint16_t* keys, const uint16_t* values) {
        const int64_t count = least(unit.most_limit - first_key, kBlock);
        uint16_t* weights = space_.weights[num_blocks_++ & 1];
        for (int64_t start = 0; start < count; start += kWindow) {
            const int64_t window = start / kWindow;
            const Scored next{&unit, space_.scores[num_windows_++ & 1], weights, values,
                              first_key + start, window, start + kWindow >= count};
            advance(&next, keys + window * sizes_.key_window());
        }
    }
    // Nothing waits afterwards.
    void drain() {
        advance(nullptr, nullptr);
        add_all();
    }

  private:
    // One window's scores, the window before's weights, and one slice of values.
    void advance(const Scored* next, const uint16_t* keys) {
        const Scored now = scored_;
        if (!now.unit) {
            if (next) make_scores(*next, keys, [](int) {}, [] {});
        } else {
            weigh_and_score(now, next, keys);
            if (now.is_last) {
                add_all();
                weighed_ = {now.unit, now.weights, now.values, now.window + 1, 0};
            }
        }
        scored_ = next ? *next : Scored{};
    }

    INLINE void weigh_and_score(const Scored& now, const Scored* next, const uint16_t* keys) {
        if (now.first_key + kWindow > now.unit->least_limit) hide(now);
        if (now.first_key == 0) settle(now);
        Weigher weigher(*now.unit, factor_);
        constexpr int kPieces = kWindow / 2;  // of two keys x 32 queries
        const float* scores = now.scores;
        uint16_t* weights = now.weights + now.window * 2 * kTile;
        int done = 0;
        const auto piece = [&](int num_pieces) __attribute__((always_inline)) {
            for (int i = 0; i < num_pieces && done < kPieces; ++i, ++done) {
                weigher.weigh(scores + done * 32, weights + done * 32);
            }
        };
        const auto load_first = [&]() __attribute__((always_inline)) {
            if (weighed_.unit) load_values(weighed_);
        };
        next ? make_scores(*next, keys, piece, load_first) : load_first();
        if (weighed_.unit) add_slice(piece);
        piece(kPieces);
        if (weigher.is_beyond()) return weigh_again(now);
        _mm512_store_ps(now.unit->total, weigher.total.a);
        _mm512_store_ps(now.unit->total + 16, weigher.total.b);
    }

    // With maxima that the scores do not exceed by so much.
    __attribute__((noinline)) void weigh_again(const Scored& now) {
        settle(now);
        Weigher weigher(*now.unit, factor_);
        for (int64_t at = 0; at < kTile; at += 32)
            weigher.weigh(now.scores + at, now.weights + now.window * 2 * kTile + at);
        _mm512_store_ps(now.unit->total, weigher.total.a);
        _mm512_store_ps(now.unit->total + 16, weigher.total.b);
    }

    // Of the first window.
    INLINE void load_values(const Weighed& of) {
        const uint16_t* values = of.values + sizes_.slice_at(of.next_tile);
        LOAD_TILE(6, of.weights);
        LOAD_TILE(4, values);
        LOAD_TILE(7, of.weights + kTile);
        if (of.next_tile + 1 < sizes_.dim_tiles) LOAD_TILE(5, values + kTile);
    }

    template <typename Meanwhile, typename LoadNext>
    INLINE void make_scores(const Scored& next, const uint16_t* keys, const Meanwhile& meanwhile,
                            const LoadNext& load_next) {
        const int64_t steps = sizes_.dim_steps;
        const auto& query = next.unit->query;
        LOAD_STEP(keys, query[0][0], keys + steps * kTile, query[0][1]);
        CLEAR_TILE(0);
        CLEAR_TILE(1);
        CLEAR_TILE(2);
        CLEAR_TILE(3);
        for (int64_t step = 1; step < steps; ++step) {
            const uint16_t* left = keys + step * kTile;
            MULTIPLY_AND_LOAD(left, query[step][0], left + steps * kTile, query[step][1],
                              kScoreShare);
        }
        MULTIPLY_STEP();
        load_next();  // before the sums are stored
        meanwhile(kScoreShare);
        STORE_TILE(0, next.scores);
        STORE_TILE(2, next.scores + 256);
        STORE_TILE(1, next.scores + 512);
        STORE_TILE(3, next.scores + 768);
    }

    // Two tiles of dims of the block that waits. The first values are loaded already.
    template <typename Meanwhile>
    INLINE void add_slice(const Meanwhile& meanwhile) {
        const int64_t tile = weighed_.next_tile, num_windows = weighed_.num_windows;
        float* out = &weighed_.unit->out[tile][0][0];
        const uint16_t* weights = weighed_.weights + 2 * kTile;
        const uint16_t* values =
            weighed_.values + sizes_.slice_at(tile) + sizes_.slice_step(tile);
        LOAD_TILE(0, out);
        LOAD_TILE(1, out + 256);
        if (tile + 1 < sizes_.dim_tiles) {
            LOAD_TILE(2, out + 512);
            LOAD_TILE(3, out + 768);
            for (int64_t window = 1; window < num_windows; ++window) {
                MULTIPLY_AND_LOAD(values, weights, values + kTile, weights + kTile, kValueShare);
                weights += 2 * kTile, values += 2 * kTile;
            }
            MULTIPLY_STEP();
            meanwhile(kValueShare);
            STORE_TILE(0, out);
            STORE_TILE(1, out + 256);
            STORE_TILE(2, out + 512);
            STORE_TILE(3, out + 768);
        } else {
            for (int64_t window = 1; window < num_windows; ++window) {
                MULTIPLY_TILES(0, 4, 6);
                LOAD_TILE(6, weights);
                MULTIPLY_TILES(1, 4, 7);
                LOAD_TILE(4, values);
                LOAD_TILE(7, weights + kTile);
                meanwhile(kValueShare);
                weights += 2 * kTile, values += kTile;
            }
            MULTIPLY_TILES(0, 4, 6);
            MULTIPLY_TILES(1, 4, 7);
            meanwhile(kValueShare);
            STORE_TILE(0, out);
            STORE_TILE(1, out + 256);
        }
        weighed_.next_tile += 2;
        if (weighed_.next_tile >= sizes_.dim_tiles) weighed_.unit = nullptr;
    }

    void add_all() {
        while (weighed_.unit) {
            load_values(weighed_);
            add_slice([](int) {});
        }
    }

    void hide(const Scored& now) {
        for (int half = 0; half < 2; ++half) {
            const __m512i limit = _mm512_load_si512(now.unit->limit + half * 16);
            for (int64_t key = 0; key < kWindow; ++key) {
                const __mmask16 hidden =
                    _mm512_cmple_epi32_mask(limit, _mm512_set1_epi32(int32_t(now.first_key + key)));
                _mm512_mask_store_ps(now.scores + half * 512 + key * 16, hidden,
                                     _mm512_set1_ps(kHidden));
            }
        }
    }

    // Raises the maxima that the window's scores exceed by too much.
    INLINE void settle(const Scored& now) {
        Vectors best = {_mm512_load_ps(now.scores), _mm512_load_ps(now.scores + 512)};
        Vectors more = best;
        for (int key = 0; key < kWindow; key += 2) {
            const float* row = now.scores + key * 16;
            best.a = _mm512_max_ps(best.a, _mm512_load_ps(row));
            best.b = _mm512_max_ps(best.b, _mm512_load_ps(row + 512));
            more.a = _mm512_max_ps(more.a, _mm512_load_ps(row + 16));
            more.b = _mm512_max_ps(more.b, _mm512_load_ps(row + 528));
        }
        const __m512 scale = _mm512_set1_ps(scale_), slack = _mm512_set1_ps(kSlack - 1);
        best.a = whole(_mm512_mul_ps(_mm512_max_ps(best.a, more.a), scale));
        best.b = whole(_mm512_mul_ps(_mm512_max_ps(best.b, more.b), scale));
        const __m512 a = _mm512_load_ps(now.unit->peak), b = _mm512_load_ps(now.unit->peak + 16);
        if (_mm512_cmp_ps_mask(best.a, _mm512_add_ps(a, slack), _CMP_GT_OQ) |
            _mm512_cmp_ps_mask(best.b, _mm512_add_ps(b, slack), _CMP_GT_OQ))
            rescale(now, {_mm512_max_ps(a, best.a), _mm512_max_ps(b, best.b)});
    }

    __attribute__((noinline)) void rescale(const Scored& now, Vectors peak) {
        Unit& unit = *now.unit;
        if (weighed_.unit == &unit) add_all();  // its weights have the old maximum
        for (int half = 0; half < 2; ++half) {
            const __m512 best = half ? peak.b : peak.a;
            const __m512 old = _mm512_load_ps(unit.peak + half * 16);
            const __m512 kept = _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_sub_ps(old, best));
            _mm512_store_ps(unit.peak + half * 16, best);
            float* total = unit.total + half * 16;
            _mm512_store_ps(total, _mm512_mul_ps(_mm512_load_ps(total), kept));
            for (int64_t tile = 0; tile < sizes_.dim_tiles; ++tile)
                for (int i = 0; i < 16; ++i) {
                    float* row = unit.out[tile][half] + i * 16;
                    _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), kept));
                }
            for (int64_t window = 0; window < now.window; ++window)
                for (int i = 0; i < 16; ++i)
                    scale_pairs(now.weights + (window * 2 + half) * kTile + i * 32, kept);
        }
    }

    // The next whole number: then the factor between two maxima is a power of two.
    static INLINE __m512 whole(__m512 values) { return _mm512_roundscale_ps(values, 0x0a); }

    // Weights of the block's earlier windows, which have not met their values yet.
    static void scale_pairs(uint16_t* weights, __m512 by) {
        const __m512i pairs = _mm512_load_si512(weights);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        const __m512 odd =
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
        const __m512i low = rounded(_mm512_mul_ps(even, by));
        const __m512i high = rounded(_mm512_mul_ps(odd, by));
        _mm512_store_si512(weights, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    static __m512i rounded(__m512 values) {
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    }

    static constexpr int kScoreShare = 2, kValueShare = 2;  // pieces beside four tile products

    const Sizes& sizes_;
    const float scale_, factor_;
    Workspace& space_;
    Scored scored_;
    Weighed weighed_;
    int num_blocks_ = 0, num_windows_ = 0;
};

// --- the call ---

struct Attention {
    const AttentionCall* call;
    Sizes sizes;
    uint16_t* packed;  // by KV head: keys, then values
    Workspace* spaces;
    Unit* units;
    int64_t next;  // the item that nobody has taken yet
};

void attend_item(const Attention& all, int64_t item, int worker) {
    const AttentionCall& call = *all.call;
    const Sizes& sizes = all.sizes;
    const int64_t num_runs = ceil_div(sizes.num_units, sizes.units_per_item);
    const int64_t kv_head = item / (num_runs * sizes.group);
    // Last queries first: of a causal prompt they have the most to do.
    const int64_t run = num_runs - 1 - item / sizes.group % num_runs;
    const int64_t head = kv_head * sizes.group + item % sizes.group;
    const int64_t first = run * sizes.units_per_item;
    const int64_t count = least(sizes.num_units - first, sizes.units_per_item);
    Unit* units = all.units + worker * kUnits;
    for (int64_t u = 0; u < count; ++u)
        start_unit(call, sizes, head, (first + u) * kUnit, units[u]);
    const uint16_t* keys = all.packed + kv_head * sizes.head();
    const uint16_t* values = keys + sizes.head_keys();
    Pipeline pipeline(sizes, call.scale, all.spaces[worker]);
    for (int64_t start = 0; start < units[count - 1].most_limit; start += kRange)
        for (int64_t u = 0; u < count; ++u) {
            const int64_t end = least(start + kRange, units[u].most_limit);
            for (int64_t key = start; key < end; key += kBlock)
                pipeline.pass(units[u], key, keys + key / kWindow * sizes.key_window(),
                              values + key / kBlock * sizes.value_block());
        }
    pipeline.drain();
    for (int64_t u = 0; u < count; ++u)
        finish_unit(call, sizes, head, (first + u) * kUnit, units[u]);
}

void attention_body(void* context, int worker, int num_workers) {
    Attention& all = *static_cast<Attention*>(context);
    const Sizes& sizes = all.sizes;
    const FlushDenormals flush;
    const int64_t num_windows = all.call->num_kv_heads * sizes.num_windows;
    int64_t i, end;
    part_of(num_windows, worker, num_workers, &i, &end);
    for (; i < end; ++i) {
        const int64_t kv_head = i / sizes.num_windows, window = i % sizes.num_windows;
        uint16_t* keys = all.packed + kv_head * sizes.head();
        uint16_t* values = keys + sizes.head_keys();
        pack_window(*all.call, sizes, kv_head, window, keys + window * sizes.key_window(),
                    values + window / (kBlock / kWindow) * sizes.value_block());
    }
    wait_for_all();
    set_shapes();
    for (;;) {
        const int64_t item = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED);
        if (item >= sizes.num_items) break;
        attend_item(all, item, worker);
    }
    release_tiles();
}

Sizes sizes_of(const AttentionCall& call) {
    Sizes sizes{};
    sizes.dim = call.head_dim;
    sizes.dim_steps = ceil_div(call.head_dim, 32);
    sizes.dim_tiles = ceil_div(call.head_dim, 16);
    sizes.num_windows = ceil_div(call.num_keys, kWindow);
    sizes.group = call.num_heads / call.num_kv_heads;
    sizes.num_units = ceil_div(call.num_queries, kUnit);
    int64_t units = kUnits;
    const auto num_items = [&] { return ceil_div(sizes.num_units, units) * call.num_heads; };
    while (units > 1 && num_items() < 4 * num_workers()) units /= 2;
    sizes.units_per_item = units;
    sizes.num_items = num_items();
    return sizes;
}

}  // namespace

void attention_amx(const AttentionCall& call) {
    if (call.key_scales) return attention_avx512(call);
    Attention all{};
    all.call = &call;
    all.sizes = sizes_of(call);
    const int64_t packed = call.num_kv_heads * all.sizes.head();
    all.packed = static_cast<uint16_t*>(scratch(kKeySlot, packed * int64_t(sizeof(uint16_t))));
    const int64_t spaces = num_workers() * int64_t(sizeof(Workspace));
    char* own = static_cast<char*>(
        scratch(kUnitSlot, spaces + num_workers() * kUnits * int64_t(sizeof(Unit))));
    all.spaces = reinterpret_cast<Workspace*>(own);
    all.units = reinterpret_cast<Unit*>(own + spaces);
    run_parallel(attention_body, &all);
}

}  // namespace glimt

#endif
