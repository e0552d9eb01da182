// Matrix products with AVX-512: weights are streamed once for every 8 rows of x.
//
// Four blocks are read side by side: four streams reach the memory's speed where one does not. With
// more rows two blocks and 8 rows fill the registers. A weight is read once, widened once, and
// multiplied with every row of the group; x is laid out beforehand the way the formula wants it.
#if defined(__x86_64__)
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "counts.h"
#include "denormals.h"
#include "dots.inc"
#include "epilogue.inc"
#include "mlp.h"
#include "processor.h"
#include "quantise.inc"
#include "threads.h"

namespace glimt {
namespace {

constexpr int kAhead = 2048;      // bytes that the streams are fetched ahead
constexpr int kRowGroup = 8;      // rows that share one pass over a weight
// Rows laid out at a time: many, for they read the weight together, but they must stay cached.
constexpr int kLeastRows = 128, kMostRows = 512;
constexpr int64_t kLaidBytes = 4 << 20;
constexpr int kCached = 1 << 19;  // bytes of blocks that stay cached while the next ones come
constexpr int kSmall = 1 << 16;   // values of x below which one thread lays them out

// How x is laid out: the formulas below say which they take.
enum class Rows {
    kFloats,      // float, in order
    kPairs,       // bfloat16, in order
    kHalfPairs,   // bfloat16, of every 8: 0 2 4 6 1 3 5 7, and sums of every group (kInt4)
    kGroupFloats, // float, in order, and sums of every group (kInt4)
    kBytes,       // round(x / scale) + 128 as uint8, and a scale for the row
    kGroupBytes,  // round(x / scale) as int8, a scale and a sum for every group
};

struct Product {
    const LinearCall* call;
    Rows layout;
    int64_t num_groups;  // of k, kInt4 only
    int64_t first_row, num_rows;
    uint8_t* rows;       // row r of the part begins at r * row_bytes
    int64_t row_bytes;
    float* scales;       // [rows][max(1, num_groups)]: of a row or of its groups
    float* sums;         // [rows][num_groups]: of the rounded values times scale; of x itself
    int32_t* whole_sums; // [rows][num_groups]: of the rounded values, times -8
};

int64_t bytes_per_value(Rows layout) {
    switch (layout) {
        case Rows::kFloats:
        case Rows::kGroupFloats: return 4;
        case Rows::kPairs:
        case Rows::kHalfPairs: return 2;
        default: return 1;
    }
}

// --- laying x out ---

void lay_floats(int32_t element, const uint16_t* x, int64_t k, int64_t padded, float* out) {
    for (int64_t i = 0; i < padded; i += 16)
        _mm512_storeu_ps(out + i, load_as(element, x + i, first_lanes(k - i)));
}

void lay_pairs(const uint16_t* x, int64_t k, int64_t padded, uint16_t* out) {
    std::memcpy(out, x, k * sizeof(uint16_t));
    std::memset(out + k, 0, (padded - k) * sizeof(uint16_t));
}

void lay_half_pairs(uint16_t* values, int64_t padded) {
    for (int64_t i = 0; i < padded; i += 8) {
        uint16_t of[8];
        std::memcpy(of, values + i, sizeof(of));
        const uint16_t turned[8] = {of[0], of[2], of[4], of[6], of[1], of[3], of[5], of[7]};
        std::memcpy(values + i, turned, sizeof(of));
    }
}

void sum_groups(const Product& p, const uint16_t* x, float* sums) {
    const int64_t k = p.call->weight->k, group = p.call->weight->group;
    for (int64_t g = 0; g < p.num_groups; ++g) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = g * group; i < (g + 1) * group; i += 16)
            sum = _mm512_add_ps(sum, load_as(p.call->element, x + i, first_lanes(k - i)));
        sums[g] = _mm512_reduce_add_ps(sum);
    }
}

void lay_group_bytes(const Product& p, const uint16_t* x, int64_t row, int8_t* out) {
    const int64_t k = p.call->weight->k, group = p.call->weight->group;
    for (int64_t g = 0; g < p.num_groups; ++g) {
        const int64_t at = row * p.num_groups + g;
        const int64_t begin = least(g * group, k), count = least(group, k - begin);
        int32_t sum;
        const float scale =
            quantise(x + begin, count, group, out + g * group, &sum, p.call->element);
        p.scales[at] = scale;
        p.sums[at] = scale * float(sum);
        p.whole_sums[at] = -8 * sum;
    }
}

void lay_row(const Product& p, int64_t row) {
    const Weight& weight = *p.call->weight;
    const int64_t padded = header_of(weight).k_padded;
    uint8_t* out = p.rows + row * p.row_bytes;
    if (row >= p.num_rows) {  // of a row group that is not full
        std::memset(out, 0, p.row_bytes);
        const int64_t count = std::max(p.num_groups, int64_t(1));
        std::memset(p.scales + row * count, 0, count * sizeof(float));
        std::memset(p.sums + row * count, 0, count * sizeof(float));
        std::memset(p.whole_sums + row * count, 0, count * sizeof(int32_t));
        return;
    }
    const uint16_t* x = p.call->x + (p.first_row + row) * p.call->x_stride;
    float* sums = p.sums + row * p.num_groups;
    switch (p.layout) {
        case Rows::kGroupFloats:
            sum_groups(p, x, sums);
            [[fallthrough]];
        case Rows::kFloats:
            lay_floats(p.call->element, x, weight.k, padded, reinterpret_cast<float*>(out));
            break;
        case Rows::kHalfPairs:
            sum_groups(p, x, sums);
            lay_pairs(x, weight.k, padded, reinterpret_cast<uint16_t*>(out));
            lay_half_pairs(reinterpret_cast<uint16_t*>(out), padded);
            break;
        case Rows::kPairs:
            lay_pairs(x, weight.k, padded, reinterpret_cast<uint16_t*>(out));
            break;
        case Rows::kBytes: {
            int32_t sum;
            p.scales[row] = quantise(x, weight.k, padded, reinterpret_cast<int8_t*>(out), &sum,
                                     p.call->element);
            for (int64_t i = 0; i < padded; ++i) out[i] ^= 0x80;
            break;
        }
        case Rows::kGroupBytes:
            lay_group_bytes(p, x, row, reinterpret_cast<int8_t*>(out));
            break;
    }
}

// --- the formulas: NB blocks by MR rows, out[MR][NB * 16] without the columns' scales of kInt4 ---

#define UNROLL _Pragma("GCC unroll 16")

inline void fetch(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

inline __m512i line_at(const uint8_t* at) { return _mm512_load_si512(at); }

// The blocks that one pass reads, and where the next pass will read on.
struct Streams {
    const uint8_t* lines;  // of the first block
    int64_t block_bytes, num_lines;
    int64_t column;  // of the first block
    bool is_again;   // rows before have read these blocks: they lie in the second-level cache
    template <int NB>
    int64_t ahead(int64_t line) const {  // bytes to what is wanted 2 KB later, or of the next pass
        if (is_again) return NB * block_bytes;
        return line + kAhead / 64 < num_lines ? kAhead
                                              : kAhead + NB * block_bytes - num_lines * 64;
    }
    // Where a line of block b lies; what lies so far ahead is fetched.
    const uint8_t* line(int b, int64_t number, int64_t ahead) const {
        const uint8_t* at = lines + b * block_bytes + number * 64;
        fetch(at + ahead);
        return at;
    }
};

template <typename Value>
inline const Value* row_of(const Product& p, int64_t row) {
    return reinterpret_cast<const Value*>(p.rows + row * p.row_bytes);
}

// A pair of bfloat16, or four bytes, for all columns.
inline __m512i word_at(const void* at) {
    int32_t bits;
    std::memcpy(&bits, at, 4);
    return _mm512_set1_epi32(bits);
}

// How a line of 64 bytes holds two k of 16 columns.
struct Bf16Line {
    __m512 even, odd;
    explicit Bf16Line(const uint8_t* at) {
        const __m512i both = line_at(at), upper = _mm512_set1_epi32(int32_t(0xffff0000));
        even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
    }
};

struct Fp16Line {
    __m512 even, odd;
    explicit Fp16Line(const uint8_t* at) : even(half_at(at)), odd(half_at(at + 32)) {}
};

template <int NB, int MR>
inline void store(const __m512 (&sum)[MR][NB], float* out) {
    UNROLL for (int m = 0; m < MR; ++m)
        UNROLL for (int b = 0; b < NB; ++b)
            _mm512_storeu_ps(out + (m * NB + b) * kBlock, sum[m][b]);
}

// 16-bit weights by float: exact products, summed in float.
template <typename Line>
struct WideFloats {
    static constexpr Rows kLayout = Rows::kFloats;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        __m512 sum[MR][NB] = {};
        const float* x = row_of<float>(p, row);
        const int64_t stride = p.row_bytes / sizeof(float);
        for (int64_t line = 0; line < s.num_lines; ++line) {
            const int64_t ahead = s.ahead<NB>(line);
            UNROLL for (int b = 0; b < NB; ++b) {
                const Line both(s.line(b, line, ahead));
                UNROLL for (int m = 0; m < MR; ++m) {
                    const float* of = x + m * stride + line * 2;
                    sum[m][b] = _mm512_fmadd_ps(both.even, _mm512_set1_ps(of[0]), sum[m][b]);
                    sum[m][b] = _mm512_fmadd_ps(both.odd, _mm512_set1_ps(of[1]), sum[m][b]);
                }
            }
        }
        store<NB, MR>(sum, out);
    }
};

// bfloat16 with the instruction for pairs.
struct Bf16Pairs {
    static constexpr Rows kLayout = Rows::kPairs;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        __m512 sum[MR][NB] = {};
        const uint16_t* x = row_of<uint16_t>(p, row);
        const int64_t stride = p.row_bytes / sizeof(uint16_t);
        for (int64_t line = 0; line < s.num_lines; ++line) {
            const int64_t ahead = s.ahead<NB>(line);
            __m512i both[NB];
            UNROLL for (int b = 0; b < NB; ++b) both[b] = line_at(s.line(b, line, ahead));
            UNROLL for (int m = 0; m < MR; ++m) {
                const __m512i pair = word_at(x + m * stride + line * 2);
                UNROLL for (int b = 0; b < NB; ++b)
                    sum[m][b] = dot_pairs(sum[m][b], both[b], pair);
            }
        }
        store<NB, MR>(sum, out);
    }
};

// Sums of bytes, which byte_as_float has made 2^24 times as large.
template <int NB, int MR>
inline void store_scaled(const Product& p, const Streams& s, const __m512 (&sum)[MR][NB],
                         float* out) {
    const float* scales = scales_of(*p.call->weight) + s.column;
    UNROLL for (int b = 0; b < NB; ++b) {
        const __m512 scale =
            _mm512_mul_ps(_mm512_loadu_ps(scales + b * kBlock), _mm512_set1_ps(kPerByte));
        UNROLL for (int m = 0; m < MR; ++m)
            _mm512_storeu_ps(out + (m * NB + b) * kBlock, _mm512_mul_ps(sum[m][b], scale));
    }
}

// int8 by float: every weight is widened, its scale comes last.
struct Int8Floats {
    static constexpr Rows kLayout = Rows::kFloats;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        __m512 sum[MR][NB] = {};
        const float* x = row_of<float>(p, row);
        const int64_t stride = p.row_bytes / sizeof(float);
        for (int64_t line = 0; line < s.num_lines; ++line) {
            const int64_t ahead = s.ahead<NB>(line);
            UNROLL for (int b = 0; b < NB; ++b) {
                const __m512i four = line_at(s.line(b, line, ahead));
                const __m512 wide[4] = {byte_as_float<0>(four), byte_as_float<1>(four),
                                        byte_as_float<2>(four), byte_as_float<3>(four)};
                UNROLL for (int i = 0; i < 4; ++i) {
                    UNROLL for (int m = 0; m < MR; ++m)
                        sum[m][b] = _mm512_fmadd_ps(
                            wide[i], _mm512_set1_ps(x[m * stride + line * 4 + i]), sum[m][b]);
                }
            }
        }
        store_scaled<NB, MR>(p, s, sum, out);
    }
};

// The same with the instruction for pairs of bfloat16.
struct Int8Pairs {
    static constexpr Rows kLayout = Rows::kPairs;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        __m512 sum[MR][NB] = {};
        const uint16_t* x = row_of<uint16_t>(p, row);
        const int64_t stride = p.row_bytes / sizeof(uint16_t);
        for (int64_t line = 0; line < s.num_lines; ++line) {
            const int64_t ahead = s.ahead<NB>(line);
            UNROLL for (int b = 0; b < NB; ++b) {
                const __m512i four = line_at(s.line(b, line, ahead));
                const __m512i first = byte_pairs<0>(four), second = byte_pairs<2>(four);
                UNROLL for (int m = 0; m < MR; ++m) {
                    const uint16_t* of = x + m * stride + line * 4;
                    sum[m][b] = dot_pairs(sum[m][b], first, word_at(of));
                    sum[m][b] = dot_pairs(sum[m][b], second, word_at(of + 2));
                }
            }
        }
        store_scaled<NB, MR>(p, s, sum, out);
    }
};

// int8 by x + 128: the dot product wants one unsigned side, and 128 times the column's sum goes.
struct Int8Bytes {
    static constexpr Rows kLayout = Rows::kBytes;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        __m512i sum[MR][NB] = {};
        const uint8_t* x = row_of<uint8_t>(p, row);
        for (int64_t line = 0; line < s.num_lines; ++line) {
            const int64_t ahead = s.ahead<NB>(line);
            __m512i four[NB];
            UNROLL for (int b = 0; b < NB; ++b) four[b] = line_at(s.line(b, line, ahead));
            UNROLL for (int m = 0; m < MR; ++m) {
                const __m512i quad = word_at(x + m * p.row_bytes + line * 4);
                UNROLL for (int b = 0; b < NB; ++b)
                    sum[m][b] = dot_bytes(sum[m][b], quad, four[b]);
            }
        }
        const float* scales = scales_of(*p.call->weight) + s.column;
        const int32_t* sums = sums_of(*p.call->weight) + s.column;
        UNROLL for (int b = 0; b < NB; ++b) {
            const __m512i shift = _mm512_slli_epi32(_mm512_loadu_si512(sums + b * kBlock), 7);
            const __m512 scale = _mm512_loadu_ps(scales + b * kBlock);
            UNROLL for (int m = 0; m < MR; ++m) {
                const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[m][b], shift));
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(p.scales[row + m]));
                _mm512_storeu_ps(out + (m * NB + b) * kBlock, _mm512_mul_ps(value, both));
            }
        }
    }
};

// What the kInt4 formulas share: a group's scales, and the end of a group. They sum q - 8, so that
// symmetric weights have nothing to add; else (offset + 8 scale) times the sum of x comes on top.
struct Groups {
    const Product& p;
    const Streams& s;
    const PackedHeader& header;
    int64_t group_bytes, group_lines;
    Groups(const Product& product, const Streams& streams)
        : p(product), s(streams), header(header_of(*product.call->weight)) {
        group_bytes = header.has_offsets ? 64 : 32;
        group_lines = product.call->weight->group / 8;
    }
    // 16 groups are 512 bytes: their scales are wanted as early as the nibbles.
    template <int NB>
    const uint8_t* scales(int b, int64_t g) const {
        const uint8_t* at = s.lines - header.nibbles_offset + b * s.block_bytes + g * group_bytes;
        const int64_t next_pass = NB * s.block_bytes;
        int64_t ahead = 16 * group_bytes;
        if (g + 16 >= p.num_groups) ahead += next_pass - p.num_groups * group_bytes;
        fetch(at + (s.is_again ? next_pass : ahead));
        return at;
    }
    // offset + 8 scale, where there are offsets of their own
    __m512 rest(const uint8_t* scales, __m512 scale) const {
        if (!header.has_offsets) return _mm512_setzero_ps();
        return _mm512_fmadd_ps(_mm512_set1_ps(8.0f), scale, half_at(scales + 32));
    }
    // What a group adds to a row's columns. at: of both, in scales and sums; factor: of the sum
    void add(int64_t at, __m512 sum, __m512 factor, __m512 rest, float* to) const {
        __m512 value = _mm512_fmadd_ps(sum, factor, _mm512_loadu_ps(to));
        if (header.has_offsets)
            value = _mm512_fmadd_ps(rest, _mm512_set1_ps(p.sums[at]), value);
        _mm512_storeu_ps(to, value);
    }
};

// kInt4 by int8: dot products within a group are whole numbers.
struct Int4Bytes {
    static constexpr Rows kLayout = Rows::kGroupBytes;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        constexpr int kParts = NB * MR <= 4 ? 2 : 1;  // short chains where few run side by side
        const Groups groups(p, s);
        const __m512i low_half = _mm512_set1_epi8(0x0f);
        const int8_t* x = row_of<int8_t>(p, row);
        const int64_t first = row * p.num_groups;
        std::memset(out, 0, MR * NB * kBlock * sizeof(float));
        for (int64_t g = 0; g < p.num_groups; ++g) {
            __m512i sum[MR][NB][kParts];
            UNROLL for (int m = 0; m < MR; ++m) {
                const int32_t total = p.whole_sums[first + m * p.num_groups + g];
                UNROLL for (int b = 0; b < NB; ++b) {
                    sum[m][b][kParts - 1] = _mm512_setzero_si512();
                    sum[m][b][0] = _mm512_set1_epi32(total);
                }
            }
            for (int64_t i = 0; i < groups.group_lines; ++i) {
                const int64_t line = g * groups.group_lines + i;
                const int64_t ahead = s.ahead<NB>(line);
                __m512i low[NB], high[NB];
                UNROLL for (int b = 0; b < NB; ++b) {
                    const __m512i v = line_at(s.line(b, line, ahead));
                    low[b] = _mm512_and_si512(v, low_half);
                    high[b] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low_half);
                }
                UNROLL for (int m = 0; m < MR; ++m) {
                    const int8_t* of = x + m * p.row_bytes + line * 8;
                    const __m512i even = word_at(of), odd = word_at(of + 4);
                    UNROLL for (int b = 0; b < NB; ++b) {
                        sum[m][b][0] = dot_bytes(sum[m][b][0], low[b], even);
                        sum[m][b][kParts - 1] =
                            dot_bytes(sum[m][b][kParts - 1], high[b], odd);
                    }
                }
            }
            UNROLL for (int b = 0; b < NB; ++b) {
                const uint8_t* at = groups.scales<NB>(b, g);
                const __m512 scale = half_at(at), rest = groups.rest(at, scale);
                UNROLL for (int m = 0; m < MR; ++m) {
                    __m512i whole = sum[m][b][0];
                    if (kParts == 2) whole = _mm512_add_epi32(whole, sum[m][b][1]);
                    const int64_t of = first + m * p.num_groups + g;
                    const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(p.scales[of]));
                    groups.add(of, _mm512_cvtepi32_ps(whole), both, rest,
                               out + (m * NB + b) * kBlock);
                }
            }
        }
    }
};

// kInt4 by bfloat16: a table of 16 exact numbers, looked up by the low bits of every 16.
struct Int4Pairs {
    static constexpr Rows kLayout = Rows::kHalfPairs;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        constexpr int kParts = NB * MR <= 4 ? 2 : 1;
        const Groups groups(p, s);
        const __m512i table = nibbles_as_bf16();
        const uint16_t* x = row_of<uint16_t>(p, row);
        const int64_t stride = p.row_bytes / sizeof(uint16_t), first = row * p.num_groups;
        std::memset(out, 0, MR * NB * kBlock * sizeof(float));
        for (int64_t g = 0; g < p.num_groups; ++g) {
            __m512 sum[MR][NB][kParts] = {};
            for (int64_t i = 0; i < groups.group_lines; ++i) {
                const int64_t line = g * groups.group_lines + i;
                const int64_t ahead = s.ahead<NB>(line);
                __m512i v[NB];
                UNROLL for (int b = 0; b < NB; ++b) v[b] = line_at(s.line(b, line, ahead));
                UNROLL for (int j = 0; j < 4; ++j) {
                    __m512i w[NB];
                    UNROLL for (int b = 0; b < NB; ++b)
                        w[b] = _mm512_permutexvar_epi16(_mm512_srli_epi32(v[b], 4 * j), table);
                    UNROLL for (int m = 0; m < MR; ++m) {
                        const __m512i pair = word_at(x + m * stride + line * 8 + j * 2);
                        UNROLL for (int b = 0; b < NB; ++b)
                            sum[m][b][j % kParts] = dot_pairs(
                                sum[m][b][j % kParts], w[b], pair);
                    }
                }
            }
            UNROLL for (int b = 0; b < NB; ++b) {
                const uint8_t* at = groups.scales<NB>(b, g);
                const __m512 scale = half_at(at), rest = groups.rest(at, scale);
                UNROLL for (int m = 0; m < MR; ++m) {
                    __m512 both = sum[m][b][0];
                    if (kParts == 2) both = _mm512_add_ps(both, sum[m][b][1]);
                    groups.add(first + m * p.num_groups + g, both, scale, rest,
                               out + (m * NB + b) * kBlock);
                }
            }
        }
    }
};

// The same by float.
struct Int4Floats {
    static constexpr Rows kLayout = Rows::kGroupFloats;
    template <int NB, int MR>
    static void run(const Product& p, const Streams& s, int64_t row, float* out) {
        const Groups groups(p, s);
        const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const float* x = row_of<float>(p, row);
        const int64_t stride = p.row_bytes / sizeof(float), first = row * p.num_groups;
        std::memset(out, 0, MR * NB * kBlock * sizeof(float));
        for (int64_t g = 0; g < p.num_groups; ++g) {
            __m512 sum[MR][NB] = {};
            for (int64_t i = 0; i < groups.group_lines; ++i) {
                const int64_t line = g * groups.group_lines + i;
                const int64_t ahead = s.ahead<NB>(line);
                __m512i v[NB];
                UNROLL for (int b = 0; b < NB; ++b) v[b] = line_at(s.line(b, line, ahead));
                UNROLL for (int j = 0; j < 8; ++j) {  // the low half of byte i is k = i
                    __m512 w[NB];
                    const int shift = j < 4 ? 8 * j : 8 * (j - 4) + 4;
                    UNROLL for (int b = 0; b < NB; ++b)
                        w[b] = _mm512_permutexvar_ps(_mm512_srli_epi32(v[b], shift), table);
                    UNROLL for (int m = 0; m < MR; ++m) {
                        const __m512 of = _mm512_set1_ps(x[m * stride + line * 8 + j]);
                        UNROLL for (int b = 0; b < NB; ++b)
                            sum[m][b] = _mm512_fmadd_ps(w[b], of, sum[m][b]);
                    }
                }
            }
            UNROLL for (int b = 0; b < NB; ++b) {
                const uint8_t* at = groups.scales<NB>(b, g);
                const __m512 scale = half_at(at), rest = groups.rest(at, scale);
                UNROLL for (int m = 0; m < MR; ++m)
                    groups.add(first + m * p.num_groups + g, sum[m][b], scale, rest,
                               out + (m * NB + b) * kBlock);
            }
        }
    }
};

// --- one worker's part ---

template <int NB>
void finish(const Product& p, int64_t row, int64_t num_rows, int64_t block, const float* values) {
    const LinearCall& call = *p.call;
    const float* factors = call.weight->format == kInt4 ? scales_of(*call.weight) : nullptr;
    for (int64_t m = 0; m < num_rows; ++m)
        for (int b = 0; b < NB; b += 2) {
            __m512 even = _mm512_loadu_ps(values + (m * NB + b) * kBlock);
            __m512 odd = _mm512_loadu_ps(values + (m * NB + b + 1) * kBlock);
            if (factors) {
                const float* of = factors + (block + b) * kBlock;
                even = _mm512_mul_ps(even, _mm512_loadu_ps(of));
                odd = _mm512_mul_ps(odd, _mm512_loadu_ps(of + kBlock));
            }
            finish_pair(call, p.first_row + row + m, block + b, even, odd);
        }
}

template <typename Formula, int NB, int MR>
void run_group(const Product& p, const Streams& s, int64_t row, int64_t block) {
    alignas(64) float values[MR * NB * kBlock];
    Formula::template run<NB, MR>(p, s, row, values);
    finish<NB>(p, row, least(p.num_rows - row, MR), block, values);
}

template <typename Formula, int NB>
void run_rows(const Product& p, Streams& s, int64_t block) {
    for (int64_t row = 0; row < p.num_rows;) {
        s.is_again = row > 0 && NB * s.block_bytes <= kCached;
        const int64_t left = p.num_rows - row;
        if constexpr (NB == 2) {
            if (left > 4) {
                run_group<Formula, NB, 8>(p, s, row, block);
                row += 8;
                continue;
            }
        }
        if (left > 2) run_group<Formula, NB, 4>(p, s, row, block);
        else if (left > 1) run_group<Formula, NB, 2>(p, s, row, block);
        else run_group<Formula, NB, 1>(p, s, row, block);
        row += 4;
    }
}

template <typename Formula>
void run_blocks(const Product& p, int64_t begin, int64_t end) {
    const Weight& weight = *p.call->weight;
    const PackedHeader& header = header_of(weight);
    Streams s;
    s.block_bytes = header.block_bytes;
    s.num_lines = (header.block_bytes - header.nibbles_offset) / 64;
    for (int64_t block = begin; block < end;) {
        s.lines = block_of(weight, block) + header.nibbles_offset;
        s.column = block * kBlock;
        if (end - block >= 4 && p.num_rows <= 4) {
            run_rows<Formula, 4>(p, s, block);
            block += 4;
        } else {
            run_rows<Formula, 2>(p, s, block);
            block += 2;
        }
    }
}

// What a formula needs to know before it can be chosen.
struct Choice {
    Rows layout;
    void (*run)(const Product&, int64_t, int64_t);
};

template <typename Formula>
constexpr Choice choice() {
    return {Formula::kLayout, run_blocks<Formula>};
}

Choice choose(const Weight& weight, int32_t element) {
    // A pair's x must be exact in bfloat16, which float16 is not.
    const bool has_pairs = has_avx512_bf16() && element == kBfloat16;
    switch (weight.format) {
        case kFp16: return choice<WideFloats<Fp16Line>>();
        case kBf16: return has_pairs ? choice<Bf16Pairs>() : choice<WideFloats<Bf16Line>>();
        case kInt8:
            if (weight.quantises_x) return choice<Int8Bytes>();
            return has_pairs ? choice<Int8Pairs>() : choice<Int8Floats>();
        default:
            if (weight.quantises_x) return choice<Int4Bytes>();
            return has_pairs ? choice<Int4Pairs>() : choice<Int4Floats>();
    }
}

struct Work {
    Product product;
    Choice choice;
    int64_t rows_at_once;
    bool is_laid_out;  // x was, by the caller
};

// Parts of equal size: were a row left over, it would read the whole weight for itself.
int64_t equal_parts(int64_t count, int64_t most) {
    return up_to(ceil_div(count, ceil_div(count, most)), kRowGroup);
}

void work_part(void* context, int worker, int num_workers) {
    const FlushDenormals flush;
    const Work& work = *static_cast<const Work*>(context);
    Product p = work.product;
    const int64_t pairs = header_of(*p.call->weight).num_blocks / 2;
    int64_t begin, end;
    part_of(pairs, worker, num_workers, &begin, &end);
    for (; p.first_row < p.call->m; p.first_row += work.rows_at_once) {
        p.num_rows = least(p.call->m - p.first_row, work.rows_at_once);
        if (!work.is_laid_out) {
            int64_t row, last;
            part_of(up_to(p.num_rows, kRowGroup), worker, num_workers, &row, &last);
            for (; row < last; ++row) lay_row(p, row);
            wait_for_all();
        }
        work.choice.run(p, 2 * begin, 2 * end);
        if (p.first_row + work.rows_at_once < p.call->m) wait_for_all();
    }
}

// All of a product but its memory.
Work work_of(const LinearCall& call) {
    const Weight& weight = *call.weight;
    const PackedHeader& header = header_of(weight);
    Work work{};
    Product& p = work.product;
    work.choice = choose(weight, call.element);
    p.call = &call;
    p.layout = work.choice.layout;
    p.num_groups = weight.format == kInt4 ? header.k_padded / weight.group : 0;
    // A line more than the row keeps rows of a power of two from meeting in the same cache sets.
    p.row_bytes = up_to(header.k_padded * bytes_per_value(p.layout), 64) + 64;
    work.rows_at_once = equal_parts(
        call.m, std::clamp(kLaidBytes / p.row_bytes, int64_t(kLeastRows), int64_t(kMostRows)));
    return work;
}

constexpr int kSlotRows = 0, kSlotScales = 1, kSlotInner = 2;

void place_rows(Product& p, int64_t rows) {
    p.rows = static_cast<uint8_t*>(scratch(kSlotRows, rows * p.row_bytes));
    const int64_t count = rows * std::max(p.num_groups, int64_t(1));
    p.scales = static_cast<float*>(scratch(kSlotScales, 3 * count * sizeof(float)));
    p.sums = p.scales + count;
    p.whole_sums = reinterpret_cast<int32_t*>(p.sums + count);
}

}  // namespace

void linear_avx512(const LinearCall& call) {
    if (call.m <= 0 || call.weight->n <= 0) return;
    Work work = work_of(call);
    Product& p = work.product;
    place_rows(p, work.rows_at_once);
    work.is_laid_out = call.m <= kRowGroup && call.m * call.weight->k <= kSmall;
    if (work.is_laid_out) {
        const FlushDenormals flush;
        p.num_rows = call.m;
        for (int64_t row = 0; row < work.rows_at_once; ++row) lay_row(p, row);
    }
    run_products(call.m * call.weight->n * call.weight->k, work_part, &work);
}

void mlp_avx512(const MlpCall& call) {
    if (call.m <= 0) return;
    const int64_t width = call.down->k, most = equal_parts(call.m, kMostRows);
    auto* inner = static_cast<uint16_t*>(
        scratch(kSlotInner, least(call.m, most) * width * int64_t(sizeof(uint16_t))));
    for (int64_t row = 0; row < call.m; row += most) {
        const int64_t rows = least(most, call.m - row);
        linear_avx512(first_product(call, row, rows, inner));
        linear_avx512(second_product(call, row, rows, inner));
    }
}

}  // namespace glimt
#endif
