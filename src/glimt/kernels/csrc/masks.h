// The first lanes of a vector of 512 bits. Each file that includes it has a copy of its own.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace glimt {
namespace {

// Of 16 words.
inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1);
}

// Of 32 halves of words.
inline __mmask32 first_halves(int64_t count) {
    return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

}  // namespace
}  // namespace glimt
