// What PopART knows of SlicedCrossEntropy: inputs, outputs, attributes, gradient.
// NOT COMPILED where this repository is made: there is no Poplar SDK there (see ../README.md).
//
// Inputs: hidden_NH (float or half), weight_VH (the same type), labels_N (int32).
// Output: the loss, one float. Attributes: slices, how many slices of tokens; ignore_index, labels
// that do not count; mean, 1 divides by the number of labels that count, 0 does not.
// N tokens, V vocabulary, H hidden size. At most N / slices rows of logits exist at a time: they
// are computed again for the gradient, so nothing of size N x V is stashed.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <popart/op.hpp>
#include <popart/opserialiser.hpp>
#include <vector>

namespace ipu_pipeline {

const popart::OperatorIdentifier kSlicedCrossEntropy{"ipu_pipeline", "SlicedCrossEntropy", 1};
const popart::OperatorIdentifier kSlicedCrossEntropyGrad{"ipu_pipeline", "SlicedCrossEntropyGrad",
                                                         1};

struct Options {
  int64_t slices = 1;
  int64_t ignore_index = -100;
  bool mean = true;

  void describe(popart::OpSerialiserBase& os) const;
};

class SlicedCrossEntropyOp : public popart::Op {
 public:
  static constexpr popart::InIndex kHidden = 0;
  static constexpr popart::InIndex kWeight = 1;
  static constexpr popart::InIndex kLabels = 2;
  static constexpr popart::OutIndex kLoss = 0;

  SlicedCrossEntropyOp(const popart::OperatorIdentifier& id, const Options& options,
                       const popart::Op::Settings& settings)
      : popart::Op(id, settings), options(options) {}

  std::unique_ptr<popart::Op> clone() const final;
  void setup() final;
  std::vector<std::unique_ptr<popart::Op>> getGradOps() final;
  void appendOutlineAttributes(popart::OpSerialiserBase& os) const final;
  float getSubgraphValue() const final { return getHighSubgraphValue(); }

  const Options options;
};

class SlicedCrossEntropyGradOp : public popart::Op {
 public:
  static constexpr popart::InIndex kLossGrad = 0;
  static constexpr popart::InIndex kHidden = 1;
  static constexpr popart::InIndex kWeight = 2;
  static constexpr popart::InIndex kLabels = 3;
  static constexpr popart::OutIndex kHiddenGrad = 0;
  static constexpr popart::OutIndex kWeightGrad = 1;

  explicit SlicedCrossEntropyGradOp(const SlicedCrossEntropyOp& forward)
      : popart::Op(kSlicedCrossEntropyGrad, forward.getSettings()), options(forward.options) {}

  std::unique_ptr<popart::Op> clone() const final;
  void setup() final;
  const std::vector<popart::GradInOutMapper>& gradInputInfo() const final;
  const std::map<int, int>& gradOutToNonGradIn() const final;
  void appendOutlineAttributes(popart::OpSerialiserBase& os) const final;
  float getSubgraphValue() const final { return getHighSubgraphValue(); }

  const Options options;
};

}  // namespace ipu_pipeline
