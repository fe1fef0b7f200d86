//! Which address stands for which name, as a file has it for the next relay.

use std::io::{self, BufWriter, Read as _};
use std::path::Path;

use super::{BYTES, EXPIRY, Entry, Fakes, HELD, NAMES, is_host, is_within, now};

/// What a line of the file has beside a name, in bytes, at most.
const LINE_BYTES: usize = 40;

/// What stands for the name of an address that has none, in the file.
const NO_NAME: &str = ".";

impl Fakes {
    /// Takes in what was written down, if anything was.
    pub(super) fn restore(&mut self, file: &Path) {
        match read(file) {
            Ok(text) => self.load(&text, now()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("can't read {}: {error}", file.display()),
        }
    }

    /// Writes down what has changed, if there is a file for it.
    pub(crate) fn save(&mut self) {
        let Some(file) = &self.file else {
            return;
        };
        if !std::mem::take(&mut self.changed) {
            return;
        }
        match write(file, |file| self.write(file, now())) {
            Ok(()) => self
                .entries
                .values_mut()
                .for_each(|entry| entry.written = entry.used),
            Err(error) => tracing::warn!("can't write {}: {error}", file.display()),
        }
    }

    pub(super) fn header(&self) -> String {
        let ((v4, p4), (v6, p6)) = (self.networks.ipv4, self.networks.ipv6);
        format!("cgtproxy-relay names 1 {v4}/{p4} {v6}/{p6}")
    }

    fn write(&self, mut file: impl io::Write, now: u64) -> io::Result<()> {
        writeln!(file, "{}", self.header())?;
        for (number, Entry { name, used, .. }) in &self.entries {
            if used.saturating_add(EXPIRY) > now {
                writeln!(file, "{number} {used} {name}")?;
            }
        }
        for (number, used) in &self.freed {
            if is_within(HELD, *used, now) {
                writeln!(file, "{number} {used} {NO_NAME}")?;
            }
        }
        file.flush()
    }

    #[cfg(test)]
    pub(super) fn text(&self, now: u64) -> String {
        let mut text = Vec::new();
        self.write(&mut text, now).unwrap();
        String::from_utf8(text).unwrap()
    }

    /// What makes no sense is left out: it is a cache.
    pub(crate) fn load(&mut self, text: &str, now: u64) {
        let mut lines = text.lines();
        if lines.next() != Some(&self.header()) {
            return;
        }
        let size = self.networks.size();
        for line in lines.take(self.most() + self.most_freed()) {
            let mut words = line.split(' ');
            let (Some(number), Some(used), Some(name), None) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                continue;
            };
            if let (Ok(number), Ok(used)) = (number.parse::<u32>(), used.parse::<u64>())
                && (1..size - 1).contains(&number)
                && used.saturating_add(EXPIRY) > now
                && !self.entries.contains_key(&number)
                && !self.is_freed.contains(&number)
            {
                let name = name.to_ascii_lowercase();
                if name == NO_NAME && self.freed.len() < self.most_freed() {
                    self.freed.push_back((number, used.min(now)));
                    self.is_freed.insert(number);
                } else if is_host(&name)
                    && !self.numbers.contains_key(name.as_str())
                    && !self.is_full(&name)
                {
                    self.insert(number, name.into(), used.min(now));
                }
            }
        }
    }
}

/// Reads a file, and no more of it than it can have.
fn read(file: &Path) -> io::Result<String> {
    let most = BYTES + LINE_BYTES * 2 * NAMES as usize;
    let mut text = String::new();
    std::fs::File::open(file)?
        .take(most as u64)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Replaces a file at once, for its owner's eyes only.
fn write(
    file: &Path,
    content: impl FnOnce(BufWriter<std::fs::File>) -> io::Result<()>,
) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let fresh = file.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    content(BufWriter::new(options.open(&fresh)?))?;
    std::fs::rename(&fresh, file)
}
