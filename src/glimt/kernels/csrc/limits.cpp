#include "limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "counts.h"
#include "threads.h"

namespace glimt {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSeconds = 0.02;
constexpr int64_t kFirstRounds = 1000;
constexpr int64_t kReadUnit = 512;
constexpr int kWidth = 32;  // values of a round: enough for every pipeline

std::atomic<uint64_t> sink{0};  // where results go, so that no loop is left out as useless

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

struct ReadContext {
    const LimitLoops* loops;
    const uint8_t* data;
    int64_t num_units;
};

void read_part(void* context, int worker, int num_workers) {
    const auto& c = *static_cast<const ReadContext*>(context);
    int64_t begin, end;
    part_of(c.num_units, worker, num_workers, &begin, &end);
    sink += c.loops->read(c.data + begin * kReadUnit, (end - begin) * kReadUnit);
}

struct MathContext {
    void (*loop)(int64_t);
    int64_t rounds;
};

void math_part(void* context, int, int) {
    const auto& c = *static_cast<const MathContext*>(context);
    c.loop(c.rounds);
}

uint64_t read_plain(const uint8_t* data, int64_t num_bytes) {
    const int64_t part = num_bytes / 4;
    uint64_t sums[4] = {};
    for (int64_t at = 0; at < part; at += 64)
        for (int stream = 0; stream < 4; ++stream) {
            const uint8_t* line = data + stream * part + at;
            __builtin_prefetch(line + 2048);
            uint64_t words[8];
            std::memcpy(words, line, 64);
            for (uint64_t word : words) sums[stream] += word;
        }
    return sums[0] + sums[1] + sums[2] + sums[3];
}

void multiply_floats(int64_t rounds) {
    float sums[kWidth] = {};
    float factor = 0.5f;
    __asm__ volatile("" : "+m"(factor));  // or the compiler would compute the sum itself
    const float constant = factor;
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < kWidth; ++i) sums[i] = sums[i] * constant + constant;
    float total = 0;
    for (float sum : sums) total += sum;
    sink += static_cast<uint64_t>(total);
}

void multiply_ints(int64_t rounds) {
    uint32_t sums[kWidth] = {};
    uint32_t factor = 3;
    __asm__ volatile("" : "+m"(factor));
    const uint32_t constant = factor;
    for (int64_t round = 0; round < rounds; ++round)
        for (int i = 0; i < kWidth; ++i) sums[i] = sums[i] * constant + constant;
    uint64_t total = 0;
    for (uint32_t sum : sums) total += sum;
    sink += total;
}

}  // namespace

LimitLoops portable_limits() {
    return {read_plain, multiply_floats, multiply_ints, 2 * kWidth, 2 * kWidth};
}

double read_limit(const LimitLoops& loops, const uint8_t* data, int64_t num_bytes) {
    if (!loops.read) return 0;
    ReadContext context{&loops, data, num_bytes / kReadUnit};
    const auto start = Clock::now();
    run_parallel(read_part, &context);
    return static_cast<double>(context.num_units * kReadUnit) / seconds_since(start);
}

double math_limit(const LimitLoops& loops, int kind) {
    MathContext context{kind == kLimitInt8 ? loops.int8 : loops.bf16, kFirstRounds};
    if (!context.loop) return 0;
    // Grown until a run is long enough; only the last one counts.
    for (;;) {
        const auto start = Clock::now();
        run_parallel(math_part, &context);
        const double seconds = seconds_since(start);
        const auto ops = kind == kLimitInt8 ? loops.int8_ops : loops.bf16_ops;
        if (seconds >= 0.7 * kSeconds)
            return static_cast<double>(ops) * static_cast<double>(context.rounds) *
                   num_workers() / seconds;
        const double growth = kSeconds / std::max(seconds, kSeconds / 50);
        context.rounds = static_cast<int64_t>(static_cast<double>(context.rounds) * growth) + 1;
    }
}

}  // namespace glimt
