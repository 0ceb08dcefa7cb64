//! Sealed memory, mapped. A memfd's size is fixed by seals before anyone else sees it, and a foreign one is mapped only
//! with those seals on: otherwise its owner could shrink it and kill us with SIGBUS at the next access.
//!
//! A peer may write the memory at any time, so it is never borrowed as `&[u8]`. It is reached as relaxed atomics, which
//! the compiler neither repeats nor invents, and copied. Rings are laid over it; see [`ring`](crate::ring).

use std::{
    ffi::CString,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, ProtFlags, mmap, munmap},
        stat::fstat,
        statfs::{TMPFS_MAGIC, fstatfs},
    },
    unistd::{SysconfVar, ftruncate, sysconf},
};

use super::ShmError;
use crate::ring::{
    Memory,
    sync::{
        Ordering,
        mapped::{AtomicU8, AtomicU64},
    },
};

/// What errors call a region's descriptor.
pub(crate) const KIND: &str = "memfd on tmpfs";
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);
/// Octets of a word.
const WORD: usize = 8;

/// Makes memory of at least `len` octets, rounded up to whole pages, zeroed, its size sealed for ever
/// (`F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL`). `name` is shown in `/proc/PID/maps` and nowhere else.
///
/// # Errors
/// [`ShmError::Os`]; an empty region is refused as `EINVAL`, and so is a name with a NUL octet.
pub fn sealed_memory(name: &str, len: usize) -> Result<OwnedFd, ShmError> {
    let invalid = || ShmError::os("memfd_create")(nix::errno::Errno::EINVAL);
    let name = CString::new(name).map_err(|_| invalid())?;
    let size = len
        .checked_next_multiple_of(page())
        .and_then(|size| i64::try_from(size).ok());
    let size = size.filter(|size| *size > 0).ok_or_else(invalid)?;
    let fd = memfd_create(
        name.as_c_str(),
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
    .map_err(ShmError::os("memfd_create"))?;
    ftruncate(&fd, size).map_err(ShmError::os("ftruncate"))?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS)).map_err(ShmError::os("F_ADD_SEALS"))?;
    Ok(fd)
}

/// A mapping of sealed memory. Unmapped on drop; the descriptor is not needed once it is mapped.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and is reached through atomics only.
unsafe impl Send for Region {}
// SAFETY: as above; concurrent access is what atomics are for.
unsafe impl Sync for Region {}

impl Region {
    /// Maps the memory behind `fd`, which must be a memfd on tmpfs (huge pages can be taken away and fault later), have
    /// its size sealed, and be exactly `len` octets large.
    ///
    /// # Errors
    /// [`ShmError::WrongKind`], [`ShmError::NotSealed`], [`ShmError::WrongSize`], [`ShmError::Os`]. Nothing is mapped
    /// then.
    pub fn map(fd: impl AsFd, len: usize) -> Result<Self, ShmError> {
        let fd = fd.as_fd();
        check_seals(fd)?;
        let actual = fstat(fd).map_err(ShmError::os("fstat"))?.st_size;
        let size = NonZeroUsize::new(len).filter(|_| u64::try_from(actual) == Ok(len as u64));
        let Some(size) = size else {
            return Err(ShmError::WrongSize {
                actual: actual.unsigned_abs(),
                announced: len as u64,
            });
        };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours. Its pages stay behind it:
        // the file has `len` octets and its seals, checked above, forbid it to shrink.
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, fd, 0) };
        Ok(Self {
            base: base.map_err(ShmError::os("mmap"))?.cast(),
            len,
        })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is `len` octets, page-aligned, readable and writable for as long as `self` lives, and
        // `AtomicU64` has the layout of `u64` and allows any bits and any concurrent change.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / WORD) }
    }

    fn octets(&self) -> &[AtomicU8] {
        // SAFETY: as in `words`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len) }
    }

    fn cell(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(WORD),
            "a cell lies at a multiple of 8 octets"
        );
        &self.words()[offset / WORD]
    }

    /// Splits `len` octets at `offset` into octets before the first whole word, whole words, and octets after.
    fn split(&self, offset: usize, len: usize) -> (&[AtomicU8], &[AtomicU64], &[AtomicU8]) {
        let all = &self.octets()[offset..][..len];
        let lead = (offset.wrapping_neg() % WORD).min(len);
        let words = (len - lead) / WORD;
        let first = (offset + lead) / WORD;
        (
            &all[..lead],
            &self.words()[first..][..words],
            &all[lead + words * WORD..],
        )
    }
}

impl Memory for Region {
    fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.cell(offset).load(order)
    }

    #[inline]
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        self.cell(offset).store(value, order);
    }

    #[inline]
    fn swap(&self, offset: usize, value: u64, order: Ordering) -> u64 {
        self.cell(offset).swap(value, order)
    }

    #[inline]
    fn read(&self, offset: usize, to: &mut [u8]) {
        let (lead, words, rest) = self.split(offset, to.len());
        let (to_lead, to) = to.split_at_mut(lead.len());
        let (to_words, to_rest) = to.split_at_mut(words.len() * WORD);
        for (to, word) in to_words.chunks_exact_mut(WORD).zip(words) {
            to.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        for (to, octet) in to_lead.iter_mut().zip(lead).chain(to_rest.iter_mut().zip(rest)) {
            *to = octet.load(Ordering::Relaxed);
        }
    }

    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        let (lead, words, rest) = self.split(offset, from.len());
        let (from_lead, from) = from.split_at(lead.len());
        let (from_words, from_rest) = from.split_at(words.len() * WORD);
        for (from, word) in from_words.chunks_exact(WORD).zip(words) {
            let mut octets = [0; WORD];
            octets.copy_from_slice(from);
            word.store(u64::from_ne_bytes(octets), Ordering::Relaxed);
        }
        for (from, octet) in from_lead.iter().zip(lead).chain(from_rest.iter().zip(rest)) {
            octet.store(*from, Ordering::Relaxed);
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are those of `mmap`, and borrows of the mapping end with `self`.
        let outcome = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert_eq!(outcome, Ok(()));
    }
}

/// The page size, in octets.
pub(crate) fn page() -> usize {
    sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}

fn check_seals(fd: impl AsFd) -> Result<(), ShmError> {
    let wrong = |reason| ShmError::WrongKind {
        expected: KIND,
        reason,
    };
    let seals = fcntl(&fd, FcntlArg::F_GET_SEALS).map_err(|_| wrong("it cannot be sealed"))?;
    if fstatfs(&fd).map_err(ShmError::os("fstatfs"))?.filesystem_type() != TMPFS_MAGIC {
        return Err(wrong("it lies on another filesystem"));
    }
    let missing = SEALS.difference(SealFlag::from_bits_retain(seals));
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter_names().map(|(name, _)| name).collect();
    Err(ShmError::NotSealed {
        missing: names.join(" | "),
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use proptest::prelude::*;

    use super::*;

    fn region(len: usize) -> Region {
        Region::map(sealed_memory("test", len).unwrap(), len.next_multiple_of(page())).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn octets_come_back_from_any_offset(offset in 0usize..40, data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let region = region(4096);
            region.write(offset, &data);
            let mut whole = vec![0; 4096];
            region.read(0, &mut whole);
            prop_assert_eq!(&whole[offset..offset + data.len()], &data[..]);
            prop_assert!(whole[..offset].iter().chain(&whole[offset + data.len()..]).all(|octet| *octet == 0));
            let mut back = vec![0; data.len()];
            region.read(offset, &mut back);
            prop_assert_eq!(back, data);
        }
    }

    #[test]
    fn a_range_outside_is_a_panic_and_never_an_access() {
        let region = region(4096);
        let outside = |call: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err();
        assert!(outside(&|| region.write(4095, &[1, 2])));
        assert!(outside(&|| region.write(usize::MAX, &[1])));
        assert!(outside(&|| region.read(4097, &mut [])));
        assert!(outside(&|| region.store(4096, 1, Ordering::Relaxed)));
        assert!(outside(&|| region.store(4, 1, Ordering::Relaxed)));
        assert!(!outside(&|| region.write(4096, &[])));
    }

    #[test]
    fn sealed_memory_keeps_its_size_and_its_seals() {
        let fd = sealed_memory("test", 1).unwrap();
        assert_eq!(fstat(&fd).unwrap().st_size as usize, page());
        assert!(ftruncate(&fd, 0).is_err());
        assert!(ftruncate(&fd, 1 << 20).is_err());
        assert!(fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    }

    #[test]
    fn memory_that_could_shrink_is_refused_by_the_missing_seal() {
        let unsealed = memfd_create(c"foreign", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, 4096).unwrap();
        let missing = |fd: &OwnedFd| match Region::map(fd, 4096) {
            Err(ShmError::NotSealed { missing }) => missing,
            other => panic!("{other:?}"),
        };
        assert_eq!(missing(&unsealed), "F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW");
        fcntl(
            &unsealed,
            FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL),
        )
        .unwrap();
        assert_eq!(missing(&unsealed), "F_SEAL_SHRINK");
    }

    #[test]
    fn another_size_than_announced_is_refused() {
        let fd = sealed_memory("test", 8192).unwrap();
        for len in [0, 1, 4096, 8191, 8193, 12288, usize::MAX] {
            assert!(
                matches!(
                    Region::map(&fd, len),
                    Err(ShmError::WrongSize { actual: 8192, .. })
                ),
                "{len}"
            );
        }
    }

    #[test]
    fn what_is_no_memfd_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            Region::map(&null, 4096),
            Err(ShmError::WrongKind { expected: KIND, .. })
        ));
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(matches!(
            Region::map(&file, 4096),
            Err(ShmError::WrongKind { .. } | ShmError::NotSealed { .. })
        ));
        let read_only = memfd_create(c"foreign", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        ftruncate(&read_only, 4096).unwrap();
        fcntl(&read_only, FcntlArg::F_ADD_SEALS(SEALS | SealFlag::F_SEAL_WRITE)).unwrap();
        assert!(matches!(
            Region::map(&read_only, 4096),
            Err(ShmError::Os {
                operation: "mmap",
                ..
            })
        ));
    }

    #[test]
    fn an_impossible_request_is_an_error() {
        assert!(sealed_memory("test", 0).is_err());
        assert!(sealed_memory("test", usize::MAX).is_err());
        assert!(sealed_memory("te\0st", 4096).is_err());
        assert!(sealed_memory("test", 4096).unwrap().as_raw_fd() > 2);
    }
}
