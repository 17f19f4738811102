#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dla_fast::cpu {

void want_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // The whole huge pages inside alone: their neighbours belong to others, and memory in use must not grow.
  constexpr size_t huge = size_t{1} << 21, enough = 2 * huge;
  if (bytes >= enough) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
    // Refused where the system has none, and then nothing is lost.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace dla_fast::cpu
