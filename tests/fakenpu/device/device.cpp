// A device of type PrivateUse1 whose memory is the CPU's, for tests alone.
//
// Its tensors are of another device than the CPU's, so that torch refuses to compute with both. What is computed is
// computed by the CPU's kernels on the same bytes: a few operators are written here, all others fall back to the CPU.
// Each device counts its memory and has a generator of random numbers of its own. The group of processes "hccl" is
// gloo on the same bytes; it takes tensors of this device only, and splits no groups, as Ascend's.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/stl.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <unordered_map>

using at::Tensor;

namespace {
constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr int kMostDevices = 16;
constexpr int kDevices = 4;
thread_local int current_device = 0;

// ASCEND_RT_VISIBLE_DEVICES counts among the devices that there are, as Ascend's runtime does.
int device_count() {
  static const int count = [] {
    const char* visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!visible) return kDevices;
    const std::string listed(visible);
    return listed.empty() ? 0 : 1 + static_cast<int>(std::count(listed.begin(), listed.end(), ','));
  }();
  return count;
}

// ---- memory, counted for each device
struct Block {
  int device;
  size_t bytes;
};
std::mutex mutex;
std::unordered_map<void*, Block> blocks;
int64_t allocated[kMostDevices], most_allocated[kMostDevices], allocations[kMostDevices];
std::unordered_map<std::string, int64_t> calls;  // of operators, by name

void release(void* pointer) {
  if (!pointer) return;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto found = blocks.find(pointer); found != blocks.end()) {
      allocated[found->second.device] -= static_cast<int64_t>(found->second.bytes);
      blocks.erase(found);
    }
  }
  c10::free_cpu(pointer);
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    const int device = current_device;
    void* pointer = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (pointer) {
      std::lock_guard<std::mutex> lock(mutex);
      blocks[pointer] = {device, bytes};
      allocated[device] += static_cast<int64_t>(bytes);
      allocations[device]++;
      most_allocated[device] = std::max(most_allocated[device], allocated[device]);
    }
    return {pointer, pointer, &release, c10::Device(kNpu, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { most_allocated[device] = allocated[device]; }
};
Allocator allocator;
REGISTER_ALLOCATOR(kNpu, &allocator);

// ---- pinned memory: the CPU's own, and remembered
std::map<const char*, size_t> pinned;
void release_pinned(void* pointer) {
  if (!pointer) return;
  {
    std::lock_guard<std::mutex> lock(mutex);
    pinned.erase(static_cast<const char*>(pointer));
  }
  c10::free_cpu(pointer);
}
bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto* place = static_cast<const char*>(pointer);
  auto after = pinned.upper_bound(place);
  if (after == pinned.begin()) return false;
  const auto& [first, bytes] = *std::prev(after);
  return place < first + bytes;
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (pointer) {
      std::lock_guard<std::mutex> lock(mutex);
      pinned[static_cast<const char*>(pointer)] = bytes;
    }
    return {pointer, pointer, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

// ---- the current device; there is one stream, and all is done when a call returns
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(kNpu, current_device);
    current_device = device.index();
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kNpu, current_device); }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "invalid device ordinal");
    current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- a generator of random numbers for each device, with an engine of the CPU inside
struct Generator final : c10::GeneratorImpl {
  at::Generator engine;
  explicit Generator(int device)
      : c10::GeneratorImpl(c10::Device(kNpu, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        engine(at::detail::createCPUGenerator(c10::default_rng_seed_val)) {}
  void set_current_seed(uint64_t seed) override { engine.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { engine.set_offset(offset); }
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return engine.current_seed(); }
  uint64_t seed() override { return engine.seed(); }
  void set_state(const c10::TensorImpl& state) override { engine.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return engine.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* twin = new Generator(device().index());
    twin->engine = engine.clone();
    return twin;
  }
};
const at::Generator& default_generator(int device) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int number = 0; number < device_count(); number++) made.push_back(at::make_generator<Generator>(number));
    return made;
  }();
  return all.at(device < 0 ? current_device : device);
}
at::Generator engine_of(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->engine;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current_device : device);
  }
  at::Device getDeviceFromPtr(void* pointer) const override {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = blocks.find(pointer);
    return at::Device(kNpu, found == blocks.end() ? current_device : found->second.device);
  }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

// ---- operators
// A tensor of the CPU over the same bytes.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.device().is_privateuseone()) return tensor;
  auto storage = tensor.storage();
  auto bytes = at::from_blob(const_cast<void*>(storage.data()), {static_cast<int64_t>(storage.nbytes())},
                             [storage](void*) {}, at::TensorOptions().dtype(at::kByte));
  auto view = at::empty({0}, tensor.options().device(at::kCPU));
  view.set_(bytes.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) view._set_conj(true);
  if (tensor.is_neg()) view._set_neg(true);
  return view;
}
Tensor to_device(const Tensor& tensor, c10::Device device) {
  if (!tensor.defined()) return tensor;
  auto copy = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
  on_cpu(copy).copy_(tensor);
  return copy;
}
Tensor empty_memory_format(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                           std::optional<at::Device> device, std::optional<bool>,
                           std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard;
  if (device && device->has_index()) guard.reset_device(*device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard;
  if (device && device->has_index()) guard.reset_device(*device);
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}
at::Scalar local_scalar_dense(const Tensor& tensor) { return on_cpu(tensor).item(); }
const Tensor& resize_(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(tensor.device());
  at::native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt, true);
  if (format && *format != at::MemoryFormat::Preserve)
    tensor.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return tensor;
}
Tensor& set_view(Tensor& tensor, at::Storage storage, c10::SymInt at, c10::SymIntArrayRef sizes,
                 c10::SymIntArrayRef strides) {
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  auto stride = C10_AS_INTARRAYREF_SLOW(strides);
  const int64_t offset = at.guard_int(__FILE__, __LINE__);
  at::native::checkSetStorage(tensor, std::move(storage), offset, size, stride);
  tensor.unsafeGetTensorImpl()->set_storage_offset(offset);
  auto given = stride.data() != nullptr ? at::OptionalIntArrayRef(stride) : std::nullopt;
  at::native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), size, given, true);
  return tensor;
}
Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  const std::vector<int64_t> size{static_cast<int64_t>(storage.nbytes() / tensor.dtype().itemsize())};
  return tensor.set_(std::move(storage), 0, size, at::IntArrayRef{});
}
Tensor& set_tensor(Tensor& tensor, const Tensor& other) {
  return tensor.set_(other.storage(), other.storage_offset(), other.sizes(), other.strides());
}
Tensor& set_empty(Tensor& tensor) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true);
  return tensor.set_(storage, 0, at::IntArrayRef{0}, at::IntArrayRef{});
}
Tensor unfold(const Tensor& tensor, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dimension, size, step);
}
void record_stream(Tensor&, c10::Stream) {}
bool may_share_data(const Tensor& one, const Tensor& other) {
  auto is_plain = [](const Tensor& t) {
    return t.layout() == at::kStrided && (t.device().is_cpu() || t.device().is_privateuseone());
  };
  return one.key_set() == other.key_set() || (is_plain(one) && is_plain(other));
}
Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef out_padding,
                   int64_t groups) {
  std::optional<Tensor> bias_there;
  if (bias && bias->defined()) bias_there = on_cpu(*bias);
  return to_device(at::convolution(on_cpu(x), on_cpu(weight), bias_there, stride, padding, dilation, transposed,
                                   out_padding, groups),
                   x.device());
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef out_padding, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  const std::vector<int64_t> bias_size{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [of_x, of_weight, of_bias] =
      at::convolution_backward(on_cpu(gradient), on_cpu(x), on_cpu(weight), at::OptionalIntArrayRef(bias_size),
                               stride, padding, dilation, transposed, out_padding, groups, wanted);
  const auto device = x.device();
  return {to_device(of_x, device), to_device(of_weight, device), to_device(of_bias, device)};
}

// All that is not above: the CPU's kernel, with the engine of the device's own generator.
void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  {
    std::lock_guard<std::mutex> lock(mutex);
    calls[schema.operator_name().name]++;
  }
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  int device = -1;
  for (size_t i = 0; i < count && device < 0; i++) {
    const auto& value = (*stack)[first + i];
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().device().is_privateuseone())
      device = value.toTensor().device().index();
  }
  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[first + i];
    if (value.isGenerator()) {
      if (value.toGenerator().device().is_privateuseone()) value = c10::IValue(engine_of(value.toGenerator()));
    } else if (value.isNone()) {
      auto optional = schema.arguments()[i].type()->cast<c10::OptionalType>();
      if (optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType)
        value = c10::IValue(engine_of(default_generator(device)));
    }
  }
  c10::OptionalDeviceGuard guard;
  if (device >= 0) guard.reset_device(c10::Device(kNpu, device));
  at::native::cpu_fallback(op, stack);
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_memory_format);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_view);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_empty);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", unfold);
  m.impl("record_stream", record_stream);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_has_compatible_shallow_copy_type", may_share_data);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

// ---- the group of processes: every call ends before it returns
namespace {
using Tensors = std::vector<Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

struct Done : c10d::Work {
  Tensors tensors;
  explicit Done(Tensors of) : tensors(std::move(of)) {}
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return tensors; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()),
                                                           std::vector<c10::Device>{});
    future->markCompleted(c10::IValue(tensors));
    return future;
  }
};

struct Hccl : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> gloo;
  Hccl(c10::intrusive_ptr<c10d::Backend> over, int rank, int size) : c10d::Backend(rank, size), gloo(std::move(over)) {}
  const std::string getBackendName() const override { return "hccl"; }

  static Tensor there(const Tensor& tensor) {
    TORCH_CHECK(tensor.device().is_privateuseone(), "hccl takes tensors of npu, not of ", tensor.device());
    return on_cpu(tensor);
  }
  static Tensors there(const Tensors& tensors) {
    Tensors result;
    for (const auto& tensor : tensors) result.push_back(there(tensor));
    return result;
  }
  static WorkPtr done(Tensors tensors) { return c10::make_intrusive<Done>(std::move(tensors)); }
  static WorkPtr finished(const WorkPtr& work, Tensors tensors) {
    work->wait();
    return done(std::move(tensors));
  }
  // gloo has no mean
  void reduce_all(Tensors& tensors, c10d::ReduceOp op) {
    c10d::AllreduceOptions options;
    const bool mean = op == c10d::ReduceOp::AVG;
    options.reduceOp = mean ? c10d::ReduceOp(c10d::ReduceOp::SUM) : op;
    gloo->allreduce(tensors, options)->wait();
    if (mean)
      for (auto& tensor : tensors) tensor.div_(getSize());
  }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto views = there(tensors);
    return finished(gloo->broadcast(views, options), tensors);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto views = there(tensors);
    reduce_all(views, options.reduceOp);
    return done(tensors);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    for (auto& view : there(tensors)) {
      Tensors one{view};
      reduce_all(one, options.reduceOp);
    }
    return done(tensors);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto views = there(tensors);
    return finished(gloo->reduce(views, options), tensors);
  }
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    std::vector<Tensors> views;
    for (auto& tensors : outputs) views.push_back(there(tensors));
    auto given = there(inputs);
    return finished(gloo->allgather(views, given, options), outputs[0]);
  }
  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = there(output), from = there(input);
    return finished(gloo->_allgather_base(to, from, options), {output});
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    for (size_t i = 0; i < outputs.size(); i++) _allgather_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    std::vector<Tensors> views;
    for (auto& tensors : outputs) views.push_back(there(tensors));
    auto given = there(inputs);
    return finished(gloo->gather(views, given, options), {});
  }
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    std::vector<Tensors> given;
    for (auto& tensors : inputs) given.push_back(there(tensors));
    auto views = there(outputs);
    return finished(gloo->scatter(views, given, options), outputs);
  }
  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    Tensors whole{there(input).clone()};
    reduce_all(whole, options.reduceOp);
    there(output).copy_(whole[0].reshape({getSize(), -1})[getRank()].reshape(output.sizes()));
    return done({output});
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    for (size_t i = 0; i < outputs.size(); i++) _reduce_scatter_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  WorkPtr alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_sizes,
                        std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override {
    auto to = there(output), from = there(input);
    return finished(gloo->alltoall_base(to, from, output_sizes, input_sizes, options), {output});
  }
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    Tensors flat;
    std::vector<int64_t> output_sizes, input_sizes;
    for (auto& input : inputs) {
      flat.push_back(there(input).reshape({-1}));
      input_sizes.push_back(input.numel());
    }
    int64_t all = 0;
    for (auto& output : outputs) {
      output_sizes.push_back(output.numel());
      all += output.numel();
    }
    auto from = at::cat(flat);
    auto to = at::empty({all}, from.options());
    gloo->alltoall_base(to, from, output_sizes, input_sizes, options)->wait();
    int64_t at = 0;
    for (auto& output : outputs) {
      there(output).copy_(to.narrow(0, at, output.numel()).reshape(output.sizes()));
      at += output.numel();
    }
    return done(outputs);
  }
  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto views = there(tensors);
    return finished(gloo->send(views, to, tag), tensors);
  }
  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto views = there(tensors);
    return finished(gloo->recv(views, from, tag), tensors);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return finished(gloo->barrier(options), {}); }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }
};
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  py::module_::import("torch.distributed");
  py::class_<Hccl, c10d::Backend, c10::intrusive_ptr<Hccl>>(m, "Hccl")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>, int, int>());
  m.def("device_count", &device_count);
  m.def("current_device", [] { return current_device; });
  m.def("set_device", [](int device) {
    TORCH_CHECK(device >= 0 && device < device_count(), "invalid npu ordinal ", device);
    current_device = device;
  });
  m.def("on_cpu", &on_cpu);
  m.def("default_generator", [](int device) { return default_generator(device); });
  m.def("memory_stats", [](int device) {
    std::lock_guard<std::mutex> lock(mutex);
    return std::map<std::string, int64_t>{{"allocated_bytes.all.current", allocated[device]},
                                          {"allocated_bytes.all.peak", most_allocated[device]},
                                          {"allocation.all.allocated", allocations[device]}};
  });
  m.def("reset_peak", [](int device) { most_allocated[device] = allocated[device]; });
  m.def("calls", [] {
    std::lock_guard<std::mutex> lock(mutex);
    return std::map<std::string, int64_t>(calls.begin(), calls.end());
  });
}
