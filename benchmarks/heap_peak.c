/* Counts the bytes that a process has allocated, and their peak, for memory benchmarks.
 *
 * Preloaded (LD_PRELOAD) in front of glibc, so that it sees every allocation of every thread:
 * tensors, scratch buffers of kernels, and Python objects. Sizes are those that glibc really gives.
 */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static _Atomic long live, most;

static void *added(void *block) {
  if (block) {
    long now = atomic_fetch_add(&live, (long)malloc_usable_size(block));
    now += (long)malloc_usable_size(block);
    long seen = atomic_load(&most);
    while (now > seen && !atomic_compare_exchange_weak(&most, &seen, now)) {
    }
  }
  return block;
}

static void removed(void *block) {
  if (block) atomic_fetch_sub(&live, (long)malloc_usable_size(block));
}

void *malloc(size_t size) { return added(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return added(__libc_calloc(count, size)); }

void *memalign(size_t alignment, size_t size) { return added(__libc_memalign(alignment, size)); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **place, size_t alignment, size_t size) {
  void *block = memalign(alignment, size);
  if (!block && size) return ENOMEM;
  *place = block;
  return 0;
}

void *realloc(void *block, size_t size) {
  removed(block);
  void *again = __libc_realloc(block, size);
  if (!again && size) added(block);
  return added(again);
}

void free(void *block) {
  removed(block);
  __libc_free(block);
}

long heap_live_bytes(void) { return atomic_load(&live); }

long heap_peak_bytes(void) { return atomic_load(&most); }

void heap_reset_peak(void) { atomic_store(&most, atomic_load(&live)); }
