// The interface of the CPU kernels: what a call is told, and what every instruction set offers.
//
// Included by every file of this folder and mirrored field by field in structs.py. Plain C structs
// and raw pointers only: nothing here is compiled into code, so that files built for different
// instruction sets share no functions (a linker keeps one copy, and it may be the wrong one).
//
// Values are 16-bit numbers as uint16_t: bfloat16 unless a call's `element` or a name says otherwise.
// Strides count elements.
#pragma once

#include <cstdint>

namespace glimt {

enum Format : int32_t { kBf16 = 0, kInt8 = 1, kInt4 = 2, kFp16 = 3 };
enum Element : int32_t { kBfloat16 = 0, kFloat16 = 1 };
enum Activation : int32_t { kNone = 0, kGeluErf = 1, kGeluTanh = 2, kSiluMul = 3 };

// A matrix as a checkpoint or a quantiser has it: rows are output channels.
//   kBf16: values [n, k] bfloat16
//   kFp16: values [n, k] float16
//   kInt8: values [n, k] int8, scales [n] float: w = q * scale
//   kInt4: values [n, k / 2] bytes, the even column in the low half, unsigned 0 … 15;
//          scales, offsets [n, ceil(k / group)] float: w = q * scale + offset; k even
//   offsets may be null: -8 * scale
struct PlainWeight {
    int32_t format;
    int32_t group;  // kInt4: 32, 64 or 128 columns that share a scale; else 0
    int64_t n, k;
    const void* values;
    const float* scales;
    const float* offsets;
};

// The same, laid out for the kernels (csrc/layout.h), 64-byte aligned.
//   is_paired:    blocks of 16 rows of the first and of the second half of the matrix alternate,
//                 so that kSiluMul finds gate and up side by side; n must be a multiple of 32
//   quantises_x:  activations are rounded to int8 row by row (per group of k for kInt4) on the way:
//                 x = largest / 127 * round(x * (127 / largest)), in float, ties to even
struct Weight {
    int32_t format;
    int32_t group;
    int32_t is_paired;
    int32_t quantises_x;
    int64_t n, k;
    const void* data;
};

// out = act(x Wᵀ + bias) + residual_scale * residual, each row by itself, one rounding at the end.
//   x:   [m, k]; out: [m, n], of kSiluMul [m, n / 2]: silu(first half) * second half,
//        and the weight is paired
//   bias, residual may be null
//   element: an Element, of x, bias, residual and out, over a weight of any format
struct LinearCall {
    const Weight* weight;
    const uint16_t* x;
    const uint16_t* bias;
    const uint16_t* residual;
    void* out;
    int64_t m, x_stride, residual_stride, out_stride;
    float residual_scale;
    int32_t activation;
    int32_t is_out_float;  // out is float32, whatever the element
    int32_t element;
};

// out = down(act(up(x))) + residual: the inner values, of the call's element as all others, never
// leave the caches whole.
struct MlpCall {
    const Weight* up;
    const Weight* down;
    const uint16_t* x;
    const uint16_t* up_bias;
    const uint16_t* down_bias;
    const uint16_t* residual;
    uint16_t* out;
    int64_t m, x_stride, residual_stride, out_stride;
    float residual_scale;
    int32_t activation;
    int32_t element;
};

// Several queries of one sequence over its keys: the tower, and prefill.
//   query i sees key j if j < num_shared or j <= first_position + i
//   keys and values: contiguous rows where block_table is null; else blocks of block_size tokens,
//   the table's b-th holding tokens b * block_size …
//   query head h reads KV head h / (num_heads / num_kv_heads)
//   key_scales, value_scales: where they are there, the blocks hold int8 (the pointers say
//   otherwise), and a value is q * scale of its token and KV head; heads lie side by side
struct AttentionCall {
    const uint16_t* query;
    const uint16_t* key;
    const uint16_t* value;
    uint16_t* out;
    const int64_t* block_table;
    int64_t num_queries, num_keys, first_position, num_shared, block_size;
    int64_t query_token_stride, query_head_stride;
    int64_t key_token_stride, key_head_stride;  // in a paged cache, of tokens in a block
    int64_t value_token_stride, value_head_stride;
    int64_t block_stride;  // paged: from a block to the next one, of keys and of values
    int64_t out_token_stride, out_head_stride;
    int32_t num_heads, num_kv_heads, head_dim;
    float scale;
    const float* key_scales;
    const float* value_scales;
    int64_t scale_token_stride, scale_block_stride;
};

// One query for each of many rows, over its paged context.
//   query, out: [num_rows, num_heads, head_dim] with a row stride; block_tables: [num_rows, width]
//   key_scales, value_scales: as in AttentionCall
struct DecodeCall {
    const uint16_t* query;
    const uint16_t* key;
    const uint16_t* value;
    uint16_t* out;
    const int64_t* block_tables;
    const int64_t* context_lens;
    int64_t num_rows, table_stride, block_size;
    int64_t query_stride, out_stride;
    int64_t token_stride, head_stride, block_stride;  // of both caches
    int32_t num_heads, num_kv_heads, head_dim;
    float scale;
    const float* key_scales;
    const float* value_scales;
    int64_t scale_token_stride, scale_block_stride;
};

// Normalisation of rows: out = norm(x) * weight + bias, then + residual where there is one.
struct NormCall {
    const uint16_t* x;
    const uint16_t* weight;
    const uint16_t* bias;      // null: root mean square; else layer normalisation
    const uint16_t* residual;  // may be null
    uint16_t* out;
    int64_t num_rows, size, x_stride, residual_stride, out_stride;
    float eps;
    int32_t element;  // of all
};

// Rotates heads in place of a copy: out may be x.
//   x, out: [num_tokens, num_heads, head_dim]; cos, sin: [num_tokens, num_pairs]
//   is_interleaved: pair i is dims 2i, 2i+1; else dims i, i + width/2 of num_segments segments
struct RotateCall {
    const uint16_t* x;
    const uint16_t* cos;
    const uint16_t* sin;
    uint16_t* out;
    int64_t num_tokens, x_token_stride, x_head_stride, out_token_stride, out_head_stride;
    int32_t num_heads, head_dim, num_pairs, num_segments;
    int32_t is_interleaved;
    int32_t element;  // of all
};

// Copies keys and values [num_tokens, num_kv_heads, head_dim], of any 16-bit element, into their
// slots of the caches.
//   slots: [num_tokens], block * block_size + offset, each in the caches
//   key_scales, value_scales: where they are there, the caches hold int8: each head is rounded as
//   Weight::quantises_x says, in steps of its scale; of what is not finite, neither is the scale
struct WriteKvCall {
    const uint16_t* key;
    const uint16_t* value;
    void* key_cache;
    void* value_cache;
    const int64_t* slots;
    int64_t num_tokens, block_size;
    int64_t key_token_stride, key_head_stride;
    int64_t value_token_stride, value_head_stride;
    int64_t token_stride, head_stride, block_stride;  // of both caches
    int32_t num_kv_heads, head_dim;
    float* key_scales;
    float* value_scales;
    int64_t scale_token_stride, scale_block_stride;
};

// Rounds groups of weights to four bits, each with the scale (and offset) that harms it least.
//   weights: [num_groups, group] float, group 32, 64 or 128
//   values: [num_groups, group / 2], as kInt4 of PlainWeight; scales, offsets: [num_groups], exact
//   in bfloat16; offsets are -8 * scale unless has_offsets
struct FitCall {
    const float* weights;
    uint8_t* values;
    float* scales;
    float* offsets;
    int64_t num_groups;
    int32_t group, has_offsets;
};

// What one instruction set offers. A null entry: the plain torch path is taken instead.
struct Kernels {
    const char* name;
    void (*linear)(const LinearCall&);
    void (*mlp)(const MlpCall&);
    void (*attention)(const AttentionCall&);
    void (*decode)(const DecodeCall&);
    void (*norm)(const NormCall&);
    void (*rotate)(const RotateCall&);
    void (*write_kv)(const WriteKvCall&);
    void (*fit)(const FitCall&);
};

// Each in files of its own, compiled with its own flags; null where it was not built.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();

}  // namespace glimt
