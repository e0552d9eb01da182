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

// A row of int8: each value is q * scale.
struct Int8Row {
    const int8_t* values;
    float scale;
};

// Where a token's row lies: in contiguous rows, or in the blocks of a table. Each file has its own.
// Rows are bfloat16, or int8 where there are scales.
struct TokenRows {
    const void* first;
    const int64_t* table;
    int64_t block_size, block_stride, token_stride;
    const float* scales = nullptr;
    int64_t scale_block_stride = 0, scale_token_stride = 0;

    const uint16_t* at(int64_t token) const {
        return static_cast<const uint16_t*>(first) + place(token, block_stride, token_stride);
    }
    Int8Row int8_at(int64_t token) const {
        return {static_cast<const int8_t*>(first) + place(token, block_stride, token_stride),
                scales[place(token, scale_block_stride, scale_token_stride)]};
    }

  private:
    int64_t place(int64_t token, int64_t per_block, int64_t per_token) const {
        if (!table) return token * per_token;
        const int64_t block = token / block_size, offset = token - block * block_size;
        return table[block] * per_block + offset * per_token;
    }
};

// The rows of one KV head, the heads lying so far apart.
inline TokenRows rows_of_head(const uint16_t* first, const float* scales, int64_t kv_head,
                              int64_t head_stride, TokenRows rows) {
    const int64_t width = scales ? sizeof(int8_t) : sizeof(uint16_t);
    rows.first = reinterpret_cast<const char*>(first) + kv_head * head_stride * width;
    rows.scales = scales ? scales + kv_head : nullptr;
    return rows;
}

// Of queries with keys, and of weights with values.
inline int64_t num_products(const DecodeCall& call) {
    int64_t num_tokens = 0;
    for (int64_t row = 0; row < call.num_rows; ++row) num_tokens += call.context_lens[row];
    return 2 * num_tokens * call.num_heads * call.head_dim;
}

inline TokenRows keys_of(const AttentionCall& call, int64_t kv_head) {
    return rows_of_head(call.key, call.key_scales, kv_head, call.key_head_stride,
                        {nullptr, call.block_table, call.block_size, call.block_stride,
                         call.key_token_stride, nullptr, call.scale_block_stride,
                         call.scale_token_stride});
}

inline TokenRows values_of(const AttentionCall& call, int64_t kv_head) {
    return rows_of_head(call.value, call.value_scales, kv_head, call.value_head_stride,
                        {nullptr, call.block_table, call.block_size, call.block_stride,
                         call.value_token_stride, nullptr, call.scale_block_stride,
                         call.scale_token_stride});
}

inline TokenRows cached_rows(const DecodeCall& call, const uint16_t* cache, const float* scales,
                             int64_t row, int64_t kv_head) {
    return rows_of_head(cache, scales, kv_head, call.head_stride,
                        {nullptr, call.block_tables + row * call.table_stride, call.block_size,
                         call.block_stride, call.token_stride, nullptr, call.scale_block_stride,
                         call.scale_token_stride});
}

// Query i sees so many keys, from the first on.
inline int64_t keys_seen(const AttentionCall& call, int64_t query) {
    int64_t seen = call.first_position + query + 1;
    if (seen < call.num_shared) seen = call.num_shared;
    return seen > call.num_keys ? call.num_keys : seen;
}

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
