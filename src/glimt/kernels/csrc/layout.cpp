#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "counts.h"
#include "threads.h"

namespace glimt {
namespace {

// Values in 32 bits of a row. A word stays together, but for kFp16.
int64_t values_per_word(int32_t format) {
    return is_wide(format) ? 2 : format == kInt8 ? 4 : 8;
}

int64_t num_groups(const PlainWeight& weight) {
    return ceil_div(weight.k, weight.group);
}

bool needs_offsets(const PlainWeight& weight) {
    if (weight.format != kInt4 || !weight.offsets) return false;
    const int64_t count = weight.n * num_groups(weight);
    for (int64_t i = 0; i < count; ++i)
        if (weight.offsets[i] != -8.0f * weight.scales[i]) return true;
    return false;
}

PackedHeader header_for(const PlainWeight& weight, bool is_paired) {
    PackedHeader header{};
    const int64_t columns = up_to(weight.n, 2 * kBlock);
    header.num_blocks = columns / kBlock;
    header.k_padded = up_to(weight.k, is_wide(weight.format) ? 32 : 64);
    header.is_paired = is_paired;
    int64_t end = sizeof(PackedHeader);
    if (!is_wide(weight.format)) {
        header.scales_offset = end;
        end += columns * int64_t(sizeof(float));
    }
    if (weight.format == kInt8) {
        header.sums_offset = end;
        end += columns * int64_t(sizeof(int32_t));
    }
    if (weight.format == kInt4) {
        header.k_padded = up_to(header.k_padded, weight.group);
        header.has_offsets = needs_offsets(weight);
        const int64_t per_group = 2 * kBlock * (header.has_offsets ? 2 : 1);
        header.nibbles_offset = up_to(header.k_padded / weight.group * per_group, 64);
    }
    header.blocks_offset = end;
    const int64_t words = header.k_padded / values_per_word(weight.format);
    header.block_bytes = header.nibbles_offset + words * kBlock * 4;
    return header;
}

// 8 nibbles in the order of k -> a byte for each of the first four, the other four above them.
uint32_t spread(uint32_t four) {
    four = (four | four << 8) & 0x00ff00ff;
    return (four | four << 4) & 0x0f0f0f0f;
}
uint32_t kernel_nibbles(uint32_t word) {
    return spread(word & 0xffff) | spread(word >> 16) << 4;
}

// float16 of a finite value below 65504, to the nearest, ties to even.
uint16_t half_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits < 0x38800000) {  // below 2^-14: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return sign | uint16_t(std::nearbyint(magnitude * 16777216.0f));
    }
    bits += 0x0fff + (bits >> 13 & 1);
    return sign | uint16_t((bits - 0x38000000) >> 13);
}

struct Packing {
    const PlainWeight* weight;
    PackedHeader header;
    uint8_t* out;
};

// One step of the transposition: 16 rows of 16 words.
constexpr int kStep = 16;

// A word of every row, kStep apart -> 64 bytes.
void pack_line(int32_t format, const uint32_t* words, uint32_t* out) {
    if (format == kFp16) {
        uint16_t halves[2][kBlock];
        for (int r = 0; r < kBlock; ++r) {
            halves[0][r] = uint16_t(words[r * kStep]);
            halves[1][r] = uint16_t(words[r * kStep] >> 16);
        }
        std::memcpy(out, halves, sizeof(halves));
        return;
    }
    for (int r = 0; r < kBlock; ++r)
        out[r] = format == kInt4 ? kernel_nibbles(words[r * kStep]) : words[r * kStep];
}

void pack_values(const PlainWeight& weight, int64_t first, int num_rows, int64_t num_words,
                 uint32_t* out) {
    const int64_t per_word = values_per_word(weight.format);
    const int64_t row_bytes = weight.k * 4 / per_word;
    const auto* rows = static_cast<const uint8_t*>(weight.values) + first * row_bytes;
    uint32_t words[kBlock][kStep] = {};
    for (int64_t w = 0; w < num_words; w += kStep) {
        const int64_t end = least(num_words - w, kStep);
        const int64_t bytes = std::clamp(row_bytes - 4 * w, int64_t(0), int64_t(4 * kStep));
        for (int r = 0; r < num_rows; ++r) {
            if (bytes < 4 * kStep) std::memset(words[r], 0, sizeof(words[r]));
            std::memcpy(words[r], rows + r * row_bytes + 4 * w, bytes);
        }
        for (int64_t i = 0; i < end; ++i)
            pack_line(weight.format, &words[0][i], out + (w + i) * kBlock);
    }
}

void pack_sums(const PlainWeight& weight, int64_t first, int num_rows, int32_t* sums) {
    const auto* rows = static_cast<const int8_t*>(weight.values) + first * weight.k;
    for (int r = 0; r < num_rows; ++r) {
        int32_t sum = 0;
        for (int64_t k = 0; k < weight.k; ++k) sum += rows[r * weight.k + k];
        sums[r] = sum;
    }
}

// The power of two that brings the largest value of a row to 2^13 … 2^14.
float row_factor(const float* scales, const float* offsets, int64_t count) {
    float largest = 0;
    for (int64_t g = 0; g < count; ++g) {
        largest = std::max(largest, std::fabs(scales[g]));
        if (offsets) largest = std::max(largest, std::fabs(offsets[g]));
    }
    if (!(largest > 0) || !std::isfinite(largest)) return 1;
    return std::ldexp(1.0f, std::max(std::ilogb(largest) - 13, -126));
}

void pack_groups(const Packing& packing, int64_t first, int num_rows, float* factors,
                 uint16_t* out) {
    const PlainWeight& weight = *packing.weight;
    const int64_t count = num_groups(weight);
    const int parts = packing.header.has_offsets ? 2 : 1;
    for (int r = 0; r < num_rows; ++r) {
        const float* scales = weight.scales + (first + r) * count;
        const float* offsets = parts == 2 ? weight.offsets + (first + r) * count : nullptr;
        factors[r] = row_factor(scales, offsets, count);
        for (int64_t g = 0; g < count; ++g) {
            out[g * parts * kBlock + r] = half_of(scales[g] / factors[r]);
            if (offsets) out[(g * 2 + 1) * kBlock + r] = half_of(offsets[g] / factors[r]);
        }
    }
}

void pack_block(const Packing& packing, int64_t block) {
    const PlainWeight& weight = *packing.weight;
    const PackedHeader& header = packing.header;
    uint8_t* out = packing.out + header.blocks_offset + block * header.block_bytes;
    const int64_t first = first_row(weight.n, header.is_paired, block);
    const int num_rows = int(std::clamp(weight.n - first, int64_t(0), int64_t(kBlock)));
    const int64_t words = header.k_padded / values_per_word(weight.format);
    std::memset(out, 0, header.nibbles_offset);
    pack_values(weight, first, num_rows, words,
                reinterpret_cast<uint32_t*>(out + header.nibbles_offset));
    if (is_wide(weight.format)) return;
    auto* scales = reinterpret_cast<float*>(packing.out + header.scales_offset) + block * kBlock;
    std::fill(scales, scales + kBlock, 0.0f);
    if (weight.format == kInt4) {
        pack_groups(packing, first, num_rows, scales, reinterpret_cast<uint16_t*>(out));
        return;
    }
    std::copy(weight.scales + first, weight.scales + first + num_rows, scales);
    auto* sums = reinterpret_cast<int32_t*>(packing.out + header.sums_offset) + block * kBlock;
    std::fill(sums, sums + kBlock, 0);
    pack_sums(weight, first, num_rows, sums);
}

void pack_part(void* context, int worker, int num_workers) {
    const auto& packing = *static_cast<const Packing*>(context);
    int64_t begin, end;
    part_of(packing.header.num_blocks, worker, num_workers, &begin, &end);
    for (int64_t block = begin; block < end; ++block) pack_block(packing, block);
}

}  // namespace

int64_t packed_bytes(const PlainWeight& weight) {
    const PackedHeader header = header_for(weight, false);
    return header.blocks_offset + header.num_blocks * header.block_bytes;
}

void pack(const PlainWeight& weight, bool is_paired, void* out) {
    Packing packing{&weight, header_for(weight, is_paired), static_cast<uint8_t*>(out)};
    std::memcpy(out, &packing.header, sizeof(PackedHeader));
    run_parallel(pack_part, &packing);
}

}  // namespace glimt
