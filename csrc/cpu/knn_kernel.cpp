#include "cpu/knn/kernels.inl"
