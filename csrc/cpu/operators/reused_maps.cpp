#include "reused_maps.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>

#include "../shared/reused.h"

namespace dla_fast::cpu {
namespace {

class Reusing : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = take_reused(bytes);
    return {data, data, &put_reused, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

Tensor reused_map(const Tensor& like, at::IntArrayRef sizes, bool channels_last) {
  static Reusing allocator;
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type(),
                                   format_of(channels_last));
}

void release_maps() {
  release_reused();
}

}  // namespace dla_fast::cpu
