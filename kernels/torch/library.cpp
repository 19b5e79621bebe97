// The operator library `ipu_pipeline`: its name, and what it says about itself.
// Every other file here adds its own operators with TORCH_LIBRARY_FRAGMENT.

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

}  // namespace

TORCH_LIBRARY(ipu_pipeline, m) { m.def("build_info() -> str", &build_info); }
