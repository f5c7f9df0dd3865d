// A PyTorch device of the name that torch_tpu gives its own, whose memory and operations are the CPU's
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {
using namespace at;

struct Memory final : Allocator {
  DataPtr allocate(size_t n) override {
    void* p = std::malloc(n ? n : 1);
    return {p, p, &std::free, Device(DeviceType::PrivateUse1, 0)};
  }
  DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
} memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device here() { return Device(DeviceType::PrivateUse1, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, here()); }
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

void grow(const Storage& s, size_t n) {
  auto p = memory.allocate(n);
  std::memcpy(p.get(), s.data(), std::min(n, s.nbytes()));
  s.set_data_ptr_noswap(std::move(p));
  s.set_nbytes(n);
}
struct Hooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  void resizePrivateUse1Bytes(const Storage& s, size_t n) const override { grow(s, n); }
};
int registered = (RegisterPrivateUse1HooksInterface(new Hooks), 0);

constexpr DispatchKeySet keys(DispatchKey::PrivateUse1);

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, keys, dtype_or_default(dtype), format);
}
Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, keys, dtype_or_default(dtype));
}
Tensor on_cpu(const Tensor& t) { return from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(kCPU)); }
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}
const Tensor& resize(const Tensor& t, IntArrayRef size, std::optional<MemoryFormat> format) {
  size_t n = c10::multiply_integers(size) * t.itemsize();
  if (n > t.storage().nbytes()) grow(t.storage(), n);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format) t.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return t;
}
Tensor& set_storage(Tensor& t, Storage s, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(t, s, offset, size, stride);
}
Tensor& set_all(Tensor& t, Storage s) {
  int64_t n = s.nbytes() / t.itemsize();
  return set_storage(t, s, 0, n, {});
}
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_all);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", TORCH_FN(static_cast<Tensor (*)(const Tensor&, IntArrayRef)>(&at::native::view)));
}

} // namespace
