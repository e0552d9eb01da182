// Decoding over a paged context by dot products of pairs of bfloat16: for processors with
// AVX512_BF16 and no tiles.
//
// Reading the cache is what takes the time. So one worker reads all KV heads of its tokens, in the
// order in which they lie in memory, and beside every step of work asks for as much of what comes
// next: tokens of the same chunk, then those of the chunk that is likely its next one.
//
// Many query heads of a KV head lie in the lanes for the scores: pairs of a key's dims are
// broadcast as they lie in the cache. For the second product dims lie in the lanes, pairs of
// tokens side by side, and the weights are broadcast. Few query heads: dims in the lanes for both.
#if defined(__AVX512BF16__)

#include "counts.h"
#include "decode_pairs.inc"
#include "denormals.h"

namespace glimt {
namespace {

constexpr int kHeads = 16;
constexpr int kPanel = 8;         // tokens of one block that are looked at together
constexpr int kMinHeads = 5;      // fewer would leave most lanes empty
constexpr int kStep = 64;         // tokens of a KV head between two looks at its outputs
constexpr int kLine = 32;         // values of a cache line
constexpr int kUnitSlot = 9;
constexpr int64_t kLeastBytes = 128 << 10;  // of the cache: smaller chunks are not worth it

// --- what is read, and what next ---

Span span_of(const Decode& all, int64_t item) {
    const int64_t row = item / all.num_chunks, chunk = item % all.num_chunks;
    if (row >= all.call->num_rows) return {};
    const int64_t tokens = all.chunk_tokens(row), length = all.call->context_lens[row];
    const int64_t begin = chunk * tokens;
    if (begin >= length) return {row, chunk, 0, 0};
    return {row, chunk, begin, least(begin + tokens, length)};
}

int64_t num_items(const Decode& all) { return all.call->num_rows * all.num_chunks; }

// The keys and values of kPanel tokens, all KV heads: they lie together.
struct Panel {
    const uint16_t *keys = nullptr, *values = nullptr;

    Panel() = default;
    Panel(const DecodeCall& call, int64_t row, int64_t token) {
        const int64_t block = call.block_tables[row * call.table_stride + token / call.block_size];
        const int64_t at =
            block * call.block_stride + token % call.block_size * call.token_stride;
        keys = place(call.key, call, at), values = place(call.value, call, at);
    }

  private:
    static const uint16_t* place(const uint16_t* cache, const DecodeCall& call, int64_t at) {
        if (!call.key_scales) return cache + at;
        return reinterpret_cast<const uint16_t*>(reinterpret_cast<const int8_t*>(cache) + at);
    }
};

// What to ask for beside the work on the panel `distance` tokens before.
Panel panel_ahead(const Decode& all, const Span& span, int64_t token) {
    if (token < span.end) return {*all.call, span.row, token};
    const Span next = span_of(all, __atomic_load_n(&all.next, __ATOMIC_RELAXED));
    const int64_t past = up_to(span.end - span.begin, kPanel);
    const int64_t at = next.begin + token - span.begin - past;
    return at < next.end ? Panel(*all.call, next.row, at) : Panel();
}

template <_mm_hint kCache>
INLINE void ask(const uint16_t* from, int64_t line) {
    _mm_prefetch(reinterpret_cast<const char*>(from + line * kLine), kCache);
}

// Keys and values of one KV head in int8, widened: what follows then knows of bfloat16 only.
struct alignas(64) WidePanel {
    uint16_t keys[kPanel][kMaxDim], values[kPanel][kMaxDim];
};

template <int kSteps>
INLINE void widen_to_pairs(Int8Row row, uint16_t* to) {
    const __m512 scale = _mm512_set1_ps(row.scale);
    const auto wide = [&](int64_t d) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.values + d));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
    };
    for (int64_t d = 0; d < kSteps * 32; d += 32)
        _mm512_store_si512(to + d, (__m512i)_mm512_cvtne2ps_pbh(wide(d + 16), wide(d)));
}

template <int kSteps>
INLINE Panel widened(const TokenRows& keys, const TokenRows& values, int64_t start, int64_t count,
                     WidePanel& to) {
    for (int64_t t = 0; t < count; ++t) {
        widen_to_pairs<kSteps>(keys.int8_at(start + t), to.keys[t]);
        widen_to_pairs<kSteps>(values.int8_at(start + t), to.values[t]);
    }
    Panel panel;
    panel.keys = to.keys[0], panel.values = to.values[0];
    return panel;
}

// --- many query heads of a KV head ---

// Up to 16 query heads, and what they have gathered.
struct alignas(64) Heads {
    uint32_t query[kMaxDim / 2][kHeads];  // pairs of dims
    float out[kHeads][kMaxDim];           // in the order of unpacked values
    float peak[kHeads], total[kHeads];    // peak: in powers of two
};

struct alignas(64) Space {
    float scores[kStep][kHeads];
    uint32_t weights[kStep / 2][kHeads];  // pairs of tokens
};

// A step of tokens, and what to ask for beside it: of the KV head's share of every panel.
struct Step {
    Panel panels[kStep / kPanel], ahead[kStep / kPanel];
    int64_t count, stride;
};

void start_heads(Heads& heads, const uint16_t* query, int64_t num_heads, int64_t dim) {
    std::memset(heads.out, 0, sizeof(heads.out));
    transpose_heads(query, num_heads, dim, heads.query);
    _mm512_store_ps(heads.peak, _mm512_set1_ps(kLowest));
    _mm512_store_ps(heads.total, _mm512_setzero_ps());
}

void finish_heads(const Heads& heads, int64_t num_heads, int64_t dim, Part* parts) {
    for (int64_t h = 0; h < num_heads; ++h) {
        parts[h].peak = heads.peak[h];
        parts[h].total = heads.total[h];
        std::memcpy(parts[h].out, heads.out[h], sizeof(float) * dim);
        put_in_order(parts[h].out, dim);
    }
}

template <int kSteps>
INLINE void score_panel(const Heads& heads, const uint16_t* keys, int64_t stride,
                        const uint16_t* ahead, float (*scores)[kHeads]) {
    __m512 sums[kPanel];
#pragma GCC unroll 8
    for (int t = 0; t < kPanel; ++t) sums[t] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < kSteps * 16; pair += 2) {
        if (ahead) ask<_MM_HINT_T0>(ahead, pair / 2);
#pragma GCC unroll 2
        for (int64_t i = pair; i < pair + 2; ++i) {
            const __m512i query = _mm512_load_si512(heads.query[i]);
#pragma GCC unroll 8
            for (int t = 0; t < kPanel; ++t)
                sums[t] = dot(sums[t], query, word_at(keys + t * stride + 2 * i));
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kPanel; ++t) _mm512_store_ps(scores[t], sums[t]);
}

__attribute__((noinline)) void raise_peak(Heads& heads, __m512 best, int64_t dim) {
    alignas(64) float kept[kHeads];
    _mm512_store_ps(kept, coarse_exp2(_mm512_sub_ps(_mm512_load_ps(heads.peak), best)));
    _mm512_store_ps(heads.peak, best);
    _mm512_store_ps(heads.total, _mm512_mul_ps(_mm512_load_ps(heads.total), _mm512_load_ps(kept)));
    for (int h = 0; h < kHeads; ++h)
        for (int64_t d = 0; d < dim; d += 16) {
            float* at = heads.out[h] + d;
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(kept[h])));
        }
}

// Weights of the step; the outputs are scaled down only if the maximum has grown by much.
void weigh(Heads& heads, Space& space, int64_t count, int64_t dim, float scale_) {
    const __m512 scale = _mm512_set1_ps(scale_), old = _mm512_load_ps(heads.peak);
    for (int64_t t = count; t < up_to(count, kPanel); ++t)
        _mm512_store_ps(space.scores[t], _mm512_set1_ps(kHidden));
    __m512 best[2] = {_mm512_set1_ps(kHidden), _mm512_set1_ps(kHidden)};
    for (int64_t t = 0; t < count; t += 2) {
        best[0] = _mm512_max_ps(best[0], _mm512_load_ps(space.scores[t]));
        best[1] = _mm512_max_ps(best[1], _mm512_load_ps(space.scores[t + 1]));
    }
    const __m512 more = _mm512_mul_ps(_mm512_max_ps(best[0], best[1]), scale);
    if (_mm512_cmp_ps_mask(more, _mm512_add_ps(old, _mm512_set1_ps(kSlack)), _CMP_GT_OQ))
        raise_peak(heads, _mm512_max_ps(more, old), dim);
    const __m512 peak = _mm512_load_ps(heads.peak);
    __m512 total = _mm512_load_ps(heads.total);
    for (int64_t t = 0; t < count; t += 2) {
        const __m512 even = _mm512_fmsub_ps(_mm512_load_ps(space.scores[t]), scale, peak);
        const __m512 odd = _mm512_fmsub_ps(_mm512_load_ps(space.scores[t + 1]), scale, peak);
        const __m512i pairs = cut_pairs(coarse_exp2(even), coarse_exp2(odd));
        _mm512_store_si512(space.weights[t / 2], pairs);
        total = add_pairs(total, pairs);
    }
    _mm512_store_ps(heads.total, total);
}

// Half of the heads, from `first` on, and 32 dims. offset: of the values in a panel
INLINE void add_values(Heads& heads, const Space& space, const Step& step, int first, int64_t dim,
                       int64_t offset, int64_t ahead) {
    constexpr int kHalf = kHeads / 2;
    __m512 sums[kHalf][2];
#pragma GCC unroll 8
    for (int h = 0; h < kHalf; ++h) {
        sums[h][0] = _mm512_load_ps(heads.out[first + h] + dim);
        sums[h][1] = _mm512_load_ps(heads.out[first + h] + dim + 16);
    }
    const uint32_t* weights = space.weights[0] + first;
    for (int64_t t = 0; t < step.count; t += kPanel) {
        const uint16_t* row = step.panels[t / kPanel].values + offset + dim;
        const uint16_t* next = step.ahead[t / kPanel].values;
        const int64_t count = least(step.count - t, kPanel);
        for (int64_t i = 0; i < count; i += 2, row += 2 * step.stride, weights += kHeads) {
            if (next) ask<_MM_HINT_T0>(next + ahead, i / 2);
            __m512i pairs[2];
            unpack(row, step.stride, i + 1 < count, pairs);
#pragma GCC unroll 8
            for (int h = 0; h < kHalf; ++h) {
                const __m512i weight = _mm512_set1_epi32(int32_t(weights[h]));
                sums[h][0] = dot(sums[h][0], pairs[0], weight);
                sums[h][1] = dot(sums[h][1], pairs[1], weight);
            }
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHalf; ++h) {
        _mm512_store_ps(heads.out[first + h] + dim, sums[h][0]);
        _mm512_store_ps(heads.out[first + h] + dim + 16, sums[h][1]);
    }
}

// offset: of the KV head among a token's values; ahead: of the share of a panel to ask for
template <int kSteps>
void attend_heads(Heads& heads, int64_t num_heads, Space& space, const Step& step, int64_t offset,
                  int64_t ahead, float scale) {
    for (int64_t t = 0; t < step.count; t += kPanel) {
        const Panel &panel = step.panels[t / kPanel], &next = step.ahead[t / kPanel];
        score_panel<kSteps>(heads, panel.keys + offset, step.stride,
                            next.keys ? next.keys + ahead : nullptr, space.scores + t);
    }
    weigh(heads, space, step.count, kSteps * 32, scale);
    for (int s = 0; s < kSteps; ++s)
        for (int half = 0; half < 2; ++half) {
            if (half * kHeads / 2 >= num_heads) break;
            add_values(heads, space, step, half * kHeads / 2, s * 32, offset,
                       ahead + (s * 2 + half) * kPanel / 2 * kLine);
        }
}

// A step of one KV head in int8, widened.
struct WideStep {
    WidePanel panels[kStep / kPanel];
    Step step;
};

// What the widened step asks for ahead it asks for here: it has half as many lines.
template <int kSteps>
void widen_step(const Chunk& one, int64_t kv_head, int64_t start, const Step& step,
                WideStep& wide) {
    constexpr int64_t kLines = kPanel * kSteps / 2;
    wide.step.count = step.count, wide.step.stride = kMaxDim;
    for (int64_t t = 0; t < step.count; t += kPanel) {
        const Panel& next = step.ahead[t / kPanel];
        for (int64_t i = 0; next.keys && i < kLines; ++i) {
            ask<_MM_HINT_T1>(next.keys, kv_head * kLines + i);
            ask<_MM_HINT_T1>(next.values, kv_head * kLines + i);
        }
        const int64_t count = least(step.count - t, kPanel);
        wide.step.panels[t / kPanel] =
            widened<kSteps>(one.keys, one.values, start + t, count, wide.panels[t / kPanel]);
    }
}

// units: of every 16 query heads
template <int kSteps>
void decode_many_heads(const Decode& all, const Span& span, Heads* units) {
    constexpr int64_t kDim = kSteps * 32;
    const DecodeCall& call = *all.call;
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t per_group = ceil_div(group, kHeads);
    const auto heads_of = [&](int64_t i) { return least(group - i * kHeads, kHeads); };
    const auto each_unit = [&](const auto& visit) {
        for (int64_t kv_head = 0; kv_head < call.num_kv_heads; ++kv_head)
            for (int64_t i = 0; i < per_group; ++i)
                visit(units[kv_head * per_group + i], kv_head, i);
    };
    each_unit([&](Heads& heads, int64_t kv_head, int64_t i) {
        const Chunk one(all, span.row, kv_head, span.chunk);
        start_heads(heads, one.query + i * kHeads * kDim, heads_of(i), kDim);
    });
    Space space;
    Step step;
    WideStep wide;
    const bool is_int8 = call.key_scales;
    step.stride = call.token_stride;
    for (int64_t start = span.begin; start < span.end; start += kStep) {
        step.count = least(span.end - start, kStep);
        for (int64_t t = 0; t < step.count; t += kPanel) {
            step.panels[t / kPanel] = Panel(call, span.row, start + t);
            step.ahead[t / kPanel] = panel_ahead(all, span, start + t + kStep);
        }
        each_unit([&](Heads& heads, int64_t kv_head, int64_t i) {
            if (is_int8 && i == 0)
                widen_step<kSteps>(Chunk(all, span.row, kv_head, span.chunk), kv_head, start, step,
                                   wide);
            attend_heads<kSteps>(heads, heads_of(i), space, is_int8 ? wide.step : step,
                                 is_int8 ? 0 : kv_head * kDim, kv_head * kPanel * kDim,
                                 call.scale * kLog2E);
        });
    }
    each_unit([&](const Heads& heads, int64_t kv_head, int64_t i) {
        const Chunk one(all, span.row, kv_head, span.chunk);
        finish_heads(heads, heads_of(i), kDim, one.parts + i * kHeads);
    });
}

// --- few query heads of a KV head ---

constexpr int kFewAhead = 2 * kPanel;  // tokens

// The sums of 8 vectors, in their order, then zeros.
INLINE __m512 sums_of(const __m512* vectors) {
    __m256 halves[8];
    for (int i = 0; i < 8; ++i)
        halves[i] = _mm256_add_ps(_mm512_castps512_ps256(vectors[i]),
                                  _mm512_extractf32x8_ps(vectors[i], 1));
    const auto fours = [&](const __m256* from) {
        return _mm256_hadd_ps(_mm256_hadd_ps(from[0], from[1]), _mm256_hadd_ps(from[2], from[3]));
    };
    const __m256 a = fours(halves), b = fours(halves + 4);
    return _mm512_zextps256_ps512(_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                                                _mm256_permute2f128_ps(a, b, 0x31)));
}

template <int kSteps>
INLINE __m512 scores_of(const uint16_t* query, const uint16_t* keys, int64_t stride) {
    __m512 sums[kPanel];
#pragma GCC unroll 8
    for (int t = 0; t < kPanel; ++t) {
        sums[t] = _mm512_setzero_ps();
        for (int s = 0; s < kSteps; ++s)
            sums[t] = dot(sums[t], _mm512_loadu_si512(query + s * 32),
                          _mm512_loadu_si512(keys + t * stride + s * 32));
    }
    return sums_of(sums);
}

// One query head and the first `count` tokens of a panel.
template <int kSteps>
INLINE void attend_panel(Part& part, const uint16_t* query, const Panel& panel, int64_t offset,
                         int64_t stride, int64_t count, __m512 scale) {
    alignas(32) uint16_t weights[16];
    weigh_part<kSteps>(part, scores_of<kSteps>(query, panel.keys + offset, stride), count, scale,
                       weights);
    add_rows<kSteps>(panel.values + offset, stride, count, weights, part.out, [] {});
}

// units: none are needed
template <int kSteps>
void decode_few_heads(const Decode& all, const Span& span, Heads*) {
    constexpr int64_t kDim = kSteps * 32;
    const DecodeCall& call = *all.call;
    const int64_t group = call.num_heads / call.num_kv_heads;
    const __m512 scale = _mm512_set1_ps(call.scale * kLog2E);
    const bool is_int8 = call.key_scales;
    const int64_t lines = kPanel * kSteps / (is_int8 ? 2 : 1);  // of a head in a panel
    WidePanel wide;
    const auto each_head = [&](const auto& visit) {
        for (int64_t kv_head = 0; kv_head < call.num_kv_heads; ++kv_head) {
            const Chunk one(all, span.row, kv_head, span.chunk);
            visit(one, kv_head);
        }
    };
    each_head([&](const Chunk& one, int64_t) {
        for (int64_t h = 0; h < group; ++h) one.parts[h].clear();
    });
    for (int64_t start = span.begin; start < span.end; start += kPanel) {
        const int64_t count = least(span.end - start, kPanel);
        const Panel panel(call, span.row, start);
        const Panel next = panel_ahead(all, span, start + kFewAhead);
        each_head([&](const Chunk& one, int64_t kv_head) {
            for (int64_t i = 0; next.keys && i < lines; ++i) {
                // The rows of a head lie so far apart that they would drive each other out of L1.
                ask<_MM_HINT_T1>(next.keys, kv_head * lines + i);
                ask<_MM_HINT_T1>(next.values, kv_head * lines + i);
            }
            const Panel here =
                is_int8 ? widened<kSteps>(one.keys, one.values, start, count, wide) : panel;
            for (int64_t h = 0; h < group; ++h)
                attend_panel<kSteps>(one.parts[h], one.query + h * kDim, here,
                                     is_int8 ? 0 : kv_head * kDim,
                                     is_int8 ? kMaxDim : call.token_stride, count, scale);
        });
    }
    each_head([&](const Chunk& one, int64_t) {
        for (int64_t h = 0; h < group; ++h) put_in_order(one.parts[h].out, kDim);
    });
}

// --- the call ---

struct PairDecode {
    Decode all;
    Heads* units;  // of every worker
    int64_t units_per_worker;
    void (*decode_span)(const Decode&, const Span&, Heads* units);
};

void pair_decode_body(void* context, int worker, int num_workers) {
    PairDecode& pairs = *static_cast<PairDecode*>(context);
    Decode& all = pairs.all;
    const DecodeCall& call = *all.call;
    const FlushDenormals flush;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&all.next, 1, __ATOMIC_RELAXED);
        if (item >= num_items(all)) break;
        const Span span = span_of(all, item);
        if (span.begin < span.end)
            pairs.decode_span(all, span, pairs.units + worker * pairs.units_per_worker);
    }
    wait_for_all();
    for (int64_t i = worker; i < call.num_rows * call.num_heads; i += num_workers)
        merge_chunks(all, i / call.num_heads, i % call.num_heads);
}

template <int kSteps>
void decode_pairs(const DecodeCall& call) {
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t token_bytes = 2 * call.token_stride * (call.key_scales ? 1 : 2);
    PairDecode pairs{};
    pairs.all = start_decode(call, 1, up_to(kLeastBytes / token_bytes, kTokens));
    if (group < kMinHeads) {
        pairs.decode_span = decode_few_heads<kSteps>;
    } else {
        pairs.decode_span = decode_many_heads<kSteps>;
        pairs.units_per_worker = call.num_kv_heads * ceil_div(group, kHeads);
        pairs.units = static_cast<Heads*>(scratch(
            kUnitSlot, num_workers() * pairs.units_per_worker * int64_t(sizeof(Heads))));
    }
    run_products(num_products(call), pair_decode_body, &pairs);
}

}  // namespace

// A panel must lie in one block, 32 dims in a vector, and tokens and their KV heads side by side.
void decode_avx512_bf16(const DecodeCall& call) {
    const bool is_dense = call.head_stride == call.head_dim &&
                          call.token_stride == call.head_stride * call.num_kv_heads;
    if (!is_dense || call.block_size % kPanel) return decode_all(call);
    switch (call.head_dim) {
        case 32: return decode_pairs<1>(call);
        case 64: return decode_pairs<2>(call);
        case 96: return decode_pairs<3>(call);
        case 128: return decode_pairs<4>(call);
        default: return decode_all(call);
    }
}

}  // namespace glimt

#endif
