// Attention by dot products of pairs of bfloat16: many queries of one sequence, for processors with
// AVX512_BF16 and no tiles.
//
// Queries lie side by side in the lanes, keys one below the other: the softmax needs no sums across
// lanes, and the weights of two keys, side by side in a word, are what the second product takes. A
// row is a query as one head asks it; all heads that share a KV head are rows of the same units, so
// that a few queries fill the lanes too. Keys and values are packed once for all of them.
//
// Both products have one form: panels of 8 rows of words that are broadcast, times rows of vectors.
// What a row gets depends on its own keys only, not on its neighbours: a prompt gives the same bits
// in chunks of any size. Source of the running maximum: FlashAttention-2, arXiv 2307.08691, section
// 3.1; of the rescaling that waits until the maximum has grown by much: FlashAttention-4.
#if defined(__AVX512BF16__)

#include "attention.h"
#include "attention_vectors.h"
#include "counts.h"
#include "denormals.h"
#include "threads.h"

namespace glimt {
namespace {

constexpr int kLanes = 16;
constexpr int kMaxVectors = 3;  // of queries: 24 sums leave registers for what is multiplied
constexpr int kUnit = kMaxVectors * kLanes;
constexpr int kPanel = 8;    // keys of the first product, dims of the second, at a time
constexpr int kBlock = 256;  // keys between two looks at the outputs
constexpr int kPackedSlot = 8, kUnitSlot = 9;

// What the call's sizes come to. A word is a pair of bfloat16.
struct Sizes {
    int64_t dim, dim_pairs, dim_panels;
    int64_t num_panels, num_blocks;  // of keys
    int64_t group;                   // query heads of a KV head
    int64_t num_rows, num_vectors, num_units;  // of a KV head

    explicit Sizes(const AttentionCall& call)
        : dim(call.head_dim),
          dim_pairs(ceil_div(dim, 2)),
          dim_panels(ceil_div(dim, kPanel)),
          num_panels(ceil_div(call.num_keys, kPanel)),
          num_blocks(ceil_div(call.num_keys, kBlock)),
          group(call.num_heads / call.num_kv_heads),
          num_rows(call.num_queries * group),
          num_vectors(ceil_div(num_rows, kLanes)),
          num_units(ceil_div(num_vectors, kMaxVectors)) {
        // Two items for each worker at least, as far as the vectors go.
        const int64_t enough = ceil_div(2 * num_workers(), call.num_kv_heads);
        if (num_units < enough) num_units = least(num_vectors, enough);
    }

    int64_t key_panel() const { return dim_pairs * kPanel; }
    int64_t value_panel() const { return kBlock / 2 * kPanel; }
    int64_t key_words() const { return num_panels * key_panel(); }
    int64_t head_words() const { return key_words() + num_blocks * dim_panels * value_panel(); }
};

// --- packing ---

__m512i widened_at(const uint16_t* row, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), row));
}

void store_halves(uint32_t* low, uint32_t* high, __m512i words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_castsi512_si256(words));
    if (high)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm512_extracti64x4_epi64(words, 1));
}

// Rows of 16 tokens; null where there is none. Those in int8 are widened first.
struct Tokens {
    const uint16_t* rows[16];
    bool fill_two_panels;

    Tokens(const TokenRows& from, int64_t first, int64_t num_tokens, int64_t dim)
        : fill_two_panels(first + kPanel < num_tokens) {
        for (int64_t i = 0; i < 16; ++i) {
            rows[i] = nullptr;
            if (first + i >= num_tokens) continue;
            rows[i] = from.scales ? widened_row(from.int8_at(first + i), dim, widened[i])
                                  : from.at(first + i);
        }
    }
    Tokens(const Tokens&) = delete;  // rows may point into it

  private:
    alignas(64) uint16_t widened[16][kMaxDim];

    static const uint16_t* widened_row(Int8Row row, int64_t dim, uint16_t* to) {
        const __m512 scale = _mm512_set1_ps(row.scale);
        for (int64_t d = 0; d < dim; d += 16) {
            const __mmask16 mask = first_lanes(dim - d);
            const __m512i whole = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, row.values + d));
            const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale);
            _mm256_mask_storeu_epi16(to + d, mask, (__m256i)_mm512_cvtneps_pbh(values));
        }
        return to;
    }
};

// Panels [2][dim_pairs][8 keys]. Keys that are not there become zeros: their scores are hidden.
void pack_keys(const Tokens& tokens, const Sizes& sizes, uint32_t* to) {
    for (int64_t pair = 0; pair < sizes.dim_pairs; pair += 16) {
        __m512i words[16];
        for (int i = 0; i < 16; ++i)
            words[i] = tokens.rows[i] ? values_at(tokens.rows[i] + 2 * pair, sizes.dim - 2 * pair)
                                      : _mm512_setzero_si512();
        transpose(words);
        for (int64_t i = 0; i < 16 && pair + i < sizes.dim_pairs; ++i) {
            uint32_t* low = to + (pair + i) * kPanel;
            store_halves(low, tokens.fill_two_panels ? low + sizes.key_panel() : nullptr, words[i]);
        }
    }
}

// Into panels [dim_panels][kBlock / 2 pairs of tokens][8 dims] of a block. Values that are not
// there become zeros: a zero weight times what lies there may be NaN.
void pack_values(const Tokens& tokens, const Sizes& sizes, uint32_t* to) {
    for (int i = 0; i < 16; i += 2, to += kPanel)
        for (int64_t dim = 0; dim < sizes.dim; dim += 16) {
            const uint16_t *even = tokens.rows[i], *odd = tokens.rows[i + 1];
            __m512i words = _mm512_setzero_si512();
            if (even) words = widened_at(even + dim, sizes.dim - dim);
            if (odd)
                words = _mm512_or_si512(
                    words, _mm512_slli_epi32(widened_at(odd + dim, sizes.dim - dim), 16));
            uint32_t* low = to + dim / kPanel * sizes.value_panel();
            const bool has_high = dim / kPanel + 1 < sizes.dim_panels;
            store_halves(low, has_high ? low + sizes.value_panel() : nullptr, words);
        }
}

// --- queries ---

// Rows side by side, and what they have gathered from the keys so far.
struct alignas(64) Unit {
    uint32_t query[kMaxDim / 2 * kUnit];  // [dim_pairs][lanes]
    float out[kMaxDim * kUnit];           // [dims][lanes], not yet divided
    float scores[kBlock * kUnit];
    uint32_t weights[kBlock / 2 * kUnit];
    float peak[kUnit], total[kUnit];  // peak: in powers of two
    int32_t limit[kUnit];             // keys below it are seen
    int64_t least_limit, most_limit;
};

// Where a row lies among the heads of a KV head.
struct Place {
    int64_t query, head;

    Place(const Sizes& sizes, int64_t kv_head, int64_t row)
        : query(row / sizes.group), head(kv_head * sizes.group + row % sizes.group) {}
};

// Lanes without a row of their own repeat the last one.
void start_unit(const AttentionCall& call, const Sizes& sizes, int64_t kv_head, int64_t first,
                int num_lanes, Unit& unit) {
    const uint16_t* rows[kUnit];
    for (int i = 0; i < num_lanes; ++i) {
        const int64_t row = least(first + i, sizes.num_rows - 1);
        const Place at(sizes, kv_head, row);
        rows[i] =
            call.query + at.query * call.query_token_stride + at.head * call.query_head_stride;
        unit.limit[i] = int32_t(keys_seen(call, at.query));
        unit.peak[i] = kLowest, unit.total[i] = 0;
    }
    unit.least_limit = unit.limit[0], unit.most_limit = unit.limit[num_lanes - 1];
    for (int64_t pair = 0; pair < sizes.dim_pairs; pair += 16)
        for (int lane = 0; lane < num_lanes; lane += kLanes) {
            __m512i words[16];
            for (int i = 0; i < 16; ++i)
                words[i] = values_at(rows[lane + i] + 2 * pair, sizes.dim - 2 * pair);
            transpose(words);
            for (int64_t i = 0; i < 16 && pair + i < sizes.dim_pairs; ++i)
                _mm512_store_si512(unit.query + (pair + i) * num_lanes + lane, words[i]);
        }
}

void finish_unit(const AttentionCall& call, const Sizes& sizes, int64_t kv_head, int64_t first,
                 int num_lanes, const Unit& unit) {
    for (int lane = 0; lane < num_lanes; lane += kLanes) {
        const __m512 total = _mm512_load_ps(unit.total + lane);
        const __mmask16 sees = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 share = _mm512_maskz_div_ps(sees, _mm512_set1_ps(1), total);
        uint16_t* to[16];
        const int64_t num_rows = least(sizes.num_rows - first - lane, 16);
        for (int64_t i = 0; i < num_rows; ++i) {
            const Place at(sizes, kv_head, first + lane + i);
            to[i] = call.out + at.query * call.out_token_stride + at.head * call.out_head_stride;
        }
        for (int64_t dim = 0; dim < sizes.dim; dim += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i) {
                const __m512 sums = _mm512_load_ps(unit.out + (dim + i) * num_lanes + lane);
                rows[i] = _mm512_castps_si512(_mm512_maskz_mul_ps(sees, sums, share));
            }
            transpose(rows);
            const __mmask16 mask = first_lanes(sizes.dim - dim);
            for (int64_t i = 0; i < num_rows; ++i)
                _mm256_mask_storeu_epi16(
                    to[i] + dim, mask,
                    (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[i])));
        }
    }
}

// --- a unit and a block of keys ---

// Rows of kVectors vectors, kPanel of them: out (+)= sum over i < size of panel[i] * right[i].
template <int kVectors>
INLINE void multiply(float* out, const uint32_t* panel, const uint32_t* right, int64_t size,
                     bool adds) {
    constexpr int kWidth = kVectors * kLanes;
    __m512 sums[kPanel][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kPanel; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
            sums[r][v] = adds ? _mm512_load_ps(out + r * kWidth + v * kLanes) : _mm512_setzero_ps();
    for (int64_t i = 0; i < size; ++i, panel += kPanel, right += kWidth) {
        __m512i vectors[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) vectors[v] = _mm512_load_si512(right + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kPanel; ++r) {
            const __m512i word = _mm512_set1_epi32(int32_t(panel[r]));
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)word, (__m512bh)vectors[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kPanel; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
            _mm512_store_ps(out + r * kWidth + v * kLanes, sums[r][v]);
}

// Two keys' weights of 16 queries as a row of words, rounded to the nearest.
INLINE __m512i rounded_pairs(__m512 even, __m512 odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    return cut_pairs(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(even), half)),
                     _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(odd), half)));
}

template <int kVectors>
class Attend {
  public:
    static constexpr int kWidth = kVectors * kLanes;

    // Keys first_key … first_key + count - 1; keys, values: their panels.
    static void block(Unit& unit, const Sizes& sizes, float scale, int64_t first_key,
                      int64_t count, const uint32_t* keys, const uint32_t* values) {
        const int64_t num_keys = up_to(count, kPanel);
        for (int64_t key = 0; key < num_keys; key += kPanel, keys += sizes.key_panel())
            multiply<kVectors>(unit.scores + key * kWidth, keys, unit.query, sizes.dim_pairs,
                               false);
        if (first_key + num_keys > unit.least_limit) hide(unit, first_key, num_keys);
        for (int lane = 0; lane < kWidth; lane += kLanes) {
            settle(unit, sizes, scale, lane, num_keys, first_key == 0);
            weigh(unit, scale, lane, num_keys);
        }
        for (int64_t i = 0; i < sizes.dim_panels; ++i, values += sizes.value_panel())
            multiply<kVectors>(unit.out + i * kPanel * kWidth, values, unit.weights, num_keys / 2,
                               first_key > 0);
    }

  private:
    static void hide(Unit& unit, int64_t first_key, int64_t num_keys) {
        const int64_t seen_by_all = unit.least_limit - first_key;
        for (int lane = 0; lane < kWidth; lane += kLanes) {
            const __m512i limit = _mm512_load_si512(unit.limit + lane);
            for (int64_t key = seen_by_all > 0 ? seen_by_all : 0; key < num_keys; ++key) {
                const __m512i at = _mm512_set1_epi32(int32_t(first_key + key));
                _mm512_mask_store_ps(unit.scores + key * kWidth + lane,
                                     _mm512_cmple_epi32_mask(limit, at), _mm512_set1_ps(kHidden));
            }
        }
    }

    // Raises the maxima that the scores exceed by too much, and only those.
    static void settle(Unit& unit, const Sizes& sizes, float scale, int lane, int64_t num_keys,
                       bool is_first) {
        const float* scores = unit.scores + lane;
        __m512 best = _mm512_load_ps(scores), more = best;
        for (int64_t key = 0; key < num_keys; key += 2) {
            best = _mm512_max_ps(best, _mm512_load_ps(scores + key * kWidth));
            more = _mm512_max_ps(more, _mm512_load_ps(scores + (key + 1) * kWidth));
        }
        best = _mm512_mul_ps(_mm512_max_ps(best, more), _mm512_set1_ps(scale));
        const __m512 old = _mm512_load_ps(unit.peak + lane);
        const __mmask16 grown = _mm512_cmp_ps_mask(
            best, _mm512_add_ps(old, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
        if (!grown) return;
        const __m512 peak = _mm512_mask_mov_ps(old, grown, best);
        _mm512_store_ps(unit.peak + lane, peak);
        if (!is_first) rescale(unit, sizes, lane, grown, coarse_exp2(_mm512_sub_ps(old, peak)));
    }

    static void rescale(Unit& unit, const Sizes& sizes, int lane, __mmask16 grown, __m512 kept) {
        float* out = unit.out + lane;
        const auto scaled = [&](const float* from) {
            const __m512 values = _mm512_load_ps(from);
            return _mm512_mask_mul_ps(values, grown, values, kept);
        };
        _mm512_store_ps(unit.total + lane, scaled(unit.total + lane));
        for (int64_t dim = 0; dim < sizes.dim; ++dim, out += kWidth)
            _mm512_store_ps(out, scaled(out));
    }

    static void weigh(Unit& unit, float scale_, int lane, int64_t num_keys) {
        const __m512 scale = _mm512_set1_ps(scale_), peak = _mm512_load_ps(unit.peak + lane);
        __m512 total = _mm512_load_ps(unit.total + lane);
        const float* scores = unit.scores + lane;
        uint32_t* weights = unit.weights + lane;
        for (int64_t key = 0; key < num_keys; key += 2, scores += 2 * kWidth, weights += kWidth) {
            const __m512 even = _mm512_fmsub_ps(_mm512_load_ps(scores), scale, peak);
            const __m512 odd = _mm512_fmsub_ps(_mm512_load_ps(scores + kWidth), scale, peak);
            const __m512i pairs = rounded_pairs(coarse_exp2(even), coarse_exp2(odd));
            _mm512_store_si512(weights, pairs);
            total = add_pairs(total, pairs);
        }
        _mm512_store_ps(unit.total + lane, total);
    }
};

// --- the call ---

struct Attention {
    const AttentionCall* call;
    Sizes sizes;
    uint32_t* packed;  // by KV head: keys, then values
    Unit* units;       // of the workers
    int64_t next;      // the item that nobody has taken yet
};

// 16 keys of a KV head.
void pack_part(const Attention& all, int64_t kv_head, int64_t first) {
    const AttentionCall& call = *all.call;
    const Sizes& sizes = all.sizes;
    const TokenRows keys = keys_of(call, kv_head), values = values_of(call, kv_head);
    uint32_t* to = all.packed + kv_head * sizes.head_words();
    pack_keys(Tokens(keys, first, call.num_keys, sizes.dim), sizes,
              to + first / kPanel * sizes.key_panel());
    to += sizes.key_words() + first / kBlock * sizes.dim_panels * sizes.value_panel();
    pack_values(Tokens(values, first, call.num_keys, sizes.dim), sizes,
                to + first % kBlock / 2 * kPanel);
}

template <int kVectors>
void attend_unit(const Attention& all, int64_t kv_head, int64_t first, Unit& unit) {
    const AttentionCall& call = *all.call;
    const Sizes& sizes = all.sizes;
    const uint32_t* keys = all.packed + kv_head * sizes.head_words();
    const uint32_t* values = keys + sizes.key_words();
    start_unit(call, sizes, kv_head, first, kVectors * kLanes, unit);
    for (int64_t key = 0; key < unit.most_limit; key += kBlock) {
        Attend<kVectors>::block(unit, sizes, call.scale * kLog2E, key,
                                least(unit.most_limit - key, kBlock),
                                keys + key / kPanel * sizes.key_panel(),
                                values + key / kBlock * sizes.dim_panels * sizes.value_panel());
    }
    finish_unit(call, sizes, kv_head, first, kVectors * kLanes, unit);
}

void attend_item(const Attention& all, int64_t item, Unit& unit) {
    const Sizes& sizes = all.sizes;
    // Last queries first: of a causal prompt they have the most to do.
    const int64_t kv_head = item / sizes.num_units;
    const int64_t number = sizes.num_units - 1 - item % sizes.num_units;
    // Units are as alike as can be: one of a single vector would be slow.
    int64_t begin, end;
    part_of(sizes.num_vectors, int(number), int(sizes.num_units), &begin, &end);
    const int64_t first = begin * kLanes;
    if (end - begin == 3) return attend_unit<3>(all, kv_head, first, unit);
    if (end - begin == 2) return attend_unit<2>(all, kv_head, first, unit);
    attend_unit<1>(all, kv_head, first, unit);
}

void attention_body(void* context, int worker, int num_workers) {
    Attention& all = *static_cast<Attention*>(context);
    const AttentionCall& call = *all.call;
    const FlushDenormals flush;
    const int64_t parts = ceil_div(call.num_keys, 16);
    int64_t part, last;
    part_of(parts * call.num_kv_heads, worker, num_workers, &part, &last);
    for (; part < last; ++part) pack_part(all, part / parts, part % parts * 16);
    wait_for_all();
    for (;;) {
        const int64_t item = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED);
        if (item >= all.sizes.num_units * call.num_kv_heads) break;
        attend_item(all, item, all.units[worker]);
    }
}

}  // namespace

void attention_avx512_bf16(const AttentionCall& call) {
    const Sizes sizes(call);
    const int64_t words = call.num_kv_heads * sizes.head_words();
    Attention all{&call, sizes, nullptr, nullptr, 0};
    all.packed = static_cast<uint32_t*>(scratch(kPackedSlot, words * int64_t(sizeof(uint32_t))));
    all.units =
        static_cast<Unit*>(scratch(kUnitSlot, num_workers() * int64_t(sizeof(Unit))));
    run_parallel(attention_body, &all);
}

}  // namespace glimt

#endif
