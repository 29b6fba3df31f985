// A CUDA runtime without a GPU, for a CUDA build of torch: device memory is host memory, streams do nothing, and what
// waits for the device is an error while a stream is being captured, as on a GPU. Kernels of torch's own are not run:
// device.py computes torch's operators on the CPU over the same memory. The functions of the runtime that are not here
// do nothing and succeed; build.py writes them.

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "driver_types.h"

#define NOT_WHILE_CAPTURING 900

static int device = 0;
static int is_capturing = 0;
static void *captured_stream = 0;
static unsigned long long captures = 0;
// Handles of streams and graphs: any number that is not 0.
static size_t handles = 0x1000;

// Read by device.py: launches of kernels that nothing computes.
long fake_cuda_lost_launches = 0;

static void *new_handle(void) { return (void *)(handles += 16); }
static cudaError_t waited(void) { return is_capturing ? NOT_WHILE_CAPTURING : cudaSuccess; }
static cudaError_t lost_launch(void) { fake_cuda_lost_launches++; return cudaSuccess; }

// What nvcc's code calls when a library is loaded, and before and at each launch.
void **__cudaRegisterFatBinary(void *binary) { return malloc(sizeof(void *)); }
char __cudaInitModule(void **handle) { return 0; }
cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void *kernel) { return lost_launch(); }
cudaError_t cudaLaunchKernel(const void *function) { return lost_launch(); }
cudaError_t cudaLaunchKernelExC(const void *config, const void *function, void **args) { return lost_launch(); }
cudaError_t cudaLaunchCooperativeKernel(const void *function) { return lost_launch(); }

// One device with the limits of an H100.
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *found) { *found = device; return cudaSuccess; }
cudaError_t cudaSetDevice(int wanted) { device = wanted; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int found) { strncpy(id, "0000:00:00.0", length); return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int found) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "no GPU, with the limits of an H100");
  properties->totalGlobalMem = 80ul << 30;
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->l2CacheSize = 50 << 20;
  properties->textureAlignment = 512;
  properties->unifiedAddressing = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int found) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int size, size_t shared) {
  *blocks = 8;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared, unsigned flags) {
  *blocks = 8;
  return cudaSuccess;
}

// Memory. What is fresh holds a pattern, so that reading it shows.
cudaError_t cudaMalloc(void **pointer, size_t size) {
  if (posix_memalign(pointer, 512, size)) return cudaErrorMemoryAllocation;
  memset(*pointer, 0xCD, size);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **pointer, size_t size, void *stream) { return cudaMalloc(pointer, size); }
cudaError_t cudaFree(void *pointer) { free(pointer); return cudaSuccess; }
cudaError_t cudaFreeAsync(void *pointer, void *stream) { free(pointer); return cudaSuccess; }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  return posix_memalign(pointer, 512, size) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void *pointer) { free(pointer); return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) { *unused = 70ul << 30; *total = 80ul << 30; return cudaSuccess; }
cudaError_t cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, void *stream) { memset(to, value, size); return cudaSuccess; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  if (is_capturing) return NOT_WHILE_CAPTURING;
  memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind, void *stream) {
  for (size_t row = 0; row < height; row++) memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = (void *)pointer;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static char symbols[1 << 16];
  *pointer = symbols;
  return cudaSuccess;
}

// Streams and events.
cudaError_t cudaStreamCreate(void **stream) { *stream = new_handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(void *stream) { return waited(); }
cudaError_t cudaDeviceSynchronize(void) { return waited(); }
cudaError_t cudaStreamQuery(void *stream) { return waited(); }
cudaError_t cudaEventSynchronize(void *event) { return waited(); }

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}
cudaError_t cudaEventCreate(void **event) { *event = calloc(1, sizeof(double)); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(void **event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(void *event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecord(void *event, void *stream) { *(double *)event = now_ms(); return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventElapsedTime(float *ms, void *start, void *end) {
  *ms = *(double *)end - *(double *)start;
  return cudaSuccess;
}

// Graphs hold nothing; what counts is that nothing waits while one is captured.
cudaError_t cudaStreamIsCapturing(void *stream, int *status) {
  *status = is_capturing && stream == captured_stream;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(void *stream, int mode) {
  is_capturing = 1;
  captured_stream = stream;
  captures++;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(void *stream, void **graph) {
  is_capturing = 0;
  *graph = new_handle();
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, const void ***dependencies, const void **edges, size_t *count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = *status ? captures : 0;
  if (graph) *graph = (void *)handles;
  if (dependencies) *dependencies = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  *executable = new_handle();
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(void *graph, void **nodes, size_t *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGraphNodeGetDependencies(void *node, void **dependencies, void *edges, size_t *count) { *count = 0; return cudaSuccess; }

const char *cudaGetErrorString(cudaError_t error) {
  return error == NOT_WHILE_CAPTURING ? "operation not permitted when stream is capturing" : error ? "error" : "no error";
}
const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorOfNoGpu" : "cudaSuccess"; }

static int succeed(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
  *function = (void *)succeed;
  if (status) *status = 0;
  return cudaSuccess;
}
