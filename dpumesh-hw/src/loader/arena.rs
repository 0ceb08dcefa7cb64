//! Memory of one call: [`Arena`] to build texts and lists in, [`Reader`] to take them out again without trusting them.
//!
//! ```text
//! request   caller: Arena::growing ── pointers ──► callee: Reader::trusting
//! answer    caller: Arena of a fixed size ◄── pointers ── callee; caller: Reader::within(that arena)
//! ```
//!
//! The caller owns both. A callee that fills an answer gets what is left of the caller's arena; what it hands back must point into
//! it, and [`Reader`] says so by name when it does not.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::abi::{dm_arena, dm_error, dm_list, dm_rows, dm_str};

/// A struct of the interface that begins with its size.
///
/// # Safety
/// All octets zero is a value; the first member is a `u32` for the size; and every bit pattern of its numbers is a value.
pub(crate) unsafe trait Sized32: Copy {
    /// Its name, for messages.
    const NAME: &'static str;
    /// Its size in the first minor version of this major: nobody may send less.
    const LEAST: usize;

    /// All zero but the size.
    fn empty() -> Self {
        // SAFETY: all zero is a value, by the trait's contract.
        let mut value: Self = unsafe { std::mem::zeroed() };
        // SAFETY: the first member is a u32, by the trait's contract.
        unsafe { (&raw mut value).cast::<u32>().write(size_of::<Self>() as u32) };
        value
    }
}

macro_rules! sized {
    ($($name:ident = $least:literal),* $(,)?) => {$(
        // SAFETY: integers, arrays of them and pointers only, the first of which is `size: u32`.
        unsafe impl $crate::loader::arena::Sized32 for $crate::loader::abi::$name {
            const NAME: &'static str = stringify!($name);
            const LEAST: usize = $least;
        }
        // SAFETY: a pointer in it says where something is; who follows it answers for that, on whichever thread.
        unsafe impl Send for $crate::loader::abi::$name {}
        // SAFETY: as above.
        unsafe impl Sync for $crate::loader::abi::$name {}
    )*};
}
pub(crate) use sized;

/// What was wrong with a value from the other side: names the place.
pub(crate) type Broken = String;

/// Bump memory, which is handed out and not looked at again. Grows in pieces that never move, or ends where the caller's memory ends.
#[derive(Debug)]
pub(crate) struct Arena {
    pieces: Vec<Box<[MaybeUninit<u128>]>>,
    at: *mut u8,
    left: usize,
    used: usize,
    needed: usize,
    grows: bool,
}

// SAFETY: it owns what it points to, or (fixed) the caller of the call does and nobody else writes there meanwhile.
unsafe impl Send for Arena {}

const ALIGN: usize = 16;
const PIECE: usize = 1024;
const LARGEST: usize = 1 << 18;

impl Arena {
    /// Grows as needed.
    pub(crate) fn growing() -> Self {
        Self {
            pieces: Vec::new(),
            at: std::ptr::null_mut(),
            left: 0,
            used: 0,
            needed: 0,
            grows: true,
        }
    }

    /// The rest of the caller's memory.
    ///
    /// # Safety
    /// `arena` points to a valid `dm_arena` whose octets nobody else touches while this lives.
    pub(crate) unsafe fn of_caller(arena: *const dm_arena) -> Self {
        // SAFETY: valid by contract; null is an arena without room.
        let given = unsafe { arena.as_ref() };
        let (at, left, used) = given.map_or((std::ptr::null_mut(), 0, 0), |arena| {
            let used = arena.used.min(arena.capacity) as usize;
            (arena.at.wrapping_add(used), arena.capacity as usize - used, used)
        });
        Self {
            pieces: Vec::new(),
            at,
            left,
            used,
            needed: used,
            grows: false,
        }
    }

    /// Octets taken since the start.
    pub(crate) fn used(&self) -> u64 {
        self.used as u64
    }

    /// Octets that everything would have taken.
    pub(crate) fn needed(&self) -> u64 {
        self.needed as u64
    }

    /// True once something did not fit.
    pub(crate) fn overflowed(&self) -> bool {
        self.needed > self.used
    }

    /// Empty again, with its memory: in one piece from now on. What pointed there does so in vain. Of a growing arena.
    pub(crate) fn clear(&mut self) {
        let all: usize = self.pieces.iter().map(|piece| size_of_val(&**piece)).sum();
        if self.pieces.len() > 1 {
            self.pieces = vec![Box::new_uninit_slice(all.div_ceil(ALIGN))];
        }
        if let Some(piece) = self.pieces.first_mut() {
            (self.at, self.left) = (piece.as_mut_ptr().cast(), all);
        }
        (self.used, self.needed) = (0, 0);
    }

    /// Room for so many octets; null when they do not fit.
    fn take(&mut self, octets: usize) -> *mut u8 {
        let len = octets.next_multiple_of(ALIGN);
        if len == 0 {
            return std::ptr::null_mut();
        }
        self.needed += len;
        if self.left < len {
            if !self.grows {
                self.left = 0; // what follows would leave gaps: `needed` goes on, `used` stays
                return std::ptr::null_mut();
            }
            // Twice as much each time: few pieces for a long batch, a small one for a small call.
            let octets = len.max((PIECE << self.pieces.len().min(8)).min(LARGEST));
            let mut piece = Box::new_uninit_slice(octets.div_ceil(ALIGN));
            self.at = piece.as_mut_ptr().cast();
            self.left = size_of_val(&*piece);
            self.pieces.push(piece);
        }
        let to = self.at;
        self.at = self.at.wrapping_add(len);
        self.left -= len;
        self.used += len;
        to
    }

    /// Copies elements in; null when they do not fit.
    pub(crate) fn put<T: Copy>(&mut self, values: &[T]) -> *const T {
        let to: *mut T = self.take(size_of_val(values)).cast();
        if !to.is_null() {
            // SAFETY: so many octets are there, aligned to 16, and nobody else's; T is Copy.
            unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) };
        }
        to
    }

    /// Fills one struct in where it stays; null when it does not fit.
    pub(crate) fn make<T: Sized32>(&mut self, fill: impl FnOnce(&mut T, &mut Self)) -> *const T {
        let to: *mut T = self.take(size_of::<T>()).cast();
        self.fill_in(to, fill);
        to
    }

    /// Fills elements in where they stay; an empty list when they do not fit.
    pub(crate) fn make_list<T: Sized32>(
        &mut self,
        len: usize,
        mut fill: impl FnMut(usize, &mut T, &mut Self),
    ) -> dm_list {
        let at: *mut T = self.take(len * size_of::<T>()).cast();
        for index in 0..len {
            let to = if at.is_null() { at } else { at.wrapping_add(index) };
            self.fill_in(to, |value, arena| fill(index, value, arena));
        }
        dm_list {
            at: at.cast(),
            len: if at.is_null() { 0 } else { len as u32 },
            stride: size_of::<T>() as u32,
        }
    }

    /// What has no place is filled in all the same: what it points to counts as needed.
    fn fill_in<T: Sized32>(&mut self, to: *mut T, fill: impl FnOnce(&mut T, &mut Self)) {
        if to.is_null() {
            return fill(&mut T::empty(), self);
        }
        // SAFETY: room for a T that was just taken, aligned to 16; an arena never looks at what it gave away.
        let value = unsafe {
            to.write(T::empty());
            &mut *to
        };
        fill(value, self);
    }

    /// Copies one value in; null when it does not fit.
    pub(crate) fn one<T: Copy>(&mut self, value: T) -> *const T {
        self.put(std::slice::from_ref(&value))
    }

    /// Copies a text in; empty when it does not fit.
    pub(crate) fn text(&mut self, text: &str) -> dm_str {
        let at = self.put(text.as_bytes());
        dm_str {
            at,
            len: if at.is_null() { 0 } else { text.len() as u64 },
        }
    }

    /// Copies elements in as a list; empty when they do not fit.
    pub(crate) fn list<T: Copy>(&mut self, values: &[T]) -> dm_list {
        let at = self.put(values);
        dm_list {
            at: at.cast(),
            len: if at.is_null() { 0 } else { values.len() as u32 },
            stride: size_of::<T>() as u32,
        }
    }
}

/// Takes texts, lists and structs out of memory that the other side filled.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    within: Option<Range<usize>>,
}

impl Reader {
    /// Of a request: the caller vouches for its pointers.
    pub(crate) fn trusting() -> Self {
        Self { within: None }
    }

    /// Of an answer: what it points to must lie in the arena that it was given.
    pub(crate) fn within(at: *const u8, len: usize) -> Self {
        Self {
            within: Some(at.addr()..at.addr() + len),
        }
    }

    fn check(&self, at: *const u8, len: usize, what: &str) -> Result<(), Broken> {
        if at.is_null() {
            return Err(format!("{what} is null"));
        }
        let Some(within) = &self.within else { return Ok(()) };
        let end = at.addr().checked_add(len);
        match end {
            Some(end) if at.addr() >= within.start && end <= within.end => Ok(()),
            _ => Err(format!("{what} points outside of the call's arena")),
        }
    }

    /// A text.
    pub(crate) fn text(&self, text: dm_str, what: &str) -> Result<String, Broken> {
        let octets = self.octets(text.at, text.len as usize, what)?;
        String::from_utf8(octets).map_err(|_| format!("{what} is not UTF-8"))
    }

    /// Octets given as a list.
    pub(crate) fn bytes(&self, list: dm_list, what: &str) -> Result<Vec<u8>, Broken> {
        if list.len > 0 && list.stride != 1 {
            return Err(format!("{what} has a stride of {} instead of 1", list.stride));
        }
        self.octets(list.at.cast(), list.len as usize, what)
    }

    fn octets(&self, at: *const u8, len: usize, what: &str) -> Result<Vec<u8>, Broken> {
        if len == 0 {
            return Ok(Vec::new());
        }
        if len > isize::MAX as usize {
            return Err(format!("{what} is {len} octets long"));
        }
        self.check(at, len, what)?;
        // SAFETY: in the arena, or vouched for by the caller.
        Ok(unsafe { std::slice::from_raw_parts(at, len) }.to_vec())
    }

    /// Frozen elements (those without a size of their own).
    pub(crate) fn frozen<T: Copy>(&self, list: dm_list, what: &str) -> Result<Vec<T>, Broken> {
        (0..list.len)
            .map(|index| {
                let at: *const T = element(list, index).cast();
                if (list.stride as usize) < size_of::<T>() {
                    return Err(format!("{what} has a stride of {}", list.stride));
                }
                self.check(at.cast(), size_of::<T>(), what)?;
                // SAFETY: in the arena, or vouched for by the caller; frozen types are plain numbers and pointers.
                Ok(unsafe { at.read_unaligned() })
            })
            .collect()
    }

    /// Elements that begin with their size.
    pub(crate) fn list<T: Sized32>(&self, list: dm_list, what: &str) -> Result<Vec<T>, Broken> {
        self.each(list, what).collect()
    }

    /// The same, one after the other.
    pub(crate) fn each<T: Sized32>(
        &self,
        list: dm_list,
        what: &str,
    ) -> impl ExactSizeIterator<Item = Result<T, Broken>> {
        (0..list.len as usize).map(move |index| self.one(element(list, index as u32).cast::<T>(), what))
    }

    /// A struct that begins with its size: a shorter one is filled up with zeros, a longer one is cut.
    pub(crate) fn one<T: Sized32>(&self, at: *const T, what: &str) -> Result<T, Broken> {
        self.check(at.cast(), T::LEAST, what)?;
        // SAFETY: T::LEAST octets are there, and the first are its size.
        let size = unsafe { at.cast::<u32>().read_unaligned() } as usize;
        if size < T::LEAST || size > 1 << 16 {
            return Err(format!(
                "{what}: {} of size {size}, it has at least {} octets",
                T::NAME,
                T::LEAST
            ));
        }
        self.check(at.cast(), size, what)?;
        let mut value = T::empty();
        let len = size.min(size_of::<T>());
        // SAFETY: `len` octets are there on both sides, and every bit pattern is a value of T.
        unsafe { std::ptr::copy_nonoverlapping(at.cast::<u8>(), (&raw mut value).cast(), len) };
        Ok(value)
    }
}

impl Reader {
    /// Hands a struct to `look`: where it stands when the caller vouches for it, else as a copy.
    pub(crate) fn see<T: Sized32, R>(
        &self,
        at: *const T,
        what: &str,
        look: impl FnOnce(&T) -> Result<R, Broken>,
    ) -> Result<R, Broken> {
        if self.within.is_none() && !at.is_null() && at.is_aligned() {
            // SAFETY: vouched for, and it begins with its size.
            let size = unsafe { at.cast::<u32>().read() } as usize;
            if (size_of::<T>()..=1 << 16).contains(&size) {
                // SAFETY: a whole T is there, every bit pattern is a value of it, and a request stays as it is meanwhile.
                return look(unsafe { &*at });
            }
        }
        look(&self.one(at, what)?)
    }

    /// The same with each element of a list, one after the other.
    pub(crate) fn see_each<T: Sized32>(
        &self,
        list: dm_list,
        what: &str,
        mut look: impl FnMut(&T) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        (0..list.len).try_for_each(|index| self.see(element(list, index).cast::<T>(), what, &mut look))
    }
}

fn element(list: dm_list, index: u32) -> *const c_void {
    list.at.wrapping_byte_add(list.stride as usize * index as usize)
}

/// Elements of an answer, made by the caller: zeroed memory.
#[derive(Debug)]
pub(crate) struct Rows {
    memory: Box<[u128]>,
    stride: usize,
    capacity: usize,
}

impl Rows {
    /// Room for so many elements.
    pub(crate) fn of<T: Sized32>(capacity: usize) -> Self {
        let octets = size_of::<T>() * capacity;
        Self {
            memory: vec![0; octets.div_ceil(ALIGN)].into_boxed_slice(),
            stride: size_of::<T>(),
            capacity,
        }
    }

    /// As the callee gets it.
    pub(crate) fn as_rows(&mut self) -> dm_rows {
        self.first_rows(self.capacity)
    }

    /// The first `count` of them as the callee gets them.
    pub(crate) fn first_rows(&mut self, count: usize) -> dm_rows {
        let mut rows = dm_rows::empty();
        rows.stride = self.stride as u32;
        rows.at = self.memory.as_mut_ptr().cast();
        rows.capacity = self.capacity.min(count) as u64;
        rows
    }

    /// Elements there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Zeroes elements again; as many as there are of them.
    pub(crate) fn clear(&mut self, elements: Range<usize>) {
        let end = elements.end.min(self.capacity);
        let Some(count) = end.checked_sub(elements.start) else {
            return;
        };
        let all: *mut u8 = self.memory.as_mut_ptr().cast();
        // SAFETY: elements below the capacity are within the memory, which is plain numbers.
        unsafe {
            all.add(self.stride * elements.start)
                .write_bytes(0, self.stride * count)
        };
    }

    /// The first `len` elements.
    pub(crate) fn read<T: Sized32>(&self, len: u64, what: &str) -> Result<Vec<T>, Broken> {
        if len > self.capacity as u64 {
            return Err(format!("{what}: {len} elements in room for {}", self.capacity));
        }
        (0..len as usize).map(|index| self.at(index, what)).collect()
    }

    /// One element.
    pub(crate) fn at<T: Sized32>(&self, index: usize, what: &str) -> Result<T, Broken> {
        let all: *const u8 = self.memory.as_ptr().cast();
        let reader = Reader::within(all, self.stride * self.capacity);
        let at = all.wrapping_add(self.stride * index).cast::<T>();
        if index >= self.capacity {
            return Err(format!(
                "{what}[{index}] is beyond the {} there are",
                self.capacity
            ));
        }
        // SAFETY: `index` is below the capacity, so that its size is there.
        let size = unsafe { at.cast::<u32>().read() };
        if size as usize > self.stride {
            return Err(format!(
                "{what}[{index}]: {} of size {size} in room for {}",
                T::NAME,
                self.stride
            ));
        }
        reader.one(at, what)
    }
}

impl Rows {
    /// The callee left this element alone.
    pub(crate) fn starts_with_zero(&self, index: usize) -> bool {
        let all: *const u8 = self.memory.as_ptr().cast();
        // SAFETY: an element below the capacity begins with its size.
        index < self.capacity && unsafe { all.add(self.stride * index).cast::<u32>().read() == 0 }
    }
}

/// Writes elements of an answer into the caller's rows: true when all of them fitted.
///
/// # Safety
/// `rows` is the `dm_rows` of a call in progress.
pub(crate) unsafe fn fill<T: Sized32>(rows: *mut dm_rows, values: &[T]) -> bool {
    // SAFETY: valid by contract.
    let Some(rows) = (unsafe { rows.as_mut() }) else {
        return false;
    };
    rows.len = values.len() as u64;
    let stride = rows.stride as usize;
    for (index, value) in values.iter().take(rows.capacity as usize).enumerate() {
        // SAFETY: `capacity` elements of `stride` octets are the caller's room.
        unsafe {
            write_sized(
                rows.at.cast::<u8>().wrapping_add(index * stride).cast(),
                stride,
                value,
            )
        };
    }
    rows.len <= rows.capacity
}

/// Writes a struct into room for `room` octets: cut, with its size told as what was written.
///
/// # Safety
/// `room` octets are there and writable.
pub(crate) unsafe fn write_sized<T: Sized32>(to: *mut T, room: usize, value: &T) {
    let len = size_of::<T>().min(room);
    // SAFETY: `len` octets are there on both sides.
    unsafe {
        std::ptr::copy_nonoverlapping((value as *const T).cast::<u8>(), to.cast::<u8>(), len);
        if len >= 4 {
            to.cast::<u32>().write_unaligned(len as u32);
        }
    }
}

/// Writes a struct over one that the caller made, as long as the caller's is.
///
/// # Safety
/// `to` points to a struct whose size is told.
pub(crate) unsafe fn write_over<T: Sized32>(to: *mut T, value: &T) {
    if to.is_null() {
        return;
    }
    // SAFETY: valid by contract, and begins with its size.
    let room = unsafe { to.cast::<u32>().read_unaligned() } as usize;
    // SAFETY: the caller told its size.
    unsafe { write_sized(to, room, value) };
}

/// Reads a text that must end with a zero octet within its field.
pub(crate) fn terminated(octets: &[u8], what: &str) -> Result<String, Broken> {
    let end = octets
        .iter()
        .position(|octet| *octet == 0)
        .ok_or_else(|| format!("{what} does not end within its {} octets", octets.len()))?;
    std::str::from_utf8(&octets[..end])
        .map(str::to_owned)
        .map_err(|_| format!("{what} is not UTF-8"))
}

/// Writes a text with a zero octet behind it, cut at a character if it is too long.
pub(crate) fn terminate(to: &mut [u8], text: &str) {
    let text = cut(text, to.len() - 1);
    to[..text.len()].copy_from_slice(text.as_bytes());
    to[text.len()] = 0;
}

/// The longest beginning of a text of at most `len` octets.
pub(crate) fn cut(text: &str, len: usize) -> &str {
    &text[..text.floor_char_boundary_at(len)]
}

trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, len: usize) -> usize;
}

impl FloorCharBoundary for str {
    fn floor_char_boundary_at(&self, len: usize) -> usize {
        if len >= self.len() {
            return self.len();
        }
        (0..=len).rev().find(|at| self.is_char_boundary(*at)).unwrap_or(0)
    }
}

/// An error struct to be filled in, on the heap so that it stays where it is.
pub(crate) fn blank_error() -> Box<dm_error> {
    Box::new(dm_error::empty())
}
