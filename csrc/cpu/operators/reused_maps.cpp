#include "reused_maps.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>

#include <map>
#include <mutex>

#include "../shared/parallel.h"
#include "../shared/scratch.h"

namespace dla_fast::cpu {
namespace {

// What lies in front of a block's memory, itself a cache line.
struct alignas(64) Head {
  size_t bytes;
};

void free_block(Head* head) {
  ::operator delete(head, std::align_val_t(64));
}

// Blocks by size. One serves what takes three quarters of it or more.
class Kept {
 public:
  Head* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.lower_bound(bytes);
    if (found == blocks_.end() || found->first / 4 * 3 > bytes) return nullptr;
    Head* const head = found->second;
    blocks_.erase(found);
    return head;
  }
  void put(Head* head) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace(head->bytes, head);
  }
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [bytes, head] : blocks_) free_block(head);
    blocks_.clear();
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, Head*> blocks_;
};

// Never destroyed: a tensor may outlive everything that is static.
Kept& kept() {
  static Kept* const blocks = new Kept;
  return *blocks;
}

class Reusing : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Head* head = kept().take(bytes);
    if (head == nullptr) {
      head = new (::operator new(sizeof(Head) + bytes, std::align_val_t(64))) Head{bytes};
      want_huge_pages(head + 1, bytes);
    }
    return {head + 1, head, [](void* context) { kept().put(static_cast<Head*>(context)); }, at::kCPU};
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
  kept().release();
}

}  // namespace dla_fast::cpu
