// Types that host and device code share. No header: NVRTC has none.
#pragma once

namespace fastpo {

#if defined(__INT64_TYPE__)
using Int64 = __INT64_TYPE__;
#else
using Int64 = long long;
#endif

enum class DType : int { f32, f64, bf16, f16 };

}  // namespace fastpo
