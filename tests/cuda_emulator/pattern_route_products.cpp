// What pattern_route does beside PyTorch's products, in the emulator, for tests/kernels/test_route_products.py.
#include "cuda/pattern_route.h"

extern "C" {
void scale_rows(const dfn::route::Scaling* g) { dfn::route::scale_rows(*g); }
void combine_products(const dfn::route::Combination* g) { dfn::route::combine_products(*g); }
}
