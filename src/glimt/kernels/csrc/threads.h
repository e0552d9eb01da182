// The kernels' own threads: they spin for a moment between calls, then sleep.
#pragma once

#include <cstdint>

namespace glimt {

// Runs body(context, worker, num_workers) on every worker and returns when all are done. The
// calling thread is worker 0. Not to be called from inside a body.
void run_parallel(void (*body)(void* context, int worker, int num_workers), void* context);

// The same for a call of so many products: on the calling thread alone where one has done them
// before another would have woken, some 10 us.
void run_products(int64_t products, void (*body)(void* context, int worker, int num_workers),
                  void* context);

// Inside a body: waits until every worker has come here.
void wait_for_all();

int num_workers();
void set_num_workers(int count);  // between calls only

// Worker i, but for the calling thread, stays on processor places[i] until the number changes. Its
// part of a weight then lies in the memory of its node, for packing was the first to touch it.
void place_workers(const int* places, int count);  // between calls only

// Scratch memory of the call, 64-byte aligned, kept and grown from call to call; one for each
// `slot`. Not to be called from inside a body.
void* scratch(int slot, int64_t num_bytes);

}  // namespace glimt
