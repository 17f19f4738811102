// CUDA's 16-bit numbers on the host, by torch's, and the conversions that the kernels call.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <array>
#include <cstdint>
#include <cstring>

struct __half {
  c10::Half value;
};
struct __nv_bfloat16 {
  c10::BFloat16 value;
};
inline float __half2float(__half v) {
  return v.value;
}
inline float __bfloat162float(__nv_bfloat16 v) {
  return v.value;
}
inline __half __float2half_rn(float v) {
  return {c10::Half(v)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  return {c10::BFloat16(v)};
}
inline std::array<__half, 2> __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline std::array<__nv_bfloat16, 2> __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline float __uint_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
