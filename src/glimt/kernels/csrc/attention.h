// Attention of each instruction set; the calls are described in kernels.h.
//
// head_dim is at most 128. A query that sees no key gives zeros. What lies in cache slots that
// nobody sees, be it NaN, reaches no result.
#pragma once

#include "kernels.h"

namespace glimt {
namespace {

constexpr int kMaxDim = 128;
constexpr float kLog2E = 1.44269504f;
// Hidden scores lie below where the maximum begins: their weight is 0 from the first key on, and
// no difference is ever infinite.
constexpr float kLowest = -1e20f, kHidden = -1e30f;

// Where a token's row lies: in contiguous rows, or in the blocks of a table. Each file has its own.
struct TokenRows {
    const uint16_t* first;
    const int64_t* table;
    int64_t block_size, block_stride, token_stride;

    const uint16_t* at(int64_t token) const {
        if (!table) return first + token * token_stride;
        const int64_t block = token / block_size, offset = token - block * block_size;
        return first + table[block] * block_stride + offset * token_stride;
    }
};

}  // namespace

void attention_portable(const AttentionCall& call);
void attention_avx2(const AttentionCall& call);
void attention_avx512(const AttentionCall& call);
void attention_avx512_bf16(const AttentionCall& call);
void attention_amx(const AttentionCall& call);

void decode_portable(const DecodeCall& call);
void decode_avx2(const DecodeCall& call);
void decode_avx512(const DecodeCall& call);
void decode_avx512_bf16(const DecodeCall& call);
void decode_amx(const DecodeCall& call);

}  // namespace glimt
