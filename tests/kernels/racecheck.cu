// Patterns that racecheck is asked about, see racecheck.py: nvcc -arch=sm_90a -o racecheck racecheck.cu; ./racecheck NAME
#include <cstdio>
#include <cstring>
using u32 = unsigned;
using u64 = unsigned long long;
#define ASM(code, ...) asm volatile(code __VA_ARGS__ : "memory")
#define KERNEL(...) __global__ void __VA_ARGS__(const u32* in, u32* out)

__device__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void init(u64* b, u32 n) {
  if (threadIdx.x == 0) ASM("mbarrier.init.shared.b64 [%0], %1; fence.mbarrier_init.release.cluster;", ::"r"(at(b)), "r"(n));
}
__device__ void wait(u64* b, u32 phase) {
  for (u32 done = 0; !done;)
    ASM("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }",
        : "=r"(done) : "r"(at(b)), "r"(phase));
}

KERNEL(handover) {  // the PTX manual's producer and consumer; the producer has met a third warp before
  __shared__ u32 box[32];
  u32 t = threadIdx.x;
  if (t >= 64) __nanosleep(100000);
  if (t < 32 || t >= 64) ASM("bar.sync 2, 64;", ::);
  if (t < 32) {
    box[t] = in[t];
    ASM("bar.arrive 1, 64;", ::);
  } else if (t < 64) {
    ASM("bar.sync 1, 64;", ::);
    out[t - 32] = box[63 - t];
  }
  __syncthreads();
}

KERNEL(exchange) {  // by two warps of three, in a double buffer, behind a barrier for which one of them waits
  __shared__ u32 box[2][2][32];
  u32 t = threadIdx.x, me = t / 32, total = 0;
  for (u32 turn = 0; turn < 4 && t < 64; turn++) {
    if (me) ASM("bar.arrive 1, 64;", ::);
    else ASM("bar.sync 1, 64;", ::);
    if (!me) __nanosleep(50000);
    box[turn % 2][me][t % 32] = in[t] + turn;
    ASM("bar.sync 2, 64;", ::);
    total += box[turn % 2][1 - me][31 - t % 32];
  }
  __syncthreads();
  if (t < 64) out[t] = total;
}

KERNEL(elected) {  // a buffer that is copied to when a lane has arrived for all that have read it
  __shared__ alignas(128) u32 box[32];
  __shared__ u64 full, empty;
  u32 t = threadIdx.x, total = 0;
  init(&full, 1), init(&empty, 1);
  __syncthreads();
  for (u32 turn = 0; turn < 4; turn++) {
    if (t == 0) {
      if (turn) wait(&empty, (turn - 1) % 2);
      ASM("mbarrier.arrive.expect_tx.shared.b64 _, [%2], 128; "
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];",
          ::"r"(at(box)), "l"(__cvta_generic_to_global(in + 32 * turn)), "r"(at(&full)));
    } else if (t >= 64) {
      wait(&full, turn % 2);
      total += __reduce_add_sync(~0u, box[t - 64]);
      __syncwarp();
      if (t == 64 && total) ASM("mbarrier.arrive.shared.b64 _, [%0];", ::"r"(at(&empty)));
    }
  }
  if (t >= 64) out[t - 64] = total;
}

__device__ void meet(u64* b, u32 phase) {
  ASM("bar.sync 1, 64;", ::);
  if (threadIdx.x < 2)
    ASM("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; fence.acq_rel.cluster; "
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }", ::"r"(at(b)), "r"(threadIdx.x));
  wait(b, phase);
  ASM("fence.acq_rel.cluster;", ::);
}
KERNEL(__cluster_dims__(2, 1, 1) remote) {  // words of both CTAs, which stay until they are read
  __shared__ u32 box[64];
  __shared__ u64 written, read;
  u32 t = threadIdx.x, i = blockIdx.x * 64 + t, got, total = 0;
  init(&written, 2), init(&read, 2);
  ASM("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", ::);
  for (u32 turn = 0; turn < 2 && t < 64; turn++) {
    box[t] = in[i] + turn;
    meet(&written, turn);
    for (u32 rank = 0; rank < 2; rank++, total += got)
      ASM("{ .reg .b32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.u32 %0, [there]; }",
          : "=r"(got) : "r"(at(box + 63 - t)), "r"(rank));
    meet(&read, turn);
  }
  if (t < 64) out[i] = total - blockIdx.x * 256;
}

KERNEL(race) {  // ordered by time alone
  __shared__ u32 box[32];
  u32 t = threadIdx.x;
  if (t < 32) box[t] = in[t];
  else __nanosleep(500000), out[t - 32] = box[31 - t % 32];
}

struct { const char* name; void (*kernel)(const u32*, u32*); u32 ctas, words, first, step; } cases[] = {
    {"handover", handover, 1, 32, 32, 1}, {"exchange", exchange, 1, 64, 262, 4}, {"elected", elected, 1, 32, 8256, 0},
    {"remote", remote, 2, 128, 386, 4}, {"race", race, 1, 32, 32, 1}};

int main(int, char** argv) {
  u32 words[128], *in, *out;
  for (u32 i = 0; i < 128; i++) words[i] = i + 1;
  cudaMalloc(&in, 512), cudaMalloc(&out, 512);
  cudaMemcpy(in, words, 512, cudaMemcpyDefault);
  for (auto& p : cases) {
    if (strcmp(p.name, argv[1])) continue;
    p.kernel<<<p.ctas, 96>>>(in, out);
    bool right = cudaMemcpy(words, out, 512, cudaMemcpyDefault) == cudaSuccess;
    for (u32 i = 0; i < p.words; i++) right &= words[i] == p.first - i * p.step;
    puts(right ? "right" : "wrong");
  }
}
