#include "packed_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <mutex>
#include <new>

#include "../shared/parallel.h"
#include "../shared/scratch.h"

namespace dla_fast::cpu {
namespace {

constexpr int64_t kHugePage = int64_t{1} << 21, kBlock = 8 * kHugePage;

class Block {
 public:
  explicit Block(int64_t bytes)
      : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(kHugePage)))), size_(bytes) {
    want_huge_pages(data_, bytes);
  }
  Block(const Block&) = delete;
  ~Block() { ::operator delete(data_, std::align_val_t(kHugePage)); }

  // Null where that much is not left.
  char* take(int64_t bytes) {
    if (used_ + bytes > size_) return nullptr;
    char* const at = data_ + used_;
    used_ += round_up(bytes, 64);
    return at;
  }

 private:
  char* data_;
  int64_t size_, used_ = 0;
};

}  // namespace

Tensor packed_memory(int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return at::empty({bytes}, at::kByte);  // what is written past the end shows
#else
  static std::mutex mutex;
  static std::weak_ptr<Block> current;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Block> block = current.lock();
  char* at = block == nullptr ? nullptr : block->take(bytes);
  if (at == nullptr) {
    block = std::make_shared<Block>(std::max(kBlock, round_up(bytes, kHugePage)));
    at = block->take(bytes);
    if (bytes < kBlock / 2) current = block;
  }
  return at::from_blob(at, {bytes}, [block](void*) {}, at::TensorOptions(at::kByte));
#endif
}

}  // namespace dla_fast::cpu
