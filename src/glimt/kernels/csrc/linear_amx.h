// What the files of AMX's matrix products share: a product's parts, and who does what with them.
//
// Each function below is in one file only. The small ones in the unnamed namespace are every
// file's own.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "amx_tiles.h"
#include "dots.inc"
#include "kernels.h"
#include "layout.h"

namespace glimt {

constexpr int kTile = 1024;   // bytes: 16 rows of 64
constexpr int kFewRows = 32;  // up to here the weights' stream is what takes time
// The int8 numbers that exact x is split into, where rows are few: see pack_amx.cpp.
constexpr int kDigits = 3;

struct Product {
    const LinearCall* call;
    const PackedHeader* header;
    bool is_int8;        // tiles of int8 into int32, else of bfloat16 into float
    bool is_widened;     // the weight is widened to tiles of bfloat16 first
    bool is_split;       // few rows of exact x by int8: x is three int8 digits, nothing is widened
    int64_t num_k;       // tiles over k
    int64_t num_row_tiles;  // of 16 rows; even where rows are many
    int64_t num_panels;  // of 32 columns
    int64_t run;         // tiles of k that are multiplied at a time
    uint8_t* rows;       // x: [num_k / run, up][num_row_tiles][run] tiles
    float* row_scales;   // is_int8, is_split: [num_row_tiles * 16]
    bool is_grouped;     // few rows by int4: exact tiles, scaled group by group
    int64_t num_groups;  // is_grouped, as the next two: [num_row_tiles * 16][num_groups]
    float* group_scales; // 1/16 of the scales of rounded x
    float* group_sums;   // of x
    const Product* next; // the product whose x the results are: they go into its tiles; or null
};

// pack_amx.cpp: a row of x, or zeros past the last one, into tiles.
void pack_row(const Product& p, int64_t row);

// widen_amx.cpp: tiles first … last-1 of a block of weights as bfloat16.
void widen(const Product& p, int64_t block, int64_t first, int64_t last, uint8_t* out);

// How the matrices are cut so that what is used again stays in the second-level cache: for each
// chunk of panels and block of rows, k in runs; sums between runs stay in memory.
struct Cut {
    int64_t row_pairs;  // of 32 rows in a block, at most
    int64_t panels;     // in a chunk, at most
    int64_t run;        // tiles of k in a run
};

// A worker's share of the result: row pairs and panels.
struct Share {
    int64_t first_pair, last_pair, first_panel, last_panel;
};

// Memory of one worker: sums that are not in registers, and weights widened or unpacked.
struct Space {
    uint8_t* sums;
    uint8_t* wide;
};
struct SpaceBytes {
    int64_t sums, wide;
};

// A product and how the workers share it.
struct Work {
    Product product;
    Cut cut;                // of many rows, as the next two
    int workers_over_rows;  // the others share the columns
    bool is_streamed;
    Space space;            // of all workers
    SpaceBytes space_bytes; // of each
};

// linear_amx.cpp: what comes before a product, on the calling thread, and each worker's part of it.
Work work_of(const LinearCall& call);
void place_rows(Product& p, int slot);  // memory for x in tiles
void place_space(std::initializer_list<Work*> works);  // the same for all: one at a time
void pack_part(const Product& p, int worker, int num_workers);
void multiply_part(const Work& work, int worker, int num_workers);

constexpr int kSlotRows = 0, kSlotScales = 1, kSlotInner = 2, kSlotSums = 3, kSlotWide = 4;

// linear_many_amx.cpp: more than kFewRows rows.
Cut cut_for(const Product& p);
SpaceBytes space_for_many(const Product& p, const Cut& cut);
void run_many(const Product& p, const Cut& cut, const Share& share, const Space& space,
              bool is_streamed);

// linear_few_amx.cpp, linear_groups_amx.cpp: up to kFewRows rows, panels begin … end - 1.
SpaceBytes space_for_few();
void run_few(const Product& p, const Space& space, int64_t begin, int64_t end);
SpaceBytes space_for_groups();
void run_groups(const Product& p, const Space& space, int64_t begin, int64_t end);

namespace {

// sums += a * b; the numbers of tiles are part of the instruction.
#define MULTIPLY_TILES(sums, a, b)                              \
    do {                                                        \
        if constexpr (kIsInt8) _tile_dpbssd(sums, a, b);        \
        else _tile_dpbf16ps(sums, a, b);                        \
    } while (0)

// Tiles take bfloat16 and int8: float16 goes to the vectors.
inline bool has_float16(const Weight& weight, int32_t element) {
    return element == kFloat16 || weight.format == kFp16;
}

inline void fetch(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}
inline void fetch_l2(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

inline void load_sums(const uint8_t* sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTile, 64);
    _tile_loadd(2, sums + 2 * kTile, 64);
    _tile_loadd(3, sums + 3 * kTile, 64);
}

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void store_sums(uint8_t* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTile, 64);
    _tile_stored(2, sums + 2 * kTile, 64);
    _tile_stored(3, sums + 3 * kTile, 64);
}

}  // namespace
}  // namespace glimt
