// What the machine can do at most: the measure that every kernel's time is held against.
#pragma once

#include <cstdint>

namespace glimt {

// The loops of one instruction set; null where it has none of its own.
struct LimitLoops {
    // Reads 4 parts of `num_bytes` side by side, prefetched; data 64-byte aligned, num_bytes a
    // multiple of 512. The result depends on every byte, so that nothing is left out.
    uint64_t (*read)(const uint8_t* data, int64_t num_bytes);
    // Multiply and add on values that stay in registers and L1, `rounds` times.
    void (*bf16)(int64_t rounds);
    void (*int8)(int64_t rounds);
    int64_t bf16_ops, int8_ops;  // multiplications and additions of one round
};

LimitLoops portable_limits();  // limits.cpp
LimitLoops avx2_limits();      // each in a file of its own, empty where it was not built
LimitLoops avx512_limits();
LimitLoops amx_limits();

enum LimitKind : int32_t { kLimitBf16 = 0, kLimitInt8 = 1 };

// Bytes per second of one pass over data, on all threads. 0 where the instruction set has no loop.
double read_limit(const LimitLoops& loops, const uint8_t* data, int64_t num_bytes);

// Operations per second over some 20 ms, on all threads. 0 where the instruction set has no loop.
double math_limit(const LimitLoops& loops, int kind);

}  // namespace glimt
