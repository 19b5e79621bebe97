// The operator library `ipu_pipeline`: its name, and what it says about itself.
// Every other file here adds its own operators with TORCH_LIBRARY_FRAGMENT.

#include <torch/library.h>

#include <string>

#include "simd/isa.h"

namespace {

// "torch 2.13.0, avx512": the torch it was compiled against, the loops it runs on this machine.
std::string build_info() {
  return std::string("torch ") + IPU_PIPELINE_TORCH_VERSION + ", " + ipu::isa_name();
}

}  // namespace

TORCH_LIBRARY(ipu_pipeline, m) {
  m.def("build_info() -> str", &build_info);
}
