#include "cpu/knn/kernels/kernels.inl"
