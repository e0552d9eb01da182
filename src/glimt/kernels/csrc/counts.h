// Whole numbers: the smaller of two, parts, and multiples.
//
// Static rather than std::min and its like: a function template has one copy in the whole library,
// which may be the one that was compiled for another instruction set.
#pragma once

#include <cstdint>

namespace glimt {

static inline constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How many parts of `size` hold so many, the last one perhaps not full.
static inline constexpr int64_t ceil_div(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

// The next multiple of a number, or the value itself.
static inline constexpr int64_t up_to(int64_t value, int64_t multiple) {
    return ceil_div(value, multiple) * multiple;
}

// The contiguous part of 0 … count-1 that a worker does.
static inline void part_of(int64_t count, int worker, int num_workers, int64_t* begin,
                           int64_t* end) {
    *begin = count * worker / num_workers;
    *end = count * (worker + 1) / num_workers;
}

}  // namespace glimt
