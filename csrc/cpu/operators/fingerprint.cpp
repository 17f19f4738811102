#include "fingerprint.h"

#include <algorithm>
#include <cstring>

namespace dla_fast::cpu {
namespace {

// One to one in either argument for a given other, so that a single change never cancels out.
inline uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15;
  return hash ^ (hash >> 32);
}

// Eight chains side by side: one would wait for a product at every value.
class Values {
 public:
  // Values of bytes that lie one behind the other.
  void add(const char* data, int64_t bytes) {
    const int64_t words = bytes / 8;
    add_every<uint64_t>(data, words, 8);
    if (bytes % 8 != 0) {
      uint64_t rest = 0;
      std::memcpy(&rest, data + 8 * words, bytes % 8);
      lanes_[0] = mixed(lanes_[0], rest);
    }
  }

  // Values of `bytes` each, `step` bytes apart.
  void add_every(const char* data, int64_t count, int64_t step, int64_t bytes) {
    switch (bytes) {
      case 2:
        return add_every<uint16_t>(data, count, step);
      case 4:
        return add_every<uint32_t>(data, count, step);
      case 8:
        return add_every<uint64_t>(data, count, step);
      default:
        for (int64_t i = 0; i < count; ++i) add(data + i * step, bytes);
    }
  }

  uint64_t into(uint64_t hash) const {
    for (const uint64_t lane : lanes_) hash = mixed(hash, lane);
    return hash;
  }

 private:
  static constexpr int64_t kLanes = 8;

  template <class Word>
  void add_every(const char* data, int64_t count, int64_t step) {
    const auto word = [&](int64_t i) {
      Word value;
      std::memcpy(&value, data + i * step, sizeof(Word));
      return static_cast<uint64_t>(value);
    };
    uint64_t lanes[kLanes];
    std::memcpy(lanes, lanes_, sizeof(lanes));
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = mixed(lanes[lane], word(i + lane));
    }
    for (; i < count; ++i) lanes[0] = mixed(lanes[0], word(i));
    std::memcpy(lanes_, lanes, sizeof(lanes));
  }

  uint64_t lanes_[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
};

// How far apart the values of a larger tensor lie that are read. Without a factor of two or three, so that the taps of
// a kernel and the channels take turns.
int64_t step_of(const Tensor& t) {
  int64_t step = t.numel() / std::max<int64_t>(t.size(0), 64);
  while (step > 1 && (step % 2 == 0 || step % 3 == 0)) --step;
  return std::max<int64_t>(step, 1);
}

bool is_known(const Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && !t.is_neg() && !t.unsafeGetTensorImpl()->is_python_dispatch() &&
         (t.dim() == 1 || t.is_non_overlapping_and_dense()) && (t.numel() == 0 || t.const_data_ptr() != nullptr);
}

uint64_t described(const Tensor& t) {
  uint64_t hash = mixed(reinterpret_cast<uintptr_t>(t.const_data_ptr()), static_cast<uint64_t>(t.scalar_type()));
  // What is made in inference mode has no version.
  hash = mixed(hash, t.is_inference() ? 0 : 1 + static_cast<uint64_t>(t._version()));
  for (int64_t d = 0; d < t.dim(); ++d) hash = mixed(mixed(hash, t.size(d)), t.stride(d));
  return hash;
}

}  // namespace

int64_t fingerprint(const std::vector<OptionalTensor>& tensors) {
  uint64_t hash = tensors.size();
  for (const OptionalTensor& given : tensors) {
    if (!given.has_value() || !given->defined()) {
      hash = mixed(hash, 0);
      continue;
    }
    const Tensor& t = *given;
    if (!is_known(t)) return 0;
    hash = mixed(hash, described(t));
    const char* data = static_cast<const char*>(t.const_data_ptr());
    const int64_t bytes = t.element_size(), count = t.numel();
    Values values;
    if (t.dim() < 2 && (t.dim() == 0 || t.stride(0) == 1)) {
      values.add(data, count * bytes);
    } else if (t.dim() == 1) {
      values.add_every(data, count, t.stride(0) * bytes, bytes);
    } else if (count > 0) {
      const int64_t step = step_of(t);
      values.add_every(data, (count - 1) / step + 1, step * bytes, bytes);
    }
    hash = values.into(hash);
  }
  return hash == 0 ? 1 : static_cast<int64_t>(hash);
}

int64_t kind_of_call(int64_t mark, at::ScalarType dtype, const std::vector<Tensor>& xs, const OptionalTensor& residual,
                     int64_t residual_input) {
  uint64_t hash = mixed(mixed(static_cast<uint64_t>(mark), xs.size()), static_cast<uint64_t>(residual_input));
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                         c10::DispatchKey::Functionalize, c10::DispatchKey::Python,
                                         c10::DispatchKey::ZeroTensor});
  const auto add = [&](const Tensor& t) {
    if (t.key_set().has_any(wrapped) || !t.is_cpu() || t.layout() != at::kStrided || t.scalar_type() != dtype ||
        t.is_neg())
      return false;
    hash = mixed(hash, t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) hash = mixed(mixed(hash, t.size(d)), t.stride(d));
    return true;
  };
  for (const Tensor& x : xs) {
    if (!add(x)) return 0;
  }
  if (residual.has_value() && !add(*residual)) return 0;
  return hash == 0 ? 1 : static_cast<int64_t>(hash);
}

}  // namespace dla_fast::cpu
