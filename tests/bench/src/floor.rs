//! The least that a program in user space can do about a new control group: one process that reads inotify's event,
//! puts the control group's id into a message that is there already, and sends it. It has no policy, no
//! second process, no limits, and looks at one directory.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::netlink::Writer;

/// The floor's table, and its map.
pub(crate) const TABLE: &str = "floor";
pub(crate) const MAP: &str = "cgroups";

/// What an element of the floor's map does, by the level of the directory that is watched.
pub(crate) fn ruleset(level: usize) -> String {
    format!(
        "table inet {TABLE} {{
             map {MAP} {{ type cgroupsv2 : verdict; }}
             chain output {{
                 type route hook output priority mangle;
                 socket cgroupv2 level {level} vmap @{MAP}
             }}
         }}"
    )
}

/// Gives every control group that comes in this directory the verdict `drop`, until it is killed.
pub(crate) fn run(directory: &Path) {
    // As the daemons do.
    cgtproxy_proto::scheduling::take_short_turns().expect("nobody forbids it");
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).expect("an inotify instance");
    let events = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
    inotify.add_watch(directory, events).expect("a directory");
    let mut writer = Writer::new(TABLE, MAP).expect("a netlink socket");
    let mut known: HashMap<OsString, u64> = HashMap::new();
    println!("ready");
    loop {
        let (mut add, mut delete) = (Vec::new(), Vec::new());
        for event in inotify.read_events().expect("events") {
            let Some(name) = event.name else { continue };
            if event.mask.contains(AddWatchFlags::IN_CREATE) {
                // One that is gone again needs nothing.
                if let Ok(metadata) = std::fs::metadata(directory.join(&name)) {
                    add.push(metadata.ino());
                    known.insert(name, metadata.ino());
                }
            } else if let Some(id) = known.remove(&name) {
                match add.iter().position(|&new| new == id) {
                    Some(position) => _ = add.swap_remove(position),
                    None => delete.push(id),
                }
            }
        }
        if !add.is_empty() || !delete.is_empty() {
            writer.change(&add, &delete).expect("the kernel takes it");
        }
    }
}
