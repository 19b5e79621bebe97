// SlicedCrossEntropy as Poplar programs: logits, softmax and loss of one slice of tokens at a time.
// NOT COMPILED where this repository is made: there is no Poplar SDK there (see ../README.md).

#include <popart/error.hpp>
#include <popart/popx/devicex.hpp>
#include <popart/popx/opx.hpp>
#include <popart/popx/opxmanager.hpp>
#include <poplar/Graph.hpp>
#include <poplar/Program.hpp>
#include <poplin/MatMul.hpp>
#include <popnn/Loss.hpp>
#include <popnn/NonLinearity.hpp>
#include <popops/Cast.hpp>
#include <popops/ElementWise.hpp>
#include <popops/Expr.hpp>
#include <popops/Reduce.hpp>
#include <poputil/TileMapping.hpp>
#include <set>
#include <vector>

#include "sliced_cross_entropy.hpp"

namespace ipu_pipeline {
namespace {

namespace pe = popops::expr;
using poplar::Tensor;
using poplar::program::Sequence;

// popnn's MASKED_LABEL_CODE, as the signed number of the same bits.
constexpr int kMasked = -1;

struct Slice {
  Tensor loss_n;
  Tensor logits_grad_nV;
};

class SlicedOpx : public popart::popx::Opx {
 public:
  using popart::popx::Opx::Opx;

 protected:
  // Labels that do not count become the one that popnn leaves out.
  Tensor masked(const Tensor& labels_N, int64_t ignore_index, Sequence& prog) const {
    const auto ignored = pe::Equal(pe::_1, pe::Const(static_cast<int>(ignore_index)));
    return popops::map(graph(), pe::Select(pe::Const(kMasked), pe::_1, ignored), {labels_N}, prog,
                       debugContext("mask"));
  }

  // What the sum of the losses is multiplied by: 1, or 1 / labels that count (at least 1, so that
  // a microbatch of padding alone gives 0 and not NaN).
  Tensor weight_of_sum(const Tensor& masked_N, const Options& options, Sequence& prog) const {
    if (!options.mean) {
      auto one = graph().addConstant(poplar::FLOAT, {}, 1.0f, debugContext("one"));
      graph().setTileMapping(one, 0);
      return one;
    }
    const auto counts = pe::Cast(pe::NotEqual(pe::_1, pe::Const(kMasked)), poplar::FLOAT);
    auto counts_N = popops::map(graph(), counts, {masked_N}, prog, debugContext("counts"));
    auto count =
        popops::reduce(graph(), counts_N, {0}, popops::Operation::ADD, prog, debugContext("count"));
    const auto inverse = pe::Divide(pe::Const(1.0f), pe::Max(pe::_1, pe::Const(1.0f)));
    return popops::map(graph(), inverse, {count}, prog, debugContext("inverse"));
  }

  // Loss per token, and gradient of the logits times `scale`, of n tokens.
  Slice entropy(const Tensor& hidden_nH, const Tensor& weight_VH, const Tensor& masked_n,
                const Tensor& scale, Sequence& prog) const {
    auto probabilities_nV = poplin::matMul(graph(), hidden_nH, weight_VH.transpose(), prog,
                                           poplar::FLOAT, debugContext("logits"));
    popnn::nonLinearityInPlace(graph(), popnn::NonLinearityType::SOFTMAX_STABLE, probabilities_nV,
                               prog, debugContext("softmax"));
    Slice slice;
    slice.loss_n = graph().addVariable(poplar::FLOAT, {hidden_nH.dim(0)}, debugContext("loss"));
    poputil::mapTensorLinearly(graph(), slice.loss_n);
    slice.logits_grad_nV = graph().clone(probabilities_nV, debugContext("logits_grad"));
    auto one = graph().addConstant(poplar::FLOAT, {}, 1.0f, debugContext("unscaled"));
    graph().setTileMapping(one, 0);
    prog.add(popnn::calcLoss(graph(), probabilities_nV, masked_n.reinterpret(poplar::UNSIGNED_INT),
                             slice.loss_n, slice.logits_grad_nV, scale, one,
                             popnn::CROSS_ENTROPY_LOSS, debugContext("entropy")));
    return slice;
  }

  // The weight is laid out for the product with one slice.
  Tensor create_weight(const popart::TensorInfo& hidden, const popart::TensorInfo& weight,
                       const Options& options, const poplar::DebugNameAndId& name) const {
    const auto rows = static_cast<std::size_t>(hidden.dim(0) / options.slices);
    const auto width = static_cast<std::size_t>(weight.dim(1));
    const auto vocabulary = static_cast<std::size_t>(weight.dim(0));
    return poplin::createMatMulInputRHS(graph(), popart::popx::popType(weight), poplar::FLOAT,
                                        {rows, width}, {width, vocabulary}, name)
        .transpose();
  }
};

class SlicedCrossEntropyOpx : public SlicedOpx {
 public:
  using Forward = SlicedCrossEntropyOp;

  SlicedCrossEntropyOpx(popart::Op* op, popart::popx::Devicex* device) : SlicedOpx(op, device) {
    verifyOp<Forward>(op, kSlicedCrossEntropy);
  }

  void grow(Sequence& prog) const final {
    const auto& options = getOp<Forward>().options;
    const auto hidden_NH = getInTensor(Forward::kHidden);
    const auto masked_N = masked(getInTensor(Forward::kLabels), options.ignore_index, prog);
    const auto inverse = weight_of_sum(masked_N, options, prog);
    const auto rows = hidden_NH.dim(0) / static_cast<std::size_t>(options.slices);
    std::vector<Tensor> losses;
    for (std::size_t first = 0; first < hidden_NH.dim(0); first += rows) {
      const auto slice =
          entropy(hidden_NH.slice(first, first + rows, 0), getInTensor(Forward::kWeight),
                  masked_N.slice(first, first + rows, 0), inverse, prog);
      losses.push_back(slice.loss_n);
    }
    auto sum = popops::reduce(graph(), poplar::concat(losses), {0}, popops::Operation::ADD, prog,
                              debugContext("sum"));
    setOutTensor(Forward::kLoss, popops::mul(graph(), sum, inverse, prog, debugContext("scale")));
  }

  popart::popx::InputCreatorType getInputCreatorType(popart::InIndex index) const final {
    return index == Forward::kWeight ? popart::popx::InputCreatorType::CanCreate
                                     : SlicedOpx::getInputCreatorType(index);
  }

  Tensor createInputTensor(popart::InIndex index, const poplar::DebugNameAndId& name) const final {
    if (index != Forward::kWeight) {
      throw popart::error("SlicedCrossEntropy lays out its input {} only, not {}", Forward::kWeight,
                          index);
    }
    return create_weight(inInfo(Forward::kHidden), inInfo(Forward::kWeight),
                         getOp<Forward>().options, name);
  }

  std::set<popart::TensorId> mustExistBeforeCreate(popart::InIndex) const final { return {}; }
};

class SlicedCrossEntropyGradOpx : public SlicedOpx {
 public:
  using Backward = SlicedCrossEntropyGradOp;

  SlicedCrossEntropyGradOpx(popart::Op* op, popart::popx::Devicex* device) : SlicedOpx(op, device) {
    verifyOp<Backward>(op, kSlicedCrossEntropyGrad);
  }

  void grow(Sequence& prog) const final {
    const auto& options = getOp<Backward>().options;
    const auto hidden_NH = getInTensor(Backward::kHidden);
    const auto weight_VH = getInTensor(Backward::kWeight);
    const auto masked_N = masked(getInTensor(Backward::kLabels), options.ignore_index, prog);
    // The gradient that arrives holds the loss scale: half must not see it without.
    const auto arrived = popops::cast(graph(), getInTensor(Backward::kLossGrad), poplar::FLOAT,
                                      prog, debugContext());
    const auto scale = popops::mul(graph(), arrived, weight_of_sum(masked_N, options, prog), prog,
                                   debugContext("scale"));
    const auto rows = hidden_NH.dim(0) / static_cast<std::size_t>(options.slices);
    std::vector<Tensor> hidden_grads;
    Tensor weight_grad_VH;
    for (std::size_t first = 0; first < hidden_NH.dim(0); first += rows) {
      const auto hidden_nH = hidden_NH.slice(first, first + rows, 0);
      const auto slice =
          entropy(hidden_nH, weight_VH, masked_N.slice(first, first + rows, 0), scale, prog);
      const auto grad_nV = popops::cast(graph(), slice.logits_grad_nV, weight_VH.elementType(),
                                        prog, debugContext("logits_grad"));
      hidden_grads.push_back(poplin::matMul(graph(), grad_nV, weight_VH, prog,
                                            hidden_NH.elementType(), debugContext("hidden_grad")));
      if (first == 0) {
        weight_grad_VH = poplin::matMul(graph(), grad_nV.transpose(), hidden_nH, prog,
                                        weight_VH.elementType(), debugContext("weight_grad"));
      } else {
        poplin::matMulAcc(graph(), weight_grad_VH, 1.0f, grad_nV.transpose(), hidden_nH, prog,
                          debugContext("weight_grad"));
      }
    }
    setOutTensor(Backward::kHiddenGrad, poplar::concat(hidden_grads));
    setOutTensor(Backward::kWeightGrad, weight_grad_VH);
  }
};

const popart::popx::OpxCreator<SlicedCrossEntropyOpx> kForward(kSlicedCrossEntropy);
const popart::popx::OpxCreator<SlicedCrossEntropyGradOpx> kBackward(kSlicedCrossEntropyGrad);

}  // namespace
}  // namespace ipu_pipeline
