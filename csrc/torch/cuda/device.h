// The device and the stream of a launch, and where the ops are registered. Under the emulator of tests/emulator
// the same ops serve CPU tensors, in a namespace of their own.
#pragma once

#include "../tensor.h"

#if defined(FASTPO_EMULATOR)

#define FASTPO_CUDA_LIBRARY fastpo_emulator
#define FASTPO_CUDA_KEY CPU

namespace fastpo {

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};

}  // namespace fastpo

#else

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#define FASTPO_CUDA_LIBRARY fastpo
#define FASTPO_CUDA_KEY CUDA

namespace fastpo {

// A direct reference to libtorch_cuda would keep this library from loading beside a torch without CUDA.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

inline CurrentStream current_stream_function() {
  void* torch = ::dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  // ROCm's torch has the same function in another library
  if (!torch) torch = ::dlopen("libtorch_hip.so", RTLD_NOLOAD | RTLD_LAZY);
  return torch ? reinterpret_cast<CurrentStream>(::dlsym(torch, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

// Makes the tensor's device the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(t.get_device()), guard_(device_) {}

  void* stream() const {
    static const CurrentStream current = current_stream_function();
    STD_TORCH_CHECK(current, "fastpo: this torch has no CUDA: libtorch_cuda is not loaded");
    void* stream = nullptr;
    STD_TORCH_CHECK(current(device_, &stream) == 0, "fastpo: no current stream on CUDA device ", device_);
    return stream;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fastpo

#endif
