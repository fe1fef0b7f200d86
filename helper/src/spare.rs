//! File descriptors that are kept back.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::fcntl_dupfd_cloexec;

/// Descriptors that are kept back, so that a call always has those it needs however many connections
/// there are.
#[derive(Debug, Clone)]
pub struct Spare(Rc<RefCell<Vec<OwnedFd>>>);

/// How many. A call has two open at once, the subtree's and that of a control group's parent; asking who is in
/// which group may take more.
const SPARE: usize = 4;

/// Room for descriptors, which is taken back when this is dropped.
#[derive(Debug)]
pub struct Room(Spare);

impl Spare {
    pub(crate) fn of(any: &OwnedFd) -> Self {
        let spare = (0..=SPARE).map_while(|_| fcntl_dupfd_cloexec(any, 0).ok());
        Self(Rc::new(RefCell::new(spare.collect())))
    }

    /// Gives the descriptors away for as long as the returned value lives.
    #[must_use]
    pub fn make_room(&self) -> Room {
        // One stays, to be copied in the end.
        self.0.borrow_mut().truncate(1);
        Room(self.clone())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut spare = self.0.0.borrow_mut();
        let copies = spare.first().map(|any| {
            let missing = (SPARE + 1).saturating_sub(spare.len());
            let copies = (0..missing).map_while(|_| fcntl_dupfd_cloexec(any, 0).ok());
            copies.collect::<Vec<_>>()
        });
        // Fewer if the limit on descriptors has been lowered; another call makes up for it.
        spare.extend(copies.unwrap_or_default());
    }
}
