#include "reused.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <new>

#include "scratch.h"

namespace dla_fast::cpu {
namespace {

// What lies in front of a block's memory, itself a cache line.
struct alignas(64) Head {
  size_t bytes;
};

void free_block(Head* head) {
  ::operator delete(head, std::align_val_t(64));
}

// Blocks by size. One serves what takes three quarters of it or more. Together with those in use they are never more
// than were once in use at the same time.
class Kept {
 public:
  Head* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.lower_bound(bytes);
    Head* head = nullptr;
    if (found != blocks_.end() && found->first / 4 * 3 <= bytes) {
      head = found->second;
      kept_ -= head->bytes;
      blocks_.erase(found);
    }
    used_ += head == nullptr ? bytes : head->bytes;
    most_ = std::max(most_, used_);
    while (used_ + kept_ > most_) drop();
    return head;
  }
  void put(Head* head) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace(head->bytes, head);
    used_ -= head->bytes;
    kept_ += head->bytes;
  }
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty()) drop();
    most_ = used_;
  }

 private:
  // The smallest: the large ones are what is dear.
  void drop() {
    const auto first = blocks_.begin();
    kept_ -= first->first;
    free_block(first->second);
    blocks_.erase(first);
  }

  std::mutex mutex_;
  std::multimap<size_t, Head*> blocks_;
  size_t used_ = 0, kept_ = 0, most_ = 0;
};

// Never destroyed: who gives something back may outlive everything that is static.
Kept& kept() {
  static Kept* const blocks = new Kept;
  return *blocks;
}

}  // namespace

void* take_reused(size_t bytes) {
  Head* head = kept().take(bytes);
  if (head == nullptr) {
    head = new (::operator new(sizeof(Head) + bytes, std::align_val_t(64))) Head{bytes};
    want_huge_pages(head + 1, bytes);
  }
  return head + 1;
}

void put_reused(void* data) {
  kept().put(static_cast<Head*>(data) - 1);
}

void release_reused() {
  kept().release();
}

}  // namespace dla_fast::cpu
