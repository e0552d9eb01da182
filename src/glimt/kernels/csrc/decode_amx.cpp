// Decoding with bfloat16 tiles: up to 16 query heads that share a KV head, over a paged context.
//
// Sixteen tokens of the cache, as they lie there, are a left operand; scores are tokens x heads.
// The weights, turned round, are the left operand of the second product, and pairs of tokens'
// values the right one. What tiles do not fit goes the way of attention_plain.inc.
#if defined(__AMX_BF16__)

#include "attention_tiles.h"

#define GLIMT_LANES 16
#include "attention_plain.inc"

namespace glimt {
namespace {

constexpr int kHeads = 16;
constexpr int kSub = 32;      // tokens of one step of the second product
constexpr int kBatch = 128;   // tokens between two looks at the output tiles
constexpr int kAhead = 64;    // tokens
constexpr int kMinHeads = 5;  // fewer would leave most of a tile empty

struct alignas(64) TileHeads {
    uint16_t query[kMaxDim / 32][kTile];  // tiles of 16 pairs of dims x 16 heads
    float scores[kBatch][kHeads], others[kBatch][kHeads];  // two halves of a sum, until settled
    uint16_t weights[kBatch / kSub][kTile];  // tiles of 16 heads x 32 tokens
    uint16_t values[kBatch / kSub][kMaxDim / 16][kTile];  // tiles of 16 pairs of tokens x 16 dims
    float out[kMaxDim / 16][256];  // tiles of 16 heads x 16 dims, in the order of values
    float peak[kHeads], total[kHeads];
};

// Two tiles of 32 dims hold, of every eight, the first four and the last four: so unpacking within
// 128 bits leaves them.
int64_t dim_of(int64_t tile, int64_t column) {
    return tile / 2 * 32 + column / 4 * 8 + tile % 2 * 4 + column % 4;
}

void make_scores(TileHeads& heads, const TokenRows& keys, int64_t steps, int64_t start,
                 int64_t count) {
    const int64_t stride = keys.token_stride * int64_t(sizeof(uint16_t));
    LOAD_TILE(4, heads.query[0]);
    LOAD_TILE(5, heads.query[1]);
    LOAD_TILE(6, heads.query[2]);
    LOAD_TILE(7, heads.query[3]);
    for (int64_t t = 0; t < count; t += 16) {
        const uint16_t* rows = keys.at(start + t);
        CLEAR_TILE(0);
        CLEAR_TILE(1);
        LOAD_TILE_ROWS(2, rows, stride);
        MULTIPLY_TILES(0, 2, 4);
        if (steps > 1) {
            LOAD_TILE_ROWS(3, rows + 32, stride);
            MULTIPLY_TILES(1, 3, 5);
        }
        if (steps > 2) {
            LOAD_TILE_ROWS(2, rows + 64, stride);
            MULTIPLY_TILES(0, 2, 6);
        }
        if (steps > 3) {
            LOAD_TILE_ROWS(3, rows + 96, stride);
            MULTIPLY_TILES(1, 3, 7);
        }
        STORE_TILE(0, heads.scores[t]);
        STORE_TILE(1, heads.others[t]);
    }
}

// One maximum for the batch; the output is scaled down only if it has grown by much.
void settle(TileHeads& heads, int64_t dim, int64_t count, __m512 scale) {
    __m512 best = _mm512_set1_ps(kHidden);
    for (int64_t t = 0; t < count; ++t) {
        const __m512 sum =
            _mm512_add_ps(_mm512_load_ps(heads.scores[t]), _mm512_load_ps(heads.others[t]));
        const __m512 score = _mm512_mul_ps(sum, scale);
        _mm512_store_ps(heads.scores[t], score);
        best = _mm512_max_ps(best, score);
    }
    for (int64_t t = count; t < rounded_up(count, kSub); ++t)
        _mm512_store_ps(heads.scores[t], _mm512_set1_ps(kHidden));
    const __m512 old = _mm512_load_ps(heads.peak);
    if (!_mm512_cmp_ps_mask(best, _mm512_add_ps(old, _mm512_set1_ps(kSlack)), _CMP_GT_OQ)) return;
    best = _mm512_max_ps(best, old);
    const __m512 kept = coarse_exp2(_mm512_sub_ps(old, best));
    _mm512_store_ps(heads.peak, best);
    _mm512_store_ps(heads.total, _mm512_mul_ps(_mm512_load_ps(heads.total), kept));
    alignas(64) float factors[kHeads];
    _mm512_store_ps(factors, kept);
    for (int64_t tile = 0; tile < dim / 16; ++tile)
        for (int h = 0; h < kHeads; ++h) {
            float* row = heads.out[tile] + h * 16;
            _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), _mm512_set1_ps(factors[h])));
        }
}

void weigh(TileHeads& heads, int64_t num_subs) {
    const __m512 peak = _mm512_load_ps(heads.peak);
    __m512 total = _mm512_load_ps(heads.total);
    for (int64_t sub = 0; sub < num_subs; ++sub) {
        __m512i pairs[16];
        for (int i = 0; i < 16; ++i) {
            const float* rows = heads.scores[sub * kSub + 2 * i];
            const __m512 even = coarse_exp2(_mm512_sub_ps(_mm512_load_ps(rows), peak));
            const __m512 odd = coarse_exp2(_mm512_sub_ps(_mm512_load_ps(rows + 16), peak));
            pairs[i] = cut_pairs(even, odd);
            total = add_pairs(total, pairs[i]);
        }
        transpose(pairs);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(heads.weights[sub] + i * 32, pairs[i]);
    }
    _mm512_store_ps(heads.total, total);
}

// Values of `count` tokens, pair by pair; zeros where there are none, for a weight of zero times
// what lies there may be NaN. Meanwhile the next keys and values come from memory.
void pair_values(TileHeads& heads, const TokenRows& keys, const TokenRows& values, int64_t dim,
                 int64_t start, int64_t count, int64_t end) {
    for (int64_t t = 0; t < rounded_up(count, kSub); t += 2) {
        const uint16_t* even = t < count ? values.at(start + t) : nullptr;
        const uint16_t* odd = t + 1 < count ? values.at(start + t + 1) : nullptr;
        const int64_t ahead = start + t + kAhead;
        for (int64_t next = ahead; next < ahead + 2 && next < end; ++next) {
            const uint16_t *key = keys.at(next), *value = values.at(next);
            for (int64_t d = 0; d < dim; d += 32) {
                __builtin_prefetch(key + d);
                __builtin_prefetch(value + d);
            }
        }
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i a = even ? _mm512_loadu_si512(even + d) : zero;
            const __m512i b = odd ? _mm512_loadu_si512(odd + d) : zero;
            uint16_t* to = heads.values[t / kSub][d / 16] + t % kSub / 2 * 32;
            _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(a, b));
        }
    }
}

void add_values(TileHeads& heads, int64_t dim, int64_t num_subs) {
    for (int64_t tile = 0; tile < dim / 16; tile += 2) {
        LOAD_TILE(0, heads.out[tile]);
        LOAD_TILE(1, heads.out[tile + 1]);
        for (int64_t sub = 0; sub < num_subs; ++sub) {
            LOAD_TILE(4, heads.weights[sub]);
            LOAD_TILE(5, heads.values[sub][tile]);
            LOAD_TILE(6, heads.values[sub][tile + 1]);
            MULTIPLY_TILES(0, 4, 5);
            MULTIPLY_TILES(1, 4, 6);
        }
        STORE_TILE(0, heads.out[tile]);
        STORE_TILE(1, heads.out[tile + 1]);
    }
}

void start_heads(TileHeads& heads, const uint16_t* query, int64_t num_heads, int64_t dim) {
    std::memset(heads.query, 0, sizeof(heads.query));
    std::memset(heads.out, 0, sizeof(heads.out));
    for (int64_t step = 0; step < dim / 32; ++step) {
        __m512i pairs[16];
        for (int64_t h = 0; h < kHeads; ++h)
            pairs[h] = h < num_heads ? _mm512_loadu_si512(query + h * dim + step * 32)
                                     : _mm512_setzero_si512();
        transpose(pairs);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(heads.query[step] + i * 32, pairs[i]);
    }
    for (int h = 0; h < kHeads; ++h) heads.peak[h] = kLowest, heads.total[h] = 0;
}

void decode_tiles(const DecodeCall& call, const uint16_t* query, int64_t num_heads,
                  const TokenRows& keys, const TokenRows& values, int64_t begin, int64_t end,
                  Part* parts) {
    TileHeads heads;
    const int64_t dim = call.head_dim;
    const __m512 scale = _mm512_set1_ps(call.scale * kLog2E);
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | kFlushDenormals);
    set_shapes();
    start_heads(heads, query, num_heads, dim);
    for (int64_t start = begin; start < end; start += kBatch) {
        const int64_t count = end - start < kBatch ? end - start : kBatch;
        const int64_t num_subs = (count + kSub - 1) / kSub;
        make_scores(heads, keys, dim / 32, start, count);
        settle(heads, dim, count, scale);
        weigh(heads, num_subs);
        pair_values(heads, keys, values, dim, start, count, end);
        add_values(heads, dim, num_subs);
    }
    release_tiles();
    _mm_setcsr(control);
    for (int64_t h = 0; h < num_heads; ++h) {
        parts[h].peak = heads.peak[h];
        parts[h].total = heads.total[h];
        for (int64_t tile = 0; tile < dim / 16; ++tile)
            for (int64_t i = 0; i < 16; ++i)
                parts[h].out[dim_of(tile, i)] = heads.out[tile][h * 16 + i];
    }
}

// Sixteen tokens must lie in one block, whole, and 32 dims in a tile.
void decode_heads_amx(const DecodeCall& call, const uint16_t* query, int64_t num_heads,
                      const TokenRows& keys, const TokenRows& values, int64_t begin, int64_t end,
                      Part* parts) {
    if (num_heads < kMinHeads || call.head_dim % 32 || call.block_size % 16)
        return decode_heads(call, query, num_heads, keys, values, begin, end, parts);
    for (int64_t h = 0; h < num_heads; h += kHeads) {
        const int64_t count = num_heads - h < kHeads ? num_heads - h : kHeads;
        decode_tiles(call, query + h * call.head_dim, count, keys, values, begin, end, parts + h);
    }
}

}  // namespace

void decode_amx(const DecodeCall& call) { decode_all(call, decode_heads_amx); }

}  // namespace glimt

#endif
