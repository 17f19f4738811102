// Memory that is kept when it is given back, for those who ask next. Memory fresh from the system is faulted in page by
// page, which for what a fast kernel writes takes longer than writing it.

#pragma once

#include <cstddef>

namespace dla_fast::cpu {

// From here on it is worth it: what is smaller the C library keeps.
constexpr size_t kReused = size_t{1} << 20;

// 64-byte aligned. Together with what is in use what is kept is never more than was once in use at the same time.
void* take_reused(size_t bytes);
void put_reused(void* data);

// Frees what is kept.
void release_reused();

}  // namespace dla_fast::cpu
