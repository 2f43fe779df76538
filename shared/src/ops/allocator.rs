//! Keeps freed memory inside the process and asks for large pages, because fresh pages cost more than any kernel.

/// Sets the C library's allocator up for large tensors that come and go in every step.
///
/// A stage's `main` calls it first. Freed memory stays in the process, one heap serves all threads (the heaps of other threads
/// cannot hold a large block, which would be mapped afresh each time), and the part of the heap that is likely to be used gets
/// pages of 2 MiB where the system grants them. The price is that the process keeps its peak memory until it ends. Only glibc has
/// these settings; elsewhere this does nothing. A refused setting changes nothing.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the C library's allocator has no safe interface")]
pub fn tune_allocator() {
    /// `M_ARENA_MAX` of glibc's `malloc.h`.
    const M_ARENA_MAX: libc::c_int = -8;
    /// `M_MMAP_MAX` is 0: blocks come from the heap, however large. `M_TRIM_THRESHOLD` is -1: the heap never shrinks.
    const SETTINGS: [(libc::c_int, libc::c_int); 4] =
        [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1), (libc::M_TOP_PAD, 64 << 20), (M_ARENA_MAX, 1)];
    for (name, value) in SETTINGS {
        // SAFETY: `mallopt` takes plain integers and may be called at any time.
        unsafe { libc::mallopt(name, value) };
    }
    // SAFETY: `sysconf` takes a plain integer and answers with -1 what it does not know.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    // SAFETY: as above.
    let page_size = unsafe { libc::sysconf(libc::_SC_PAGE_SIZE) };
    let (Ok(pages), Ok(page_size)) = (usize::try_from(pages), usize::try_from(page_size)) else { return };
    // Half of the machine's memory: addresses, none of which takes memory before it is used.
    let length = (pages / 2).saturating_mul(page_size);
    // SAFETY: `malloc` may be called with any length; the result is checked.
    let block = unsafe { libc::malloc(length) };
    if block.is_null() || page_size == 0 {
        return;
    }
    let skipped = block.align_offset(page_size).min(length);
    let whole_pages = (length - skipped) / page_size * page_size;
    let first_page = block.wrapping_byte_add(skipped);
    // SAFETY: the pages lie inside the block, and the advice changes how they are backed, not what is in them.
    unsafe { libc::madvise(first_page, whole_pages, libc::MADV_HUGEPAGE) };
    // SAFETY: the block came from `malloc` and is used no more; it becomes the heap's free end.
    unsafe { libc::free(block) };
}

/// Does nothing: this platform's C library has no such settings.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn tune_allocator() {}
