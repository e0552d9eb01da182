#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "counts.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define GLIMT_PAUSE() _mm_pause()
#else
#define GLIMT_PAUSE() std::this_thread::yield()
#endif

namespace glimt {
namespace {

constexpr int kSpins = 4000;  // some 50 us: decoding calls come faster than that
constexpr int64_t kWorthThreads = 256 * 1024;  // products
constexpr int kNumSlots = 16;
constexpr int64_t kHugePage = 2 << 20;

// Counts up; whoever waits for a number spins first, then sleeps.
class Signal {
  public:
    void raise() {
        value_.fetch_add(1, std::memory_order_seq_cst);
        if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            changed_.notify_all();
        }
    }
    uint64_t value() const { return value_.load(std::memory_order_acquire); }
    void wait_past(uint64_t old) {
        for (int i = 0; i < kSpins; ++i) {
            if (value() != old) return;
            GLIMT_PAUSE();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
        changed_.wait(lock, [&] { return value() != old; });
        num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }

  private:
    std::atomic<uint64_t> value_{0};
    std::atomic<int> num_sleeping_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

class Barrier {
  public:
    void set_count(int count) { count_ = count; }
    void wait() {
        const uint64_t phase = open_.value();
        if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            num_arrived_.store(0, std::memory_order_relaxed);
            open_.raise();
        } else {
            open_.wait_past(phase);
        }
    }

  private:
    int count_ = 1;
    std::atomic<int> num_arrived_{0};
    Signal open_;
};

class Pool {
  public:
    explicit Pool(int count) : count_(count) {
        barrier_.set_count(count);
        for (int worker = 1; worker < count; ++worker)
            threads_.emplace_back([this, worker] { serve(worker); });
    }
    ~Pool() {
        is_ending_.store(true, std::memory_order_release);
        start_.raise();
        for (auto& thread : threads_) thread.join();
    }
    int count() const { return count_; }
    void place(const int* places, int count) {
#if defined(__linux__)
        for (int worker = 1; worker < count && worker < count_; ++worker) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(places[worker], &set);
            pthread_setaffinity_np(threads_[worker - 1].native_handle(), sizeof(set), &set);
        }
#else
        (void)places, (void)count;
#endif
    }
    Barrier& barrier() { return barrier_; }
    void run(void (*body)(void*, int, int), void* context) {
        body_ = body;
        context_ = context;
        start_.raise();
        body(context, 0, count_);
        barrier_.wait();
    }

  private:
    void serve(int worker) {
        for (uint64_t seen = 0;; ++seen) {
            start_.wait_past(seen);
            if (is_ending_.load(std::memory_order_acquire)) return;
            body_(context_, worker, count_);
            barrier_.wait();
        }
    }

    const int count_;
    void (*body_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    std::atomic<bool> is_ending_{false};
    Signal start_;
    Barrier barrier_;
    std::vector<std::thread> threads_;
};

struct Slot {
    void* memory = nullptr;
    int64_t num_bytes = 0;
};

std::unique_ptr<Pool> pool;
Slot slots[kNumSlots];
bool is_alone = false;  // of the one call at a time; the workers sleep while it is set

Pool& the_pool() {
    if (!pool) pool = std::make_unique<Pool>(1);
    return *pool;
}

}  // namespace

void run_parallel(void (*body)(void*, int, int), void* context) { the_pool().run(body, context); }

void run_products(int64_t products, void (*body)(void*, int, int), void* context) {
    if (products >= kWorthThreads) return run_parallel(body, context);
    is_alone = true;
    body(context, 0, 1);
    is_alone = false;
}

void wait_for_all() {
    if (!is_alone) the_pool().barrier().wait();
}

int num_workers() { return the_pool().count(); }

void set_num_workers(int count) {
    if (pool && pool->count() == count) return;
    pool.reset();
    pool = std::make_unique<Pool>(count < 1 ? 1 : count);
}

void place_workers(const int* places, int count) { the_pool().place(places, count); }

void* scratch(int slot, int64_t num_bytes) {
    Slot& held = slots[slot];
    if (held.num_bytes < num_bytes) {
        std::free(held.memory);
        held.num_bytes = up_to(num_bytes, kHugePage);
        held.memory = std::aligned_alloc(kHugePage, held.num_bytes);
#if defined(__linux__)
        madvise(held.memory, held.num_bytes, MADV_HUGEPAGE);
#endif
    }
    return held.memory;
}

}  // namespace glimt
