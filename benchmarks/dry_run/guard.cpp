// A device guard for CUDA that does nothing. torch asks for one before each operation on a tensor
// whose device is CUDA; its builds for CPUs have none.
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
