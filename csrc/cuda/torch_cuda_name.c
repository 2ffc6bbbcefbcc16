/* Link-time stand-in for libtorch_cuda.so, see CMakeLists.txt. Never loaded, never shipped. */
int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  (void)device;
  (void)stream;
  return 1;
}
