//! Packet marks: one for each proxy, out of a range of bits that are the helper's own.

use std::collections::{BTreeSet, VecDeque};

use crate::peer::Uid;

/// However many bits a mask has, no more proxies than this have a mark: the number of a mark has to fit into 24 bits
/// beside a few others.
const MOST_MARKS: u32 = (1 << 23) - 1;

/// A user with so many marks that rest gets one of these and no other: whoever gives up all proxies again and again does
/// not come by every mark there is. As many as two policies have by default.
const MOST_RESTING: usize = 32;

/// Of so many marks that rest it is known whose they were.
const MOST_FORMER: usize = 1024;

/// The mark that leads a packet to one proxy. It has the divert bit, and no bit outside the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u32);

impl Mark {
    /// The value, as nftables and the routing rules have it.
    #[must_use]
    pub fn value(self) -> u32 {
        self.0
    }

    /// A mark that was found in the nftables table.
    pub(crate) fn adopted(value: u32) -> Self {
        Self(value)
    }
}

/// The bits of a packet's mark that belong to the helper. The highest of them says 'divert', the
/// others number the proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkRange {
    mask: u32,
}

impl Default for MarkRange {
    /// The eight highest bits: other programs mostly use lower ones.
    fn default() -> Self {
        Self { mask: 0xff00_0000 }
    }
}

/// What a mask must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the mark mask needs at least two bits: one says that a packet is diverted, the others where to"
)]
pub struct MaskTooSmall;

impl MarkRange {
    /// The range of the bits that are set in `mask`.
    ///
    /// # Errors
    /// If it has fewer than two.
    pub fn new(mask: u32) -> Result<Self, MaskTooSmall> {
        if mask.count_ones() < 2 {
            Err(MaskTooSmall)
        } else {
            Ok(Self { mask })
        }
    }

    /// The bits of the range.
    #[must_use]
    pub fn mask(self) -> u32 {
        self.mask
    }

    /// The bit that every diverted packet has.
    #[must_use]
    pub fn divert(self) -> u32 {
        1 << (31 - self.mask.leading_zeros())
    }

    /// How many proxies the whole machine can have.
    #[must_use]
    pub fn capacity(self) -> u32 {
        // Number 0 is left out: without the divert bit it would be the mark of everything else.
        ((1u32 << (self.mask.count_ones() - 1)) - 1).min(MOST_MARKS)
    }

    /// The mark with this number, which is spread over the bits of the mask from the lowest up.
    fn mark(self, number: u32) -> Mark {
        let mut value = self.divert();
        let mut bits = self.mask & !self.divert();
        let mut rest = number;
        while bits != 0 {
            let lowest = bits & bits.wrapping_neg();
            if rest & 1 != 0 {
                value |= lowest;
            }
            rest >>= 1;
            bits &= !lowest;
        }
        Mark(value)
    }

    /// The number of this mark, from 1 to [`Self::capacity`].
    #[must_use]
    pub fn number(self, mark: Mark) -> u32 {
        let mut bits = self.mask & !self.divert();
        let (mut number, mut place) = (0, 1u32);
        while bits != 0 {
            let lowest = bits & bits.wrapping_neg();
            if mark.0 & lowest != 0 {
                number |= place;
            }
            place <<= 1;
            bits &= !lowest;
        }
        number
    }

    /// The conntrack mark of this proxy's hijacked DNS queries, which are not diverted.
    #[must_use]
    pub fn dns_value(self, mark: Mark) -> u32 {
        mark.0 & !self.divert()
    }

    /// The conntrack mark of connections that a TPROXY server has begun: the divert bit, and the number that no proxy
    /// has.
    #[must_use]
    pub fn begun_by_proxy(self) -> u32 {
        self.divert()
    }

    /// Whether a mark is one of this range.
    #[must_use]
    pub fn has(self, mark: Mark) -> bool {
        let outside = mark.0 & !self.mask != 0;
        !outside
            && mark.0 & self.divert() != 0
            && (1..=self.capacity()).contains(&self.number(mark))
    }
}

/// Which marks are in use.
#[derive(Debug, Clone)]
pub struct MarkAllocator {
    range: MarkRange,
    used: BTreeSet<Mark>,
    /// The marks that rest since they were freed, and whose they were, the first to be freed first. Connections of the
    /// former proxy may still have such a mark, and whose it is may ask where they go. A helper that is started again
    /// does not know them.
    resting: VecDeque<(Uid, Mark)>,
    /// The number that was given out last of those that did not rest.
    last: u32,
}

impl MarkAllocator {
    /// An allocator that has given out no mark.
    #[must_use]
    pub fn new(range: MarkRange) -> Self {
        Self {
            range,
            used: BTreeSet::new(),
            resting: VecDeque::new(),
            last: 0,
        }
    }

    /// Gives a user a mark that is not in use; none if there is none. It is another user's former one only if there is
    /// no other.
    pub fn allocate(&mut self, uid: Uid) -> Option<Mark> {
        let own = self.resting.iter().filter(|(former, _)| *former == uid);
        let mark = match own.count() < MOST_RESTING {
            true => self.new_one().or_else(|| self.rested_of(uid)),
            false => self.rested_of(uid),
        };
        let mark = mark.or_else(|| Some(self.resting.pop_front()?.1))?;
        self.used.insert(mark);
        Some(mark)
    }

    /// The next mark that neither is in use nor rests.
    fn new_one(&mut self) -> Option<Mark> {
        let capacity = self.range.capacity();
        for _ in 0..capacity {
            self.last = self.last % capacity + 1;
            let mark = self.range.mark(self.last);
            if !self.used.contains(&mark) && !self.resting.iter().any(|(_, other)| *other == mark) {
                return Some(mark);
            }
        }
        None
    }

    /// The mark of this user's that rests for longest.
    fn rested_of(&mut self, uid: Uid) -> Option<Mark> {
        let place = self.resting.iter().position(|(former, _)| *former == uid)?;
        let (_, mark) = self.resting.remove(place)?;
        Some(mark)
    }

    /// Notes that a mark is in use that the kernel has already. False if it is not of this range or taken. The next
    /// mark to be given out comes after it.
    pub fn adopt(&mut self, mark: Mark) -> bool {
        let adopted = self.range.has(mark) && self.used.insert(mark);
        if adopted {
            self.last = self.last.max(self.range.number(mark));
        }
        adopted
    }

    /// Whether a mark has been given out or adopted.
    #[must_use]
    pub fn is_used(&self, mark: Mark) -> bool {
        self.used.contains(&mark)
    }

    /// Takes a user's mark back.
    pub fn free(&mut self, uid: Uid, mark: Mark) {
        if self.used.remove(&mark) {
            self.resting.push_back((uid, mark));
        }
        if self.resting.len() > MOST_FORMER {
            self.resting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Uid = Uid::ROOT;

    #[test]
    fn gives_out_each_mark_once() {
        // The others have 127 marks each, which take Miri a minute.
        let few = if cfg!(miri) { 2 } else { 4 };
        let masks = [0x0000_00c1, 0x8000_0001, 0xff00_0000, 0x00f0_0f00];
        for mask in masks.into_iter().take(few) {
            let range = MarkRange::new(mask).unwrap();
            let mut marks = MarkAllocator::new(range);
            let mut seen = BTreeSet::new();
            while let Some(mark) = marks.allocate(ONE) {
                assert!(range.has(mark));
                assert_eq!(range.mark(range.number(mark)), mark);
                assert!(seen.insert(mark));
            }
            assert_eq!(seen.len(), range.capacity() as usize);
        }
    }

    #[test]
    fn a_freed_mark_is_the_last_to_be_given_out_again() {
        let mut marks = MarkAllocator::new(MarkRange::new(0xf000_0000).unwrap());
        let first = marks.allocate(ONE).unwrap();
        marks.free(ONE, first);
        let next: Vec<_> = std::iter::from_fn(|| marks.allocate(ONE)).collect();
        assert_eq!(next.len(), 7);
        assert_eq!(next.last(), Some(&first));
    }

    #[test]
    fn a_freed_mark_is_another_users_only_if_there_is_no_other() {
        let two = Uid::for_test(2);
        let mut marks = MarkAllocator::new(MarkRange::new(0xff00_0000).unwrap());
        let first = marks.allocate(ONE).unwrap();
        marks.free(ONE, first);
        let mut seen = BTreeSet::new();
        let rounds = if cfg!(miri) { 100 } else { 1000 };
        for _ in 0..rounds {
            let mark = marks.allocate(two).unwrap();
            marks.free(two, mark);
            seen.insert(mark);
        }
        assert!(!seen.contains(&first));
        assert_eq!(seen.len(), MOST_RESTING);
        // Nor is there less for others.
        let all: BTreeSet<_> = std::iter::from_fn(|| marks.allocate(ONE)).collect();
        assert_eq!(all.len(), 127);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes long")]
    fn it_is_not_known_of_all_marks_that_rest_whose_they_were() {
        let mut marks = MarkAllocator::new(MarkRange::new(0xffff_ffff).unwrap());
        for uid in 0..2 * MOST_FORMER as u32 {
            let uid = Uid::for_test(uid);
            let mark = marks.allocate(uid).unwrap();
            marks.free(uid, mark);
        }
        assert_eq!(marks.resting.len(), MOST_FORMER);
    }

    #[test]
    fn adopts_what_the_kernel_has() {
        let range = MarkRange::new(0xff00_0000).unwrap();
        let mut marks = MarkAllocator::new(range);
        assert!(marks.adopt(Mark(0x8100_0000)));
        assert!(!marks.adopt(Mark(0x8100_0000)));
        assert!(!marks.adopt(Mark(0x0100_0000)));
        assert!(!marks.adopt(Mark(0x8100_0001)));
        assert!(!marks.adopt(Mark(0x8000_0000)));
        assert_eq!(marks.allocate(ONE), Some(Mark(0x8200_0000)));
        // One that becomes free after a restart rests, too.
        marks.free(ONE, Mark(0x8100_0000));
        assert_eq!(marks.allocate(ONE), Some(Mark(0x8300_0000)));
    }

    #[test]
    fn numbers_end_where_there_is_no_room_for_more() {
        let range = MarkRange::new(0xffff_ffff).unwrap();
        assert!(range.has(range.mark(MOST_MARKS)));
        assert!(!range.has(range.mark(MOST_MARKS + 1)));
    }

    #[test]
    fn a_mask_of_one_bit_is_too_small() {
        assert_eq!(MarkRange::new(0x8000_0000), Err(MaskTooSmall));
        assert_eq!(MarkRange::new(0), Err(MaskTooSmall));
        assert_eq!(
            MarkRange::new(0xffff_ffff).map(MarkRange::capacity),
            Ok(0x007f_ffff)
        );
    }
}
