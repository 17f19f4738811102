// The library's convolution of a node's concatenated inputs, and its gradients: the way of every node that our products
// do not serve.

#pragma once

#include "node.h"

namespace dla_fast::cpu {

// z, without a bias.
Tensor library_convolution(const Node& node);

struct LibraryGradients {
  std::vector<Tensor> full;  // of the inputs at the size of the convolution's; undefined where not needed
  Tensor weight;             // in any strides; undefined where not needed
};

LibraryGradients library_gradients(const Node& node, const Tensor& dz, const std::vector<bool>& needed,
                                   bool need_weight);

}  // namespace dla_fast::cpu
