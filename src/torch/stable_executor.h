// quantal's executor over torch's own thread pool, through the stable ABI: one pool per process.
#pragma once

#include "quantal/core.h"

namespace quantal {

/// Runs bodies on torch's intra-op pool (torch.set_num_threads). Inside a parallel region of torch
/// it runs on the calling thread. Rethrows the first exception of a body unchanged.
const Executor& stable_executor();

}  // namespace quantal
