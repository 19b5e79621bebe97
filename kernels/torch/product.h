// Matrix products by whichever of torch's two libraries is fast on this processor.
//
// Torch gives float32 products to MKL, which runs AVX2 code on processors that are not Intel's,
// however wide their vectors. oneDNN, which torch contains as well, runs what the processor has:
// twice as fast with AVX-512. Neither has code for bfloat16 on processors without AVX-512: there
// float32 products of the widened numbers are four times as fast as torch's
// (docs/decisions/0019-float32-products.md).

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace ipu {

// Whether float32 products go to oneDNN here. IPU_PIPELINE_MATMUL=onednn or =mkl decides it,
// otherwise the processor does. False if this torch does not offer oneDNN's products.
bool onednn_products();

// Changes that choice for all threads; returns what it was.
bool set_onednn_products(bool wish);

// Whether bfloat16 products are computed in float32 and rounded once: the instruction set does.
bool widens_bfloat16();

// Changes that choice for all threads; returns what it was.
bool set_widens_bfloat16(bool wish);

// out = a b, or out += a b. Matrices of any strides and one type.
void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add = false);

// x W^T + b, with x (M, K) and W (N, K).
at::Tensor product_with_bias(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias);

}  // namespace ipu
