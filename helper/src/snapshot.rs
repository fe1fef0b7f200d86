//! What a helper tells the next one: the layouts of all policies, in a file in memory that the service manager
//! keeps while no helper runs (FDSTORE= of sd_notify(3)). It outlives the helper however that ends.
//!
//! The kernel's table is the truth. It has a stamp for every policy, which changes with the layout in one
//! transaction, and the file says which layout a stamp is the name of. What the kernel is about to be told is
//! written down first, so whenever the helper is killed, the layout that the kernel has is in the file. What has
//! another stamp is not looked at. The verdicts of single control groups are in the table alone.
//!
//! The file is a log: a header that says where it begins, then one record after the other. When it has grown, all
//! that is in force is written once more at its end, the header is made to point there, and what was before is
//! given back to the system.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::rc::{Rc, Weak};

use cgtproxy_proto::notify;
use cgtproxy_proto::text::chain;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::io::Errno;

use crate::mark::MarkRange;
use crate::nft::{Bypass, BypassList, Layout, Records, Stamp};
use crate::peer::Uid;

mod record;

/// The name by which the service manager gives it back.
pub const NAME: &str = "snapshot";

/// What it begins with: what it is, and the version of everything that follows.
const MAGIC: [u8; 12] = *b"cgtproxy\0\0\x05\0";

/// The header: [`MAGIC`], the mark mask, where the log begins.
const HEADER: u64 = 24;

/// What comes before a record: its length and its checksum.
const PREFIX: usize = 12;

/// More than all users of a machine may have, in bytes: a longer log is not looked at.
const MOST: u64 = 256 * 1024 * 1024;

/// How much the log may grow beyond twice what is in force.
const SLACK: u64 = 64 * 1024;

/// What is said where nobody keeps one.
const NOT_LEFT: &str = "can't leave a snapshot for the next helper";

/// Why a snapshot is thrown away.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't be read.
    #[error("can't be read")]
    Read(#[from] io::Error),
    /// It is something else, or of another version.
    #[error("is not one that this version wrote")]
    Format,
    /// The administrator has changed the mask since.
    #[error("is for another mark-mask")]
    Marks,
}

/// Where the bytes are.
#[derive(Debug)]
enum Place {
    /// Nobody keeps it.
    Nowhere,
    File(File),
    #[cfg(any(test, fuzzing))]
    Memory(Memory),
}

/// A file for tests.
#[cfg(any(test, fuzzing))]
pub(crate) type Memory = Rc<std::cell::RefCell<Vec<u8>>>;

/// The snapshot that this helper writes.
#[derive(Debug)]
pub struct Snapshot {
    place: Place,
    start: u64,
    end: u64,
    /// How much of the log was in force when it was last written as a whole.
    in_force: u64,
    /// Writing has failed, and that was said.
    failed: bool,
    /// The service manager is to be given the file, once there is something in it.
    new: bool,
    lists: Lists,
}

/// The bytes of bypass lists, by their numbers: a list never changes, and may be most of a layout that does.
#[derive(Debug, Default)]
struct Lists(BTreeMap<u32, (Weak<Bypass>, Vec<u8>)>);

impl Lists {
    fn get(&mut self, list: &BypassList) -> &[u8] {
        let (known, bytes) = self.0.entry(list.number).or_default();
        // Another one may have had its number before.
        if !std::ptr::eq(known.as_ptr(), Rc::as_ptr(&list.destinations)) {
            *known = Rc::downgrade(&list.destinations);
            *bytes = record::encode_list(Some(list));
        }
        bytes
    }

    /// Forgets those that nobody has any more.
    fn tidy(&mut self) {
        self.0.retain(|_, (list, _)| list.strong_count() > 0);
    }
}

impl Snapshot {
    /// A snapshot that nobody keeps.
    #[must_use]
    pub fn nowhere() -> Self {
        Self::at(Place::Nowhere)
    }

    /// One for tests, and what it says.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn in_memory(memory: &Memory, range: MarkRange) -> (Self, Result<Records, Error>) {
        let records = parse(&memory.borrow(), range);
        let mut this = Self::at(Place::Memory(memory.clone()));
        this.end = memory.borrow().len() as u64;
        (this, records)
    }

    /// This snapshot once more, over a copy of its bytes.
    #[cfg(test)]
    pub(crate) fn fork(&self, copy: &Memory) -> Self {
        Self {
            start: self.start,
            end: self.end,
            in_force: self.in_force,
            ..Self::at(Place::Memory(copy.clone()))
        }
    }

    /// Goes on with the file that an earlier helper left, or else with a new one, which the service manager
    /// is asked to keep once something has been written. Returns what the earlier file says; what makes no sense is thrown
    /// away.
    #[must_use]
    pub fn open(stored: Option<File>, range: MarkRange) -> (Self, Records) {
        let mut records = Records::default();
        let mut place = None;
        if let Some(file) = stored {
            let length = file.metadata().map(|data| data.len());
            let read = read(&file, range);
            // However much has ever been written, what is not in force any more takes no memory.
            let fits = read.is_ok() || length.as_ref().is_ok_and(|length| *length <= MOST);
            place = length.ok().filter(|_| fits).map(|length| (file, length));
            match read {
                Ok(found) => records = found,
                Err(error) => {
                    tracing::warn!(
                        "the snapshot of an earlier helper {}; threw it away",
                        chain(&error)
                    );
                }
            }
        }
        let this = match place {
            Some((file, length)) => Self {
                end: length,
                ..Self::at(Place::File(file))
            },
            None if std::env::var_os(notify::VARIABLE).is_some() => match new_file() {
                Ok(file) => Self {
                    new: true,
                    ..Self::at(Place::File(file))
                },
                Err(error) => {
                    tracing::warn!("{NOT_LEFT}: {error}");
                    Self::nowhere()
                }
            },
            None => Self::nowhere(),
        };
        (this, records)
    }

    fn at(place: Place) -> Self {
        Self {
            place,
            start: 0,
            end: 0,
            in_force: 0,
            failed: false,
            new: false,
            lists: Lists::default(),
        }
    }

    /// Writes down what the kernel is about to have for a user. What it has now stays written down.
    pub fn add(&mut self, uid: Uid, stamp: Stamp, layout: &Layout) {
        let mut bytes = Vec::new();
        push(&mut bytes, uid, stamp, layout, &mut self.lists);
        let written = self.write(self.end, &bytes);
        if self.succeeded(written) {
            self.end += bytes.len() as u64;
        }
    }

    /// Whether most of it is not in force any more.
    #[must_use]
    pub fn is_long(&self) -> bool {
        self.end - self.start > 2 * self.in_force + SLACK
    }

    /// Writes everything anew: what is in force, and nothing else.
    pub fn renew<'a>(
        &mut self,
        range: MarkRange,
        in_force: impl Iterator<Item = (Uid, Stamp, &'a Layout)>,
    ) {
        let mut bytes = Vec::new();
        for (uid, stamp, layout) in in_force {
            push(&mut bytes, uid, stamp, layout, &mut self.lists);
        }
        self.lists.tidy();
        let start = self.end.max(HEADER);
        let mut header = Vec::from(MAGIC);
        header.extend(range.mask().to_le_bytes());
        header.extend(start.to_le_bytes());
        // The header is last: as long as it is the old one, the old log is there.
        let written = self
            .write(start, &bytes)
            .and_then(|()| self.write(0, &header));
        if self.succeeded(written) {
            self.start = start;
            self.in_force = bytes.len() as u64;
            self.end = start + self.in_force;
            // The header says where it begins, whether or not what was before is still there.
            if let Err(error) = self.forget(start) {
                tracing::debug!("can't give back what the snapshot had before: {error}");
            }
            self.hand_over();
        }
    }

    /// Has the service manager keep a new file from now on, in place of the one that it has: there is room for one. That
    /// one is of use for as long as there is nothing in the new one.
    fn hand_over(&mut self) {
        if let (true, Place::File(file)) = (self.new, &self.place) {
            self.new = false;
            if let Err(error) = notify::store(NAME, file.as_fd()) {
                tracing::warn!("{NOT_LEFT}: {error}");
                self.place = Place::Nowhere;
            }
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match &self.place {
            Place::Nowhere => Ok(()),
            Place::File(file) => file.write_all_at(bytes, at),
            #[cfg(any(test, fuzzing))]
            Place::Memory(memory) => {
                let mut memory = memory.borrow_mut();
                let at = usize::try_from(at).map_err(io::Error::other)?;
                let end = at + bytes.len();
                if memory.len() < end {
                    memory.resize(end, 0);
                }
                let room = memory.get_mut(at..end);
                room.ok_or(io::ErrorKind::Other)?.copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Gives the memory back that is between the header and the log.
    fn forget(&self, start: u64) -> io::Result<()> {
        match &self.place {
            Place::File(file) if start > HEADER => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, flags, HEADER, start - HEADER).map_err(Into::into)
            }
            _ => Ok(()),
        }
    }

    /// Says it when writing begins to fail. The next helper takes over what it does not know about less well,
    /// and nothing else comes of that.
    fn succeeded(&mut self, written: io::Result<()>) -> bool {
        if let Err(error) = &written
            && !self.failed
        {
            tracing::warn!("can't write the snapshot for the next helper: {error}");
        }
        self.failed = written.is_err();
        written.is_ok()
    }
}

/// A file in memory.
fn new_file() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC;
    // Older kernels do not know the flag (Linux 6.3).
    let file = match memfd_create(c"cgtproxy-snapshot", flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create(c"cgtproxy-snapshot", flags),
        file => file,
    }?;
    Ok(file.into())
}

/// Reads what the service manager gave back.
fn read(file: &File, range: MarkRange) -> Result<Records, Error> {
    let length = file.metadata()?.len();
    let mut header = [0; HEADER as usize];
    if length < HEADER {
        return Err(Error::Format);
    }
    file.read_exact_at(&mut header, 0)?;
    let start = log_start(&header, range)?;
    let length = length.checked_sub(start).ok_or(Error::Format)?;
    if length > MOST {
        return Err(Error::Format);
    }
    let mut log = vec![0; usize::try_from(length).map_err(|_| Error::Format)?];
    file.read_exact_at(&mut log, start)?;
    Ok(records(&log, range))
}

/// Reads the bytes of a snapshot.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse(bytes: &[u8], range: MarkRange) -> Result<Records, Error> {
    let header = bytes.first_chunk().ok_or(Error::Format)?;
    let start = usize::try_from(log_start(header, range)?).map_err(|_| Error::Format)?;
    let log = bytes.get(start..).ok_or(Error::Format)?;
    Ok(records(log, range))
}

fn log_start(header: &[u8; HEADER as usize], range: MarkRange) -> Result<u64, Error> {
    let rest = header.strip_prefix(&MAGIC).ok_or(Error::Format)?;
    let (mask, start) = rest.split_first_chunk().ok_or(Error::Format)?;
    let start = start.first_chunk().copied().ok_or(Error::Format)?;
    if u32::from_le_bytes(*mask) != range.mask() {
        return Err(Error::Marks);
    }
    match u64::from_le_bytes(start) {
        start if start >= HEADER => Ok(start),
        _ => Err(Error::Format),
    }
}

/// All records up to the first that is not whole: a helper was killed when it wrote that one.
fn records(mut log: &[u8], range: MarkRange) -> Records {
    let mut records = Records::default();
    while let Some((bytes, rest)) = next(log) {
        log = rest;
        if let Some((uid, stamp, layout)) = record::decode(bytes, range) {
            records.insert(uid, stamp, layout);
        }
    }
    records
}

fn next(log: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = log.split_first_chunk()?;
    let (sum, rest) = rest.split_first_chunk()?;
    let (bytes, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    (checksum(bytes) == u64::from_le_bytes(*sum)).then_some((bytes, rest))
}

fn push(log: &mut Vec<u8>, uid: Uid, stamp: Stamp, layout: &Layout, lists: &mut Lists) {
    let bytes = match &layout.bypass {
        Some(list) => record::encode(uid, stamp, layout, lists.get(list)),
        None => record::encode(uid, stamp, layout, &record::encode_list(None)),
    };
    let Ok(length) = u32::try_from(bytes.len()) else {
        return;
    };
    log.reserve(PREFIX + bytes.len());
    log.extend(length.to_le_bytes());
    log.extend(checksum(&bytes).to_le_bytes());
    log.extend(bytes);
}

/// FNV-1a: against accidents, not against anybody. The file is the helper's own.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Takes what may be a snapshot, or a record of one, apart. What a record says is written down as it is said, and is
/// something that the kernel can be told.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use crate::config::Limits;
    use crate::nft::{self, Inherited, Known, Stamped};
    use crate::registry::Registry;

    let Ok(range) = MarkRange::new(0xff00_0000) else {
        return;
    };
    let _ = parse(bytes, range);
    let Some((uid, stamp, layout)) = record::decode(bytes, range) else {
        return;
    };
    let uid = Uid::for_test(uid);
    let memory = Memory::default();
    let (mut snapshot, _) = Snapshot::in_memory(&memory, range);
    snapshot.renew(range, [(uid, stamp, &layout)].into_iter());
    let again = parse(&memory.borrow(), range);
    assert!(again.is_ok_and(|records| records.get(uid, stamp) == Some(&layout)));
    memory.borrow_mut().pop();
    let cut = parse(&memory.borrow(), range);
    assert!(cut.is_ok_and(|records| records.get(uid, stamp).is_none()));

    let mut registry = Registry::new(Limits::default(), range);
    let layout = Rc::new(layout);
    let known = Known {
        stamped: Stamped { layout, stamp },
        elements: Vec::new(),
    };
    let _ = nft::batch(&known.plan(uid), range);
    registry.adopt(uid, Inherited::Known(known));
    let _ = nft::batch(registry.remove(uid).plan(), range);
}

#[cfg(test)]
mod tests;
