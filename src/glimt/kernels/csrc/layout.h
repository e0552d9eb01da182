// How weights lie in memory for the kernels, and the packing into it.
//
// One packed copy serves every instruction set: tiles, dot-product vectors of 64 bytes, and halves
// of 32 bytes.
//
// A packed matrix is 64-byte aligned and is
//
//     PackedHeader                       64 bytes
//     scales  [num_blocks * 16] float    kInt8, kInt4 only
//     sums    [num_blocks * 16] int32    kInt8 only: the sum of the column's q over all of k
//     blocks  [num_blocks] of block_bytes, at blocks_offset
//
// A *block* is 16 output channels ("columns" below: rows of W, columns of Wᵀ) over all of k. n is
// padded to a multiple of 32, so num_blocks is even; padded columns are all zero (q, scales, sums,
// offsets). k is padded to k_padded: a multiple of 32 (kBf16, kFp16) or of 64 and of the group
// (kInt8, kInt4); padded entries are q = 0. Where x is padded, pad it with zeros: with an offset a
// padded q = 0 of kInt4 is not a padded w = 0.
//
// Which 16 rows of W block b holds: rows first_row(b) … first_row(b) + 15, see below. With
// is_paired (n must be a multiple of 32) block 2i holds rows 16i … of the first half of the matrix,
// block 2i + 1 the same rows of the second half. Bias, residual and out are never reordered.
//
// In a block, c = 0 … 15 is the column, and the fastest index stands last:
//
//   kBf16:  uint16 [k_padded / 2][16 c][2]      w(c, k) at [k / 2][c][k % 2]
//   kFp16:  uint16 [k_padded][16 c]             w(c, k) at [k][c]: widened 16 at a time
//   kInt8:  int8   [k_padded / 4][16 c][4]      w(c, k) = scales[16b + c] * q, at [k / 4][c][k % 4]
//   kInt4:  scales and offsets first, then nibbles:
//     group_scales  [k_padded / group][1 or 2][16 c] float16: scale, then (has_offsets) offset;
//                   the whole padded to 64 bytes, nibbles begin at nibbles_offset of the block
//     nibbles       uint8 [k_padded / 64][8 r][16 c][4 i], in each byte
//                     low half:  q(c, 64t + 8r + i)
//                     high half: q(c, 64t + 8r + 4 + i)        q unsigned, 0 … 15
//     w(c, k) = scales[16b + c] * (group_scale * q + group_offset)
//     where !has_offsets: group_offset = -8 * group_scale. scales[] are powers of two, chosen so
//     that float16 keeps scales and offsets of any size to 11 bits.
//
//   So a 64-byte row of kInt4, `v & 0x0f` and `v >> 4 & 0x0f`, is rows 2r and 2r + 1 of the
//   kInt8 order; and its 16-bit halves shifted by 0, 4, 8, 12 hold the pairs of k
//   (0, 2), (4, 6), (1, 3), (5, 7) of the 8 that the row holds.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace glimt {

struct PackedHeader {
    int64_t num_blocks;      // even
    int64_t k_padded;        // columns of W with padding
    int64_t scales_offset;   // bytes from the header's begin, as the next two; 0: none
    int64_t sums_offset;     // 0: none
    int64_t blocks_offset;
    int64_t block_bytes;     // from one block to the next, a multiple of 64
    int64_t nibbles_offset;  // kInt4: from the block's begin; else 0
    int32_t has_offsets;     // kInt4: 0 where every offset is -8 * scale
    int32_t is_paired;
};
static_assert(sizeof(PackedHeader) == 64, "the header is one cache line");

constexpr int kBlock = 16;

// Are the values numbers by themselves, without scales?
static inline bool is_wide(int32_t format) { return format == kBf16 || format == kFp16; }

// Bytes of a packed matrix, a multiple of 64.
int64_t packed_bytes(const PlainWeight& weight);

// Packs a matrix into `out`, on all threads. is_paired: see Weight; n is a multiple of 32 then.
// `group` need not divide k: the last group is then shorter, and scales are [n, ceil(k / group)].
void pack(const PlainWeight& weight, bool is_paired, void* out);

// The parts of a packed matrix. Static: each instruction set compiles its own.
static inline const PackedHeader& header_of(const Weight& weight) {
    return *static_cast<const PackedHeader*>(weight.data);
}
static inline const uint8_t* block_of(const Weight& weight, int64_t block) {
    const PackedHeader& header = header_of(weight);
    return static_cast<const uint8_t*>(weight.data) + header.blocks_offset +
           block * header.block_bytes;
}
static inline const float* scales_of(const Weight& weight) {
    return reinterpret_cast<const float*>(static_cast<const uint8_t*>(weight.data) +
                                          header_of(weight).scales_offset);
}
static inline const int32_t* sums_of(const Weight& weight) {
    return reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(weight.data) +
                                            header_of(weight).sums_offset);
}
// The row of W that a block's column 0 holds; of a padded block, n or more.
static inline int64_t first_row(int64_t n, bool is_paired, int64_t block) {
    if (!is_paired) return block * kBlock;
    return block / 2 * kBlock + (block % 2 ? n / 2 : 0);
}

}  // namespace glimt
