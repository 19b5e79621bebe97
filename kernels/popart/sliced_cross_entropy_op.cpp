// SlicedCrossEntropy in PopART's graph: shapes, refusals, gradient, how it is created by name.
// NOT COMPILED where this repository is made: there is no Poplar SDK there (see ../README.md).

#include <popart/error.hpp>
#include <popart/opmanager.hpp>
#include <string>

#include "sliced_cross_entropy.hpp"

namespace ipu_pipeline {

void Options::describe(popart::OpSerialiserBase& os) const {
  os.appendAttribute("slices", slices);
  os.appendAttribute("ignore_index", ignore_index);
  os.appendAttribute("mean", static_cast<int64_t>(mean));
}

std::unique_ptr<popart::Op> SlicedCrossEntropyOp::clone() const {
  return std::make_unique<SlicedCrossEntropyOp>(*this);
}

void SlicedCrossEntropyOp::setup() {
  const auto hidden = inShape(kHidden);
  const auto weight = inShape(kWeight);
  const auto labels = inShape(kLabels);
  if (hidden.size() != 2 || weight.size() != 2 || hidden[1] != weight[1]) {
    throw popart::error("SlicedCrossEntropy needs hidden [N, H] and weight [V, H], got {} and {}",
                        hidden, weight);
  }
  if (labels.size() != 1 || labels[0] != hidden[0]) {
    throw popart::error("SlicedCrossEntropy needs one label per token, got {} for hidden {}",
                        labels, hidden);
  }
  if (options.slices < 1 || hidden[0] % options.slices != 0) {
    throw popart::error("SlicedCrossEntropy cannot cut {} tokens into {} equal slices", hidden[0],
                        options.slices);
  }
  outInfo(kLoss) = popart::TensorInfo(popart::DataType::FLOAT, popart::Shape{});
}

std::vector<std::unique_ptr<popart::Op>> SlicedCrossEntropyOp::getGradOps() {
  std::vector<std::unique_ptr<popart::Op>> gradients;
  gradients.push_back(std::make_unique<SlicedCrossEntropyGradOp>(*this));
  return gradients;
}

void SlicedCrossEntropyOp::appendOutlineAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendOutlineAttributes(os);
  options.describe(os);
}

std::unique_ptr<popart::Op> SlicedCrossEntropyGradOp::clone() const {
  return std::make_unique<SlicedCrossEntropyGradOp>(*this);
}

void SlicedCrossEntropyGradOp::setup() {
  outInfo(kHiddenGrad) = inInfo(kHidden);
  outInfo(kWeightGrad) = inInfo(kWeight);
}

const std::vector<popart::GradInOutMapper>& SlicedCrossEntropyGradOp::gradInputInfo() const {
  static const std::vector<popart::GradInOutMapper> inputs = {
      {kLossGrad, SlicedCrossEntropyOp::kLoss, popart::GradOpInType::GradOut},
      {kHidden, SlicedCrossEntropyOp::kHidden, popart::GradOpInType::In},
      {kWeight, SlicedCrossEntropyOp::kWeight, popart::GradOpInType::In},
      {kLabels, SlicedCrossEntropyOp::kLabels, popart::GradOpInType::In}};
  return inputs;
}

const std::map<int, int>& SlicedCrossEntropyGradOp::gradOutToNonGradIn() const {
  static const std::map<int, int> outputs = {{kHiddenGrad, SlicedCrossEntropyOp::kHidden},
                                             {kWeightGrad, SlicedCrossEntropyOp::kWeight}};
  return outputs;
}

void SlicedCrossEntropyGradOp::appendOutlineAttributes(popart::OpSerialiserBase& os) const {
  popart::Op::appendOutlineAttributes(os);
  options.describe(os);
}

namespace {

int64_t attribute(const popart::OpCreatorInfo& info, const std::string& name, int64_t otherwise) {
  return info.attributes.hasAttribute(name)
             ? info.attributes.getAttribute<popart::Attributes::Int>(name)
             : otherwise;
}

std::unique_ptr<popart::Op> create(const popart::OpCreatorInfo& info) {
  Options options;
  options.slices = attribute(info, "slices", options.slices);
  options.ignore_index = attribute(info, "ignore_index", options.ignore_index);
  options.mean = attribute(info, "mean", 1) != 0;
  return std::make_unique<SlicedCrossEntropyOp>(info.opid, options, info.settings);
}

const popart::OpDefinition::DataTypes kReal = {popart::DataType::FLOAT16, popart::DataType::FLOAT};

const popart::OpDefinition kDefinition(
    {popart::OpDefinition::Inputs(
         {{"hidden", kReal}, {"weight", kReal}, {"labels", {popart::DataType::INT32}}}),
     popart::OpDefinition::Outputs({{"loss", {popart::DataType::FLOAT}}}),
     popart::OpDefinition::Attributes(
         {{"slices", {"*"}}, {"ignore_index", {"*"}}, {"mean", {"*"}}})});

const popart::OpCreator<SlicedCrossEntropyOp> kCreator(
    popart::OpDefinitions({{kSlicedCrossEntropy, kDefinition}}), create, true);

}  // namespace
}  // namespace ipu_pipeline
