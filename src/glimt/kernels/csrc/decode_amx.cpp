// Decoding over a paged context with bfloat16 products.
//
// Reading the cache is what takes the time. So one worker reads all KV heads of its tokens, in the
// order in which they lie in memory, and asks for what comes next all the while: tokens of the same
// chunk, then those of the chunk that it has taken already.
//
// Many query heads of a KV head: sixteen tokens of the cache, as they lie there, are a left tile of
// the first product and a right tile of the second one; nothing is copied. Scores are tokens x
// heads, and the weights are turned round. Few query heads: dims lie in the lanes of a vector. What
// fits neither goes the way of attention_plain.inc.
#if defined(__x86_64__)

#include "attention_tiles.h"
#include "counts.h"
#include "decode_pairs.inc"
#include "denormals.h"

namespace glimt {
namespace {

constexpr int kHeads = 16;
constexpr int kSub = 32;          // tokens that are weighed together
constexpr int kBatch = 64;        // tokens of a KV head between two looks at its output tiles
constexpr int kDistance = 64;     // tokens that are asked for ahead, with tiles
constexpr int kTogether = 32;     // neighbouring tokens that are asked for side by side, at most
constexpr int kStreams = 4;       // places among them: memory gives more than from one
// Beside a step of each kind of work, so many tokens' keys and values of a head are asked for: all
// in all nearly twice as many as are read meanwhile, until the distance is reached.
constexpr int kAskScores = 2, kAskWeights = 2, kAskValues = 4;
constexpr int kGroup = 16;        // tokens of one block that are looked at together
constexpr int kMinTileHeads = 5;  // fewer would leave most of a tile empty
constexpr int kStateSlot = 9;
constexpr int64_t kPieceBytes = 128 << 10;  // of the cache: smaller chunks are not worth it
constexpr int kMostPieces = 4;  // for one worker: they even out what others take of its time

// --- what is read, and in which order ---

// Asks for the keys and values of token after token, all KV heads, up to `distance` tokens before
// they are looked at.
class Ahead {
  public:
    Ahead(const DecodeCall& call, int64_t distance)
        : call_(call), num_lines_(call.num_kv_heads * call.head_dim / kLine), distance_(distance),
          is_dense_(call.token_stride == num_lines_ * kLine),
          is_split_(call.head_dim % (kStreams * kLine) == 0) {}

    // What to go on with after the end of the last span.
    void follow(const Span& next) {
        next_ = next;
        if (!is_done_) return;
        turn();
        if (!is_done_) left_ = distance_ * num_lines_;
    }
    void allow(int64_t num_tokens) {
        if (!is_done_) left_ += num_tokens * num_lines_;
    }
    // Before there is anything to do meanwhile.
    void ask_first(int64_t num_tokens) { ask_across(num_tokens * num_lines_); }
    // Asked for a little more than is allowed, it waits until the next time.
    INLINE void ask(int64_t num_lines) {
        if (num_lines > left_) return;
        if (num_lines > run_) return ask_across(num_lines);
        ask_lines(num_lines);
    }

  private:
    static constexpr int kLine = 32;  // values

    INLINE void ask_lines(int64_t count) {
        is_split_ ? ask_streams<kStreams>(count) : ask_streams<1>(count);
    }
    template <int kNum>
    INLINE void ask_streams(int64_t count) {
        const int64_t each = count / kNum;
        for (int64_t first = 0; first < kNum * part_; first += part_)
            for (int64_t i = first; i < first + each; ++i) {
                __builtin_prefetch(key_ + i * kLine);
                __builtin_prefetch(value_ + i * kLine);
            }
        key_ += each * kLine, value_ += each * kLine;
        run_ -= count, left_ -= count;
    }
    __attribute__((noinline)) void ask_across(int64_t num_lines) {
        while (num_lines > 0) {
            if (run_ == 0) token_ < end_ ? aim() : turn();
            if (is_done_) return;
            const int64_t count = least(num_lines, run_);
            ask_lines(count);
            num_lines -= count;
        }
    }
    void turn() {
        is_done_ = next_.begin == next_.end;
        if (is_done_) {
            left_ = run_ = 0;
            return;
        }
        token_ = next_.begin, end_ = next_.end;
        table_ = call_.block_tables + next_.row * call_.table_stride;
        next_ = {};
        aim();
    }
    // To tokens that lie together.
    void aim() {
        const int64_t block = token_ / call_.block_size, offset = token_ % call_.block_size;
        const int64_t at = table_[block] * call_.block_stride + offset * call_.token_stride;
        key_ = call_.key + at, value_ = call_.value + at;
        const int64_t together = least(least(call_.block_size - offset, kTogether), end_ - token_);
        const int64_t count = is_dense_ ? together : 1;
        run_ = count * num_lines_;
        part_ = is_split_ ? run_ / kStreams : run_;
        token_ += count;
    }

    const DecodeCall& call_;
    const int64_t num_lines_, distance_;
    const bool is_dense_;
    const bool is_split_;  // then all that is asked for are multiples of kStreams
    const uint16_t *key_ = nullptr, *value_ = nullptr;
    const int64_t* table_ = nullptr;
    int64_t token_ = 0, end_ = 0;       // not aimed at yet
    int64_t run_ = 0, left_ = 0;        // lines that lie together, and that may be asked for
    int64_t part_ = 0;                  // from where a stream of the run begins to the next one
    bool is_done_ = true;
    Span next_{};
};

// --- many query heads of a KV head ---

// Up to 16 query heads, and what they have gathered.
struct alignas(64) TileHeads {
    uint16_t query[kMaxDim / 32][kTile];  // tiles of 16 pairs of dims x 16 heads
    float out[kMaxDim / 32][2][256];      // tiles of 16 heads x the even, and the odd dims of 32
    float peak[kHeads], total[kHeads];    // peak: in powers of two, a whole number
};

struct alignas(64) TileSpace {
    float scores[2][kBatch][kHeads];  // of a pass, and of the next one
    // Tiles of 16 heads x 16 tokens: the first 16 of a step of tokens, then the others; for even
    // dims, then for odd ones.
    uint16_t weights[kBatch / kSub][4][kTile];
    uint16_t last_values[kGroup][kMaxDim];  // where fewer than kGroup tokens are left
};

void start_heads(TileHeads& heads, const uint16_t* query, int64_t num_heads, int64_t dim) {
    std::memset(heads.out, 0, sizeof(float) * kHeads * dim);
    transpose_heads(query, num_heads, dim, heads.query);
    _mm512_store_ps(heads.peak, _mm512_set1_ps(kLowest));
    _mm512_store_ps(heads.total, _mm512_setzero_ps());
}

void finish_heads(const TileHeads& heads, int64_t num_heads, int64_t dim, Part* parts) {
    const __m512i first =
        _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t h = 0; h < num_heads; ++h) {
        parts[h].peak = heads.peak[h];
        parts[h].total = heads.total[h];
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512 even = _mm512_load_ps(heads.out[d / 32][0] + h * 16);
            const __m512 odd = _mm512_load_ps(heads.out[d / 32][1] + h * 16);
            _mm512_storeu_ps(parts[h].out + d, _mm512_permutex2var_ps(even, first, odd));
            _mm512_storeu_ps(parts[h].out + d + 16, _mm512_permutex2var_ps(even, second, odd));
        }
    }
}

// A batch of tokens, as one unit of query heads sees it.
struct Pass {
    TileHeads* heads;
    float (*scores)[kHeads];
    TokenRows keys, values;
    int64_t start, count;
    bool is_first;  // of the heads' span
};

template <int kSteps>
INLINE void load_queries(const TileHeads& heads) {
    LOAD_TILE(4, heads.query[0]);
    if (kSteps > 1) LOAD_TILE(5, heads.query[1]);
    if (kSteps > 2) LOAD_TILE(6, heads.query[2]);
    if (kSteps > 3) LOAD_TILE(7, heads.query[3]);
}

// Scores of 32 tokens; the queries are in their tiles.
template <int kSteps>
INLINE void make_scores(const Pass& pass, int64_t t, Ahead& ahead) {
    const int64_t stride = pass.keys.token_stride * int64_t(sizeof(uint16_t));
    const uint16_t* rows = pass.keys.at(pass.start + t);
    const bool is_half = t + kGroup >= pass.count;  // then the others are never looked at
    const uint16_t* others = is_half ? rows : pass.keys.at(pass.start + t + kGroup);
    CLEAR_TILE(0);
    CLEAR_TILE(1);
#define SCORE_STEP(step, query)                        \
    if (kSteps > step) {                               \
        LOAD_TILE_ROWS(2, rows + step * 32, stride);   \
        MULTIPLY_TILES(0, 2, query);                   \
        LOAD_TILE_ROWS(3, others + step * 32, stride); \
        MULTIPLY_TILES(1, 3, query);                   \
        ahead.ask(kAskScores * kSteps);                \
    }
    SCORE_STEP(0, 4)
    SCORE_STEP(1, 5)
    SCORE_STEP(2, 6)
    SCORE_STEP(3, 7)
#undef SCORE_STEP
    STORE_TILE(0, pass.scores[t]);
    STORE_TILE(1, pass.scores[t + kGroup]);
}

// Tokens that the pass has not look as if they were hidden.
void hide_rest(const Pass& pass) {
    for (int64_t t = pass.count; t < up_to(pass.count, kSub); ++t)
        _mm512_store_ps(pass.scores[t], _mm512_set1_ps(kHidden));
}

// Raises the maxima to those of the pass, and scales down what has been gathered.
__attribute__((noinline)) void raise_peak(const Pass& pass, int64_t dim, float scale) {
    TileHeads& heads = *pass.heads;
    const __m512 old = _mm512_load_ps(heads.peak);
    __m512 best = _mm512_set1_ps(kHidden);
    for (int64_t t = 0; t < pass.count; ++t)
        best = _mm512_max_ps(best, _mm512_load_ps(pass.scores[t]));
    best = _mm512_roundscale_ps(_mm512_mul_ps(best, _mm512_set1_ps(scale)), 0x0a);
    best = _mm512_max_ps(best, old);
    const __m512 kept = _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_sub_ps(old, best));
    _mm512_store_ps(heads.peak, best);
    _mm512_store_ps(heads.total, _mm512_mul_ps(_mm512_load_ps(heads.total), kept));
    alignas(64) float factors[kHeads];
    _mm512_store_ps(factors, kept);
    for (int64_t d = 0; d < dim / 32; ++d)
        for (int h = 0; h < 2 * kHeads; ++h) {
            float* row = heads.out[d][0] + h * 16;
            _mm512_store_ps(
                row, _mm512_mul_ps(_mm512_load_ps(row), _mm512_set1_ps(factors[h % kHeads])));
        }
}

// Turned round, the weights of 32 tokens are left tiles. A tile of values as they lie in the cache
// has pairs of neighbouring dims where the product wants pairs of tokens: with a zero beside every
// weight, it gives the even dims or the odd ones.
INLINE void store_weights(__m512i* pairs, uint16_t (*to)[kTile]) {
    transpose(pairs);
    const __m512i odd = _mm512_set1_epi32(int32_t(0xffff0000));
    for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(to[0] + i * 32, _mm512_andnot_si512(odd, pairs[i]));
        _mm512_store_si512(to[1] + i * 32, _mm512_slli_epi32(pairs[i], 16));
        _mm512_store_si512(to[2] + i * 32, _mm512_srli_epi32(pairs[i], 16));
        _mm512_store_si512(to[3] + i * 32, _mm512_and_si512(odd, pairs[i]));
    }
}

// Weights of 32 tokens; false if a score is too far above the maximum for them.
template <int kSteps>
INLINE bool weigh(const Pass& pass, TileSpace& space, float scale, int64_t sub, __m512& total,
                  Ahead& ahead) {
    const Powers powers;
    const __m512 factor = _mm512_set1_ps(scale * kPowerSteps);
    const __m512 from = powers.offset_of(_mm512_load_ps(pass.heads->peak));
    __m512 most = powers.least();
    __m512i pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        const float* scores = pass.scores[sub * kSub + i];
        const __m512 first = _mm512_fmadd_ps(_mm512_load_ps(scores), factor, from);
        const __m512 second =
            _mm512_fmadd_ps(_mm512_load_ps(scores + kGroup * kHeads), factor, from);
        most = _mm512_max_ps(most, _mm512_max_ps(first, second));
        pairs[i] = powers.pairs_of(first, second);
        total = add_pairs(total, pairs[i]);
        ahead.ask(kAskWeights * kSteps);
    }
    store_weights(pairs, space.weights[sub]);
    return !powers.is_beyond(most);
}

// What the values of 16 tokens add to 32 dims, and to 32 more.
#define ADD_GROUP(both)                      \
    LOAD_TILE(4, weights[0]);                \
    LOAD_TILE_ROWS(6, rows, stride);         \
    MULTIPLY_TILES(0, 4, 6);                 \
    LOAD_TILE(5, weights[1]);                \
    MULTIPLY_TILES(1, 5, 6);                 \
    if (both) {                              \
        LOAD_TILE_ROWS(7, rows + 32, stride); \
        MULTIPLY_TILES(2, 4, 7);             \
        MULTIPLY_TILES(3, 5, 7);             \
    }

template <int kSteps>
INLINE void add_values(const Pass& pass, TileSpace& space, Ahead& ahead) {
    TileHeads& heads = *pass.heads;
    const int64_t num_groups = ceil_div(pass.count, kGroup);
    const uint16_t* groups[kBatch / kGroup];
    int64_t strides[kBatch / kGroup];
    for (int64_t g = 0; g < num_groups; ++g) {
        groups[g] = pass.values.at(pass.start + g * kGroup);
        strides[g] = pass.values.token_stride * int64_t(sizeof(uint16_t));
    }
    // A weight of zero times what lies beyond the last token may be NaN.
    if (const int64_t left = pass.count % kGroup) {
        std::memset(space.last_values, 0, sizeof(space.last_values));
        for (int64_t t = 0; t < left; ++t)
            std::memcpy(space.last_values[t], groups[num_groups - 1] + t * pass.values.token_stride,
                        kSteps * 64);
        groups[num_groups - 1] = space.last_values[0];
        strides[num_groups - 1] = sizeof(space.last_values[0]);
    }
#pragma GCC unroll 2
    for (int step = 0; step < kSteps; step += 2) {
        float(*out)[2][256] = &heads.out[step];
        const bool both = step + 1 < kSteps;
        LOAD_TILE(0, out[0][0]);
        LOAD_TILE(1, out[0][1]);
        if (both) {
            LOAD_TILE(2, out[1][0]);
            LOAD_TILE(3, out[1][1]);
        }
        for (int64_t g = 0; g < num_groups; ++g) {
            const uint16_t* rows = groups[g] + step * 32;
            const int64_t stride = strides[g];
            const uint16_t(*weights)[kTile] = &space.weights[g / 2][g % 2 * 2];
            ADD_GROUP(both)
            ahead.ask(kAskValues * kSteps);
        }
        STORE_TILE(0, out[0][0]);
        STORE_TILE(1, out[0][1]);
        if (both) {
            STORE_TILE(2, out[1][0]);
            STORE_TILE(3, out[1][1]);
        }
    }
}
#undef ADD_GROUP

// False if a maximum has to be raised first.
template <int kSteps>
INLINE bool weigh_all(const Pass& pass, const Pass* next, TileSpace& space, float scale,
                      Ahead& ahead) {
    bool is_right = true;
    __m512 total = _mm512_load_ps(pass.heads->total);
    for (int64_t t = 0; t < pass.count; t += kSub) {
        if (next && t < next->count) make_scores<kSteps>(*next, t, ahead);
        is_right &= weigh<kSteps>(pass, space, scale, t / kSub, total, ahead);
    }
    if (is_right) _mm512_store_ps(pass.heads->total, total);
    return is_right;
}

// Goes on while the next pass gets its scores.
template <int kSteps>
void finish_pass(const Pass& pass, const Pass* next, TileSpace& space, float scale,
                 Ahead& ahead) {
    if (pass.count % kSub) hide_rest(pass);
    if (pass.is_first) raise_peak(pass, kSteps * 32, scale);
    if (next) load_queries<kSteps>(*next->heads);
    if (!weigh_all<kSteps>(pass, next, space, scale, ahead)) {
        raise_peak(pass, kSteps * 32, scale);
        weigh_all<kSteps>(pass, nullptr, space, scale, ahead);
    }
    for (int64_t t = up_to(pass.count, kSub); next && t < next->count; t += kSub)
        make_scores<kSteps>(*next, t, ahead);
    add_values<kSteps>(pass, space, ahead);
}

// The passes over a span: batch by batch, all units of query heads.
struct Passes {
    const DecodeCall& call;
    const Span& span;
    TileHeads* units;
    TileSpace& space;
    int64_t of_group, num_units;

    int64_t count() const {
        return ceil_div(span.end - span.begin, kBatch) * num_units;
    }
    Pass at(int64_t i) const {
        const int64_t unit = i % num_units, kv_head = unit / of_group;
        const int64_t start = span.begin + i / num_units * kBatch;
        return {&units[unit],
                space.scores[i % 2],
                cached_rows(call, call.key, nullptr, span.row, kv_head),
                cached_rows(call, call.value, nullptr, span.row, kv_head),
                start,
                least(span.end - start, kBatch),
                i < num_units};
    }
};

// units: what every 16 query heads need
template <int kSteps>
void decode_tiles(const DecodeCall& call, const Span& span, TileHeads* units, Ahead& ahead,
                  Part* parts) {
    constexpr int64_t kDim = kSteps * 32;
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t of_group = ceil_div(group, kHeads);
    const uint16_t* query = call.query + span.row * call.query_stride;
    const float scale = call.scale * kLog2E;
    alignas(64) TileSpace space;
    const Passes passes{call, span, units, space, of_group, call.num_kv_heads * of_group};
    const auto first_of = [&](int64_t u) { return u / of_group * group + u % of_group * kHeads; };
    const auto heads_of = [&](int64_t u) { return least(group - u % of_group * kHeads, kHeads); };
    for (int64_t u = 0; u < passes.num_units; ++u)
        start_heads(units[u], query + first_of(u) * kDim, heads_of(u), kDim);
    set_shapes();
    Pass pass = passes.at(0);
    load_queries<kSteps>(*pass.heads);
    for (int64_t t = 0; t < pass.count; t += kSub) make_scores<kSteps>(pass, t, ahead);
    for (int64_t i = 0; i < passes.count(); ++i) {
        if (i % passes.num_units == 0) ahead.allow(pass.count);
        const bool goes_on = i + 1 < passes.count();
        const Pass next = goes_on ? passes.at(i + 1) : pass;
        finish_pass<kSteps>(pass, goes_on ? &next : nullptr, space, scale, ahead);
        pass = next;
    }
    release_tiles();
    for (int64_t u = 0; u < passes.num_units; ++u)
        finish_heads(units[u], heads_of(u), kDim, parts + first_of(u));
}

// --- few query heads of a KV head ---

// The sums of 16 vectors, in their order.
INLINE __m512 sums_of(const __m512* v) {
    __m512 fours[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]),
                                       _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]),
                                       _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
        const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}

// The rows of up to kGroup tokens: `first` and on; count of them are there.
struct Rows {
    const uint16_t* first;
    int64_t stride, count;

    const uint16_t* at(int64_t i) const { return first + i * stride; }
};

template <int kSteps>
INLINE __m512 scores_of(const uint16_t* query, const Rows& keys, Ahead& ahead) {
    __m512i q[kSteps];
    for (int s = 0; s < kSteps; ++s) q[s] = _mm512_loadu_si512(query + s * 32);
    __m512 sums[kGroup];
#pragma GCC unroll 16
    for (int t = 0; t < kGroup; ++t) {
        const uint16_t* row = keys.at(t);
        sums[t] = _mm512_setzero_ps();
        for (int s = 0; s < kSteps; ++s)
            sums[t] = dot(sums[t], _mm512_loadu_si512(row + s * 32), q[s]);
        if (t % 4) ahead.ask(kSteps);  // with add_rows, more than is read meanwhile
    }
    return sums_of(sums);
}

template <int kSteps>
INLINE void attend_rows(const uint16_t* query, const Rows& keys, const Rows& values, __m512 scale,
                        Part& part, Ahead& ahead) {
    alignas(32) uint16_t weights[kGroup];
    weigh_part<kSteps>(part, scores_of<kSteps>(query, keys, ahead), keys.count, scale, weights);
    add_rows<kSteps>(values.first, values.stride, values.count, weights, part.out,
                     [&]() __attribute__((always_inline)) { ahead.ask(kSteps); });
}

template <int kSteps>
void decode_vectors(const DecodeCall& call, const Span& span, Ahead& ahead, Part* parts) {
    constexpr int64_t kDim = kSteps * 32;
    const int64_t group = call.num_heads / call.num_kv_heads;
    const uint16_t* query = call.query + span.row * call.query_stride;
    const __m512 scale = _mm512_set1_ps(call.scale * kLog2E);
    for (int64_t h = 0; h < call.num_heads; ++h) parts[h].clear();
    const TokenRows keys = cached_rows(call, call.key, nullptr, span.row, 0);
    const TokenRows values = cached_rows(call, call.value, nullptr, span.row, 0);
    for (int64_t start = span.begin; start < span.end; start += kGroup) {
        const int64_t count = least(span.end - start, kGroup);
        ahead.allow(count);
        Rows key_rows{keys.at(start), call.token_stride, count};
        Rows value_rows{values.at(start), call.token_stride, count};
        for (int64_t h = 0; h < call.num_heads; ++h) {
            attend_rows<kSteps>(query + h * kDim, key_rows, value_rows, scale, parts[h], ahead);
            if ((h + 1) % group) continue;
            key_rows.first += call.head_stride, value_rows.first += call.head_stride;
        }
    }
    for (int64_t h = 0; h < call.num_heads; ++h) put_in_order(parts[h].out, kDim);
}

// --- the call ---

struct TileDecode {
    const DecodeCall* call;
    Part* parts;       // [num_rows, num_chunks, num_heads]
    TileHeads* units;  // of every worker
    int64_t units_per_worker;
    int64_t num_chunks, chunk_tokens;
    int64_t next;  // the chunk that nobody has taken yet
    void (*decode_span)(const TileDecode&, const Span&, TileHeads* units, Ahead&);

    bool has_few_heads() const { return call->num_heads / call->num_kv_heads < kMinTileHeads; }
    int64_t distance() const { return has_few_heads() ? 2 * kGroup : kDistance; }
    int64_t chunks_of(int64_t num_tokens) const { return ceil_div(num_tokens, chunk_tokens); }
};

// The next chunk that has tokens; an empty span at the end.
Span take(TileDecode& all) {
    for (;;) {
        const int64_t item = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED);
        const int64_t row = item / all.num_chunks, chunk = item % all.num_chunks;
        if (row >= all.call->num_rows) return {};
        const int64_t begin = chunk * all.chunk_tokens, length = all.call->context_lens[row];
        const int64_t end = least(begin + all.chunk_tokens, length);
        if (begin < end) return {row, chunk, begin, end};
    }
}

// The output of a row's query head: chunks are weighed by what their maxima say.
void merge_parts(const TileDecode& all, int64_t row, int64_t head) {
    const DecodeCall& call = *all.call;
    const int64_t num_used = all.chunks_of(call.context_lens[row]), stride = call.num_heads;
    Part* parts = all.parts + row * all.num_chunks * stride + head;
    float peak = kLowest;
    for (int64_t c = 0; c < num_used; ++c)
        peak = parts[c * stride].peak > peak ? parts[c * stride].peak : peak;
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < num_used; ++c) {
        Part& part = parts[c * stride];
        const __m512 share = coarse_exp2(_mm512_set1_ps(part.peak - peak));
        total = _mm512_fmadd_ps(share, _mm512_set1_ps(part.total), total);
        part.share = _mm512_cvtss_f32(share);
    }
    const __mmask16 sees = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 whole = _mm512_maskz_div_ps(sees, _mm512_set1_ps(1), total);
    uint16_t* out = call.out + row * call.out_stride + head * call.head_dim;
    for (int64_t d = 0; d < call.head_dim; d += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < num_used; ++c) {
            const Part& part = parts[c * stride];
            sum = _mm512_fmadd_ps(_mm512_set1_ps(part.share), _mm512_loadu_ps(part.out + d), sum);
        }
        _mm256_storeu_si256((__m256i*)(out + d),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, whole)));
    }
}

template <int kSteps>
void decode_span(const TileDecode& all, const Span& span, TileHeads* units, Ahead& ahead) {
    const DecodeCall& call = *all.call;
    Part* parts = all.parts + (span.row * all.num_chunks + span.chunk) * call.num_heads;
    if (all.has_few_heads()) return decode_vectors<kSteps>(call, span, ahead, parts);
    decode_tiles<kSteps>(call, span, units, ahead, parts);
}

void tile_decode_body(void* context, int worker, int num_workers) {
    TileDecode& all = *static_cast<TileDecode*>(context);
    const DecodeCall& call = *all.call;
    const FlushDenormals flush;
    TileHeads* units = all.units + worker * all.units_per_worker;
    Ahead ahead(call, all.distance());
    Span span = take(all);
    ahead.follow(span);
    if (!all.has_few_heads()) ahead.ask_first(kSub);
    while (span.begin < span.end) {
        const Span next = take(all);
        ahead.follow(next);
        all.decode_span(all, span, units, ahead);
        for (int64_t h = 0; all.num_chunks == 1 && h < call.num_heads; ++h)
            merge_parts(all, span.row, h);
        span = next;
    }
    if (all.num_chunks > 1) wait_for_all();
    for (int64_t i = worker; i < call.num_rows * call.num_heads; i += num_workers)
        if (all.num_chunks > 1 || call.context_lens[i / call.num_heads] == 0)
            merge_parts(all, i / call.num_heads, i % call.num_heads);
}

// So many tokens that a worker has a few chunks, if there is enough to read. They are of all rows
// together, or a large batch would merge as many chunks of each: so the bits of a row hang on how
// many tokens the others have.
int64_t chunk_of(const DecodeCall& call) {
    int64_t num_tokens = 0;
    for (int64_t row = 0; row < call.num_rows; ++row) num_tokens += call.context_lens[row];
    const int64_t token_bytes = call.num_kv_heads * call.head_dim * 2 * int64_t(sizeof(uint16_t));
    const int64_t pieces = num_tokens * token_bytes / num_workers() / kPieceBytes;
    const int64_t most = pieces < 1 ? 1 : pieces > kMostPieces ? kMostPieces : pieces;
    return up_to(ceil_div(num_tokens, num_workers() * most), kGroup);
}

void decode_all_tiles(const DecodeCall& call) {
    TileDecode all{};
    all.call = &call;
    int64_t longest = 0;
    for (int64_t row = 0; row < call.num_rows; ++row)
        longest = call.context_lens[row] > longest ? call.context_lens[row] : longest;
    all.chunk_tokens = chunk_of(call);
    all.num_chunks = longest > all.chunk_tokens ? all.chunks_of(longest) : 1;
    const int64_t group = call.num_heads / call.num_kv_heads;
    all.units_per_worker = call.num_kv_heads * ceil_div(group, kHeads);
    const int64_t num_parts = call.num_rows * all.num_chunks * call.num_heads;
    const int64_t num_units = all.has_few_heads() ? 1 : num_workers() * all.units_per_worker;
    all.parts = static_cast<Part*>(scratch(kScratchSlot, num_parts * int64_t(sizeof(Part))));
    all.units =
        static_cast<TileHeads*>(scratch(kStateSlot, num_units * int64_t(sizeof(TileHeads))));
    all.decode_span = call.head_dim == 32   ? decode_span<1>
                      : call.head_dim == 64 ? decode_span<2>
                      : call.head_dim == 96 ? decode_span<3>
                                            : decode_span<4>;
    run_parallel(tile_decode_body, &all);
}

}  // namespace

// Sixteen tokens must lie in one block, whole, 32 dims in a tile, and KV heads side by side.
void decode_amx(const DecodeCall& call) {
    if (call.key_scales) return decode_avx512(call);
    if (call.head_dim % 32 || call.block_size % kGroup || call.head_stride != call.head_dim)
        return decode_all(call);
    decode_all_tiles(call);
}

}  // namespace glimt

#endif
