// The kernels of one instruction set.
#include "layers.hpp"
#include "simd.hpp"

namespace prunus {
namespace PRUNUS_ISA {

void stream(const StreamLayer&, int64_t);
void copy(const CopyLayer&, int64_t);
void window(const WindowLayer&, int64_t);
void mean(const MeanLayer&, int64_t);
void pointwise(const PointwiseLayer&, int64_t);
void transpose(const TransposeLayer&, int64_t);
void gemv(const GemvLayer&, int64_t);

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
extern const Kernels kernels;
const Kernels kernels = {TEXT(PRUNUS_ISA), LANES, stream, copy, window, mean, pointwise, transpose, gemv};

}  // namespace PRUNUS_ISA
}  // namespace prunus
