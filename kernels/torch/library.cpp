// The operator library `ipu_pipeline`: its name, and what it says about itself.
// Every other file here adds its own operators with TORCH_LIBRARY_FRAGMENT.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "simd/isa.h"

namespace {

// extension.py looks for these bytes in the file before it loads it: a library for another torch
// may crash when it is loaded.
[[gnu::used]] const char built_for[] = "ipu_pipeline kernels for torch " TORCH_VERSION ";";

#ifdef _OPENMP
const char threads[] = "torch's threads";
#else
const char threads[] = "one thread";
#endif

// What it was built for, the loops it runs on this machine, and on how many threads.
std::string build_info() { return std::string(built_for) + " " + ipu::isa_name() + "; " + threads; }

// Threads of the calling thread's operators. Every shared library that uses ATen's parallel loops
// has its own flag for a thread's first one, which sets the thread's number to the process's: here
// that happens now, and no later operator of this library undoes torch.set_num_threads.
int64_t threads_here() {
  at::internal::lazy_init_num_threads();
  return at::get_num_threads();
}

}  // namespace

TORCH_LIBRARY(ipu_pipeline, m) {
  m.def("build_info() -> str", &build_info);
  m.def("threads_here() -> int", &threads_here);
}
